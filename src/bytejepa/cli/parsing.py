"""From a verb's dataclass and the words after it to an instance of the class."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import typing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro

from bytejepa.cli.options import check_words
from bytejepa.config import RunConfig
from bytejepa.config_fields import ranges_of
from bytejepa.errors import ConfigError
from bytejepa.presets import PRESETS, preset


class Command(Protocol):
    """A verb with its options filled in."""

    def run_command(self) -> int:
        """Do the work, print the result on stdout, and return the exit code."""
        ...


_ORNAMENTS = re.compile(r"\x1b\[[\d;]*m|[│╭╮╰╯]")
"""Colours and the sides of a box."""

_KINDS = {"INT": "a whole number", "FLOAT": "a number", "[INT": "whole numbers"}
"""What an option's placeholder asks for, in words."""

_SETTINGS = tuple(f"--{field.name}." for field in dataclasses.fields(RunConfig))
"""How a word begins that sets one of a configuration."""

_TRUTH_VALUES = ("true", "false", "on", "off", "yes", "no", "1", "0")

Verb = TypeVar("Verb", bound=Command)


def parse(verb_class: type[Verb], verb: str, words: list[str]) -> Verb:
    """Return an instance of `verb_class` made from `words`.

    A class with a field `config` takes the name of a preset as its first word, one that is true of `TAKES_MODELS` also an
    artifact or a run, whose configuration it then is; every setting of it can be overridden by name (`--model.num-layers
    6`). Exits with code 0 after printing help that is asked for.
    Raises: ConfigError for words that cannot be parsed, an unknown preset, a number out of its range, an impossible
    combination of settings or words that contradict each other.
    """
    kept_unparsed: dict[str, Any] = {}
    fields = {field.name for field in dataclasses.fields(verb_class)}  # type: ignore[arg-type]
    if "config" in fields:
        name, config, rest = _configuration_word(verb_class, words)
        kept_unparsed = {"config": config, "preset": name}
        if "configured_by" in fields:
            chosen = words[: len(words) - len(rest)]
            kept_unparsed["configured_by"] = (*chosen, *(word for word in rest if word.startswith(_SETTINGS)))
        words = rest
    program = f"bytejepa {verb}" + (f" {kept_unparsed['preset']}" if kept_unparsed else "")
    if kept_unparsed:
        others = ", ".join(name for name in PRESETS if name != kept_unparsed["preset"])
        described = f"{verb_class.__doc__} Shown here: {kept_unparsed['preset']}; other presets: {others}."
    else:
        described = None
    defaults = _with_defaults(verb_class, kept_unparsed) if kept_unparsed else tyro.MISSING_NONPROP
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command = tyro.cli(verb_class, args=words, prog=program, description=described, default=defaults)
        check_words(command, words)
        _require_ranges(command)
        return command
    except SystemExit as left:
        if not left.code:  # help was asked for
            raise
    message, hint = _in_one_line(said.getvalue(), program)
    raise ConfigError(_in_words(message, hint), hint=_switch_with_value(words, message) or hint)


def _in_words(message: str, hint: str) -> str:
    """Return what tyro says of a number that cannot be read, or of what is missing, without its and Python's terms."""
    unread = re.fullmatch(r"error parsing (\S+): .*?('.*')\]?\.?\s*", message)
    placeholder = re.search(r"--[\w.-]+ (\{None\}\|)?\{?(INT|FLOAT|\[INT)\b(?! INT)", hint)
    if unread and placeholder:
        kind = _KINDS[placeholder[2]] + (" or None" if placeholder[1] else "")
        return f"{unread[1]}: expected {kind}, got {unread[2]}"
    if message.startswith("missing from "):
        _, _, listed = message.partition(": ")
        return f"missing {listed.replace(' (required)', '')}"
    return message


def _switch_with_value(words: list[str], message: str) -> str:
    """Return how to say it if what was not recognised is a truth value behind a switch, else nothing."""
    unknown = message.removeprefix("unrecognized options: ").split(", ")[0]
    for switch, value in itertools.pairwise(words):
        if value == unknown and switch.startswith("--") and value.lower() in _TRUTH_VALUES:
            section, dot, name = switch.rpartition(".")
            contrary = f"{section}.no-{name}" if dot else f"--no-{switch[2:]}"
            return f"a switch takes no value: {switch}, or {contrary} for the contrary"
    return ""


def _require_ranges(command: Command) -> None:
    """Refuse an option outside the `Range` in its field's annotation, of a tuple each number. Raises: ConfigError."""
    for name, bounds in ranges_of(type(command)).items():
        value = getattr(command, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number not in bounds:
                raise ConfigError(f"--{name.replace('_', '-')}: expected {bounds}, got {number}")


def _in_one_line(box: str, program: str) -> tuple[str, str]:
    """Return (message, hint) out of the box that tyro draws around an error: a title, the error, and help below rules."""
    rows = [_ORNAMENTS.sub("", row).strip() for row in box.splitlines()[1:]]
    sections = [
        list(part)
        for is_rule, part in itertools.groupby(rows, key=lambda row: bool(row) and not row.strip("─-"))
        if not is_rule
    ]
    message = " ".join(sections[0] if sections else box.split()).partition(" Got errors:")[0]
    below = sections[1:-1]  # the last section says where help is
    if message.startswith("Unrecognized"):
        nearest = [name for part in below for row in part for name in re.findall(r"^--[\w.-]+", row)]
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"see {program} --help"
    else:
        hint = " ".join(row for part in below for row in part if row != "Argument helptext:") or f"see {program} --help"
    return message[:1].lower() + message[1:], hint


def _configuration_word(verb_class: type[Any], words: list[str]) -> tuple[str, RunConfig, list[str]]:
    """Return (preset or model, its configuration, the other words)."""
    if words and not words[0].startswith("-"):
        name, rest = words[0], words[1:]
    else:
        name, rest = typing.cast(str, getattr(verb_class, "DEFAULT_PRESET", "default")), words
    if name in PRESETS or not getattr(verb_class, "TAKES_MODELS", False):
        return name, preset(name), rest
    if Path(name).exists():
        from bytejepa.artifact.load import configuration_in

        return name, configuration_in(Path(name)), rest
    if Path(name).suffix or len(Path(name).parts) > 1:
        raise ConfigError(
            f"there is no model {name}", hint=f"name an artifact, a run or a preset: {', '.join(PRESETS)}"
        )
    return name, preset(name), rest  # raises, with the nearest name


def _with_defaults(verb_class: type[Any], values: dict[str, Any]) -> Any:
    required = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(verb_class)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return verb_class(**{**required, **values})


ConfigField = typing.Annotated[RunConfig, tyro.conf.arg(name="")]
"""A verb's resolved configuration: the preset with its overrides."""

PresetField = typing.Annotated[str, tyro.conf.Suppress]
"""The name of the preset that `config` began as, or the path of the model."""

ConfiguredByField = typing.Annotated[tuple[str, ...], tyro.conf.Suppress]
"""The words that chose `config`: a preset, settings; empty if none did."""
