"""Plans: what a file may say, and that what it may not say is answered in one line with the nearest name."""

import dataclasses
import functools
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytejepa.config_json import to_dict
from bytejepa.errors import ConfigError
from bytejepa.presets import preset
from bytejepa.study.plan import built_in_plans, load_plan, override
from bytejepa.study.summary import summarise
from study.plans import small_plan, small_values

plan_of = functools.cache(load_plan)  # a second each


def test_a_configuration_is_base_then_budget_then_plan_then_variant_then_seed() -> None:
    plan = small_plan(overrides={**small_values()["overrides"], "jepa.chunk_bytes": 4})
    config = plan.config(plan.variant("with"), 7)
    assert (config.schedule.steps, config.schedule.max_bytes, config.schedule.max_wallclock_s) == (4, None, None)
    assert (config.evaluation.window_bytes, config.evaluation.stride_bytes) == (64, 32)
    assert (config.model.model_dim, config.jepa.chunk_bytes) == (32, 4)
    assert (config.jepa.gradient, config.training.seed) == ("detached", 7)
    assert config.model.embedding_std == preset("ablation").model.embedding_std


def test_none_switches_off_only_what_can_be_off() -> None:
    off = [{**v, "overrides": {"model.bigram_rows": "None"}} for v in small_values()["variants"]]
    plan = small_plan(variants=off)
    assert plan.config(plan.variants[0], 1).model.bigram_rows is None
    with pytest.raises(ConfigError, match="model_dim"):
        small_plan(overrides={"model.model_dim": "None"})


@pytest.mark.parametrize(
    ("budget", "expected"), [({"bytes": 1024}, (None, 1024, None)), ({"seconds": 2.5}, (None, None, 2.5))]
)
def test_budgets(budget: dict[str, Any], expected: tuple[object, ...]) -> None:
    plan = small_plan(budget=budget)
    schedule = plan.config(plan.variants[0], 1).schedule
    assert (schedule.steps, schedule.max_bytes, schedule.max_wallclock_s) == expected


def variants(**changes: Any) -> list[dict[str, Any]]:
    control, tested = small_values()["variants"]
    return [control, {**tested, **changes}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown entry 'sedes' (did you mean 'seeds'?)"),
        ({"base": "ablatoin"}, "unknown preset 'ablatoin' (did you mean 'ablation'?)"),
        ({"baseline": "withuot"}, "the baseline 'withuot' is no variant (did you mean 'without'?)"),
        ({"question": "Half of \ud83d?"}, "holds half of a character"),
        ({"seeds": []}, "one or more different seeds"),
        ({"seeds": [1, 1]}, "one or more different seeds"),
        ({"seeds": [1.5]}, "seeds: expected int, got 1.5"),
        ({"seeds": [-1]}, "seeds: expected whole numbers of 0 or more, got [-1]"),
        ({"seeds": 3}, "seeds: expected a list, got 3"),
        ({"question": 3}, "question: expected str, got 3"),
        ({"base": ["a"]}, "base: expected str, got ['a']"),
        ({"baseline": ["a"]}, "baseline: expected str, got ['a']"),
        ({"name": 5}, "name: expected str, got 5"),
        ({"data": 7}, "data: expected str, got 7"),
        ({"learning_rate_ends_at": "0"}, "learning_rate_ends_at: expected float, got '0'"),
        ({"learning_rate_ends_at": 2}, "plan.learning_rate_ends_at: expected 0 to 1, got 2"),
        ({"variants": {"a": 1}}, "variants: expected a list, got {'a': 1}"),
        ({"variants": variants(tests=4)}, "variant 2: tests: expected str, got 4"),
        ({"variants": variants(base=4)}, "variant 2: base: expected str, got 4"),
        ({"variants": variants(name=4)}, "variant 2: name: expected str, got 4"),
        ({"variants": variants(learning_rate_ends_at="0")}, "variant 2: learning_rate_ends_at: expected float, got '0'"),
        ({"budget": {"steps": "9"}}, "budget: steps: expected int, got '9'"),
        ({"budget": {"steps": True}}, "budget: steps: expected int, got True"),
        ({"evaluation": 3}, "evaluation: expected a table"),
        ({"evaluation": small_values()["evaluation"] | {"stride_bytes": 1}}, "evaluation.stride_bytes: expected 2 or more, got 1"),
        ({"overrides": {"schedule.steps": 7}}, "schedule.steps cannot be overridden (the plan's budget states it)"),
        ({"overrides": {"schedule": {"max_bytes": 7}}}, "schedule.max_bytes cannot be overridden"),
        ({"overrides": {"training.seed": 99}}, "training.seed cannot be overridden (the plan's seeds states it)"),
        ({"variants": variants(overrides={"evaluation.stride_bytes": 4})}, "variant with: evaluation.stride_bytes cannot be"),
        ({"budget": {}}, "budget: expected one of steps, bytes, seconds, got none"),
        ({"budget": {"steps": 3, "bytes": 9}}, "got steps, bytes"),
        ({"budget": {"steps": 0}}, "budget.steps: expected 1 or more, got 0"),
        ({"budget": {"stesp": 3}}, "unknown entry 'stesp' (did you mean 'steps'?)"),
        ({"variants": variants()[:1]}, "two or more variants"),
        ({"variants": variants(name="without")}, "different names"),
        ({"variants": variants(name="../up")}, "'../up' is no name"),
        ({"variants": variants(overrides={"jepa.gradent": "x"})}, "(did you mean 'gradient'?)"),
        ({"variants": variants(overrides={"jepaa.gradient": "x"})}, "(did you mean 'jepa'?)"),
        ({"variants": variants(overrides={"gradient": "detached"})}, "expected section.setting = value"),
        ({"variants": variants(overrides={"jepa.lambda_max": -1})}, "jepa.lambda_max: expected 0 or more, got -1"),
        ({"variants": variants(overides={})}, "unknown entry 'overides' (did you mean 'overrides'?)"),
        ({"variants": variants(overrides={"data.order": "sequential"})}, "data.order is sequential, the baseline's is"),
        ({"variants": variants(overrides={"data.order": "sequential"})}, "state reads_otherwise = true"),
        ({"variants": variants(overrides={"data.batch_bytes": 512}, reads_otherwise=True)}, "data.batch_bytes is 512, the"),
        ({"variants": variants(base="tniy")}, "unknown preset 'tniy' (did you mean 'tiny'?)"),
        ({"variants": variants(reads_otherwise="no")}, "reads_otherwise: expected bool, got 'no'"),
        ({"noise": "poled"}, "noise: poled is none of ['own', 'pooled']"),
        ({"variants": variants(overrides={"training.compile": "on"})}, "training.compile is on, the baseline's is auto"),
        ({"variants": variants(overrides={"schedule.steps": 9})}, "variant with: schedule.steps cannot be overridden"),
        ({"variants": variants(overrides={"schedule.warmdown_to": 0.5})}, "ends at learning-rate scale 0.5, expected 0"),
        ({"evaluation": {"window_bytes": 64, "stride_bytes": 32}}, "validation_bytes is missing"),
    ],
)  # fmt: skip
def test_an_impossible_plan_is_refused_in_one_line(
    refuses: Callable[..., str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(small_values(**changes)))
    assert message in refuses(2, "ablate", path, "--out", tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_files_that_are_no_plans(refuses: Callable[..., str], tmp_path: Path) -> None:
    assert "did you mean 'jepa'?" in refuses(2, "ablate", "jeppa", "--out", tmp_path / "study")
    assert "No such file" in refuses(2, "ablate", tmp_path / "no.toml", "--out", tmp_path / "study")
    (tmp_path / "bad.toml").write_text("name = ")
    assert "not TOML" in refuses(2, "ablate", tmp_path / "bad.toml", "--out", tmp_path / "study")
    (tmp_path / "list.json").write_text("[1]")
    assert "expected a table" in refuses(2, "ablate", tmp_path / "list.json", "--out", tmp_path / "study")
    assert "needs --out" in refuses(2, "ablate", "jepa")
    assert "needs a plan" in refuses(2, "ablate")
    assert "budget.steps" in refuses(2, "ablate", "jepa", "--steps", "0", "--out", tmp_path / "study")


def test_a_variant_may_end_elsewhere_if_it_says_so() -> None:
    ends = {"overrides": {"schedule.warmdown_to": 0.5}, "learning_rate_ends_at": 0.5}
    plan = small_plan(variants=variants(**ends))
    assert [plan.expected_learning_rate_end(variant) for variant in plan.variants] == [0.0, 0.5]


def test_a_variant_may_read_otherwise_and_derive_from_another_preset_if_it_says_so() -> None:
    tested = variants(
        base="ablation-pr832",
        reads_otherwise=True,
        learning_rate_ends_at=0.167,
        overrides={"data": {"order": "sequential", "num_streams": 2}},
    )
    plan = small_plan(variants=tested)
    config = plan.config(plan.variant("with"), 1)
    assert (config.data.order, config.data.num_streams, config.model.bigram_projection_init) == (
        "sequential",
        2,
        "zero",
    )
    assert (config.schedule.steps, config.model.model_dim) == (4, 32)


def test_the_baseline_is_not_said_to_read_otherwise_than_itself() -> None:
    plan = small_plan(variants=[{**variant, "reads_otherwise": True} for variant in variants()])
    notes = [note for note in summarise(plan, [])[1] if "in another way" in note]
    assert notes == [f"with reads the data in another way than {plan.baseline}."]


@pytest.mark.parametrize("name", built_in_plans())
def test_built_in_plans_change_one_thing_at_a_time(name: str) -> None:
    plan = plan_of(name)
    assert plan.name == name
    assert len(plan.seeds) >= (2 if plan.noise == "pooled" else 3)
    configs = {variant.name: to_dict(plan.config(variant, 1)) for variant in plan.variants}
    baseline = configs[plan.baseline]
    for variant in plan.variants:
        assert variant.tests.endswith((".", "?"))
        config = configs[variant.name]
        changed = [s for s in config if config[s] != baseline[s]]
        together = (
            "all-mended",
            "pr832-like",
            "quantisation-aware",
            "aware-gptq",
            "larger-and-decayed",
        )  # several at once, on purpose
        if variant.name not in (plan.baseline, *together):
            assert len(changed) == 1, (variant.name, changed)
    assert len({json.dumps(config) for config in configs.values()}) == len(plan.variants)


def test_what_golf_tiny_has_beyond_tiny_is_off_once_and_all_of_it_fits_the_time() -> None:
    techniques, candidates = plan_of("golf-techniques"), plan_of("golf-candidates")
    for plan in (techniques, candidates):
        assert plan.budget.seconds is not None
        assert len(plan.variants) * len(plan.seeds) * plan.budget.seconds < 3600
    off = techniques.config(techniques.variant("no-ngrams"), 1)
    without_effect = {"ngram_dim": off.model.ngram_dim, "chunk_stride_bytes": off.model.chunk_stride_bytes}
    chunks = {"chunk_blocks": preset("golf-tiny").model.chunk_blocks}
    assert off.model == dataclasses.replace(preset("tiny").model, **without_effect, **chunks)
    control = techniques.config(techniques.variant(techniques.baseline), 1)
    for name in ("model", "jepa", "data", "optimizer", "artifact"):
        assert getattr(control, name) == getattr(preset("golf-tiny"), name)
    reference = techniques.config(techniques.variant("pr832-like"), 1)
    same_size = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_ratio", "xsa_last_layers", "bigram_rows")
    assert [getattr(reference.model, name) for name in same_size] == [
        getattr(control.model, name) for name in same_size
    ]


def test_toml_tables_and_dotted_names_say_the_same() -> None:
    dotted, nested = '"jepa.gradient" = "detached"', 'jepa.gradient = "detached"'
    plans = [small_plan(variants=variants(overrides=tomllib.loads(text))) for text in (dotted, nested)]
    assert plans[0] == plans[1]


def test_overriding_steps_and_seeds() -> None:
    plan = override(small_plan(budget={"bytes": 1024}), steps=9, seeds=(5,))
    assert (plan.budget.steps, plan.budget.bytes, plan.seeds) == (9, None, (5,))
    with pytest.raises(ConfigError, match="seeds"):
        override(plan, seeds=(-1,))


def test_list_shows_plans_and_variants(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytejepa.study.plan.load_plan", plan_of)
    outcome = command("ablate", "--list")
    assert outcome.code == 0
    assert [name for name in built_in_plans() if name not in outcome.out] == []
    assert "untrained-projector" in command("ablate", "jepa", "--list").out
    assert set(json.loads(command("ablate", "--list", "--json").out)) == set(built_in_plans())
