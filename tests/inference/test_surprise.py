"""Surprise maps: the bits of the score, byte by byte, in every form in which they are shown."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from bytejepa.config import replace
from bytejepa.data.vocabulary import BOS, BYTE_OFFSET
from bytejepa.errors import ConfigError, DataError
from bytejepa.inference.surprise import (
    SurpriseMap,
    characters,
    line_totals,
    surprise,
    surprising_spots,
    terminal_text,
    to_csv,
)
from bytejepa.inference.surprise_page import BITS_SCALE, to_html
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import tiny
from bytejepa.scoring.evaluate import score

torch.set_num_threads(1)

TEXT = (
    "Größe <b>naïve</b> & “quoted” 中 😀\ttab\x07\n".encode()
    + b"broken \xff\xfe\x80 bytes\n\n"
    + b"The end of it. " * 12
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def model() -> ByteLM:
    config = replace(
        tiny(),
        model={"num_layers": 2, "model_dim": 32, "rotary_dims": 4, "rotary_length_bytes": 64, "xsa_last_layers": 1},
        jepa={"latent_dim": 12, "hidden_dim": 20, "sigreg_directions": 4},
        evaluation={"window_bytes": 64, "stride_bytes": 16, "batch_bytes": 256},
    )
    built = ByteLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 2 and parameter.size(0) > 2:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return built


@pytest.fixture(scope="module")
def surprised(model: ByteLM) -> SurpriseMap:
    return surprise(model, TEXT)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (64, 64), (32, 8)])
def test_the_bits_sum_to_the_score(model: ByteLM, window: int | None, stride: int | None) -> None:
    result = surprise(model, TEXT, window=window, stride=stride)
    expected = score(model, TEXT, window=window, stride=stride)
    assert len(result.bits) == len(TEXT)
    assert result.bpb == pytest.approx(expected.bpb, rel=1e-12)
    assert (result.window, result.stride) == (expected.window, expected.stride)


def test_alternatives_are_those_of_the_full_forward_pass(model: ByteLM, surprised: SurpriseMap) -> None:
    ids = torch.tensor([[BOS, *(byte + BYTE_OFFSET for byte in TEXT[:63])]])
    with torch.no_grad():
        probabilities = model.logits(ids)[0].softmax(-1)[:, BYTE_OFFSET:]
    values, indices = probabilities.topk(5)
    assert np.array_equal(surprised.alternatives[:64], indices.numpy())
    assert surprised.probabilities[:64] == pytest.approx(values.numpy(), rel=1e-4)
    own = probabilities[torch.arange(64), torch.tensor(list(TEXT[:64]))]
    assert surprised.bits[:64] == pytest.approx(-own.log2().numpy(), rel=1e-4)


def test_characters_cover_every_byte_once() -> None:
    for data in (TEXT, b"", bytes(range(256)), b"\xed\xa0\x80\xf0\x9f\x98", "😀é".encode()):
        rebuilt = b"".join(data[c.offset : c.offset + c.num_bytes] for c in characters(data))
        assert rebuilt == data
        for c in characters(data):
            assert c.text is None or c.text.encode() == data[c.offset : c.offset + c.num_bytes]
    assert [c.text for c in characters(b"a\xff\xc3\xa9")] == ["a", None, "é"]


def test_spots_are_the_costliest_and_apart(surprised: SurpriseMap) -> None:
    spots = surprising_spots(surprised, most=8, apart=10)
    assert spots[0] == int(surprised.bits.argmax())
    assert len(spots) == 8
    assert all(abs(a - b) >= 10 for i, a in enumerate(spots) for b in spots[:i])
    costs = surprised.bits[spots]
    assert (np.diff(costs) <= 0).all()


def test_lines_sum_to_the_whole(surprised: SurpriseMap) -> None:
    lines = line_totals(surprised)
    assert [TEXT[offset : offset + count] for offset, count, _ in lines] == TEXT.splitlines(keepends=True)
    assert sum(bits for _, _, bits in lines) == pytest.approx(surprised.total_bits)
    assert line_totals(surprise_of(b"")) == []


def surprise_of(data: bytes) -> SurpriseMap:
    n = len(data)
    random = np.random.default_rng(0)
    return SurpriseMap(
        data=data,
        bits=random.gamma(0.5, 3, n),
        alternatives=random.integers(0, 256, (n, 5)).astype(np.uint8),
        probabilities=np.full((n, 5), 0.125, dtype=np.float32),
        window=64,
        stride=16,
    )


def test_csv_has_a_line_a_byte(surprised: SurpriseMap) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(surprised))))
    assert [int(row["byte"]) for row in rows] == list(TEXT)
    assert [int(row["offset"]) for row in rows] == list(range(len(TEXT)))
    assert np.array([float(row["bits"]) for row in rows]) == pytest.approx(surprised.bits, abs=1e-6)
    shown = {row["character"] for row in rows}
    assert {"ö", "中", "😀", "\\xff", "\\x07", "\\n", "\\t", ""} <= shown


def test_the_terminal_shows_all_text_in_colour(surprised: SurpriseMap) -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", soft_wrap=True).print(terminal_text(surprised))
    coloured = out.getvalue()
    assert "\x1b[38;2;255;255;255;48;2;" in coloured
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert "broken \\xff\\xfe\\x80 bytes" in plain
    assert "Größe <b>naïve</b>" in plain


def test_the_page_carries_the_arrays_and_needs_no_network(surprised: SurpriseMap) -> None:
    page = to_html(surprised, title="a </title><script>alert(1)</script> & b", model="m.bjm")
    assert "<script>alert" not in page
    assert "a &lt;/title&gt;" in page
    assert re.search(r"(src|href)\s*=", page) is None
    assert "http" not in page.replace("http-equiv", "")

    def unpacked(name: str) -> bytes:
        found = re.search(rf'id="array-{name}">([^<]*)</script>', page)
        assert found is not None
        return zlib.decompress(base64.b64decode(html.unescape(found[1])))

    assert unpacked("text") == TEXT
    bits = np.frombuffer(unpacked("bits"), dtype="<u2") / BITS_SCALE
    assert bits == pytest.approx(surprised.bits, abs=0.51 / BITS_SCALE)
    kinds = np.frombuffer(unpacked("kinds"), dtype=np.uint8)
    assert np.count_nonzero(kinds == 5) == 3
    assert kinds[np.isin(kinds, [1, 2, 3, 4, 5])].clip(max=4).sum() + np.count_nonzero(kinds == 5) * -3 == len(TEXT)


def dump(page: str, folder: Path, fragment: str, size: str = "1300,850") -> str:
    path = folder / "page.html"
    path.write_text(page)
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--window-size={size}", "--dump-dom"]
    run = subprocess.run(
        [CHROMIUM, *options, f"{path.as_uri()}{fragment}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "CONSOLE" not in run.stderr, run.stderr
    return run.stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")


@pytest.mark.integration
@needs_chromium
@pytest.mark.parametrize("size", ["1300,850", "500,800"])  # Chromium makes no window narrower than 500
def test_a_browser_draws_the_page(surprised: SurpriseMap, tmp_path: Path, size: str) -> None:
    offset = TEXT.index("中".encode())
    dom = dump(to_html(surprised, title="t", model="m.bjm"), tmp_path, f"#byte-{offset}", size)
    assert 'data-ready="true"' in dom
    cells = re.findall(r'<span class="(s\d)[^"]*" data-offset="(\d+)"[^>]*>([^<]*)</span>', dom)
    shown = "".join(html.unescape(glyph) for _, _, glyph in cells)
    assert "Größe <b>naïve</b> & “quoted” 中 😀⇥tab\\x07⏎broken \\xff\\xfe\\x80 bytes⏎⏎The end" in shown
    levels = [0.5, 1, 2, 3, 4, 5, 6, 8]
    costs = {c.offset: surprised.bits[c.offset : c.offset + c.num_bytes].sum() for c in characters(TEXT)}
    for level, position, _ in cells:
        near = {sum(costs[int(position)] + slack >= bound for bound in levels) for slack in (-0.005, 0.005)}
        assert int(level[1:]) in near
    tip = dom[dom.index('id="tip"') :]
    assert "U+4E2D" in tip
    for index in range(3):
        assert f"byte 0x{TEXT[offset + index]:02x}" in tip
    assert tip.count("<tr") == 15
    whole = costs[offset]
    assert any(f": {whole + slack:.2f} bits" in tip for slack in (-0.005, 0, 0.005))
    first_line = line_totals(surprised)[0]
    assert f"line 1: {first_line[2]:.1f} bits for {first_line[1]} bytes" in dom
    assert f"{surprised.bpb:.4f}" in dom
    assert dom.count("<mark") == len(surprising_spots(surprised))


HOVER = """<script>
setInterval(() => {
  const cell = document.documentElement.dataset.ready && document.querySelector('[data-offset="OFFSET"]');
  if (cell) cell.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
}, 50);
</script>"""


@pytest.mark.integration
@needs_chromium
def test_pointing_at_a_character_shows_its_bits_and_the_likeliest_bytes(surprised: SurpriseMap, tmp_path: Path) -> None:
    offset = TEXT.index(b"naive".replace(b"i", "ï".encode()))
    page = to_html(surprised, title="t", model="m.bjm") + HOVER.replace("OFFSET", str(offset))
    dom = dump(page, tmp_path, "")
    tip = html.unescape(dom[dom.index('id="tip"') : dom.index('id="spoken"')])
    assert f"n: {surprised.bits[offset]:.2f} bits" in tip
    shown = re.findall(r"<td>([^<]*)</td><td>([\d.]+) %</td>", tip)
    names = [
        chr(byte) if 32 < byte < 127 else {32: "space"}.get(byte, f"0x{byte:02x}")
        for byte in surprised.alternatives[offset]
    ]
    assert [name for name, _ in shown] == names
    assert [float(share) for _, share in shown] == pytest.approx(100 * surprised.probabilities[offset], abs=0.06)
    assert f"running bpb {surprised.bits[: offset + 1].sum() / (offset + 1):.3f}"[:-1] in tip


@pytest.mark.integration
@needs_chromium
@pytest.mark.parametrize("data", [b"", b"a\n" * 500_000, b"word " * 40_000], ids=["empty", "short lines", "one line"])
def test_a_browser_draws_only_what_is_in_view(data: bytes, tmp_path: Path) -> None:
    """A megabyte costs the browser no more elements than a screen, and its end can be reached."""
    fragment = f"#byte-{len(data) - 10}" if data else ""
    dom = dump(to_html(surprise_of(data), title="t", model="m.bjm"), tmp_path, fragment)
    assert 'data-ready="true"' in dom
    assert dom.count("data-offset") < 8000
    if data:
        assert f'data-offset="{len(data) - 10}"' in dom
        assert f"offset {len(data) - 10:,}" in dom
    else:
        assert "nothing to score" in dom


def test_the_command(
    model: ByteLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bytejepa.cli.surprise import Surprise

    monkeypatch.setattr("bytejepa.load", lambda *_, **__: model)
    source = tmp_path / "some.txt"
    source.write_bytes(TEXT)
    path = Path("model.bjm")
    expected = score(model, TEXT)
    assert Surprise(model=path, file=source, json=True).run_command() == 0
    record = json.loads(capsys.readouterr().out)
    assert record["bpb"] == pytest.approx(expected.bpb)
    assert len(record["lines"]) == 4

    Surprise(model=path, file=source).run_command()
    assert f"{expected.bpb:.4f} bpb" in capsys.readouterr().out
    Surprise(model=path, file=source, format="csv").run_command()
    assert capsys.readouterr().out.startswith("offset,byte,character,bits\n0,71,G,")
    Surprise(model=path, file=source, output=tmp_path / "o.html").run_command()
    assert "<!doctype html>" in (tmp_path / "o.html").read_text()
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="exists"):
        Surprise(model=path, file=source, output=tmp_path / "o.html").run_command()
    Surprise(model=path, file=source, output=tmp_path / "o.html", force=True, max_bytes=1).run_command()
    with pytest.raises(ConfigError, match=r"\.html or \.csv"):
        Surprise(model=path, file=source, output=tmp_path / "o.png").run_command()
    with pytest.raises(DataError, match="read"):
        Surprise(model=path, file=tmp_path / "none").run_command()
