"""What an engine remembers between two bytes: the state of a ByteLM, part by part.

The names follow the module tree of the model: `bigram`, `smear`, `blocks[i].attention`, `jepa`. All buffers are
allocated once, by `Engine.start`, and changed in place.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Float, Int
from torch import Tensor


@dataclasses.dataclass(kw_only=True, slots=True)
class AttentionCache:
    """Keys (normalised and rotated) and values of one block for every position of the window at which it runs: every
    byte, or for a chunk block every whole chunk."""

    keys: Float[Tensor, "L G positions E"]
    values: Float[Tensor, "L G positions E"]


@dataclasses.dataclass(kw_only=True, slots=True)
class JepaState:
    """The latent side path within the current chunk."""

    residual_sum: Float[Tensor, "L D"]
    """Sum of the last residual over the positions of the current chunk that will count in its mean."""
    num_summed: Float[Tensor, "L 1"]
    """Positions in `residual_sum`: all of the chunk's so far, or since the last BOS with document masking."""
    injection: Float[Tensor, "L D"]
    """What is added to the current chunk's positions: the projected prediction from the previous chunk's latent."""


@dataclasses.dataclass(kw_only=True, slots=True)
class EngineState:
    """One or more lanes at the same position. Made by `Engine.start`; `Engine.feed` moves it on."""

    num_lanes: int
    """Lanes L: independent texts that advance together."""
    num_ids: int | None
    """Ids that will be fed in all, where that is known (see `Engine.start`)."""
    begin: int
    """Position in the text of the window's first id."""
    position: int
    """Ids in the window so far; the next id gets this position."""
    window_ids: Int[Tensor, "L W"]
    """The ids in the window; what the tables of pairs and longer runs look back at are the last of them."""
    document_ids: Int[Tensor, "L W"] | None
    """Number of the document each position belongs to; None without document masking."""
    smear_previous: Float[Tensor, "L 1 D"]
    """Normalised embedding of the last id before smearing; 0 at the window's beginning."""
    blocks: tuple[AttentionCache, ...]
    """One cache a block."""
    chunk_change: Float[Tensor, "L D"] | None
    """What the chunk blocks changed at the last whole chunk of the window, 0 before the first; None without such blocks."""
    jepa: JepaState | None
    """None where nothing is injected."""

    @property
    def num_fed(self) -> int:
        """Ids fed so far, those that have left the window included."""
        return self.begin + self.position
