"""The public API reproduces the numbers that the reference itself produced (golden/README.md)."""

from typing import Any

import pytest
import torch

from bytejepa import presets
from bytejepa.config import OptimizerConfig, TrainingConfig
from bytejepa.interop import pr832
from bytejepa.model.jepa import sigreg
from bytejepa.model.ngram_embedding import BigramHash
from bytejepa.model.transformer import ByteLM
from bytejepa.training import schedule
from bytejepa.training.averaging import WeightAverage
from bytejepa.training.distributed import Ranks
from bytejepa.training.optimizers import Optimizers
from reference_weights import golden, lcg_ids, reference_state_dict, sigreg_directions, wave

MODEL_FILES = ("small", "ragged_chunks", "no_jepa")


def golden_model(config: dict[str, Any]) -> ByteLM:
    directions = sigreg_directions(config["jepa_latent_dim"]) if config["jepa_chunk_size"] else None
    return pr832.build(config, reference_state_dict(config), sigreg_directions=directions)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_logits(name: str) -> None:
    numbers, arrays = golden(name)
    ids = torch.from_numpy(arrays["ids"]).long()
    logits = golden_model(numbers["config"]).logits(ids[:, :-1])
    torch.testing.assert_close(logits, torch.from_numpy(arrays["logits"]), rtol=0, atol=2e-4)
    torch.testing.assert_close(logits[-1, -1], torch.tensor(numbers["logits_last_row"]), rtol=0, atol=2e-4)
    assert logits.abs().mean().item() == pytest.approx(numbers["logits_abs_mean"], abs=2e-4)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_losses_and_every_gradient(name: str) -> None:
    numbers, arrays = golden(name)
    model = golden_model(numbers["config"])
    ids = lcg_ids(numbers["salt"], numbers["batch"], numbers["seq_len"])
    losses = model.losses(ids[:, :-1], ids[:, 1:])
    assert losses.ce.item() == pytest.approx(numbers["ce"], abs=2e-4)
    assert losses.jepa_prediction.item() == pytest.approx(numbers["jepa_pred_loss"], abs=2e-4)
    assert losses.sigreg.item() == pytest.approx(numbers["sigreg"], abs=2e-4)
    latent = losses.jepa_prediction + numbers["sigreg_weight"] * losses.sigreg
    (losses.ce + numbers["loss_weight_lambda"] * latent).backward()
    parameters = pr832.reference_parameters(model)
    assert sum(p.numel() for p in parameters.values()) == numbers["params"]
    norms = {key: p.grad.double().norm().item() for key, p in parameters.items()}
    assert norms == pytest.approx(numbers["grad_norms"], rel=1e-5)
    whole = {key.removeprefix("grad:"): value for key, value in arrays.items() if key.startswith("grad:")}
    assert whole
    for key, given in whole.items():
        expected = torch.from_numpy(given)
        assert ((parameters[key].grad - expected).norm() / expected.norm()).item() < 1e-5, key


def test_twelve_training_steps_and_their_average() -> None:
    trace, _ = golden("train_trace")
    model = golden_model(trace["config"])
    optimizers = Optimizers(model, OptimizerConfig(), Ranks())
    average = WeightAverage(model, TrainingConfig(ema_decay=0.997, ema_warmup=False))
    for row in trace["rows"]:
        ids = lcg_ids(trace["first_salt"] + row["step"], trace["batch"], trace["seq_len"])
        losses = model.losses(ids[:, :-1], ids[:, 1:])
        optimizers.zero_grad()
        (losses.ce + row["jepa_lambda"] * (losses.jepa_prediction + 0.02 * losses.sigreg)).backward()
        norm = optimizers.step(learning_rate_scale=row["lr_scale"], momentum=row["momentum"])
        average.update(step=row["step"] + 1, progress=0.0)
        seen = [losses.ce.item(), losses.jepa_prediction.item(), losses.sigreg.item(), norm.item()]
        assert seen == pytest.approx([row[key] for key in ("ce", "pred", "sigreg", "grad_norm")], rel=2e-3)
    parameters = pr832.reference_parameters(model)
    final = {key: p.double().norm().item() for key, p in parameters.items()}
    assert final == pytest.approx(trace["final_param_norms"], rel=2e-3)
    by_our_name = average.state()
    averaged = {key: by_our_name[pr832.our_name(key)].double().norm().item() for key in parameters}
    assert averaged == pytest.approx(trace["ema_param_norms"], rel=2e-3)


@pytest.mark.parametrize(("preset", "parameters"), [("pr832", 24_625_001), ("pr832-no-jepa", 24_165_993)])
def test_parameters_at_full_size(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        model = ByteLM(presets.preset(preset))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_bigram_rows() -> None:
    table = golden("tables")[0]["bigram_rows"]
    assert BigramHash(table["table"], 1, 1).row_indices(torch.tensor(table["ids"])).tolist() == table["rows"]


def test_lambda_by_step() -> None:
    config = presets.pr832()
    for step, expected in golden("tables")[0]["jepa_lambda"]:
        progress = step / config.schedule.steps
        assert schedule.jepa_lambda(config.jepa, progress) == pytest.approx(expected, rel=1e-9, abs=1e-15), step


def test_learning_rate_scale_by_step_and_time() -> None:
    config = presets.pr832().schedule
    for row in golden("tables")[0]["lr_scale"]:
        elapsed_s = row["elapsed_ms"] / 1000
        progress = schedule.progress(config, step=row["step"], num_bytes=0, elapsed_s=elapsed_s)
        scale = schedule.learning_rate_scale(config, progress=progress, step=row["step"], elapsed_s=elapsed_s)
        assert scale == pytest.approx(row["scale"], rel=1e-9), row


def test_muon_momentum_by_step() -> None:
    for step, expected in golden("tables")[0]["muon_momentum"]:
        assert schedule.muon_momentum(presets.pr832().optimizer, step) == pytest.approx(expected, rel=1e-12), step


def test_sigreg_values() -> None:
    table = golden("tables")[0]["sigreg"]
    z = torch.tensor(wave("sig_probe", 60 * 12), dtype=torch.float32).reshape(60, 12)
    directions = sigreg_directions(12, name="sig_dirs")
    assert sigreg(z, directions).item() == pytest.approx(table["value"], rel=1e-4)
    assert sigreg(z**3, directions).item() == pytest.approx(table["value_of_z_cubed"], rel=1e-4)
    assert sigreg(torch.ones_like(z), directions).item() == pytest.approx(table["value_of_ones"], rel=1e-4)


def test_the_rebuilt_inputs_are_the_files_own() -> None:
    for name in MODEL_FILES:
        numbers, arrays = golden(name)
        ids = lcg_ids(numbers["salt"], numbers["batch"], numbers["seq_len"])
        assert torch.equal(ids, torch.from_numpy(arrays["ids"]).long())
