"""Queries, keys and values of a product of all three, with a gradient of one pass, for compiled training on GPUs.

    q, k = gain rotate(x r),  r = 1 / sqrt(mean(x^2) + eps) of each head;   v = x

    n = x r;   t = rotate back(d);   dx = gain r (t - n mean(t n));   dgain = sum of t n      (of values dx = dv)

A compiler fuses what runs over one space of indices: with the gradients of queries, keys and values padded to all heads, that
of the product is one pass instead of three. (A kernel by hand took as long: docs/log.md, 2026-11-27.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def is_half_on_gpu(x: Tensor) -> bool:
    """Return whether `x` is in half precision on a GPU, where the formulas written for a compiler are taken."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _gradient_of_heads(
    d_queries: Tensor, d_keys: Tensor, d_values: Tensor, heads: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `heads` (B, T, heads, E), in its dtype, and of `gain`, float32."""
    E, H, num_rotated = heads.size(-1), d_queries.size(2), gain.size(0)
    G = heads.size(2) - num_rotated
    half, (cos, sin) = cosines.size(-1), _full_tables(cosines, sines, E)
    d_keys, d_values = (_summed_over_repeats(d, G) for d in (d_keys, d_values))

    def of_all_heads(q: Tensor, k: Tensor) -> Tensor:
        return (F.pad(q, (0, 0, 0, 2 * G)) + F.pad(k, (0, 0, H, G))).float()

    # swapped before they are summed: the sum would be written to memory for it
    swapped = of_all_heads(_with_pairs_swapped(d_queries, half), _with_pairs_swapped(d_keys, half))
    turned_back = of_all_heads(d_queries, d_keys) * cos - swapped * sin
    x = F.pad(heads[:, :, :num_rotated], (0, 0, 0, G)).float()
    inverse = _inverse_root_mean_square(x)
    normed = x * inverse
    along = (turned_back * normed).sum(-1)  # (B, T, heads)
    towards = turned_back - normed * (along / E).unsqueeze(-1)
    d_heads = towards * inverse * F.pad(gain.float(), (0, G))[:, None] + F.pad(d_values, (0, 0, num_rotated, 0))
    return d_heads.to(heads.dtype), along.sum((0, 1))[:num_rotated]


def _summed_over_repeats(gradient: Tensor, num_heads: int) -> Tensor:
    """Return the gradient of (B, T, num_heads, E) from that of the same with each head repeated."""
    return gradient if gradient.size(2) == num_heads else gradient.unflatten(2, (num_heads, -1)).sum(3)


class _QueriesKeysValues(torch.autograd.Function):
    """Out of place, in float32 inside, and the gradient over all heads of the product at once.

    Saving the product alone costs nothing, attention keeps it for its values. In half precision only: where `float()` is no
    copy, compiled code of PyTorch 2.11 returns gradients of zero.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, heads: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor, num_queries: int, repeats: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(heads, cosines, sines, gain)
        num_rotated = gain.size(0)
        rotated = normalize_and_rotate_in_float32(heads[:, :, :num_rotated], cosines, sines, gain)
        q, k = rotated.split((num_queries, num_rotated - num_queries), dim=2)
        v = heads[:, :, num_rotated:]
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
        return q, k, v

    @staticmethod
    def backward(ctx, d_queries: Tensor, d_keys: Tensor, d_values: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        heads, cosines, sines, gain = ctx.saved_tensors
        d_heads, d_gain = _gradient_of_heads(d_queries, d_keys, d_values, heads, cosines, sines, gain)
        return d_heads, None, None, d_gain.to(gain.dtype), None, None


def _inverse_root_mean_square(x: Tensor) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()


def _full_tables(cosines: Tensor, sines: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Return (T, 1, E) cosines and sines with which x cos + `_with_pairs_swapped`(x) sin is x rotated."""
    half = cosines.size(-1)
    cos = F.pad(torch.cat((cosines, cosines), -1), (0, E - 2 * half), value=1.0)
    sin = F.pad(torch.cat((sines, -sines), -1), (0, E - 2 * half))
    return cos[:, None], sin[:, None]


def _with_pairs_swapped(x: Tensor, half: int) -> Tensor:
    """Return (b, a, 0) for x = (a, b, rest); by padding, which compilers fuse, where what they concatenate they write first."""
    E = x.size(-1)
    return F.pad(x[..., half : 2 * half], (0, E - half)) + F.pad(x[..., :half], (half, E - 2 * half))


def normalize_and_rotate_in_float32(heads: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor) -> Tensor:
    """Return gain * rotate(rms_norm(heads)) in the dtype of `heads`; nothing is rounded to it on the way."""
    x = heads.float()
    half, (cos, sin) = cosines.size(-1), _full_tables(cosines, sines, x.size(-1))
    inverse = _inverse_root_mean_square(x)
    rotated = x * inverse * cos + _with_pairs_swapped(x, half) * inverse * sin
    return (rotated * gain.float()[:, None]).to(heads.dtype)


def queries_keys_values(
    heads: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor, num_queries: int, *, repeats: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries and keys, normalised, rotated and times `gain`, and the values, of a product's (B, T, heads, E) result.

    `gain` (queries and keys) says how many of the heads are theirs; each of the keys and values comes `repeats` times. For half
    precision on GPUs, under torch.compile.
    """
    q, k, v = _QueriesKeysValues.apply(heads, cosines, sines, gain, num_queries, repeats)
    return q, k, v
