"""The `.bjm` file: a model's configuration, tensors and metadata in one checked file, without pickle.

    prelude | header (JSON, zstd) | payload (the tensors' streams) | sha256 of everything before it

`docs/artifact.md` states the layout precisely. Every changed, missing or additional byte is noticed; a hostile header
is refused before anything is allocated for it. The same input gives the same bytes for given versions of the
compressors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import zstandard
from torch import Tensor

from bytejepa.artifact.packing import (
    DEFAULT_CODECS,
    ZSTD_LEVEL,
    StoredTensor,
    StreamRecord,
    TensorRecord,
    pack,
    restore,
    unpack,
    zstd_decompress,
)
from bytejepa.errors import ArtifactError, file_errors_as

MAGIC = b"\x89BJM\r\n\x1a\n"
"""PNG's trick: a high bit, both line ends and Ctrl-Z, so that a transfer as text shows at once."""
FORMAT_VERSION = 1
PRELUDE = struct.Struct("<8sIIIQ")
"""Magic, format version, header bytes compressed, header bytes as JSON, bytes of the whole file."""
CHECKSUM_BYTES = 32
MAX_HEADER_BYTES = 1 << 20
MAX_FILE_BYTES = (1 << 30) + (1 << 24)  # the most numbers as raw float32, and room for the header and codec overhead
MAX_DEPTH = 32

_RECORD_KEYS = frozenset(("name", "shape", "scheme", "codecs", "stream_bytes", "offset", "sha256"))
_HEADER_KEYS = frozenset(("format_version", "configuration", "metadata", "tensors"))
_DAMAGED = "the file is damaged, copy it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerInfo:
    """What a container weighs, in bytes."""

    path: Path | None
    """None for a container that was never a file."""
    file_bytes: int
    sha256: str
    """Of the whole file in hex, as `sha256sum` prints it."""
    header_bytes: int
    """Everything that is not payload: prelude, compressed header, checksum."""
    tensor_bytes: dict[str, int]
    """Compressed bytes of each tensor, codes and scales together."""


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
    """Return the container as bytes; `store_tensors` puts tensors into their storage schemes beforehand.

    `configuration` and `metadata` hold plain JSON values; tuples become lists, and keys are written in sorted order.

    Raises: ArtifactError for values that are not plain or not finite, tensors that cannot be stored, a huge header.
    """
    plain = {"configuration": dict(configuration), "metadata": dict(metadata)}
    header = {"format_version": FORMAT_VERSION} | {name: _plain(value, name) for name, value in plain.items()}
    packed = pack(tensors, codecs=codecs)
    header["tensors"] = [_record_to_json(record) for record in packed.records]
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(text) > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"the header would take {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed",
            hint="put less into the metadata",
        )
    compressed = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(text)
    file_bytes = PRELUDE.size + len(compressed) + len(packed.payload) + CHECKSUM_BYTES
    prelude = PRELUDE.pack(MAGIC, FORMAT_VERSION, len(compressed), len(text), file_bytes)
    body = b"".join((prelude, compressed, packed.payload))
    return body + hashlib.sha256(body).digest()


def container_from_bytes(data: bytes) -> Container:
    """Return the content of a container held in memory.

    Raises: ArtifactError that says what is wrong: foreign data, a newer version, a length that differs, damage.
    """
    return _read(data, path=None)


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

    Raises: ArtifactError if `path` exists and `force` is off, if it cannot be written, and as `container_to_bytes`.
    """
    path = Path(path)
    with file_errors_as(ArtifactError, "write", path):
        _refuse_existing(path, force=force)  # before seconds of compression
    data = container_to_bytes(configuration=configuration, tensors=tensors, metadata=metadata, codecs=codecs)
    with file_errors_as(ArtifactError, "write", path):
        _write_atomically(path, data, force=force)
    return _info(data, _table(data, str(path))[1], path)


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


def _read(data: bytes, path: Path | None) -> Container:
    where = str(path) if path else "the artifact"
    header, records, payload = _table(data, where)
    try:
        stored = unpack(records, payload)
    except ArtifactError as problem:
        raise ArtifactError(f"{where}: {problem.message}", hint=problem.hint) from problem
    info = _info(data, records, path)
    return Container(
        configuration=header["configuration"],
        tensors={name: restore(tensor) for name, tensor in stored.items()},
        stored=stored,
        metadata=header["metadata"],
        sha256=info.sha256,
        info=info,
    )


def _info(data: bytes, records: Sequence[TensorRecord], path: Path | None) -> ContainerInfo:
    return ContainerInfo(
        path=path,
        file_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        header_bytes=len(data) - sum(record.num_bytes for record in records),
        tensor_bytes={record.name: record.num_bytes for record in records},
    )


def _check_prelude(prelude: bytes, file_bytes: int, where: str) -> tuple[int, int]:
    """Return the header's bytes, compressed and as JSON, or raise for what length and prelude alone betray."""
    start = prelude[: len(MAGIC)]
    if not start or not MAGIC.startswith(start):
        raise ArtifactError(f"{where} is not a bytejepa artifact", hint="the file is empty" if not start else None)
    if len(prelude) < PRELUDE.size:
        raise ArtifactError(f"{where} is cut short after {file_bytes} bytes", hint="copy it again")
    _, version, header_bytes, json_bytes, declared_bytes = PRELUDE.unpack(prelude)
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{where} was written by a newer version {version} of the format; version {FORMAT_VERSION} is known here",
            hint="upgrade bytejepa; if that does not help, the file is damaged",
        )
    if version != FORMAT_VERSION:
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


def _table(data: bytes, where: str) -> tuple[dict[str, Any], tuple[TensorRecord, ...], memoryview]:
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
        header = _parse(text)
        records = tuple(_record_from_json(entry) for entry in header["tensors"])
    except ArtifactError as problem:
        raise ArtifactError(
            f"{where}: bad header: {problem.message}", hint="the file was not written by bytejepa"
        ) from problem
    return header, records, body[payload_start:]


def _parse(text: bytes) -> dict[str, Any]:
    """Return the header's JSON object, or raise for anything but plain finite JSON of the expected outline."""
    try:
        header = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:  # ValueError covers UTF-8, JSON and digits without end
        raise ArtifactError(f"not JSON: {str(problem)[:80]}") from problem
    if not isinstance(header, dict) or set(header) != _HEADER_KEYS:
        raise ArtifactError(f"expected an object of {', '.join(sorted(_HEADER_KEYS))}")
    _plain(header, "header")
    if type(header["format_version"]) is not int or header["format_version"] != FORMAT_VERSION:
        raise ArtifactError("the format version differs from the prelude's")
    for key, kind in (("configuration", dict), ("metadata", dict), ("tensors", list)):
        if not isinstance(header[key], kind):
            raise ArtifactError(f"{key} must be a {kind.__name__}, got {type(header[key]).__name__}")
    return header


def _refuse_constant(constant: str) -> NoReturn:
    raise ArtifactError(f"{constant} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ArtifactError("a key appears twice in one object")
    return result


def _plain(value: object, where: str, depth: int = 0) -> Any:
    """Return `value` with tuples as lists, or raise if it is not plain, finite JSON of at most MAX_DEPTH levels."""
    if depth > MAX_DEPTH:
        raise ArtifactError(f"{where[:80]} is nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ArtifactError(f"{where[:80]} is {value}, which JSON cannot hold")
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    raise ArtifactError(
        f"{where[:80]} holds a {type(value).__name__}",
        hint="only dict with text keys, list, str, int, float, bool and None",
    )


def _record_to_json(record: TensorRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "shape": list(record.shape),
        "scheme": record.scheme,
        "codecs": [stream.codec for stream in record.streams],
        "stream_bytes": [stream.num_bytes for stream in record.streams],
        "offset": record.offset,
        "sha256": record.sha256,
    }


def _record_from_json(entry: object) -> TensorRecord:
    """Return one entry of the tensor table with every type checked; `check_records` judges the values."""
    if not isinstance(entry, dict) or set(entry) != _RECORD_KEYS:
        raise ArtifactError(f"a tensor needs exactly {', '.join(sorted(_RECORD_KEYS))}")
    texts_right = all(isinstance(entry[key], str) for key in ("name", "scheme", "sha256"))
    lists_right = all(isinstance(entry[key], list) for key in ("shape", "codecs", "stream_bytes"))
    if not (texts_right and lists_right and all(isinstance(codec, str) for codec in entry["codecs"])):
        raise ArtifactError(f"tensor {str(entry['name'])[:60]!r}: a value has the wrong type")
    numbers = [*entry["shape"], *entry["stream_bytes"], entry["offset"]]
    if any(type(number) is not int or not 0 <= number <= MAX_FILE_BYTES for number in numbers):
        raise ArtifactError(f"tensor {entry['name'][:60]!r}: shape, bytes and offset must be whole numbers in range")
    if len(entry["codecs"]) != len(entry["stream_bytes"]):
        raise ArtifactError(f"tensor {entry['name'][:60]!r}: as many codecs as streams are needed")
    return TensorRecord(
        name=entry["name"],
        shape=tuple(entry["shape"]),
        scheme=entry["scheme"],
        offset=entry["offset"],
        streams=tuple(
            StreamRecord(codec=codec, num_bytes=num_bytes)
            for codec, num_bytes in zip(entry["codecs"], entry["stream_bytes"], strict=True)
        ),
        sha256=entry["sha256"],
    )


def _refuse_existing(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise ArtifactError(f"cannot write {path}: it is a folder", hint="name a file")
    if path.exists() and not force:
        raise ArtifactError(f"{path} exists already", hint="choose another name, or force overwriting it")


def _write_atomically(path: Path, data: bytes, *, force: bool) -> None:
    """Put `data` at `path` by way of a temporary file beside it; on any failure what existed is as it was."""
    temporary = path.parent / f".bytejepa-{secrets.token_hex(8)}.partial"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _refuse_existing(path, force=force)  # somebody may have written it during the compression
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system lets a folder be synchronised
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
