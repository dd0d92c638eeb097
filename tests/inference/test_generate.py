"""Generated text: the same for the same seed, valid UTF-8, and drawn as the options say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bytejepa.config import replace
from bytejepa.data.vocabulary import BOS, BYTE_OFFSET
from bytejepa.errors import ArtifactError, ConfigError
from bytejepa.inference import utf8
from bytejepa.inference.engine import Engine
from bytejepa.inference.generate import generate, generate_samples, generation_engine
from bytejepa.inference.sampling import RepetitionPenalty, Sampling, draw, uniform
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> ByteLM:
    config = replace(
        tiny(),
        model={"num_layers": 2, "model_dim": 32, "rotary_dims": 4, "rotary_length_bytes": 64, "xsa_last_layers": 1}
        | {"bigram_rows": 61, "bigram_dim": 8},
        jepa={"latent_dim": 12, "hidden_dim": 20, "sigreg_directions": 4},
        evaluation={"window_bytes": 64, "stride_bytes": 16},
    )
    built = ByteLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 2 and parameter.size(0) > 2:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return built


def text(model: ByteLM | Engine, prompt: bytes = b"The ", **options: object) -> bytes:
    return b"".join(generate(model, prompt, **options))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_text_and_another_another(model: ByteLM) -> None:
    first = text(model, num_bytes=200, seed=7)
    assert len(first) == 200
    assert text(model, num_bytes=200, seed=7) == first
    assert text(model, num_bytes=200, seed=8) != first
    assert (
        text(model, num_bytes=100, seed=7, valid_utf8=False)
        == text(model, num_bytes=200, seed=7, valid_utf8=False)[:100]
    )


def test_a_sample_does_not_depend_on_those_beside_it(model: ByteLM) -> None:
    steps = list(generate_samples(model, b"It is", num_samples=3, num_bytes=150, seed=5))
    together = [b"".join(pieces) for pieces in zip(*steps, strict=True)]
    assert len(set(together)) == 3
    assert together == [text(model, b"It is", num_bytes=150, seed=5, sample=number) for number in range(3)]
    later = list(generate_samples(model, b"It is", num_samples=2, first_sample=1, num_bytes=150, seed=5))
    assert [b"".join(pieces) for pieces in zip(*later, strict=True)] == together[1:]


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 5, 64, 301])
def test_every_piece_is_valid_utf8_and_the_length_is_exact(model: ByteLM, num_bytes: int) -> None:
    for seed in range(3):
        pieces = list(generate(model, num_bytes=num_bytes, seed=seed, temperature=3.0))
        for piece in pieces:
            assert len(piece.decode()) == 1
        assert len(b"".join(pieces)) == num_bytes
    if num_bytes == 301:
        assert any(len(piece) > 1 for piece in pieces), "the random model should write other than ASCII"


def test_unconstrained_bytes_are_any_bytes(model: ByteLM) -> None:
    data = text(model, num_bytes=300, temperature=3.0, valid_utf8=False)
    assert len(data) == 300
    with pytest.raises(UnicodeDecodeError):
        data.decode()


def test_a_prompt_that_ends_within_a_character_is_completed(model: ByteLM) -> None:
    for prompt in ("é".encode()[:1], "€".encode()[:1], "€".encode()[:2], "😀".encode()[:3], "😀".encode()[:1]):
        (prompt + text(model, prompt, num_bytes=40, temperature=2.0)).decode()
    assert len(text(model, "😀".encode()[:1], num_bytes=1)) == 1, "no room to complete it"


def test_temperature_zero_is_the_most_likely_byte_of_the_full_forward_pass(model: ByteLM) -> None:
    prompt = b"Some words"
    ids = [BOS, *(byte + BYTE_OFFSET for byte in prompt)]
    expected = bytearray()
    for _ in range(30):
        padded = torch.tensor([ids + [BYTE_OFFSET] * (-len(ids) % 8)])
        best = model.logits(padded)[0, len(ids) - 1, BYTE_OFFSET:].argmax()
        expected.append(int(best))
        ids.append(int(best) + BYTE_OFFSET)
    assert text(model, prompt, num_bytes=30, temperature=0, valid_utf8=False) == bytes(expected)


def test_a_prompt_beyond_the_window_counts_only_as_far_as_the_window_reaches(model: ByteLM) -> None:
    engine = generation_engine(model)
    assert (engine.window, engine.hop) == (64, 32)
    long = bytes(range(32, 127)) * 3
    # BOS and 285 bytes: 7 hops, so the window begins at id 224, which is byte 223
    other = b"?" * 223 + long[223:]
    assert text(engine, long, num_bytes=60) == text(engine, other, num_bytes=60)
    assert text(engine, long, num_bytes=60) != text(engine, b"?" * 224 + long[224:], num_bytes=60)


def test_specials_are_never_drawn_and_damage_is_reported(model: ByteLM) -> None:
    logits = np.zeros((1, 256))
    assert {int(draw(logits, None, [u], Sampling())[0]) for u in np.linspace(0, 1 - 2**-53, 2000)} == set(range(256))
    broken = ByteLM(model.config)
    with torch.no_grad():
        broken.token_embedding.weight.fill_(float("nan"))
    with pytest.raises(ArtifactError, match="not finite"):
        list(generate(broken, num_bytes=1))


def test_draws_follow_the_distribution() -> None:
    logits = np.full((1, 256), -40.0)
    logits[0, [65, 66, 67]] = np.log([0.5, 0.3, 0.2])
    counts = np.bincount(
        [draw(logits, None, [uniform(0, 0, p)], Sampling(temperature=1.0))[0] for p in range(4000)], minlength=256
    )
    assert counts[[65, 66, 67]] / 4000 == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    cold = np.bincount(
        [draw(logits, None, [uniform(0, 0, p)], Sampling(temperature=0.5))[0] for p in range(4000)], minlength=256
    )
    assert cold[[65, 66, 67]] / 4000 == pytest.approx(np.array([0.25, 0.09, 0.04]) / 0.38, abs=0.03)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {65, 66}),
        ({"top_p": 0.5}, {65}),
        ({"top_p": 0.51}, {65, 66}),
        ({"min_p": 0.5}, {65, 66}),
        ({"min_p": 1.0}, {65}),
        ({"top_k": 3, "min_p": 0.3}, {65, 66, 67}),
        ({"top_p": 1.0}, {65, 66, 67, 68}),
    ],
)
def test_cuts(options: dict[str, float], kept: set[int]) -> None:
    logits = np.full((2, 256), -800.0)
    logits[:, [65, 66, 67, 68]] = np.log([0.5, 0.25, 0.2, 0.05])
    sampling = Sampling(temperature=1.0, **options)  # type: ignore[arg-type]
    drawn = {int(byte) for u in np.linspace(0, 0.9999, 300) for byte in draw(logits, None, [u, 1 - 2**-53], sampling)}
    assert drawn == kept


def test_the_repetition_penalty_matches_a_plain_count() -> None:
    sampling = Sampling(repetition_penalty=0.5, repetition_allowed_bytes=3, repetition_window_bytes=20)
    random = np.random.default_rng(0)
    said = random.integers(97, 99, 60).astype(np.uint8)
    tracker = RepetitionPenalty(sampling, 1, said[:10].tobytes(), 60)
    for end in range(10, 60):
        begin = max(0, end - 20)
        plain = np.zeros(256)
        for j in range(begin, end):
            length = 0
            # where a repeat stands must be within the window; how far back it goes need not
            while j > length and said[j - length - 1] == said[end - length - 1]:
                length += 1
            plain[said[j]] = max(plain[said[j]], 0.5 * max(0, length + 1 - 3))
        assert tracker.penalties()[0] == pytest.approx(plain)
        tracker.push(said[end : end + 1])


def test_the_repetition_penalty_ends_a_loop(model: ByteLM) -> None:
    looping = text(model, num_bytes=400, temperature=0)
    free = text(model, num_bytes=400, temperature=0, repetition_penalty=2.0, repetition_allowed_bytes=4)

    def longest_repeat(data: bytes) -> int:
        return max(
            n for n in range(1, 200) if any(data[i : i + n] in data[i + 1 :] for i in range(0, len(data) - n, 1))
        )

    assert longest_repeat(looping) > 100, "a greedy random model loops"
    assert longest_repeat(free) < 30


def test_the_automaton_accepts_exactly_what_python_decodes() -> None:
    def accepts(data: bytes) -> bool:
        state = utf8.START
        for byte in data:
            state = int(utf8.TRANSITIONS[state, byte])
            if state == utf8.REJECT:
                return False
        return state == utf8.START

    def decodes(data: bytes) -> bool:
        try:
            data.decode()
        except UnicodeDecodeError:
            return False
        return True

    borders = [
        0x00,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC0,
        0xC1,
        0xC2,
        0xDF,
        0xE0,
        0xE1,
        0xEC,
        0xED,
        0xEE,
        0xEF,
        0xF0,
        0xF1,
        0xF3,
        0xF4,
        0xF5,
        0xFF,
    ]
    for first in range(256):
        for second in (None, *borders):
            data = bytes([first]) if second is None else bytes([first, second])
            assert accepts(data) == decodes(data), data
    for lead in borders[10:]:
        for second in borders:
            for third in (0x7F, 0x80, 0xBF, 0xC0):
                assert accepts(bytes([lead, second, third])) == decodes(bytes([lead, second, third]))
                assert accepts(bytes([lead, second, third, 0x80])) == decodes(bytes([lead, second, third, 0x80]))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1),
        ("top_k", 0),
        ("top_k", 257),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("repetition_penalty", -1),
        ("repetition_allowed_bytes", 0),
    ],
)
def test_options_out_of_range_are_refused(model: ByteLM, option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option):
        generate(model, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1 sample"):
        generate_samples(model, num_samples=0)
    assert list(generate(model, num_bytes=0)) == []


def test_the_command(
    model: ByteLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    import json

    from bytejepa.cli.generate import Generate

    monkeypatch.setattr("bytejepa.load", lambda *_, **__: model)
    expected = text(model, b"Now ", num_bytes=40, seed=2)
    path = Path("model.bjm")
    assert Generate(model=path, prompt="Now ", num_bytes=40, seed=2).run_command() == 0
    captured = capfdbinary.readouterr()
    assert captured.out == expected + b"\n"
    assert b"40 bytes at" in captured.err

    Generate(model=path, prompt="Now ", num_bytes=40, seed=2, num_samples=2, json=True).run_command()
    record = json.loads(capfdbinary.readouterr().out)
    assert bytes.fromhex(record["samples"][0]["hex"]) == expected
    assert record["samples"][1]["text"] != record["samples"][0]["text"]

    target = tmp_path / "out.txt"
    (tmp_path / "prompt").write_bytes(b"Now ")
    Generate(model=path, prompt_file=tmp_path / "prompt", num_bytes=40, seed=2, echo=True, output=target).run_command()
    assert target.read_bytes() == b"Now " + expected
    assert capfdbinary.readouterr().out == b""
    with pytest.raises(ConfigError, match="exists"):
        Generate(model=path, output=target).run_command()
    with pytest.raises(ConfigError, match="exclude"):
        Generate(model=path, prompt="a", prompt_file=target).run_command()

    class Input:
        class buffer:  # noqa: N801
            read = staticmethod(lambda: b"Now ")

    monkeypatch.setattr(sys, "stdin", Input)
    Generate(model=path, prompt="-", num_bytes=40, seed=2, num_samples=2).run_command()
    assert capfdbinary.readouterr().out.startswith(b"=== sample 0 ===\n" + expected)
