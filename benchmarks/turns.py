"""Turns on one GPU: several programs compile side by side, nobody is timed until all have, and then one at a time is.

Programs take turns if the variable BYTEJEPA_TURN_FILE names a file; they wait until there is one beside it that ends in
`.open` (`gpu_checks.py` makes it), and say with one ending in `.PID.ready` that they do.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the turn; without the variable nobody else is there."""
    path = os.environ.get("BYTEJEPA_TURN_FILE")
    if path is None:
        yield
        return
    Path(f"{path}.{os.getpid()}.ready").touch()
    wait_for(Path(f"{path}.open"))
    with filelock.FileLock(path, poll_interval=0.02):
        yield


def wait_for(*paths: Path) -> None:
    """Return once all `paths` exist."""
    while not all(path.exists() for path in paths):
        time.sleep(0.1)
