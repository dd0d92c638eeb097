"""Presets are what their docstrings say: `pr832` the reference's run command to the letter, `default` its defects mended."""

import dataclasses

import pytest
import torch

from bytejepa.config_json import to_dict
from bytejepa.errors import ConfigError
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import PRESETS, default, golf, golf_tiny, pr832, pr832_no_jepa, preset, tiny

RUN_COMMAND = {  # spec section 8: the reference's environment variables
    "model": {
        "num_layers": 13, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_ratio": 2.0, "bigram_rows": 4096,
        "bigram_dim": 32, "xsa_last_layers": 4, "rotary_dims": 16, "depth_scaled_norm": True, "query_gain": 1.5,
        "logit_softcap": 30.0, "rotary_base": 10_000.0, "rotary_length_bytes": 4096, "embedding_std": 0.005,
        "smear": True, "residual_mix": True, "skip_connections": True, "multi_token_heads": 0,
        "document_masking": False, "attention_windows": None,
    },
    "jepa": {
        "enabled": True, "chunk_bytes": 8, "latent_dim": 256, "hidden_dim": 256, "lambda_max": 0.001,
        "sigreg_weight": 0.02, "sigreg_directions": 256, "sigreg_knots": 17, "lambda_zero_until": 0.3,
        "lambda_ramp_until": 0.8, "lambda_after": "zero",
    },
    "data": {"sequence_bytes": 4096, "batch_bytes": 393_216, "order": "sequential", "num_streams": 8},
    "optimizer": {
        "matrix_lr": 0.025, "scalar_lr": 0.025, "embedding_lr": 0.035, "jepa_lr": 0.001, "muon_weight_decay": 0.04,
        "adam_weight_decay": 0.04, "muon_momentum": 0.99, "muon_momentum_start": 0.92,
        "muon_momentum_warmup_steps": 1500, "newton_schulz_steps": 5, "adam_beta1": 0.9, "adam_beta2": 0.95,
        "adam_epsilon": 1e-8, "gradient_clip": 0.3,
    },
    "schedule": {"steps": 9000, "max_wallclock_s": 600.0, "warmdown": "mean_step_time", "warmdown_steps": 3000},
    "training": {
        "ema_decay": 0.997, "ema_warmup": False, "swa_start": None, "qat_start": None, "warmup_steps": 20, "seed": 1337,
        "bfloat16_embeddings": True, "validate_every_steps": 1000,
    },
    "evaluation": {"window_bytes": 4096, "stride_bytes": 512},
    "artifact": {
        "matrix_bits": 6, "other_bits": 8, "scales": "reference_floor", "clip": "max", "small_tensor_elements": 65_536,
        "codecs": ["zstd"], "limit_bytes": 16_000_000,
    },
}  # fmt: skip


@pytest.mark.parametrize("section", RUN_COMMAND)
def test_pr832_is_the_references_run_command(section: str) -> None:
    values = to_dict(pr832())[section]
    assert {name: values[name] for name in RUN_COMMAND[section]} == RUN_COMMAND[section]


def test_pr832_keeps_the_references_defects() -> None:
    config = pr832()
    assert config.model.bigram_projection_init == "zero"
    assert config.model.output_projection_init == "zero"
    assert config.jepa.gradient == "detached"
    assert config.jepa.sigreg_standardize
    assert config.jepa.sigreg_group_sequences == 12  # the sequences of one of its GPUs


def test_default_mends_them() -> None:
    config = default()
    assert config.model.bigram_projection_init == "orthogonal"
    assert config.model.output_projection_init == "scaled"
    assert config.jepa.gradient == "backbone"
    assert not config.jepa.sigreg_standardize
    assert (config.schedule.warmdown, config.schedule.max_wallclock_s) == ("progress", 600.0)
    assert config.artifact.scales == "per_row"
    assert "zstd" in config.artifact.codecs


def test_the_control_arm_differs_in_one_setting_only() -> None:
    ours, control = pr832(), pr832_no_jepa()
    assert dataclasses.replace(control, jepa=ours.jepa) == ours
    assert dataclasses.replace(control.jepa, enabled=True) == ours.jepa


def test_tiny_has_the_structure_of_default() -> None:
    sizes = {"num_layers", "model_dim", "num_heads", "num_kv_heads", "xsa_last_layers", "rotary_length_bytes"}
    small, full = to_dict(tiny()), to_dict(default())
    assert {k for k in full["model"] if small["model"][k] != full["model"][k]} == sizes
    assert {k for k in full["jepa"] if small["jepa"][k] != full["jepa"][k]} == {
        "latent_dim",
        "hidden_dim",
        "sigreg_directions",
    }
    assert small["artifact"] == full["artifact"]


@pytest.mark.parametrize(("name", "ranks"), [("default", 8), ("pr832", 8), ("golf", 8), ("tiny", 2), ("golf-tiny", 2)])
def test_sigreg_has_samples_of_one_size_on_any_number_of_ranks(name: str, ranks: int) -> None:
    config = preset(name)
    group = config.jepa.sigreg_group_sequences
    assert group is not None
    assert all(config.data.batch_bytes // length // ranks % group == 0 for _, length in config.data.stages)


def test_presets_by_name() -> None:
    assert set(PRESETS) == {
        "default",
        "pr832",
        "pr832-no-jepa",
        "tiny",
        "golf",
        "golf-tiny",
        "ablation",
        "ablation-pr832",
    }
    assert preset("pr832") == pr832()
    with pytest.raises(ConfigError, match=r"unknown preset 'tny'.*did you mean 'tiny'"):
        preset("tny")
    with pytest.raises(ConfigError, match="presets: default, pr832, pr832-no-jepa, tiny, golf, golf-tiny, ablation"):
        preset("zzz")


def test_golf_has_about_as_many_weights_as_the_budget_holds_at_3_55_bits() -> None:
    with torch.device("meta"):
        model = ByteLM(golf())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 34_000_000 < count < 36_000_000
    assert count * 3.55 / 8 < golf().artifact.limit_bytes


def test_golf_tiny_differs_from_tiny_as_golf_from_default() -> None:
    small, full = to_dict(golf_tiny()), to_dict(golf())
    plain_small, plain_full = to_dict(tiny()), to_dict(default())
    changed = {
        (section, name)
        for section, settings in small.items()
        for name, value in settings.items()
        if value != plain_small[section][name]
    }
    for_short_runs = {("model", "chunk_blocks"), ("schedule", "steps")}
    assert for_short_runs < changed
    for section, name in changed - for_short_runs:
        assert small[section][name] == full[section][name] != plain_full[section][name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_is(name: str) -> None:
    assert len((PRESETS[name].__doc__ or "").splitlines()[0]) > 20
