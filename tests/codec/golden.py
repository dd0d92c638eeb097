"""What tests/golden/codec.json pins: tables, logits, frequencies and streams."""

import hashlib
import itertools
from typing import Any

import numpy as np

from bytejepa.codec import coder
from bytejepa.codec import fixed_point as fp
from bytejepa.codec.compress import compress
from bytejepa.codec.lanes import LaneCoder, ids_of
from bytejepa.codec.mixed import encode_mixed
from bytejepa.data.corpus import embedded_text
from bytejepa.kernels.context_mixing import mix_content
from bytejepa.kernels.mixing_state import new_mixing, segment_begins
from bytejepa.kernels.mixing_tables import squash_table, stretch_table
from codec.models import golden_model, inputs

TEXT = "Mr. Speaker — the state of the Union is strong.\n".encode() * 3
MIXED_TEXT = embedded_text("val")[:700]


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
        "squash": squash_table(),
        "stretch": stretch_table(),
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
        "mixed_streams": {
            segment_bytes: mixed_stream(lane_coder, TEXT, int(segment_bytes)).hex() for segment_bytes in ("1000", "40")
        },
        "mixed_probabilities_sha256": sha256(probabilities_of_made_up_predictions()),
    }


def mixed_stream(lane_coder: LaneCoder, block: bytes, segment_bytes: int) -> bytes:
    """A block as the model's predictions, mixed with what the block shows, code it."""
    pieces = itertools.pairwise(segment_begins(len(block), segment_bytes))
    paths = np.concatenate([lane_coder.segment_paths(block[begin:end]) for begin, end in pieces])
    return encode_mixed(block, paths, segment_bytes)


def golden_mixed_file() -> bytes:
    """A file of two mixed blocks, as `compress` makes it."""
    return compress(golden_model(), MIXED_TEXT, block_bytes=400, segment_bytes=150, window=64, hop=32)


def probabilities_of_made_up_predictions() -> np.ndarray:
    """What a mixture says of 60,000 bytes in segments of 7,000, for predictions that no model made: enough to fill
    buckets, to follow long matches and to lose them."""
    text = (embedded_text("val")[:20_000] + bytes(range(256)) * 40) * 2
    content = np.frombuffer(text[:60_000], np.uint8)
    paths = np.random.default_rng(0).integers(1, 1 << 16, (len(content), 8)).astype(np.uint16)
    probabilities, bits = np.empty(8 * len(content), np.uint16), np.empty(8 * len(content), np.uint8)
    mix_content(new_mixing(len(content), 7000), content, paths, probabilities, bits)
    return probabilities
