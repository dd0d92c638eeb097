"""docs/codec.md suffices: a decoder that was written from it decodes what the package encodes, and finds the golden numbers."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from bytejepa.artifact.container import write_container
from bytejepa.artifact.store import store_weights
from bytejepa.codec import container
from bytejepa.codec.compress import compress
from bytejepa.codec.cpu import CpuCoder
from bytejepa.codec.integer_model import integer_model
from bytejepa.codec.mixed import encode_mixed
from bytejepa.codec.zstd_frame import compress_frame
from bytejepa.config_json import to_dict
from bytejepa.data.corpus import embedded_text
from bytejepa.errors import CodecError
from bytejepa.kernels.context_mixing import mix_content
from bytejepa.kernels.mixing_state import new_mixing
from bytejepa.model.transformer import ByteLM
from codec import independent_decoder, independent_mixing, independent_model, independent_numbers
from codec.golden import MIXED_TEXT, TEXT, sha256
from codec.models import EVERY_CODE, GOLDEN, GOLDEN_MODEL, STRUCTURES, coded_blocks, golden_model, inputs
from small_models import small_model

EXPECTED = json.loads((GOLDEN / "codec.json").read_text())
VAL = embedded_text("val")
CAPITALS = "Ça ET là, NAÏVE café; Привет МИР! The END_of it. ".encode()
ABC = (b"abc" * 34)[:101]
LARGE = {  # structure, and factors of parameters, by the ends of their names, for sums to be clamped or to decide F or V
    "runs": ("runs", {"ngrams.scale": 40.0}),
    "gated skips": ("skip gates", {"skip_weights": 1e4}),
    "value embeddings": ("value embeddings", {"value_embedding.weight": 30.0}),
    "values": ("everything", {"value.weight": 3e5, "value_embedding.weight": 3.5e4, "attention_scale": 1e-3}),
    "what chunk blocks change": ("chunk blocks", {"1.mlp_scale": 3e3, "2.mlp_scale": 3e3, "chunk_scale": 3e-3}),
    "what chunk blocks add": ("chunk blocks", {"chunk_scale": 5e3}),
    "value embeddings beyond int16": (
        "everything", {"value.weight": 3e5, "value_embedding.weight": 3e5, "attention_scale": 1e-3},
    ),
    "a start token of residuals": ("latents of residuals", {"jepa.start": 100.0}),
}  # fmt: skip
MIXED = {  # content, block bytes, segment bytes
    "one segment": (VAL[:120], 120, 1000),
    "segments, the last one shorter": (VAL[:100], 100, 30),
    "fewer segments than n // segment_bytes": (VAL[:17], 17, 1),
    "several blocks": (VAL[:110], 50, 20),
    "matches across segments": (b"abcdefgh, ijk" * 12, 1000, 25),
    "binary": (random.Random(0).randbytes(60), 60, 25),
    "words": (CAPITALS * 2, 1000, 70),
    "one byte": (b"a", 1, 1),
}
MADE_UP = {  # content, segment bytes
    "text": (VAL[:3000], 700),
    "few bytes": (VAL[:200], 50),
    "repeats": ((VAL[:500] + bytes(300)) * 3, 360),
    "binary": (random.Random(0).randbytes(1000), 300),
    "a match that reaches the content's end": (((b"abc" * 11)[:31] * 8)[:241], 30),
    "matches that begin long": (b"".join(ABC[: 24 + i] + b"d" + ABC[25 + i :] for i in range(16)), 101),
    "all bytes, zeros and words": (bytes(range(256)) * 3 + bytes(500) + CAPITALS * 8, 10_000),
}


@pytest.fixture(scope="module")
def golden() -> independent_decoder.Model:
    return independent_decoder.read_model(GOLDEN_MODEL)


def test_it_shares_no_code_with_the_package() -> None:
    for module in (independent_decoder, independent_mixing, independent_model, independent_numbers):
        source = Path(module.__file__).read_text(encoding="utf-8")
        imported = r"^\s*(from|import)\s+(bytejepa|codec(?!\.independent_(mixing|model|numbers) import)|torch|numba)"
        assert re.search(imported, source, flags=re.MULTILINE) is None


def test_it_decodes_the_golden_file_and_streams(golden: independent_decoder.Model) -> None:
    for name, text in (("codec_file.bjc", TEXT), ("codec_file_mixed.bjc", MIXED_TEXT)):
        assert independent_decoder.decode_file(golden, (GOLDEN / name).read_bytes()) == text
    for name, stream in EXPECTED["streams"].items():
        data = inputs()[name]
        assert independent_decoder.decode_block(golden, bytes.fromhex(stream), len(data), 64, 32) == data
    for segment_bytes, stream in EXPECTED["mixed_streams"].items():
        decoded = independent_decoder.decode_mixed(golden, bytes.fromhex(stream), len(TEXT), 64, 32, int(segment_bytes))
        assert decoded == TEXT


def test_it_finds_the_golden_numbers(golden: independent_decoder.Model) -> None:
    assert golden.identity.hex() == EXPECTED["model_sha256"]
    ids = [1, *(byte + 4 for byte in TEXT[:63])]
    logits = np.stack([golden.logits(ids[: t + 1]) for t in range(64)])
    assert sha256(logits) == EXPECTED["logits_sha256"]
    for name in ("exp2", "tanh", "sigmoid"):
        assert sha256(getattr(independent_numbers, name.upper())) == EXPECTED["tables_sha256"][name]
    for name in ("squash", "stretch"):
        assert sha256(getattr(independent_mixing, name.upper())) == EXPECTED["tables_sha256"][name]


@pytest.mark.parametrize("name", STRUCTURES)
def test_it_decodes_what_the_package_encodes_with_any_structure(name: str, tmp_path: Path) -> None:
    check_decoding(small_model(**{"artifact": EVERY_CODE, **STRUCTURES[name]}), tmp_path / "model.bjm")


@pytest.mark.parametrize("name", LARGE)
def test_it_decodes_what_the_package_encodes_with_numbers_at_their_bounds(name: str, tmp_path: Path) -> None:
    structure, factors = LARGE[name]
    model = small_model(**{"artifact": EVERY_CODE, **STRUCTURES[structure]})
    with torch.no_grad():
        for ending, factor in factors.items():
            scaled = [parameter for name, parameter in model.named_parameters() if name.endswith(ending)]
            assert scaled
            for parameter in scaled:
                parameter.mul_(factor)
    check_decoding(model, tmp_path / "model.bjm")


def check_decoding(model: ByteLM, path: Path) -> None:
    stored = store_weights(dict(model.named_parameters()), model.config)
    write_container(path, configuration=to_dict(model.config), tensors=stored, metadata={}, codecs=("zstd", "brotli"))
    integers = integer_model(stored, model.config)
    blocks = coded_blocks(CpuCoder(integers, 24, 9), TEXT[:70], 41)
    blob = container.blocks_file(TEXT[:70], blocks, block_bytes=41, window=24, hop=9, model=integers.sha256)
    assert independent_decoder.decode_file(independent_decoder.read_model(path), blob) == TEXT[:70]


@pytest.mark.parametrize("mixing", [True, False])
def test_it_decodes_every_kind_of_block(mixing: bool, golden: independent_decoder.Model) -> None:
    data = VAL[:300] + inputs()["zlib of noise"][:160]
    blob = compress(golden_model(), data, block_bytes=150, window=32, hop=16, mixing=mixing)
    parsed = container.parse(blob)
    assert isinstance(parsed, container.Blocks)
    assert (parsed.segment_bytes is not None) == mixing
    assert {block.is_zstd for block in parsed.blocks if block} == {True, False}
    assert independent_decoder.decode_file(golden, blob) == data
    assert independent_decoder.decode_file(golden, compress(golden_model(), bytes(500), mixing=mixing)) == bytes(500)


@pytest.mark.parametrize("name", MIXED)
def test_it_decodes_mixed_blocks(name: str, golden: independent_decoder.Model) -> None:
    data, block_bytes, segment_bytes = MIXED[name]
    coder, blocks = CpuCoder(golden_model(), 64, 32), []
    for block in (data[begin : begin + block_bytes] for begin in range(0, len(data), block_bytes)):
        length = -(-len(block) // max(1, min(16, len(block) // segment_bytes)))
        paths = [coder.segment_paths(block[begin : begin + length]) for begin in range(0, len(block), length)]
        payload = encode_mixed(block, np.concatenate(paths), segment_bytes)
        blocks.append(container.make_block(block, payload, is_zstd=False))
    sizes = {"block_bytes": block_bytes, "window": 64, "hop": 32, "segment_bytes": segment_bytes}
    blob = container.blocks_file(data, blocks, model=golden_model().sha256, **sizes)
    assert independent_decoder.decode_file(golden, blob) == data


@pytest.mark.parametrize("name", MADE_UP)
def test_its_mixtures_are_the_same_for_made_up_predictions(name: str) -> None:
    """More bytes than the model could be paid for: buckets are emptied, matches are long and go on in other segments."""
    data, segment_bytes = MADE_UP[name]
    content = np.frombuffer(data, np.uint8)
    bits, expected = np.empty(8 * len(data), np.uint8), np.empty(8 * len(data), np.uint16)
    noise = np.random.default_rng(0)
    paths = noise.integers(1, 2**16, (len(data), 8)).astype(np.uint16)
    halves = np.unpackbits(content).reshape(-1, 8) * np.uint16(2**15)  # a better model, half of the time
    paths = np.where(noise.random(len(data))[:, None] < 0.5, paths, np.maximum(paths // 2 + halves, 1))
    mix_content(new_mixing(len(data), segment_bytes), content, paths, expected, bits)
    mixing, coming, found = independent_mixing.Mixing(len(data), segment_bytes), iter(bits.tolist()), []

    def path(number: int, text: bytearray) -> dict[int, int]:
        place = mixing.segments[number].begin + len(text)
        return {(data[place] | 256) >> 8 - bit: int(p) for bit, p in enumerate(paths[place])}

    def code_bit(p: int) -> int:
        found.append(p)
        return next(coming)

    assert mixing.code(path, code_bit) == data
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("n", [1, 300, 2**17, 2**20, 2**20 + 1, 2**22, 2**22 + 1])
def test_its_tables_are_as_large(n: int) -> None:
    buckets = new_mixing(n, n).slots.shape[1] // 16
    assert 2 ** independent_mixing.Mixing(n, n).b == buckets


def test_it_takes_and_refuses_the_same_frames(golden: independent_decoder.Model) -> None:
    contents = (b"", b"a", bytes(500), bytes(70_000), random.Random(0).randbytes(300), TEXT)
    for frame in (compress_frame(content) for content in contents):
        assert independent_decoder.decode_file(golden, frame) == container.parse(frame)
        for bit in range(8 * len(frame)):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            try:
                expected = container.parse(bytes(damaged))
            except CodecError:
                with pytest.raises((AssertionError, zstandard.ZstdError)):
                    independent_decoder.decode_file(golden, bytes(damaged))
            else:
                assert independent_decoder.decode_file(golden, bytes(damaged)) == expected
    long_content = bytes((8 << 20) + 5)
    assert independent_decoder.decode_file(golden, compress_frame(long_content)) == long_content
