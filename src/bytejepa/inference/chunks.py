"""JEPA's injection, a few positions at a time (spec section 3; the parallel form is `bytejepa.model.jepa.Jepa`).

What is added to a chunk is a function of the chunk before it, so it is computed once, when a chunk ends, and kept until
the next one ends. A block of positions is cut at chunk borders: the rest of a chunk under way, whole chunks together,
the beginning of the next.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bytejepa.inference.state import JepaState
from bytejepa.model.jepa import Jepa


class ChunkInjector:
    """Adds the injection of `jepa` to residuals that arrive in order."""

    def __init__(self, jepa: Jepa, dtype: torch.dtype) -> None:
        self.jepa = jepa
        self.chunk_bytes = jepa.config.chunk_bytes
        with torch.no_grad():
            # what a chunk gets that has no predecessor, (D,)
            self.at_start = jepa.injection(jepa.predictor(jepa.start.to(dtype)))

    def start(self, num_lanes: int) -> JepaState:
        """Return the state at the beginning of a window."""
        width = self.at_start.size(0)
        state = JepaState(
            residual_sum=self.at_start.new_zeros(num_lanes, width),
            num_summed=self.at_start.new_zeros(num_lanes, 1),
            injection=self.at_start.new_zeros(num_lanes, width),
        )
        self.reset(state)
        return state

    def reset(self, state: JepaState) -> None:
        """Take `state` back to the beginning of a window."""
        self._begin_chunk(state, self.at_start)

    def advance(
        self, state: JepaState, x: Float[Tensor, "L N D"], position: int, starts: Bool[Tensor, "L N"] | None
    ) -> Float[Tensor, "L N D"]:
        """Return `x`, the residuals of N positions from `position` on, with the injection added, and move `state` on.

        `starts`: where a document begins, with document masking.
        """
        P, length = self.chunk_bytes, x.size(1)
        head = min(-position % P, length)
        whole = (length - head) // P * P
        pieces = []
        for first, last in ((0, head), (head, head + whole), (head + whole, length)):
            if first == last:
                continue
            piece = x[:, first:last]
            piece_starts = None if starts is None else starts[:, first:last]
            if (position + first) % P == 0 and last - first >= P:
                pieces.append(self._whole_chunks(state, piece, piece_starts))
            else:
                pieces.append(self._part_of_chunk(state, piece, piece_starts))
                if (position + last) % P == 0:
                    self._end_chunk(state, piece[:, -1])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _part_of_chunk(self, state: JepaState, x: Tensor, starts: Tensor | None) -> Tensor:
        if starts is None:
            state.residual_sum.add_(x.sum(1))
            state.num_summed.add_(x.size(1))
            return x + state.injection[:, None]
        injected = []
        for offset in range(x.size(1)):  # fewer than P positions
            started = starts[:, offset, None]
            state.residual_sum.masked_fill_(started, 0).add_(x[:, offset])
            state.num_summed.masked_fill_(started, 0).add_(1)
            state.injection.copy_(torch.where(started, self.at_start, state.injection))
            injected.append(x[:, offset] + state.injection)
        return torch.stack(injected, dim=1)

    def _end_chunk(self, state: JepaState, last: Tensor) -> None:
        latent = self.jepa.projector(state.residual_sum / state.num_summed)
        self._begin_chunk(state, self.jepa.injection(self.jepa.predictor(self.jepa.context_of(latent, last))))

    def _begin_chunk(self, state: JepaState, injection: Tensor) -> None:
        state.residual_sum.zero_()
        state.num_summed.zero_()
        state.injection.copy_(injection)

    def _whole_chunks(self, state: JepaState, x: Tensor, starts: Tensor | None) -> Tensor:
        # with document masking Jepa.latents means over the positions since the last BOS of each chunk
        context = self.jepa.latents(x, starts).context  # (L, C, Z or D)
        following = self.jepa.injection(self.jepa.predictor(context))
        added = torch.cat((state.injection[:, None], following[:, :-1]), dim=1)
        per_position = added.repeat_interleave(self.chunk_bytes, dim=1)
        if starts is not None:
            fresh = starts.unflatten(1, (-1, self.chunk_bytes)).cumsum(-1).flatten(1) > 0
            per_position = torch.where(fresh[..., None], self.at_start, per_position)
        self._begin_chunk(state, following[:, -1])
        return x + per_position
