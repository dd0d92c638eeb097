"""Exact causal attention for training on a CPU, a block of positions at a time, eager or compiled.

PyTorch's flash kernel for CPUs reaches a third of the speed of the same cores' matrix products. Here the work is batched
products with contiguous results, the only ones that the library computes as one, on few enough scores at a time for the
cache. An operator of its own, so that a compiler keeps the loop as it is and fuses what surrounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Queries a block: small enough that a block's scores stay in the cache, large enough for the products to be fast."""
SCORES_AT_ONCE = 1 << 20
"""Scores at a time, in as many heads as that makes: they then stay in the cache, too."""
MAX_LENGTH = 1024
"""Longest context for which the probabilities, T^2 / 2 numbers a head, are kept for the backward pass."""


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale * a @ b of batches, the scale for nothing: it is a parameter of the library's product."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def _attend(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return (B G, T R, E) attention of query `rows` to (B G, T, E) keys and values, and each block's probabilities."""
    T, scale = k.size(1), k.size(2) ** -0.5
    R = rows.size(1) // T
    future = torch.full((BLOCK, BLOCK), -torch.inf).triu(1).repeat_interleave(R, 0)
    output, probabilities = torch.empty_like(rows), []
    for part, begin, end in _blocks(k, R):
        queries = slice(begin * R, end * R)
        scores = _product(rows[part, queries], k[part, :end].mT, scale)
        scores[..., begin:].add_(future[: (end - begin) * R, : end - begin])
        probability = torch.softmax(scores, -1)
        output[part, queries] = torch.bmm(probability, v[part, :end])
        probabilities.append(probability)
    return output, probabilities


def _blocks(k: Tensor, repeats: int) -> list[tuple[slice, int, int]]:
    """Return which heads of keys, and the queries of which positions, from and to, are taken at a time."""
    heads, T = k.size(0), k.size(1)
    at_once = max(1, SCORES_AT_ONCE // (BLOCK * repeats * T))
    return [
        (slice(head, min(head + at_once, heads)), begin, min(begin + BLOCK, T))
        for head in range(0, heads, at_once)
        for begin in range(0, T, BLOCK)
    ]


def _shapes(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:  # noqa: ARG001 - the operator's signature
    R = rows.size(1) // k.size(1)
    shapes = [(part.stop - part.start, (end - begin) * R, end) for part, begin, end in _blocks(k, R)]
    return torch.empty_like(rows), [rows.new_empty(shape) for shape in shapes]


def _attend_back(
    grad_rows: Tensor, rows: Tensor, k: Tensor, v: Tensor, probabilities: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `rows`, `k` and `v`, given that of `_attend`'s output."""
    R, scale = rows.size(1) // k.size(1), k.size(2) ** -0.5
    grad_q, grad_k, grad_v = torch.empty_like(rows), torch.empty_like(k), torch.empty_like(v)
    blocks = list(zip(_blocks(k, R), probabilities, strict=True))
    for (part, begin, end), probability in reversed(blocks):
        # the last block of a head comes first and sees all keys: it fills, the others add
        queries = slice(begin * R, end * R)
        add = Tensor.copy_ if end == k.size(1) else Tensor.add_
        add(grad_v[part, :end], torch.bmm(probability.mT, grad_rows[part, queries]))
        grad_probability = torch.bmm(grad_rows[part, queries], v[part, :end].mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probability, probability, -1, torch.float32)
        grad_q[part, queries] = _product(grad_scores, k[part, :end], scale)
        add(grad_k[part, :end], _product(grad_scores.mT, rows[part, queries], scale))
    return grad_q, grad_k, grad_v


def _gradient_shapes(_: Tensor, rows: Tensor, k: Tensor, v: Tensor, __: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(k), torch.empty_like(v)


def _operator(
    name: str, schema: str, call: Callable[..., Any], shapes: Callable[..., Any], gradient: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Return `call` as an operator; in one expression, for submissions take over definitions, not what runs beside them."""
    operator = torch.library.custom_op(f"bytejepa::{name}", call, mutates_args=(), schema=schema)
    operator.register_fake(shapes)
    if gradient is not None:
        operator.register_autograd(gradient, setup_context=_keep_for_gradient)
    return operator


_gradient_in_blocks = _operator(
    "attention_in_blocks_gradient",
    "(Tensor grad_rows, Tensor rows, Tensor k, Tensor v, Tensor[] probabilities) -> (Tensor, Tensor, Tensor)",
    _attend_back,
    _gradient_shapes,
    None,
)


def _keep_for_gradient(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, list[Tensor]]) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # the probabilities have none
    ctx.save_for_backward(*inputs, *output[1])


def _gradient_of_attention(ctx, grad: Tensor, _: list[Tensor | None]) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    rows, k, v, *probabilities = ctx.saved_tensors
    gradients: tuple[Tensor, ...] = _gradient_in_blocks(grad.contiguous(), rows, k, v, probabilities)
    return gradients


_attention_in_blocks = _operator(
    "attention_in_blocks",
    "(Tensor rows, Tensor k, Tensor v) -> (Tensor, Tensor[])",
    _attend,
    _shapes,
    _gradient_of_attention,
)


def _rows(x: Tensor, repeats: int) -> Tensor:
    """Return (B, T, heads, E) as (B heads / repeats, T repeats, E), contiguous."""
    _, T, heads, E = x.shape
    return x.unflatten(2, (heads // repeats, repeats)).transpose(1, 2).reshape(-1, T * repeats, E)


def _heads(rows: Tensor, batch: int, repeats: int) -> Tensor:
    """Return what `_rows` made as (B, T, heads, E) again."""
    return rows.view(batch, -1, rows.size(1) // repeats, repeats, rows.size(2)).transpose(1, 2).flatten(2, 3)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention of (B, T, heads, E) queries, keys and values; for training at T up to MAX_LENGTH.

    Exact, a block of positions at a time against the keys before its end. The R = H / G query heads that share a key head
    are rows of one product, position by position, so that keys and values are never repeated and a block is a slice.
    """
    B, R = q.size(0), q.size(2) // k.size(2)
    output, _ = _attention_in_blocks(_rows(q, R), _rows(k, 1), _rows(v, 1))
    return _heads(output, B, R)
