"""Scoring divided among ranks: each takes every world_size-th batch of windows, the sums are added up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bytejepa.scoring.evaluate import Score, Scorer, score_ids
from bytejepa.training.distributed import Ranks


def score_on_ranks(
    scorer: Scorer,
    ids: npt.NDArray[np.uint16],
    ranks: Ranks,
    *,
    window: int,
    stride: int,
    batch_ids: int,
    on_progress: Callable[[int], None] | None = None,
    before_round: Callable[[], None] | None = None,
) -> Score:
    """Return, on every rank, the score of the targets ids[1:] (a collective call).

    `on_progress` is told the targets done so far, over all ranks as far as one rank can tell. `before_round` is called
    before each batch, on every rank equally often, and may be a collective call.
    """
    mine = score_ids(
        scorer,
        ids,
        window=window,
        stride=stride,
        batch_ids=batch_ids,
        share=(ranks.rank, ranks.world_size),
        on_progress=None if on_progress is None else lambda done: on_progress(done * ranks.world_size),
        before_round=before_round,
    )
    nats, nats_of_bos, num_bytes, num_targets = ranks.sum_on_hosts(
        [mine.nats, mine.nats_of_bos, mine.num_bytes, mine.num_targets]
    )
    return dataclasses.replace(
        mine, nats=nats, nats_of_bos=nats_of_bos, num_bytes=int(num_bytes), num_targets=int(num_targets)
    )
