"""The MLP for recent GPUs, by its formulas on a CPU: the same values and gradients as plain autograd. Its kernels: test_gpu.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bytejepa.model import fused_mlp
from small_models import random_ids, small_model

N, D, M = 30, 16, 24


def plain(x: Tensor, up: Tensor, down: Tensor, *, normalizes: bool) -> Tensor:
    hidden = F.linear(F.rms_norm(x, (x.size(-1),)) if normalizes else x, up)
    return F.linear(F.leaky_relu(hidden, 0.5).square(), down)


def operands(dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, N // 2, D), (M, D), (D, M))
    return [(torch.randn(shape, generator=random) * 0.7).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_values_and_gradients_are_those_of_the_plain_formula(normalizes: bool, dtype, tolerance: float) -> None:  # type: ignore[no-untyped-def]
    ours = operands(dtype)
    exact = [value.detach().double().requires_grad_() for value in ours]
    found, expected = fused_mlp.mlp(*ours, normalizes=normalizes), plain(*exact, normalizes=normalizes)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, ours, weight.to(dtype))
    expected_gradients = torch.autograd.grad(expected, exact, weight.to(dtype).double())
    for got, wanted in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        assert got.dtype == dtype
        assert ((got.double() - wanted).norm() / wanted.norm()).item() < tolerance


@pytest.mark.parametrize("row_scale", [None, torch.linspace(0.5, 2, N)])
def test_what_a_compiler_is_told_of_the_operators_is_so(row_scale: Tensor | None) -> None:
    x, up, down = (value.detach() for value in operands(torch.float32))
    hidden = torch.randn(N, M)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused_mlp.up_and_activate, (x.flatten(0, 1), up, row_scale), test_utils=checks)
    torch.library.opcheck(fused_mlp.gradient_of_hidden, (x.flatten(0, 1), down, hidden, row_scale), test_utils=checks)


@pytest.mark.parametrize("parallel_layers", [0, 2])
def test_a_model_learns_the_same_with_it(monkeypatch: pytest.MonkeyPatch, parallel_layers: int) -> None:
    gradients, calls = {}, []
    ids = random_ids(2, 33)
    taken = fused_mlp.mlp
    monkeypatch.setattr(fused_mlp, "mlp", lambda *given, **how: calls.append(how["normalizes"]) or taken(*given, **how))
    for profitable in (False, True):
        monkeypatch.setattr(fused_mlp, "is_profitable", lambda *_, answer=profitable: answer)
        model = small_model(model={"parallel_last_layers": parallel_layers})
        model.losses(ids[:, :-1], ids[:, 1:]).ce.backward()
        gradients[profitable] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    layers = model.config.model.num_layers
    assert calls == [True] * (layers - parallel_layers) + [False] * parallel_layers
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[True].items():
        torch.testing.assert_close(gradient, gradients[False][name], rtol=1e-4, atol=1e-6, msg=name)


def test_it_is_taken_for_training_in_bfloat16_on_a_gpu_that_has_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 3, 128, dtype=torch.bfloat16)
    assert not fused_mlp.is_profitable(x, 256)
    monkeypatch.setattr(fused_mlp, "possible", {"cpu": True})
    assert fused_mlp.is_profitable(x, 256)
    assert not fused_mlp.is_profitable(x.float(), 256)
    assert not fused_mlp.is_profitable(x[..., :72], 256)
    assert not fused_mlp.is_profitable(x, 250)
    with torch.no_grad():
        assert not fused_mlp.is_profitable(x, 256)
    with fused_mlp.plain_formulas():
        assert not fused_mlp.is_profitable(x, 256)
    assert fused_mlp.is_profitable(x, 256)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.parametrize("normalizes", [True, False])
def test_compiled_it_is_one_graph_with_the_same_gradients(normalizes: bool) -> None:
    found = []
    for function in (fused_mlp.mlp, torch.compile(fused_mlp.mlp, fullgraph=True)):
        given = operands(torch.bfloat16)
        y = function(*given, normalizes=normalizes)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), given)])
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
