"""What tests/golden/codec.json pins: tables, logits, frequencies and streams."""

import hashlib
from typing import Any

import numpy as np

from bytejepa.codec import coder
from bytejepa.codec import fixed_point as fp
from bytejepa.codec.lanes import LaneCoder, ids_of
from codec.models import golden_model, inputs

TEXT = "Mr. Speaker — the state of the Union is strong.\n".encode() * 3


def sha256(array: np.ndarray) -> str:
    """Of an array's numbers as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i8").tobytes()).hexdigest()


def measured(lane_coder: LaneCoder) -> dict[str, Any]:
    """The numbers of the golden model at window 64 and hop 32."""
    ids = ids_of(TEXT[:63])[None]
    logits = lane_coder.logits(lane_coder.start(1), ids, 0)
    starts, frequencies = lane_coder.block_intervals(TEXT)
    cosines, sines = fp.rotary_tables(64, 16, 10_000.0)
    tables = {
        "exp2": fp.exp2_table(),
        "tanh": fp.tanh_table(),
        "sigmoid": fp.sigmoid_table(),
        "cos": cosines,
        "sin": sines,
    }
    return {
        "model_sha256": golden_model().sha256.hex(),
        "tables_sha256": {name: sha256(table) for name, table in tables.items()},
        "logits_sha256": sha256(logits),
        "logits_after_bos": logits[0].tolist(),
        "starts": starts.tolist(),
        "frequencies": frequencies.tolist(),
        "streams": {
            name: coder.encode(*lane_coder.block_intervals(data)).hex()
            for name, data in inputs().items()
            if 0 < len(data) <= 256
        },
        "text_stream": coder.encode(starts, frequencies).hex(),
    }
