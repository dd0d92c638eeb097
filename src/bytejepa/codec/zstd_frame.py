"""The file that is one zstd frame and nothing else: what `zstd -19` writes, so that every zstd tool reads it (RFC 8878).

Nothing is allocated on the word of a frame's header: its blocks must be able to hold the content size that it states.
`docs/codec.md`, "File", is the specification.
"""

from __future__ import annotations

import zstandard

from bytejepa.artifact.codecs import ZSTD_WINDOW_BYTES, zstd_decompress
from bytejepa.errors import CodecError

MAGIC = b"\x28\xb5\x2f\xfd"
LEVEL = 19
CHECKSUM_BYTES = 4
MAX_BLOCK_BYTES = 128 << 10
_SINGLE_SEGMENT, _CHECKSUM = 1 << 5, 1 << 2
"""Flags of the frame header's descriptor."""
_RLE, _COMPRESSED, _RESERVED = 1, 2, 3
"""Types of blocks; type 0 is stored as it is."""
_DAMAGED = "the file is damaged, copy it again"


def compress_frame(content: bytes, *, checksum: bool = True) -> bytes:
    """Return the frame that `zstd -19` makes of a file: with its content size and, if told, a checksum of the content."""
    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=checksum).compress(content)


def read_frame(frame: bytes) -> bytes:
    """Return the content of a frame with such a header, whatever program made it.

    Raises: CodecError for any other header, for less or more than one frame, and for damage.
    """
    num_bytes, begin = _read_header(frame)
    most = _most_content_bytes(frame, begin)
    if num_bytes > most:
        raise CodecError(f"the zstd frame claims {num_bytes} bytes, its blocks hold {most} at most", hint=_DAMAGED)
    try:
        content = zstd_decompress(frame, num_bytes)
    except MemoryError as problem:
        raise CodecError(f"the content, {num_bytes} bytes, does not fit into the memory") from problem
    if content is None:
        raise CodecError("the zstd frame does not decode to what was compressed", hint=_DAMAGED)
    return content


def _read_header(frame: bytes) -> tuple[int, int]:
    """Return the content size that a frame states and where its blocks begin. Raises: CodecError."""
    try:
        header = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as problem:
        raise CodecError(f"the header of the zstd frame is damaged or cut short: {problem}", hint=_DAMAGED) from problem
    num_bytes, window, descriptor = header.content_size, header.window_size, frame[len(MAGIC)]
    size_code = (num_bytes >= 256) + (num_bytes >= 256 + (1 << 16)) + (num_bytes >= (1 << 32) - 1)
    single_segment = descriptor & _SINGLE_SEGMENT
    expected = size_code << 6 | single_segment | _CHECKSUM  # nothing else: no dictionary, no unused or reserved bit
    moving_window = window < num_bytes and window <= ZSTD_WINDOW_BYTES and window.bit_count() == 1
    if descriptor != expected or not (single_segment or moving_window):
        raise CodecError(
            f"the header of the zstd frame, {frame[:6].hex(' ')}, is not as bytejepa writes it: it needs content size and "
            "checksum, no dictionary, and the smallest form",
            hint="damaged; or made by another program: does `zstd -d` restore it?",
        )
    return num_bytes, len(MAGIC) + 1 + (0 if single_segment else 1) + (1, 2, 4, 8)[size_code]


def _most_content_bytes(frame: bytes, place: int) -> int:
    """Return how much the blocks from `place` on can hold. Raises: CodecError if the frame does not end with `frame`."""
    most, is_last = 0, False
    while not is_last:
        block_header = int.from_bytes(frame[place : place + 3], "little")
        is_last, kind, size = bool(block_header & 1), block_header >> 1 & 3, block_header >> 3
        place += 3 + (1 if kind == _RLE else size)
        if place + CHECKSUM_BYTES > len(frame):
            raise CodecError(f"the zstd frame is cut short after {len(frame)} bytes", hint=_DAMAGED)
        if kind == _RESERVED or size > MAX_BLOCK_BYTES:
            raise CodecError("a block of the zstd frame is damaged", hint=_DAMAGED)
        most += MAX_BLOCK_BYTES if kind == _COMPRESSED else size
    if place + CHECKSUM_BYTES < len(frame):
        more = len(frame) - place - CHECKSUM_BYTES
        raise CodecError(f"{more} bytes follow the zstd frame", hint="damaged, or not made by bytejepa")
    return most
