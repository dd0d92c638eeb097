"""Byte-level language models under a byte budget: train, pack, measure in bits per byte.

    import bytejepa
    model = bytejepa.load("model.bjm")                  # ByteLM
    bytejepa.score(model, b"some text").bpb             # bits per byte

Names are imported when first used: `import bytejepa` itself does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bytejepa.artifact.load import load as load
    from bytejepa.codec.compress import compress as compress
    from bytejepa.codec.compress import decompress as decompress
    from bytejepa.model.transformer import ByteLM as ByteLM
    from bytejepa.scoring.evaluate import score as score

_HOMES = {
    "load": "bytejepa.artifact.load",
    "ByteLM": "bytejepa.model.transformer",
    "compress": "bytejepa.codec.compress",
    "decompress": "bytejepa.codec.compress",
    "score": "bytejepa.scoring.evaluate",
}
__all__ = ["ByteLM", "compress", "decompress", "load", "score"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("interop", "review", "inference"):
        return importlib.import_module(f"bytejepa.{name}")
    raise AttributeError(f"module 'bytejepa' has no attribute {name!r}")
