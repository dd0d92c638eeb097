"""The whole story on the embedded corpus: shards, training, artifact, score, comparison, a sample of text."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from bytejepa.artifact.export import ExportResult, export
from bytejepa.artifact.load import load
from bytejepa.bits import bits_per_byte_of_size
from bytejepa.compressors import XZ, compressed_bytes
from bytejepa.config import RunConfig
from bytejepa.data.corpus import embedded_text, write_embedded_shards
from bytejepa.data.loader import IdStream
from bytejepa.errors import CheckpointError, file_errors_as
from bytejepa.files import write_atomically
from bytejepa.inference.generate import generate
from bytejepa.model.transformer import ByteLM
from bytejepa.progress import StageProgress, silent, stage_count
from bytejepa.scoring.evaluate import Score
from bytejepa.scoring.mixed import MixedScorer, score_mixed
from bytejepa.training.loop import TrainProgress, TrainResult
from bytejepa.training.runlog import RunFolder
from bytejepa.training.runs import train

PROMPT = b"My fellow Americans, "
"""What the sample of generated text continues."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What the demo made and measured."""

    folder: Path
    training: TrainResult
    exported: ExportResult
    score: Score
    """Of the artifact on all validation addresses, sliding windows."""
    mixed_score: Score
    """The same of the artifact mixed with what these addresses have shown so far, as `compress` codes it."""
    text_bytes: int
    """Length of these addresses as one text, with a blank line where the model has a BOS."""
    compressed_bytes: dict[str, int]
    """What the usual compressors make of that text."""
    plot: Path
    sample: str
    """Generated text, the prompt included."""
    total_s: float
    """From the first shard to the last byte generated."""

    @property
    def quantization_loss_bpb(self) -> float:
        """Bits per byte that the artifact costs more than the averaged weights, on the same text and windows."""
        return self.exported.scores["artifact"].bpb - self.exported.scores["average"].bpb

    @property
    def xz_bpb(self) -> float:
        """Bits per byte of `xz -9e` on the same text."""
        return bits_per_byte_of_size(self.compressed_bytes[XZ], self.text_bytes)

    @property
    def smaller_than_xz(self) -> float:
        """Share by which the model's bits are fewer than xz's; 0.15 is 15 %."""
        return 1 - self.score.bpb / self.xz_bpb

    def as_record(self) -> dict[str, object]:
        """Return the figures as plain values."""
        return {
            "seed_run": str(self.training.run),
            "steps": self.training.steps,
            "train_bytes_read": self.training.num_bytes,
            "train_s": self.training.elapsed_s,
            "train_bytes_per_s": self.training.num_bytes / self.training.elapsed_s,
            "artifact_sliding_bpb": self.score.bpb,
            "artifact_sliding_bpb_without_bos": self.score.bpb_without_bos,
            "artifact_sliding_mixed_bpb": self.mixed_score.bpb,
            "window": self.score.window,
            "stride": self.score.stride,
            "scored_bytes": self.score.num_bytes,
            "compressed_text_bytes": self.text_bytes,
            "bpb": {stage: score.bpb for stage, score in self.exported.scores.items()},
            "quantization_loss_bpb": self.quantization_loss_bpb,
            "xz_bpb": self.xz_bpb,
            "smaller_than_xz": self.smaller_than_xz,
            "weights_bytes": self.exported.weights_bytes,
            "bits_per_parameter": self.exported.bits_per_parameter,
            "total_bytes": self.exported.total_bytes,
            "total_s": self.total_s,
        }


def demo(
    config: RunConfig,
    folder: Path,
    *,
    name: str = "golf-tiny",
    sample_bytes: int = 400,
    force: bool = False,
    on_train: Callable[[TrainProgress], None] | None = None,
    on_stage: StageProgress | None = None,
) -> DemoResult:
    """Run everything in `folder` and return what was measured; `name` is what the curve calls the configuration.

    Raises: CheckpointError if `folder` is not empty and `force` is not given, and whatever the parts raise.
    """
    begin = time.perf_counter()
    report = on_stage or silent
    data, run, artifact = folder / "data", folder / "run", folder / "model.bjm"
    with file_errors_as(CheckpointError, "create", folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not force:
            raise CheckpointError(
                f"{folder} is not empty", hint="name another folder, or replace an earlier demo in it with --force"
            )
    write_embedded_shards(data)
    trained = train(config, data, run, force=force, on_progress=on_train)
    exported = export(run, artifact, force=force, on_progress=report)
    model = load(artifact)
    score, mixed_score = score_sliding(model, data, report)
    plot = plot_learning_curve(
        RunFolder(run), folder / "learning_curve.png", title=f"{name} on State of the Union addresses"
    )
    report("generate", 0, 1)
    continuation = b"".join(generate(model, PROMPT, num_bytes=sample_bytes, seed=config.training.seed, temperature=0.8))
    text = embedded_text("val")
    result = DemoResult(
        folder=folder,
        training=trained,
        exported=exported,
        score=score,
        mixed_score=mixed_score,
        text_bytes=len(text),
        compressed_bytes=compressed_bytes(text),
        plot=plot,
        sample=(PROMPT + continuation).decode("utf-8", errors="replace"),
        total_s=time.perf_counter() - begin,
    )
    record = folder / "result.json"
    with file_errors_as(CheckpointError, "write", record):
        write_atomically(record, json.dumps(result.as_record(), indent=1).encode() + b"\n")
    return result


def score_sliding(model: ByteLM, data: Path, report: StageProgress) -> tuple[Score, Score]:
    """Return the score of the whole validation split with sliding windows, as the model's configuration says, and that of
    the model mixed with what was scored before."""
    stream = IdStream.open(data, "val")
    ids = stream.read(0, stream.num_ids)
    evaluation = model.config.evaluation
    return score_mixed(
        MixedScorer(model),
        ids,
        window=evaluation.window_bytes,
        stride=evaluation.stride_bytes,
        batch_ids=evaluation.batch_bytes,
        on_progress=stage_count(report, "score artifact, sliding", len(ids) - 1),
    )


def plot_learning_curve(run: RunFolder, path: Path, *, title: str) -> Path:
    """Draw train and validation bits per byte over bytes read, and the learning rate under them; return `path`."""
    from matplotlib.figure import Figure  # without pyplot, which looks for a display and keeps figures alive

    metrics = run.read_metrics()
    trained = [line for line in metrics if "train_bpb" in line]
    validated = [line for line in metrics if "val_bpb" in line]
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    megabytes = [line["num_bytes"] / 1e6 for line in trained]
    loss.plot(
        megabytes, [line["train_bpb"] for line in trained], color="#9aa7b8", linewidth=1, label="train, one batch"
    )
    at = [line["num_bytes"] / 1e6 for line in validated]
    loss.plot(at, [line["val_bpb"] for line in validated], "o-", color="#c2571a", label="validation, live weights")
    loss.plot(
        at, [line["val_bpb_average"] for line in validated], "s-", color="#1a6fc2", label="validation, averaged weights"
    )
    lowest = min(line["train_bpb"] for line in trained)
    loss.set_ylim(max(0.0, lowest - 0.2), min(5.0, max(line["train_bpb"] for line in trained) + 0.2))
    loss.set_ylabel("bits per byte")
    loss.set_title(title, loc="left")
    loss.grid(alpha=0.3)
    loss.legend(frameon=False)
    rate.plot(megabytes, [line["learning_rate_scale"] for line in trained], color="#4a4a4a")
    rate.set_ylabel("learning rate\n(share of peak)")
    rate.set_xlabel("training text read, MB")
    rate.set_ylim(0, 1.05)
    rate.grid(alpha=0.3)
    with file_errors_as(CheckpointError, "write", path):
        figure.savefig(path, dpi=130)
    return path
