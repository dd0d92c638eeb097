"""Environment variables: all of the reference's run command are honoured, refused or named; none is ignored."""

import dataclasses

import pytest

from bytejepa.config import replace
from bytejepa.errors import ConfigError
from bytejepa.presets import default, pr832, pr832_no_jepa
from bytejepa.submission.environment import DERIVED, PLACES, SETTINGS, configured

RUN_COMMAND = """NUM_LAYERS=13 VOCAB_SIZE=260 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=2.0 TRAIN_SEQ_LEN=4096
TRAIN_BATCH_TOKENS=393216 BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=32 XSA_LAST_N=4 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=0
ROPE_DIMS=16 LN_SCALE=1 MUON_WD=0.04 ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99
MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 WARMDOWN_ITERS=3000 ITERATIONS=9000 MAX_WALLCLOCK_SECONDS=600
EVAL_STRIDE=512 JEPA_CHUNK_SIZE=8 JEPA_LATENT_DIM=256 JEPA_PROJ_HIDDEN=256 JEPA_LAMBDA_MAX=0.001 JEPA_SIGREG_WEIGHT=0.02
JEPA_LR=0.001 SEED=1337 VAL_BATCH_SIZE=524288 VAL_LOSS_EVERY=1000 WARMUP_STEPS=20 EVAL_SEQ_LEN=4096 QK_GAIN_INIT=1.5
LOGIT_SOFTCAP=30 ROPE_BASE=10000 GRAD_CLIP_NORM=0.3 JEPA_SIGREG_PROJS=256 JEPA_SIGREG_KNOTS=17 JEPA_PHASE1_FRAC=0.3
JEPA_PHASE2_FRAC=0.5 TRAIN_LOG_EVERY=200"""
"""All that the reference reads (spec section 8), with the values of its submitted run."""

VARIABLES = dict(word.split("=") for word in RUN_COMMAND.split())


def test_every_variable_of_the_reference_is_known() -> None:
    assert set(VARIABLES) == {*SETTINGS, *DERIVED}
    assert set(PLACES) == {"DATA_PATH", "RUN_ID"}


def test_the_reference_run_command_gives_the_reference() -> None:
    config, notes = configured(pr832(), VARIABLES, world_size=8)
    assert config == replace(pr832(), training={"log_every_steps": 200})
    assert notes == []


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, {"MODEL_DIM": "256", "NUM_KV_HEADS": "2", "LN_SCALE": "0", "EMA_ENABLED": "0", "EMA_DECAY": "0.9",
             "ROPE_DIMS": "8", "MLP_MULT": "3", "MUON_MOMENTUM": "0.9", "VAL_BATCH_SIZE": "8192", "NUM_HEADS": "4",
             "TRAIN_SEQ_LEN": "2048", "TRAIN_BATCH_TOKENS": "786432", "JEPA_CHUNK_SIZE": "16", "EVAL_STRIDE": "64",
             "MUON_MOMENTUM_WARMUP_START": "0.5", "JEPA_PHASE1_FRAC": "0.1", "JEPA_PHASE2_FRAC": "0.6", "NUM_LAYERS": "6",
             "XSA_LAST_N": "2", "EVAL_SEQ_LEN": "8192", "GRAD_CLIP_NORM": "1"}.get(name, "7"))
     for name in VARIABLES if name not in ("VOCAB_SIZE", "SWA_ENABLED")],
)  # fmt: skip
def test_each_variable_changes_the_run(name: str, text: str) -> None:
    changed, notes = configured(pr832(), {name: text})
    before, after = dataclasses.asdict(pr832()), dataclasses.asdict(changed)
    different = [f"{s}.{key}" for s in before for key in before[s] if before[s][key] != after[s][key]]
    assert different, name
    assert len(different) == (2 if name == "JEPA_PHASE1_FRAC" else 1)
    assert notes == []


@pytest.mark.parametrize(
    ("growth", "expected"),
    [
        (None, []),
        (((0.0, 512), (0.5, 4096)), ["TRAIN_SEQ_LEN has no effect: sequence growth states every length"]),
        (((0.5, 4096),), ["TRAIN_SEQ_LEN holds until the first stage of sequence growth only"]),
    ],
)
def test_a_length_that_growth_replaces_is_named(
    growth: tuple[tuple[float, int], ...] | None, expected: list[str]
) -> None:
    config = replace(pr832(), data={"sequence_growth": growth})
    assert configured(config, {"TRAIN_SEQ_LEN": "4096"})[1] == expected
    assert configured(config, {"NUM_LAYERS": "12"})[1] == []


def test_zero_turns_off_what_can_be_off() -> None:
    config, _ = configured(
        default(),
        {
            "BIGRAM_VOCAB_SIZE": "0",
            "ROPE_DIMS": "0",
            "GRAD_CLIP_NORM": "0",
            "VAL_LOSS_EVERY": "0",
            "ITERATIONS": "9",
            "MAX_WALLCLOCK_SECONDS": "0",
        },
    )
    assert (config.model.bigram_rows, config.model.rotary_dims, config.optimizer.gradient_clip) == (None, None, None)
    assert (config.training.validate_every_steps, config.schedule.max_wallclock_s, config.schedule.steps) == (
        None,
        None,
        9,
    )


def test_what_has_no_effect_is_named() -> None:
    _, notes = configured(default(), {"WARMDOWN_ITERS": "3000"})
    assert len(notes) == 1
    assert "WARMDOWN_ITERS" in notes[0]
    _, notes = configured(pr832_no_jepa(), {"JEPA_LR": "0.1", "JEPA_PHASE1_FRAC": "0.2"})
    assert sorted(note.partition(" ")[0] for note in notes) == ["JEPA_LR", "JEPA_PHASE1_FRAC"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"VOCAB_SIZE": "1024"}, "VOCAB_SIZE: bytes and 4 special ids make 260, got 1024"),
        ({"SWA_ENABLED": "1"}, "SWA_ENABLED=1"),
        ({"NUM_LAYERS": "many"}, "NUM_LAYERS: expected a number, got 'many'"),
        ({"LN_SCALE": "yes"}, "LN_SCALE: expected 0 or 1, got 'yes'"),
        ({"NUM_LAYERS": "0"}, r"model\.num_layers: expected 1 to 256, got 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(pr832(), variables)
