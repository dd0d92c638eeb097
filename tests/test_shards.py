"""The shard format: what is written is read back, and every kind of damage is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from bytejepa.data.shards import (
    HEADER_BYTES,
    SHARD_MAGIC,
    ShardWriter,
    check_ids,
    find_shards,
    open_shard,
    write_shard,
)
from bytejepa.data.vocabulary import BOS, ids_from_bytes
from bytejepa.errors import DataError

IDS = np.concatenate([[BOS], ids_from_bytes(b"ab\xff"), [BOS], ids_from_bytes(b"c")]).astype(np.uint16)


def test_the_layout_is_the_challenges(tmp_path: Path) -> None:
    record = write_shard(tmp_path / "a.bin", IDS)
    raw = (tmp_path / "a.bin").read_bytes()
    header = np.frombuffer(raw[:HEADER_BYTES], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, 6]
    assert not header[3:].any()
    assert np.frombuffer(raw[HEADER_BYTES:], dtype="<u2").tolist() == [1, 101, 102, 259, 1, 103]
    assert (record.num_ids, record.num_documents, record.num_text_bytes) == (6, 2, 4)
    assert record.sha256 == hashlib.sha256(raw).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_an_opened_shard_is_read_only_and_equal(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", IDS)
    ids = open_shard(tmp_path / "a.bin")
    assert np.array_equal(ids, IDS)
    assert ids.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 5


def test_writing_in_pieces_changes_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.bin") as writer:
        for part in (IDS[:1], IDS[1:1], IDS[1:]):
            writer.write(part)
        assert writer.num_ids == 6
        record = writer.finish()
    assert record.sha256 == write_shard(tmp_path / "b.bin", IDS).sha256


def test_an_unfinished_shard_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", IDS)
    with ShardWriter(tmp_path / "a.bin") as writer:
        writer.write(IDS[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert len(open_shard(tmp_path / "a.bin")) == 6
    with pytest.raises(DataError, match="no ids"):
        write_shard(tmp_path / "b.bin", IDS[:0])


def _header(magic: int = SHARD_MAGIC, version: int = 1, count: int = 6) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"is empty \(0 bytes\).*interrupted download"),
        (_header()[:500], "truncated: expected a header of 1024 bytes, got 500"),
        (_header() + bytes(11), "truncated: 6 ids need 1036 bytes, the file has 1035"),
        (_header() + bytes(14), "too long: 6 ids need 1036 bytes, the file has 1038"),
        (_header(magic=7) + bytes(12), "expected magic 20240520, got 7"),
        (_header(version=2) + bytes(12), "version 2: expected 1"),
        (_header(count=-5) + bytes(12), "promises -5 ids"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html>" + bytes(2000), "error page"),
        (b"PAR1" + bytes(2000), "--kind parquet"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        open_shard(path)
    assert str(path) in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_shard(tmp_path / "none.bin")


def test_foreign_ids_are_found_with_their_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytejepa.data.shards._BLOCK_IDS", 4)
    ids = np.full(11, 259, dtype=np.uint16)
    check_ids(ids, tmp_path / "a.bin")
    ids[9] = 260
    with pytest.raises(DataError, match=r"a\.bin holds id 260 at position 9: .*--kind sp1024"):
        check_ids(ids, tmp_path / "a.bin")


def test_shards_of_a_bare_folder_are_found_in_order(tmp_path: Path) -> None:
    for name in ("fineweb_train_000010.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin", "notes.txt"):
        write_shard(tmp_path / name, IDS)
    assert [path.name for path in find_shards(tmp_path, "train")] == [
        "fineweb_train_000002.bin",
        "fineweb_train_000010.bin",
    ]
    assert len(find_shards(tmp_path, "val")) == 1


def test_no_shards_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no shard of the val split .*fineweb_val_\*\.bin"):
        find_shards(tmp_path, "val")
    with pytest.raises(DataError, match="does not exist"):
        find_shards(tmp_path / "nowhere", "val")
