"""Quantisation-aware training: it sees the weights that the artifact will hold, compiled too, from where it says."""

import pytest
import torch

from bytejepa.artifact.export import export
from bytejepa.artifact.packing import restore
from bytejepa.artifact.store import store_weights
from bytejepa.config import RunConfig, replace
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM
from bytejepa.training.gradient_step import GradientStep
from bytejepa.training.runlog import RunFolder
from bytejepa.training.runs import train


def quiet(config: RunConfig, **sections) -> RunConfig:
    sections["training"] = {"validate_every_steps": None, "validation_bytes": 200, **sections.get("training", {})}
    return replace(config, **sections)


def quantized_loss(config: RunConfig, *, compile: bool) -> tuple[float, float, float]:  # noqa: A002 - torch's word
    model = initialize(ByteLM(config), 0)
    ids = torch.randint(4, 260, (2, 65), generator=torch.Generator().manual_seed(0))
    step = GradientStep(model, config, compile=compile)
    plain = float(step(ids[:, :-1], ids[:, 1:], jepa_lambda=0.0, quantized=False).ce)
    through = float(step(ids[:, :-1], ids[:, 1:], jepa_lambda=0.0, quantized=True).ce)
    stored = store_weights({name: p.detach() for name, p in model.named_parameters()}, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks."):
                parameter.copy_(restore(stored[name]) if parameter.ndim == 2 else parameter)
        return plain, through, float(model.losses(ids[:, :-1], ids[:, 1:]).ce)


QUANTISERS = (
    {"matrix_bits": 2},
    {"matrix_bits": 3, "clip": "max"},
    {"matrix_bits": 3, "clip": "standard_deviations", "clip_standard_deviations": 2.5, "scale_digits": 3},
    {"scales": "reference_floor", "clip": "max"},
)


@pytest.mark.parametrize("settings", QUANTISERS)
def test_quantization_aware_training_sees_the_weights_that_the_artifact_will_hold(minimal_config, settings) -> None:
    config = replace(minimal_config, artifact={"small_tensor_elements": 1024, **settings})
    plain, through, quantized = quantized_loss(config, compile=False)
    assert through == pytest.approx(quantized, abs=1e-6)
    assert abs(through - plain) > 1e-5


def test_matrices_that_the_artifact_keeps_as_they_are_are_trained_as_they_are(minimal_config) -> None:
    config = replace(minimal_config, artifact={"matrix_bits": 2, "small_tensor_elements": 1 << 20})
    plain, through, _ = quantized_loss(config, compile=False)
    assert through == plain


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("settings", [QUANTISERS[0], QUANTISERS[2]])
def test_quantization_aware_training_takes_effect_when_compiled(minimal_config, settings) -> None:
    config = replace(minimal_config, artifact={"small_tensor_elements": 1024, **settings})
    plain, through, quantized = quantized_loss(config, compile=True)
    assert through == pytest.approx(quantized, abs=1e-5)
    assert abs(through - plain) > 1e-5


def test_quantization_aware_training_lowers_what_rounding_costs(minimal_config, embedded_shards, tmp_path) -> None:
    settings = {"matrix_bits": 2, "clip": "max", "small_tensor_elements": 512}
    costs = {}
    for start in (None, 0.0):
        config = quiet(minimal_config, artifact=settings, training={"qat_start": start}, schedule={"steps": 40})
        train(config, embedded_shards, tmp_path / str(start))
        scores = export(tmp_path / str(start), tmp_path / f"{start}.bjm", score_bytes=1000).scores
        costs[start] = scores["artifact"].bpb - scores["average"].bpb
    assert costs[0.0] < 0.5 * costs[None]


def test_late_quantization_begins_where_it_says(minimal_config, embedded_shards, tmp_path) -> None:
    for name, start in (("never", None), ("late", 0.5)):
        config = quiet(
            minimal_config,
            artifact={"matrix_bits": 2, "small_tensor_elements": 512},
            training={"qat_start": start, "log_every_steps": 1},
        )
        train(config, embedded_shards, tmp_path / name)
    never, late = (
        [line["train_loss_nats"] for line in RunFolder(tmp_path / name).read_metrics() if "train_loss_nats" in line]
        for name in ("never", "late")
    )
    assert never[:3] == late[:3]
    assert never[3] != late[3]
