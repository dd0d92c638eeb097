"""The header of a `.bjm` file: plain, finite JSON, checked key by key before anything is done with it."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from bytejepa.artifact.codecs import StreamRecord
from bytejepa.artifact.joint_codes import JointRecord
from bytejepa.artifact.packing import TensorRecord
from bytejepa.errors import ArtifactError

FORMAT_VERSION = 1
JOINT_FORMAT_VERSION = 2
"""Of files with a joint stream of codes; all others are written as version 1, which older programs read."""
MAX_FILE_BYTES = (1 << 30) + (1 << 24)  # the most numbers as raw float32, and room for the header and codec overhead
MAX_DEPTH = 32

_RECORD_KEYS = frozenset(("name", "shape", "scheme", "codecs", "stream_bytes", "offset", "sha256"))
_HEADER_KEYS = frozenset(("format_version", "configuration", "metadata", "tensors"))
_JOINT_KEYS = frozenset(
    ("lowest_code", "num_symbols", "num_tables", "lanes", "codecs", "stream_bytes", "offset", "sha256")
)


def parse_header(text: bytes, version: int) -> dict[str, Any]:
    """Return the header's JSON object, or raise for anything but plain finite JSON of the expected outline."""
    try:
        header = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:  # ValueError covers UTF-8, JSON and digits without end
        raise ArtifactError(f"not JSON: {str(problem)[:80]}") from problem
    keys = _HEADER_KEYS | ({"joint"} if version >= JOINT_FORMAT_VERSION else set())
    if not isinstance(header, dict) or set(header) != keys:
        raise ArtifactError(f"expected an object of {', '.join(sorted(keys))}")
    plain_json(header, "header")
    if type(header["format_version"]) is not int or header["format_version"] != version:
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


def plain_json(value: object, where: str, depth: int = 0) -> Any:
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
        return [plain_json(item, where, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain_json(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    raise ArtifactError(
        f"{where[:80]} holds a {type(value).__name__}",
        hint="only dict with text keys, list, str, int, float, bool and None",
    )


def record_to_json(record: TensorRecord) -> dict[str, Any]:
    """Return a tensor's entry in the table."""
    return {
        "name": record.name,
        "shape": list(record.shape),
        "scheme": record.scheme,
        "codecs": [stream.codec for stream in record.streams],
        "stream_bytes": [stream.num_bytes for stream in record.streams],
        "offset": record.offset,
        "sha256": record.sha256,
    }


def record_from_json(entry: object) -> TensorRecord:
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


def joint_to_json(record: JointRecord) -> dict[str, Any]:
    """Return the entry of the joint stream."""
    return {
        "lowest_code": record.lowest_code,
        "num_symbols": record.num_symbols,
        "num_tables": record.num_tables,
        "lanes": record.lanes,
        "codecs": [stream.codec for stream in record.streams],
        "stream_bytes": [stream.num_bytes for stream in record.streams],
        "offset": record.offset,
        "sha256": record.sha256,
    }


def joint_from_json(entry: object) -> JointRecord:
    """Return the record of the joint stream with every type checked; `check_joint` judges the values."""
    if not isinstance(entry, dict) or set(entry) != _JOINT_KEYS:
        raise ArtifactError(f"the joint codes need exactly {', '.join(sorted(_JOINT_KEYS))}")
    codecs, stream_bytes = entry["codecs"], entry["stream_bytes"]
    lists_right = isinstance(codecs, list) and isinstance(stream_bytes, list) and len(codecs) == len(stream_bytes)
    texts = [entry["sha256"], *(codecs if lists_right else [None])]
    numbers = [entry[key] for key in ("lowest_code", "num_symbols", "num_tables", "lanes", "offset")]
    numbers += stream_bytes if lists_right else []
    if not all(isinstance(text, str) for text in texts) or any(
        type(number) is not int or abs(number) > MAX_FILE_BYTES for number in numbers
    ):
        raise ArtifactError("the joint codes: a value has the wrong type or is out of range")
    return JointRecord(
        **{key: entry[key] for key in ("lowest_code", "num_symbols", "num_tables", "lanes", "offset", "sha256")},
        streams=tuple(
            StreamRecord(codec=codec, num_bytes=num_bytes)
            for codec, num_bytes in zip(codecs, stream_bytes, strict=True)
        ),
    )
