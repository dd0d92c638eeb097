"""The `.bjc` file: blocks that decode by themselves, checksums for each and for the whole; or one zstd frame (`zstd_frame`).
`docs/codec.md` is the specification.

Nothing is allocated on a header's word: every size is checked against the file that is really there, or against a bound
of the format, first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence

from bytejepa.codec import zstd_frame
from bytejepa.errors import CodecError

MAGIC = b"\x89BJC"
FORMAT_VERSION = 3
"""The newest; a file says the oldest that has its kind and its length of blocks."""
KIND_BLOCKS, KIND_MIXED = 1, 2
MAX_BLOCK_BYTES = {(1, KIND_BLOCKS): 1 << 20, (2, KIND_MIXED): 1 << 20, (3, KIND_MIXED): 1 << 24}
"""Of every version and the kind that it brought."""
MAX_MIXED_BLOCK_BYTES = MAX_BLOCK_BYTES[FORMAT_VERSION, KIND_MIXED]
MAX_UNMIXED_BLOCK_BYTES = MAX_BLOCK_BYTES[1, KIND_BLOCKS]
PRELUDE = struct.Struct("<4sBB")
"""Magic, format version, kind."""
HEADER = struct.Struct("<QIII32s16s")
"""Content bytes, block bytes, window, hop, SHA-256 of the model, digest of the content."""
SEGMENT = struct.Struct("<I")
"""Follows the header of mixed blocks: least bytes of a segment."""
ENTRY = struct.Struct("<III")
"""One block: bytes of its payload (top bit: zstd), CRC-32 of the payload, CRC-32 of the content."""
CHECKSUM_BYTES, DIGEST_BYTES = 8, 16
LEAST_HOPS = 16
"""A window moves by at least this part of it: what is run again for each byte, and so the time of a block, has a bound."""
_ZSTD_BLOCK = 1 << 31
_DAMAGED = "the file is damaged, copy it again"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One block as stored."""

    payload: bytes
    is_zstd: bool
    num_bytes: int
    """Of its content."""
    content_crc: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """A file of blocks, its header checked."""

    content_bytes: int
    block_bytes: int
    window: int
    hop: int
    segment_bytes: int | None
    """Least length of a segment of blocks that are coded bit by bit under a mixture (`mixed`); None: under the model alone."""
    model_sha256: bytes
    content_digest: bytes
    blocks: tuple[Block | None, ...]
    """None: a block whose payload is damaged or missing."""
    length_problem: str | None
    """What is wrong with the length of the file, if anything."""

    def begin(self, index: int) -> int:
        """Return where the content of a block begins."""
        return index * self.block_bytes

    def num_bytes(self, index: int) -> int:
        """Return the length of the content of a block."""
        return min(self.block_bytes, self.content_bytes - self.begin(index))


def digest(pieces: Iterable[bytes]) -> bytes:
    """Return the 16-byte BLAKE2b digest of the content, which `pieces` are in order."""
    running = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in pieces:
        running.update(piece)
    return running.digest()


def least_hop(window: int) -> int:
    """Return the least hop, in ids, of a window."""
    return max(1, -(-window // LEAST_HOPS))


def blocks_file(
    content: bytes,
    blocks: Sequence[Block],
    *,
    block_bytes: int,
    window: int,
    hop: int,
    model: bytes,
    segment_bytes: int | None = None,
) -> bytes:
    """Return a file of `blocks`, which are `content` in order: mixed ones if there is a least length of segments."""
    kind = KIND_BLOCKS if segment_bytes is None else KIND_MIXED
    version = min(v for (v, k), longest in MAX_BLOCK_BYTES.items() if k == kind and block_bytes <= longest)
    header = PRELUDE.pack(MAGIC, version, kind)
    header += HEADER.pack(len(content), block_bytes, window, hop, model, digest([content]))
    header += b"" if segment_bytes is None else SEGMENT.pack(segment_bytes)
    for index, block in enumerate(blocks):
        flag = _ZSTD_BLOCK if block.is_zstd else 0
        header += ENTRY.pack(len(block.payload) | flag, _payload_crc(block.payload, index), block.content_crc)
    return b"".join((header, _checksum(header), *(block.payload for block in blocks)))


def make_block(content: bytes, payload: bytes, *, is_zstd: bool) -> Block:
    """Return a block as stored."""
    return Block(payload=payload, is_zstd=is_zstd, num_bytes=len(content), content_crc=zlib.crc32(content))


def parse(data: bytes) -> bytes | Blocks:
    """Return the content of a file that is one zstd frame, or the checked header and the blocks of another.

    Raises: CodecError for a foreign file, a newer version, a damaged header or frame; damaged blocks are None in the result.
    """
    if data.startswith(zstd_frame.MAGIC):
        return zstd_frame.read_frame(data)
    start = data[: len(MAGIC)]
    if not start or not any(magic.startswith(start) for magic in (MAGIC, zstd_frame.MAGIC)):
        raise CodecError(
            "this is not a file that bytejepa compressed",
            hint="it is empty" if not start else f"it begins with {start!r}",
        )
    if len(data) < PRELUDE.size + CHECKSUM_BYTES:
        raise CodecError(f"the file is cut short after {len(data)} bytes", hint="copy it again")
    _, version, kind = PRELUDE.unpack_from(data)
    if not 1 <= version <= FORMAT_VERSION:
        raise CodecError(
            f"the file has version {version} of the format, this is version {FORMAT_VERSION}",
            hint="upgrade bytejepa; if that does not help, the file is damaged",
        )
    if (version, kind) not in MAX_BLOCK_BYTES:
        raise CodecError(f"the file is of an unknown kind {kind}", hint=_DAMAGED)
    return _parse_blocks(data, MAX_BLOCK_BYTES[version, kind], is_mixed=kind == KIND_MIXED)


def _parse_blocks(data: bytes, longest_block: int, *, is_mixed: bool) -> Blocks:
    place = PRELUDE.size + HEADER.size + (SEGMENT.size if is_mixed else 0)
    if len(data) < place + CHECKSUM_BYTES:
        raise CodecError(f"the file is cut short after {len(data)} bytes, within its header", hint="copy it again")
    content_bytes, block_bytes, window, hop, model, content_digest = HEADER.unpack_from(data, PRELUDE.size)
    if not 1 <= block_bytes <= longest_block:
        raise CodecError(f"the header claims blocks of {block_bytes} bytes", hint=_DAMAGED)
    if not least_hop(window) <= hop <= window:
        raise CodecError(f"the header claims a window of {window} ids and a hop of {hop}", hint=_DAMAGED)
    segment_bytes = SEGMENT.unpack_from(data, place - SEGMENT.size)[0] if is_mixed else None
    if segment_bytes == 0:
        raise CodecError("the header claims segments of 0 bytes", hint=_DAMAGED)
    num_blocks = -(-content_bytes // block_bytes)
    end = place + num_blocks * ENTRY.size
    if end + CHECKSUM_BYTES > len(data):  # before anything is made of that size
        raise CodecError(
            f"the header claims {num_blocks} blocks, the file has {len(data)} bytes",
            hint="cut short, or damaged: copy it again",
        )
    if data[end : end + CHECKSUM_BYTES] != _checksum(data[:end]):
        raise CodecError("the header's checksum differs", hint=_DAMAGED)
    entries = [ENTRY.unpack_from(data, place + index * ENTRY.size) for index in range(num_blocks)]
    blocks: list[Block | None] = []
    begin = end + CHECKSUM_BYTES
    for index, (flagged, payload_crc, content_crc) in enumerate(entries):
        payload = data[begin : begin + (flagged & ~_ZSTD_BLOCK)]
        begin += flagged & ~_ZSTD_BLOCK
        length = min(block_bytes, content_bytes - index * block_bytes)
        whole = begin <= len(data) and _payload_crc(payload, index) == payload_crc
        kept = Block(payload=payload, is_zstd=bool(flagged & _ZSTD_BLOCK), num_bytes=length, content_crc=content_crc)
        blocks.append(kept if whole else None)
    problem = None
    if begin != len(data):
        problem = f"the file has {len(data)} bytes, its header claims {begin}"
    return Blocks(
        content_bytes=content_bytes,
        block_bytes=block_bytes,
        window=window,
        hop=hop,
        segment_bytes=segment_bytes,
        model_sha256=model,
        content_digest=content_digest,
        blocks=tuple(blocks),
        length_problem=problem,
    )


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest()


def _payload_crc(payload: bytes, index: int) -> int:
    # the block's number goes in first: blocks that changed places do not pass
    return zlib.crc32(payload, zlib.crc32(index.to_bytes(8, "little")))
