"""Exceptions with a hint and an exit code: bad input gets one clear line, never a traceback.

Raise one of these for anything a user can cause (input, files, configuration); use `assert` for the program's own
invariants. The message says what, where, expected and got; the hint says what to do next.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator
from pathlib import Path


class BytejepaError(Exception):
    """A failure that the user can act on; `str()` is the message followed by the hint, a rank above 0 named before it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.rank: int | None = None
        """The rank that it happened on, once all ranks know of it (`Ranks.agree`)."""

    def __str__(self) -> str:
        where = f"rank {self.rank}: " if self.rank else ""
        return where + (f"{self.message} ({self.hint})" if self.hint else self.message)


class ConfigError(BytejepaError):
    """An impossible or unknown setting, or an output that exists (exit code 2, as for any misuse of the command line)."""

    exit_code = 2


class DataError(BytejepaError):
    """A shard, corpus or manifest that is missing, damaged or not what was promised (exit code 3)."""

    exit_code = 3


class CheckpointError(BytejepaError):
    """A run folder or checkpoint that cannot be used, or training that cannot go on (exit code 4)."""

    exit_code = 4


class ArtifactError(BytejepaError):
    """An artifact that is damaged, foreign or cannot be written (exit code 5)."""

    exit_code = 5


class CodecError(BytejepaError):
    """A compressed file that cannot be decoded (exit code 6)."""

    exit_code = 6


class ReviewFailed(BytejepaError):  # noqa: N818 - the outcome of a review, not a malfunction
    """A review whose verdict is not clean (exit code 10)."""

    exit_code = 10


class Interrupted(BytejepaError):  # noqa: N818 - asked for from outside, not a malfunction
    """Training stopped by SIGTERM or Ctrl-C after writing a checkpoint (exit code 7)."""

    exit_code = 7


def nearest_hint(name: str, known: Iterable[str], *, label: str = "known") -> str:
    """Return a hint for an unknown `name`: the nearest of the `known` ones, or, if none is near, all of them."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"{label}: {', '.join(names)}"


def error_of_os(problem: OSError) -> BytejepaError:
    """Return what a device or file that fails at an unforeseen place is to a user: one line that names it."""
    where, reason = f" {problem.filename}" if problem.filename else "", problem.strerror or str(problem)
    # Python's, whoever asked for it: also libraries do
    no_place = reason.startswith("No usable temporary directory")
    hint = "set TMPDIR to a folder that can be written to" if no_place else None
    return BytejepaError(f"cannot go on{where}: {reason}", hint=hint)


@contextlib.contextmanager
def file_errors_as(error: type[BytejepaError], what: str, path: Path | str) -> Iterator[None]:
    """Turn an OSError on a user's path into `error`, naming `what` was done and to which path."""
    try:
        yield
    except OSError as problem:
        reason = problem.strerror or str(problem)
        hints = {
            errno.ENOSPC: "free some space; nothing that existed was changed",
            errno.EACCES: "check the permissions",
            errno.EROFS: "name a place that can be written to",
            errno.EISDIR: "name a file",
        }
        if what.startswith("write"):
            hints[errno.ENOENT] = "make its folder first"
        raise error(f"cannot {what} {path}: {reason}", hint=hints.get(problem.errno or 0)) from problem
