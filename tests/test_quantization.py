"""Row quantisation: the reference's golden numbers, the project's own rules and the edges of float16."""

from __future__ import annotations

from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import (
    CLIP_MAX,
    ClipRule,
    QuantizedMatrix,
    code_limit,
    dequantize,
    fake_quantize_rows,
    quantize_rows,
    reference_int6,
    reference_int8,
    row_scales,
    to_float16,
)

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden" / "quantise.npz"
CLIP_QUANTILE = ClipRule(kind="quantile", quantile=0.95)
CLIP_SIGMA = ClipRule(kind="standard_deviations", standard_deviations=3.0)
CLIP_MEAN_SQUARED_ERROR = ClipRule(kind="mean_squared_error")
ALL_CLIPS = (CLIP_MAX, CLIP_QUANTILE, CLIP_MEAN_SQUARED_ERROR, CLIP_SIGMA)
Refused = (
    ArtifactError,
    jaxtyping.TypeCheckError,
)  # shapes and dtypes are refused earlier where the runtime checks are on


def quantization_error(weight: torch.Tensor, quantized: QuantizedMatrix) -> float:
    """rms(weight - stored) / rms(weight)."""
    return float((weight - dequantize(quantized)).double().norm() / weight.double().norm())


def gaussian(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rule", "key"), [(reference_int6, "int6"), (reference_int8, "int8")])
def test_reference_rules_reproduce_the_golden_numbers(rule, key):
    golden = np.load(GOLDEN)
    quantized = rule(torch.from_numpy(golden["weights"]))
    np.testing.assert_array_equal(quantized.codes.numpy(), golden[key])
    np.testing.assert_array_equal(quantized.scales.numpy(), golden[f"{key}_scale"])


def test_golden_numbers_tell_int6_and_int8_divisors_apart():
    golden = np.load(GOLDEN)
    weight = torch.from_numpy(golden["weights"])
    swapped_int6 = quantize_rows(weight, bits=6, scale_floor=1 / 31, divide_by_stored_scale=False)
    swapped_int8 = quantize_rows(weight, bits=8, clip=ClipRule(kind="quantile"), scale_floor=1 / 127)
    assert int((swapped_int6.codes.numpy() != golden["int6"]).sum()) == 2
    assert int((swapped_int8.codes.numpy() != golden["int8"]).sum()) == 10


def test_own_rule_gives_every_row_its_own_scale():
    weight = gaussian(40, 256) * torch.logspace(-4, 2, 40).unsqueeze(1)
    error = (dequantize(quantize_rows(weight, bits=6)) - weight).norm(dim=1) / weight.norm(dim=1)
    assert float(error.max()) < 0.05  # the reference's floor would turn the small rows to zero, an error of 1
    assert quantization_error(weight, reference_int6(weight)) < quantization_error(
        weight[:10], reference_int6(weight[:10])
    )
    assert quantization_error(weight[:10], reference_int6(weight[:10])) == 1.0


@pytest.mark.parametrize("bits", range(2, 9))
def test_max_clip_brings_every_weight_back_within_half_a_step(bits):
    weight = gaussian(64, 96, seed=bits)
    quantized = quantize_rows(weight, bits=bits)
    steps = quantized.scales.float().unsqueeze(1)
    assert bool(((dequantize(quantized) - weight).abs() <= 0.5 * steps * (1 + 1e-6)).all())
    assert int(quantized.codes.abs().max()) == code_limit(bits)  # the whole range is used


def test_more_bits_mean_less_error():
    weight = gaussian(32, 512)
    errors = [quantization_error(weight, quantize_rows(weight, bits=bits)) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < errors[0]


def test_quantile_clip_is_the_linear_quantile_across_chunks(monkeypatch):
    monkeypatch.setattr("bytejepa.model.quantization.QUANTILE_CHUNK_ELEMENTS", 300)
    weight = gaussian(7, 100)
    expected = torch.from_numpy(np.quantile(weight.abs().numpy(), 0.95, axis=1)).float() / 31
    torch.testing.assert_close(row_scales(weight, bits=6, clip=CLIP_QUANTILE), expected, rtol=2**-11, atol=0.0)


def test_sigma_clip_is_the_root_mean_square_times_k():
    weight = gaussian(5, 4000) + 1.0  # far from centred: the scale counts from zero
    expected = 3.0 * weight.square().mean(1).sqrt() / 31
    torch.testing.assert_close(row_scales(weight, bits=6, clip=CLIP_SIGMA), expected, rtol=2**-11, atol=0.0)


def test_sigma_clip_keeps_a_constant_row():
    weight = torch.full((1, 16), 0.25)
    error = quantization_error(weight, quantize_rows(weight, bits=6, clip=CLIP_SIGMA))
    assert error < 0.05


@pytest.mark.parametrize(("bits", "at_most"), [(2, 0.4), (3, 0.6), (4, 0.8), (6, 0.97), (8, 1.0)])
def test_mean_squared_error_clip_beats_max_in_every_row(bits, at_most):
    weight = gaussian(50, 300)
    by_max = (dequantize(quantize_rows(weight, bits=bits)) - weight).square().sum(1)
    by_error = (dequantize(quantize_rows(weight, bits=bits, clip=CLIP_MEAN_SQUARED_ERROR)) - weight).square().sum(1)
    assert bool((by_error <= by_max).all())
    assert float(by_error.sum()) <= at_most * float(by_max.sum())


def test_clipped_weights_take_the_largest_code():
    weight = torch.cat((torch.full((1, 99), 0.1), torch.tensor([[-50.0]])), dim=1)
    quantized = quantize_rows(weight, bits=6, clip=ClipRule(kind="quantile", quantile=0.9))
    assert quantized.codes[0, -1] == -31
    assert quantized.codes[0, 0] == 31


@pytest.mark.parametrize("clip", ALL_CLIPS)
def test_an_all_zero_row_is_legal(clip):
    weight = gaussian(3, 8)
    weight[1] = 0.0
    quantized = quantize_rows(weight, bits=6, clip=clip)
    assert float(quantized.scales[1]) == 0.0
    assert bool((dequantize(quantized)[1] == 0).all())
    assert bool((fake_quantize_rows(weight, 6, clip=clip)[1] == 0).all())


@pytest.mark.parametrize("exponent", range(-40, -8))
def test_tiny_rows_lose_no_more_than_half_a_step(exponent):
    weight = gaussian(8, 64) * 2.0**exponent
    quantized = quantize_rows(weight, bits=6)
    error = (dequantize(quantized) - weight).abs()
    assert bool((error <= 0.5001 * quantized.scales.float().unsqueeze(1)).all())
    assert float(quantized.scales.max()) <= float(weight.abs().max()) / 31 * (1 + 2**-11) + 2.0**-24
    if exponent >= -16:  # scales keep two digits and more
        assert quantization_error(weight, quantized) < 0.06


def test_subnormal_scales_round_up_so_that_nothing_is_clipped():
    step = 1.4 * 2.0**-24
    weight = torch.tensor([[31 * step, -31 * step, 10 * step]])
    quantized = quantize_rows(weight, bits=6)
    assert float(quantized.scales[0]) == 2 * 2.0**-24
    assert quantization_error(weight, quantized) < 0.05  # to nearest, 29 % of the largest weight would be cut off


def test_row_scales_are_float16_numbers_rounded_to_nearest():
    weight = (gaussian(20000, 1).abs() + 0.01) * torch.logspace(0, 4, 20000).unsqueeze(1)
    scales = row_scales(weight, bits=6)
    assert torch.equal(scales, (weight.squeeze(1) / 31).half().float())
    assert torch.equal(scales.half(), quantize_rows(weight, bits=6).scales)


def test_a_scale_above_float16_is_refused():
    weight = torch.ones(3, 4)
    weight[2] = 3e6
    with pytest.raises(ArtifactError, match=r"row 2 needs the scale 96774.*65504"):
        quantize_rows(weight, bits=6)
    weight[2] = 65504.0 * 31
    assert float(quantize_rows(weight, bits=6).scales[2]) == 65504.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(ArtifactError, match="1 of 12 values are not finite"):
        quantize_rows(weight, bits=6)
    with pytest.raises(ArtifactError, match="not finite"):
        to_float16(weight)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ArtifactError, match="2 to 8 bits"):
        quantize_rows(torch.ones(2, 2), bits=bits)
    with pytest.raises(ArtifactError, match="2 to 8 bits"):
        fake_quantize_rows(torch.ones(2, 2), bits)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int32)])
def test_what_is_no_floating_matrix_is_refused(weight):
    with pytest.raises(Refused):
        quantize_rows(weight, bits=6)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("clip", ALL_CLIPS)
def test_empty_matrices(shape, clip):
    quantized = quantize_rows(torch.ones(shape), bits=6, clip=clip)
    assert dequantize(quantized).shape == shape
    assert fake_quantize_rows(torch.ones(shape), 6, clip=clip).shape == shape


@pytest.mark.parametrize(
    "arguments", [{"kind": "maximum"}, {"quantile": 0.0}, {"quantile": 1.1}, {"standard_deviations": 0.0}]
)
def test_impossible_clip_rules_are_refused(arguments):
    with pytest.raises(Refused):
        ClipRule(**arguments)


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (torch.full((1, 2), 32, dtype=torch.int8), torch.ones(1).half(), r"lie in \[-32, 31\]"),
        (torch.full((1, 2), -33, dtype=torch.int8), torch.ones(1).half(), r"lie in \[-32, 31\]"),
        (torch.zeros((1, 2), dtype=torch.int8), torch.full((1,), float("nan")).half(), "finite"),
        (torch.zeros((1, 2), dtype=torch.int8), torch.full((1,), -1.0).half(), "not negative"),
    ],
)
def test_inconsistent_quantised_matrices_are_refused(codes, scales, message):
    with pytest.raises(ArtifactError, match=message):
        QuantizedMatrix(codes=codes, scales=scales, bits=6)


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (torch.zeros((1, 2), dtype=torch.int8), torch.ones(2).half()),
        (torch.zeros((1, 2), dtype=torch.int8), torch.ones(1)),
        (torch.zeros((1, 2), dtype=torch.int32), torch.ones(1).half()),
        (torch.zeros(2, dtype=torch.int8), torch.ones(2).half()),
    ],
)
def test_quantised_matrices_of_wrong_shape_or_type_are_refused(codes, scales):
    with pytest.raises(Refused, match=r"scales|codes"):
        QuantizedMatrix(codes=codes, scales=scales, bits=6)


def test_the_reference_code_minus_32_is_readable():
    codes = torch.full((1, 2), -32, dtype=torch.int8)
    assert float(dequantize(QuantizedMatrix(codes=codes, scales=torch.ones(1).half(), bits=6))[0, 0]) == -32.0


@pytest.mark.parametrize("clip", ALL_CLIPS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quantisation_equals_the_stored_weights_exactly(bits, clip):
    weight = gaussian(33, 70, seed=bits) * torch.logspace(-8, 1, 33).unsqueeze(1)
    weight[:, 0] *= (
        300.0  # clipped far down where the rule clips: differences with the stored weight are not exact there
    )
    assert torch.equal(
        fake_quantize_rows(weight, bits, clip=clip), dequantize(quantize_rows(weight, bits=bits, clip=clip))
    )


@pytest.mark.parametrize("clip", ALL_CLIPS)
def test_fake_quantisation_passes_the_gradient_straight_through(clip):
    weight = gaussian(4, 6).requires_grad_()
    upstream = gaussian(4, 6, seed=1)
    (fake_quantize_rows(weight, 4, clip=clip) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


def test_fake_quantisation_keeps_the_dtype():
    assert fake_quantize_rows(gaussian(4, 6).bfloat16(), 6).dtype == torch.bfloat16
    assert fake_quantize_rows(gaussian(4, 6).double(), 6).dtype == torch.float64


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # PyTorch 2.13, importing inductor
@pytest.mark.parametrize("clip", ALL_CLIPS)
def test_compiled_fake_quantisation_equals_the_stored_weights_exactly(clip):
    # PyTorch 2.11 cannot trace its own quantile, which no configuration trains with
    whole = clip.kind != "quantile" or torch.__version__ >= "2.13"
    compiled = torch.compile(lambda weight: fake_quantize_rows(weight, 6, clip=clip), fullgraph=whole)
    weight = gaussian(64, 512).requires_grad_()
    result = compiled(weight)
    assert torch.equal(result.detach(), dequantize(quantize_rows(weight, bits=6, clip=clip)))
    assert torch.equal(torch.autograd.grad(result.sum(), weight)[0], torch.ones_like(weight))


def test_float16_storage_takes_any_shape_and_refuses_overflow():
    for shape in ((), (0,), (3,), (2, 3, 4)):
        assert to_float16(torch.full(shape, 0.1)).shape == shape
    assert float(to_float16(torch.tensor(65519.0))) == 65504.0
    with pytest.raises(ArtifactError, match="65520 is above float16"):
        to_float16(torch.tensor([1.0, -65520.0]))
    assert float(to_float16(torch.tensor(3e-8))) == 2.0**-24  # not zero: float16 has subnormals
