"""How long work tells of itself: what it is given to call, and how its parts are given the same."""

from __future__ import annotations

from collections.abc import Callable

StageProgress = Callable[[str, int, int], None]
"""Told (what is being done, how much of it is done, how much there is)."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""
    del stage, done, total


def stage_progress(on_progress: StageProgress | None, stage: str) -> Callable[[int, int], None] | None:
    """Return what tells `on_progress` of (done, total) of `stage`; None for None."""
    return None if on_progress is None else lambda done, total: on_progress(stage, done, total)


def stage_count(on_progress: StageProgress | None, stage: str, total: int) -> Callable[[int], None] | None:
    """Return what tells `on_progress` how much is done of the `total` of `stage`; None for None."""
    return None if on_progress is None else lambda done: on_progress(stage, done, total)
