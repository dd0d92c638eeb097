"""Where the bits go, on texts small enough to count by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bytejepa.data.vocabulary import BOS, ids_from_bytes
from bytejepa.report.byte_classes import CLASS_OF_ID, CLASSES
from bytejepa.report.losses import bin_edges, by_class, by_document, by_document_length, by_position
from bytejepa.report.measurements import PricedText


def priced(*documents: bytes, window: int = 4, is_whole_split: bool = True) -> PricedText:
    """Documents, each after a BOS; target number i costs i bits."""
    ids = np.concatenate([np.append(np.array([BOS], dtype=np.uint16), ids_from_bytes(d)) for d in documents])
    bits = np.arange(len(ids) - 1, dtype=np.float64)
    return PricedText(ids=ids, bits=bits, window=window, is_whole_split=is_whole_split)


def test_every_byte_has_a_class() -> None:
    names = {byte: CLASSES[CLASS_OF_ID[byte + 4]] for byte in range(256)}
    assert "".join(chr(b) for b, n in names.items() if n == "digits") == "0123456789"
    assert sum(n == "lower-case letters" for n in names.values()) == 26
    assert sum(n == "upper-case letters" for n in names.values()) == 26
    assert {b for b, n in names.items() if n == "line breaks and tabs"} == {9, 10, 13}
    assert sum(n == "punctuation" for n in names.values()) == 32
    assert {b for b, n in names.items() if n == "bytes never in UTF-8"} == {0xC0, 0xC1, *range(0xF5, 0x100)}
    for character in "é中😀":
        lead, *rest = character.encode()
        assert names[lead] == "UTF-8 lead bytes"
        assert {names[byte] for byte in rest} == {"UTF-8 continuation bytes"}


def test_classes_share_all_bits() -> None:
    text = priced(b"aB 1", b"c!")
    costs = {cost.name: (cost.count, cost.bits) for cost in by_class(text)}
    assert costs == {
        "lower-case letters": (2, 0 + 5), "upper-case letters": (1, 1), "space": (1, 2), "digits": (1, 3),
        "document starts (BOS)": (1, 4), "punctuation": (1, 6),
    }  # fmt: skip
    assert sum(bits for _, bits in costs.values()) == text.bits.sum()


def test_documents_are_priced_without_their_bos_and_only_if_whole() -> None:
    documents = by_document(priced(b"aB 1", b"c!"))
    assert [(d.num_bytes, d.bits) for d in documents] == [(4, 0 + 1 + 2 + 3), (2, 5 + 6)]
    assert len(by_document(priced(b"aB 1", b"c!", is_whole_split=False))) == 1
    assert len(by_document(priced(b"ab", b"", b"c"))) == 2


def test_positions_are_counted_in_whole_windows() -> None:
    text = priced(b"abcdefghij", window=4)  # 10 targets: two windows of 4, and a rest that is left out
    bins = by_position(text)
    assert [(b.first, b.end) for b in bins] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [b.mean for b in bins] == [2, 3, 4, 5]
    # two samples 4 apart: standard error 2, and Student's t of one degree of freedom is 12.706
    assert bins[0].high - bins[0].mean == pytest.approx(12.706 * 2, rel=1e-4)
    assert math.isnan(by_position(priced(b"abcde", window=5))[0].low)


def test_bins_cover_everything_once() -> None:
    for end in (1, 2, 3, 64, 4096, 5000):
        edges = bin_edges(end)
        assert (edges[0], edges[-1]) == (0, end)
        assert edges == sorted(set(edges))


def test_document_lengths_are_binned_by_octave() -> None:
    documents = by_document(priced(*[b"x" * n for n in (1, 2, 3, 8, 9)]))
    counted = by_document_length(documents)
    assert sum(b.num_samples for b in counted) == 5
    assert counted[-1].mean == pytest.approx(np.mean([d.bpb for d in documents[3:]]))
    assert by_document_length([]) == []
