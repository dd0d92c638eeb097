"""Hand-written gradients for eager CPU training.

Eager autograd writes every intermediate of a norm or an activation to memory and reads it back, which at small widths
costs as much as the matrix products. These functions compute the same values in fewer passes. Under torch.compile the
compiler fuses the plain formulas itself, so they are used in eager mode on a CPU only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_profitable(x: Tensor) -> bool:
    """Return whether the hand-written version of an operation should be taken for `x`."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        dim = x.size(-1)
        # the norm is one pass; torch's own composite squares into a temporary first
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(dim)
        inverse = mean_square.add_(torch.finfo(x.dtype).eps).rsqrt_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        y, inverse = ctx.saved_tensors
        projection = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(y.size(-1))
        return torch.addcmul(grad, y, projection, value=-1).mul_(inverse)


class _LeakyReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        activated = torch.nn.functional.leaky_relu(x, 0.5)
        ctx.save_for_backward(activated)
        return activated.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (activated,) = ctx.saved_tensors
        # d/dx leaky(x)^2 = 2 leaky(x) leaky'(x); leaky(x) has the sign of x, so it says which slope holds
        return torch.ops.aten.leaky_relu_backward(grad * activated, activated, 0.5, True).mul_(2)


def rms_norm(x: Tensor) -> Tensor:
    """Return `x` / sqrt(mean(x^2) + eps) along the last axis."""
    return _RmsNorm.apply(x)


def leaky_relu_squared(x: Tensor) -> Tensor:
    """Return leaky_relu(x, 0.5)^2."""
    return _LeakyReluSquared.apply(x)
