"""The `.bjm` format: round trips, every kind of damage by its name, hostile headers."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from bytejepa.artifact.container import (
    FORMAT_VERSION,
    MAGIC,
    MAX_HEADER_BYTES,
    PRELUDE,
    container_to_bytes,
    read_container,
    write_container,
)
from bytejepa.artifact.packing import CODECS
from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import QuantizedMatrix, dequantize
from example_container import (
    CONFIGURATION,
    METADATA,
    assert_is_example,
    container_from_bytes,
    example_bytes,
    example_tensors,
)

torch.set_num_threads(1)

FORMAT_1_FILE = (  # written on purpose once; a reader of format 1 must read it for ever
    "i9$+E4GJ0x0RR91_W=L^vI77Bc>(|c00000D77#BV6p;j4*)hIU>tBu9*_v{s%R_UhHly>*2t=!n4)AzD`@KU|3X{<TL4o4s2{5U"
    "Kcb=j!eFlw{rdF#Z0k1+*A=y)97xIe>-C^hpUy^8Vi4-"
    "#B<B^*928N^l7qNYaUArFdXqC>xd$yyj;;UjW%=1C4q6rllbnSohiR1Sm2prg)5rq}+#;K*nUaoOdd#7dk-EgRDYh6}e3H|ca)fm"
    ">)zB`ZJVM%oQgZHFN}G!~DDMa)4%mcjmRLZ?;q}O$wXw|Kf<in<j-CJZp!4u)pCJG^fN22p8O7^84RZpt%|w-"
    "2t@`59wzc?QtH|qP>wd3e?AcGT<eGW2&*c<juQ^Lj?vhK$oLv2qx5n3-"
    "g*Ha<LqIWlt?;kcKGc2@p^7s#m98nTI9)>b?Q*vHy#kR!q>xZz>_x?%iwq%y?Xnk)uv<U(yHl-Tqz%F+n?~xeS+b-"
    "Ls&1L$diS^s#rJE{&G!67+0a4C)@<cwRGv7&XWIH(V)$17QmW-s@0_){0xKY3Mldzz16@f70OM?J!Zkzv=JEz$oO3NAU~+YH-"
    ")=oKLvR7W9?pLA>%*vE1xF1?1<?$^ca_V)_z)oSJm>Y0)vgKvuP70`Vr;}TK(`9b!wU;^4c{g(wQy;;ytJ?=3FsWu1Q;;z@BI1<3"
    "j5&*;Ry%>9vk}U<OvN5=K3EG_5B1J9}@850_Y4C1s@gv3;Y2GAMER1H>ZtD!7M2&DkUrc002BVv@<g^KNLnRauX-"
    "?7Ys%nT>UXy98);ua=o+z)R%VMFj299@c"
)


def seal(header: Any, payload: bytes = b"", *, json_bytes: int | None = None, version: int = FORMAT_VERSION) -> bytes:
    """A container around any header and payload, all lengths and the checksum right: what only malice writes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    compressed = zstandard.ZstdCompressor(level=3).compress(text)
    size = PRELUDE.size + len(compressed) + len(payload) + 32
    declared = len(text) if json_bytes is None else json_bytes
    body = PRELUDE.pack(MAGIC, version, len(compressed), declared, size) + compressed + payload
    return body + hashlib.sha256(body).digest()


def open_up(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload, read without the code under test."""
    _, _, header_bytes, _, _ = struct.unpack_from("<8sIIIQ", data)
    header = json.loads(zstandard.ZstdDecompressor().decompress(data[28 : 28 + header_bytes]))
    return header, data[28 + header_bytes : -32]


def refused(data: bytes, match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        container_from_bytes(data)


def test_round_trip_in_memory():
    assert_is_example(container_from_bytes(example_bytes()))


def test_round_trip_on_disk(tmp_path):
    path = tmp_path / "model.bjm"
    info = write_container(path, configuration=CONFIGURATION, tensors=example_tensors(), metadata=METADATA)
    content = read_container(path)
    assert_is_example(content)
    assert content.info == info
    assert info.path == path
    assert info.file_bytes == path.stat().st_size
    assert info.sha256 == content.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert info.header_bytes + sum(info.tensor_bytes.values()) == info.file_bytes
    assert list(info.tensor_bytes) == list(example_tensors())
    assert path.read_bytes() == example_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["model.bjm"]


def test_nothing_at_all_is_a_container_too():
    content = container_from_bytes(container_to_bytes(configuration={}, tensors={}, metadata={}))
    assert (content.configuration, content.tensors, content.metadata) == ({}, {}, {})


def test_same_input_gives_the_same_bytes_whatever_the_order_of_keys():
    assert example_bytes() == example_bytes()
    turned = dict(reversed(CONFIGURATION.items()))
    assert container_to_bytes(configuration=turned, tensors=example_tensors(), metadata=METADATA) == example_bytes()


def test_tuples_become_lists():
    data = container_to_bytes(configuration={"betas": (0.9, 0.95)}, tensors={}, metadata={})
    assert container_from_bytes(data).configuration == {"betas": [0.9, 0.95]}


def test_codecs_are_passed_on():
    data = container_to_bytes(configuration={}, tensors=example_tensors(), metadata={}, codecs=("brotli",))
    assert {codec for entry in open_up(data)[0]["tensors"] for codec in entry["codecs"]} == {"brotli"}
    every = container_to_bytes(configuration={}, tensors=example_tensors(), metadata={}, codecs=tuple(CODECS))
    assert torch.equal(container_from_bytes(every).tensors["scalar"], torch.tensor(0.7))


def test_a_file_of_format_1_stays_readable():
    assert_is_example(container_from_bytes(base64.b85decode(FORMAT_1_FILE)))


def test_the_documentation_is_enough_for_another_reader():
    header, payload = open_up(example_bytes())
    for entry in header["tensors"]:
        streams, start = [], entry["offset"]
        for codec, num_bytes in zip(entry["codecs"], entry["stream_bytes"], strict=True):
            stream = payload[start : start + num_bytes]
            streams.append(zstandard.ZstdDecompressor().decompress(stream) if codec == "zstd" else stream)
            start += num_bytes
        assert hashlib.sha256(payload[entry["offset"] : start]).hexdigest() == entry["sha256"]

        def scalars(planes: bytes, kind: str) -> np.ndarray:
            width = np.dtype(kind).itemsize
            return np.frombuffer(np.frombuffer(planes, np.uint8).reshape(width, -1).T.tobytes(), kind)

        if entry["scheme"].endswith("_rows"):
            codes = np.frombuffer(streams[0], np.int8).reshape(entry["shape"])
            weights = codes.astype(np.float32) * scalars(streams[1], "<f2").astype(np.float32)[:, None]
        else:
            weights = scalars(streams[0], {"float16": "<f2", "float32": "<f4"}[entry["scheme"]]).reshape(entry["shape"])
        stored = example_tensors()[entry["name"]]
        expected = dequantize(stored) if isinstance(stored, QuantizedMatrix) else stored
        np.testing.assert_array_equal(weights, expected.numpy())


# Damage


@pytest.mark.parametrize("foreign", [b"PK\x03\x04" + bytes(100), b"{}", b"\x89PNG\r\n\x1a\n" + bytes(90), b"\x80\x02"])
def test_foreign_files(foreign, tmp_path):
    refused(foreign, "is not a bytejepa artifact")
    (tmp_path / "x").write_bytes(foreign)
    with pytest.raises(ArtifactError, match=r"x is not a bytejepa artifact"):
        read_container(tmp_path / "x")


def test_an_empty_file():
    refused(b"", "not a bytejepa artifact .the file is empty")


def test_line_ends_changed_by_a_text_transfer():
    refused(example_bytes().replace(b"\r\n", b"\n"), "is not a bytejepa artifact")


@pytest.mark.parametrize("version", [3, 7])
def test_newer_versions(version):
    refused(seal({}, version=version), f"was written by a newer version {version} of the format")


def test_version_zero():
    refused(seal({}, version=0), "version 0, which never existed")


def test_truncation_says_so():
    data = example_bytes()
    for length in (1, 8, 20, 28, 60, len(data) - 1):
        refused(data[:length], "cut short")


def test_trailing_bytes_say_so():
    data = example_bytes()
    refused(data + b"\n", rf"too long: expected {len(data)} bytes, got {len(data) + 1}")


@pytest.mark.parametrize("where", [28, 40, -33, -1])
def test_flipped_bits_say_damaged(where):
    data = bytearray(example_bytes())
    data[where] ^= 0x10
    refused(bytes(data), "checksum differs .the file is damaged, copy it again")


def test_swapped_streams_are_noticed_even_under_a_right_checksum():
    tensors = {"a": torch.ones(4).half(), "b": torch.zeros(4).half()}
    header, payload = open_up(container_to_bytes(configuration={}, tensors=tensors, metadata={}, codecs=("raw",)))
    assert list(container_from_bytes(seal(header, payload)).tensors) == ["a", "b"]
    refused(seal(header, payload[8:] + payload[:8]), "tensor 'a': checksum differs")


# Hostile headers


def valid_header() -> tuple[dict[str, Any], bytes]:
    header, payload = open_up(example_bytes())
    assert_is_example(container_from_bytes(seal(header, payload)))
    return header, payload


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [6, 1 << 40]}, "in range"),
        ({"shape": [1 << 20, 1 << 20]}, "more than 268435456"),
        ({"shape": [-6, 8]}, "in range"),
        ({"shape": [6.0, 8]}, "in range"),
        ({"shape": [True, 8]}, "in range"),
        ({"shape": [6, 9]}, "does not decode to 54 bytes"),
        ({"shape": [48]}, "needs two dimensions"),
        ({"shape": "68"}, "wrong type"),
        ({"offset": 5}, "must start at byte 0"),
        ({"offset": -1}, "in range"),
        ({"offset": 1 << 70}, "in range"),
        ({"offset": None}, "in range"),
        ({"stream_bytes": [1, 1]}, "must start at byte 2"),
        ({"stream_bytes": [1 << 29, 1 << 29]}, "must start at byte"),
        ({"codecs": ["zstd"]}, "as many codecs"),
        ({"codecs": ["pickle", "pickle"]}, "unknown codec 'pickle'"),
        ({"codecs": [1, 2]}, "wrong type"),
        ({"codecs": ["brotli", "brotli"]}, "brotli stream does not decode"),
        ({"scheme": "float64"}, "unknown storage scheme"),
        ({"scheme": ["int6_rows"]}, "wrong type"),
        ({"name": ""}, "is empty"),
        ({"name": "blocks.2.gain"}, "repeated"),
        ({"name": 3}, "wrong type"),
        ({"sha256": ""}, "checksum differs"),
        ({"extra": 1}, "needs exactly"),
    ],
)
def test_hostile_table_entries(change, message):
    header, payload = valid_header()
    header["tensors"][0] |= change
    refused(seal(header, payload), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "expected an object"),
        (b'{"format_version":1}', "expected an object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 400_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"configuration":{},"metadata":{},"tensors":[],"format_version":NaN}', "NaN is not a JSON number"),
        (b'{"configuration":{"x":-Infinity},"metadata":{},"tensors":[],"format_version":1}', "-Infinity is not"),
        (
            b'{"configuration":{"x":1e999},"metadata":{},"tensors":[],"format_version":1}',
            "header.configuration.x is inf",
        ),
        (b'{"configuration":{"x":' + b"9" * 9999 + b'},"metadata":{},"tensors":[],"format_version":1}', "not JSON"),
        (b'{"configuration":{},"metadata":{"a":1,"a":2},"tensors":[],"format_version":1}', "a key appears twice"),
        (
            b'{"configuration":[],"metadata":{},"tensors":[],"format_version":1}',
            "configuration must be a dict, got list",
        ),
        (b'{"configuration":{},"metadata":{},"tensors":{},"format_version":1}', "tensors must be a list, got dict"),
        (b'{"configuration":{},"metadata":{},"tensors":[7],"format_version":1}', "needs exactly"),
        (b'{"configuration":{},"metadata":{},"tensors":[],"format_version":2}', "differs from the prelude"),
        (b'{"configuration":{},"metadata":{},"tensors":[],"format_version":true}', "differs from the prelude"),
        (
            b'{"configuration":{},"metadata":{"m":' + b"[" * 40 + b"]" * 40 + b'},"tensors":[],"format_version":1}',
            "nested",
        ),
    ],
)
def test_hostile_json(text, message):
    refused(seal(text), rf"bad header: .*{message}")


def test_gigantic_lengths_are_refused_without_allocation():
    body = PRELUDE.pack(MAGIC, FORMAT_VERSION, 1 << 31, 100, PRELUDE.size + 40) + bytes(8)
    too_long_header = body + hashlib.sha256(body).digest()
    bomb = seal(b" " * (MAX_HEADER_BYTES + 1))
    lying_bomb = seal(b" " * 50_000_000, json_bytes=100)
    giant = PRELUDE.pack(MAGIC, FORMAT_VERSION, 10, 10, 1 << 60) + bytes(40)
    header, payload = valid_header()
    header["tensors"][0]["shape"] = [1 << 14, 1 << 13]  # within the limit, but far from what the stream holds
    large_tensor = seal(header, payload)
    tracemalloc.start()
    try:
        refused(too_long_header, "claims a header of 2147483648 bytes")
        refused(bomb, "claims a header of")
        refused(lying_bomb, "bad header: it does not decode to 100 bytes")
        refused(giant, "claims 1152921504606846976 bytes")
        refused(large_tensor, "does not decode to 134217728 bytes")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# Writing


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "metadata.x is nan"),
        (float("inf"), "metadata.x is inf"),
        ({1: 2}, "metadata.x holds a dict"),
        (Path("a"), "metadata.x holds a .*Path"),
        (torch.ones(1), "metadata.x holds a Tensor"),
        (b"x", "metadata.x holds a bytes"),
        (np.float64(0.5), "metadata.x holds a float64"),
        ("x" * MAX_HEADER_BYTES, "the header would take"),
    ],
)
def test_values_that_json_cannot_hold_are_refused(value, message):
    with pytest.raises(ArtifactError, match=message):
        container_to_bytes(configuration={}, tensors={}, metadata={"x": value})


def test_a_value_inside_itself_is_refused():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ArtifactError, match="nested more than 32 levels"):
        container_to_bytes(configuration={"x": loop}, tensors={}, metadata={})


def test_messages_are_single_lines():
    header, payload = valid_header()
    header["tensors"][0]["scheme"] = "x\ny" * 1000
    with pytest.raises(ArtifactError) as caught:
        container_from_bytes(seal(header, payload))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
