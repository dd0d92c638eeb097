"""The score of a model that is mixed with what the text has shown so far: adaptive, every byte scored before it is learned.

The model says first whether a byte comes or a special id; of a byte, each of its eight bits is priced under the mixture
that `kernels.context_mixing` makes of the model's distribution and of counts of the bytes before, in one pass from left to
right. The counts of one document serve those after it. Each byte's probabilities sum to what the model gives all bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bytejepa.data.vocabulary import BOS, BYTE_OFFSET
from bytejepa.kernels.context_mixing import mix_following
from bytejepa.kernels.mixing_state import Mixing, new_mixing
from bytejepa.kernels.mixing_tables import PROBABILITY_BITS
from bytejepa.scoring.evaluate import Score, Scorer, target_losses

TEXT_BUCKET_BITS = 20
"""More than `compress` has for a block, for whole texts: up to 620 MB."""
_LEAST = torch.finfo(torch.float32).tiny
"""Divided by instead of 0: anything smaller is 0 itself where such numbers are flushed."""


class MixedScorer(Scorer):
    """Says of every target what a mixture needs: `window_losses` are (windows, scored, 10) float32.

    The model's nats of the target; its nats for the target being a byte, or, if it is none, for that very id; and the
    probabilities that each of its eight bits is 1 given those before it, in units of 2^-16 (1/2 if it is no byte).
    """

    def _batch_losses(self, ids: Int[Tensor, "B T"], targets: Int[Tensor, "B N"]) -> Float[Tensor, "B N 10"]:
        log_p = F.log_softmax(self.target_logits(ids, targets.size(1)).float(), dim=-1)
        nats = -log_p.gather(-1, targets[..., None])
        is_byte = targets[..., None] >= BYTE_OFFSET
        nats_of_kind = torch.where(is_byte, -log_p[..., BYTE_OFFSET:].logsumexp(-1, keepdim=True), nats)
        byte = (targets[..., None] - BYTE_OFFSET).clamp_min(0)
        shares: list[Tensor] = []
        level = log_p[..., BYTE_OFFSET:].exp()
        for depth in range(7, -1, -1):  # pairs of bytes, of pairs, ...: what the bit at `depth` decides between
            pairs = level.unflatten(-1, (1 << depth, 2))
            pair = pairs.gather(-2, (byte >> (8 - depth))[..., None].expand(*byte.shape[:-1], 1, 2)).squeeze(-2)
            shares.insert(0, pair[..., 1:] / pair.sum(-1, keepdim=True).clamp_min(_LEAST))
            level = pairs.sum(-1)
        units = torch.cat(shares, dim=-1) * (1 << PROBABILITY_BITS)
        units = torch.where(is_byte, units.round().clamp(1, (1 << PROBABILITY_BITS) - 1), 1 << (PROBABILITY_BITS - 1))
        return torch.cat((nats, nats_of_kind, units), dim=-1)


def score_mixed(
    scorer: MixedScorer,
    ids: npt.NDArray[np.uint16],
    *,
    window: int,
    stride: int,
    batch_ids: int = 65_536,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Score, Score]:
    """Return the scores of the targets ids[1:] under the model and under the mixture, each target scored once.

    `on_progress` is told the targets done so far.
    """
    totals = _Totals(int((ids[1:] >= BYTE_OFFSET).sum()))
    for windows, priced in target_losses(scorer, ids, window=window, stride=stride, batch_ids=batch_ids):
        targets = np.concatenate([ids[w.first_target : w.begin + w.length + 1] for w in windows])
        totals.add(targets, priced.flatten(0, 1).cpu().numpy().astype(np.float64))
        if on_progress is not None:
            on_progress(totals.num_targets)
    model = Score(
        nats=totals.nats,
        nats_of_bos=totals.nats_of_bos,
        num_bytes=totals.num_bytes,
        num_targets=totals.num_targets,
        window=window,
        stride=stride,
    )
    return model, dataclasses.replace(model, nats=totals.mixed_nats)


class _Totals:
    """Sums over targets, and the mixture that reads them."""

    def __init__(self, num_bytes: int) -> None:
        self.nats = self.nats_of_bos = self.mixed_nats = 0.0
        self.num_bytes = self.num_targets = 0
        self._mixing: Mixing = new_mixing(num_bytes, max(1, num_bytes), most_bucket_bits=TEXT_BUCKET_BITS)

    def add(self, targets: npt.NDArray[np.uint16], priced: npt.NDArray[np.float64]) -> None:
        """Take in the next targets (N,), priced (N, 10) by a `MixedScorer`."""
        is_byte = targets >= BYTE_OFFSET
        content = (targets[is_byte] - BYTE_OFFSET).astype(np.uint8)
        probabilities, bits = np.empty(8 * len(content), np.uint16), np.empty(8 * len(content), np.uint8)
        paths = priced[is_byte, 2:].astype(np.uint16)
        mix_following(self._mixing, self.num_bytes, content, paths, probabilities, bits)
        ones = probabilities / (1 << PROBABILITY_BITS)
        self.mixed_nats += float(priced[:, 1].sum() - np.log(np.where(bits, ones, 1 - ones)).sum())
        self.nats += float(priced[:, 0].sum())
        self.nats_of_bos += float(priced[targets == BOS, 0].sum())
        self.num_bytes += len(content)
        self.num_targets += len(targets)
