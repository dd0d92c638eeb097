"""JEPA: injection, both losses, what each trains, SIGReg's laws, diagnostics, the lambda schedule."""

from typing import Any

import pytest
import torch

from bytejepa.config import JepaConfig, replace
from bytejepa.model.initialization import fill_sigreg_directions
from bytejepa.model.jepa import Latents, effective_rank, explained_variance, sigreg
from bytejepa.model.transformer import ByteLM
from bytejepa.training.schedule import jepa_lambda
from small_models import BOS, random_ids, small_model

PROJECTOR = {"jepa.projector.up.weight", "jepa.projector.down.weight"}
PREDICTOR = {"jepa.predictor.up.weight", "jepa.predictor.down.weight", "jepa.start"}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(dim: int = 12, count: int = 32) -> torch.Tensor:
    d = normal(dim, count, seed=99)
    return d / d.norm(dim=0)


def trained_by(loss: str, **jepa: Any) -> set[str]:
    """Names of the parameters that `loss` gives a gradient."""
    model = small_model(jepa=jepa)
    ids = random_ids(2, 25)
    getattr(model.losses(ids[:, :-1], ids[:, 1:]), loss).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_detached_losses_train_the_side_path_only() -> None:
    assert trained_by("jepa_prediction", gradient="detached") == PROJECTOR | PREDICTOR
    assert trained_by("sigreg", gradient="detached") == PROJECTOR


def test_backbone_gradients_shape_the_backbone() -> None:
    trained = trained_by("sigreg", gradient="backbone")
    assert trained >= PROJECTOR | {
        "token_embedding.weight",
        "blocks.0.mlp.up.weight",
        "blocks.2.attention.query.weight",
    }
    assert "jepa.injection.weight" not in trained
    assert trained_by("jepa_prediction", gradient="backbone") >= trained | PREDICTOR


def test_the_byte_loss_trains_the_side_path_unless_detached() -> None:
    side_path = PROJECTOR | PREDICTOR
    assert trained_by("ce", gradient="backbone") >= side_path | {"jepa.injection.weight"}
    assert trained_by("ce", gradient="detached") & (side_path | {"jepa.injection.weight"}) == {"jepa.injection.weight"}
    assert not trained_by("ce", gradient="backbone", inject=False) & (side_path | {"jepa.injection.weight"})


def test_the_prediction_loss_does_not_move_its_target() -> None:
    model = small_model()
    latents = model.hidden(random_ids(2, 24))[1]
    target = latents.target.detach().requires_grad_()
    model.jepa.prediction_loss(Latents(target, latents.predicted, latents.context)).backward()
    assert target.grad is None


def test_prediction_loss_is_the_mean_squared_error() -> None:
    model = small_model()
    latents = model.hidden(random_ids(2, 24))[1]
    expected = (latents.predicted - latents.target).square().mean()
    torch.testing.assert_close(model.jepa.prediction_loss(latents), expected)


def test_every_horizon_counts_alike_and_none_reaches_across_a_document() -> None:
    model = small_model(jepa={"horizons": 3}, model={"document_masking": True})
    ids = random_ids(2, 24)
    ids[1, 13] = BOS  # within the fourth of six chunks
    ids[1, 20] = BOS  # where the last one begins, which is predicted from the start token
    starts = ids == BOS
    latents = model.hidden(ids)[1]
    z = latents.target
    errors = (latents.predicted - z).square().mean(-1)
    errors[1, 3] = 0
    expected = [errors.mean()]
    for ahead, predictor in enumerate(model.jepa.further_predictors, start=2):
        errors = (predictor(z[:, :-ahead]) - z[:, ahead:]).square().mean(-1)
        for c in range(6 - ahead):
            if c < 3 <= c + ahead or c < 5 <= c + ahead:
                errors[1, c] = 0
        expected.append(errors.mean())
    torch.testing.assert_close(model.jepa.prediction_loss(latents, starts), torch.stack(expected).mean())
    losses = model.losses(ids[:, :7], ids[:, 1:8])  # one whole chunk: no horizon beyond the first
    assert losses.jepa_prediction > 0


def test_no_latent_loss_teaches_a_document_to_foresee_the_next_one() -> None:
    options = {"horizons": 3, "next_bytes_weight": 0.5}
    model = small_model(jepa=options, model={"document_masking": True})
    ids = random_ids(1, 24)
    ids[0, 10] = BOS  # within the third chunk
    other = ids.clone()
    other[0, 11:12] = 4 + (ids[0, 11:12] + 7) % 256  # the rest of that chunk
    assert not torch.equal(ids, other)
    losses = []
    for given in (ids, other):
        latents = model.hidden(given)[1]
        starts = given == BOS
        before = Latents(latents.target[:, :3], latents.predicted[:, :3], latents.context[:, :3])
        losses.append((
            model.jepa.prediction_loss(before, starts[:, :12]),
            model.jepa.next_bytes_loss(before.predicted, given[:, :12], starts[:, :12]),
        ))  # fmt: skip
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert ours > 0


def test_a_mean_over_documents_does_not_depend_on_how_a_batch_is_divided() -> None:
    model = small_model(jepa={"horizons": 3, "next_bytes_weight": 0.5}, model={"document_masking": True})
    ids = random_ids(4, 24)
    ids[1, 13] = ids[3, 5] = ids[3, 20] = BOS
    whole, first, second = (model.losses(part, part) for part in (ids, ids[:2], ids[2:]))
    for name in ("jepa_prediction", "next_bytes"):
        halves = (getattr(first, name) + getattr(second, name)) / 2
        torch.testing.assert_close(getattr(whole, name), halves, rtol=0, atol=1e-6)


def test_further_horizons_shape_the_backbone_and_train_their_predictors() -> None:
    trained = trained_by("jepa_prediction", horizons=2)
    assert {name for name in trained if name.startswith("jepa.further_predictors")}
    assert "blocks.0.mlp.up.weight" in trained


def test_next_bytes_of_a_chunk_are_predicted_from_what_came_before_it() -> None:
    model = small_model(jepa={"next_bytes_weight": 0.5})
    ids = random_ids(2, 23)
    latents = model.hidden(ids)[1]
    logits = model.jepa.byte_head(latents.predicted).unflatten(-1, (4, 260))
    expected = [
        torch.nn.functional.cross_entropy(logits[b, c, p], ids[b, 4 * c + p])
        for b in range(2) for c in range(5) for p in range(4)
    ]  # fmt: skip
    torch.testing.assert_close(model.losses(ids, ids).next_bytes, torch.stack(expected).mean())
    assert "jepa.byte_head.weight" in trained_by("next_bytes", next_bytes_weight=0.5)
    assert "blocks.0.mlp.up.weight" in trained_by("next_bytes", next_bytes_weight=0.5)
    assert small_model().losses(ids, ids).next_bytes == 0


def test_the_causal_context_is_the_last_residual_of_the_chunk() -> None:
    model = small_model(jepa={"context": "causal"})
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    latents = model.jepa.latents(x)
    last = x[:, 3] / x[:, 3].square().mean().sqrt()
    torch.testing.assert_close(latents.predicted[:, 1], model.jepa.predictor(last), rtol=1e-4, atol=1e-5)


def test_latents_are_one_a_whole_chunk() -> None:
    model = small_model()
    for length, chunks in ((3, 0), (4, 1), (23, 5)):
        latents = model.hidden(random_ids(2, length))[1]
        assert latents.target.shape == latents.predicted.shape == (2, chunks, 16)


def test_a_prediction_depends_on_the_chunks_before_it_only() -> None:
    model = small_model()
    ids, other = random_ids(1, 24), random_ids(1, 24, seed=5)
    other[:, :12] = ids[:, :12]
    ours, theirs = model.hidden(ids)[1], model.hidden(other)[1]
    torch.testing.assert_close(ours.predicted[:, :4], theirs.predicted[:, :4], rtol=0, atol=1e-5)
    assert not torch.allclose(ours.predicted[:, 4:], theirs.predicted[:, 4:], atol=1e-3)
    assert not torch.allclose(ours.target[:, 3:], theirs.target[:, 3:], atol=1e-3)


def test_latents_before_a_bos_change_none_after_it() -> None:
    model = small_model(model={"document_masking": True})
    ids, other = random_ids(1, 24, seed=1), random_ids(1, 24, seed=2)
    ids[:, 10] = 1  # within chunk 2
    other[:, 10:] = ids[:, 10:]
    ours, theirs = model.hidden(ids)[1], model.hidden(other)[1]
    torch.testing.assert_close(ours.target[:, 2:], theirs.target[:, 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.predicted[:, 3:], theirs.predicted[:, 3:], rtol=0, atol=1e-5)


def test_injection_off_leaves_the_backbone_alone_but_keeps_the_losses() -> None:
    model = small_model()
    off = ByteLM(replace(model.config, jepa={"inject": False}))
    off.load_state_dict(model.state_dict())
    fill_sigreg_directions(off, 0)
    ids = random_ids(2, 24)
    with torch.no_grad():
        assert not torch.allclose(model.logits(ids), off.logits(ids), atol=1e-3)
        model.jepa.injection.weight.zero_()
        torch.testing.assert_close(model.logits(ids), off.logits(ids), rtol=0, atol=1e-6)
        assert off.losses(ids, ids).jepa_prediction.item() > 0


@pytest.mark.parametrize("standardize", [True, False])
def test_sigreg_does_not_depend_on_the_order_of_samples(standardize: bool) -> None:
    z = normal(60, 12)
    shuffled = z[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    values = [sigreg(s, directions(), standardize=standardize).item() for s in (z, shuffled)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_standardised_sigreg_is_blind_to_mean_and_scale() -> None:
    z = normal(60, 12)
    moved = 0.01 * z * torch.linspace(1, 5, 12) + 40
    assert sigreg(z, directions()).item() == pytest.approx(sigreg(moved, directions()).item(), rel=1e-6)


def test_sigreg_of_default_objects_to_a_collapse() -> None:
    z = normal(4000, 12)
    value = {name: sigreg(s, directions(), standardize=False).item() for name, s in
             {"normal": z, "small": 0.05 * z, "large": 5 * z, "shifted": z + 0.6}.items()}  # fmt: skip
    assert value["normal"] < 1e-3
    assert min(value["small"], value["large"], value["shifted"]) > 50 * value["normal"]


def test_sigreg_falls_when_it_is_minimised() -> None:
    z = (0.05 * normal(200, 12) + 0.5).requires_grad_()
    before = sigreg(z, directions(), standardize=False)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        sigreg(z, directions(), standardize=False).backward()
        optimizer.step()
    assert sigreg(z, directions(), standardize=False) < 0.1 * before
    assert z.std().item() > 0.5
    assert abs(z.mean().item()) < 0.2


def test_sigreg_groups_are_samples_of_their_own() -> None:
    """With a fixed group the loss of a batch is the mean over its parts: ranks and micro-batches change nothing."""
    model = small_model(jepa={"sigreg_group_sequences": 2})
    ids = random_ids(6, 24)
    whole = model.losses(ids, ids).sigreg.item()
    parts = [model.losses(part, part).sigreg.item() for part in ids.split(2)]
    assert whole == pytest.approx(sum(parts) / 3, rel=1e-5)
    everything = small_model(jepa={"sigreg_group_sequences": None})
    assert everything.losses(ids, ids).sigreg.item() != pytest.approx(whole, rel=1e-3)


def test_directions_are_unit_and_a_function_of_the_seed() -> None:
    first, same, other = small_model(seed=3), small_model(seed=3), small_model(seed=4)
    torch.testing.assert_close(first.jepa.directions.norm(dim=0), torch.ones(8))
    assert torch.equal(first.jepa.directions, same.jepa.directions)
    assert not torch.equal(first.jepa.directions, other.jepa.directions)
    assert "jepa.directions" not in first.state_dict()


def test_explained_variance_on_constructed_latents() -> None:
    z = normal(3, 40, 5).float() + 9
    mean = z.mean((0, 1)).expand_as(z)
    assert explained_variance(Latents(z, z, z)).item() == 1
    assert explained_variance(Latents(z, mean, z)).item() == pytest.approx(0, abs=1e-5)
    assert explained_variance(Latents(z, z + 0.5 * (mean - z), z)).item() == pytest.approx(0.75, abs=1e-4)
    assert explained_variance(Latents(z, mean + 3, z)).item() < -5


def test_effective_rank_on_constructed_latents() -> None:
    wide = normal(1, 5000, 6).float()
    assert effective_rank(wide).item() == pytest.approx(6, abs=0.1)
    assert effective_rank(wide * torch.tensor([1, 1, 0, 0, 0, 0])).item() == pytest.approx(2, abs=0.05)
    assert effective_rank(wide * torch.tensor([1, 0, 0, 0, 0, 0]) + 100).item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({}, {0: 0, 0.3: 0, 0.55: 0.5, 0.79999: 1, 0.8: 0, 1: 0}),
        ({"lambda_after": "hold"}, {0: 0, 0.3: 0, 0.55: 0.5, 0.8: 1, 1: 1}),
        ({"lambda_zero_until": 0.0, "lambda_ramp_until": 0.1, "lambda_after": "hold"}, {0: 0, 0.05: 0.5, 0.1: 1, 1: 1}),
        ({"lambda_zero_until": 0.0, "lambda_ramp_until": 0.0, "lambda_after": "hold"}, {0: 1, 1: 1}),
        ({"losses": False, "lambda_after": "hold"}, {0.5: 0, 1: 0}),
        ({"enabled": False, "lambda_after": "hold"}, {0.5: 0, 1: 0}),
    ],
)
def test_lambda_schedule(settings: dict[str, Any], values: dict[float, float]) -> None:
    config = JepaConfig(lambda_max=0.25, **settings)
    seen = {progress: jepa_lambda(config, progress) / 0.25 for progress in values}
    assert seen == pytest.approx(values, abs=1e-4)
