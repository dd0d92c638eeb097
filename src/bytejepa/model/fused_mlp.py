"""The MLP with its norm and its activation inside its products, and its gradient written by hand, for recent GPUs.

RMS norm has no weight here, so that it is one number a row, and a product can be normalised after it was taken:

    hidden = r (x U^T),  r = 1 / sqrt(mean(x^2) + eps);   activated = leaky_relu(hidden, 1/2)^2;   y = activated D^T
    dh = r (dy D) slope(hidden);   dU = dh^T x;   g = dh U;   dx = g - x r^2 (x . g) / width

Neither the normalised input nor the gradient of the activation is ever written. The two operators are kernels of
`hopper_mlp` on a GPU and plain formulas elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_KERNELS = "bytejepa.model.hopper_mlp"
possible: dict[str, bool] = {}
"""By type of device, what `find` found."""


def find(device_type: str) -> bool:
    """Return whether this machine's GPU has the kernels; remembered, so that torch.compile can look it up.

    A submission's script has none: Triton reads the source of its kernels from a file, which that script is not.
    """
    if device_type not in possible:
        possible[device_type] = (
            device_type == "cuda"
            and torch.cuda.get_device_capability()[0] == 9  # others have less shared memory
            and __name__.startswith("bytejepa.")
            and importlib.util.find_spec("triton") is not None
        )
    return possible[device_type]


def _kernels() -> Any:
    return importlib.import_module(_KERNELS)  # by name, so that no script takes it in


@contextlib.contextmanager
def plain_formulas() -> Iterator[None]:
    """Within it `mlp` is not taken: for those who look at what each weight is multiplied with."""
    found = dict(possible)
    possible.update(dict.fromkeys(("cpu", "cuda"), False))
    try:
        yield
    finally:
        possible.clear()
        possible.update(found)


def is_profitable(x: Tensor, mlp_dim: int) -> bool:
    """Return whether `mlp` should be taken for `x`: training in bfloat16 on a GPU that has its kernels."""
    return torch.is_grad_enabled() and find(x.device.type) and fits(x, mlp_dim)


def fits(x: Tensor, mlp_dim: int) -> bool:
    """Return whether the kernels take `x`, (..., D), and an MLP of this width."""
    return x.dtype == torch.bfloat16 and x.size(-1) % 64 == 0 and mlp_dim % 8 == 0


@torch.library.custom_op(
    "bytejepa::up_and_activate",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? row_scale) -> (Tensor, Tensor)",
)
def up_and_activate(x: Tensor, weight: Tensor, row_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return hidden = row_scale * (x @ weight^T), (N, M), and leaky_relu(hidden, 0.5)^2; x (N, D), weight (M, D)."""
    if x.is_cuda:
        hidden, activated = _kernels().up_and_activate(x, weight, row_scale)
        return hidden, activated
    product = F.linear(x.float(), weight.float())
    hidden = (product if row_scale is None else product * row_scale[:, None]).to(x.dtype)
    return hidden, F.leaky_relu(hidden, 0.5).square()


@up_and_activate.register_fake
def _(x: Tensor, weight: Tensor, _row_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.size(0), weight.size(0)), x.new_empty(x.size(0), weight.size(0))


@torch.library.custom_op(
    "bytejepa::gradient_of_hidden",
    mutates_args=(),
    schema="(Tensor gradient, Tensor weight, Tensor hidden, Tensor? row_scale) -> Tensor",
)
def gradient_of_hidden(gradient: Tensor, weight: Tensor, hidden: Tensor, row_scale: Tensor | None) -> Tensor:
    """Return row_scale * (gradient @ weight) times the activation's slope at `hidden`, (N, M); weight (D, M)."""
    if gradient.is_cuda:
        d_hidden: Tensor = _kernels().gradient_of_hidden(gradient, weight, hidden, row_scale)
        return d_hidden
    product = gradient.float() @ weight.float()
    slope = 2 * F.leaky_relu(hidden.float(), 0.25)
    return (product * slope * (1 if row_scale is None else row_scale[:, None])).to(hidden.dtype)


@gradient_of_hidden.register_fake
def _(_gradient: Tensor, _weight: Tensor, hidden: Tensor, _row_scale: Tensor | None) -> Tensor:
    return torch.empty_like(hidden)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, normalizes: bool) -> Tensor:  # type: ignore[no-untyped-def]
        rows = x.flatten(0, -2)
        row_scale = None
        if normalizes:
            row_scale = (rows.float().square().mean(-1) + torch.finfo(torch.float32).eps).rsqrt()
        hidden, activated = up_and_activate(rows, up, row_scale)
        ctx.save_for_backward(rows, up, down, row_scale, hidden, activated)
        return F.linear(activated, down).view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        rows, up, down, row_scale, hidden, activated = ctx.saved_tensors
        dy = gradient.flatten(0, -2).contiguous()
        d_hidden = gradient_of_hidden(dy, down, hidden, row_scale)
        d_x = d_hidden @ up
        if row_scale is not None:
            x, g = rows.float(), d_x.float()
            along = (x * g).mean(-1, keepdim=True) * row_scale[:, None].square()
            d_x = (g - x * along).to(rows.dtype)
        return d_x.view_as(gradient), d_hidden.mT @ rows, dy.mT @ activated, None


def mlp(x: Tensor, up: Tensor, down: Tensor, *, normalizes: bool) -> Tensor:
    """Return leaky_relu(x' @ up^T, 0.5)^2 @ down^T, x' the RMS norm of `x` if it `normalizes`.

    x (B, T, D), up (M, D), down (D, M), all in one dtype.
    """
    return _Mlp.apply(x, up, down, normalizes)
