"""Environment variables of the challenge's run commands (spec section 8), as settings of a run.

Each listed variable sets what it names, as an override of the configuration that the script was made with. What cannot
be honoured is refused, or named in a note; nothing is silently ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bytejepa.config import RunConfig, replace
from bytejepa.data.vocabulary import BYTE_OFFSET, VOCABULARY_SIZE
from bytejepa.errors import ConfigError


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("expected 0 or 1")
    return text == "1"


def _int_or_none(text: str) -> int | None:
    return int(text) or None


def _positive_or_none(text: str) -> float | None:
    return float(text) if float(text) > 0 else None


SETTINGS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "NUM_LAYERS": ("model", "num_layers", int),
    "MODEL_DIM": ("model", "model_dim", int),
    "NUM_HEADS": ("model", "num_heads", int),
    "NUM_KV_HEADS": ("model", "num_kv_heads", int),
    "MLP_MULT": ("model", "mlp_ratio", float),
    "ROPE_DIMS": ("model", "rotary_dims", _int_or_none),
    "ROPE_BASE": ("model", "rotary_base", float),
    "QK_GAIN_INIT": ("model", "query_gain", float),
    "LOGIT_SOFTCAP": ("model", "logit_softcap", float),
    "XSA_LAST_N": ("model", "xsa_last_layers", int),
    "LN_SCALE": ("model", "depth_scaled_norm", _flag),
    "BIGRAM_VOCAB_SIZE": ("model", "bigram_rows", _int_or_none),
    "BIGRAM_DIM": ("model", "bigram_dim", int),
    "JEPA_CHUNK_SIZE": ("jepa", "chunk_bytes", int),
    "JEPA_LATENT_DIM": ("jepa", "latent_dim", int),
    "JEPA_PROJ_HIDDEN": ("jepa", "hidden_dim", int),
    "JEPA_LAMBDA_MAX": ("jepa", "lambda_max", float),
    "JEPA_SIGREG_WEIGHT": ("jepa", "sigreg_weight", float),
    "JEPA_SIGREG_PROJS": ("jepa", "sigreg_directions", int),
    "JEPA_SIGREG_KNOTS": ("jepa", "sigreg_knots", int),
    "JEPA_PHASE1_FRAC": ("jepa", "lambda_zero_until", float),
    "TRAIN_SEQ_LEN": ("data", "sequence_bytes", int),
    "TRAIN_BATCH_TOKENS": ("data", "batch_bytes", int),
    "MATRIX_LR": ("optimizer", "matrix_lr", float),
    "SCALAR_LR": ("optimizer", "scalar_lr", float),
    "TIED_EMBED_LR": ("optimizer", "embedding_lr", float),
    "JEPA_LR": ("optimizer", "jepa_lr", float),
    "MUON_WD": ("optimizer", "muon_weight_decay", float),
    "ADAM_WD": ("optimizer", "adam_weight_decay", float),
    "MUON_MOMENTUM": ("optimizer", "muon_momentum", float),
    "MUON_MOMENTUM_WARMUP_START": ("optimizer", "muon_momentum_start", float),
    "MUON_MOMENTUM_WARMUP_STEPS": ("optimizer", "muon_momentum_warmup_steps", int),
    "GRAD_CLIP_NORM": ("optimizer", "gradient_clip", _positive_or_none),
    "ITERATIONS": ("schedule", "steps", int),
    "MAX_WALLCLOCK_SECONDS": ("schedule", "max_wallclock_s", _positive_or_none),
    "WARMDOWN_ITERS": ("schedule", "warmdown_steps", int),
    "SEED": ("training", "seed", int),
    "WARMUP_STEPS": ("training", "warmup_steps", int),
    "VAL_LOSS_EVERY": ("training", "validate_every_steps", _int_or_none),
    "TRAIN_LOG_EVERY": ("training", "log_every_steps", int),
    "EVAL_SEQ_LEN": ("evaluation", "window_bytes", int),
    "EVAL_STRIDE": ("evaluation", "stride_bytes", int),
}
"""Variable -> section, setting, and how its text is read. 0 means off where the setting can be off."""

PLACES = ("DATA_PATH", "RUN_ID")
"""Variables that name places, which the program reads itself."""

DERIVED = ("VOCAB_SIZE", "EMA_ENABLED", "EMA_DECAY", "SWA_ENABLED", "JEPA_PHASE2_FRAC", "VAL_BATCH_SIZE")
"""Variables that set something only together with others, or nothing at all."""


def configured(
    config: RunConfig, environment: Mapping[str, str], *, world_size: int = 1
) -> tuple[RunConfig, list[str]]:
    """Return `config` as the environment changes it, and notes on variables that have no effect.

    Raises: ConfigError for a value that is no number, out of range, or that this model cannot have.
    """
    overrides: dict[str, dict[str, Any]] = {}
    given = {name: environment[name] for name in (*SETTINGS, *DERIVED) if environment.get(name, "") != ""}
    for name, text in given.items():
        if name in SETTINGS:
            section, setting, read = SETTINGS[name]
            overrides.setdefault(section, {})[setting] = _read(name, text, read)
    _derive(config, given, overrides, world_size)
    return replace(config, **overrides), _notes(config, given)


def _derive(config: RunConfig, given: dict[str, str], overrides: dict[str, dict[str, Any]], world_size: int) -> None:
    """Add what the variables of DERIVED set."""
    if "VOCAB_SIZE" in given and _read("VOCAB_SIZE", given["VOCAB_SIZE"], int) != VOCABULARY_SIZE:
        made = f"bytes and {BYTE_OFFSET} special ids make {VOCABULARY_SIZE}"
        raise ConfigError(f"VOCAB_SIZE: {made}, got {given['VOCAB_SIZE']}")
    training = overrides.setdefault("training", {})
    if "EMA_DECAY" in given and config.training.ema_decay is not None:
        training["ema_decay"] = _read("EMA_DECAY", given["EMA_DECAY"], float)
    if "EMA_ENABLED" in given:
        if not _read("EMA_ENABLED", given["EMA_ENABLED"], _flag):
            training["ema_decay"] = None
        elif config.training.ema_decay is None:
            training["ema_decay"] = _read("EMA_DECAY", given.get("EMA_DECAY", "0.997"), float)
    if "SWA_ENABLED" in given:
        if not _read("SWA_ENABLED", given["SWA_ENABLED"], _flag):
            training["swa_start"] = None
        elif config.training.swa_start is None:
            raise ConfigError(
                "SWA_ENABLED=1: the run that this script was made from kept no equal-weight average",
                hint="set SWA_ENABLED=0",
            )
    if "JEPA_PHASE2_FRAC" in given:
        jepa = overrides.setdefault("jepa", {})
        ramp = _read("JEPA_PHASE2_FRAC", given["JEPA_PHASE2_FRAC"], float)
        # rounded: 0.3 + 0.5 is to be the same setting as 0.8
        jepa["lambda_ramp_until"] = round(jepa.get("lambda_zero_until", config.jepa.lambda_zero_until) + ramp, 9)
    elif "JEPA_PHASE1_FRAC" in given:
        ramp = config.jepa.lambda_ramp_until - config.jepa.lambda_zero_until
        overrides["jepa"]["lambda_ramp_until"] = round(overrides["jepa"]["lambda_zero_until"] + ramp, 9)
    if "VAL_BATCH_SIZE" in given:  # of all ranks together
        share = _read("VAL_BATCH_SIZE", given["VAL_BATCH_SIZE"], int) // world_size
        overrides.setdefault("evaluation", {})["batch_bytes"] = share


def _notes(config: RunConfig, given: dict[str, str]) -> list[str]:
    """Return a line for every variable that is set and changes nothing."""
    notes = []
    if "WARMDOWN_ITERS" in given and config.schedule.warmdown == "progress":
        share = config.schedule.warmdown_fraction
        notes.append(f"WARMDOWN_ITERS has no effect: the learning rate falls over the last {share:.0%} of the run")
    if not config.jepa.enabled:
        unused = [name for name in given if name.startswith("JEPA_")]
        notes += [f"{name} has no effect: this run has no JEPA module" for name in unused]
    if "EMA_DECAY" in given and config.training.ema_decay is None and given.get("EMA_ENABLED") != "1":
        notes.append("EMA_DECAY has no effect: this run keeps no average")
    if "BIGRAM_DIM" in given and config.model.bigram_rows is None and "BIGRAM_VOCAB_SIZE" not in given:
        notes.append("BIGRAM_DIM has no effect: this run has no bigram table")
    if "TRAIN_SEQ_LEN" in given and config.data.sequence_growth:
        if config.data.sequence_growth[0][0] == 0:
            notes.append("TRAIN_SEQ_LEN has no effect: sequence growth states every length")
        else:
            notes.append("TRAIN_SEQ_LEN holds until the first stage of sequence growth only")
    return notes


def _read(name: str, text: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(text)
    except ValueError:
        expected = "0 or 1" if read is _flag else "a number"
        raise ConfigError(f"{name}: expected {expected}, got {text!r}") from None
