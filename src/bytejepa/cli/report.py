"""`bytejepa report`: runs or a study as one page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bytejepa.cli.options import refuse_ignored
from bytejepa.config_fields import Range
from bytejepa.errors import ConfigError

if TYPE_CHECKING:
    from bytejepa.report import ReportResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Make a page of runs or a study: `bytejepa report RUN_OR_STUDY... -o report.html`."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN_OR_STUDY...")]
    """Run folders (those that differ in the seed alone become one curve with a band), or one study's folder."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The page to write, a name that ends in .html; PNG and CSV of each plot go into a folder beside it."""
    data: Path | None = None
    """Folder of the shards, if they moved since training."""
    score_bytes: Annotated[int, Range(2)] | None = None
    """Leading ids of the validation split that are scored; default: 262,144."""
    measure: Literal["all", "first", "none"] | None = None
    """Runs measured beyond their log: all, the first of each configuration, none; default: all, of a study the first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it is measured; auto: CUDA where there is one."""
    force: bool = False
    """Replace an existing page and its folder."""
    json: bool = False
    """Print where everything is, and the scores, as one JSON object."""

    def run_command(self) -> int:
        """Measure, draw, and say where the page is."""
        if self.measure == "none":
            refuse_ignored(self, "with --measure none", "data", "score_bytes", "device")
        from bytejepa.cli.device import chosen_device
        from bytejepa.cli.terminal import note, print_json, progress_bar
        from bytejepa.report import report

        if self.output.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(f"{self.output}: expected a name that ends in .html")
        with progress_bar("report", total=1.0) as (bar, task):
            result = report(
                self.runs,
                self.output,
                data=self.data,
                score_bytes=self.score_bytes,
                which=self.measure,
                device="cpu" if self.measure == "none" else chosen_device(self.device),
                force=self.force,
                on_progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            )
        if self.json:
            print_json(as_record(result))
        else:
            note(f"{result.page}, {len(result.files)} files in {result.files[0].parent}")
        return 0


def as_record(result: ReportResult) -> dict[str, object]:
    """Return the result as plain values for JSON."""
    return {
        "page": str(result.page),
        "files": [str(path) for path in result.files],
        "configurations": {
            configuration.label: {
                "runs": [str(run.path) for run in configuration.runs],
                "seeds": [run.seed for run in configuration.runs],
                "measured": [
                    {
                        "bpb": {stage: score.bpb for stage, score in measured.scores.items()},
                        "weights_bytes": measured.weights_bytes,
                        "code_bytes": measured.code_bytes,
                        "dead_parameters": [tensor.name for tensor in measured.tensors if tensor.flow == "dead"],
                    }
                    for measured in result.measured.get(configuration.label, ())
                ],
            }
            for configuration in result.inputs.configurations
        },
    }
