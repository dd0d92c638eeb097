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
        # leaky(x, 1/2)^2 = x leaky(x, 1/4), whose derivative is 2 leaky(x, 1/4): one tensor serves both
        quarter = torch.nn.functional.leaky_relu(x, 0.25)
        ctx.save_for_backward(quarter)
        return x * quarter

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (quarter,) = ctx.saved_tensors
        return (grad * quarter).mul_(2)


class _DropAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, v: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        groups, v = y.unflatten(2, (v.size(2), -1)), v[:, :, :, None]  # (B, T, G, R, E), (B, T, G, 1, E)
        inverse = torch.linalg.vecdot(v, v).clamp_min_(1e-24).reciprocal_()  # (B, T, G, 1)
        share = (torch.linalg.vecdot(groups, v) * inverse)[..., None]
        ctx.save_for_backward(groups, v, inverse, share)
        return torch.addcmul(groups, share, v, value=-1).flatten(2, 3)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        groups, v, inverse, share = ctx.saved_tensors
        grad = grad.view(groups.shape)
        along = (torch.linalg.vecdot(grad, v) * inverse)[..., None]
        grad_y = torch.addcmul(grad, along, v, value=-1).flatten(2, 3)
        towards = torch.addcmul(share * grad, along, groups).sum(-2)
        both = (share * along).sum(-2).mul_(2)
        return grad_y, torch.addcmul(-towards, both, v[:, :, :, 0])


class _SoftcappedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, bound: float) -> Tensor:  # type: ignore[no-untyped-def]
        capped = (logits * (1 / bound)).tanh_()
        log_probability = torch.log_softmax(capped * bound, -1)
        ctx.save_for_backward(capped, log_probability, targets)
        return torch.nn.functional.nll_loss(log_probability, targets)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        capped, log_probability, targets = ctx.saved_tensors
        d = torch.exp(log_probability)
        d[torch.arange(len(targets)), targets] -= 1
        d.mul_(grad / len(targets))
        return torch.addcmul(d, d * capped, capped, value=-1), None, None  # tanh' = 1 - tanh^2


class _NormalizeAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        mean_square = torch.linalg.vector_norm(heads, dim=-1, keepdim=True).square_().div_(heads.size(-1))
        inverse = mean_square.add_(torch.finfo(heads.dtype).eps).rsqrt_()
        rotated = _rotate_in_place(heads * inverse, cosines, sines)
        ctx.save_for_backward(rotated, inverse, cosines, sines, gain)
        return rotated * gain[:, None]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        rotated, inverse, cosines, sines, gain = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, rotated)  # (B, T, heads)
        # rotation keeps lengths and angles, so the norm's gradient is taken in rotated space and turned back once
        projection = (along / rotated.size(-1)).unsqueeze(-1)
        grad_heads = torch.addcmul(grad, rotated, projection, value=-1).mul_(inverse * gain[:, None])
        return _rotate_in_place(grad_heads, cosines, -sines), None, None, along.sum((0, 1))


def _rotate_in_place(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (a, b) of the leading dimensions of `x`, both halves at once."""
    half = cosines.size(-1)
    pairs = x[..., : 2 * half]
    swapped = pairs.unflatten(-1, (2, half)).flip(-2).flatten(-2)  # (b, a)
    pairs.mul_(torch.cat((cosines, cosines), -1)[:, None]).addcmul_(swapped, torch.cat((sines, -sines), -1)[:, None])
    return x


def normalize_and_rotate(heads: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor) -> Tensor:
    """Return gain * rotate(rms_norm(heads)); see `layers.normalize_and_rotate`."""
    return _NormalizeAndRotate.apply(heads, cosines, sines, gain)


class _MixResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, x0: Tensor, mix: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, x0, mix)
        return torch.mul(x, mix[0]).addcmul_(x0, mix[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        x, x0, mix = ctx.saved_tensors
        scratch = grad * x
        grad_x_share = scratch.flatten(0, -2).sum(0)
        grad_x0_share = torch.mul(grad, x0, out=scratch).flatten(0, -2).sum(0)
        return grad * mix[0], grad * mix[1], torch.stack((grad_x_share, grad_x0_share))


def mix_residual(x: Tensor, x0: Tensor, mix: Tensor) -> Tensor:
    """Return mix[0] x + mix[1] x0."""
    return _MixResidual.apply(x, x0, mix)


def drop_along(y: Tensor, v: Tensor) -> Tensor:
    """Return heads `y` (B, T, H, E) without their component along their group's `v` (B, T, G, E)."""
    return _DropAlong.apply(y, v)


def softcapped_cross_entropy(logits: Tensor, targets: Tensor, bound: float) -> Tensor:
    """Return the mean cross-entropy in nats of bound * tanh(logits / bound), (N, V), against `targets` (N,)."""
    return _SoftcappedCrossEntropy.apply(logits, targets, bound)


def rms_norm(x: Tensor) -> Tensor:
    """Return `x` / sqrt(mean(x^2) + eps) along the last axis."""
    return _RmsNorm.apply(x)


def leaky_relu_squared(x: Tensor) -> Tensor:
    """Return leaky_relu(x, 0.5)^2."""
    return _LeakyReluSquared.apply(x)
