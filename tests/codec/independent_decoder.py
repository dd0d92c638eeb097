"""A second decoder of `.bjc` files, written from docs/codec.md and docs/artifact.md alone: it imports nothing of bytejepa.

It shows that the pages suffice, and it checks the package's decoder with other code: the whole window is computed anew
for every byte, in NumPy's int64. Here are the files and the range coder; the forward pass is in independent_model.py, its
numbers in independent_numbers.py, mixing in independent_mixing.py. Artifacts of version 1 only. Names are those of the
page.
"""

import bisect
import hashlib
import itertools
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import zstandard

from codec.independent_mixing import Mixing, model_bits
from codec.independent_model import Model, frequencies
from codec.independent_numbers import Ints

SCALARS = {"float16": "<f2", "float32": "<f4"}


class RangeDecoder:
    def __init__(self, stream: bytes) -> None:
        self.code, self.width = int.from_bytes(stream[:6].ljust(6, b"\0"), "big"), 1 << 48
        self.rest = itertools.chain(stream[6:], itertools.repeat(0))

    def symbol(self, ends: Any) -> int:
        """The next one, where symbol i takes what is below `ends[i]` and not below `ends[i - 1]`."""
        r = self.width >> 24
        found = bisect.bisect_right(ends, min(self.code // r, 2**24 - 1))
        start = int(ends[found - 1]) if found else 0
        self.code, self.width = self.code - r * start, r * (int(ends[found]) - start)
        while self.width < 1 << 40:
            self.code, self.width = self.code << 8 | next(self.rest), self.width << 8
        return found


def prediction(model: Model, text: bytes | bytearray, window: int, hop: int) -> Ints:
    """The frequencies of the byte that follows `text`, a block or a segment so far."""
    begin = max(0, -((window - 1 - len(text)) // hop) * hop)
    return frequencies(model.logits([1, *(byte + 4 for byte in text)][begin:]))


def decode_block(model: Model, stream: bytes, length: int, window: int, hop: int) -> bytes:
    decoder, text = RangeDecoder(stream), bytearray()
    while len(text) < length:
        text.append(decoder.symbol(prediction(model, text, window, hop).cumsum()))
    return bytes(text)


def decode_mixed(model: Model, stream: bytes, length: int, window: int, hop: int, segment_bytes: int) -> bytes:
    decoder = RangeDecoder(stream)
    return Mixing(length, segment_bytes).code(
        lambda _, text: model_bits(prediction(model, text, window, hop)),
        lambda p: decoder.symbol((2**24 - 2**8 * p, 2**24)),
    )


def decode_frame(frame: bytes) -> bytes:
    descriptor = frame[4]
    code, single = descriptor >> 6, descriptor >> 5 & 1
    place = 6 - single
    size = int.from_bytes(frame[place : place + 2**code], "little") + (256 if code == 1 else 0)
    assert descriptor % 32 == 4
    assert code == (size >= 256) + (size >= 65_792) + (size >= 2**32 - 1)
    assert single or (frame[5] % 8 == 0 and 2 ** (10 + frame[5] // 8) <= min(2**23, size - 1))
    place, most, last = place + 2**code, 0, 0
    while not last:
        header = int.from_bytes(frame[place : place + 3], "little")
        last, kind, length = header & 1, header >> 1 & 3, header >> 3
        assert kind < 3
        assert length <= 2**17
        place += 3 + (1 if kind == 1 else length)
        assert place + 4 <= len(frame)
        most += 2**17 if kind == 2 else length
    assert place + 4 == len(frame)
    assert size <= most
    stream = zstandard.ZstdDecompressor().decompressobj()
    content = stream.decompress(frame)  # checks the checksum
    assert stream.eof
    assert len(content) == size
    return content


def decode_file(model: Model, blob: bytes) -> bytes:
    if blob[:4] == b"\x28\xb5\x2f\xfd":
        return decode_frame(blob)
    assert blob[:6] in (b"\x89BJC\x01\x01", b"\x89BJC\x02\x02", b"\x89BJC\x03\x02")
    is_mixed = blob[5] == 2
    content_bytes, block_bytes, window, hop, identity, digest = struct.unpack_from("<QIII32s16s", blob, 6)
    assert identity == model.identity
    assert block_bytes <= (2**24 if blob[4] == 3 else 2**20)
    entries = 78 if is_mixed else 74
    count = -(-content_bytes // block_bytes)
    end = entries + 12 * count
    assert blob[end : end + 8] == hashlib.blake2b(blob[:end], digest_size=8).digest()
    content, place = b"", end + 8
    for index in range(count):
        size, payload_crc, content_crc = struct.unpack_from("<III", blob, entries + 12 * index)
        payload = blob[place : place + size % 2**31]
        place += len(payload)
        assert zlib.crc32(index.to_bytes(8, "little") + payload) == payload_crc
        length = min(block_bytes, content_bytes - len(content))
        if size >> 31:
            block = zstandard.ZstdDecompressor().decompress(payload)
        elif is_mixed:
            segment_bytes = int.from_bytes(blob[74:78], "little")
            block = decode_mixed(model, payload, length, window, hop, segment_bytes)
        else:
            block = decode_block(model, payload, length, window, hop)
        assert len(block) == length
        assert zlib.crc32(block) == content_crc
        content += block
    assert place == len(blob)
    assert hashlib.blake2b(content, digest_size=16).digest() == digest
    return content


def read_model(path: Path) -> Model:
    data = path.read_bytes()
    magic, version, compressed, _, file_bytes = struct.unpack_from("<8sIIIQ", data)
    assert (magic, version, file_bytes) == (b"\x89BJM\r\n\x1a\n", 1, len(data))
    header = json.loads(zstandard.ZstdDecompressor().decompress(data[28 : 28 + compressed]))
    unpack = {
        "raw": bytes, "brotli": brotli.decompress, "zstd": lambda stream: zstandard.ZstdDecompressor().decompress(stream),
    }  # fmt: skip
    tensors: dict[str, Any] = {}
    for record in header["tensors"]:
        shape, scheme, place, streams = record["shape"], record["scheme"], 28 + compressed + record["offset"], []
        for codec, size in zip(record["codecs"], record["stream_bytes"], strict=True):
            streams.append(unpack[codec](data[place : place + size]))
            place += size
        if scheme in SCALARS:
            tensors[record["name"]] = _joined_planes(streams[0], SCALARS[scheme]).reshape(shape)
        else:
            codes = np.frombuffer(streams[0], np.int8).reshape(shape)
            tensors[record["name"]] = codes, _joined_planes(streams[1], "<f2")
    return Model(header["configuration"], tensors)


def _joined_planes(stream: bytes, scalar: str) -> Ints:
    size = np.dtype(scalar).itemsize
    return np.ascontiguousarray(np.frombuffer(stream, np.uint8).reshape(size, -1).T).view(scalar)[:, 0]
