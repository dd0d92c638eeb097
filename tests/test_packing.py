"""Byte streams of stored tensors: schemes, codecs, sizes, and refusal of what does not fit its record."""

from __future__ import annotations

import dataclasses
import hashlib
import tracemalloc

import brotli
import numpy as np
import pytest
import torch
import zstandard

from bytejepa.artifact import codecs as codecs_module
from bytejepa.artifact import packing
from bytejepa.artifact.packing import (
    CODECS,
    DEFAULT_CODECS,
    MAX_ELEMENTS,
    PackedTensors,
    StreamRecord,
    TensorRecord,
    pack,
    restore,
    store_float16,
    unpack,
)
from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import QuantizedMatrix, dequantize, quantize_rows

torch.set_num_threads(1)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example() -> dict[str, packing.StoredTensor]:
    return {
        "matrix": quantize_rows(gaussian(16, 24), bits=6),
        "half": gaussian(3, 4, 5).half(),
        "single": gaussian(7),
        "scalar": torch.tensor(0.5),
        "nothing": torch.zeros(0, 4).half(),
        "no_columns": quantize_rows(torch.zeros(3, 0), bits=4),
    }


def same(left: packing.StoredTensor, right: packing.StoredTensor) -> bool:
    if isinstance(left, QuantizedMatrix) and isinstance(right, QuantizedMatrix):
        return (
            left.bits == right.bits and torch.equal(left.codes, right.codes) and torch.equal(left.scales, right.scales)
        )
    assert isinstance(left, torch.Tensor)
    assert isinstance(right, torch.Tensor)
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@pytest.mark.parametrize("codecs", [("zstd",), ("brotli",), ("raw",), DEFAULT_CODECS, tuple(CODECS)])
def test_round_trip_of_every_scheme_with_every_codec(codecs):
    packed = pack(example(), codecs=codecs)
    assert {stream.codec for record in packed.records for stream in record.streams} <= set(codecs)
    again = unpack(packed.records, packed.payload)
    assert list(again) == list(example())
    assert all(same(again[name], stored) for name, stored in example().items())


def test_records_describe_the_payload():
    packed = pack(example(), codecs=("zstd",))
    table = {record.name: record for record in packed.records}
    assert [record.scheme for record in packed.records] == [
        "int6_rows", "float16", "float32", "float32", "float16", "int4_rows",
    ]  # fmt: skip
    assert table["half"].shape == (3, 4, 5)
    assert table["scalar"].shape == ()
    assert table["matrix"].num_elements == 16 * 24
    assert len(table["matrix"].streams) == 2
    assert table["half"].offset == table["matrix"].num_bytes
    assert sum(record.num_bytes for record in packed.records) == len(packed.payload)


def test_the_smallest_codec_of_each_stream_wins():
    noise = torch.from_numpy(np.random.default_rng(0).integers(-128, 128, (64, 64)).astype(np.int8))
    tensors = {
        "noise": QuantizedMatrix(codes=noise, scales=torch.ones(64).half(), bits=8),
        "calm": QuantizedMatrix(codes=torch.zeros_like(noise), scales=torch.ones(64).half(), bits=8),
    }
    noise_record, calm_record = pack(tensors, codecs=("zstd", "raw")).records
    assert [stream.codec for stream in noise_record.streams] == ["raw", "zstd"]
    assert [stream.codec for stream in calm_record.streams] == ["zstd", "zstd"]
    sizes = {codecs: len(pack(tensors, codecs=codecs).payload) for codecs in [("zstd",), ("raw",), tuple(CODECS)]}
    assert sizes[tuple(CODECS)] <= min(sizes[("zstd",)], sizes[("raw",)])


def test_among_equals_the_first_codec_wins():
    empty = {"nothing": torch.zeros(0).half()}
    streams = pack(empty, codecs=("raw", "zstd")).records[0].streams
    assert streams == (StreamRecord(codec="raw", num_bytes=0),)
    assert codecs_module.smallest(b"x", ("raw", "raw"))[0] == "raw"


def test_codes_take_one_byte_each_and_compress_near_their_entropy():
    quantized = quantize_rows(gaussian(512, 512), bits=6)
    assert len(pack({"m": quantized}, codecs=("raw",)).payload) == 512 * 512 + 2 * 512
    counts = torch.bincount(quantized.codes.flatten().int() + 32).double()
    counts = counts[counts > 0]
    entropy_bytes = float(-(counts * (counts / counts.sum()).log2()).sum() / 8)
    compressed = pack({"m": quantized}, codecs=("zstd",)).records[0].streams[0].num_bytes
    assert entropy_bytes * 0.99 < compressed < entropy_bytes * 1.02


def test_zstd_packs_at_its_highest_level(monkeypatch):
    asked = []
    compressor = zstandard.ZstdCompressor
    monkeypatch.setattr(zstandard, "ZstdCompressor", lambda **options: asked.append(options) or compressor(**options))
    CODECS["zstd"].compress(b"codes")
    assert [options["level"] for options in asked] == [22] == [zstandard.MAX_COMPRESSION_LEVEL]


def test_scalars_are_stored_in_byte_planes_lowest_first():
    payload = pack({"x": torch.tensor([1.0, -2.0]).half()}, codecs=("raw",)).payload
    assert payload == bytes([0x00, 0x00, 0x3C, 0xC0])
    payload = pack({"x": torch.tensor([1.0, -2.5])}, codecs=("raw",)).payload
    assert payload == bytes([0, 0, 0, 0, 0x80, 0x20, 0x3F, 0xC0])


def test_packing_is_deterministic():
    assert pack(example()) == pack(example())


def test_float16_is_stored_in_memory_of_its_own():
    weights = {"h": gaussian(3), "s": torch.tensor(2.0, dtype=torch.float16)}
    stored = store_float16(weights)
    assert same(stored["h"], weights["h"].half())
    weights["s"].zero_()
    assert same(stored["s"], torch.tensor(2.0, dtype=torch.float16))


def test_restore_gives_float32():
    stored = example()
    assert all(restore(tensor).dtype == torch.float32 for tensor in stored.values())
    assert torch.equal(restore(stored["matrix"]), dequantize(stored["matrix"]))


def test_odd_layouts_are_stored_by_value():
    turned = torch.nn.Parameter(gaussian(4, 6)).t()
    packed = pack({"t": turned})
    assert torch.equal(restore(unpack(packed.records, packed.payload)["t"]), turned.detach())


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "'w': 2 of 2 values are not finite"), (1e6, "'w': the value 1e.06 is above float16")],
)
def test_values_that_do_not_fit_are_refused_by_name(value, message):
    with pytest.raises(ArtifactError, match=message):
        store_float16({"w": torch.full((2,), value)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32, torch.bool])
def test_other_types_are_refused(dtype):
    with pytest.raises(ArtifactError, match=r"'w': torch\..* cannot be stored"):
        pack({"w": torch.ones(2, dtype=dtype)})


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ArtifactError, match="'w' has values that are not finite"):
        pack({"w": torch.tensor([1.0, float("inf")])})


@pytest.mark.parametrize("codecs", [(), ("lzma",), ("zstd", "zlib")])
def test_unknown_codecs_are_refused(codecs):
    with pytest.raises(ArtifactError, match="codec"):
        pack({"w": torch.ones(2)}, codecs=codecs)


def _hostile(raw: bytes, codec: str, *, shape: tuple[int, ...], scheme: str = "float16") -> PackedTensors:
    """One float tensor whose single stream is `raw`, with a right checksum."""
    record = TensorRecord(
        name="w",
        shape=shape,
        scheme=scheme,
        offset=0,
        streams=(StreamRecord(codec=codec, num_bytes=len(raw)),),
        sha256=hashlib.sha256(raw).hexdigest(),
    )
    return PackedTensors(records=(record,), payload=raw)


BOMB_BYTES = 200_000_000


@pytest.mark.parametrize("codec", ["zstd", "brotli"])
def test_a_bomb_is_refused_without_its_memory(codec):
    chunks = [bytes(1_000_000)] * (BOMB_BYTES // 1_000_000)
    if codec == "zstd":
        honest = zstandard.ZstdCompressor(level=1).compressobj(size=BOMB_BYTES)
        silent = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
        bombs = [b"".join(map(each.compress, chunks)) + each.flush() for each in (honest, silent)]
    else:
        compressor = brotli.Compressor(quality=1)
        bombs = [b"".join(map(compressor.process, chunks)) + compressor.finish()]
    for bomb in bombs:
        packed = _hostile(bomb, codec, shape=(50,))
        tracemalloc.start()
        try:
            with pytest.raises(ArtifactError, match=f"{codec} stream does not decode to 100 bytes"):
                unpack(packed.records, packed.payload)
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("num_bytes", [0, 1, 2, 100, 70_000])
def test_codecs_accept_exactly_one_stream_of_the_declared_size(codec, num_bytes):
    raw = np.random.default_rng(num_bytes).integers(0, 9, num_bytes).astype(np.uint8).tobytes()
    stream = CODECS[codec].compress(raw)
    assert CODECS[codec].decompress(stream, num_bytes) == raw
    assert CODECS[codec].decompress(stream, num_bytes + 1) is None
    assert CODECS[codec].decompress(stream + b"\0", num_bytes) is None
    if num_bytes:
        assert CODECS[codec].decompress(stream, num_bytes - 1) is None
        assert CODECS[codec].decompress(stream[:-1], num_bytes) is None
        assert CODECS[codec].decompress(b"", num_bytes) is None


def test_a_bomb_that_claims_to_be_empty_is_refused_without_its_memory():
    run = ((1 << 17) << 3 | 2).to_bytes(3, "little") + b"x"  # a block of 128 KiB by repetition
    bomb = b"\x28\xb5\x2f\xfd" + bytes([0x80, 0x60]) + bytes(4) + run * 1000
    assert zstandard.frame_content_size(bomb) == 0
    tracemalloc.start()
    try:
        assert codecs_module.zstd_decompress(bomb, 0) is None
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_huge_zstd_window_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=5)
    frame = stream.compress(b"12345") + stream.flush()
    assert codecs_module.zstd_decompress(frame, 5) == b"12345"  # zstd lowers the window to the known content
    content = bytes(300)
    block = ((len(content) << 3) | 1).to_bytes(3, "little") + content  # one raw block, the last
    for window, expected in ((0x60, content), (0x88, None)):  # 4 MiB, which every decoder has, and 128 MiB
        wide = b"\x28\xb5\x2f\xfd" + bytes([0x40, window]) + (len(content) - 256).to_bytes(2, "little") + block
        assert codecs_module.zstd_decompress(wide, len(content)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 1}, "must start at byte 0"),
        ({"shape": (MAX_ELEMENTS + 1,)}, "impossible shape"),
        ({"shape": (-1,)}, "impossible shape"),
        ({"shape": (1,) * 9}, "impossible shape"),
        ({"shape": (1 << 20, 1 << 20)}, "more than 268435456 numbers"),
        ({"scheme": "int6_rows"}, "needs two dimensions"),
        ({"scheme": "int6_rows", "shape": (2, 2)}, "has 2 streams, got 1"),
        ({"scheme": "int6_rows", "shape": (MAX_ELEMENTS, 0), "streams": (StreamRecord(codec="raw", num_bytes=0),) * 2},
         "more than 268435456 numbers"),
        ({"scheme": "pickle"}, "unknown storage scheme 'pickle'"),
        ({"streams": (StreamRecord(codec="lzma", num_bytes=4),)}, "unknown codec 'lzma'"),
        ({"streams": (StreamRecord(codec="raw", num_bytes=-4),)}, "-4 bytes"),
        ({"streams": (StreamRecord(codec="raw", num_bytes=5),)}, "take 5 bytes, the payload has 4"),
        ({"streams": (StreamRecord(codec="raw", num_bytes=3),)}, "take 3 bytes, the payload has 4"),
        ({"name": ""}, "is empty"),
        ({"name": "x" * 201}, "over 200"),
        ({"sha256": "0" * 64}, "checksum differs"),
        ({"shape": (3,)}, "does not decode to 6 bytes"),
    ],
)  # fmt: skip
def test_impossible_records_are_refused(change, message):
    packed = pack({"w": torch.tensor([1.0, 2.0]).half()}, codecs=("raw",))
    record = dataclasses.replace(packed.records[0], **change)
    with pytest.raises(ArtifactError, match=message):
        unpack((record,), packed.payload)


def test_overlaps_repeats_and_gaps_are_refused():
    packed = pack({"a": torch.ones(4).half(), "b": torch.zeros(4).half()}, codecs=("raw",))
    first, second = packed.records
    for records, message in (
        ((first, dataclasses.replace(second, offset=0)), "'b' must start at byte 8 of the payload, got 0"),
        ((first, dataclasses.replace(second, offset=9)), "'b' must start at byte 8"),
        ((second, first), "'b' must start at byte 0"),
        ((first, dataclasses.replace(second, name="a")), "'a' is empty, repeated"),
        ((first,), "take 8 bytes, the payload has 16"),
        ((dataclasses.replace(first, sha256=second.sha256), second), "'a': checksum differs"),
    ):
        with pytest.raises(ArtifactError, match=message):
            unpack(records, packed.payload)


def test_streams_of_impossible_values_are_refused():
    infinite = _hostile(bytes([0x00, 0x7C]), "raw", shape=(1,))
    with pytest.raises(ArtifactError, match="'w' has values that are not finite"):
        unpack(infinite.records, infinite.payload)
    packed = pack({"w": quantize_rows(torch.full((1, 1), 100.0), bits=8)}, codecs=("raw",))
    with pytest.raises(ArtifactError, match=r"'w': codes of 4 bits lie in \[-8, 7\], got \[127, 127\]"):
        unpack((dataclasses.replace(packed.records[0], scheme="int4_rows"),), packed.payload)
