"""A surprise map as one HTML page that needs nothing else: the text, what each byte costs and the program that shows them.

The arrays travel as deflated, base64-coded little-endian bytes; the page unpacks them with the browser's own
decompressor and draws only the rows in view, so a megabyte of text scrolls.

| array | type | meaning |
|---|---|---|
| text | uint8 | the bytes |
| kinds | uint8 | 1 to 4: a character of that many bytes begins; 0: it goes on; 5: part of no character |
| bits | uint16 | bits times 512 |
| alternatives | uint8 (n, 5) | most likely bytes |
| probabilities | uint16 (n, 5) | their probabilities times 65,535 |
"""

from __future__ import annotations

import base64
import zlib

import jinja2
import numpy as np

from bytejepa.inference.surprise import SurpriseMap, character_lengths, surprising_spots

BITS_SCALE = 512
INVALID = 5


def to_html(surprised: SurpriseMap, *, title: str, model: str) -> str:
    """Return the page. `title` names the text and `model` the model, for people to read."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bytejepa.inference", "page"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    about = {
        "title": title,
        "model": model,
        "numBytes": len(surprised.data),
        "totalBits": surprised.total_bits,
        "window": surprised.window,
        "stride": surprised.stride,
        "bitsScale": BITS_SCALE,
        "spots": surprising_spots(surprised),
    }
    page: str = environment.get_template("page.html.jinja").render(
        title=title, about=about, arrays={name: _packed(value) for name, value in _arrays(surprised).items()}
    )
    return page


def _arrays(surprised: SurpriseMap) -> dict[str, np.ndarray]:
    kinds = np.zeros(len(surprised.data), dtype=np.uint8)
    lengths, invalid = character_lengths(surprised.data)
    kinds[lengths.cumsum() - lengths] = np.where(invalid, INVALID, lengths)
    return {
        "text": np.frombuffer(surprised.data, dtype=np.uint8),
        "kinds": kinds,
        "bits": np.minimum(np.rint(surprised.bits * BITS_SCALE), 65535).astype("<u2"),
        "alternatives": surprised.alternatives,
        "probabilities": np.rint(surprised.probabilities * 65535.0).astype("<u2"),
    }


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()
