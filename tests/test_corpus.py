"""The embedded corpus: whole, split by time, and refused when it is not the shipped one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bytejepa.data import corpus
from bytejepa.data.corpus import embedded_documents, embedded_text, write_embedded_shards
from bytejepa.data.manifest import verify
from bytejepa.data.shards import open_shard, write_shard
from bytejepa.data.vocabulary import BOS
from bytejepa.errors import DataError
from prepared_folders import bytes_from_ids


def test_all_addresses_are_there_in_order() -> None:
    documents = embedded_documents()
    years = [document.year for document in documents]
    assert len(documents) == 90
    assert years == sorted(years)
    assert (years[0], years[-1]) == (1934, 2021)
    assert {document.year for document in documents if document.split == "val"} == set(range(2011, 2022))


def test_the_text_is_the_documents_with_blank_lines_between() -> None:
    train, val = embedded_text("train"), embedded_text("val")
    assert len(train + b"\n" + val) == 3_123_543
    assert val.startswith(b"Mr. Speaker, Mr. Vice President, Members of Congress")
    assert val.count(b"\n\n") == 10
    with pytest.raises(DataError, match="no split 'test'"):
        embedded_text("test")  # type: ignore[arg-type]


def test_the_shards_hold_a_bos_before_each_address(tmp_path: Path) -> None:
    manifest = write_embedded_shards(tmp_path / "data")
    assert verify(tmp_path / "data").is_good
    ids = open_shard(tmp_path / "data" / "fineweb_val_000000.bin")
    starts = np.flatnonzero(ids == BOS)
    assert [bytes_from_ids(part) for part in np.split(ids, starts)[1:]] == [
        document.data for document in embedded_documents() if document.split == "val"
    ]
    assert manifest.splits["val"].num_documents == 11
    assert manifest.splits["train"].num_documents == 79


def test_writing_again_gives_the_same_files(tmp_path: Path) -> None:
    write_embedded_shards(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_embedded_shards(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_data_is_not_overwritten(tmp_path: Path) -> None:
    write_shard(tmp_path / "fineweb_train_000000.bin", np.array([1, 70], dtype=np.uint16))
    with pytest.raises(DataError, match="holds other data already"):
        write_embedded_shards(tmp_path)
    assert open_shard(tmp_path / "fineweb_train_000000.bin").tolist() == [1, 70]


def test_a_changed_corpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = bytearray(corpus.corpus_path().read_bytes())
    damaged[1000] ^= 1
    (tmp_path / "corpus.xz").write_bytes(damaged)
    monkeypatch.setattr(corpus, "corpus_path", lambda: tmp_path / "corpus.xz")
    corpus._documents.cache_clear()
    with pytest.raises(DataError, match="install bytejepa again"):
        embedded_documents()
