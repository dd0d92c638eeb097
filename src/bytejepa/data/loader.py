"""Batches out of shards. Which ids a step reads is a function of (seed, stage, index): there is no state to save, and
neither the number of ranks nor an interruption changes it.

A stage is a stretch of training with one sequence length; the index counts its steps. Batches are made ahead in a
thread and, for a GPU, copied from pinned memory while it computes.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from bytejepa.config import DataConfig
from bytejepa.data.augmentation import substitute_character
from bytejepa.data.manifest import check_split
from bytejepa.data.shards import Split, check_ids, find_shards, open_shard
from bytejepa.data.vocabulary import VOCABULARY_SIZE
from bytejepa.errors import DataError


class IdStream:
    """The ids of several shards as one endless stream: reading past the end goes on at the beginning."""

    def __init__(self, shards: Sequence[npt.NDArray[np.uint16]]) -> None:
        self.shards = [shard for shard in shards if len(shard)]
        self.ends = np.cumsum([len(shard) for shard in self.shards]).tolist()
        self.num_ids: int = self.ends[-1] if self.ends else 0

    @classmethod
    def open(cls, directory: Path, split: Split, *, check: bool = False) -> IdStream:
        """Return the stream of the memory-mapped shards of `split` ("train" or "val") in `directory`.

        `check` reads every id once. Raises: DataError for a missing, damaged or foreign shard, and where the folder has
        a manifest also for shards that it does not promise (by name and length; with `check` by their digests).
        """
        paths = find_shards(directory, split)
        shards = [open_shard(path) for path in paths]
        num_ids = {path.name: len(shard) for path, shard in zip(paths, shards, strict=True)}
        check_split(directory, split, num_ids, digests=check)
        if check:
            for path, shard in zip(paths, shards, strict=True):
                check_ids(shard, path)
        return cls(shards)

    def read(self, start: int, count: int) -> npt.NDArray[np.uint16]:
        """Return `count` ids from position `start` (taken modulo the length), (count,) uint16."""
        parts = []
        position = start % self.num_ids
        while count > 0:
            shard = bisect.bisect_right(self.ends, position)
            begin = position - (self.ends[shard - 1] if shard else 0)
            part = self.shards[shard][begin : begin + count]
            parts.append(part)
            count -= len(part)
            position = (position + len(part)) % self.num_ids
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def validation_ids(data: Path, limit: int | None = None) -> npt.NDArray[np.uint16]:
    """Return the first `limit` ids (None: all) of the validation split in the folder `data`.

    Raises: DataError if it is not there or not as its manifest says, or if there is nothing to score among them.
    """
    stream = IdStream.open(data, "val", check=True)
    ids = stream.read(0, stream.num_ids if limit is None else min(stream.num_ids, limit))
    if len(ids) < 2:
        raise DataError(
            f"the validation split of {data} has {len(ids)} ids to read: scoring needs a BOS and at least one byte"
        )
    return ids


def _random(purpose: str) -> np.random.Generator:
    """Return a generator that is a function of `purpose`: no hidden state, nothing to save."""
    key = hashlib.sha256(purpose.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


@functools.lru_cache(maxsize=4)
def _epoch_order(
    seed: int, stage: int, epoch: int, num_sequences: int, max_phase: int
) -> tuple[int, npt.NDArray[np.int64]]:
    """Return (phase, order) of an epoch: sequence n begins at phase + T * order[n]."""
    random = _random(f"{seed}:order:{stage}:{epoch}")
    return int(random.integers(0, max_phase + 1)), random.permutation(num_sequences)


class Loader:
    """This rank's rows of every batch."""

    def __init__(
        self, stream: IdStream, config: DataConfig, *, seed: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.stream, self.config, self.seed = stream, config, seed
        self.rank, self.world_size, self.device = rank, world_size, device
        longest = max(length for _, length in config.stages)
        if stream.num_ids < longest + 1:
            raise DataError(
                f"the training split has {stream.num_ids} ids, a sequence needs {longest + 1}",
                hint="prepare more text or lower --data.sequence-bytes",
            )
        self._ahead: tuple[tuple[int, int], Future[tuple[Tensor, Tensor]]] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")

    def sequence_starts(self, stage: int, index: int) -> list[int]:
        """Return where in the stream each sequence of the whole batch begins, over all ranks, in row order."""
        length = self.config.stages[stage][1]
        rows = self.config.batch_bytes // length
        if self.config.order == "sequential":
            # as the reference: each of the step's streams takes its share and one id more, which the next one skips
            streams = self.config.num_streams
            per_stream = rows // streams * length
            base = index * streams * (per_stream + 1)
            return [
                base + s * (per_stream + 1) + row * length for s in range(streams) for row in range(rows // streams)
            ]
        usable = self.stream.num_ids - 1
        max_phase = length - 1 if usable >= 2 * length else usable - length * (usable // length)
        num_sequences = (usable - max_phase) // length
        starts = []
        for number in range(index * rows, (index + 1) * rows):
            epoch, place = divmod(number, num_sequences)
            phase, order = _epoch_order(self.seed, stage, epoch, num_sequences, max_phase)
            starts.append(phase + length * int(order[place]))
        return starts

    def batch(self, stage: int, index: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Return (inputs, targets) of this rank's rows, int64 on the device; the next batch is made meanwhile."""
        if self._ahead is not None and self._ahead[0] == (stage, index):
            inputs, targets = self._ahead[1].result()
        else:
            inputs, targets = self.make(stage, index)
        self._ahead = ((stage, index + 1), self._worker.submit(self.make, stage, index + 1))
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def make(self, stage: int, index: int) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets) of this rank's rows on the host; pinned if they are to be copied to a GPU."""
        length = self.config.stages[stage][1]
        starts = self.sequence_starts(stage, index)
        per_rank = len(starts) // self.world_size
        mine = starts[self.rank * per_rank : (self.rank + 1) * per_rank]
        rows = [self.stream.read(start, length + 1) for start in mine]
        if self.config.character_substitution:
            rows = [self._augmented(row, stage, index, number) for number, row in enumerate(rows, self.rank * per_rank)]
        ids = np.stack(rows).astype(np.int64)
        if ids.max(initial=0) >= VOCABULARY_SIZE:
            row, column = np.argwhere(ids >= VOCABULARY_SIZE)[0]
            raise DataError(
                f"the training split holds id {ids[row, column]} at position {mine[row] + column}; "
                f"byte260 ids are under {VOCABULARY_SIZE}",
                hint="sp1024 shards are converted by `bytejepa prepare --kind sp1024`",
            )
        sequences = torch.from_numpy(ids)
        inputs, targets = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    def _augmented(self, row: npt.NDArray[np.uint16], stage: int, index: int, number: int) -> npt.NDArray[np.uint16]:
        """Return row `number` of the whole batch, in its share of cases with a character substituted."""
        random = _random(f"{self.seed}:substitution:{stage}:{index}:{number}")
        if random.random() >= self.config.character_substitution:
            return row
        return substitute_character(row, random)

    def close(self) -> None:
        """Stop the thread."""
        self._worker.shutdown(wait=False, cancel_futures=True)
