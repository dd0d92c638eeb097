"""What every byte of a text costs, and what the model would rather have seen.

The bits are those of `bytejepa.score`, byte by byte: the same windows, the same sums in float64. They are shown on a
terminal in colour, as CSV, or as a page (`bytejepa.inference.surprise_page`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.text import Text
from torch import Tensor

from bytejepa.bits import NATS_PER_BIT, bits_per_byte_of_bits
from bytejepa.data.vocabulary import BOS, BYTE_OFFSET, ids_from_bytes
from bytejepa.model.transformer import ByteLM
from bytejepa.scoring.evaluate import Scorer, target_losses
from bytejepa.scoring.windows import window_and_stride

NUM_ALTERNATIVES = 5
"""Most likely bytes that are kept for every position."""
COLOURS = ("", "#3b3a1c", "#57491a", "#745515", "#935e0f", "#b3640d", "#cf5f1b", "#e2532f", "#ee4a48")
"""Background by whole bits, for a terminal: none under 1 bit, then darker to brighter up to 8 bits and more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SurpriseMap:
    """What a text costs, byte by byte."""

    data: bytes
    """The text: n bytes of any kind."""
    bits: npt.NDArray[np.float64]
    """Bits of each byte, (n,)."""
    alternatives: npt.NDArray[np.uint8]
    """The five most likely bytes before each byte was seen, the likeliest first, (n, 5)."""
    probabilities: npt.NDArray[np.float32]
    """Their probabilities, (n, 5)."""
    window: int
    """Longest context, in ids."""
    stride: int
    """Bytes scored a window."""

    @property
    def total_bits(self) -> float:
        """Bits of the whole text."""
        return float(self.bits.sum())

    @property
    def bpb(self) -> float:
        """Bits per byte; NaN for empty text."""
        return bits_per_byte_of_bits(self.total_bits, len(self.data))


class _RankingScorer(Scorer):
    """A scorer that also keeps the most likely bytes of every target it scores."""

    def __init__(self, model: ByteLM) -> None:
        super().__init__(model)
        self.alternatives: list[npt.NDArray[np.uint8]] = []
        self.probabilities: list[npt.NDArray[np.float32]] = []

    def _batch_losses(self, ids: Int[Tensor, "B T"], targets: Int[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        logits = self.target_logits(ids, targets.size(1)).flatten(0, 1)
        # specials count in the softmax but are not bytes
        top = torch.softmax(logits, dim=-1)[:, BYTE_OFFSET:].topk(NUM_ALTERNATIVES, dim=-1)
        self.alternatives.append(top.indices.to(torch.uint8).cpu().numpy())
        self.probabilities.append(top.values.float().cpu().numpy())
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


def surprise(
    model: ByteLM,
    data: bytes,
    *,
    window: int | None = None,
    stride: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> SurpriseMap:
    """Return what every byte of `data` costs as one document: a BOS, then each byte scored once.

    `window` and `stride` in bytes default to the model's evaluation settings, as in `bytejepa.score`; the sum of the bits
    is that score's. `on_progress` is told the bytes done so far. Raises: ConfigError if not 1 <= stride <= window.
    """
    evaluation = model.config.evaluation
    window, stride = window_and_stride(evaluation, window=window, stride=stride)
    ids = np.concatenate((np.array([BOS], dtype=np.uint16), ids_from_bytes(data)))
    scorer = _RankingScorer(model)
    nats, done = [np.zeros(0)], 0
    for _, losses in target_losses(scorer, ids, window=window, stride=stride, batch_ids=evaluation.batch_bytes):
        nats.append(losses.double().flatten().cpu().numpy())
        done += losses.numel()
        if on_progress is not None:
            on_progress(done)
    return SurpriseMap(
        data=data,
        bits=np.concatenate(nats) / NATS_PER_BIT,
        alternatives=np.concatenate([np.zeros((0, NUM_ALTERNATIVES), dtype=np.uint8), *scorer.alternatives]),
        probabilities=np.concatenate([np.zeros((0, NUM_ALTERNATIVES), dtype=np.float32), *scorer.probabilities]),
        window=window,
        stride=stride,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Character:
    """One character of the text, or one byte that is part of none."""

    offset: int
    """Position of its first byte."""
    num_bytes: int
    """Bytes it takes."""
    text: str | None
    """The character; None for a byte that is not valid UTF-8."""

    def shown(self, byte: int) -> str:
        """Return it as something visible; `byte`: the byte at its offset."""
        if self.text is None or not (self.text.isprintable() or self.text in "\n\t"):
            return f"\\x{byte:02x}" if self.num_bytes == 1 else f"\\u{ord(self.text or ' '):04x}"
        return self.text


def character_lengths(data: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the bytes of each character of `data` in order, and whether it is a byte that is part of none (1 byte)."""
    codes = _code_points(data)
    invalid = (codes >= 0xDC80) & (codes <= 0xDCFF)
    lengths = np.searchsorted([0x80, 0x800, 0x10000], codes, side="right") + 1
    return np.where(invalid, 1, lengths), invalid


def characters(data: bytes) -> Iterator[Character]:
    """Yield the characters of `data` in order; bytes that are not valid UTF-8 come one by one."""
    lengths, invalid = character_lengths(data)
    offset = 0
    for code, num_bytes, is_byte in zip(_code_points(data).tolist(), lengths.tolist(), invalid.tolist(), strict=True):
        yield Character(offset, num_bytes, None if is_byte else chr(code))
        offset += num_bytes


def _code_points(data: bytes) -> npt.NDArray[np.uint32]:
    # surrogateescape maps the byte b, where it is part of no character, to U+DC00 + b
    text = data.decode(errors="surrogateescape")
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def surprising_spots(surprised: SurpriseMap, *, most: int = 50, apart: int = 24) -> list[int]:
    """Return the offsets of the costliest bytes, the costliest first, each at least `apart` bytes from the others."""
    taken = np.zeros(len(surprised.data), dtype=bool)
    spots: list[int] = []
    for offset in np.argsort(-surprised.bits, kind="stable").tolist():
        if len(spots) == most:
            break
        if not taken[offset]:
            spots.append(offset)
            taken[max(0, offset - apart + 1) : offset + apart] = True
    return spots


def line_totals(surprised: SurpriseMap) -> list[tuple[int, int, float]]:
    """Return (offset, bytes, bits) of every line, its line feed included."""
    ends = np.flatnonzero(np.frombuffer(surprised.data, dtype=np.uint8) == 0x0A) + 1
    borders = np.unique(np.concatenate(([0], ends, [len(surprised.data)])))
    cumulative = np.concatenate(([0.0], surprised.bits.cumsum()))
    return [
        (begin, end - begin, float(cumulative[end] - cumulative[begin]))
        for begin, end in itertools.pairwise(borders.tolist())
    ]


def terminal_text(surprised: SurpriseMap) -> Text:
    """Return the text for a terminal, each character on a background that says what it cost (the sum of its bytes)."""
    text = Text()
    for character in characters(surprised.data):
        end = character.offset + character.num_bytes
        cost = float(surprised.bits[character.offset : end].sum())
        colour = COLOURS[min(int(cost), len(COLOURS) - 1)]
        shown = character.shown(surprised.data[character.offset])
        if shown == "\n":
            shown = "⏎\n" if colour else "\n"
        text.append(shown, style=f"#ffffff on {colour}" if colour else None)
    return text


def legend() -> Text:
    """Return the colours of `terminal_text` with the bits they stand for."""
    text = Text("bits: ")
    for bits, colour in enumerate(COLOURS):
        label = f" {bits}+ " if bits == len(COLOURS) - 1 else f" {bits} "
        text.append(label, style=f"#ffffff on {colour}" if colour else None)
    return text


def to_csv(surprised: SurpriseMap) -> str:
    """Return one line a byte: offset, byte, character, bits.

    The character stands beside its first byte and is empty beside the others; bytes that are part of none, and control
    characters, are written as hex escapes.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("offset", "byte", "character", "bits"))
    for character in characters(surprised.data):
        for index in range(character.num_bytes):
            offset = character.offset + index
            shown = "" if index else character.shown(surprised.data[offset])
            shown = {"\n": "\\n", "\t": "\\t"}.get(shown, shown)
            writer.writerow((offset, surprised.data[offset], shown, f"{surprised.bits[offset]:.6f}"))
    return out.getvalue()
