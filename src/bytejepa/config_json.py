"""A configuration as JSON and back, strictly: what is stored with every run, checkpoint and artifact."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from typing import Any

from bytejepa.config import RunConfig
from bytejepa.errors import ConfigError, nearest_hint


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as JSON-ready nested dictionaries."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any], *, where: str = "configuration") -> RunConfig:
    """Return the configuration that `to_dict` gave. Missing keys take the default.

    Raises: ConfigError for an unknown key (with the nearest valid one), a wrong type or a value out of range.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object of sections, got {type(values).__name__}")
    for key in values:
        _refuse_unknown(key, RunConfig, where)
    for name, section in typing.get_type_hints(RunConfig).items():
        if not isinstance(values.get(name, {}), dict):
            raise ConfigError(f"{where}: {name}: expected an object of settings, got {values[name]!r}")
        for key in values.get(name, {}):
            _refuse_unknown(key, section, f"{where}, section {name}")
    return typing.cast(RunConfig, structured(values, RunConfig, where=where))


def structured(values: Any, kind: Any, *, where: str) -> Any:
    """Return `values`, as JSON or TOML has them, as the dataclass or type `kind`: lists become tuples, nothing is converted.

    Raises: ConfigError that says where something is of another type, or what the dataclass itself refuses.
    """
    from cattrs.errors import BaseValidationError

    try:
        return _converter().structure(values, kind)
    except BaseValidationError as problem:
        setting, cause = _first_cause(problem)
        if isinstance(cause, ConfigError):  # of a section's own check, which names the setting
            raise ConfigError(f"{where}: {cause.message}", hint=cause.hint) from None
        raise ConfigError(f"{where}: {setting + ': ' if setting else ''}{_reason(cause)}") from None
    except ConfigError as problem:
        raise ConfigError(f"{where}: {problem.message}", hint=problem.hint) from None
    except Exception as problem:  # of a value that is no dataclass; cattrs raises plain exceptions, too
        raise ConfigError(f"{where}: {_reason(problem)}") from None


@functools.cache
def _converter() -> Any:
    """Return the converter, which keeps the code that it makes for each class."""
    import cattrs

    converter = cattrs.Converter(forbid_extra_keys=True, prefer_attrib_converters=True)
    for scalar in (int, float, bool, str):
        converter.register_structure_hook(scalar, _strict_scalar)
    return converter


def _reason(problem: BaseException) -> str:
    return str(problem).replace("not in literal typing.Literal", "is none of ")


def _strict_scalar(value: Any, expected: type) -> Any:
    accepted = (int, float) if expected is float else (expected,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise TypeError(f"expected {expected.__name__}, got {value!r}")
    return expected(value)  # 1 and 1.0 are one setting with one fingerprint


def _first_cause(problem: BaseException, path: tuple[str, ...] = ()) -> tuple[str, BaseException]:
    """Return (setting, exception) of the first leaf of what cattrs raised."""
    from cattrs.errors import AttributeValidationNote

    notes = (note for note in getattr(problem, "__notes__", ()) if isinstance(note, AttributeValidationNote))
    path = (*path, *(note.name for note in notes))
    if isinstance(problem, BaseExceptionGroup):
        return _first_cause(problem.exceptions[0], path)
    return ".".join(path), problem


def _refuse_unknown(key: str, section: type, where: str) -> None:
    names = [field.name for field in dataclasses.fields(section)]
    if key not in names:
        raise ConfigError(f"{where}: unknown setting {key!r}", hint=nearest_hint(str(key), names))


def fingerprint(config: RunConfig) -> str:
    """Return the sha256 of the sorted JSON of `config`, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()
