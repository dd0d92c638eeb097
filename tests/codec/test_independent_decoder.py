"""docs/codec.md suffices: a decoder that was written from it decodes what the package encodes, and finds the golden numbers."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import zstandard

from bytejepa.artifact.container import write_container
from bytejepa.artifact.store import store_weights
from bytejepa.codec import container
from bytejepa.codec.compress import compress
from bytejepa.codec.cpu import CpuCoder
from bytejepa.codec.integer_model import integer_model
from bytejepa.codec.zstd_frame import compress_frame
from bytejepa.config_json import to_dict
from bytejepa.errors import CodecError
from codec import independent_decoder
from codec.golden import TEXT, sha256
from codec.models import EVERY_CODE, GOLDEN, GOLDEN_MODEL, STRUCTURES, coded_blocks, golden_model, inputs
from small_models import small_model

EXPECTED = json.loads((GOLDEN / "codec.json").read_text())


@pytest.fixture(scope="module")
def golden() -> independent_decoder.Model:
    return independent_decoder.read_model(GOLDEN_MODEL)


def test_it_shares_no_code_with_the_package() -> None:
    source = Path(independent_decoder.__file__).read_text(encoding="utf-8")
    assert re.search(r"^\s*(from|import)\s+(bytejepa|codec|torch|numba)", source, flags=re.MULTILINE) is None


def test_it_decodes_the_golden_file_and_streams(golden: independent_decoder.Model) -> None:
    assert independent_decoder.decode_file(golden, (GOLDEN / "codec_file.bjc").read_bytes()) == TEXT
    for name, stream in EXPECTED["streams"].items():
        data = inputs()[name]
        assert independent_decoder.decode_block(golden, bytes.fromhex(stream), len(data), 64, 32) == data


def test_it_finds_the_golden_numbers(golden: independent_decoder.Model) -> None:
    assert golden.identity.hex() == EXPECTED["model_sha256"]
    ids = [1, *(byte + 4 for byte in TEXT[:63])]
    logits = np.stack([golden.logits(ids[: t + 1]) for t in range(64)])
    assert sha256(logits) == EXPECTED["logits_sha256"]
    for name in ("exp2", "tanh", "sigmoid"):
        assert sha256(getattr(independent_decoder, name.upper())) == EXPECTED["tables_sha256"][name]


@pytest.mark.parametrize("name", STRUCTURES)
def test_it_decodes_what_the_package_encodes_with_any_structure(name: str, tmp_path: Path) -> None:
    model = small_model(**{"artifact": EVERY_CODE, **STRUCTURES[name]})
    stored = store_weights(dict(model.named_parameters()), model.config)
    path = tmp_path / "model.bjm"
    write_container(path, configuration=to_dict(model.config), tensors=stored, metadata={}, codecs=("zstd", "brotli"))
    integers = integer_model(stored, model.config)
    blocks = coded_blocks(CpuCoder(integers, 24, 9), TEXT[:70], 41)
    blob = container.blocks_file(TEXT[:70], blocks, block_bytes=41, window=24, hop=9, model=integers.sha256)
    assert independent_decoder.decode_file(independent_decoder.read_model(path), blob) == TEXT[:70]


def test_it_decodes_every_kind_of_block(golden: independent_decoder.Model) -> None:
    mixed = compress(golden_model(), TEXT + inputs()["zlib of noise"][:160], block_bytes=150, window=64, hop=32)
    assert independent_decoder.decode_file(golden, mixed) == TEXT + inputs()["zlib of noise"][:160]
    assert independent_decoder.decode_file(golden, compress(golden_model(), bytes(500))) == bytes(500)


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
