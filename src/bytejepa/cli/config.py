"""`bytejepa config`: print a preset, with units and ranges."""

from __future__ import annotations

import dataclasses
import typing

from bytejepa.cli.options import refuse_ignored
from bytejepa.cli.parsing import ConfigField, PresetField
from bytejepa.config import RunConfig
from bytejepa.config_fields import ranges_of
from bytejepa.config_json import fingerprint, to_dict
from bytejepa.presets import PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Print a preset (`bytejepa config tiny`), or the configuration of an artifact or a run, with any overrides applied."""

    TAKES_MODELS: typing.ClassVar[bool] = True
    config: ConfigField
    explain: bool = False
    """Say what every setting means, with its unit and range."""
    json: bool = False
    """Print the resolved configuration as one JSON object."""
    preset: PresetField = "default"

    def run_command(self) -> int:
        """Print the configuration."""
        from bytejepa.cli.terminal import print_json, print_table

        if self.json:
            refuse_ignored(self, "with --json", "explain")
            print_json(to_dict(self.config))
            return 0
        made_by = PRESETS.get(self.preset)
        description = "configuration of the model" if made_by is None else (made_by.__doc__ or "").split("\n")[0]
        columns = ["setting", "value", "range", "meaning"] if self.explain else ["setting", "value"]
        rows = list(_rows(self.config, explain=self.explain))
        print_table(f"{self.preset}: {description}", columns, rows, prose=("range", "meaning"))
        print(f"fingerprint {fingerprint(self.config)}")
        return 0


def _rows(config: RunConfig, *, explain: bool) -> typing.Iterator[list[str]]:
    from docstring_parser import parse_from_object

    for section in dataclasses.fields(RunConfig):
        values = getattr(config, section.name)
        meanings = {p.arg_name: p.description or "" for p in parse_from_object(type(values)).params} if explain else {}
        for field in dataclasses.fields(values):
            row = [f"{section.name}.{field.name}", _shown(getattr(values, field.name))]
            if explain:
                row += [_range_of(type(values), field.name), " ".join(meanings.get(field.name, "").split())]
            yield row


def _shown(value: object) -> str:
    return "off" if value is None or value is False else "on" if value is True else str(value)


def _range_of(section: type, name: str) -> str:
    """Return the range of a number or the choices of a word, as text; empty where anything goes."""
    if name in (ranges := ranges_of(section)):
        return str(ranges[name])
    annotation = typing.get_type_hints(section)[name]
    choices = [part for part in (annotation, *typing.get_args(annotation)) if typing.get_origin(part) is typing.Literal]
    return ", ".join(str(choice) for part in choices for choice in typing.get_args(part))
