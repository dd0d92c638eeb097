"""The score of a model on text: summed nats in float64 over a plan of windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bytejepa.bits import bits_per_byte
from bytejepa.data.vocabulary import BOS, BYTE_OFFSET, ids_from_bytes
from bytejepa.model.attention import available_backends
from bytejepa.model.transformer import ByteLM
from bytejepa.scoring.windows import Window, batch_windows, plan_windows, window_and_stride


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What text costs under a model."""

    nats: float
    """Summed next-id loss of every target, BOS targets included."""
    nats_of_bos: float
    """The part of `nats` spent on BOS targets."""
    num_bytes: int
    """Targets that are bytes."""
    num_targets: int
    """All targets: bytes and specials."""
    window: int
    """Longest context allowed, in ids; the text itself may be shorter."""
    stride: int
    """Targets scored a window, in ids."""

    @property
    def bpb(self) -> float:
        """Bits per byte, the cost of BOS included, as the challenge counts it; NaN for empty text."""
        return bits_per_byte(self.nats, self.num_bytes)

    @property
    def bpb_without_bos(self) -> float:
        """Bits per byte of the bytes alone; NaN for empty text."""
        return bits_per_byte(self.nats - self.nats_of_bos, self.num_bytes)


class Scorer:
    """Prices windows; compiled once and reused by every evaluation of a run."""

    def __init__(self, model: ByteLM, *, compile: bool = False, prune: bool = True) -> None:  # noqa: A002 - torch's word
        self.model = model
        self.prune = prune
        # shapes are few (whole windows, the last ones, a ragged tail); made symbolic they fail to compile (PyTorch 2.13)
        self._losses = torch.compile(self._batch_losses, dynamic=False) if compile else self._batch_losses
        if compile:
            available_backends(
                next(model.parameters()).device.type
            )  # found while tracing, the first graph is made twice

    def _batch_losses(self, ids: Int[Tensor, "B T"], targets: Int[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        logits = self.target_logits(ids, targets.size(1))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def target_logits(self, ids: Int[Tensor, "B T"], num_targets: int) -> Float[Tensor, "B N V"]:
        """Return the logits of the last `num_targets` targets of windows; what no target needs is not computed."""
        if self.prune and num_targets < ids.size(1):
            return self.model.tail_logits(ids, num_targets)
        return self.model.logits(ids)[:, -num_targets:]

    @torch.no_grad()
    def window_losses(self, ids: npt.NDArray[np.uint16], windows: list[Window]) -> Float[Tensor, "B N ..."]:
        """Return the nats of every target that `windows` (all of one shape) score, (len(windows), scored) float32.

        A subclass that has more to say of a target adds a dimension.
        """
        device = self.model.token_embedding.weight.device
        rows = np.stack([ids[w.begin : w.begin + w.length + 1] for w in windows]).astype(np.int64)
        batch = torch.from_numpy(rows).to(device)
        return self._losses(batch[:, :-1], batch[:, batch.size(1) - windows[0].scored :])


def target_losses(
    scorer: Scorer,
    ids: npt.NDArray[np.uint16],
    *,
    window: int,
    stride: int,
    batch_ids: int = 65_536,
    share: tuple[int, int] = (0, 1),
    before_round: Callable[[], None] | None = None,
) -> Iterator[tuple[list[Window], Float[Tensor, "B N ..."]]]:
    """Yield (windows, what the scorer says of the targets they score: nats) over all targets of `ids`, in order.

    `share` (rank, world_size): yield every world_size-th batch only. `before_round` is called before each world_size
    batches, on every rank as often and at the same places.
    """
    rank, world_size = share
    plan = plan_windows(len(ids) - 1, window=window, stride=stride)
    for number, windows in enumerate(batch_windows(plan, batch_ids=batch_ids)):
        if before_round is not None and number % world_size == 0:
            before_round()
        if number % world_size == rank:
            yield windows, scorer.window_losses(ids, windows)


def score_ids(
    scorer: Scorer,
    ids: npt.NDArray[np.uint16],
    *,
    window: int,
    stride: int,
    batch_ids: int = 65_536,
    share: tuple[int, int] = (0, 1),
    on_progress: Callable[[int], None] | None = None,
    before_round: Callable[[], None] | None = None,
) -> Score:
    """Return the score of the targets ids[1:], each scored once. `on_progress` is told the targets done so far.

    With `share` (rank, world_size) the score covers that rank's batches; the sum over ranks is the score.
    `before_round`: as in `target_losses`.
    """
    device = scorer.model.token_embedding.weight.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    counts = np.zeros(2, dtype=np.int64)
    scored = target_losses(
        scorer, ids, window=window, stride=stride, batch_ids=batch_ids, share=share, before_round=before_round
    )
    for windows, losses in scored:
        nats = losses.double()
        targets = np.stack([ids[w.first_target : w.begin + w.length + 1] for w in windows])
        bos = torch.from_numpy(targets == BOS).to(device)
        sums += torch.stack((nats.sum(), (nats * bos).sum()))
        counts += ((targets >= BYTE_OFFSET).sum(), targets.size)
        if on_progress is not None:
            on_progress(int(counts[1]))
    total, on_bos = sums.tolist()
    return Score(
        nats=total,
        nats_of_bos=on_bos,
        num_bytes=int(counts[0]),
        num_targets=int(counts[1]),
        window=window,
        stride=stride,
    )


def score(model: ByteLM, data: bytes, *, window: int | None = None, stride: int | None = None) -> Score:
    """Return the score of `data` as one document: a BOS, then every byte scored once.

    `window` and `stride` in bytes default to the model's evaluation settings. Empty data scores 0 nats over 0 bytes.
    """
    evaluation = model.config.evaluation
    window, stride = window_and_stride(evaluation, window=window, stride=stride)
    ids = np.concatenate((np.array([BOS], dtype=np.uint16), ids_from_bytes(data)))
    return score_ids(Scorer(model), ids, window=window, stride=stride, batch_ids=evaluation.batch_bytes)
