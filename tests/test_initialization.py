"""Initial weights: as the table in `bytejepa.model.initialization` says, a function of configuration and seed."""

import math

import pytest
import torch

from bytejepa.model.initialization import generator, initialize
from bytejepa.model.transformer import ByteLM
from small_models import random_ids, small_config


def made(**model: object) -> dict[str, torch.Tensor]:
    """Weights of 2 blocks of width 64."""
    sizes = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "rotary_dims": 4, "bigram_dim": 16, **model}
    return dict(initialize(ByteLM(small_config(model=sizes)), 7).named_parameters())


def test_large_matrices_are_orthogonal() -> None:
    weights = made()
    for name in ("query", "output"):
        w = weights[f"blocks.0.attention.{name}.weight"]
        gain = 1.0 if name == "query" else 1 / 4  # 1 / (2 * 2 layers)
        torch.testing.assert_close(w @ w.T, gain * torch.eye(64), rtol=0, atol=1e-5)
    up = weights["blocks.1.mlp.up.weight"]  # (128, 64): columns are orthonormal
    torch.testing.assert_close(up.T @ up, torch.eye(64), rtol=0, atol=1e-5)


def test_small_matrices_and_jepa_are_uniform_as_torch_makes_linear_layers() -> None:
    weights = made()
    for name in ("blocks.0.attention.key.weight", "jepa.projector.up.weight", "jepa.predictor.down.weight"):
        w = weights[name]
        bound = 1 / math.sqrt(w.size(1))
        assert 0.9 * bound < w.abs().max().item() <= bound, name
        assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name


def test_what_starts_at_zero() -> None:
    default = {"bigram.embedding.weight", "smear.gate", "jepa.injection.weight"}
    assert {name for name, p in made().items() if not p.any()} == default
    reference = made(bigram_projection_init="zero", output_projection_init="zero")
    ends = {f"blocks.{i}.{end}.weight" for i in range(2) for end in ("attention.output", "mlp.down")}
    assert {name for name, p in reference.items() if not p.any()} == default | ends | {"bigram.projection.weight"}


def test_vectors_scalars_and_embeddings() -> None:
    weights = made(query_gain=1.25)
    assert weights["token_embedding.weight"].std().item() == pytest.approx(0.005, rel=0.02)
    assert weights["bigram.scale"].item() == pytest.approx(0.05)
    assert weights["jepa.start"].std().item() == pytest.approx(0.02, rel=0.6)
    for name in ("skip_weights", "blocks.0.attention_scale", "blocks.1.mlp_scale"):
        assert torch.equal(weights[name], torch.ones_like(weights[name]))
    assert torch.equal(weights["blocks.0.residual_mix"], torch.stack((torch.ones(64), torch.zeros(64))))
    assert torch.equal(weights["blocks.0.attention.query_gain"], torch.full((4,), 1.25))


@pytest.mark.parametrize("num_layers", [2, 8])
def test_branches_start_at_one_over_the_root_of_twice_the_depth(num_layers: int) -> None:
    """In `pr832` the factor multiplies zero (spec section 7, item 5); in `default` it is there."""
    down = made(num_layers=num_layers)["blocks.1.mlp.down.weight"]
    torch.testing.assert_close(torch.linalg.svdvals(down), torch.full((64,), (2 * num_layers) ** -0.5))


def test_scaled_projections_have_an_effect_on_the_output() -> None:
    ids = random_ids(1, 12)
    models = [
        initialize(ByteLM(small_config(model={"output_projection_init": kind})), 0) for kind in ("scaled", "zero")
    ]
    assert not torch.allclose(models[0].logits(ids), models[1].logits(ids), atol=1e-4)


def test_the_seed_decides_everything() -> None:
    first, again, other = (initialize(ByteLM(small_config()), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_a_weight_does_not_depend_on_what_else_the_model_has() -> None:
    with_jepa = initialize(ByteLM(small_config()), 1).state_dict()
    without = initialize(ByteLM(small_config(jepa={"enabled": False}, model={"smear": False})), 1).state_dict()
    assert all(torch.equal(with_jepa[name], value) for name, value in without.items())


def test_the_global_generator_changes_nothing() -> None:
    made = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        made.append(initialize(ByteLM(small_config()), 0).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_generators_differ_by_seed_purpose_and_step() -> None:
    made = {torch.rand(1, generator=generator(*key)).item() for key in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 1))}
    assert len(made) == 4
