"""Queries, keys and values of one product, by the formulas written for a compiler: the gradients of plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bytejepa.model import attention, fused_heads, fused_mlp
from bytejepa.model.layers import RotaryTables, rotate
from small_models import random_ids, small_model

B, T, H, G, E = 2, 7, 4, 2, 16


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    heads = torch.randn(B, T, H + 2 * G, E, generator=random).to(dtype).requires_grad_()
    gain = (torch.rand(H + G, generator=random) + 0.5).requires_grad_()
    return (heads, *RotaryTables(8, 10_000.0, T)(T), gain)


def plain(heads: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor, repeats: int) -> tuple[Tensor, Tensor, Tensor]:
    both = rotate(F.rms_norm(heads[:, :, : H + G], (E,)), cosines, sines) * gain[:, None]
    q, k = both.split((H, G), dim=2)
    return q, k.repeat_interleave(repeats, 2), heads[:, :, H + G :].repeat_interleave(repeats, 2)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_those_of_the_plain_formula(
    repeats: int, dtype: torch.dtype, tolerance: float
) -> None:
    heads, cosines, sines, gain = operands(dtype)
    exact = [value.detach().double().requires_grad_() for value in (heads, gain)]
    found = fused_heads.queries_keys_values(heads, cosines, sines, gain, H, repeats=repeats)
    expected = plain(exact[0], cosines.double(), sines.double(), exact[1], repeats)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=random).to(dtype) for y in found]
    gradients = torch.autograd.grad(found, (heads, gain), weights)
    wanted = torch.autograd.grad(expected, exact, [w.double() for w in weights])
    for got, right in zip((*found, *gradients), (*expected, *wanted), strict=True):
        assert ((got.double() - right).norm() / right.norm()).item() < tolerance
    assert [g.dtype for g in gradients] == [dtype, torch.float32]


@pytest.mark.parametrize("xsa_layers", [0, 3])
def test_keys_repeated_for_a_kernel_change_no_gradient(monkeypatch: pytest.MonkeyPatch, xsa_layers: int) -> None:
    ids, gradients, shapes = random_ids(2, 33), [], set()
    attend = attention.causal_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, **how: object) -> Tensor:
        shapes.add((q.size(2), k.size(2), v.size(2)))
        return attend(q, k, v, **how)

    monkeypatch.setattr(attention, "causal_attention", noted)
    monkeypatch.setattr(fused_heads, "is_half_on_gpu", lambda _: True)
    monkeypatch.setattr(fused_mlp, "possible", {"cpu": False})
    for kernels in (frozenset(), frozenset({"blocked", "flash"})):
        monkeypatch.setattr(attention, "FASTER_WITHOUT_GROUPS", kernels)
        model = small_model(model={"num_heads": 2, "num_kv_heads": 1, "xsa_last_layers": xsa_layers})
        model.losses(ids[:, :-1], ids[:, 1:]).ce.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            model.losses(ids[:, :-1], ids[:, 1:])  # nothing to gain without a backward pass
    assert shapes == {(2, 1, 1), (2, 2, 2)}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)
