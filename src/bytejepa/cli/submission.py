"""`bytejepa submission`: the challenge's folder out of finished runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bytejepa.config_fields import Range

if TYPE_CHECKING:
    from bytejepa.submission.folder import SubmissionResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submission:
    """Make a submission of finished runs that differ in the seed: `bytejepa submission RUN... -o FOLDER`."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Run folders; the first one's seed is the submitted one."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The folder to write."""
    author: str
    """Your name, as submission.json states it."""
    github_id: str
    """Your GitHub name."""
    name: str = "Byte-level transformer with JEPA"
    """Title of the submission."""
    blurb: str = "A language model of raw bytes, no tokenizer, trained, packed and scored by bytejepa."
    """One sentence about it."""
    data: Path | None = None
    """Folder of the shards, if they moved since training."""
    score_bytes: Annotated[int, Range(2)] | None = None
    """Leading ids of the validation split that are scored; default: all, as the challenge demands."""
    study: Path | None = None
    """Folder or study.json of an ablation study, for a table in the README."""
    packed: bool = False
    """Ship train_gpt.py packed by LZMA and base85, with the readable script beside it."""
    force: bool = False
    """Replace an earlier submission in that folder."""
    json: bool = False
    """Print the result as one JSON object."""

    def run_command(self) -> int:
        """Write the folder and print its figures."""
        from bytejepa.cli.terminal import print_json, progress_bar
        from bytejepa.errors import ConfigError
        from bytejepa.study.results import read_study
        from bytejepa.submission.folder import Author, make_submission
        from bytejepa.training.distributed import join, leave

        if not self.runs:
            raise ConfigError("submission needs at least one run", hint="`bytejepa submission RUN... -o FOLDER`")
        study = None if self.study is None else read_study(self.study)
        ranks = join("auto")
        with progress_bar("score", total=1) as (bar, task):
            result = make_submission(
                self.runs,
                self.output,
                Author(author=self.author, github_id=self.github_id, name=self.name, blurb=self.blurb),
                data=self.data,
                score_bytes=self.score_bytes,
                study=study,
                packed=self.packed,
                force=self.force,
                ranks=ranks,
                on_progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            )
        leave()
        if not ranks.is_main:
            return 0
        if self.json:
            print_json(as_record(result))
        else:
            print_result(result)
        return 0


def as_record(result: SubmissionResult) -> dict[str, object]:
    """Return the result as plain values for JSON."""
    return {
        "path": str(result.path),
        "dataset": result.dataset,
        "mean_bpb": result.mean_bpb,
        "std_bpb": result.std_bpb,
        "bpb": {str(seed.seed): seed.sliding.bpb for seed in result.seeds},
        "code_bytes": result.code_bytes,
        "readable_bytes": result.readable_bytes,
        "largest_total_bytes": result.largest_total_bytes,
        "limit_bytes": result.limit_bytes,
    }


def print_result(result: SubmissionResult) -> None:
    """Print the seeds as a table and the size below it."""
    from bytejepa.cli.terminal import print_table

    rows = [
        [
            str(seed.seed),
            f"{seed.run.steps:,}",
            f"{seed.roundtrip.bpb:.4f}",
            f"{seed.sliding.bpb:.4f}",
            f"{seed.weights_bytes + result.code_bytes:,}",
        ]
        for seed in result.seeds
    ]
    if result.std_bpb is not None:
        rows.append(["mean", "", "", f"{result.mean_bpb:.4f}", ""])
    title = f"{result.path}: {result.code_bytes:,} bytes of code, largest total {result.largest_total_bytes:,}"
    print_table(title, ["seed", "steps", "round trip", "sliding", "bytes"], rows)
