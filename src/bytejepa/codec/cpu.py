"""The compiled path: `LaneCoder` on a CPU."""

from __future__ import annotations

import numpy as np

from bytejepa.codec.forward import feed, fill_frequencies
from bytejepa.codec.integer_model import IntegerModel
from bytejepa.codec.lanes import Ids, LaneCoder
from bytejepa.codec.packed_model import LaneState, PackedModel, new_state, pack_model


class CpuCoder(LaneCoder):
    """Compiled integer kernels; several threads may use one coder at once, each with its own states."""

    def __init__(self, model: IntegerModel, window: int, hop: int) -> None:
        super().__init__(window, hop)
        self.packed: PackedModel = pack_model(model, window)

    def start(self, num_lanes: int) -> LaneState:
        """Return zeroed buffers."""
        return new_state(self.packed, num_lanes)

    def logits(self, state: LaneState, ids: Ids, position: int, first_wanted: int = 0) -> Ids:
        """See `LaneCoder.logits`."""
        out = np.empty((ids.shape[0] * (ids.shape[1] - first_wanted), 256), np.int64)
        feed(self.packed, state, ids, position, first_wanted, out)
        return out

    def frequencies(self, logits: Ids) -> Ids:
        """See `LaneCoder.frequencies`."""
        fill_frequencies(logits, self.packed.exp2, logits)
        return logits
