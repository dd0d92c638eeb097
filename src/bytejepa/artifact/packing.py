"""Named tensors to compressed byte streams and back, each tensor in a storage scheme of its own.

Schemes: `int2_rows` ... `int8_rows` (a `QuantizedMatrix`: a stream of codes and one of scales), `float16` and `float32`
(one stream). A code takes a whole byte before the compressor: bit-packed codes hide their frequencies from a byte
compressor and come out about a fifth larger. Scalars wider than a byte are split into byte planes, lowest byte first,
so that sign and exponent bytes stand together. Every stream is compressed by the smallest of the allowed codecs and
names it. Codes whose codec is `rans` lie in one joint stream behind the tensors (`joint_codes`).

Source: spec section 5 (one value to a byte, zstd level 22); `docs/artifact.md` states the layout for other readers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytejepa.artifact.codecs import (
    CODECS,
    StreamRecord,
    byte_planes,
    from_byte_planes,
    require_codec,
    smallest,
    zstd_probe_bytes,
)
from bytejepa.artifact.joint_codes import (
    JointRecord,
    RowTables,
    bits_of_matrices,
    check_joint,
    decode_joint,
    encode_joint,
    tables_of_matrices,
)
from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import QuantizedMatrix, dequantize, to_float16

StoredTensor = QuantizedMatrix | Tensor
"""A tensor as it is stored: int rows, or a float16 or float32 tensor."""

MAX_ELEMENTS = 1 << 28
"""Most numbers, scales included, in one artifact: 1 GiB as float32, many times what 16 MB can usefully hold."""
MAX_DIMENSIONS = 8
MAX_NAME_CHARACTERS = 200
ROW_SCHEMES = {f"int{bits}_rows": bits for bits in range(2, 9)}
FLOAT_SCHEMES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
SCHEMES = (*ROW_SCHEMES, *FLOAT_SCHEMES)
DEFAULT_CODECS = ("zstd", "raw")
JOINT_CODEC = "rans"
"""Codec of codes that lie in the joint stream; only for codes, and their own stream is then empty."""
PROBE_MARGIN = 1.02
"""How far above the joint stream a quick probe may stay for a matrix to be tried with every codec."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """Where one tensor lies in the payload and how to read it."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    """One of `SCHEMES`."""
    offset: int
    """Of the tensor's first byte in the payload."""
    streams: tuple[StreamRecord, ...]
    """Codes, then scales, for rows; one stream otherwise. They follow each other without a gap."""
    sha256: str
    """Of the tensor's compressed bytes, in hex."""

    @property
    def num_bytes(self) -> int:
        """Compressed bytes of all the tensor's streams."""
        return sum(stream.num_bytes for stream in self.streams)

    @property
    def is_joint(self) -> bool:
        """Whether its codes lie in the joint stream."""
        return self.scheme in ROW_SCHEMES and self.streams[:1] == (StreamRecord(codec=JOINT_CODEC, num_bytes=0),)

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor, without scales."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTensors:
    """A table of tensors and the bytes it describes."""

    records: tuple[TensorRecord, ...]
    payload: bytes
    joint: JointRecord | None = None
    """The joint stream of the tensors whose codes are coded by `rans`; behind all the others."""


def store_float16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor in float16 on the CPU, in memory of its own.

    Raises: ArtifactError naming the tensor with a value that is not finite or above what float16 holds.
    """
    stored = {}
    for name, tensor in tensors.items():
        try:
            stored[name] = to_float16(tensor.detach().cpu()).clone()
        except ArtifactError as problem:
            raise ArtifactError(f"tensor {name!r}: {problem.message}", hint=problem.hint) from problem
    return stored


def restore(stored: StoredTensor) -> Tensor:
    """Return the float32 tensor that `stored` stands for; a float32 tensor is returned itself, not a copy."""
    return dequantize(stored) if isinstance(stored, QuantizedMatrix) else stored.float()


def pack(
    tensors: Mapping[str, StoredTensor],
    *,
    codecs: Sequence[str] = DEFAULT_CODECS,
) -> PackedTensors:
    """Return the table and the compressed bytes of `tensors`, in their order; each stream by its smallest codec.

    With `rans` among the codecs every matrix whose codes take least room there goes into the joint stream. Among equally
    small codecs the first wins. The same input gives the same bytes, for given versions of the compressors.

    Raises: ArtifactError for an unknown codec or a tensor that cannot be stored.
    """
    for codec in codecs:
        require_codec(codec, "pack", known=(*CODECS, JOINT_CODEC))
    byte_codecs = tuple(codec for codec in codecs if codec != JOINT_CODEC)
    if not byte_codecs:
        raise ArtifactError(
            "no codec is allowed that takes any bytes", hint=f"name at least one of {', '.join(CODECS)}"
        )
    raw = {name: _raw_streams(name, stored) for name, stored in tensors.items()}
    codes = {name: _codes(stored) for name, stored in tensors.items() if isinstance(stored, QuantizedMatrix)}
    compressed_codes, tables = _compress_codes(codes, codecs)
    compressed = {
        name: [
            compressed_codes[name] if name in codes and position == 0 else smallest(stream, byte_codecs)
            for position, stream in enumerate(streams)
        ]
        for name, (_, _, streams) in raw.items()
    }
    records: list[TensorRecord] = []
    pieces: list[bytes] = []
    offset = 0
    for name, (shape, scheme, _) in raw.items():
        data = b"".join(stream for _, stream in compressed[name])
        record = TensorRecord(
            name=name,
            shape=shape,
            scheme=scheme,
            offset=offset,
            streams=tuple(StreamRecord(codec=codec, num_bytes=len(stream)) for codec, stream in compressed[name]),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        records.append(record)
        pieces.append(data)
        offset += len(data)
    joint = None
    if tables is not None:
        matrices = [codes[name] for name, (codec, _) in compressed_codes.items() if codec == JOINT_CODEC]
        joint, data = encode_joint(matrices, tables, byte_codecs, offset=offset)
        pieces.append(data)
        offset += len(data)
    check_records(records, offset, joint)
    return PackedTensors(records=tuple(records), payload=b"".join(pieces), joint=joint)


def _compress_codes(
    codes: Mapping[str, npt.NDArray[np.int8]], codecs: Sequence[str]
) -> tuple[dict[str, tuple[str, bytes]], RowTables | None]:
    """Return (codec, stream) of each matrix, and the tables of the joint stream if there is one; the stream of a matrix
    that the joint one takes least room for is empty.

    Where a quick probe finds nothing that repeats, the slow compressors are not asked: they lose to the joint stream.
    """
    byte_codecs = [codec for codec in codecs if codec != JOINT_CODEC]
    if JOINT_CODEC not in codecs or not codes:
        return {name: smallest(matrix.tobytes(), byte_codecs) for name, matrix in codes.items()}, None
    tables = tables_of_matrices(list(codes.values()))
    result = {}
    for (name, matrix), bits in zip(codes.items(), bits_of_matrices(list(codes.values()), tables), strict=True):
        raw = matrix.tobytes()
        result[name] = (JOINT_CODEC, b"")
        if 8 * zstd_probe_bytes(raw) < PROBE_MARGIN * bits:
            alone = smallest(raw, byte_codecs)
            if 8 * len(alone[1]) <= bits:
                result[name] = alone
    joint = [codes[name] for name, (codec, _) in result.items() if codec == JOINT_CODEC]
    if len(joint) < len(codes):
        return result, tables_of_matrices(joint) if joint else None
    return result, tables


def _codes(stored: QuantizedMatrix) -> npt.NDArray[np.int8]:
    return stored.codes.cpu().contiguous().numpy()


def unpack(
    records: Sequence[TensorRecord], payload: bytes | memoryview, joint: JointRecord | None = None
) -> dict[str, StoredTensor]:
    """Return the stored tensors of a table, on the CPU, in its order; `restore` turns them into weights.

    Decoding allocates what the table declares and no more, and the table is checked first.

    Raises: ArtifactError naming the tensor that is inconsistent, damaged or does not decode to its declared size.
    """
    check_records(records, len(payload), joint)
    codes: dict[str, npt.NDArray[np.int8]] = {}
    if joint is not None:
        joint_records = [record for record in records if record.is_joint]
        matrices = decode_joint(joint, [r.shape for r in joint_records], payload[joint.offset :])
        codes = {record.name: matrix for record, matrix in zip(joint_records, matrices, strict=True)}
    return {
        record.name: _decode(record, payload[record.offset :][: record.num_bytes], codes.get(record.name))
        for record in records
    }


def check_records(records: Sequence[TensorRecord], payload_bytes: int, joint: JointRecord | None = None) -> None:
    """Refuse a table that cannot describe a payload of `payload_bytes` bytes, before anything is allocated for it.

    Raises: ArtifactError for names that are empty, too long or repeated, impossible shapes, unknown schemes or codecs,
    too many elements, and tensors that overlap, leave gaps or reach past the end.
    """
    seen: set[str] = set()
    end = elements = 0
    for record in records:
        if not 0 < len(record.name) <= MAX_NAME_CHARACTERS or record.name in seen:
            raise ArtifactError(
                f"tensor name {record.name[:60]!r} is empty, repeated or over {MAX_NAME_CHARACTERS} letters"
            )
        seen.add(record.name)
        for size in _stream_sizes(record):
            elements += size // (1 if record.scheme in ROW_SCHEMES else FLOAT_SCHEMES[record.scheme].itemsize)
        if elements > MAX_ELEMENTS:
            raise ArtifactError(
                f"tensor {record.name!r} of shape {record.shape}: more than {MAX_ELEMENTS} numbers in one artifact"
            )
        for position, stream in enumerate(record.streams):
            if not (record.is_joint and position == 0):
                require_codec(stream.codec, f"tensor {record.name!r}")
            if stream.num_bytes < 0:
                raise ArtifactError(f"tensor {record.name!r}: a stream of {stream.num_bytes} bytes")
        if record.offset != end:
            raise ArtifactError(f"tensor {record.name!r} must start at byte {end} of the payload, got {record.offset}")
        end += record.num_bytes
    if any(record.is_joint for record in records) != (joint is not None):
        raise ArtifactError("a joint stream of codes and tensors that use it must come together")
    if joint is not None:
        check_joint(joint)
        if joint.offset != end:
            raise ArtifactError(f"the joint codes must start at byte {end} of the payload, got {joint.offset}")
        end += joint.num_bytes
    if end != payload_bytes:
        raise ArtifactError(f"the tensors take {end} bytes, the payload has {payload_bytes}")


def _stream_sizes(record: TensorRecord) -> tuple[int, ...]:
    """Return the uncompressed bytes of each of the record's streams, after checking scheme and shape."""
    where = f"tensor {record.name!r}"
    if len(record.shape) > MAX_DIMENSIONS or any(not 0 <= size <= MAX_ELEMENTS for size in record.shape):
        raise ArtifactError(f"{where}: impossible shape {str(record.shape)[:60]}")
    if record.scheme in ROW_SCHEMES:
        if len(record.shape) != 2:
            raise ArtifactError(f"{where}: {record.scheme} needs two dimensions, got shape {record.shape}")
        sizes: tuple[int, ...] = (record.num_elements, 2 * record.shape[0])
    elif record.scheme in FLOAT_SCHEMES:
        sizes = (record.num_elements * FLOAT_SCHEMES[record.scheme].itemsize,)
    else:
        raise ArtifactError(
            f"{where}: unknown storage scheme {record.scheme[:60]!r}", hint=f"one of {', '.join(SCHEMES)}"
        )
    if len(record.streams) != len(sizes):
        raise ArtifactError(f"{where}: {record.scheme} has {len(sizes)} streams, got {len(record.streams)}")
    return sizes


def _raw_streams(name: str, stored: StoredTensor) -> tuple[tuple[int, ...], str, list[bytes]]:
    """Return shape, scheme and uncompressed streams of one stored tensor."""
    if isinstance(stored, QuantizedMatrix):
        codes = _codes(stored)
        return tuple(codes.shape), f"int{stored.bits}_rows", [codes.tobytes(), _planes(stored.scales, "float16")]
    schemes = {torch.float16: "float16", torch.float32: "float32"}
    if stored.dtype not in schemes:
        raise ArtifactError(
            f"tensor {name!r}: {stored.dtype} cannot be stored",
            hint="make it float16, float32 or a QuantizedMatrix first",
        )
    if not bool(torch.isfinite(stored).all()):
        raise ArtifactError(f"tensor {name!r} has values that are not finite", hint="do not export a diverged model")
    scheme = schemes[stored.dtype]
    return tuple(stored.shape), scheme, [_planes(stored, scheme)]


def _decode(record: TensorRecord, data: bytes | memoryview, joint_codes: npt.NDArray[np.int8] | None) -> StoredTensor:
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise ArtifactError(f"tensor {record.name!r}: checksum differs", hint="the file is damaged, copy it again")
    raw_streams: list[bytes] = []
    start = 0
    for stream, num_bytes in zip(record.streams, _stream_sizes(record), strict=True):
        if stream.codec == JOINT_CODEC:
            raw_streams.append(b"")
            continue
        raw = CODECS[stream.codec].decompress(bytes(data[start : start + stream.num_bytes]), num_bytes)
        if raw is None:
            raise ArtifactError(
                f"tensor {record.name!r}: its {stream.codec} stream does not decode to {num_bytes} bytes",
                hint="the file was not written by bytejepa",
            )
        raw_streams.append(raw)
        start += stream.num_bytes
    if record.scheme in FLOAT_SCHEMES:
        tensor = _from_planes(raw_streams[0], record.scheme).reshape(record.shape)
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"tensor {record.name!r} has values that are not finite")
        return tensor
    if joint_codes is None:
        joint_codes = np.frombuffer(raw_streams[0], dtype=np.int8).copy()
    codes = torch.from_numpy(joint_codes).reshape(record.shape)
    try:
        return QuantizedMatrix(
            codes=codes, scales=_from_planes(raw_streams[1], "float16"), bits=ROW_SCHEMES[record.scheme]
        )
    except ArtifactError as problem:
        raise ArtifactError(f"tensor {record.name!r}: {problem.message}", hint=problem.hint) from problem


def _planes(tensor: Tensor, scheme: str) -> bytes:
    """Return the little-endian scalars of `tensor` as byte planes, lowest byte first."""
    return byte_planes(tensor.detach().cpu().contiguous().numpy().astype(FLOAT_SCHEMES[scheme]))


def _from_planes(data: bytes, scheme: str) -> Tensor:
    """Return the flat tensor whose byte planes are `data`."""
    dtype = FLOAT_SCHEMES[scheme]
    return torch.from_numpy(from_byte_planes(data, dtype).astype(dtype.newbyteorder("=")))
