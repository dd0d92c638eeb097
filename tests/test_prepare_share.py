"""`prepare --val-share`: the end of each text file is validation, for corpora that are one long document."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from bytejepa.data.manifest import load_manifest, verify
from bytejepa.data.prepare import prepare
from bytejepa.errors import ConfigError, DataError
from prepared_folders import documents_of

LINES = [f"line {number} {'x' * (number % 40)}\n".encode() for number in range(500)]
TEXT = b"".join(LINES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "input.txt"
    path.write_bytes(TEXT)
    return path


@pytest.mark.parametrize("shard_bytes", [100_000_000, 997])
def test_the_last_lines_of_each_file_are_validation(source: Path, tmp_path: Path, shard_bytes: int) -> None:
    other, out = source.with_name("other.txt"), tmp_path / "out"
    other.write_bytes(TEXT[::-1] + b"\nlast line")
    prepare([source, other], out, val_share=0.1, shard_bytes=shard_bytes, workers=1)
    train, val = documents_of(out, "train"), documents_of(out, "val")
    assert [a + b for a, b in zip(train, val, strict=True)] == [TEXT, TEXT[::-1] + b"\nlast line"]
    assert all(document.endswith(b"\n") for document in train)
    assert 0 <= 0.1 * len(TEXT) - len(val[0]) < max(map(len, LINES))
    assert verify(out).is_good
    assert load_manifest(out).settings["val_share"] == 0.1
    assert not prepare([source, other], out, val_share=0.1, shard_bytes=shard_bytes).is_new
    with pytest.raises(DataError, match=r"val_share.*0\.2"):
        prepare([source, other], out, val_share=0.2, shard_bytes=shard_bytes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_share": 0.0}, "--val-share is 0: expected more than 0 and less than 1"),
        ({"val_share": float("nan")}, "--val-share is nan: expected"),
        ({"val_share": 0.1, "val_documents": 3}, "both say what is validation"),
        ({"val_share": 0.1, "document_separator": "\n"}, "these sources are text of many documents"),
        ({"val_share": 0.1, "kind": "jsonl"}, "these sources are jsonl"),
    ],
)
def test_a_share_that_cannot_be_is_refused(
    source: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare([source], tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_file_too_short_to_be_cut_is_for_training(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a_word.txt").write_bytes(b"hello\n")
    (tmp_path / "empty.txt").touch()
    sources = [tmp_path / "a_word.txt", tmp_path / "empty.txt", source]
    prepare(sources, tmp_path / "out", val_share=0.1, workers=1)
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert (train[:2], train[2] + val[0]) == ([b"hello\n", b""], TEXT)
    with pytest.raises(DataError, match=r"each of 2 files, .*a_word\.txt the first, has no line or word"):
        prepare(sources[:2], tmp_path / "none", val_share=0.5, workers=1)


def test_files_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    whole, packed, empty = tmp_path / "whole.txt", tmp_path / "packed.txt.gz", tmp_path / "empty.txt"
    whole.write_bytes(b"one line without anything in " + b"its" * 9)
    packed.write_bytes(gzip.compress(TEXT))
    empty.touch()
    for path, message in (
        (whole, "no line or word that begins in its last 10"),
        (packed, "is compressed"),
        (empty, "no line"),
    ):
        with pytest.raises(DataError, match=message):
            prepare([path], tmp_path / "out", val_share=0.1)
        assert not (tmp_path / "out").exists()


def test_in_a_long_line_a_word_begins_it(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"word " * 100)
    prepare([tmp_path / "one.txt"], tmp_path / "out", val_share=0.101, workers=1)
    assert documents_of(tmp_path / "out", "val") == [b"word " * 10]


def test_who_does_not_say_what_is_validation_is_told_of_it(source: Path, tmp_path: Path) -> None:
    for settings in ({}, {"val_documents": 1}):
        with pytest.raises(DataError) as refused:
            prepare([source], tmp_path / "out", **settings)
        assert "--val-share 0.1" in str(refused.value)
