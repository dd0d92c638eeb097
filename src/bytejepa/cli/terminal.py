"""What a person sees: tables on stdout, progress and notes on stderr, nothing of either where nobody looks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from bytejepa.bits import format_bytes


def note(text: str) -> None:
    """Say something beside the result, on stderr; whoever stopped reading there still gets the result."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, prose: Sequence[str] = ()
) -> None:
    """Print a table on stdout: the first column and those of `prose` to the left, numbers to the right.

    Columns without any name have no row for names.
    """
    # as Text: names and questions of users may hold what rich takes for markup
    table = Table(title=Text(title, style="bold") if title else None, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index == 0 or column in prose else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    # a pipe has no width of its own; 80 columns would cut figures in half
    console.width = console.width if console.is_terminal else 120
    console.print(table)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout, as `json_text` has it, on several lines."""
    sys.stdout.write(json_text(value, indent=1) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON: dataclasses become objects, paths strings, numbers that are not finite null."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(_finite(plain), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return `value` with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _RateColumn(ProgressColumn):
    """Bytes a second."""

    def render(self, task: Task) -> Text:
        speed = task.fields.get("bytes_per_s") or task.speed or 0.0
        # a bar of shares or runs has no bytes, and its speed is under one
        return Text(f"{format_bytes(speed)}/s" if speed >= 1 else "", style="cyan")


@contextlib.contextmanager
def progress_bar(description: str, *, total: float) -> Iterator[tuple[Progress, TaskID]]:
    """Yield (progress, task) of a bar with rate and time left on stderr; silent where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[status]}", markup=False),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield progress, progress.add_task(description, total=total, status="")
