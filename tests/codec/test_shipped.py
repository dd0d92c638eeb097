"""The model that comes with the package: it is there, it is the one described, and it compresses English."""

import lzma

import bytejepa
from bytejepa.codec.shipped import shipped_model_path
from bytejepa.data.corpus import embedded_text


def test_the_shipped_model_restores_text_and_beats_xz() -> None:
    text = embedded_text("val")[20_000:21_500]
    model = bytejepa.load(shipped_model_path())
    packed = bytejepa.compress(model, text)
    assert bytejepa.decompress(model, packed) == text
    assert len(packed) < 0.75 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def test_its_note_says_how_large_it_is() -> None:
    note = (shipped_model_path().parent / "README.md").read_text(encoding="utf-8")
    assert f"{shipped_model_path().stat().st_size:,} bytes" in note
