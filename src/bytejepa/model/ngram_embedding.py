"""What the last few ids add to the token embedding: tables of pairs (BigramHash) and of longer runs (NgramHash).

A row depends on input ids only, the current one and those before it, never on the one to be predicted. `reach` is how
many ids before the current one a table reads: what an incremental pass has to keep.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from bytejepa.config_model import EXACT_BIGRAM_ROWS
from bytejepa.data.vocabulary import BYTE_OFFSET
from bytejepa.kernels.ngram_hash import HASH_BITS, HASH_MULTIPLIER
from bytejepa.model.layers import Linear


class BigramHash(nn.Module):
    """An embedding of the last two ids, through a table of `rows` rows and a projection to the model width.

    `hash` shares rows among pairs, as the reference does; `exact` has one for each pair of bytes and one for the rest.
    """

    reach = 1

    def __init__(self, rows: int, dim: int, model_dim: int, table: Literal["hash", "exact"] = "hash") -> None:
        super().__init__()
        self.rows = rows
        self.table = table
        self.embedding = nn.Embedding(rows, dim)
        self.projection = Linear(dim, model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def row_indices(
        self, ids: Int[Tensor, "B T"], document_start: Bool[Tensor, "B T"] | None = None
    ) -> Int[Tensor, "B T"]:
        """Return the row of each position; the first position of a window (and of a document, if given) has the last row."""
        ids = ids.int()  # products of ids under 260 stay below 2^24
        current, previous = ids[:, 1:], ids[:, :-1]
        if self.table == "exact":
            pair = (previous - BYTE_OFFSET) * 256 + current - BYTE_OFFSET
            mixed = pair.masked_fill(torch.minimum(previous, current) < BYTE_OFFSET, EXACT_BIGRAM_ROWS - 1)
        else:
            mixed = torch.bitwise_xor(36313 * current, 27191 * previous) % (self.rows - 1)
        rows = F.pad(mixed, (1, 0), value=self.rows - 1)
        return rows if document_start is None else rows.masked_fill(document_start, self.rows - 1)

    def forward(
        self, ids: Int[Tensor, "B T"], dtype: torch.dtype, document_start: Bool[Tensor, "B T"] | None = None
    ) -> Tensor:
        """Return what is added to the token embedding, (B, T, D) in `dtype`."""
        rows = F.embedding(self.row_indices(ids, document_start), self.embedding.weight).to(dtype)
        return self.projection(rows) * self.scale.to(dtype)


class NgramHash(nn.Module):
    """Embeddings of the last n ids for several n: one lookup in one table, `rows` rows an order, and one projection."""

    def __init__(self, orders: tuple[int, ...], rows: int, dim: int, model_dim: int) -> None:
        super().__init__()
        self.orders = orders
        self.rows = rows
        self.reach = max(orders) - 1
        self.embedding = nn.Embedding(rows * len(orders), dim)
        self.projection = Linear(dim * len(orders), model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def row_indices(
        self, ids: Int[Tensor, "B T"], document_start: Bool[Tensor, "B T"] | None = None
    ) -> Int[Tensor, "B T orders"]:
        """Return the rows of each position, one an order, in a table that holds the orders one after another.

        Where fewer than n ids of the window (and of the document, if given, its BOS counted) are there, order n has its
        last row.
        """
        position = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
        if document_start is not None:
            position = position - torch.where(document_start, position, 0).cummax(1).values
        hashed = ids.long()
        chosen: list[Tensor] = []
        low_bits = (1 << HASH_BITS) - 1
        for offset in range(1, self.reach + 1):
            earlier = F.pad(ids[:, :-offset], (min(offset, ids.size(1)), 0)).long()
            hashed = (hashed * HASH_MULTIPLIER + earlier) & low_bits
            if offset + 1 in self.orders:
                # a multiplication by the golden ratio moves the information into the high bits; those choose the row
                row = ((hashed * HASH_MULTIPLIER & low_bits) * (self.rows - 1)) >> HASH_BITS
                chosen.append(row.masked_fill(position < offset, self.rows - 1) + self.rows * len(chosen))
        return torch.stack(chosen, dim=-1)

    def forward(
        self, ids: Int[Tensor, "B T"], dtype: torch.dtype, document_start: Bool[Tensor, "B T"] | None = None
    ) -> Tensor:
        """Return what is added to the token embedding, (B, T, D) in `dtype`."""
        rows = F.embedding(self.row_indices(ids, document_start), self.embedding.weight).flatten(2).to(dtype)
        return self.projection(rows) * self.scale.to(dtype)
