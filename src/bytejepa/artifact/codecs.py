"""Byte compressors: each turns bytes into one self-contained stream and back, and refuses any other size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from bytejepa.errors import ArtifactError

ZSTD_LEVEL = 22
ZSTD_WINDOW_BYTES = 8 << 20  # what RFC 8878 asks every decoder to support; larger only for a larger content
BROTLI_QUALITY = 11
BROTLI_WINDOW_BITS = 24  # 16 MiB, the largest of the standard format
SHORT_BYTES = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamRecord:
    """One compressed stream: the codec that made it and its length."""

    codec: str
    num_bytes: int


def byte_planes(scalars: npt.NDArray[Any]) -> bytes:
    """Return the scalars' first bytes, then their second ones, and so on: bytes alike lie together, and compress better."""
    return scalars.reshape(-1).view(np.uint8).reshape(-1, scalars.itemsize).T.tobytes()


def from_byte_planes(data: bytes, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the flat array of `dtype` whose byte planes are `data`."""
    return np.frombuffer(data, dtype=np.uint8).reshape(dtype.itemsize, -1).T.copy().view(dtype).reshape(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Codec:
    """A compressor of byte strings; `decompress` gives None unless the data are one stream of exactly `num_bytes`."""

    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes, int], bytes | None]


def _raw_decompress(data: bytes, num_bytes: int) -> bytes | None:
    return data if len(data) == num_bytes else None


def _zstd_compress(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(raw)


def zstd_probe_bytes(raw: bytes) -> int:
    """Return about how large zstd would make `raw`, at its default level and a hundredth of the time."""
    return len(zstandard.ZstdCompressor().compress(raw))


def zstd_decompress(data: bytes, num_bytes: int) -> bytes | None:
    """Return the content of one zstd frame that declares exactly `num_bytes` bytes, else None; never allocates more."""
    try:
        frame_header = zstandard.get_frame_parameters(data)
        too_wide = frame_header.window_size > max(num_bytes, ZSTD_WINDOW_BYTES)
        if frame_header.content_size != num_bytes or too_wide:
            return None
        decompressor = zstandard.ZstdDecompressor()
        if num_bytes == 0:  # decompress() returns early on an empty frame, without looking at what follows it
            frame = decompressor.decompressobj()
            content = frame.decompress(data)
            return content if frame.eof and not content and not frame.unused_data else None
        return decompressor.decompress(data, max_output_size=num_bytes, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


def _brotli_compress(raw: bytes) -> bytes:
    import brotli  # here, so that a submission's script that packs with zstd alone does without it

    return brotli.compress(raw, quality=BROTLI_QUALITY, lgwin=BROTLI_WINDOW_BITS)


def _brotli_decompress(data: bytes, num_bytes: int) -> bytes | None:
    """Return one brotli stream's content; its format states no size, so decode in pieces and stop once past it."""
    import brotli

    decompressor = brotli.Decompressor()
    content = bytearray()
    feed = data
    try:
        while not decompressor.is_finished():
            piece = decompressor.process(feed, output_buffer_limit=num_bytes - len(content) + 1)
            content += piece
            starved = not piece and not decompressor.is_finished()
            if len(content) > num_bytes or starved:
                return None
            feed = b""
    except brotli.error:
        return None
    return bytes(content) if len(content) == num_bytes else None


CODECS: dict[str, _Codec] = {
    "raw": _Codec(compress=bytes, decompress=_raw_decompress),
    "zstd": _Codec(compress=_zstd_compress, decompress=zstd_decompress),
    "brotli": _Codec(compress=_brotli_compress, decompress=_brotli_decompress),
}


def smallest(raw: bytes, codecs: Sequence[str]) -> tuple[str, bytes]:
    """Return (codec, stream) of the smallest stream that `codecs` make of `raw`; among equals the first.

    Results for short streams are remembered: a search for a size packs the same vectors again and again.
    """
    return (_smallest_of_short if len(raw) <= SHORT_BYTES else _smallest)(raw, tuple(codecs))


def _smallest(raw: bytes, codecs: tuple[str, ...]) -> tuple[str, bytes]:
    candidates = [(codec, CODECS[codec].compress(raw)) for codec in codecs]
    return min(candidates, key=lambda candidate: len(candidate[1]))  # min keeps the first of equals


_smallest_of_short = functools.lru_cache(maxsize=1024)(_smallest)


def require_codec(codec: str, where: str, *, known: Sequence[str] = tuple(CODECS)) -> None:
    """Refuse a codec that is not among `known`. Raises: ArtifactError."""
    if codec not in known:
        raise ArtifactError(f"{where}: unknown codec {codec[:60]!r}", hint=f"one of {', '.join(known)}")
