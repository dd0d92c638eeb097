"""Lines of a training log in the form that the challenge's scripts print and its reviewers read (spec section 8)."""

from __future__ import annotations

import dataclasses

from bytejepa.config import RunConfig
from bytejepa.data.vocabulary import VOCABULARY_SIZE
from bytejepa.scoring.evaluate import Score


def settings_lines(config: RunConfig) -> list[str]:
    """Return every setting of a run as `name: value`, in the order of the configuration."""
    found = {"seed": config.training.seed, "vocab_size": VOCABULARY_SIZE}
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            name = field.name if field.name not in found else f"{section.name}_{field.name}"
            found |= {name: getattr(values, field.name)} if name != "training_seed" else {}
    return [f"{name}: {value}" for name, value in found.items()]


def train_line(config: RunConfig, *, step: int, loss_nats: float, elapsed_s: float) -> str:
    """Return the line of a training step; the planned steps are 0 where the run is bounded by time or bytes alone."""
    return f"step:{step}/{config.schedule.steps or 0} train_loss:{loss_nats:.4f} {_time(step, elapsed_s)}"


def end_line(config: RunConfig, *, step: int, elapsed_s: float) -> str:
    """Return the line that ends the training."""
    return f"step:{step}/{config.schedule.steps or 0} training ended {_time(step, elapsed_s)}"


def validation_line(config: RunConfig, score: Score, *, step: int, elapsed_s: float) -> str:
    """Return the line of a validation while training."""
    return f"step:{step}/{config.schedule.steps or 0} {_score(score, 4)} {_time(step, elapsed_s)}"


def size_lines(config: RunConfig, *, weights_bytes: int, code_bytes: int) -> list[str]:
    """Return the lines that say what the artifact weighs."""
    method = method_of(config)
    return [
        f"Code size: {code_bytes} bytes",
        f"Serialized model {method}: {weights_bytes} bytes",
        f"Total submission size {method}: {weights_bytes + code_bytes} bytes",
    ]


def counts_line(score: Score, num_documents: int) -> str:
    """Return the line that says how much text was scored."""
    return f"val_bytes:{score.num_bytes} val_documents:{num_documents} targets:{score.num_targets}"


def final_line(config: RunConfig, score: Score, *, kind: str, evaluation_s: float) -> str:
    """Return the line of a score of the packed model; `kind` is roundtrip or sliding_window."""
    label = f"final_int{config.artifact.matrix_bits}_{kind}_exact"
    return f"{label} {_score(score, 8)} stride:{score.stride} eval_time:{1000 * evaluation_s:.0f}ms"


def average_line(score: Score) -> str:
    """Return the line of the score of the averaged weights before they are packed."""
    return f"pre_quant_average {_score(score, 8)}"


def method_of(config: RunConfig) -> str:
    """Return how weights are stored, as in `int6+zstd`."""
    return "+".join((f"int{config.artifact.matrix_bits}", *config.artifact.codecs))


def loss_nats(score: Score) -> float:
    """Return the mean loss a target, in nats."""
    return score.nats / score.num_targets


def _score(score: Score, digits: int) -> str:
    return f"val_loss:{loss_nats(score):.{digits}f} val_bpb:{score.bpb:.{digits}f}"


def _time(step: int, elapsed_s: float) -> str:
    return f"train_time:{1000 * elapsed_s:.0f}ms step_avg:{1000 * elapsed_s / max(step, 1):.2f}ms"


def parameters_line(num_parameters: int) -> str:
    """Return the line that counts the parameters."""
    return f"model_params:{num_parameters}"
