"""Documents out of files: bytes exactly as they are, compressed or not, and clear errors for what is no document."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest
import zstandard

from bytejepa.data import sources
from bytejepa.data.blocks import Segment, ids_from_block, limited
from bytejepa.data.sources import Kind, ReadSettings, guess_kind, read_blocks
from bytejepa.errors import DataError
from prepared_folders import documents_from_blocks

COMPRESSORS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[:20]) + zstandard.compress(data[20:]),  # two frames
}


def documents(path: Path, kind: Kind, separator: bytes | None = None, **segment: object) -> list[bytes]:
    settings = ReadSettings(kind=kind, document_separator=separator)
    return list(documents_from_blocks(read_blocks([Segment(path=str(path), **segment)], settings)))  # type: ignore[arg-type]


@pytest.fixture(params=[1, 3, 4_000_000])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sources, "_BLOCK_BYTES", request.param)
    return int(request.param)


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path, block_bytes: int) -> None:
    data = bytes(range(256)) + b"\r\n\xff\xfe\n\n"
    (tmp_path / "a.txt").write_bytes(data)
    assert documents(tmp_path / "a.txt", "text") == [data]


def test_an_empty_text_file_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert documents(tmp_path / "a.txt", "text") == [b""]


@pytest.mark.parametrize(
    ("separator", "data", "expected"),
    [
        (b"<|end|>", b"a<|end|>\xff<|end<|end|>c\n<|end|>", [b"a", b"\xff<|end", b"c\n"]),
        (b"\n\n", b"\n\n\n\nab\n\n\ncd\n", [b"ab", b"\ncd\n"]),
        (b"x", b"xxx", []),
        (b"long separator", b"short", [b"short"]),
    ],
)
def test_a_separator_splits_from_left_to_right(
    tmp_path: Path, block_bytes: int, separator: bytes, data: bytes, expected: list[bytes]
) -> None:
    assert expected == [part for part in data.split(separator) if part]
    (tmp_path / "a.txt").write_bytes(data)
    assert documents(tmp_path / "a.txt", "text", separator) == expected


LINES = (
    b'\xef\xbb\xbf{"text": "caf\xc3\xa9", "id": 3}\r\n'
    b"\n   \n"
    b'{"id": {"text": 1}, "text": ""}\n'
    b'{"text": "\xff\x80 \\n \\u00e9 \\ud83d\\ude00"}\n'
    b'{"text": "lone \\ud800 \\udc80"}\n'
    b'{"text": "\xffboth \\ud800"}\n'
    b'{"text": "\xc3\xa9 \\udc80"}'
)
TEXTS = [
    "café".encode(),
    b"",
    b"\xff\x80 \n \xc3\xa9 \xf0\x9f\x98\x80",
    b"lone ? ?",
    b"\xffboth ?",
    "é ?".encode(),
]


def test_jsonl_keeps_bytes_that_are_not_utf8_and_survives_lone_surrogates(tmp_path: Path, block_bytes: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert documents(tmp_path / "a.jsonl", "jsonl") == TEXTS


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_hold_the_same_documents(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESSORS[suffix](LINES))
    assert documents(tmp_path / f"a.jsonl{suffix}", "jsonl") == TEXTS
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESSORS[suffix](LINES))
    assert documents(tmp_path / f"a.txt{suffix}", "text") == [LINES]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_damaged_compressed_file_is_an_error(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = bytearray(COMPRESSORS[suffix](LINES * 50))
    if damage == "cut off":
        del packed[-10:]
    else:
        packed[:4] = b"oops"
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"cannot decompress .*a\.jsonl") as caught:
        documents(path, "jsonl")
    assert "fetch it again" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a"', "this is no JSON"),
        (b'{"text": 5}', "the value is int"),
        (b'{"content": "a", "id": 1}', "its keys are content, id"),
        (b'["text"]', "this is list, not an object"),
        (b"plain text", "this is no JSON"),
        (b"[" * 100_000, "this is no JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "this is no JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, expected: str) -> None:
    good = b'{"text": "fine"}\n\n'
    path = tmp_path / "a.jsonl"
    path.write_bytes(good * 3 + line + b"\n" + good)
    with pytest.raises(DataError, match=r'a\.jsonl:7: expected a JSON object with a string under "text"') as caught:
        documents(path, "jsonl", begin=2 * len(good))
    assert expected in str(caught.value)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = ["a", "", "café", "x" * 1000] * 200
    for name, kind in (("s", pyarrow.string()), ("l", pyarrow.large_string()), ("b", pyarrow.binary())):
        values = [row.encode() for row in rows] if name == "b" else rows
        table = pyarrow.table({"id": list(range(len(rows))), "text": pyarrow.array(values, kind)})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=300)
        assert documents(tmp_path / f"{name}.parquet", "parquet") == [row.encode() for row in rows]
    assert documents(tmp_path / "s.parquet", "parquet", begin=1, end=2) == [row.encode() for row in rows[300:600]]


def test_parquet_without_text_is_an_error(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text': its columns are content"):
        documents(tmp_path / "a.parquet", "parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="has 2 columns 'text'"):
        documents(tmp_path / "twice.parquet", "parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row group 0, row 1: expected a text, got null"):
        documents(tmp_path / "b.parquet", "parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet has a column 'text' of int64"):
        documents(tmp_path / "c.parquet", "parquet")
    (tmp_path / "d.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"d\.parquet is no whole parquet file"):
        documents(tmp_path / "d.parquet", "parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'bytejepa\[parquet\]'"):
        documents(tmp_path / "a.parquet", "parquet")


def test_the_kind_is_told_by_the_names() -> None:
    assert guess_kind(["a.txt", "b.md.gz", "README"]) == "text"
    assert guess_kind(["a.jsonl.zst", "b.ndjson"]) == "jsonl"
    assert guess_kind(["a.parquet"]) == "parquet"
    assert guess_kind(["fineweb_train_000000.bin"]) == "sp1024"
    with pytest.raises(DataError, match=r"a\.txt is text, b\.jsonl is jsonl"):
        guess_kind(["a.txt", "b.jsonl"])
    with pytest.raises(DataError, match="at least one file"):
        guess_kind([])
    with pytest.raises(DataError, match=r"its suffix is \.tar"):
        guess_kind(["a.tar.gz"])


@pytest.mark.parametrize("skip", range(6))
@pytest.mark.parametrize("take", [None, 1, 2, 9])
def test_documents_are_skipped_and_taken_across_blocks(
    tmp_path: Path, block_bytes: int, skip: int, take: int | None
) -> None:
    texts = [b"a", b"", b"bcdefg", b"", b"h"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in texts))
    blocks = read_blocks([Segment(path=str(path))], ReadSettings(kind="jsonl"))
    expected = texts[skip:] if take is None else texts[skip : skip + take]
    assert list(documents_from_blocks(limited(blocks, skip, take))) == expected


def test_ids_have_a_bos_before_each_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": ""}\n{"text": "bc"}\n{"text": ""}')
    (block,) = read_blocks([Segment(path=str(path))], ReadSettings(kind="jsonl"))
    assert ids_from_block(block).tolist() == [1, 101, 1, 1, 102, 103, 1]
