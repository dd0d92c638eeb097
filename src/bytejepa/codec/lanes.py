"""Blocks to frequencies and streams to blocks, whatever computes them.

A block is coded by itself: its ids are BOS and its bytes, predicted within windows as the engine's rule says
(`bytejepa.inference.engine`): windows begin at multiples of `hop`; when `window` ids are in, the first `hop` leave and the
model is run again over those that stay.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from bytejepa.codec import coder
from bytejepa.codec.mixed import MixedDecoder
from bytejepa.data.vocabulary import BOS, BYTE_OFFSET
from bytejepa.kernels.context_mixing import fill_paths

CHUNK_ROWS = 128
"""Most positions of all lanes in one pass of a CPU: bounds its buffers."""
STEPS_AT_ONCE = 32
"""Decoded positions between two reports of progress."""

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""
Ids = npt.NDArray[np.int64]
Paths = npt.NDArray[np.uint16]
"""(N, 8): what a model says of the bits of bytes, each given those before it, of 2^16."""
_Choose = Callable[[int, Ids, Ids], None]
"""Round, frequencies (L, 256) of every lane, and where the ids that follow go (L,)."""
_OfSymbols = Callable[[Any, Ids, int, int, Ids], Ids]
"""State, ids (L, N), position, first wanted, bytes (L, n) that are predicted; returns (L, n, ...) of these."""


class LaneCoder(abc.ABC):
    """The coder of one model, window and hop: one subclass for each way to compute the same integers."""

    windows_at_once: int = 1
    """Windows of a block that go through the model as lanes of one pass."""
    chunk_rows: int = CHUNK_ROWS
    fills_passes = False
    """Whether a block's last pass gets as many windows as the others, so that its shape is theirs."""

    def __init__(self, window: int, hop: int) -> None:
        self.window, self.hop = window, hop

    @abc.abstractmethod
    def start(self, num_lanes: int) -> Any:
        """Return the state of lanes at a window's beginning."""

    @abc.abstractmethod
    def logits(self, state: Any, ids: Ids, position: int, first_wanted: int = 0) -> Ids:
        """Return the logits after each of `ids` (L, N) from the `first_wanted`-th of each lane on, (L * n, 256), in binary
        digits with 16 fraction bits, and move the state on. The ids stand at `position` in their windows; 0 begins one."""

    @abc.abstractmethod
    def frequencies(self, logits: Ids) -> Ids:
        """Return integer frequencies of sum 2^24, (R, 256), from logits (R, 256); these may be overwritten."""

    def intervals(self, state: Any, ids: Ids, position: int, first_wanted: int, symbols: Ids) -> tuple[Ids, Ids]:
        """Return cumulative starts and frequencies of `symbols` (L, n), bytes that are predicted after the ids from the
        `first_wanted`-th on, (L, n) each, and move the state on as `logits` does."""
        table = self.frequencies(self.logits(state, ids, position, first_wanted)).reshape(*symbols.shape, 256)
        chosen = np.take_along_axis(table, symbols[..., None], axis=-1)[..., 0]
        starts = np.take_along_axis(table.cumsum(axis=-1), symbols[..., None], axis=-1)[..., 0] - chosen
        return starts, chosen

    def paths(self, state: Any, ids: Ids, position: int, first_wanted: int, symbols: Ids) -> Ids:
        """Return what the frequencies say of the bits of `symbols` (L, n) as `intervals` takes them, each given those before
        it, (L, n, 8), of 2^16; and move the state on."""
        table = self.frequencies(self.logits(state, ids, position, first_wanted))
        found = np.empty((symbols.size, 8), np.int64)
        fill_paths(table, symbols.reshape(-1), found)
        return found.reshape(*symbols.shape, 8)

    def block_intervals(self, block: bytes, on_progress: Progress | None = None) -> tuple[Ids, Ids]:
        """Return (cumulative starts, frequencies) of a block's bytes, (N,) each, out of totals of 2^24."""
        found = np.empty((len(block), 2), np.int64)

        def both(*given: Any) -> Ids:
            return np.stack(self.intervals(*given), axis=-1)

        self._fill(ids_of(block), both, found, on_progress)
        return found[:, 0], found[:, 1]

    def segment_paths(self, segment: bytes, on_progress: Progress | None = None) -> Paths:
        """Return what the model says of every bit of a segment."""
        found = np.empty((len(segment), 8), np.uint16)
        self._fill(ids_of(segment), self.paths, found, on_progress)
        return found

    def _fill(self, ids: Ids, of_symbols: _OfSymbols, found: npt.NDArray[Any], on_progress: Progress | None) -> None:
        """Fill `found` (N, ...) with what `of_symbols` returns for the bytes of a block or segment."""
        plan = windows(len(found), self.window, self.hop)
        state = self.start(min(self.windows_at_once, len(plan)))
        for index in range(0, len(plan), self.windows_at_once):
            together = plan[index : index + self.windows_at_once]
            if self.fills_passes and index:
                begin, end, _ = plan[0]
                together += [(begin, end, end)] * (self.windows_at_once - len(together))  # of which nothing is wanted
            if len(together) < min(self.windows_at_once, len(plan)):
                state = self.start(len(together))
            self._fill_windows(state, ids, together, of_symbols, found)
            if on_progress is not None:
                on_progress(sum(end - first for _, end, first in together))

    def decode(
        self, streams: Sequence[bytes], lengths: Sequence[int], on_progress: Progress | None = None
    ) -> list[bytes]:
        """Return the blocks of `streams`, one lane each, whose lengths are known."""
        decoder = coder.start_decoding(streams)

        def choose(_: int, tables: Ids, following: Ids) -> None:
            coder.decode_symbols(decoder, tables, BYTE_OFFSET, following)

        return self._step_through(lengths, choose, on_progress)

    def decode_mixed(
        self,
        streams: Sequence[bytes],
        lengths: Sequence[int],
        segment_bytes: int,
        on_progress: Progress | None = None,
        num_threads: int = 1,
    ) -> list[bytes]:
        """Return the blocks of `streams`, whose lengths are known: a lane for each of their segments, all together. Lanes are
        divided among `num_threads`."""
        mixed = MixedDecoder(streams, lengths, segment_bytes)
        segments = self._step_through(mixed.segment_lengths, mixed.choose, on_progress, num_threads)
        return [b"".join(segments[first:end]) for first, end in itertools.pairwise(mixed.first_lanes)]

    def _step_through(
        self, lengths: Sequence[int], choose: _Choose, on_progress: Progress | None, num_threads: int = 1
    ) -> list[bytes]:
        """Return the bytes of lanes of these lengths, every one chosen by `choose` after what the model says."""
        longest, num_lanes = max(lengths), len(lengths)
        num_parts = min(num_threads, num_lanes)
        parts = [slice(num_lanes * k // num_parts, num_lanes * (k + 1) // num_parts) for k in range(num_parts)]
        ids = np.full((num_lanes, longest + 1), BOS, dtype=np.int64)
        states = [self.start(part.stop - part.start) for part in parts]
        tables = np.empty((num_lanes, 256), np.int64)
        begin = position = 0

        def predict(state: Any, part: slice) -> None:
            if begin and position == self.window - self.hop:
                self._refill(state, ids[part, begin : begin + position])
            tables[part] = self.frequencies(self.logits(state, ids[part, t : t + 1].copy(), position))

        with ThreadPoolExecutor(num_parts - 1) if num_parts > 1 else contextlib.nullcontext() as pool:
            for t in range(longest):
                if position == self.window:
                    begin += self.hop
                    position = self.window - self.hop
                others = (
                    [pool.submit(predict, *work) for work in zip(states[1:], parts[1:], strict=True)] if pool else []
                )
                predict(states[0], parts[0])  # by this thread: one less to wake up every round
                for other in others:
                    other.result()
                choose(t, tables, ids[:, t + 1])
                position += 1
                if on_progress is not None and (t % STEPS_AT_ONCE == STEPS_AT_ONCE - 1 or t == longest - 1):
                    reported = t // STEPS_AT_ONCE * STEPS_AT_ONCE
                    on_progress(sum(max(0, min(length, t + 1) - reported) for length in lengths))
        data = (ids[:, 1:] - BYTE_OFFSET).astype(np.uint8)
        return [data[lane, :length].tobytes() for lane, length in enumerate(lengths)]

    def _fill_windows(
        self, state: Any, ids: Ids, plan: list[tuple[int, int, int]], of_symbols: _OfSymbols, found: npt.NDArray[Any]
    ) -> None:
        """Fill what is to be known of the bytes that the windows of `plan` predict."""
        length = max(end - begin for begin, end, _ in plan)
        skipped = min(first - begin for begin, _, first in plan)
        fed = np.full((len(plan), length), BYTE_OFFSET, np.int64)  # what follows a shorter window changes nothing in it
        for lane, (begin, end, _) in enumerate(plan):
            fed[lane, : end - begin] = ids[begin:end]
        at_once = max(1, self.chunk_rows // len(plan))
        for place in range(0, length, at_once):
            part = np.ascontiguousarray(fed[:, place : place + at_once])
            wanted = min(max(skipped - place, 0), part.shape[1])
            if wanted == part.shape[1]:
                self.logits(state, part, place, wanted)
                continue
            coded = np.full((len(plan), part.shape[1] - wanted), BYTE_OFFSET, np.int64)
            spans = []
            for lane, (begin, end, first) in enumerate(plan):
                low, high = max(begin + place + wanted, first), min(begin + place + part.shape[1], end)
                within = slice(low - begin - place - wanted, high - begin - place - wanted)
                if low < high:
                    coded[lane, within] = ids[low + 1 : high + 1]
                    spans.append((lane, within, slice(low, high)))
            values = of_symbols(state, part, place, wanted, coded - BYTE_OFFSET)
            for lane, within, place_in_block in spans:
                found[place_in_block] = values[lane, within]

    def _refill(self, state: Any, kept: Ids) -> None:
        """Begin a window with the ids `kept` (L, n)."""
        num_lanes, length = kept.shape
        at_once = max(1, self.chunk_rows // num_lanes)
        for position in range(0, length, at_once):
            part = np.ascontiguousarray(kept[:, position : position + at_once])
            self.logits(state, part, position, part.shape[1])


def ids_of(block: bytes) -> Ids:
    """Return BOS and the ids of a block's bytes, (N + 1,)."""
    return np.concatenate(([BOS], np.frombuffer(block, np.uint8).astype(np.int64) + BYTE_OFFSET))


def windows(length: int, window: int, hop: int) -> list[tuple[int, int, int]]:
    """Return (begin, end, first) of every window of a block of `length` bytes: it feeds the ids begin .. end - 1 and
    its predictions from `first` on count, that of position t being byte t."""
    found, begin, first = [], 0, 0
    while first < length:
        end = min(begin + window, length)
        found.append((begin, end, first))
        begin, first = begin + hop, end
    return found
