"""Named configurations, each a function that derives it from another and says what it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bytejepa.config import RunConfig, replace
from bytejepa.errors import ConfigError, nearest_hint


def default() -> RunConfig:
    """The reference with every known defect mended; full size, 600 s on 8 GPUs.

    BigramHash learns, branch outputs start at 1/sqrt(2L), JEPA reaches the backbone, SIGReg sees mean and scale, of
    samples that do not depend on the number of ranks, the learning rate reaches zero where training ends, each row has
    its own quantisation step.
    """
    return replace(
        RunConfig(),
        jepa={
            "lambda_max": 0.01,
            "lambda_zero_until": 0.0,
            "lambda_ramp_until": 0.1,
            "lambda_after": "hold",
            "sigreg_weight": 1.0,
            "sigreg_group_sequences": 2,  # small, so that any even share of a step is whole samples
        },
        schedule={"steps": None, "max_wallclock_s": 600.0},
    )


def pr832() -> RunConfig:
    """The reference to the letter, inert parts included."""
    return replace(
        RunConfig(),
        model={"bigram_projection_init": "zero", "output_projection_init": "zero"},
        jepa={"gradient": "detached", "sigreg_standardize": True, "sigreg_group_sequences": 12},
        data={"order": "sequential", "num_streams": 8},
        schedule={"max_wallclock_s": 600.0, "warmdown": "mean_step_time"},
        training={"bfloat16_embeddings": True, "ema_warmup": False},
        artifact={"scales": "reference_floor", "clip": "max", "small_tensor_elements": 65_536, "codecs": ("zstd",)},
    )


def pr832_no_jepa() -> RunConfig:
    """`pr832` without the JEPA module: the control arm of the reference's ablation."""
    return replace(pr832(), jepa={"enabled": False})


def tiny() -> RunConfig:
    """`default`'s structure at a size that 2 CPU cores train on the embedded corpus in a few minutes."""
    return replace(
        default(),
        model={
            "num_layers": 6,
            "model_dim": 128,
            "num_heads": 2,
            "num_kv_heads": 1,
            "xsa_last_layers": 2,
            "rotary_length_bytes": 512,
        },
        jepa={"latent_dim": 64, "hidden_dim": 64, "sigreg_directions": 64},
        data={
            "sequence_bytes": 512,
            "batch_bytes": 2048,
            "sequence_growth": ((0.0, 64), (0.3, 128), (0.6, 256), (0.85, 512)),
            "character_substitution": 0.04,
        },
        optimizer={
            "matrix_lr": 0.018,
            "muon_momentum": 0.95,
            "muon_momentum_start": 0.85,
            "muon_momentum_warmup_steps": 100,
        },
        schedule={"steps": 2000, "max_wallclock_s": 270.0, "warmdown_fraction": 0.6},
        training={"ema_decay": 0.99, "warmup_steps": 1, "validate_every_steps": 300, "validation_bytes": 65_536},
        evaluation={"window_bytes": 512, "stride_bytes": 128},
    )


def compact(config: RunConfig) -> RunConfig:
    """`config` with the artifact packed as small as its loss allows: GPTQ, steps by sensitivity, entropy coding."""
    return replace(
        config,
        artifact={
            "matrix_bits": 8,  # no more than a range: what a code costs is its entropy
            "other_bits": 8,
            "scales": "per_row",
            "clip": "sensitivity",
            "clip_standard_deviations": 52.6,  # SDClip's 12.85 at 6 bits is the same step
            "scale_digits": 3,
            "rounding": "gptq",
            "hidden_order": "by_scale",
            "small_tensor_elements": min(4096, config.artifact.small_tensor_elements),
            "codecs": ("rans", "zstd", "brotli"),
        },
    )


def golf() -> RunConfig:
    """`default` with a larger model and what proved itself here or elsewhere, about 35 million weights; 600 s on 8 GPUs.

    Hashed runs of 3 to 6 ids, sequences that grow and NorMuon, measured here; documents kept apart, windows in most blocks,
    a larger query gain, more weight decay, more and wider blocks: taken over from others' measurements
    (docs/techniques.md). Packed compactly, with the steps that just fill the budget (docs/quantization.md).
    """
    local, full = 1024, 0
    return replace(
        compact(default()),
        model={
            **_NGRAMS,
            "num_layers": 14,
            "mlp_ratio": 3.0,
            "query_gain": 4.0,
            "document_masking": True,
            "attention_windows": (*(local, local, local, local, full) * 2, local, local, local, full),
        },
        data={"sequence_growth": ((0.0, 1024), (0.4, 2048), (0.7, 4096))},
        optimizer={"muon_weight_decay": 0.085, "muon_beta2": 0.95},
        artifact={"fit": True},
    )


def golf_tiny() -> RunConfig:
    """`tiny` with what proved itself at its size: the tables and the packing of `golf`, and the four middle blocks once
    every four bytes, which pays where time is shorter than capacity (records/2026-11-26_golf-chunks). Its steps are shorter
    than `tiny`'s, so that there are more of them."""
    return replace(
        compact(tiny()),
        model={**_NGRAMS, "chunk_blocks": (1, 4), "chunk_stride_bytes": 4},
        schedule={"steps": 2500},
    )


_NGRAMS: dict[str, Any] = {"ngram_orders": (3, 4, 5, 6), "ngram_dim": 16}


def ablation() -> RunConfig:
    """`default`'s structure at the size of the built-in ablation plans: a run takes seconds on one CPU core."""
    return replace(default(), **_ABLATION_SIZE)


def ablation_pr832() -> RunConfig:
    """`pr832` at the size of `ablation`, ratios kept: for plans that mend the reference's defects one at a time.

    Scaled with the size: the EMA's horizon (the same share of the run), the bound of small tensors (all block matrices
    are above it, JEPA's square ones are not), momentum and its warm-up. The warm-down keeps its length (3,000 steps of
    a run that would have taken 9,501) and stops where the reference's did, at 0.167 of the peak (spec section 7, item 4).
    Sequences are shuffled, as FineWeb's documents are and those of a corpus in order of time are not.
    """
    size = {section: dict(settings) for section, settings in _ABLATION_SIZE.items()}
    size["schedule"] |= {"warmdown": "progress", "warmdown_fraction": 0.28, "warmdown_to": 0.167}
    size["data"]["order"] = "shuffled"
    return replace(pr832(), **size)


_ABLATION_SIZE: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 4,
        "model_dim": 64,
        "num_heads": 2,
        "num_kv_heads": 1,
        "xsa_last_layers": 1,
        "rotary_dims": 8,
        "rotary_length_bytes": 256,
    },
    "jepa": {"latent_dim": 32, "hidden_dim": 32, "sigreg_directions": 64, "sigreg_group_sequences": None},
    "data": {"sequence_bytes": 256, "batch_bytes": 1024},
    "optimizer": {"muon_momentum": 0.95, "muon_momentum_start": 0.85, "muon_momentum_warmup_steps": 100},
    "schedule": {"steps": 400, "max_wallclock_s": None, "warmdown_fraction": 0.4},
    "training": {"ema_decay": 0.95, "warmup_steps": 0, "validate_every_steps": 100, "validation_bytes": 16_384},
    "evaluation": {"window_bytes": 256, "stride_bytes": 128},
    "artifact": {"small_tensor_elements": 1024},  # under the smallest block matrix: all of them are quantised
}


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "default": default,
    "pr832": pr832,
    "pr832-no-jepa": pr832_no_jepa,
    "tiny": tiny,
    "golf": golf,
    "golf-tiny": golf_tiny,
    "ablation": ablation,
    "ablation-pr832": ablation_pr832,
}


def preset(name: str) -> RunConfig:
    """Return the configuration called `name`. Raises: ConfigError with the nearest name if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}", hint=nearest_hint(name, PRESETS, label="presets"))
    return PRESETS[name]()
