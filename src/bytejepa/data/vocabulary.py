"""The byte260 vocabulary: 4 special ids, then one id per byte value (spec section 1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PAD, BOS, EOS, UNK = 0, 1, 2, 3
BYTE_OFFSET = 4
VOCABULARY_SIZE = 260


def ids_from_bytes(data: bytes | bytearray | memoryview) -> npt.NDArray[np.uint16]:
    """Return the ids of raw bytes, (num_bytes,) uint16: byte b is id b + 4. No BOS is added."""
    return np.frombuffer(data, dtype=np.uint8).astype(np.uint16) + np.uint16(BYTE_OFFSET)
