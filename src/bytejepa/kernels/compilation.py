"""How numba compiles functions and where the compiled code is kept.

Numba keeps compiled code with a function's own file and reuses it as long as that file stays as it is. But a compiled
function contains those that it calls, and their constants: after a change of another file the kept code would compute other
integers than the source says, and write files that no other machine reads. So the folder carries a digest of all files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numba import cfunc, njit
from numba import config as numba_config
from numba.core import ccallback, dispatcher
from numba.core.caching import FunctionCache

config: Any = numba_config  # its attributes are made at run time


def compiled(function: Callable[..., Any]) -> Any:
    """Return `function` compiled by numba: without the interpreter's lock, kept on disk for the next process."""
    return _kept(function, lambda **kept: njit(nogil=True, error_model="numpy", **kept)(function))


def compiled_for_c(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function of this `signature` for callers in C: its `.address` is what they call."""

    def compile_it(function: Callable[..., Any]) -> Any:
        return _kept(function, lambda **kept: cfunc(signature, error_model="numpy", **kept)(function))

    return compile_it


def _kept(function: Callable[..., Any], make: Callable[..., Any]) -> Any:
    """Return what `make` compiles of `function`, with code kept on disk unless there is no place for it."""
    try:
        with _cache_in(cache_folder(Path(inspect.getfile(function)).parent)):
            return make(cache=True)
    except RuntimeError:  # no folder to write to, no home to look for one in: every process compiles for itself
        return make()


@contextlib.contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """Have the functions that are decorated in the block kept in `folder`, by a `_Cache`; others of this process keep theirs."""
    modules: tuple[Any, ...] = (ccallback, dispatcher)
    before = config.CACHE_DIR
    config.CACHE_DIR = folder
    for module in modules:
        module.FunctionCache = _Cache
    try:
        yield
    finally:
        config.CACHE_DIR = before
        for module in modules:
            module.FunctionCache = FunctionCache


class _Cache(FunctionCache):
    """Numba's own, but a file that cannot be read or written costs the time to compile once more and nothing else."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # numba does not flush what it writes: a power cut leaves pickles that may raise anything
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk
            super().save_overload(sig, data)


@functools.cache
def cache_folder(package: Path) -> str:
    """Return where compiled code of just the sources in `package` and here is kept: beside them, or where that is not allowed,
    in the user's cache. NUMBA_CACHE_DIR comes before both."""
    sources = sorted({*package.glob("*.py"), *Path(__file__).parent.glob("*.py")})
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    if config.CACHE_DIR:
        place = Path(config.CACHE_DIR)
    elif os.access(package, os.W_OK):
        place = package / "__pycache__"
    else:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(place / f"bytejepa-{package.name}-{digest.hexdigest()[:16]}")
