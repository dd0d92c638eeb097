"""The usual compressors at their strongest usual settings: what a model's bits per byte are held against."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable

import brotli
import zstandard

XZ = "xz -9e"

NUM_BYTES_OF: dict[str, Callable[[bytes], int]] = {
    "gzip -9": lambda data: len(gzip.compress(data, 9)),
    "bzip2 -9": lambda data: len(bz2.compress(data, 9)),
    XZ: lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    "zstd -19": lambda data: len(zstandard.ZstdCompressor(level=19, write_checksum=True).compress(data)),
    "brotli -11": lambda data: len(brotli.compress(data, quality=11, lgwin=24)),
}
"""By name, functions from data to the length of what the command makes of it, in bytes; PPMd too where pyppmd is installed."""

try:
    import pyppmd
except ImportError:
    pass
else:
    NUM_BYTES_OF["PPMd H -o6"] = lambda data: len(pyppmd.compress(data, max_order=6, mem_size=256 << 20))


def compressed_bytes(data: bytes) -> dict[str, int]:
    """Return the size of `data` under every compressor, in bytes."""
    return {name: num_bytes_of(data) for name, num_bytes_of in NUM_BYTES_OF.items()}
