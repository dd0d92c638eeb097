"""Classes of bytes, by what they are in text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bytejepa.data.vocabulary import BOS, BYTE_OFFSET, VOCABULARY_SIZE

CLASSES = (
    "lower-case letters",
    "upper-case letters",
    "digits",
    "space",
    "line breaks and tabs",
    "punctuation",
    "control bytes",
    "UTF-8 lead bytes",
    "UTF-8 continuation bytes",
    "bytes never in UTF-8",
    "document starts (BOS)",
    "other specials",
)


def _class_of_byte(byte: int) -> str:
    character = chr(byte)
    if byte >= 0x80:
        if byte < 0xC0:
            return "UTF-8 continuation bytes"
        # C0 and C1 would be overlong, F5 and above beyond U+10FFFF (RFC 3629)
        return "UTF-8 lead bytes" if 0xC2 <= byte <= 0xF4 else "bytes never in UTF-8"
    if character.islower():
        return "lower-case letters"
    if character.isupper():
        return "upper-case letters"
    if character.isdigit():
        return "digits"
    if character == " ":
        return "space"
    if character in "\n\r\t":
        return "line breaks and tabs"
    return "punctuation" if character.isprintable() else "control bytes"


def _class_of_id(token: int) -> str:
    if token >= BYTE_OFFSET:
        return _class_of_byte(token - BYTE_OFFSET)
    return "document starts (BOS)" if token == BOS else "other specials"


CLASS_OF_ID: npt.NDArray[np.int64] = np.array([CLASSES.index(_class_of_id(token)) for token in range(VOCABULARY_SIZE)])
"""Index into CLASSES of every id, (260,)."""
