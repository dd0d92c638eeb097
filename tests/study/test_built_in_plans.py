"""Every variant of the plans around golf-tiny trains: two steps of it, at a size at which that takes no time."""

import dataclasses
import functools
import tomllib
from pathlib import Path

import pytest

from bytejepa.config import replace
from bytejepa.study.plan import BUILT_IN, load_plan
from bytejepa.training.runs import train

SMALL = {
    "model": {"model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "ngram_rows": 64, "ngram_dim": 4},
    "jepa": {
        "chunk_bytes": 4,
        "latent_dim": 8,
        "hidden_dim": 8,
        "sigreg_directions": 4,
        "sigreg_group_sequences": None,
    },
    "data": {"sequence_bytes": 32, "batch_bytes": 64},
    "training": {"validate_every_steps": None, "validation_bytes": 64, "warmup_steps": 0, "checkpoint_every_s": None},
    "schedule": {"steps": 2, "max_bytes": None, "max_wallclock_s": None},
}
PLANS = (
    "golf-techniques", "golf-candidates", "golf-chunks", "golf-settings", "golf-structure", "golf-further",
    "quantization-aware", "muon",
)  # fmt: skip
VARIANTS = [
    (name, variant["name"])
    for name in PLANS
    for variant in tomllib.loads((BUILT_IN / f"{name}.toml").read_text(encoding="utf-8"))["variants"]
]
plan_of = functools.cache(load_plan)  # a second each


@pytest.mark.parametrize(("plan_name", "name"), VARIANTS)
def test_a_variant_trains(plan_name: str, name: str, tmp_path: Path, embedded_shards: Path) -> None:
    plan = plan_of(plan_name)
    config = plan.config(plan.variant(name), plan.seeds[0])
    small = {section: dict(settings) for section, settings in SMALL.items()}
    if config.model.rotary_dims is not None:
        small["model"]["rotary_dims"] = 4
    if config.data.sequence_growth is not None:
        small["data"]["sequence_growth"] = ((0.0, 16), (0.5, 32))
    result = train(replace(config, **small), embedded_shards, tmp_path / "run")
    assert result.steps == 2
    assert dataclasses.asdict(result)["num_bytes"] == 128
