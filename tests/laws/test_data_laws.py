"""Laws of the data: any documents come back, and neither workers nor interruptions change a byte."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytejepa.data import sources
from bytejepa.data.prepare import prepare
from bytejepa.data.shards import ShardRecord, ShardWriter, find_shards, open_shard
from bytejepa.data.vocabulary import BOS
from prepared_folders import bytes_from_ids

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=3, max_size=30).filter(
    lambda documents: bool(documents[0]) and any(documents[1:])
)
shard_sizes = st.integers(16, 300)


def documents_of(out: Path) -> list[bytes]:
    paths = find_shards(out, "val") + find_shards(out, "train")
    ids = np.concatenate([open_shard(path) for path in paths])
    return [bytes_from_ids(part) for part in np.split(ids, np.flatnonzero(ids == BOS))[1:]]


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def write_jsonl(folder: str, documents: list[str]) -> Path:
    path = Path(folder) / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@given(documents=texts, shard_bytes=shard_sizes)
@settings(max_examples=20, deadline=None)
def test_any_texts_come_back_from_jsonl(documents: list[str], shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        prepare([write_jsonl(folder, documents)], out, val_documents=1, shard_bytes=shard_bytes, workers=1)
        assert documents_of(out) == [text.encode() for text in documents]


@given(documents=st.lists(st.binary(max_size=200), min_size=3, max_size=8), shard_bytes=shard_sizes)
@settings(max_examples=20, deadline=None)
def test_any_bytes_come_back_from_text_files(documents: list[bytes], shard_bytes: int) -> None:
    documents = [b"a", b"\x00\xff", *documents]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.txt" for index in range(len(documents))]
        for path, data in zip(paths, documents, strict=True):
            path.write_bytes(data)
        prepare(paths, Path(folder) / "out", val_documents=1, shard_bytes=shard_bytes, workers=1)
        assert documents_of(Path(folder) / "out") == documents


@given(
    data=st.text("ab<>\n", min_size=1, max_size=400),
    separator=st.sampled_from(["\n", "\n\n", "<>", "aba", "<"]),
    shard_bytes=shard_sizes,
    block_bytes=st.sampled_from([1, 7, 4_000_000]),
)
@settings(max_examples=40, deadline=None)
def test_a_separated_text_is_what_split_gives(data: str, separator: str, shard_bytes: int, block_bytes: int) -> None:
    data = f"a{separator}b{separator}{data}"
    expected = [part.encode() for part in data.split(separator) if part]
    if len(expected) < 2:
        return
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_BLOCK_BYTES", block_bytes)
        source = Path(folder) / "a.txt"
        source.write_text(data)
        out = Path(folder) / "out"
        prepare([source], out, val_documents=1, document_separator=separator, shard_bytes=shard_bytes, workers=1)
        assert documents_of(out) == expected


@given(documents=texts, shard_bytes=st.integers(16, 100))
@settings(max_examples=2, deadline=None)
def test_the_number_of_workers_changes_nothing(documents: list[str], shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(folder, documents)
        for workers in (1, 2):
            prepare([source], Path(folder) / str(workers), val_documents=1, shard_bytes=shard_bytes, workers=workers)
        assert files_of(Path(folder) / "1") == files_of(Path(folder) / "2")


@given(documents=texts, shard_bytes=shard_sizes, stops=st.lists(st.integers(0, 6), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None)
def test_stopping_and_starting_changes_nothing(documents: list[str], shard_bytes: int, stops: list[int]) -> None:
    finish = ShardWriter.finish
    num_left = 0

    def interrupted(writer: ShardWriter) -> ShardRecord:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise KeyboardInterrupt
        return finish(writer)

    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(folder, documents)
        out, whole = Path(folder) / "out", Path(folder) / "whole"
        prepare([source], whole, val_documents=1, shard_bytes=shard_bytes, workers=1)
        for num_left in stops:  # noqa: B007 - read by `interrupted`
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ShardWriter, "finish", interrupted)
                try:
                    prepare([source], out, val_documents=1, shard_bytes=shard_bytes, workers=1)
                except KeyboardInterrupt:
                    assert not list(out.glob("*.bin"))
        prepare([source], out, val_documents=1, shard_bytes=shard_bytes, workers=1)
        assert files_of(out) == files_of(whole)
