"""A stride of computation over chunks: a run of middle blocks passed once every s bytes instead of at every byte.

The hourglass of Nawrot et al., "Hierarchical Transformers Are More Efficient Language Models" (arXiv 2110.13711), without
its own layers for the way down and up. Down: a chunk is read at its last position, whose residual has seen all of its
bytes. Up: what the run changed there is added, times a learned scale, to every position from that one on until the next
chunk ends. So position t gets the change of chunk (t + 1) // s - 1, whose last byte is at or before t, and the positions
before the first chunk's end get none. Chunks begin where the context begins; they are not those of JEPA.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def at_chunk_ends(x: Shaped[Tensor, "B N *rest"], stride: int, *, first: int = 0) -> Shaped[Tensor, "B C *rest"]:
    """Return what `x`, of the N positions from `first` on, holds at the last position of each chunk that ends in them."""
    return x[:, stride - 1 - first % stride :: stride]


def of_last_chunk(
    values: Shaped[Tensor, "B C_plus_1 *rest"], stride: int, *, length: int, first: int = 0
) -> Shaped[Tensor, "B N *rest"]:
    """Return for each of the N = `length` positions from `first` on the value of the last chunk that ended there or before.

    `values` begins with that of the last chunk that ended before `first` (anything where there is none), then come those
    of the C chunks that end in these positions.
    """
    offset = first % stride + 1
    return values.repeat_interleave(stride, dim=1)[:, offset : offset + length]


def add_changes(
    x: Float[Tensor, "B N D"],
    changes: Float[Tensor, "B C_plus_1 D"],
    scale: Float[Tensor, " D"],
    stride: int,
    *,
    first: int = 0,
    documents: tuple[Shaped[Tensor, "B C_plus_1"], Shaped[Tensor, "B N"]] | None = None,
) -> Float[Tensor, "B N D"]:
    """Return the residual `x` of the positions from `first` on plus scale * change of the last chunk that ended there or before.

    `changes` as the values of `of_last_chunk`, zero for a chunk that there is not. `documents`: the number of the document
    that each chunk ends in and each position lies in, with document masking; a position takes nothing from another one.
    """
    length = x.size(1)
    change = of_last_chunk(changes, stride, length=length, first=first)
    if documents is not None:
        of_chunks, of_positions = documents
        same = of_last_chunk(of_chunks, stride, length=length, first=first) == of_positions
        change = torch.where(same[..., None], change, 0)
    return torch.addcmul(x, scale.to(x.dtype), change)
