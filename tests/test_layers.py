"""Building blocks alone: values against plain formulas, gradients against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from bytejepa.model import fused, fused_heads, layers
from bytejepa.model.layers import RotaryTables, SmearGate, rotate, softcap
from bytejepa.model.ngram_embedding import BigramHash, NgramHash


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_smear_mixes_in_the_predecessor() -> None:
    smear, x = SmearGate(3), normal(2, 4, 3)
    with torch.no_grad():
        smear.gate.copy_(torch.tensor([-40.0, 0.0, 40.0]))
    y = smear(x)
    torch.testing.assert_close(y[..., 0], x[..., 0])
    torch.testing.assert_close(y[:, 1:, 1], (x[:, 1:, 1] + x[:, :-1, 1]) / 2)
    torch.testing.assert_close(y[:, 1:, 2], x[:, :-1, 2])
    torch.testing.assert_close(y[:, 0], x[:, 0] * torch.tensor([1.0, 0.5, 0.0]))


def test_smear_stops_at_the_start_of_a_document() -> None:
    smear, x = SmearGate(3), normal(1, 4, 3)
    starts = torch.tensor([[False, False, True, False]])
    torch.testing.assert_close(smear(x, starts)[:, 2], x[:, 2] / 2)


def test_bigram_row_is_of_the_last_two_ids() -> None:
    bigram = BigramHash(64, 4, 8)
    ids = torch.tensor([[1, 10, 20, 10, 20]])
    rows = bigram.row_indices(ids)[0].tolist()
    assert rows[0] == 63
    assert rows[2] == rows[4] == ((36313 * 20) ^ (27191 * 10)) % 63
    assert rows[3] == ((36313 * 10) ^ (27191 * 20)) % 63
    starts = torch.tensor([[True, False, False, True, False]])
    assert bigram.row_indices(ids, starts)[0, 3] == 63


def test_bigram_hash_never_overflows() -> None:
    ids = torch.tensor([[259, 259, 0, 259]])
    assert BigramHash(4096, 1, 1).row_indices(ids).min() >= 0


def test_exact_pairs_share_no_row() -> None:
    bigram = BigramHash(65_537, 1, 1, "exact")
    pairs = [(a, b) for a in (4, 5, 130, 259) for b in (4, 6, 259)]
    rows = [bigram.row_indices(torch.tensor([pair]))[0, 1].item() for pair in pairs]
    assert len(set(rows)) == len(pairs)
    assert (min(rows), max(rows)) == (0, 65_535)
    assert bigram.row_indices(torch.tensor([[1, 200]])).tolist() == [[65_536, 65_536]]


def test_ngram_rows_depend_on_the_last_n_ids_and_on_nothing_else() -> None:
    ngrams = NgramHash((3, 5), 1000, 2, 4)
    ids = torch.arange(4, 16)[None]
    rows = ngrams.row_indices(ids)[0]
    assert rows[:2, 0].tolist() == [999, 999]
    assert rows[:4, 1].tolist() == [1999] * 4
    for place in range(12):
        changed = ids.clone()
        changed[0, place] += 100
        moved = ngrams.row_indices(changed)[0] != rows
        assert moved[:, 0].nonzero().flatten().tolist() == [t for t in range(2, 12) if place <= t < place + 3]
        assert moved[:, 1].nonzero().flatten().tolist() == [t for t in range(4, 12) if place <= t < place + 5]


def test_ngram_hashes_spread_evenly() -> None:
    ngrams = NgramHash((3, 6), 257, 1, 1)
    a, b, c = torch.meshgrid(*[torch.arange(97, 113)] * 3, indexing="ij")  # lower-case letters, as ids close together
    ids = torch.stack((a, b, c), dim=-1).reshape(1, -1)
    for order, rows in enumerate(ngrams.row_indices(ids)[0].T):
        counts = torch.bincount(rows[16:] - 257 * order, minlength=257)[:256]
        assert counts.min() > 0, "every row is used"
        assert counts.max() < 3 * counts.float().mean()


def test_leaky_relu_squared() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    assert layers.leaky_relu_squared(x).tolist() == [1.0, 0.0625, 0.0, 9.0]


def test_softcap_is_the_identity_near_zero_and_bounded_far_away() -> None:
    x = torch.tensor([-1e4, -0.01, 0.0, 0.01, 1e4])
    y = softcap(x, 30.0)
    assert y.abs().max() <= 30
    torch.testing.assert_close(y[1:4], x[1:4], rtol=1e-5, atol=0)
    assert softcap(x.bfloat16(), 30.0).dtype == torch.float32


def test_rms_norm_has_unit_root_mean_square() -> None:
    y = layers.rms_norm(normal(2, 3, 16) * 7)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 3), rtol=1e-5, atol=0)
    assert not layers.rms_norm(torch.zeros(1, 1, 4)).any()


def rotation(length: int, dims: int = 8, base: float = 10_000.0, limit: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return RotaryTables(dims, base, limit)(length)


def test_rotation_keeps_lengths_and_the_other_dimensions() -> None:
    x = normal(1, 12, 2, 16)
    y = rotate(x, *rotation(12))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert torch.equal(y[:, 0], x[:, 0])


def test_rotated_products_depend_on_the_distance_only() -> None:
    q, k = normal(1, 1, 1, 8).expand(1, 20, 1, 8), normal(1, 1, 1, 8, seed=1).expand(1, 20, 1, 8)
    q, k = rotate(q, *rotation(20))[0, :, 0], rotate(k, *rotation(20))[0, :, 0]
    products = q @ k.T
    for distance in (1, 5):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)


def test_rotary_frequencies() -> None:
    cosines, sines = rotation(3)
    angles = 2.0 * 10_000 ** (-torch.arange(4) * 2 / 8)
    torch.testing.assert_close(cosines[2], angles.cos())
    torch.testing.assert_close(sines[2], angles.sin())


def test_base_grows_beyond_the_training_length_only() -> None:
    table = RotaryTables(16, 10_000.0, 64)
    grown = 10_000 * (128 / 64) ** (16 / 14)
    expected = (5 * grown ** (-torch.arange(8) * 2 / 16)).cos()
    torch.testing.assert_close(table(128)[0][5], expected)
    torch.testing.assert_close(table(64)[0][5], (5 * 10_000.0 ** (-torch.arange(8) * 2 / 16)).cos())
    assert torch.equal(table(40)[0], table(64)[0][:40])


@pytest.mark.parametrize("function", ["rms_norm", "leaky_relu_squared"])
def test_hand_written_gradients_are_those_of_finite_differences(function: str) -> None:
    x = normal(3, 2, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(getattr(fused, function), (x,))


def test_hand_written_rotation_gradients_are_those_of_finite_differences() -> None:
    cosines, sines = (table.double() for table in rotation(3, dims=4))
    heads = normal(2, 3, 2, 6, dtype=torch.float64).requires_grad_()
    gain = (1.5 + 0.1 * normal(2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, g: fused.normalize_and_rotate(h, cosines, sines, g), (heads, gain))


def queries_and_keys_and_values(
    heads: torch.Tensor, gain: torch.Tensor, *, written_for_a_compiler: bool
) -> torch.Tensor:
    """Return 2 queries, a key and a value, beside each other, of (2, 5, 4, 16) heads."""
    cosines, sines = rotation(5, dims=4)
    if written_for_a_compiler:
        q, k, v = fused_heads.queries_keys_values(heads, cosines, sines, gain, 2)
    else:
        q, k = plain_rotation(heads[:, :, :3], cosines, sines, gain).split((2, 1), dim=2)
        v = heads[:, :, 3:]
    return torch.cat((k, v, q), dim=2)


def test_gradients_written_for_a_compiler_are_those_of_the_plain_formula() -> None:
    weight, results = normal(2, 5, 4, 16, seed=1), []
    for written in (True, False):
        heads, gain = normal(2, 5, 4, 16).requires_grad_(), torch.tensor([1.5, 0.5, 1.0], requires_grad=True)
        result = queries_and_keys_and_values(heads, gain, written_for_a_compiler=written)
        (result * weight).sum().backward()
        results.append((result, heads.grad, gain.grad))
    torch.testing.assert_close(results[0], results[1])


def test_a_gradient_written_for_a_compiler_keeps_the_dtype_of_its_input() -> None:
    gain = torch.tensor([1.5, 0.5, 1.0])
    heads = normal(2, 5, 4, 16).bfloat16().requires_grad_()
    result = queries_and_keys_and_values(heads, gain, written_for_a_compiler=True)
    result.sum().backward()
    assert result.dtype == heads.grad.dtype == torch.bfloat16
    exact = queries_and_keys_and_values(heads.detach().float(), gain, written_for_a_compiler=False)
    torch.testing.assert_close(result.float(), exact, rtol=1e-2, atol=1e-2)


def test_tails_are_rotated_as_whole_sequences_are_on_a_gpu() -> None:
    cosines, sines = rotation(5, dims=4)
    heads, gain = normal(2, 5, 4, 16).bfloat16(), torch.tensor([1.5, 0.5, 1.0])
    q, k, _ = fused_heads.queries_keys_values(heads, cosines, sines, gain, 2)
    both = fused_heads.normalize_and_rotate_in_float32(heads[:, 2:, :3], cosines[2:], sines[2:], gain)
    assert torch.equal(torch.cat((q, k), dim=2)[:, 2:], both)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiled_gradients_in_half_precision_are_those_of_the_plain_formula() -> None:
    weight, results = normal(2, 5, 4, 16, seed=1), []
    for written in (True, False):
        heads, gain = normal(2, 5, 4, 16).bfloat16().requires_grad_(), torch.tensor([1.5, 0.5, 1.0], requires_grad=True)
        function = torch.compile(queries_and_keys_and_values) if written else queries_and_keys_and_values
        result = function(heads if written else heads.float(), gain, written_for_a_compiler=written)
        (result.float() * weight).sum().backward()
        results.append((result.float(), heads.grad.float(), gain.grad))
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)


def test_hand_written_gradients_of_two_inputs_are_those_of_finite_differences() -> None:
    x, x0, mix = (normal(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 4), (2, 3, 4), (2, 4)))
    assert torch.autograd.gradcheck(fused.mix_residual, (x, x0, mix))
    y, v = (normal(2, 3, heads, 6, seed=heads, dtype=torch.float64).requires_grad_() for heads in (4, 2))
    assert torch.autograd.gradcheck(fused.drop_along, (y, v))
    logits = (20 * normal(5, 7, dtype=torch.float64)).requires_grad_()
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda z: fused.softcapped_cross_entropy(z, targets, 15.0), (logits,))


def test_softcapped_cross_entropy_is_that_of_the_capped_logits() -> None:
    logits, targets = 40 * normal(50, 260), torch.arange(50) * 5
    assert fused.is_profitable(logits)
    expected = F.cross_entropy(30 * torch.tanh(logits.double() / 30), targets)
    assert layers.softcapped_cross_entropy(logits, targets, 30.0).item() == pytest.approx(expected.item(), rel=1e-6)
    plain = layers.softcapped_cross_entropy(logits.double(), targets, 30.0)  # float64 takes the plain formula
    assert plain.item() == pytest.approx(expected.item(), rel=1e-6)


def plain_rotation(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return rotate(F.rms_norm(heads, (heads.size(-1),)), cosines, sines) * gain[:, None]


def plain_rotation_by_two_gains(heads: torch.Tensor) -> torch.Tensor:
    return plain_rotation(heads, *rotation(5, dims=4), torch.tensor([1.5, 0.5]))


def fused_rotation(heads: torch.Tensor) -> torch.Tensor:
    cosines, sines = rotation(5, dims=4)
    return layers.normalize_and_rotate(heads, cosines, sines, torch.tensor([1.5, 0.5]))


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (layers.rms_norm, lambda x: F.rms_norm(x, (x.size(-1),))),
        (layers.leaky_relu_squared, lambda x: F.leaky_relu(x, 0.5).square()),
        (fused_rotation, plain_rotation_by_two_gains),
    ],
    ids=["rms_norm", "leaky_relu_squared", "normalize_and_rotate"],
)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_hand_written_functions_equal_the_plain_formulas(ours, plain, scale: float) -> None:  # type: ignore[no-untyped-def]
    x = (scale * normal(2, 5, 2, 16)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    assert fused.is_profitable(x)
    weight = normal(2, 5, 2, 16, seed=1)
    mine, theirs = ours(x), plain(y)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * scale)
    (mine * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5 * y.grad.abs().max().item())


def test_an_input_is_not_changed_in_place() -> None:
    heads = normal(2, 5, 2, 16)
    kept = heads.clone()
    for function in (layers.rms_norm, layers.leaky_relu_squared, fused_rotation):
        function(heads)
        assert torch.equal(heads, kept)


def test_shapes_are_checked_under_pytest() -> None:
    with pytest.raises(Exception, match="Type-check error"):
        SmearGate(3)(torch.zeros(2, 3))


def test_half_precision_uses_the_plain_formula() -> None:
    x = normal(2, 3, 8).bfloat16()
    assert not fused.is_profitable(x)
    assert layers.rms_norm(x).dtype == torch.bfloat16
    assert math.isclose(layers.rms_norm(x).float().square().mean().item(), 1, rel_tol=0.02)
