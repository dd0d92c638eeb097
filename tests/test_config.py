"""A configuration that exists is possible; everything else is refused in one line that names the setting."""

import ast
import dataclasses
import inspect
import itertools
import json
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from bytejepa.config import (
    ArtifactConfig,
    DataConfig,
    EvaluationConfig,
    JepaConfig,
    ModelConfig,
    OptimizerConfig,
    Range,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    replace,
)
from bytejepa.config_fields import ranges_of
from bytejepa.config_json import fingerprint, from_dict, to_dict
from bytejepa.errors import ConfigError
from bytejepa.presets import PRESETS

SECTIONS = typing.get_type_hints(RunConfig)


def bounded_settings() -> Iterator[tuple[str, str, Range]]:
    for section, kind in SECTIONS.items():
        for name, bounds in ranges_of(kind).items():
            yield section, name, bounds


@pytest.mark.parametrize(("section", "name", "bounds"), list(bounded_settings()))
def test_every_range_holds_on_both_sides(section: str, name: str, bounds: Range) -> None:
    step = 1 if bounds.low == int(bounds.low) else bounds.low
    outside = [bounds.low - step, math.nan, math.inf]
    outside += [bounds.high + step] if math.isfinite(bounds.high) else []
    outside += [bounds.high] if bounds.excludes_high else []
    for value in outside:
        with pytest.raises(ConfigError, match=re.escape(f"{section}.{name}: expected {bounds}, got")) as refused:
            SECTIONS[section](**{name: value})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "settings", "words"),
    [
        (ModelConfig, {"num_heads": 7}, ["model_dim 512", "num_heads 7"]),
        (ModelConfig, {"model_dim": 24, "num_heads": 8, "rotary_dims": 2}, ["head width of 3"]),
        (ModelConfig, {"num_kv_heads": 3}, ["num_kv_heads 3", "num_heads 8"]),
        (ModelConfig, {"rotary_dims": 15}, ["rotary_dims", "64", "15"]),
        (ModelConfig, {"rotary_dims": 66}, ["rotary_dims", "64", "66"]),
        (ModelConfig, {"xsa_last_layers": 14}, ["xsa_last_layers 14", "num_layers 13"]),
        (ModelConfig, {"attention_windows": (8, 8)}, ["attention_windows", "1 or 13", "8 8"]),
        (ModelConfig, {"attention_windows": (-1,)}, ["attention_windows", "-1"]),
        (ModelConfig, {"attention_windows": ()}, ["attention_windows"]),
        (JepaConfig, {"lambda_zero_until": 0.9}, ["lambda_zero_until 0.9", "lambda_ramp_until 0.8"]),
        (DataConfig, {"batch_bytes": 5000}, ["5000", "4096"]),
        (DataConfig, {"micro_batch_bytes": 5000}, ["5000", "4096"]),
        (DataConfig, {"order": "sequential", "num_streams": 7}, ["7", "96"]),
        (DataConfig, {"sequence_growth": ((1.0, 4096),)}, ["sequence_growth"]),
        (DataConfig, {"sequence_growth": ((0.5, 4096), (0.5, 2048))}, ["sequence_growth"]),
        (JepaConfig, {"inject": False, "losses": False}, ["all off", "jepa.enabled false"]),
        (JepaConfig, {"lambda_zero_until": 0.8}, ["lambda_ramp_until 0.8", "never have a weight"]),
        (OptimizerConfig, {"matrix_lr": 1e300}, ["matrix_lr", "float32", "1e+300"]),
        (ScheduleConfig, {"steps": 10**320}, ["steps", "float32"]),
        (
            ScheduleConfig,
            {"warmup_fraction": 0.1, "warmdown": "mean_step_time"},
            ["warmup_fraction 0.1", "mean_step_time"],
        ),
        (ScheduleConfig, {"warmup_fraction": 0.7}, ["warmup_fraction 0.7", "warmdown_fraction 0.4", "its peak"]),
        (ScheduleConfig, {"warmdown_fraction": 0.0, "warmdown_to": 0.1}, ["warmdown_to 0.1", "warmdown_fraction 0"]),
        (ScheduleConfig, {"steps": None}, ["nothing ends the run"]),
        (OptimizerConfig, {"muon_cautious_weight_decay": True, "muon_weight_decay": 0.0}, ["nothing decays"]),
        (ScheduleConfig, {"steps": None, "max_bytes": 9, "warmdown": "mean_step_time"}, ["mean_step_time", "steps"]),
        (EvaluationConfig, {"stride_bytes": 8192}, ["8192", "4096"]),
        (ArtifactConfig, {"scales": "reference_floor", "clip": "max", "matrix_bits": 5}, ["reference_floor", "5, 8"]),
        (ArtifactConfig, {"scales": "reference_floor", "clip": "max", "rounding": "gptq"}, ["reference_floor", "gptq"]),
    ],
)
def test_contradictions_name_all_numbers(section: type, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        section(**settings)
    assert [word for word in words if word not in str(refused.value)] == []
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluation": {"stride_bytes": 500}}, ["stride_bytes 500", "chunk_bytes 8"]),
        ({"evaluation": {"window_bytes": 4001, "stride_bytes": 8}}, ["window_bytes 4001", "chunk_bytes 8"]),
        ({"jepa": {"sigreg_group_sequences": 7}}, ["sigreg_group_sequences 7", "96 sequences", "None for one sample"]),
        ({"data": {"sequence_bytes": 4}}, ["sequence_bytes 4", "chunk_bytes 8"]),
        ({"data": {"sequence_bytes": 16}, "jepa": {"horizons": 2}}, ["horizons 2", "2 chunks", "16 bytes"]),
        (
            {"data": {"sequence_bytes": 8}, "jepa": {"sigreg_standardize": True, "sigreg_group_sequences": 1}},
            ["sigreg_standardize", "two latents"],
        ),
    ],
)
def test_contradictions_between_sections(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        replace(RunConfig(), **sections)
    assert [word for word in words if word not in str(refused.value)] == []
    # without JEPA there are no chunks to agree with
    replace(RunConfig(), **{**sections, "jepa": {**sections.get("jepa", {}), "enabled": False}})


def test_none_means_off_and_is_in_every_range() -> None:
    config = replace(RunConfig(), model={"rotary_dims": None, "bigram_rows": None}, training={"ema_decay": None})
    assert config.model.rotary_dims is None


@pytest.mark.parametrize("name", PRESETS)
def test_json_gives_the_same_configuration_back(name: str) -> None:
    config = replace(PRESETS[name](), model={"attention_windows": (64,)}, data={"sequence_growth": ((0.5, 512),)})
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert fingerprint(again) == fingerprint(config)


def test_missing_settings_take_the_default() -> None:
    assert from_dict({}) == RunConfig()
    assert from_dict({"model": {"num_layers": 6}}) == replace(RunConfig(), model={"num_layers": 6})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "here: unknown setting 'modle' (did you mean 'model'?)"),
        (
            {"model": {"num_layer": 3}},
            "here, section model: unknown setting 'num_layer' (did you mean 'num_layers'?)",
        ),
        ({"model": {"num_layers": 0}}, "here: model.num_layers: expected 1 to 256, got 0"),
        ({"model": {"num_layers": "3"}}, "here: model.num_layers: expected int, got '3'"),
        ({"model": {"num_layers": 3.0}}, "here: model.num_layers: expected int, got 3.0"),
        ({"model": {"num_layers": True}}, "here: model.num_layers: expected int, got True"),
        ({"model": {"smear": 1}}, "here: model.smear: expected bool, got 1"),
        ({"model": 5}, "here: model: expected an object of settings, got 5"),
        ({"schedule": {"steps": None}}, "here: schedule: nothing ends the run (set one of"),
        ({"jepa": {"gradient": "both"}}, "here: jepa.gradient: both is none of ['detached', 'backbone']"),
        ({"evaluation": {"stride_bytes": 9}}, "here: evaluation.stride_bytes 9 is not a multiple of"),
        ([], "here: expected an object of sections, got list"),
        (None, "here: expected an object of sections, got NoneType"),
    ],
)
def test_bad_json_is_refused_in_one_line(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_dict(values, where="here")
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_fingerprint_is_of_the_meaning() -> None:
    assert fingerprint(from_dict({"model": {"rotary_base": 10000}})) == fingerprint(RunConfig())
    seen = {fingerprint(RunConfig()), fingerprint(replace(RunConfig(), training={"seed": 1}))}
    assert len(seen) == 2
    assert all(len(digest) == 64 for digest in seen)


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().model.num_layers = 3  # type: ignore[misc]


@pytest.mark.parametrize("section", [*SECTIONS.values()])
def test_every_field_says_what_it_means(section: type) -> None:
    body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
    described = {
        here.target.id  # type: ignore[attr-defined]
        for here, after in itertools.pairwise(body)
        if isinstance(here, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    assert described == {field.name for field in dataclasses.fields(section)}


def test_windows_of_layers() -> None:
    assert ModelConfig(num_layers=4).window_of_layer == (None,) * 4
    assert ModelConfig(num_layers=4, attention_windows=(64,)).window_of_layer == (64,) * 4
    assert ModelConfig(num_layers=4, attention_windows=(64, 0, 32, 0)).window_of_layer == (64, None, 32, None)


def test_stages_begin_at_zero() -> None:
    assert DataConfig().stages == ((0.0, 4096),)
    grown = DataConfig(sequence_bytes=1024, sequence_growth=((0.5, 4096),))
    assert grown.stages == ((0.0, 1024), (0.5, 4096))
    assert DataConfig(sequence_growth=((0.0, 512), (0.5, 4096))).stages == ((0.0, 512), (0.5, 4096))


def test_training_settings_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"training\.ema_decay: expected 0 to less than 1, got 1\.5"):
        TrainingConfig(ema_decay=1.5)


@pytest.mark.parametrize("settings", [{"context": "causal"}, {"horizons": 2}])
def test_latent_options_without_latent_losses_are_refused(settings) -> None:
    with pytest.raises(ConfigError, match=r"need jepa\.losses"):
        replace(RunConfig(), jepa={"losses": False, **settings})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bigram_table": "exact"}, "expected model.bigram_rows 65537, got 4096"),
        ({"ngram_orders": ()}, "got none"),
        ({"ngram_orders": (2, 3)}, "rising numbers from 3 to 16, got 2 3"),
        ({"ngram_orders": (4, 3)}, "rising"),
        ({"ngram_orders": (3, 17)}, "3 to 16"),
        ({"parallel_last_layers": 14}, "parallel_last_layers 14 is more than model.num_layers 13"),
        ({"value_embedding_last_layers": 14}, "more than model.num_layers"),
        ({"skip_gates": True, "skip_connections": False}, "skip_gates needs"),
        ({"smear_gate": "input", "smear": False}, "smear_gate input needs"),
        ({"attention_gate_dims": 513}, "more than model.model_dim 512"),
        ({"recurrent_layers": (3, 13)}, "from 0 to 12, got 3 13"),
        ({"recurrent_layers": (4, 3)}, "rising"),
        ({"chunk_blocks": (3, 2)}, "two rising numbers under 12, got 3 2"),
        ({"chunk_blocks": (0, 12)}, "two rising numbers under 12, got 0 12"),
        ({"chunk_blocks": (2, 8)}, r"first \+ last = 11, .* got 2 8"),
        ({"chunk_blocks": (2, 8), "num_layers": 12}, r"first \+ last = 11"),
        ({"chunk_blocks": (2, 9), "recurrent_layers": (2, 4)}, r"first \+ last = 12"),
        (
            {"chunk_blocks": (0, 0), "num_layers": 2, "xsa_last_layers": 1},
            "expected none with model.num_layers 2, .* got 0 0",
        ),
        ({"chunk_blocks": (2, 9), "recurrent_layers": (8, 10)}, "model.recurrent_layers 8 10"),
        ({"chunk_blocks": (2, 9), "recurrent_layers": (1, 10)}, "model.recurrent_layers 1 10"),
        ({"chunk_blocks": (2, 9), "chunk_stride_bytes": 1}, "chunk_stride_bytes: expected 2 to 256, got 1"),
    ],
)
def test_contradicting_techniques_are_refused(settings, match) -> None:
    with pytest.raises(ConfigError, match=match):
        replace(RunConfig(), model=settings)


def test_chunk_blocks_run_in_one_go_at_places_counted_in_chunks() -> None:
    windows = (64, 0, 30, 3, 0, 16)
    model = ModelConfig(num_layers=6, chunk_blocks=(1, 4), recurrent_layers=(2, 3), attention_windows=windows)
    assert model.chunk_places == range(1, 7)
    assert model.stride_of_place == (1, 4, 4, 4, 4, 4, 4, 1)
    assert model.window_of_place == (64, None, 7, 1, 7, 1, None, 16)
    without = ModelConfig(num_layers=6, attention_windows=windows)
    assert (without.chunk_places, without.window_of_place) == (range(0), without.window_of_layer)
    assert ModelConfig(num_layers=6, chunk_blocks=(4, 4), skip_connections=False).chunk_places == range(4, 5)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"data": {"sequence_bytes": 8, "sequence_growth": None}}, "data.sequence_bytes 8"),
        ({"data": {"sequence_growth": ((0.0, 8), (0.5, 4096))}}, "data.sequence_growth 8"),
        ({"data": {"sequence_growth": ((0.5, 8),)}}, "data.sequence_growth 8"),
        ({"evaluation": {"window_bytes": 8, "stride_bytes": 8}}, "evaluation.window_bytes 8"),
    ],
)
def test_contexts_without_a_whole_chunk_are_refused(settings, name) -> None:
    config = replace(RunConfig(), model={"chunk_blocks": (2, 9), "chunk_stride_bytes": 16})
    with pytest.raises(ConfigError, match=f"{name} is less than model.chunk_stride_bytes 16"):
        replace(config, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"data": {"batch_bytes": 1000, "sequence_bytes": 512, "sequence_growth": ((0.0, 64), (0.5, 512))}},
            "data.batch_bytes 1000 is not a multiple of data.sequence_growth 64",
        ),
        (
            {"data": {"sequence_growth": ((0.5, 8),)}, "model": {"multi_token_heads": 8}, "jepa": {"enabled": False}},
            "model.multi_token_heads 8 looks past the end of a sequence of 8 bytes, from data.sequence_growth",
        ),
        (
            {"data": {"sequence_growth": ((0.0, 4), (0.5, 4096))}, "jepa": {"chunk_bytes": 8}},
            "data.sequence_growth 4 is less than jepa.chunk_bytes 8",
        ),
        ({"training": {"validation_bytes": 1}}, "training.validation_bytes"),
    ],
)
def test_the_setting_at_fault_is_named(settings, words) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        replace(RunConfig(), **settings)


def test_as_many_extra_heads_as_a_sequence_has_bytes_to_come_are_allowed() -> None:
    growth = {"data": {"sequence_growth": ((0.5, 8),)}, "jepa": {"enabled": False}}
    assert replace(RunConfig(), **growth, model={"multi_token_heads": 7}).model.multi_token_heads == 7
