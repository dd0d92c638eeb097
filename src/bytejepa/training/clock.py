"""Training time, as a log that can be replayed.

The schedule under a wallclock cap depends on the seconds elapsed at the start of every step. They are written down as
they are read; a resumed run replays what was written and goes on from there, so it takes the same decisions.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bytejepa.errors import CheckpointError, file_errors_as


class Clock:
    """Seconds of training at the start of each step, pauses (compilation, validation, checkpoints) left out."""

    def __init__(self, log: Path | None = None) -> None:
        self.log_path = log
        self.readings: list[float] = _read_whole_lines(log) if log is not None else []
        self._file = log.open("a", encoding="ascii") if log is not None else None
        self._elapsed_s = 0.0
        self._running_since: float | None = None

    def read(self, step: int) -> float:
        """Return the seconds elapsed at the start of `step`: as logged if the log has it, else as measured and logged.

        Raises: CheckpointError if the log cannot be written.
        """
        if step < len(self.readings):
            self._elapsed_s = self.readings[step]
            self.resume()  # what comes after the last reading of an earlier process counts too
            return self._elapsed_s
        assert step == len(self.readings), f"the clock has {len(self.readings)} readings, step {step} needs as many"
        self.pause()
        self.resume()
        self.readings.append(self._elapsed_s)
        if self._file is not None:
            with file_errors_as(CheckpointError, "write", self._file.name):
                self._file.write(f"{self._elapsed_s!r}\n")
                self._file.flush()
        return self._elapsed_s

    def resume(self) -> None:
        """Let time count from now."""
        self._running_since = time.perf_counter()

    def pause(self) -> None:
        """Stop counting."""
        if self._running_since is not None:
            now = time.perf_counter()
            self._elapsed_s += now - self._running_since
            self._running_since = None

    def close(self) -> None:
        """Close the log."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take is tried once more, in vain
                self._file.close()


def read_log(path: Path) -> list[float]:
    """Return the readings in the log at `path`, a last line cut off by a kill left out; none if there is no log.

    Raises: CheckpointError naming the first line that is no reading.
    """
    with file_errors_as(CheckpointError, "read", path):
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    readings, before = [], 0.0
    for number, line in enumerate(lines, start=1):
        try:
            reading = float(line)
        except ValueError:
            reading = math.nan
        if not before <= reading < math.inf:
            raise CheckpointError(
                f"{path}: damaged: expected in line {number} seconds of at least {before}, got {line[:40]!r}",
                hint="move the file away: the newest checkpoint holds its readings too",
            )
        readings.append(reading)
        before = reading
    return readings


def steps_and_seconds(metrics: Sequence[Mapping[str, float]], readings_s: Sequence[float]) -> tuple[int, float | None]:
    """Return (steps taken, seconds of training) of a run from its logged lines, at least one, and its clock's readings.

    The log's last line may be of an earlier step, and holds the seconds at the beginning of its own; the clock is read at
    the beginning of every step and at the end of the last. Seconds are None if neither has any.
    """
    steps = max(int(metrics[-1]["step"]), len(readings_s) - 1)
    logged = (line["elapsed_s"] for line in reversed(metrics) if "elapsed_s" in line)
    return steps, readings_s[-1] if readings_s else next(logged, None)


def _read_whole_lines(path: Path) -> list[float]:
    """Return the readings in the log; a line without its newline is dropped from the file too."""
    readings = read_log(path)
    with file_errors_as(CheckpointError, "read", path), contextlib.suppress(FileNotFoundError), path.open("r+b") as log:
        log.truncate(log.read().rfind(b"\n") + 1)
    return readings
