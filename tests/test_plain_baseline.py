"""The plain writing of the reference reproduces the numbers that the reference itself produced (golden/README.md)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bytejepa.benchmark.plain import (
    PlainConfig,
    PlainJepa,
    PlainModel,
    build_plain_optimizers,
    newton_schulz,
    plain_train_step,
    sigreg,
    start_ema,
)
from reference_weights import golden, lcg_ids, reference_state_dict, sigreg_directions, wave

MODEL_FILES = ("small", "ragged_chunks", "no_jepa")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain_config(numbers: dict[str, Any]) -> PlainConfig:
    """The golden files write "no JEPA" as a chunk of 0 bytes."""
    jepa = None
    if numbers["jepa_chunk_size"]:
        jepa = PlainJepa(
            chunk_size=numbers["jepa_chunk_size"],
            latent_dim=numbers["jepa_latent_dim"],
            hidden_dim=numbers["jepa_proj_hidden"],
        )
    return PlainConfig(
        num_layers=numbers["num_layers"],
        model_dim=numbers["model_dim"],
        num_heads=numbers["num_heads"],
        num_kv_heads=numbers["num_kv_heads"],
        mlp_ratio=numbers["mlp_mult"],
        bigram_rows=numbers["bigram_vocab_size"],
        bigram_dim=numbers["bigram_dim"],
        xsa_last_layers=numbers["xsa_last_n"],
        rotary_dims=numbers["rope_dims"],
        jepa=jepa,
    )


def golden_model(numbers: dict[str, Any]) -> PlainModel:
    model = PlainModel(plain_config(numbers))
    model.load_state_dict(reference_state_dict(numbers))
    if numbers["jepa_chunk_size"]:
        model.sigreg_directions.copy_(sigreg_directions(numbers["jepa_latent_dim"]))
    return model


@pytest.mark.parametrize("name", MODEL_FILES)
def test_logits(name: str) -> None:
    numbers, arrays = golden(name)
    model = golden_model(numbers["config"])
    ids = torch.from_numpy(arrays["ids"]).long()
    logits = model.logits(ids[:, :-1])
    torch.testing.assert_close(logits, torch.from_numpy(arrays["logits"]), rtol=0, atol=2e-4)
    torch.testing.assert_close(logits[-1, -1], torch.tensor(numbers["logits_last_row"]), rtol=0, atol=2e-4)
    assert logits.abs().mean().item() == pytest.approx(numbers["logits_abs_mean"], abs=2e-4)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_losses_and_gradients(name: str) -> None:
    numbers, arrays = golden(name)
    model = golden_model(numbers["config"])
    assert sum(p.numel() for p in model.parameters()) == numbers["params"]
    ids = lcg_ids(numbers["salt"], numbers["batch"], numbers["seq_len"])
    ce, prediction, regulariser = model.losses(ids[:, :-1], ids[:, 1:])
    assert ce.item() == pytest.approx(numbers["ce"], abs=2e-4)
    assert prediction.item() == pytest.approx(numbers["jepa_pred_loss"], abs=2e-4)
    assert regulariser.item() == pytest.approx(numbers["sigreg"], abs=2e-4)
    (ce + numbers["loss_weight_lambda"] * (prediction + numbers["sigreg_weight"] * regulariser)).backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    assert {key: g.double().norm().item() for key, g in gradients.items()} == pytest.approx(
        numbers["grad_norms"], rel=1e-3
    )
    for key, expected in arrays.items():
        if key.startswith("grad:"):
            given = torch.from_numpy(expected)
            error = (gradients[key.removeprefix("grad:")] - given).norm() / given.norm()
            assert error.item() < 1e-3, key


def test_training_trace() -> None:
    trace, _ = golden("train_trace")
    model = golden_model(trace["config"])
    optimizers, ema = build_plain_optimizers(model), start_ema(model)
    for row in trace["rows"]:
        ids = lcg_ids(trace["first_salt"] + row["step"], trace["batch"], trace["seq_len"])
        step = plain_train_step(
            model,
            optimizers,
            ema,
            ids[:, :-1],
            ids[:, 1:],
            lr_scale=row["lr_scale"],
            momentum=row["momentum"],
            jepa_lambda=row["jepa_lambda"],
        )
        seen = {
            "ce": step.ce.item(),
            "pred": step.prediction.item(),
            "sigreg": step.sigreg.item(),
            "grad_norm": step.grad_norm.item(),
        }
        assert seen == pytest.approx({key: row[key] for key in seen}, rel=2e-3), row["step"]
    final = {key: p.double().norm().item() for key, p in model.named_parameters()}
    assert final == pytest.approx(trace["final_param_norms"], rel=2e-3)
    averaged = {key: p.double().norm().item() for key, p in ema.items()}
    assert averaged == pytest.approx(trace["ema_param_norms"], rel=2e-3)


def test_bigram_rows() -> None:
    table = golden("tables")[0]["bigram_rows"]
    with torch.device("meta"):
        bigram = PlainModel(PlainConfig(bigram_rows=table["table"])).bigram
    assert bigram.rows(torch.tensor(table["ids"])).tolist() == table["rows"]


def test_sigreg_values() -> None:
    table = golden("tables")[0]["sigreg"]
    z = torch.tensor(wave("sig_probe", 60 * 12), dtype=torch.float32).reshape(60, 12)
    directions = sigreg_directions(12, name="sig_dirs")
    assert sigreg(z, directions).item() == pytest.approx(table["value"], rel=1e-3)
    assert sigreg(z**3, directions).item() == pytest.approx(table["value_of_z_cubed"], rel=1e-3)
    assert sigreg(torch.ones_like(z), directions).item() == pytest.approx(table["value_of_ones"], rel=1e-3)


def test_parameter_counts_at_full_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in PlainModel(PlainConfig()).parameters()) == 24_625_001
        assert sum(p.numel() for p in PlainModel(PlainConfig(jepa=None)).parameters()) == 24_165_993


def test_initialisation() -> None:
    model = PlainModel(PlainConfig(num_layers=2, model_dim=128, num_heads=4, num_kv_heads=2, jepa=PlainJepa()), seed=3)
    weights = dict(model.named_parameters())
    q = weights["blocks.0.attn.c_q.weight"]
    torch.testing.assert_close(q @ q.T, torch.eye(128), rtol=0, atol=1e-5)
    zero = [key for key, p in weights.items() if not p.any()]
    assert zero == [
        "bigram.embed.weight",
        "bigram.proj.weight",
        "smear.gate",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.proj.weight",
        "blocks.1.attn.proj.weight",
        "blocks.1.mlp.proj.weight",
        "jepa_injection.weight",
    ]
    assert weights["tok_emb.weight"].std().item() == pytest.approx(0.005, rel=0.02)
    again = PlainModel(model.config, seed=3)
    assert all(torch.equal(p, weights[key]) for key, p in again.named_parameters())
    assert torch.equal(again.sigreg_directions, model.sigreg_directions)


def test_no_position_sees_what_follows() -> None:
    numbers, arrays = golden("ragged_chunks")
    model = golden_model(numbers["config"])
    ids = torch.from_numpy(arrays["ids"]).long()[:, :-1]
    changed = ids.clone()
    changed[:, 20] = 4 + (changed[:, 20] - 3) % 256
    moved = (model.logits(ids) - model.logits(changed)).abs().amax(dim=(0, 2)) > 1e-5
    assert not moved[:20].any()
    assert moved[20]


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(g, steps=5))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_less_than_one_chunk_is_scored_without_injection() -> None:
    numbers, arrays = golden("small")
    model = golden_model(numbers["config"])
    ids = torch.from_numpy(arrays["ids"]).long()[:, :-1]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids[:, :5]), model.head(model.hidden(ids[:, :5])), rtol=0, atol=0)
