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
    half = cosines.size(-1)
    cos, sin = cosines[:, None, :], sines[:, None, :]
    a, b = x[..., :half], x[..., half : 2 * half]
    new_a = (a * cos).addcmul_(b, sin)
    new_b = (b * cos).addcmul_(a, sin, value=-1)
    a.copy_(new_a)
    b.copy_(new_b)
    return x


def normalize_and_rotate(heads: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor) -> Tensor:
    """Return gain * rotate(rms_norm(heads)); see `layers.normalize_and_rotate`."""
    return _NormalizeAndRotate.apply(heads, cosines, sines, gain)


ATTENTION_BLOCK = 64
"""Queries a block: small enough that a block's scores stay in the cache, large enough for the products to be fast."""
ATTENTION_MAX_LENGTH = 1024
"""Longest context for which the probabilities, T^2 / 2 numbers a head, are kept for the backward pass."""


class _CausalAttention(torch.autograd.Function):
    """Exact causal attention, a block of queries at a time against the keys before its end.

    The query heads that share a key head are rows of one product, so keys and values are never repeated.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        B, T, H, E = q.shape
        G = k.size(2)
        q = q.transpose(1, 2).reshape(B * G, H // G, T, E)
        k = k.transpose(1, 2).reshape(B * G, T, E)
        v = v.transpose(1, 2).reshape(B * G, T, E)
        future = torch.full((ATTENTION_BLOCK, ATTENTION_BLOCK), -torch.inf).triu(1)
        outputs, probabilities = [], []
        for begin in range(0, T, ATTENTION_BLOCK):
            end = min(begin + ATTENTION_BLOCK, T)
            size = end - begin
            rows = q[:, :, begin:end].reshape(B * G, -1, E)
            scores = torch.bmm(rows, k[:, :end].mT).mul_(E**-0.5)
            scores.view(B * G, H // G, size, end)[..., begin:].add_(future[:size, :size])
            probability = torch.softmax(scores, -1)
            outputs.append(torch.bmm(probability, v[:, :end]).view(B * G, H // G, size, E))
            probabilities.append(probability)
        ctx.save_for_backward(q, k, v, *probabilities)
        return torch.cat(outputs, 2).view(B, H, T, E).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        q, k, v, *probabilities = ctx.saved_tensors
        (pairs, repeats, T, E), scale = q.shape, q.size(-1) ** -0.5
        B, H = grad.size(0), grad.size(2)
        grad = grad.transpose(1, 2).reshape(pairs, repeats, T, E)
        grad_k, grad_v, grads_q = torch.zeros_like(k), torch.zeros_like(v), []
        for number, probability in enumerate(probabilities):
            begin = number * ATTENTION_BLOCK
            end = probability.size(-1)
            rows = q[:, :, begin:end].reshape(pairs, -1, E)
            grad_rows = grad[:, :, begin:end].reshape(pairs, -1, E)
            grad_v[:, :end] += torch.bmm(probability.mT, grad_rows)
            grad_probability = torch.bmm(grad_rows, v[:, :end].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probability, probability, -1, torch.float32)
            grads_q.append(torch.bmm(grad_scores, k[:, :end]).mul_(scale).view(pairs, repeats, end - begin, E))
            grad_k[:, :end] += torch.bmm(grad_scores.mT, rows).mul_(scale)
        grad_q = torch.cat(grads_q, 2).view(B, H, T, E).transpose(1, 2)
        return grad_q, *(g.view(B, -1, T, E).transpose(1, 2) for g in (grad_k, grad_v))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention of (B, T, heads, E) queries, keys and values; for training at T up to ATTENTION_MAX_LENGTH."""
    return _CausalAttention.apply(q, k, v)


def rms_norm(x: Tensor) -> Tensor:
    """Return `x` / sqrt(mean(x^2) + eps) along the last axis."""
    return _RmsNorm.apply(x)


def leaky_relu_squared(x: Tensor) -> Tensor:
    """Return leaky_relu(x, 0.5)^2."""
    return _LeakyReluSquared.apply(x)
