"""UTF-8 as an automaton: which byte may come next, so that what is sampled is always text.

Source: The Unicode Standard, table 3-7 (well-formed byte sequences): no overlong forms, no surrogates, nothing above
U+10FFFF.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

START = 0
"""Between two characters."""
_ONE, _TWO, _AFTER_E0, _AFTER_ED, _THREE, _AFTER_F0, _AFTER_F4 = range(1, 8)
REJECT = -1
MISSING_BYTES = np.array([0, 1, 2, 2, 2, 3, 3, 3])
"""By state: continuation bytes until the character is complete."""

_RANGES = (
    # state, first byte, last byte, next state
    (START, 0x00, 0x7F, START),
    (START, 0xC2, 0xDF, _ONE),
    (START, 0xE0, 0xE0, _AFTER_E0),
    (START, 0xE1, 0xEF, _TWO),
    (START, 0xED, 0xED, _AFTER_ED),
    (START, 0xF0, 0xF0, _AFTER_F0),
    (START, 0xF1, 0xF3, _THREE),
    (START, 0xF4, 0xF4, _AFTER_F4),
    (_ONE, 0x80, 0xBF, START),
    (_TWO, 0x80, 0xBF, _ONE),
    (_AFTER_E0, 0xA0, 0xBF, _ONE),
    (_AFTER_ED, 0x80, 0x9F, _ONE),
    (_THREE, 0x80, 0xBF, _TWO),
    (_AFTER_F0, 0x90, 0xBF, _TWO),
    (_AFTER_F4, 0x80, 0x8F, _TWO),
)


def _transition_table() -> npt.NDArray[np.int8]:
    table = np.full((8, 256), REJECT, dtype=np.int8)
    for state, first, last, following in _RANGES:
        table[state, first : last + 1] = following
    return table


TRANSITIONS = _transition_table()
"""By state and byte: the next state, or REJECT."""


def state_after(text: bytes) -> int:
    """Return the state at the end of `text`: START, unless its last bytes are the beginning of a character."""
    for length in (1, 2, 3):
        state = START
        for byte in text[-length:] if len(text) >= length else b"":
            state = int(TRANSITIONS[state, byte])
            if state == REJECT:
                break
        if state not in (START, REJECT):
            return state
    return START


def allowed_bytes(states: npt.NDArray[np.integer], bytes_left: int) -> npt.NDArray[np.bool_]:
    """Return which bytes may come next in each lane, (L, 256): those that keep the text valid and whose character can
    be completed within `bytes_left` bytes, themselves included."""
    following = TRANSITIONS[states]
    valid = following != REJECT
    # REJECT is the index of the last state here, which does no harm: those bytes are not valid
    allowed = valid & (MISSING_BYTES[following] < bytes_left)
    # a prompt that ends within a character may leave no room to complete it
    return np.where(allowed.any(axis=1, keepdims=True), allowed, valid)
