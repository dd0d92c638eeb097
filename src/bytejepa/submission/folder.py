"""The challenge's folder: README.md, submission.json, train_gpt.py, requirements.txt and a log for every seed."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from bytejepa.bits import VALIDATION_BYTES, VALIDATION_DOCUMENTS
from bytejepa.config import RunConfig
from bytejepa.data.loader import validation_ids
from bytejepa.errors import ConfigError, DataError, file_errors_as
from bytejepa.files import write_atomically
from bytejepa.progress import StageProgress
from bytejepa.study.results import StudyResult
from bytejepa.submission.log_lines import loss_nats
from bytejepa.submission.script import PERMITTED, packed_script, readable_script
from bytejepa.submission.seeds import (
    FinishedRun,
    SeedResult,
    documents_in,
    log_of,
    pack_and_score,
    read_runs,
)
from bytejepa.training.distributed import Ranks
from bytejepa.training.runlog import RunFolder

SCRIPT, READABLE_SCRIPT, CLAIMS = "train_gpt.py", "train_gpt_readable.py", "submission.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Author:
    """What a submission says of itself."""

    author: str
    github_id: str
    name: str
    blurb: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SubmissionResult:
    """A folder that was written, and its figures."""

    path: Path
    seeds: tuple[SeedResult, ...]
    """In the order of the runs; the first is the submitted one."""
    code_bytes: int
    """The script as it lies in the folder."""
    readable_bytes: int
    limit_bytes: int
    dataset: str

    @property
    def largest_total_bytes(self) -> int:
        """Code and weights of the largest seed."""
        return self.code_bytes + max(seed.weights_bytes for seed in self.seeds)

    @property
    def mean_bpb(self) -> float:
        """Mean over the seeds, sliding windows."""
        return statistics.fmean(seed.sliding.bpb for seed in self.seeds)

    @property
    def std_bpb(self) -> float | None:
        """Sample standard deviation over the seeds; None for one seed."""
        values = [seed.sliding.bpb for seed in self.seeds]
        return statistics.stdev(values) if len(values) > 1 else None


def make_submission(
    runs: Sequence[Path],
    out: Path,
    author: Author,
    *,
    data: Path | None = None,
    score_bytes: int | None = None,
    study: StudyResult | None = None,
    packed: bool = False,
    force: bool = False,
    ranks: Ranks | None = None,
    on_progress: StageProgress | None = None,
) -> SubmissionResult:
    """Pack and score the finished runs `runs`, seeds of one configuration, and write the folder `out`.

    `data`: where the shards are if they moved; `score_bytes`: leading ids of the validation split that are scored (None:
    all, as the challenge demands); `packed`: ship the script packed, the readable one beside it. With several ranks a
    collective call, in which rank 0 writes.
    Raises: ConfigError if `out` exists and not `force`; DataError if it holds anything but a submission; CheckpointError
    for runs that are unfinished or no seeds of one configuration; ArtifactError over the budget. Nothing is then left
    behind.
    """
    ranks = ranks or Ranks()
    with ranks.agree():
        _require_replaceable(out, force=force)
        finished = read_runs(runs)
        ids = validation_ids(RunFolder(finished[0].folder).data_path(data), score_bytes)
        readable = readable_script(finished[0].config)
        script = packed_script(readable) if packed else readable
    with _place_beside(out, ranks) as place:
        artifact = place / "artifact.bjm"
        code_bytes = len(script.encode())
        seeds = tuple(pack_and_score(run, ids, artifact, code_bytes, ranks, data, on_progress) for run in finished)
        result = SubmissionResult(
            path=out,
            seeds=seeds,
            code_bytes=code_bytes,
            readable_bytes=len(readable.encode()),
            limit_bytes=finished[0].config.artifact.limit_bytes,
            dataset=_dataset(finished[0], seeds[0], documents_in(ids)),
        )
        with ranks.agree(), file_errors_as(DataError, "write", out):
            if ranks.is_main:
                folder = place / "folder"
                scripts = {SCRIPT: script} | ({READABLE_SCRIPT: readable} if packed else {})
                _fill(folder, scripts, result, author, study, documents_in(ids))
                _require_replaceable(out, force=force)  # somebody may have written it during the scoring
                _put_in_place(folder, out)
    return result


def _require_replaceable(out: Path, *, force: bool) -> None:
    """Refuse an `out` that exists, unless `force` is given and it is an earlier submission or an empty folder.

    Raises: ConfigError without `force`, DataError for what it does not replace.
    """
    if not out.exists():
        return
    if not force:
        raise ConfigError(f"{out} exists already", hint="choose another folder, or --force")
    if not out.is_dir() or (any(out.iterdir()) and not (out / CLAIMS).is_file()):
        raise DataError(
            f"{out} is no submission, it has no {CLAIMS}: --force does not replace it", hint="choose another folder"
        )


@contextlib.contextmanager
def _place_beside(out: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield a temporary folder in that of `out`, the same one on every rank."""
    with contextlib.ExitStack() as cleaning:
        name = ""
        with ranks.agree(), file_errors_as(DataError, "write", out):
            if ranks.is_main:
                out.parent.mkdir(parents=True, exist_ok=True)
                name = cleaning.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent))
        yield Path(ranks.text_from(0, name))


def _fill(
    folder: Path,
    scripts: dict[str, str],
    result: SubmissionResult,
    author: Author,
    study: StudyResult | None,
    num_documents: int,
) -> None:
    folder.mkdir()
    texts = {
        **scripts,
        "README.md": readme(result, author, study, is_packed=READABLE_SCRIPT in scripts),
        CLAIMS: json.dumps(claims(result, author), indent=2, ensure_ascii=False) + "\n",
        "requirements.txt": "".join(f"{name}\n" for name in _requirements(result.seeds[0].run.config)),
    }
    for seed in result.seeds:
        texts[f"train_seed{seed.seed}.log"] = log_of(seed, code_bytes=result.code_bytes, num_documents=num_documents)
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())


def _put_in_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; what stood there goes only once the new one is complete."""
    if out.exists():
        old = folder.parent / "old"
        out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            old.rename(out)
            raise
        old.unlink() if old.is_symlink() else shutil.rmtree(old)
    else:
        folder.rename(out)
    out.chmod(0o755)


def claims(result: SubmissionResult, author: Author) -> dict[str, Any]:
    """Return the content of submission.json: the challenge's usual keys (spec section 8), of the first run's seed."""
    seed = result.seeds[0]
    return {
        **dataclasses.asdict(author),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "dataset": result.dataset,
        "val_loss": round(loss_nats(seed.sliding), 8),
        "val_bpb": round(seed.sliding.bpb, 8),
        "pre_quant_val_loss": round(loss_nats(seed.average), 8),
        "pre_quant_val_bpb": round(seed.average.bpb, 8),
        "int6_zstd_val_loss": round(loss_nats(seed.roundtrip), 8),
        "int6_zstd_val_bpb": round(seed.roundtrip.bpb, 8),
        "bytes_total": seed.weights_bytes + result.code_bytes,
        "bytes_model_int6_zstd": seed.weights_bytes,
        "bytes_code": result.code_bytes,
        "seeds": {str(s.seed): round(s.sliding.bpb, 8) for s in result.seeds},
    }


def readme(result: SubmissionResult, author: Author, study: StudyResult | None, *, is_packed: bool) -> str:
    """Return README.md."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bytejepa.submission", "."),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    first = result.seeds[0]
    config = first.run.config
    text: str = environment.get_template("README.md.jinja").render(
        **dataclasses.asdict(author),
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)},
        seeds=result.seeds,
        num_seeds=len(result.seeds),
        submitted=first,
        mean_bpb=result.mean_bpb,
        std_bpb=result.std_bpb,
        dataset=result.dataset,
        code_bytes=result.code_bytes,
        largest_total=result.largest_total_bytes,
        limit_bytes=result.limit_bytes,
        is_packed=is_packed,
        study=study,
        number=lambda value: "-" if value is None else f"{value:+.4f}",
        world_size=first.run.machine.get("world_size", 1),
        machine={"device": "an unknown machine", "created": "", "versions": {"torch": "?"}, **first.run.machine},
    )
    return text


def _dataset(run: FinishedRun, seed: SeedResult, num_documents: int) -> str:
    counts = (seed.sliding.num_bytes, num_documents)
    if counts == (VALIDATION_BYTES, VALIDATION_DOCUMENTS):
        return "FineWeb, byte260 shards, the whole validation split"
    name = Path(str(run.machine.get("data", {}).get("path", "")) or "shards").name  # type: ignore[attr-defined]
    return f"{name}: {counts[0]:,} validation bytes in {counts[1]:,} documents; not the challenge's split"


def _requirements(config: RunConfig) -> list[str]:
    return [*PERMITTED, *(["brotli"] if "brotli" in config.artifact.codecs else [])]
