"""Where the bits go: by position in the window, by byte class, by document."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from bytejepa.bits import bits_per_byte_of_bits
from bytejepa.data.vocabulary import BOS, BYTE_OFFSET
from bytejepa.report.byte_classes import CLASS_OF_ID, CLASSES
from bytejepa.report.measurements import PricedText


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Mean bits of what falls between two bounds, with a 95 % confidence interval."""

    first: int
    end: int
    """One past the last."""
    num_samples: int
    """Windows or documents, the units of the interval."""
    mean: float
    low: float
    high: float
    """Both NaN for fewer than two samples."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClassCost:
    """What one class of bytes costs."""

    name: str
    count: int
    bits: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DocumentCost:
    """What one whole document costs, its BOS left out."""

    num_bytes: int
    bits: float

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return bits_per_byte_of_bits(self.bits, self.num_bytes)


def bin_edges(end: int, *, first: int = 1, per_octave: int = 2) -> list[int]:
    """Return whole numbers from 0 to `end` that grow by a constant factor after `first`, as bounds of bins."""
    steps = int(np.ceil(np.log2(max(2, end / first)) * per_octave))
    grown = np.round(first * 2.0 ** (np.arange(steps + 1) / per_octave)).astype(int)
    return sorted({0, *(int(edge) for edge in grown if edge < end), end})


def by_position(priced: PricedText) -> list[Bin]:
    """Return the bits a target costs by its position in the window, over the whole windows of the text.

    Positions are counted from 0, the target with one id of context. The samples of the intervals are windows.
    """
    whole = len(priced.bits) // priced.window
    if whole == 0:
        return []
    bits = priced.bits[: whole * priced.window].reshape(whole, priced.window)
    edges = bin_edges(priced.window)
    return [_bin(bits[:, first:end].mean(axis=1), first, end) for first, end in itertools.pairwise(edges)]


def _bin(samples: np.ndarray, first: int, end: int) -> Bin:
    """Source: Student's t interval of the mean, `scipy.stats.t.interval`."""
    from scipy import stats

    mean, count = float(samples.mean()), len(samples)
    low = high = float("nan")
    if count > 1:
        spread = float(stats.sem(samples))
        low, high = stats.t.interval(0.95, count - 1, loc=mean, scale=spread) if spread > 0 else (mean, mean)
    return Bin(first=first, end=end, num_samples=count, mean=mean, low=float(low), high=float(high))


def by_class(priced: PricedText) -> list[ClassCost]:
    """Return the cost of every class that occurs, in the order of CLASSES; the sum is the text's."""
    classes = CLASS_OF_ID[priced.targets]
    counts = np.bincount(classes, minlength=len(CLASSES))
    bits = np.bincount(classes, weights=priced.bits, minlength=len(CLASSES))
    return [ClassCost(name=n, count=int(c), bits=float(b)) for n, c, b in zip(CLASSES, counts, bits, strict=True) if c]


def by_document(priced: PricedText) -> list[DocumentCost]:
    """Return the cost of every document that lies in the text whole and holds a byte.

    The last document counts only if the split ends with it, and text before the first BOS not at all.
    """
    starts = np.flatnonzero(priced.ids == BOS).tolist()  # target i of a document at id i + 1, so BOS marks its first
    ends = [start - 1 for start in starts[1:]]
    if priced.is_whole_split:
        ends.append(len(priced.targets))
    documents = []
    for start, end in zip(starts, ends, strict=False):
        num_bytes = int((priced.targets[start:end] >= BYTE_OFFSET).sum())
        if num_bytes:
            documents.append(DocumentCost(num_bytes=num_bytes, bits=float(priced.bits[start:end].sum())))
    return documents


def by_document_length(documents: list[DocumentCost]) -> list[Bin]:
    """Return the mean bits per byte of documents by their length in bytes, each document counting once."""
    if not documents:
        return []
    lengths = np.array([document.num_bytes for document in documents])
    bpb = np.array([document.bpb for document in documents])
    edges = bin_edges(int(lengths.max()) + 1, per_octave=1)
    pairs = itertools.pairwise(edges)
    inside = [(first, end, bpb[(lengths >= first) & (lengths < end)]) for first, end in pairs]
    return [_bin(samples, first, end) for first, end, samples in inside if len(samples)]
