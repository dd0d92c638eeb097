"""The memory of a process and of those that it has started, together."""

from __future__ import annotations

import threading

import psutil

LOOK_EVERY_S = 0.02


class PeakOfProcesses:
    """The largest sum of the resident sizes of this process and its children, in bytes, seen while the block runs.

    Pages that they share count in each.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakOfProcesses:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._stopped.wait(LOOK_EVERY_S):
            total = 0
            for process in (this, *this.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
