"""`bytejepa surprise`: what every byte of a file costs."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from bytejepa.cli.options import refuse_ignored
from bytejepa.cli.output import check_output
from bytejepa.config_fields import PositiveInt
from bytejepa.errors import ConfigError, DataError, file_errors_as

if TYPE_CHECKING:
    from bytejepa.inference.surprise import SurpriseMap

TERMINAL_BYTES = 20_000
"""Text shown on a terminal unless --max-bytes says otherwise; nobody scrolls through more."""
Format = Literal["terminal", "csv", "html"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surprise:
    """Show what every byte of a file costs: `bytejepa surprise MODEL FILE -o page.html`."""

    STREAMS: ClassVar[tuple[str, ...]] = ("file",)

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """An artifact (.bjm) or a run folder (its averaged weights)."""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """Any file; `-`: standard input."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write to this file: a page if it ends in .html, a table if it ends in .csv; default: the terminal, in colour."""
    format: Format | None = None
    """What to write; default: as the output's name says."""
    max_bytes: PositiveInt | None = None
    """Price only this many leading bytes; default: all, 20,000 of them on a terminal."""
    window: int | None = None
    """Context of a window, in ids; default: as the model's configuration says."""
    stride: int | None = None
    """Bytes scored a window; default: as the model's configuration says."""
    device: str = "auto"
    """cpu, cuda or auto."""
    force: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print totals, lines and the most surprising spots as one JSON object."""

    def run_command(self) -> int:
        """Price the file and show it."""
        if self.output is None:
            refuse_ignored(self, "without -o", "force")
            if self.json:
                refuse_ignored(self, "with --json and no -o", "format")
        from bytejepa.cli.device import chosen_device
        from bytejepa.cli.terminal import note, print_json
        from bytejepa.files import write_atomically

        device = chosen_device(self.device)
        chosen = self._format()
        if self.output is not None:
            check_output(self.output, DataError, force=self.force)
        data, whole = self._data(chosen)
        surprised = self._scored(data, device)
        if len(data) < whole:
            more = "" if self.max_bytes is not None else "; --max-bytes or -o FILE.html for more"
            note(f"the first {len(data):,} of {whole:,} bytes{more}")
        if self.output is not None:
            content = self._written(surprised, chosen)
            with file_errors_as(DataError, "write", self.output):
                write_atomically(self.output, content)
        if self.json:
            print_json(self._record(surprised))
        elif self.output is not None:
            note(f"{self.output}: {_summary(surprised)}")
        elif chosen == "terminal":
            self._show(surprised)
        else:
            sys.stdout.buffer.write(self._written(surprised, chosen))
            sys.stdout.flush()
        return 0

    def _format(self) -> Format:
        if self.output is None:
            return self.format or "terminal"
        known: dict[str, Format] = {".html": "html", ".htm": "html", ".csv": "csv"}
        chosen = self.format or known.get(self.output.suffix.lower())
        if chosen == "terminal":
            raise ConfigError("--format terminal is for the terminal, got -o", hint="leave one of them out")
        if chosen is None:
            raise ConfigError(f"{self.output}: expected a name that ends in .html or .csv", hint="or say --format html")
        return chosen

    def _data(self, chosen: Format) -> tuple[bytes, int]:
        """Return the bytes to score and how many the file has."""
        if str(self.file) == "-":
            data = sys.stdin.buffer.read()
        else:
            with file_errors_as(DataError, "read", self.file):
                data = self.file.read_bytes()
        most = self.max_bytes
        if most is None and chosen == "terminal" and not self.json:
            most = TERMINAL_BYTES
        return data[:most], len(data)

    def _scored(self, data: bytes, device: str) -> SurpriseMap:
        from bytejepa import load
        from bytejepa.cli.device import memory_errors_with
        from bytejepa.cli.terminal import progress_bar
        from bytejepa.inference.surprise import surprise

        with memory_errors_with("use a smaller --window or --max-bytes"):
            model = load(self.model, device=device)
            with progress_bar("score", total=len(data)) as (bar, task):
                return surprise(
                    model,
                    data,
                    window=self.window,
                    stride=self.stride,
                    on_progress=lambda done: bar.update(task, completed=done),
                )

    def _written(self, surprised: SurpriseMap, chosen: Format) -> bytes:
        """Return the page or table in UTF-8, whatever the terminal's encoding; names that are not come out as they were."""
        if chosen == "csv":
            from bytejepa.inference.surprise import to_csv

            text = to_csv(surprised)
        else:
            from bytejepa.inference.surprise_page import to_html

            text = to_html(surprised, title=self.file.name, model=self.model.name)
        return text.encode(errors="surrogateescape")

    def _show(self, surprised: SurpriseMap) -> None:
        from rich.console import Console

        from bytejepa.inference.surprise import legend, terminal_text

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every encoding has the marks for bytes that cannot be shown
        console = Console(highlight=False, soft_wrap=True)
        console.print(terminal_text(surprised), end="" if surprised.data.endswith(b"\n") else "\n")
        console.print(legend())
        console.print(_summary(surprised))

    def _record(self, surprised: SurpriseMap) -> dict[str, object]:
        from bytejepa.inference.surprise import line_totals, surprising_spots

        spots = [
            {"offset": offset, "byte": surprised.data[offset], "bits": float(surprised.bits[offset])}
            for offset in surprising_spots(surprised)
        ]
        lines = [{"offset": offset, "num_bytes": count, "bits": bits} for offset, count, bits in line_totals(surprised)]
        return {
            "model": str(self.model),
            "file": str(self.file),
            "num_bytes": len(surprised.data),
            "bits": surprised.total_bits,
            "bpb": surprised.bpb if surprised.data else None,
            "window": surprised.window,
            "stride": surprised.stride,
            "lines": lines,
            "spots": spots,
        }


def _summary(surprised: SurpriseMap) -> str:
    if not surprised.data:
        return "0 bytes"
    return f"{len(surprised.data):,} bytes, {surprised.total_bits:,.1f} bits, {surprised.bpb:.4f} bpb"
