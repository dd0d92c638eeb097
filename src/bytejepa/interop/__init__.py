"""Other people's files, in and out: `pr832` reads and writes what the reference system's own script made."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "pr832":  # when first used, as all public names: it imports torch
        return importlib.import_module("bytejepa.interop.pr832")
    raise AttributeError(f"module 'bytejepa.interop' has no attribute {name!r}")
