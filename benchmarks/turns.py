"""Turns on one GPU: several programs compile side by side, and one at a time is timed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import filelock


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the turn; without the variable BYTEJEPA_TURN_FILE nobody else is there."""
    path = os.environ.get("BYTEJEPA_TURN_FILE")
    if path is None:
        yield
        return
    with filelock.FileLock(path):
        yield
