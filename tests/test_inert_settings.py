"""No setting is inert: each one changes what a few steps of training make of a model, or what an artifact holds.

A setting that is new has to be entered here, or among those that are to change neither.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bytejepa.artifact.container import Container, read_container
from bytejepa.artifact.write import calibration_sequences, write_artifact
from bytejepa.config import ArtifactConfig, RunConfig, replace
from bytejepa.data.loader import IdStream
from bytejepa.presets import compact
from bytejepa.training.averaging import averaged_weights
from bytejepa.training.distributed import Ranks
from bytejepa.training.trainer import Trainer
from small_models import random_ids, small_config, small_model

Changes = dict[str, dict[str, Any]]
"""Settings by section."""

STEPS = 3
BASE: Changes = {
    "model": {"num_layers": 4, "attention_windows": (9,), "multi_token_heads": 1, "query_gain": 3.0},
    "jepa": {"horizons": 2, "next_bytes_weight": 0.1, "lambda_max": 0.5, "sigreg_group_sequences": None},
    "data": {"sequence_bytes": 48, "batch_bytes": 192, "sequence_growth": None, "character_substitution": 0.0},
    "schedule": {"steps": None, "max_wallclock_s": 10.0},
    "training": {"validate_every_steps": None, "warmup_steps": 0, "ema_decay": 0.5, "ema_warmup": False},
}
"""Of every pair of models, one of which has a setting changed: what most settings need to matter."""

NGRAMS = {"ngram_orders": (3,), "ngram_rows": 50}
BY_MEAN_STEP_TIME = {"schedule": {"warmdown": "mean_step_time", "steps": 100, "warmdown_steps": 50}}
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 5,
        "model_dim": 64,
        "num_heads": 2,
        "num_kv_heads": 1,
        "mlp_ratio": 3.0,
        "rotary_dims": None,
        "rotary_base": 100.0,
        "rotary_length_bytes": 16,
        "query_gain": 1.5,
        "logit_softcap": 3.0,
        "xsa_last_layers": 4,
        "depth_scaled_norm": False,
        "residual_mix": False,
        "skip_connections": False,
        "skip_gates": True,
        "parallel_last_layers": 2,
        "recurrent_layers": (1, 2),
        "attention_gate_dims": 12,
        "value_embedding_last_layers": 2,
        "smear": False,
        "smear_gate": "input",
        "bigram_rows": None,
        "bigram_table": "exact",
        "bigram_dim": 16,
        "bigram_projection_init": "zero",
        "ngram_orders": (3, 4),
        "ngram_rows": 51,
        "ngram_dim": 16,
        "output_projection_init": "zero",
        "embedding_std": 0.1,
        "attention_windows": None,
        "document_masking": True,
        "chunk_blocks": (1, 2),
        "chunk_stride_bytes": 3,
        "multi_token_heads": 2,
    },
    "jepa": {
        "enabled": False,
        "chunk_bytes": 8,
        "latent_dim": 12,
        "hidden_dim": 12,
        "inject": False,
        "losses": False,
        "context": "causal",
        "horizons": 3,
        "next_bytes_weight": 0.0,
        "gradient": "detached",
        "lambda_max": 1.0,
        "lambda_zero_until": 0.5,
        "lambda_ramp_until": 0.5,
        "lambda_after": "zero",
        "sigreg_weight": 0.1,
        "sigreg_directions": 16,
        "sigreg_knots": 5,
        "sigreg_standardize": True,
        "sigreg_group_sequences": 2,
    },
    "data": {
        "sequence_bytes": 96,
        "batch_bytes": 96,
        "order": "sequential",
        "num_streams": 2,
        "sequence_growth": ((0.0, 24), (0.5, 48)),
        "character_substitution": 1.0,
    },
    "optimizer": {
        "matrix_lr": 0.05,
        "embedding_lr": 0.07,
        "scalar_lr": 0.05,
        "jepa_lr": 0.01,
        "muon_weight_decay": 0.4,
        "adam_weight_decay": 0.4,
        "muon_momentum": 0.5,
        "muon_momentum_start": 0.5,
        "muon_momentum_warmup_steps": 3,
        "newton_schulz_steps": 3,
        "newton_schulz_coefficients": "polar_express",
        "muon_row_normalization": True,
        "muon_beta2": 0.9,
        "muon_cautious_weight_decay": True,
        "adam_beta1": 0.5,
        "adam_beta2": 0.5,
        "adam_epsilon": 0.1,
        "gradient_clip": 1e-6,
    },
    "schedule": {
        "warmdown": "mean_step_time",
        "warmdown_fraction": 0.9,
        "warmdown_to": 0.5,
        "warmdown_steps": 90,
        "warmup_fraction": 0.3,
    },
    "training": {
        "seed": 1,
        "ema_decay": 0.9,
        "ema_warmup": True,
        "swa_start": 0.3,
        "swa_every_steps": 2,
        "qat_start": 0.5,
        "multi_token_weight": 1.0,
    },
}
"""By section and name: what a setting is changed to."""

NEEDS: dict[str, Changes] = {
    "model.num_layers": {"model": {"xsa_last_layers": 0}},
    "model.bigram_table": {"model": {"bigram_rows": 65_537, "bigram_dim": 4}},
    "model.ngram_orders": {"model": NGRAMS},
    "model.ngram_rows": {"model": NGRAMS},
    "model.ngram_dim": {"model": NGRAMS},
    "model.chunk_stride_bytes": {"model": {"chunk_blocks": (1, 2)}},
    "jepa.losses": {"jepa": {"horizons": 1}},
    "jepa.lambda_zero_until": {"jepa": {"lambda_ramp_until": 0.9}},
    "jepa.lambda_after": {"jepa": {"lambda_ramp_until": 0.3}},
    "data.num_streams": {"data": {"order": "sequential"}},
    "schedule.warmdown": BY_MEAN_STEP_TIME,
    "schedule.warmdown_steps": BY_MEAN_STEP_TIME,
    "training.swa_every_steps": {"training": {"swa_start": 0.0}},
    "training.swa_start": {"training": {"swa_every_steps": 2}},
    "training.qat_start": {"artifact": {"matrix_bits": 3, "small_tensor_elements": 256}},
}
"""What both models need besides BASE."""
FROM = {"schedule.warmdown": "progress"}
"""What a setting is changed from where NEEDS would give it its changed value."""

CHANGE_NO_STEP = {
    "data": {"micro_batch_bytes"},
    "schedule": {"steps", "max_bytes", "max_wallclock_s"},
    "training": {
        "warmup_steps", "device", "precision", "bfloat16_embeddings", "compile", "attention", "validate_every_steps",
        "validation_bytes", "log_every_steps", "checkpoint_every_s", "keep_checkpoints",
    },
}  # fmt: skip
"""Settings that say when a run ends, what it reports, or how the same numbers are computed: tested where that is."""
NAMES = [f"{section}.{name}" for section, settings in SETTINGS.items() for name in settings]


def merged(*layers: Changes) -> Changes:
    """The layers one on top of the other."""
    result: Changes = {}
    for layer in layers:
        for section, settings in layer.items():
            result[section] = {**result.get(section, {}), **settings}
    return result


def test_every_setting_that_decides_a_step_is_entered() -> None:
    config = small_config()
    for section, settings in SETTINGS.items():
        known = {field.name for field in dataclasses.fields(getattr(config, section))}
        assert known == set(settings) | CHANGE_NO_STEP.get(section, set()), section
    assert {field.name for field in dataclasses.fields(ArtifactConfig)} == set(ARTIFACT_SETTINGS) | OF_FITTING


def predictions(config: RunConfig, shards: Path) -> Tensor:
    """Logits of the live and of the averaged weights after a few steps; documents begin within the text."""
    trainer = Trainer(config, shards, Ranks(), validate=False)
    try:
        for number in range(STEPS):
            trainer.take_step(progress=number / STEPS, elapsed_s=2.0 * number)
    finally:
        trainer.close()
    model, ids = trainer.model, random_ids(2, 40, documents=True)
    with torch.no_grad(), averaged_weights(model, trainer.average.average or list(model.parameters())):
        averaged = model.logits(ids)
    with torch.no_grad():
        return torch.stack((model.logits(ids), averaged))


@pytest.fixture(scope="module")
def plain(embedded_shards: Path) -> dict[str, Tensor]:
    """Predictions of models without the change, by their settings."""
    return {}


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_changes_what_training_makes_of_a_model(
    name: str, embedded_shards: Path, plain: dict[str, Tensor]
) -> None:
    section, _, setting = name.partition(".")
    before = merged(BASE, NEEDS.get(name, {}), {section: {setting: FROM[name]}} if name in FROM else {})
    after = merged(before, {section: {setting: SETTINGS[section][setting]}})
    if str(before) not in plain:
        plain[str(before)] = predictions(small_config(**before), embedded_shards)
    changed = predictions(small_config(**after), embedded_shards)
    assert (changed - plain[str(before)]).abs().max() > 1e-5


AS_THE_REFERENCE = {"matrix_bits": 6, "clip": "max", "rounding": "nearest"}
ARTIFACT_SETTINGS: dict[str, tuple[dict[str, Any], Any]] = {
    "matrix_bits": ({}, 3),
    "other_bits": ({}, 3),
    "scales": (AS_THE_REFERENCE, "reference_floor"),
    "clip": ({}, "max"),
    "clip_standard_deviations": ({}, 30.0),
    "other_clip_standard_deviations": ({"clip": "standard_deviations"}, 30.0),
    "scale_digits": ({}, 5),
    "rounding": ({}, "nearest"),
    "gptq_damping": ({}, 0.5),
    "calibration_bytes": ({}, 64),
    "hidden_order": ({}, "as_trained"),
    "small_tensor_elements": ({}, 2048),
    "codecs": ({}, ("zstd",)),
}
"""By name: what both artifacts need besides `presets.compact`, and what the setting is changed to."""
OF_FITTING = {"fit", "limit_bytes"}
"""Tested in test_fit.py."""


def packed(settings: dict[str, Any], shards: Path, path: Path) -> Container:
    """What the artifact of a small model holds, packed compactly but for `settings`."""
    model = small_model()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    base = {"small_tensor_elements": 256, "calibration_bytes": 128, **settings}
    config = replace(compact(model.config), artifact=base, data={"sequence_bytes": 64, "sequence_growth": None})
    sequences = calibration_sequences(IdStream.open(shards, "train"), config, shards)
    write_artifact(path, weights, config, sequences=sequences)
    return read_container(path)


@pytest.fixture(scope="module")
def plainly_packed(tmp_path_factory: pytest.TempPathFactory, embedded_shards: Path) -> Container:
    """The artifact without any change."""
    return packed({}, embedded_shards, tmp_path_factory.mktemp("inert") / "model.bjm")


@pytest.mark.usefixtures("many_lanes")
@pytest.mark.parametrize("name", ARTIFACT_SETTINGS)
def test_a_setting_changes_what_an_artifact_holds(
    name: str, embedded_shards: Path, tmp_path: Path, plainly_packed: Container
) -> None:
    needed, value = ARTIFACT_SETTINGS[name]
    before = packed(needed, embedded_shards, tmp_path / "before.bjm") if needed else plainly_packed
    after = packed({**needed, name: value}, embedded_shards, tmp_path / "after.bjm")
    if name == "codecs":  # the weights are the same, how they are packed is not
        assert before.info.joint_bytes > 0 == after.info.joint_bytes
    else:
        assert any(not torch.equal(before.tensors[key], after.tensors[key]) for key in before.tensors)
