"""How the codec's functions are compiled and where the compiled code is kept.

Numba keeps compiled code with a function's own file and reuses it as long as that file stays as it is. But a compiled
function contains those that it calls, and their constants: after a change of another file the kept code would compute other
integers than the source says, and write files that no other machine reads. So the folder carries a digest of all files.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config as numba_config
from numba import njit

config: Any = numba_config  # its attributes are made at run time


def compiled(function: Callable[..., Any]) -> Any:
    """Return `function` compiled by numba: without the interpreter's lock, kept on disk for the next process."""
    before = config.CACHE_DIR  # read while a function is decorated; others of this process keep theirs
    config.CACHE_DIR = cache_folder()
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    finally:
        config.CACHE_DIR = before


@functools.cache
def cache_folder() -> str:
    """Return where compiled code of just these sources is kept: beside them, or where that is not allowed, in the user's
    cache. NUMBA_CACHE_DIR comes before both."""
    package = Path(__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.glob("*.py"))))
    if config.CACHE_DIR:
        place = Path(config.CACHE_DIR)
    elif os.access(package, os.W_OK):
        place = package / "__pycache__"
    else:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(place / f"bytejepa-codec-{digest.hexdigest()[:16]}")
