"""`bytejepa eval`: the score of an artifact or a run on shards or on any file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bytejepa.bits import bits_per_byte_of_size
from bytejepa.cli.options import refuse_ignored
from bytejepa.config_fields import PositiveInt
from bytejepa.errors import ConfigError, DataError, file_errors_as

if TYPE_CHECKING:
    from bytejepa.model.transformer import ByteLM
    from bytejepa.scoring.evaluate import Score, Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score an artifact or a run: `bytejepa eval ARTIFACT_OR_RUN --data DIR_OR_FILE`."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """An artifact (.bjm) or a run folder (its averaged weights)."""
    data: Path
    """A folder of shards (its validation split is scored), or any file (scored as one document)."""
    window: int | None = None
    """Context of a window, in ids; default: as the model's configuration says."""
    stride: int | None = None
    """Ids scored a window in sliding evaluation; default: as the model's configuration says."""
    no_sliding: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only non-overlapping windows."""
    mixing: bool = False
    """Also score the model mixed with counts of the text so far, as in `compress`: each byte is scored before it is counted."""
    max_bytes: PositiveInt | None = None
    """Score only this many leading bytes of a file, or ids of shards: their BOS count too, and the first is not scored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it is scored; auto: CUDA where there is one."""
    precision: Literal["auto", "float32"] = "auto"
    """Of activations and products; auto: on CUDA bfloat16 as in training, float32 elsewhere."""
    json: bool = False
    """Print the result as one JSON object."""

    def run_command(self) -> int:
        """Score and print bits per byte."""
        if self.no_sliding:
            refuse_ignored(self, "with --no-sliding", "stride")
        from bytejepa.artifact.load import load
        from bytejepa.cli.device import chosen_device
        from bytejepa.cli.terminal import note, print_json, print_table
        from bytejepa.compressors import compressed_bytes
        from bytejepa.scoring.evaluate import Score, Scorer
        from bytejepa.scoring.windows import window_and_stride
        from bytejepa.training.distributed import join, leave

        ranks = join(chosen_device(self.device))
        with ranks.agree():
            if self.mixing and ranks.world_size > 1:
                raise ConfigError(
                    "--mixing reads the text in one pass from left to right", hint="run it without torchrun"
                )
            model = load(self.model, device=str(ranks.device), precision=self.precision)
            ids, text = self._ids()
            evaluation = model.config.evaluation
            window, stride = window_and_stride(evaluation, window=self.window, stride=self.stride)
        if ranks.is_main and len(ids) - 1 < window:
            note(
                f"the data has {len(ids) - 1} ids to score, fewer than the window of {window}: one shorter window is used"
            )
        strides = {"non-overlapping": window} | ({} if self.no_sliding or stride == window else {"sliding": stride})
        compiled = ranks.device.type == "cuda"
        scorer = Scorer(model, compile=compiled)
        precision, scores = str(model.compute_dtype).removeprefix("torch."), dict[str, Score]()
        mixed_name = list(strides)[-1] if self.mixing else None
        for name, every in strides.items():
            if name == mixed_name:
                both = self._mixed_scores(model, ids, window, every, evaluation.batch_bytes, name, compiled=compiled)
                scores |= zip((name, f"{name}, mixed"), both, strict=True)
            else:
                scores[name] = self._score(scorer, ids, window, every, evaluation.batch_bytes, ranks, name)
        leave()
        if not ranks.is_main:
            return 0
        compressors = compressed_bytes(text) if text else {}
        if self.json:
            print_json(self._record(scores, compressors, len(text or b""), precision))
            return 0
        rows = [
            [
                f"{name}, window {score.window}, stride {score.stride}",
                f"{score.bpb:.4f}",
                f"{score.bpb_without_bos:.4f}",
                f"{score.num_bytes:,}",
            ]
            for name, score in scores.items()
        ]
        print_table(f"{self.model} on {self.data}", ["windows", "bpb", "without BOS", "bytes"], rows)
        if compressors and text:
            best = min(score.bpb for score in scores.values())
            print_table("what compressors make of the same file", *comparison(compressors, len(text), best))
        return 0

    def _ids(self) -> Any:
        import numpy as np

        from bytejepa.data.loader import validation_ids
        from bytejepa.data.vocabulary import BOS, ids_from_bytes

        if self.data.is_dir():
            if self.max_bytes == 1:
                raise ConfigError(
                    "--max-bytes: expected 2 or more ids of shards, got 1", hint="the first is not scored"
                )
            return validation_ids(self.data, self.max_bytes), None
        with file_errors_as(DataError, "read", self.data):
            text = self.data.read_bytes()[: self.max_bytes]
        if not text:
            raise DataError(f"{self.data} is empty: there is nothing to score")
        return np.concatenate((np.array([BOS], dtype=np.uint16), ids_from_bytes(text))), text

    def _score(
        self, scorer: Scorer, ids: Any, window: int, stride: int, batch_ids: int, ranks: Any, name: str
    ) -> Score:
        from bytejepa.cli.terminal import progress_bar
        from bytejepa.training.shared_scoring import score_on_ranks

        with progress_bar(name, total=len(ids) - 1) as (bar, task):
            return score_on_ranks(
                scorer,
                ids,
                ranks,
                window=window,
                stride=stride,
                batch_ids=batch_ids,
                on_progress=lambda done: bar.update(task, completed=done),
            )

    def _mixed_scores(
        self, model: ByteLM, ids: Any, window: int, stride: int, batch_ids: int, name: str, *, compiled: bool
    ) -> tuple[Score, Score]:
        from bytejepa.cli.terminal import progress_bar
        from bytejepa.scoring.mixed import MixedScorer, score_mixed

        with progress_bar(f"{name}, mixed", total=len(ids) - 1) as (bar, task):
            return score_mixed(
                MixedScorer(model, compile=compiled),
                ids,
                window=window,
                stride=stride,
                batch_ids=batch_ids,
                on_progress=lambda done: bar.update(task, completed=done),
            )

    def _record(
        self, scores: dict[str, Score], compressors: dict[str, int], num_bytes: int, precision: str
    ) -> dict[str, object]:
        described = {
            name: {
                "bpb": score.bpb,
                "bpb_without_bos": score.bpb_without_bos,
                "nats": score.nats,
                "num_bytes": score.num_bytes,
                "num_targets": score.num_targets,
                "window": score.window,
                "stride": score.stride,
            }
            for name, score in scores.items()
        }
        others = {
            name: {"bytes": size, "bpb": bits_per_byte_of_size(size, num_bytes)} for name, size in compressors.items()
        }
        return {
            "model": str(self.model),
            "data": str(self.data),
            "precision": precision,
            "scores": described,
            "compressors": others,
        }


def comparison(compressors: dict[str, int], num_bytes: int, model_bpb: float) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) of a table of compressors against the model's bits per byte."""
    bpb = {name: bits_per_byte_of_size(size, num_bytes) for name, size in compressors.items()}
    rows = [
        [name, f"{size:,}", f"{bpb[name]:.4f}", f"{1 - model_bpb / bpb[name]:+.1%}"]
        for name, size in compressors.items()
    ]
    return ["compressor", "bytes", "bpb", "model is smaller by"], rows
