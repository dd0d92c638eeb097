"""GPTQ against rounding to nearest: the error that counts, the moments it needs, and the bits per byte of a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bytejepa.artifact.calibration import Calibration, InputMoments, calibrate
from bytejepa.artifact.fit import fit
from bytejepa.artifact.load import build, read_run
from bytejepa.artifact.packing import restore
from bytejepa.artifact.quantize import order_hidden_units, quantize_matrices, sensitive_scales
from bytejepa.artifact.store import store_weights
from bytejepa.artifact.write import calibration_sequences
from bytejepa.config import RunConfig, replace
from bytejepa.data.loader import IdStream
from bytejepa.errors import ArtifactError
from bytejepa.model import fused_mlp
from bytejepa.model.gptq import error_spread, gptq_rows
from bytejepa.model.layers import rms_norm
from bytejepa.model.quantization import ClipRule, dequantize, quantize_at, row_scales
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import compact
from bytejepa.training.runs import train
from small_models import random_ids, small_model

SIZE_BYTES = 15000
"""Of the small trained model's artifact: about four bits a weight."""


def correlated_inputs(count: int, columns: int, *, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random) / columns**0.5 + 0.3
    return torch.randn(count, columns, generator=random) @ mixing


def problem(columns: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(1))
    rule = ClipRule(kind="standard_deviations", standard_deviations=3.0)
    return weight, correlated_inputs(2 * columns, columns), row_scales(weight, bits=3, clip=rule)


def test_gptq_makes_less_of_the_error_that_counts_than_rounding_to_nearest() -> None:
    weight, inputs, scales = problem()
    spread = error_spread(inputs.T @ inputs)
    errors = [
        float((inputs @ (weight - dequantize(quantized)).T).norm())
        for quantized in (gptq_rows(weight, spread, scales, bits=3), quantize_at(weight, scales, bits=3))
    ]
    assert errors[0] < 0.6 * errors[1]


def test_its_gain_says_how_much_less() -> None:
    weight, inputs, scales = problem()
    scales = scales / 16  # steps so fine that rounding errors are uniform, and no code is clipped
    spread = error_spread(inputs.T @ inputs, damping=1e-6)
    squares = [
        float((inputs @ (weight - dequantize(quantized)).T).square().sum())
        for quantized in (gptq_rows(weight, spread, scales, bits=8), quantize_at(weight, scales, bits=8))
    ]
    assert squares[0] / squares[1] == pytest.approx(spread.gain, rel=0.2)


def test_inputs_without_correlation_leave_nothing_to_spread() -> None:
    weight, _, scales = problem()
    codes = gptq_rows(weight, error_spread(torch.eye(200)), scales, bits=3).codes
    assert torch.equal(codes, quantize_at(weight, scales, bits=3).codes)


def test_blocks_of_columns_change_nothing() -> None:
    """Against the algorithm's plain form: after each column the inverse of the remaining moments spreads its error."""
    weight, inputs, scales = problem(130)
    moments = (inputs.T @ inputs).double()
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    moments += 0.01 * moments.diagonal().mean() * torch.eye(130)
    left, codes = weight.double(), torch.zeros_like(weight)
    for number, column in enumerate(order):
        rest = order[number:]
        inverse = torch.linalg.inv(moments[rest][:, rest])
        codes[:, column] = torch.round(left[:, column] / scales).clamp(-3, 3).float()
        error = (left[:, column] - codes[:, column] * scales) / inverse[0, 0]
        left = left.clone()
        left[:, rest] -= error[:, None] * inverse[0]
    found = gptq_rows(weight, error_spread(inputs.T @ inputs), scales, bits=3).codes
    assert (found != codes).float().mean() < 0.002  # float32 against float64, where a weight lies between two codes


def test_impossible_problems_are_refused() -> None:
    weight, inputs, scales = problem()
    with pytest.raises(ArtifactError, match="not finite"):
        error_spread(torch.full((4, 4), torch.nan))
    spread = error_spread(inputs.T @ inputs)
    with pytest.raises(ArtifactError, match="needs 24 scales and moments of 100 inputs, got 24 and 200"):
        gptq_rows(weight[:, :100], spread, scales, bits=3)
    assert gptq_rows(weight, error_spread(torch.zeros(200, 200)), torch.zeros(24), bits=3).codes.count_nonzero() == 0


def test_inputs_that_need_more_damping_say_so() -> None:
    repeated = torch.zeros(128, 128)
    repeated[0, 0], repeated[1, 1] = 1.0, -1e-3  # as float32 sums of few inputs come out
    with pytest.raises(
        ArtifactError, match=r"cannot be inverted with a damping of 1e-06 \(use a larger artifact.gptq_damping"
    ):
        error_spread(repeated, damping=1e-6)
    assert error_spread(repeated, damping=1.0).gain <= 1


def inputs_by_hooks(model: ByteLM, ids: Tensor) -> dict[str, Tensor]:
    """The inputs of the matrices that a module's own forward multiplies, from its hooks."""
    seen = {}
    hooks = []
    for layer, block in enumerate(model.blocks):
        for part, names in ((block.attention, ("query", "key", "value")), (block.mlp, ("up",))):
            kind = "attention" if len(names) == 3 else "mlp"
            keys = [f"blocks.{layer}.{kind}.{name}.weight" for name in names]

            def see(_: nn.Module, args: tuple[Tensor, ...], keys: list[str] = keys, kind: str = kind) -> None:
                # the MLP is given the residual, and normalises it itself
                seen.update(dict.fromkeys(keys, rms_norm(args[0]) if kind == "mlp" else args[0]))

            hooks.append(part.register_forward_pre_hook(see))
    model.logits(ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_moments_are_those_of_what_each_matrix_multiplies() -> None:
    model = small_model()
    ids = random_ids(2, 24)
    with torch.no_grad():
        moments = InputMoments(model)
        with moments:
            logits = model.logits(ids)
        expected = inputs_by_hooks(model, ids)
        torch.testing.assert_close(logits, model.logits(ids))
    found = moments.by_name()
    for name, inputs in expected.items():
        torch.testing.assert_close(found[name], inputs.flatten(0, 1).T @ inputs.flatten(0, 1))
    matrices = {
        name
        for name, p in model.named_parameters()
        if p.ndim == 2 and not name.endswith(("residual_mix", "skip_weights"))
    }
    assert set(found) == matrices - {"bigram.embedding.weight"}  # which is looked up, never multiplied


def test_moments_are_seen_where_the_mlp_has_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model(), random_ids(2, 24)
    expected = calibrate(model, ids)
    monkeypatch.setattr(fused_mlp, "possible", {"cpu": True})
    monkeypatch.setattr(fused_mlp, "fits", lambda *_: True)
    found = calibrate(model, ids)
    assert found.spreads.keys() == expected.spreads.keys()
    for name, spread in found.spreads.items():
        assert spread.gain == pytest.approx(expected.spreads[name].gain, rel=1e-3)
    for name, sensitivity in found.sensitivity.items():
        torch.testing.assert_close(sensitivity, expected.sensitivity[name], rtol=1e-3, atol=1e-9)
    assert fused_mlp.possible == {"cpu": True}


def test_moments_of_folded_weights_are_of_their_inputs() -> None:
    """down's input is the squared activation, wherever norm scales and branch scales are multiplied in."""
    model = small_model()
    mlp, seen = model.blocks[1].mlp, []
    moments = InputMoments(model)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), moments:
        mlp(x, x, normalizes=False, norm_scale=0.5, scale=torch.linspace(0.1, 2, 32))
    hidden = torch.nn.functional.leaky_relu(0.5 * x @ mlp.up.weight.T, 0.5).square().flatten(0, 1).detach()
    seen = moments.by_name()
    torch.testing.assert_close(seen["blocks.1.mlp.down.weight"], hidden.T @ hidden)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, embedded_shards: Path, minimal_config: RunConfig
) -> tuple[RunConfig, dict[str, Tensor], Tensor, Tensor]:
    """A small model of 150 steps: (configuration, weights, ids to calibrate on, ids to score)."""
    run = tmp_path_factory.mktemp("trained") / "run"
    config = replace(
        minimal_config,
        schedule={"steps": 150},
        training={"validate_every_steps": None},
        artifact={"small_tensor_elements": 256, "calibration_bytes": 4096},
    )
    train(config, embedded_shards, run)
    weights = read_run(run).average
    settings = {"calibration_bytes": 65_536, "rounding": "gptq"}  # most of it to score: the differences are small
    stream = IdStream.open(embedded_shards, "train")
    every = torch.from_numpy(calibration_sequences(stream, replace(config, artifact=settings), embedded_shards))
    return config, weights, every[: len(every) // 4 : 4], every[1::2]


def loss(config: RunConfig, weights: dict[str, Tensor], ids: Tensor) -> float:
    with torch.no_grad():
        return float(build(config, weights, source="test").losses(ids[:, :-1], ids[:, 1:]).ce)


@pytest.mark.usefixtures("many_lanes")
def test_at_equal_size_a_model_loses_less_by_sensitivity_and_less_still_with_gptq(
    trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bytejepa.artifact.fit.MAX_TRIALS", 12)  # near enough for the comparison
    config, weights, ids, scored = trained
    calibration = calibrate(build(config, weights, source="test"), ids)
    exact = loss(config, weights, scored)
    settings = {
        "matrix_bits": 8,
        "scales": "per_row",
        "codecs": ("rans", "zstd"),
        "other_clip_standard_deviations": 12.85,
    }
    losses = []
    for rounding, clip in (
        ("nearest", "standard_deviations"), ("nearest", "sensitivity"), ("gptq", "sensitivity"),
    ):  # fmt: skip
        chosen = replace(config, artifact={**settings, "rounding": rounding, "clip": clip})
        found = fit(weights, chosen, calibration, file_bytes=SIZE_BYTES, metadata={})
        restored = {name: restore(value) for name, value in found.tensors.items()}
        losses.append(loss(config, restored, scored) - exact)
    plain, sensitive, both = losses
    assert 0 < both < sensitive < plain / 3, losses


def test_a_row_that_matters_more_gets_a_finer_scale() -> None:
    model = small_model()
    calibration = calibrate(model, random_ids(4, 32))
    config = replace(model.config, artifact={"clip": "sensitivity", "small_tensor_elements": 100, "matrix_bits": 8})
    name = "blocks.1.mlp.up.weight"
    matrices = {name: dict(model.named_parameters())[name].detach()}
    scales = sensitive_scales(matrices, config.artifact, calibration)[name]
    order = torch.argsort(calibration.sensitivity[name])
    assert bool((scales[order].diff() <= 0).all())
    again = quantize_matrices(matrices, config.artifact, calibration)[name]
    assert torch.equal(again.scales.float(), scales)


def test_scales_by_sensitivity_cut_no_weight_off() -> None:
    model = small_model()
    config = replace(model.config, artifact={"clip": "sensitivity", "small_tensor_elements": 100, "matrix_bits": 4})
    name = "blocks.1.mlp.up.weight"
    weight = dict(model.named_parameters())[name].detach().clone()
    weight[:, 3] *= 20  # far beyond what the sensitivity alone would give a code
    calibration = calibrate(model, random_ids(4, 32))
    stored = quantize_matrices({name: weight}, config.artifact, calibration)[name]
    scales = sensitive_scales({name: weight}, config.artifact, calibration)[name]
    assert bool(((weight - restore(stored)).abs() <= 0.5001 * scales[:, None]).all())


def test_only_pairs_that_share_hidden_units_are_ordered() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {
        "alone.up.weight": (6, 3), "other.down.weight": (3, 6), "uneven.up.weight": (6, 3), "uneven.down.weight": (3, 5),
        "group.weight": (6, 3), "grodown.weight": (3, 6), "pair.up.weight": (6, 3), "pair.down.weight": (3, 6),
    }  # fmt: skip
    weights = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    ordered, _ = order_hidden_units(weights, None, by_sensitivity=False)
    changed = [name for name in weights if not torch.equal(ordered[name], weights[name])]
    assert changed == ["pair.up.weight", "pair.down.weight"]


@pytest.mark.parametrize("digits", [1, 3, 10])
def test_scales_by_sensitivity_keep_as_many_digits_as_they_are_told(digits: int) -> None:
    model = small_model()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    config = compact(replace(model.config, artifact={"small_tensor_elements": 256}))
    config = replace(config, artifact={"scale_digits": digits})
    stored = store_weights(weights, config, calibrate(model, random_ids(2, 24)))
    fractions = stored["blocks.1.mlp.up.weight"].scales.view(torch.int16) & 0x3FF  # ten binary digits of a float16
    assert not bool((fractions & ((1 << (10 - digits)) - 1)).any())
    assert bool((fractions & (1 << (10 - digits))).any())


def test_sensitivity_is_the_mean_squared_gradient_of_drawn_bytes() -> None:
    """Against the Fisher information of the last product, which has a closed form: (p - p^2) x^2 before the softcap."""
    model = small_model()
    ids = random_ids(24, 8)
    found = calibrate(model, ids).sensitivity["token_embedding.weight"]
    assert found.shape == (260,)
    assert float(found.min()) > 0
    other = calibrate(model, ids, seed=1).sensitivity["token_embedding.weight"]
    assert float((found / other).log().abs().median()) < 0.5


def test_hidden_units_in_another_order_are_the_same_function() -> None:
    model = small_model()
    calibration = calibrate(model, random_ids(2, 24))
    weights = {name: value.detach() for name, value in model.named_parameters()}
    for by_sensitivity in (False, True):
        ordered, moved = order_hidden_units(weights, calibration, by_sensitivity=by_sensitivity)
        assert not torch.equal(ordered["blocks.0.mlp.up.weight"], weights["blocks.0.mlp.up.weight"])
        again = build(model.config, ordered, source="test")
        ids = random_ids(2, 24, seed=3)
        with torch.no_grad():
            torch.testing.assert_close(again.logits(ids), model.logits(ids), rtol=1e-4, atol=1e-4)
        fresh = calibrate(again, random_ids(2, 24))
        assert moved is not None
        for name in ("blocks.0.mlp.up.weight", "jepa.projector.up.weight"):
            torch.testing.assert_close(moved.sensitivity[name], fresh.sensitivity[name], rtol=1e-2, atol=1e-9)
        assert torch.equal(
            moved.spreads["blocks.0.mlp.down.weight"].order, fresh.spreads["blocks.0.mlp.down.weight"].order
        )


def test_what_needs_a_calibration_says_so() -> None:
    model = small_model()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    for settings in ({"rounding": "gptq"}, {"clip": "sensitivity"}):
        with pytest.raises(ArtifactError, match="need training text to calibrate on"):
            store_weights(weights, replace(model.config, artifact=settings))


def test_a_model_that_predicts_nothing_finite_is_refused() -> None:
    model = small_model()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight.fill_(1e30)  # finite, unlike what it makes of its input
    with pytest.raises(ArtifactError, match="the model's predictions are not finite"):
        calibrate(model, random_ids(1, 24))


@pytest.mark.parametrize("gradient", [1e-6, 1e-30, 1e-44])
def test_a_matrix_that_costs_next_to_nothing_gets_coarse_steps_and_is_stored(gradient: float) -> None:
    """1e-44: less than ten times the smallest float32, so that a tenth of it is zero."""
    model = small_model()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    name, other = "blocks.1.mlp.up.weight", "blocks.0.mlp.up.weight"
    found = calibrate(model, random_ids(2, 24))
    squares = {**found.sensitivity, name: torch.full_like(found.sensitivity[name], gradient)}
    calibration = Calibration(spreads=found.spreads, sensitivity=squares)
    config = compact(replace(model.config, artifact={"small_tensor_elements": 256}))
    stored = store_weights(weights, config, calibration)
    assert float(stored[name].scales.min()) > float(stored[other].scales.max())
    assert bool(torch.isfinite(restore(stored[name])).all())


def test_moments_of_blocks_that_run_once_a_chunk_are_of_chunks() -> None:
    """Calibration sees the weights of chunk blocks, and an artifact of such a model predicts what its weights predict."""
    model = small_model(model={"num_layers": 4, "chunk_blocks": (1, 2), "chunk_stride_bytes": 4})
    found = calibrate(model, random_ids(2, 24))
    assert {f"blocks.{layer}.mlp.down.weight" for layer in range(4)} <= set(found.spreads)
    config = compact(replace(model.config, artifact={"small_tensor_elements": 256}))
    stored = store_weights({name: value.detach() for name, value in model.named_parameters()}, config, found)
    again = build(config, {name: restore(value) for name, value in stored.items()}, source="test")
    ids = random_ids(2, 24, seed=3)
    with torch.no_grad():
        assert (
            float((again.logits(ids) - model.logits(ids)).abs().mean()) < 0.25
        )  # of logits that lie about 2 from zero
