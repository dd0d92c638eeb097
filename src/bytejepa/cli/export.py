"""`bytejepa export`: a run becomes an artifact, every stage scored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bytejepa.cli.options import refuse_ignored
from bytejepa.config_fields import PositiveInt, Range

if TYPE_CHECKING:
    from bytejepa.artifact.export import ExportResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Pack a run's averaged weights into an artifact: `bytejepa export RUN -o FILE.bjm`, `--fit 16000000` to fill a budget."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The artifact to write."""
    data: Path | None = None
    """Folder of the shards, if they moved since training."""
    score_bytes: Annotated[int, Range(2)] | None = None
    """Leading ids of the validation split that are scored; default: as while training."""
    stride: int | None = None
    """Ids scored a window; default: the window, non-overlapping."""
    fit: PositiveInt | None = None
    """Bytes that code and weights fill as far as they can, never more: the finest quantisation that fits is searched for.
    Packs compactly, unless the run's own settings have a clip that can be fitted."""
    compact: bool = False
    """Pack with GPTQ, steps by sensitivity and entropy coding, instead of as the run's settings say."""
    no_score: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the artifact without scoring."""
    force: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print the result as one JSON object."""

    def run_command(self) -> int:
        """Export and print sizes and scores."""
        if self.no_score:
            refuse_ignored(self, "with --no-score", "score_bytes", "stride")
        from bytejepa.artifact.export import export
        from bytejepa.cli.terminal import print_json, progress_bar
        from bytejepa.training.distributed import join, leave

        ranks = join("auto")
        with progress_bar("export", total=1) as (bar, task):
            result = export(
                self.run,
                self.output,
                data=self.data,
                score_bytes=self.score_bytes,
                stride=self.stride,
                score=not self.no_score,
                pack_compactly=self.compact,
                fit_bytes=self.fit,
                force=self.force,
                ranks=ranks,
                on_progress=lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total),
            )
        leave()
        if not ranks.is_main:
            return 0
        if self.json:
            print_json(as_record(result))
        else:
            print_result(result)
        return 0


def as_record(result: ExportResult) -> dict[str, object]:
    """Return the result as plain values for JSON."""
    return {
        "path": str(result.path),
        "sha256": result.sha256,
        "num_parameters": result.num_parameters,
        "weights_bytes": result.weights_bytes,
        "code_bytes": result.code_bytes,
        "code_source_bytes": result.code_source_bytes,
        "total_bytes": result.total_bytes,
        "limit_bytes": result.limit_bytes,
        "free_bytes": result.limit_bytes - result.total_bytes,
        "fitted_clip": result.fitted_clip,
        "bits_per_parameter": result.bits_per_parameter,
        "bpb": {stage: score.bpb for stage, score in result.scores.items()},
    }


def print_result(result: ExportResult) -> None:
    """Print the scores of every stage and the size budget as tables."""
    from bytejepa.cli.terminal import print_table

    if result.scores:
        average = result.scores["average"].bpb
        rows = [
            [stage, f"{score.bpb:.4f}", f"{score.bpb - average:+.4f}", f"{score.num_bytes:,}"]
            for stage, score in result.scores.items()
        ]
        print_table("bits per byte", ["weights", "bpb", "against average", "bytes scored"], rows)
    share = result.total_bytes / result.limit_bytes
    rows = [
        ["weights", f"{result.weights_bytes:,}"],
        ["code (zip of the package's source)", f"{result.code_bytes:,}"],
        ["total", f"{result.total_bytes:,}"],
        ["budget", f"{result.limit_bytes:,}"],
        ["free", f"{result.limit_bytes - result.total_bytes:,}"],
        ["used", f"{share:.1%}{'' if result.fits else ' - OVER'}"],
    ]
    if result.fitted_clip is not None:
        rows.append(["clip that fits, in standard deviations", f"{result.fitted_clip:.2f}"])
    print_table(
        f"{result.path}: {result.num_parameters:,} parameters at {result.bits_per_parameter:.2f} bits",
        ["", "bytes"],
        rows,
    )
