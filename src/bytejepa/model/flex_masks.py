"""Block-sparse masks for FlexAttention: windows and document borders without a T x T tensor."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def block_mask(
    length: int, window: int | None, document_ids: Int[Tensor, "B T"] | None, device: torch.device
) -> BlockMask:
    """Return the mask of causal attention, bounded to `window` keys and to the query's own document where given."""

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - flex's signature
        ok = query >= key
        if window is not None:
            ok = ok & (query - key < window)
        if document_ids is not None:
            ok = ok & (document_ids[batch, query] == document_ids[batch, key])
        return ok

    batch = None if document_ids is None else document_ids.size(0)
    return create_block_mask(allowed, B=batch, H=None, Q_LEN=length, KV_LEN=length, device=str(device))
