"""A script under review may be made to fill the memory of who reviews it; what is computed of it has bounds."""

from __future__ import annotations

import ast
import bz2
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import brotli
import pytest
import zstandard

from bytejepa.review.calls import Calls
from bytejepa.review.operations import compute
from bytejepa.review.values import UNKNOWN, constant
from bytejepa.review.wrappers import DECODERS, MAX_UNPACKED_BYTES, Closed


@pytest.mark.parametrize(
    ("name", "compress"),
    [("zstandard", zstandard.ZstdCompressor().compress), ("brotli", lambda data: brotli.compress(data, quality=1))],
)
def test_no_more_is_unpacked_than_a_submission_can_be(name: str, compress: Callable[[bytes], bytes]) -> None:
    decode = DECODERS[f"{name}.decompress"]
    assert decode(compress(b"print()")) == b"print()"
    packed = compress(bytes(8 * MAX_UNPACKED_BYTES))
    tracemalloc.start()
    unpacked = decode(packed)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert unpacked == bytes(MAX_UNPACKED_BYTES)
    assert peak_bytes < 6 * MAX_UNPACKED_BYTES


@pytest.mark.parametrize(
    ("codec", "compress"), [("zip", zlib.compress), ("zlib_codec", zlib.compress), ("bz2", bz2.compress)]
)
def test_no_more_is_unpacked_by_a_codec_either(codec: str, compress: Callable[[bytes], bytes]) -> None:
    decode = DECODERS["codecs.decode"]
    assert decode(compress(b"print()"), codec) == b"print()"
    assert decode("cevag()", "rot13") == "print()"
    assert len(decode(compress(bytes(2 * MAX_UNPACKED_BYTES)), codec)) == MAX_UNPACKED_BYTES


def test_brotli_data_that_end_too_early_stay_closed() -> None:
    packed = brotli.compress(bytes(range(256)) * 9)
    with pytest.raises(Closed, match="ends too early"):
        DECODERS["brotli.decompress"](packed[:-3])


@pytest.mark.parametrize(
    ("operation", "left", "right", "expected"),
    [
        (ast.Pow, 10, 64, 10**64),
        (ast.Pow, 10**2000, 64, UNKNOWN),
        (ast.Mult, 1 << 5000, 1 << 5000, UNKNOWN),
        (ast.Mod, "fineweb_%s_%06d.bin", ("val", 7), "fineweb_val_000007.bin"),
        (ast.Mod, "%999999999d", 1, UNKNOWN),
        (ast.Mod, "%*d", (999_999_999, 1), UNKNOWN),
    ],
)
def test_operators_give_no_huge_constants(operation: type[ast.AST], left: Any, right: Any, expected: Any) -> None:
    assert compute(operation, left, right) == expected


@pytest.mark.parametrize(
    ("form", "arguments", "expected"),
    [
        ("{}_{:06d}.bin", ("val", 7), "val_000007.bin"),
        ("{:>999999999}", (1,), UNKNOWN),
        ("{:{}}", (1, 999_999_999), UNKNOWN),
    ],
)
def test_formats_give_no_huge_constants(form: str, arguments: tuple[Any, ...], expected: Any) -> None:
    assert Calls._text(constant(form), "format", [constant(argument) for argument in arguments]).constant == expected
