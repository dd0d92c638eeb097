"""Muon: what its iteration converges to, and that matrices of one shape together are the same as each alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bytejepa.training.distributed import Ranks
from bytejepa.training.muon import Muon, _in_place, _without_copies, even_out, newton_schulz_iteration, orthogonalize
from bytejepa.training.optimizers import total_norm


def step(muon: Muon, *, learning_rate_scale: float, momentum: float, clip: Tensor) -> None:
    muon.finish(muon.start(momentum=momentum, clip=clip), learning_rate_scale=learning_rate_scale)


def test_orthogonalize_brings_singular_values_near_one_whatever_the_shape() -> None:
    random = torch.Generator().manual_seed(0)
    for shape in ((5, 32, 32), (3, 16, 48), (3, 48, 16), (24, 8)):
        result = orthogonalize(torch.randn(shape, generator=random))
        singular = torch.linalg.svdvals(result)
        assert singular.min() > 0.3
        assert singular.max() < 1.4


@pytest.mark.parametrize("shape", [(5, 24, 8), (3, 8, 24), (2, 16, 16), (24, 8), (8, 24)])
def test_an_iteration_is_the_same_with_and_without_copies(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 8
    tall = shape[-2] > shape[-1]
    gram = x.mT @ x if tall else x @ x.mT
    torch.testing.assert_close(*(f(x, gram, tall, 3.0, -4.0, 2.0) for f in (_in_place, _without_copies)))


def test_polar_express_comes_closer_to_orthogonal_than_the_quintic() -> None:
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 30, generator=random)
    iteration = newton_schulz_iteration("polar_express", 5)
    singular = torch.linalg.svdvals(orthogonalize(matrix, iteration))
    assert (singular - 1).abs().max() < 0.15
    assert (torch.linalg.svdvals(orthogonalize(matrix)) - 1).abs().max() > 0.2
    exact = torch.linalg.svdvals(orthogonalize(matrix, newton_schulz_iteration("polar_express", 10)))
    torch.testing.assert_close(exact, torch.ones(30), rtol=0, atol=1e-4)


def test_polar_express_bears_a_norm_that_rounding_made_too_small() -> None:
    value = 1.012  # of a matrix of rank one, whose norm is its only singular value
    for a, b, c in newton_schulz_iteration("polar_express", 10):
        value = a * value + b * value**3 + c * value**5
    assert value == pytest.approx(1, abs=0.01)


def test_row_normalization_forgets_the_length_of_every_row_of_the_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    for shape in ((24, 8), (8, 24), (16, 16)):
        gradient = torch.randn(shape, generator=random)
        for normalizes, alike in ((True, True), (False, False)):
            updated = []
            for factor in (torch.ones(shape[0]), torch.linspace(0.1, 3, shape[0])):
                parameter = torch.nn.Parameter(torch.zeros(shape))
                muon = Muon(
                    [("w", parameter)], learning_rate=1.0, weight_decay=0.0, ranks=Ranks(), normalizes_rows=normalizes
                )
                parameter.grad = gradient * factor[:, None]
                step(muon, learning_rate_scale=1.0, momentum=0.0, clip=torch.tensor(1.0))
                updated.append(parameter.detach())
            assert torch.allclose(*updated, atol=1e-4) == alike, (shape, normalizes)


@pytest.mark.parametrize("variant", [{}, {"normalizes_rows": True}, {"square_decay": 0.6, "cautious_decay": True}])
def test_batched_muon_is_muon_matrix_by_matrix(variant: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(1)
    shapes = [(16, 16), (16, 16), (32, 16), (16, 32), (8, 16)]
    initial = [torch.randn(shape, generator=random) for shape in shapes]
    settings = {"learning_rate": 0.1, "weight_decay": 0.1, "ranks": Ranks(), **variant}
    together = [torch.nn.Parameter(w.clone()) for w in initial]
    apart = [torch.nn.Parameter(w.clone()) for w in initial]
    batched = Muon([(str(i), p) for i, p in enumerate(together)], **settings)
    single = [Muon([(str(i), p)], **settings) for i, p in enumerate(apart)]
    for _ in range(3):
        for p, q in zip(together, apart, strict=True):
            p.grad = torch.randn(p.shape, generator=random)
            q.grad = p.grad.clone()
        step(batched, learning_rate_scale=1.0, momentum=0.9, clip=torch.tensor(1.0))
        for muon in single:
            step(muon, learning_rate_scale=1.0, momentum=0.9, clip=torch.tensor(1.0))
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_two_steps_are_those_of_the_formula(shape: tuple[int, int]) -> None:
    """m <- mu m + g;  u = NS5(g + mu m);  w <- (1 - lr wd) w - lr sqrt(max(1, rows / cols)) u, g clipped."""
    random = torch.Generator().manual_seed(2)
    initial, *gradients = (torch.randn(shape, generator=random) for _ in range(3))
    parameter = torch.nn.Parameter(initial.clone())
    muon = Muon([("w", parameter)], learning_rate=0.2, weight_decay=0.5, ranks=Ranks())
    expected, momentum = initial.double(), torch.zeros(shape, dtype=torch.float64)
    for gradient, mu, clip in zip(gradients, (0.5, 0.9), (1.0, 0.25), strict=True):
        parameter.grad = gradient.clone()
        step(muon, learning_rate_scale=0.5, momentum=mu, clip=torch.tensor(clip))
        clipped = clip * gradient.double()
        momentum = mu * momentum + clipped
        update = orthogonalize((clipped + mu * momentum).float()).double()
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * update
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_two_steps_with_evened_updates_are_those_of_the_formula(shape: tuple[int, int]) -> None:
    """s <- b s + (1 - b) mean(u^2);  u <- u / sqrt(s), as long as before; over columns, of a wide matrix over rows."""
    random = torch.Generator().manual_seed(3)
    gradients = [torch.randn(shape, generator=random) * torch.linspace(0.1, 2, shape[1]) for _ in range(2)]
    parameter = torch.nn.Parameter(torch.zeros(shape))
    muon = Muon([("w", parameter)], learning_rate=1.0, weight_decay=0.0, square_decay=0.7, ranks=Ranks())
    axis = 0 if shape[0] < shape[1] else 1
    square = torch.zeros(1, dtype=torch.float64)
    for gradient in gradients:
        parameter.grad, before = gradient.clone(), parameter.detach().double()
        step(muon, learning_rate_scale=1.0, momentum=0.0, clip=torch.tensor(1.0))
        update = orthogonalize(gradient).double()
        square = 0.7 * square + 0.3 * (update**2).mean(axis, keepdim=True)
        evened = update / square.sqrt()
        expected = evened * (update.norm() / evened.norm()) * max(1, shape[0] / shape[1]) ** 0.5
        torch.testing.assert_close(before - parameter.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_evened_updates_are_even_and_as_long_as_before() -> None:
    update = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.01, 3, 12)[:, None]
    evened = even_out(update, torch.zeros(2, 12, 1), 0.9)
    lengths = evened.norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:, :1].expand(2, 12))
    torch.testing.assert_close(evened.norm(dim=(-2, -1)), update.norm(dim=(-2, -1)))
    assert even_out(torch.zeros(1, 4, 4), torch.zeros(1, 4, 1), 0.9).abs().max() == 0


def test_cautious_decay_leaves_the_weights_alone_that_the_update_makes_larger() -> None:
    random = torch.Generator().manual_seed(5)
    initial, gradient = (torch.randn(12, 12, generator=random) for _ in range(2))
    initial[0] = 0
    updated = {}
    for cautious, decay in ((False, 0.0), (True, 0.5)):
        parameter = torch.nn.Parameter(initial.clone())
        muon = Muon([("w", parameter)], learning_rate=0.2, weight_decay=decay, cautious_decay=cautious, ranks=Ranks())
        parameter.grad = gradient.clone()
        step(muon, learning_rate_scale=0.5, momentum=0.0, clip=torch.tensor(1.0))
        updated[cautious] = parameter.detach()
    update = orthogonalize(gradient)
    decayed = (initial != updated[True]) & (updated[False] != updated[True])
    assert torch.equal(decayed, (initial * update) > 0)
    torch.testing.assert_close(updated[False] - updated[True], 0.1 * 0.5 * initial * decayed)
    unmoved = torch.nn.Parameter(torch.ones(4, 4))
    muon = Muon([("w", unmoved)], learning_rate=0.2, weight_decay=0.5, cautious_decay=True, ranks=Ranks())
    unmoved.grad = torch.zeros(4, 4)
    step(muon, learning_rate_scale=1.0, momentum=0.0, clip=torch.tensor(1.0))
    torch.testing.assert_close(unmoved.detach(), torch.full((4, 4), 0.9))  # without a gradient a weight decays as ever


def test_the_norm_of_gradients_of_several_dtypes_is_that_of_all_their_numbers() -> None:
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=random) for shape in ((3, 4), (7,), ())]
    torch.testing.assert_close(total_norm(gradients), torch.nn.utils.get_total_norm(gradients), rtol=0, atol=0)
    mixed = [gradients[0].bfloat16(), *gradients[1:]]
    exact = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in mixed]))
    assert total_norm(mixed).dtype == torch.float32
    torch.testing.assert_close(total_norm(mixed).double(), exact, rtol=1e-6, atol=0)
