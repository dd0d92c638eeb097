"""The model that comes with the package, so that compression works out of the box."""

from __future__ import annotations

from pathlib import Path

from bytejepa.errors import CodecError

SHIPPED_MODEL = Path(__file__).parent / "shipped" / "english.bjm"


def shipped_model_path() -> Path:
    """Return where the shipped model is. Raises: CodecError if this installation has none."""
    if not SHIPPED_MODEL.is_file():
        raise CodecError("this installation has no model of its own", hint="name an artifact with --model")
    return SHIPPED_MODEL
