"""Character substitution: training sequences with symbols that the training text does not have.

A small corpus of one domain has few symbols: the addresses of 1934-2010 are ASCII but for three bytes, that of 2021 has
typographic quotes and dashes. What a softmax never sees it drives towards probability zero without bound, so such text
costs 25 to 30 bits a byte. A sequence in which one byte value is replaced throughout by a random Unicode character
teaches the model to take a symbol that it has met in the context for possible.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bytejepa.data.vocabulary import BYTE_OFFSET

SURROGATES = (0xD800, 0xE000)
"""Code points of UTF-16's halves, which UTF-8 does not encode: from, up to."""


def random_character(random: np.random.Generator) -> bytes:
    """Return the UTF-8 bytes of a random character: with equal chances one of two bytes or one of three."""
    if random.random() < 0.5:
        return chr(int(random.integers(0x80, 0x800))).encode()
    low, high = SURROGATES
    code = int(random.integers(0x800, 0x10000 - (high - low)))
    return chr(code if code < low else code + high - low).encode()


def substitute_character(ids: npt.NDArray[np.uint16], random: np.random.Generator) -> npt.NDArray[np.uint16]:
    """Return `ids` with one byte value replaced throughout by a random character, cut to the length it had.

    The value is drawn from those that occur, each with the same chance, so that mostly rarer ones are replaced; specials
    stay as they are.
    """
    present = np.unique(ids)
    present = present[present >= BYTE_OFFSET]
    if not len(present):
        return ids
    replaced = ids == random.choice(present)
    character = np.frombuffer(random_character(random), dtype=np.uint8).astype(np.uint16) + BYTE_OFFSET
    repeats = np.where(replaced, len(character), 1)
    substituted = np.repeat(ids, repeats)
    substituted[np.repeat(replaced, repeats)] = np.tile(character, int(replaced.sum()))
    return substituted[: len(ids)]
