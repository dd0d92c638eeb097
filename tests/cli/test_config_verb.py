"""`bytejepa config`: presets as tables and JSON, overridden by name."""

import dataclasses
import json
import typing
from collections.abc import Callable
from typing import Any

import pytest

from bytejepa.config import RunConfig
from bytejepa.config_json import fingerprint, from_dict, to_dict
from bytejepa.presets import PRESETS, preset
from conftest import MINIMAL


@pytest.mark.parametrize("name", PRESETS)
def test_json_is_the_preset(command: Callable[..., Any], name: str) -> None:
    outcome = command("config", name, "--json")
    assert outcome.code == 0
    assert outcome.err == ""
    assert from_dict(json.loads(outcome.out)) == preset(name)


def test_without_a_name_it_is_default(command: Callable[..., Any]) -> None:
    assert json.loads(command("config", "--json").out) == to_dict(preset("default"))


def test_overrides_are_typed_and_apply(command: Callable[..., Any], minimal_config: RunConfig) -> None:
    assert from_dict(json.loads(command("config", *MINIMAL, "--json").out)) == minimal_config


def test_a_setting_can_be_switched_off(command: Callable[..., Any]) -> None:
    words = ("--model.no-smear", "--model.bigram-rows", "None", "--training.ema-decay", "None", "--jepa.no-inject")
    values = json.loads(command("config", "tiny", *words, "--json").out)
    assert (values["model"]["smear"], values["model"]["bigram_rows"]) == (False, None)
    assert (values["training"]["ema_decay"], values["jepa"]["inject"]) == (None, False)


def test_a_setting_of_several_numbers(command: Callable[..., Any]) -> None:
    words = ("--model.num-layers", "2", "--model.attention-windows", "64", "0")
    values = json.loads(command("config", "tiny", *words, "--json").out)
    assert values["model"]["attention_windows"] == [64, 0]


def test_the_table_shows_every_setting_and_the_fingerprint(command: Callable[..., Any]) -> None:
    out = command("config", "tiny").out
    for section, kind in typing.get_type_hints(RunConfig).items():
        for field in dataclasses.fields(kind):
            assert f"{section}.{field.name} " in out
    assert f"fingerprint {fingerprint(preset('tiny'))}" in out


def test_explain_gives_every_setting_a_meaning_and_every_number_a_range() -> None:
    from bytejepa.cli.config import _rows

    rows = list(_rows(preset("default"), explain=True))
    assert len(rows) == sum(len(dataclasses.fields(kind)) for kind in typing.get_type_hints(RunConfig).values())
    assert [row[0] for row in rows if len(row[3]) < 10] == []
    ranges = {row[0]: row[2] for row in rows}
    assert ranges["model.num_layers"] == "1 to 256"
    assert ranges["jepa.gradient"] == "detached, backbone"
    assert ranges["schedule.steps"] == "1 or more"
    numbers = {
        f"{section}.{field.name}"
        for section, kind in typing.get_type_hints(RunConfig).items()
        for field in dataclasses.fields(kind)
        if isinstance(getattr(getattr(preset("default"), section), field.name), (int, float))
        and not isinstance(getattr(getattr(preset("default"), section), field.name), bool)
    }
    assert {name for name in numbers if not ranges[name]} == set()


def test_explain_is_a_table(command: Callable[..., Any]) -> None:
    outcome = command("config", "tiny", "--explain")
    assert "│ Transformer blocks. " in outcome.out, "prose begins at the left"
    assert outcome.code == 0
    assert "Transformer blocks." in outcome.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.num-heads", "3"), "model.model_dim 128 must be an even multiple of model.num_heads 3"),
        (("--evaluation.stride-bytes", "100"), "evaluation.stride_bytes 100 is not a multiple of jepa.chunk_bytes 8"),
        (("--schedule.steps", "None", "--schedule.max-wallclock-s", "None"), "schedule: nothing ends the run"),
        (("--jepa.lambda-max", "nan"), "jepa.lambda_max: expected 0 or more, got nan"),
        (
            ("--data.sequence-bytes", "1024"),
            "data.sequence_bytes 1024 is not the last length of data.sequence_growth, 512",
        ),
        (
            ("--data.batch-bytes", "4096", "--data.sequence-bytes", "500", "--data.sequence-growth", "None"),
            "data.batch_bytes 4096 is not a multiple of data.sequence_bytes 500",
        ),
    ],
)
def test_impossible_settings_are_refused(refuses: Callable[..., str], words: tuple[str, ...], message: str) -> None:
    assert refuses(2, "config", "tiny", *words).startswith(f"bytejepa config: {message}")
