"""Words that contradict each other: options given twice, without a value or for nothing, names that are none."""

from __future__ import annotations

import dataclasses
import functools
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bytejepa.config import RunConfig
from bytejepa.config_fields import Range
from bytejepa.errors import ConfigError

if TYPE_CHECKING:
    from bytejepa.cli.parsing import Command

NumThreads = Annotated[int, Range(1, 1024)]
"""Threads to compute with: some libraries end the process when the system gives them no more."""

_SHORTCUTS = {"max_wallclock": "config.schedule.max_wallclock_s"}
"""Options that stand for a setting of the configuration."""


@dataclasses.dataclass(frozen=True)
class _Given:
    """An option as it stands among the words, or a word that is not an option's value (`spelling` and `field` are then empty)."""

    spelling: str
    field: str
    """Where its value is in the command: "output", "config.model.num_layers"."""
    words: list[str]


def check_words(command: Command, words: list[str]) -> None:
    """Refuse words that parse but contradict each other; `command` is what they parse into.

    Those are an option that is given twice, under one spelling or under two; one of several values that got none; an empty
    string where a name belongs; `-` for an output or input that is no stream. The class's `STREAMS` names the fields for
    which `-` is standard input or output. Raises: ConfigError.
    """
    seen: dict[str, str] = {}
    for given in _given(command, words):
        if given.field:
            setting = _SHORTCUTS.get(given.field, given.field)
            if seen.get(setting) == given.spelling:
                raise ConfigError(f"{given.spelling} is given twice", hint="give it once")
            if setting in seen:
                raise ConfigError(f"{seen[setting]} and {given.spelling} set the same", hint="give one of them")
            seen[setting] = given.spelling
            if _value(command, given.field) == ():
                raise ConfigError(f"{given.spelling}: expected at least one value, got none")
        for word in given.words:
            if word == "":
                _refuse_empty(command, given)
            if word == "-":
                _refuse_stream(command, given)


def refuse_ignored(command: Command, where: str, *names: str, instead: str = "") -> None:
    """Refuse those of the options `names` that were set, because `where` ("with --no-score") ignores them.

    `instead`: what else to do than to leave them out. Raises: ConfigError.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(command)}  # type: ignore[arg-type]
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(command, name) != defaults[name]]
    if given:
        what = "it" if len(given) == 1 else "them"
        verb = "has" if len(given) == 1 else "have"
        hint = f"leave {what} out" + (f", or {instead}" if instead else "")
        raise ConfigError(f"{' and '.join(given)} {verb} no effect {where}", hint=hint)


def _given(command: Command, words: list[str]) -> list[_Given]:
    """Return what `words`, which parse, consist of. What tyro takes for an option is no option's value unless behind an `=`."""
    fields = _fields_by_spelling(type(command))
    given: list[_Given] = []
    room = 0.0  # values that the option before may still take
    end = words.index("--") if "--" in words else len(words)
    for word in words[:end]:
        spelling, equals, attached = word.partition("=")
        if spelling.startswith("--"):
            spelling = spelling.replace("_", "-")
        elif spelling not in fields and word[:2] in fields:  # -n5
            spelling, equals, attached = word[:2], "=", word[2:]
        if spelling in fields:
            value = _value(command, fields[spelling])
            room = 0 if isinstance(value, bool) else float("inf") if isinstance(value, tuple) else 1
            given.append(_Given(spelling, fields[spelling], [attached] if equals else []))
            room -= len(given[-1].words)
        elif room > 0:
            given[-1].words.append(word)
            room -= 1
        else:
            given.append(_Given("", "", [word]))
    return given + [_Given("", "", [word]) for word in words[end + 1 :]]


@functools.cache
def _fields_by_spelling(verb_class: type) -> dict[str, str]:
    """Return where the value of every option is, by each of its spellings."""
    spelled: dict[str, str] = {}
    for name, annotation in typing.get_type_hints(verb_class, include_extras=True).items():
        if name == "config":
            for section in dataclasses.fields(RunConfig):
                for setting in typing.get_type_hints(typing.get_type_hints(RunConfig)[section.name]):
                    for option in (setting, f"no-{setting}"):
                        spelled[f"--{section.name}.{option}".replace("_", "-")] = f"config.{section.name}.{setting}"
            continue
        aliases = [
            a for extra in getattr(annotation, "__metadata__", ()) for a in getattr(extra, "aliases", None) or ()
        ]
        option = name.replace("_", "-")
        spelled |= dict.fromkeys((f"--{option}", f"--no-{option}", *aliases), name)
    return spelled


def _value(command: Command, field: str) -> Any:
    return functools.reduce(getattr, field.split("."), command)


def _refuse_empty(command: Command, given: _Given) -> None:
    fields = {field.name: field for field in dataclasses.fields(command)}  # type: ignore[arg-type]
    if given.field not in fields or fields[given.field].default != "":
        where = f"{given.spelling}: " if given.field else ""
        raise ConfigError(f"{where}expected a name or a text, got an empty string")


def _refuse_stream(command: Command, given: _Given) -> None:
    streams = getattr(command, "STREAMS", ())
    if not given.field:
        if "file" not in streams and not Path("-").exists():
            raise ConfigError("-: standard input is not read here", hint="name a file")
        return
    if given.field in streams or not isinstance(_value(command, given.field), Path):
        return
    if given.field in ("output", "out"):
        raise ConfigError(f"{given.spelling} -: the result is not written to standard output", hint="name it ./-")
    if not Path("-").exists():
        raise ConfigError(f"{given.spelling} -: standard input is not read here", hint="name a file")
