"""The `.bjm` file: a model's configuration, tensors and metadata in one checked file, without pickle.

    prelude | header (JSON, zstd) | payload (the tensors' streams, the joint codes) | sha256 of everything before it

`docs/artifact.md` states the layout precisely. Every changed, missing or additional byte is noticed; a hostile header
is refused before anything is allocated for it. The same input gives the same bytes for given versions of the
compressors.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zstandard
from torch import Tensor

from bytejepa.artifact.codecs import ZSTD_LEVEL, zstd_decompress
from bytejepa.artifact.header import (
    FORMAT_VERSION,
    JOINT_FORMAT_VERSION,
    MAX_FILE_BYTES,
    joint_from_json,
    joint_to_json,
    parse_header,
    plain_json,
    record_from_json,
    record_to_json,
)
from bytejepa.artifact.joint_codes import JointRecord
from bytejepa.artifact.packing import DEFAULT_CODECS, StoredTensor, TensorRecord, pack, restore, unpack
from bytejepa.errors import ArtifactError, ConfigError, file_errors_as
from bytejepa.files import atomic_file, require_writable
from bytejepa.model.quantization import QuantizedMatrix

MAGIC = b"\x89BJM\r\n\x1a\n"
"""PNG's trick: a high bit, both line ends and Ctrl-Z, so that a transfer as text shows at once."""
PRELUDE = struct.Struct("<8sIIIQ")
"""Magic, format version, header bytes compressed, header bytes as JSON, bytes of the whole file."""
CHECKSUM_BYTES = 32
MAX_HEADER_BYTES = 1 << 20
_DAMAGED = "the file is damaged, copy it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerInfo:
    """What a container weighs, in bytes."""

    path: Path
    file_bytes: int
    sha256: str
    """Of the whole file in hex, as `sha256sum` prints it."""
    header_bytes: int
    """Everything that is not payload: prelude, compressed header, checksum."""
    tensor_bytes: dict[str, int]
    """Compressed bytes of each tensor's own streams, codes (unless they are joint) and scales together."""
    joint_bytes: int
    """Bytes of the joint stream of codes; 0 if there is none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Container:
    """The content of a container."""

    configuration: dict[str, Any]
    tensors: dict[str, Tensor]
    """Float32, on the CPU, in the order they were written."""
    stored: dict[str, StoredTensor]
    """The same tensors as stored: codes and scales for whoever computes with integers. Float32 ones share memory."""
    metadata: dict[str, Any]
    sha256: str
    """Of the whole file, as in `info`."""
    info: ContainerInfo


def container_to_bytes(
    *,
    configuration: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, Any],
    codecs: Sequence[str] = DEFAULT_CODECS,
) -> bytes:
    """Return the container as bytes; `store_weights` puts a model's tensors into their storage schemes beforehand.

    `configuration` and `metadata` hold plain JSON values; tuples become lists, and keys are written in sorted order.

    Raises: ArtifactError for values that are not plain or not finite, tensors that cannot be stored, a huge header.
    """
    plain = {"configuration": dict(configuration), "metadata": dict(metadata)}
    header = {name: plain_json(value, name) for name, value in plain.items()}
    packed = pack(tensors, codecs=codecs)
    version = FORMAT_VERSION if packed.joint is None else JOINT_FORMAT_VERSION
    header |= {"format_version": version, "tensors": [record_to_json(record) for record in packed.records]}
    if packed.joint is not None:
        header["joint"] = joint_to_json(packed.joint)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(text) > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"the header would take {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed",
            hint="put less into the metadata",
        )
    compressed = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(text)
    file_bytes = PRELUDE.size + len(compressed) + len(packed.payload) + CHECKSUM_BYTES
    prelude = PRELUDE.pack(MAGIC, version, len(compressed), len(text), file_bytes)
    body = b"".join((prelude, compressed, packed.payload))
    return body + hashlib.sha256(body).digest()


def write_container(
    path: Path | str,
    *,
    configuration: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, Any],
    codecs: Sequence[str] = DEFAULT_CODECS,
    force: bool = False,
) -> ContainerInfo:
    """Return the sizes of the container written at `path`, which exists afterwards whole or not at all.

    Raises: ConfigError if `path` exists and `force` is off; ArtifactError if it cannot be written, and as
    `container_to_bytes`.
    """
    path = Path(path)
    with file_errors_as(ArtifactError, "write", path):
        refuse_existing(path, force=force)  # before seconds of compression
    data = container_to_bytes(configuration=configuration, tensors=tensors, metadata=metadata, codecs=codecs)
    with file_errors_as(ArtifactError, "write", path):
        _write_checked(path, data, tensors, force=force)
    return _info(data, _table(data, str(path)), path)


def read_container(path: Path | str) -> Container:
    """Return the content of the container at `path`.

    Raises: ArtifactError that says what is wrong: missing, foreign, a newer version, a length that differs, damage.
    """
    path = Path(path)
    with file_errors_as(ArtifactError, "read", path), path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        _check_prelude(file.read(PRELUDE.size), file_bytes, str(path))  # before a foreign file is read whole
        file.seek(0)
        data = file.read(file_bytes)
    return _read(data, path)


def _read(data: bytes, path: Path) -> Container:
    table = _table(data, str(path))
    try:
        stored = unpack(table.records, table.payload, table.joint)
    except ArtifactError as problem:
        raise ArtifactError(f"{path}: {problem.message}", hint=problem.hint) from problem
    info = _info(data, table, path)
    return Container(
        configuration=table.header["configuration"],
        tensors={name: restore(tensor) for name, tensor in stored.items()},
        stored=stored,
        metadata=table.header["metadata"],
        sha256=info.sha256,
        info=info,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Table:
    """What the header says, and the payload it says it about."""

    header: dict[str, Any]
    records: tuple[TensorRecord, ...]
    joint: JointRecord | None
    payload: memoryview


def _info(data: bytes, table: _Table, path: Path) -> ContainerInfo:
    return ContainerInfo(
        path=path,
        file_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        header_bytes=len(data) - len(table.payload),
        tensor_bytes={record.name: record.num_bytes for record in table.records},
        joint_bytes=table.joint.num_bytes if table.joint else 0,
    )


def _check_prelude(prelude: bytes, file_bytes: int, where: str) -> tuple[int, int]:
    """Return the header's bytes, compressed and as JSON, or raise for what length and prelude alone betray."""
    start = prelude[: len(MAGIC)]
    if not start or not MAGIC.startswith(start):
        raise ArtifactError(f"{where} is not a bytejepa artifact", hint="the file is empty" if not start else None)
    if len(prelude) < PRELUDE.size:
        raise ArtifactError(f"{where} is cut short after {file_bytes} bytes", hint="copy it again")
    _, version, header_bytes, json_bytes, declared_bytes = PRELUDE.unpack(prelude)
    if version > JOINT_FORMAT_VERSION:
        raise ArtifactError(
            f"{where} was written by a newer version {version} of the format; version {JOINT_FORMAT_VERSION} is known here",
            hint="upgrade bytejepa; if that does not help, the file is damaged",
        )
    if version < FORMAT_VERSION:
        raise ArtifactError(f"{where} claims the format version {version}, which never existed", hint=_DAMAGED)
    if declared_bytes > MAX_FILE_BYTES:
        raise ArtifactError(
            f"{where} claims {declared_bytes} bytes, at most {MAX_FILE_BYTES} are allowed", hint=_DAMAGED
        )
    if file_bytes < declared_bytes:
        raise ArtifactError(
            f"{where} is cut short: expected {declared_bytes} bytes, got {file_bytes}", hint="copy it again"
        )
    if file_bytes > declared_bytes:
        raise ArtifactError(
            f"{where} is too long: expected {declared_bytes} bytes, got {file_bytes}",
            hint="something was appended, copy it again",
        )
    if json_bytes > MAX_HEADER_BYTES or PRELUDE.size + header_bytes + CHECKSUM_BYTES > file_bytes:
        raise ArtifactError(f"{where} claims a header of {header_bytes} bytes, {json_bytes} as JSON", hint=_DAMAGED)
    return header_bytes, json_bytes


def _table(data: bytes, where: str) -> _Table:
    """Return header, tensor table and payload of a container whose checksum is right."""
    header_bytes, json_bytes = _check_prelude(data[: PRELUDE.size], len(data), where)
    view = memoryview(data)
    body = view[: len(data) - CHECKSUM_BYTES]
    if hashlib.sha256(body).digest() != view[len(body) :]:
        raise ArtifactError(f"{where}: checksum differs", hint=_DAMAGED)
    payload_start = PRELUDE.size + header_bytes
    text = zstd_decompress(bytes(view[PRELUDE.size : payload_start]), json_bytes)
    try:
        if text is None:
            raise ArtifactError(f"it does not decode to {json_bytes} bytes")
        header = parse_header(text, int.from_bytes(data[8:12], "little"))
        records = tuple(record_from_json(entry) for entry in header["tensors"])
        joint = joint_from_json(header["joint"]) if "joint" in header else None
    except ArtifactError as problem:
        raise ArtifactError(
            f"{where}: bad header: {problem.message}", hint="the file was not written by bytejepa"
        ) from problem
    return _Table(header=header, records=records, joint=joint, payload=body[payload_start:])


def _require_same(written: Mapping[str, StoredTensor], meant: Mapping[str, StoredTensor]) -> None:
    """Refuse a file that does not decode to what it was made of, bit for bit. Raises: ArtifactError."""
    for name, tensor in meant.items():
        again = written.get(name)
        pairs = [(again, tensor)]
        if isinstance(tensor, QuantizedMatrix) and isinstance(again, QuantizedMatrix):
            pairs = [(again.codes, tensor.codes), (again.scales, tensor.scales)]
        if not all(
            isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b.detach().cpu()) for a, b in pairs
        ):
            raise ArtifactError(
                f"tensor {name!r} does not come back from the file as it was", hint="the memory or the disk is faulty"
            )


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse a path that cannot be written, or that exists unless `force` is on.

    Raises: ConfigError for what exists, ArtifactError for what cannot be written.
    """
    with file_errors_as(ArtifactError, "write", path):
        require_writable(path)
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already", hint="choose another name, or overwrite it with --force")


def _write_checked(path: Path, data: bytes, tensors: Mapping[str, StoredTensor], *, force: bool) -> None:
    """Put `data` at `path`, once what the disk has of it decodes to `tensors`; on any failure what existed is as it was."""

    def check(written: Path) -> None:
        _require_same(read_container(written).stored, tensors)
        refuse_existing(path, force=force)  # somebody may have written it during the compression

    with atomic_file(path, check=check) as file:
        file.write(data)
