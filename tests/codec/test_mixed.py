"""Mixed blocks: what goes in comes out, whatever computes it, and counts of the content help the model."""

import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytejepa.codec import coder, container
from bytejepa.codec.compress import compress, decompress, restore
from bytejepa.codec.cpu import CpuCoder
from bytejepa.codec.mixed import encode_mixed
from bytejepa.codec.torch_model import TorchCoder
from bytejepa.codec.workers import Settings
from bytejepa.compressors import compressed_bytes
from bytejepa.data.corpus import embedded_text
from bytejepa.errors import CodecError, ConfigError
from bytejepa.kernels.context_mixing import mix_content
from bytejepa.kernels.mixing_state import MOST_SEGMENTS, Mixing, new_mixing, segment_begins
from bytejepa.kernels.mixing_tables import squash_table, stretch_table
from codec.golden import mixed_stream
from codec.models import GREETINGS, cpu_coder, golden_model, inputs

TEXT = embedded_text("val")[:1500]


def mixed_file(data: bytes = TEXT, **changes: object) -> bytes:
    """Blocks of 600 bytes in segments of 100 or more, windows of 64."""
    settings = {"block_bytes": 600, "segment_bytes": 100, "window": 64, "hop": 32, **changes}
    return compress(golden_model(), data, **settings)  # type: ignore[arg-type]


def mixed_blocks_file(data: bytes, block_bytes: int, segment_bytes: int) -> bytes:
    """A file whose every block is a mixed one, also where zstd would have been smaller."""
    contents = [data[begin : begin + block_bytes] for begin in range(0, len(data), block_bytes)]
    blocks = [
        container.make_block(content, mixed_stream(cpu_coder(), content, segment_bytes), is_zstd=False)
        for content in contents
    ]
    return container.blocks_file(
        data,
        blocks,
        block_bytes=block_bytes,
        window=64,
        hop=32,
        model=golden_model().sha256,
        segment_bytes=segment_bytes,
    )


def mixed(content: bytes, paths: np.ndarray, segment_bytes: int = 1 << 20) -> tuple[Mixing, np.ndarray, np.ndarray]:
    """The state after `content`, the probabilities and the bits."""
    state = new_mixing(len(content), segment_bytes)
    probabilities, bits = np.empty(8 * len(content), np.uint16), np.empty(8 * len(content), np.uint8)
    mix_content(state, np.frombuffer(content, np.uint8), paths, probabilities, bits)
    return state, probabilities, bits


def cost_bytes(content: bytes, paths: np.ndarray) -> float:
    """The information content of a block under the mixture."""
    _, probabilities, bits = mixed(content, paths)
    ones = probabilities / 65536
    return float(-np.log2(np.where(bits, ones, 1 - ones)).sum() / 8)


def no_opinion(content: bytes) -> np.ndarray:
    """A model that says 1/2 of every bit."""
    return np.full((len(content), 8), 1 << 15, np.uint16)


@pytest.mark.parametrize("name", inputs())
def test_every_kind_of_input_comes_back(name: str) -> None:
    data = inputs()[name]
    assert decompress(golden_model(), mixed_file(data)) == data
    assert decompress(golden_model(), mixed_blocks_file(data, 300, 70)) == data


@given(st.binary(max_size=200), st.sampled_from(GREETINGS), st.integers(1, 300), st.integers(1, 90))
def test_any_bytes_in_any_blocks_and_segments_come_back(
    data: bytes, greeting: str, block_bytes: int, segment_bytes: int
) -> None:
    data += greeting.encode()
    assert decompress(golden_model(), mixed_blocks_file(data, block_bytes, segment_bytes)) == data


def test_nothing_about_the_computation_changes_the_file() -> None:
    blob = mixed_file()
    parsed = container.parse(blob)
    assert isinstance(parsed, container.Blocks)
    assert parsed.segment_bytes == 100
    assert [block.is_zstd for block in parsed.blocks if block is not None] == [False, False, False]
    for settings in (Settings(threads=1), Settings(threads=2), Settings(threads=7), Settings(threads=1, lanes=64)):
        assert mixed_file(settings=settings) == blob
        assert decompress(golden_model(), blob, settings=settings) == TEXT
    text, on_torch = TEXT[:200], Settings(backend="torch", threads=1)
    blob = mixed_file(text)
    assert mixed_file(text, settings=on_torch) == blob
    assert decompress(golden_model(), blob, settings=on_torch) == text


@pytest.mark.parametrize(("threads", "lanes"), [(1, None), (2, 17), (20, 48)])
def test_progress_counts_every_byte_once(threads: int, lanes: int | None) -> None:
    data = TEXT[:777] + random.Random(0).randbytes(423)  # mixed blocks, and one that is zstd's
    seen: list[int] = []
    settings = Settings(threads=threads, lanes=lanes, on_progress=seen.append)
    blob = mixed_file(data, block_bytes=400, settings=settings)
    assert sum(seen) == len(data)
    assert decompress(golden_model(), blob, settings=settings) == data
    assert sum(seen) == 2 * len(data)


@pytest.mark.parametrize(("threads", "lanes"), [(1, 64), (7, None), (3, 64)])
def test_no_more_is_mixed_at_once_than_memory_is_meant_for(
    threads: int, lanes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, at_work, most = threading.Lock(), 0, 0

    def counted(work: Callable[..., Any], bytes_of: Callable[..., int]) -> Callable[..., Any]:
        def wrapper(*given: Any, **named: Any) -> Any:
            nonlocal at_work, most
            with lock:
                at_work += bytes_of(*given)
                most = max(most, at_work)
            time.sleep(0.05)  # for others to begin meanwhile
            found = work(*given, **named)
            with lock:
                at_work -= bytes_of(*given)
            return found

        return wrapper

    monkeypatch.setattr("bytejepa.codec.compress.BYTES_AT_ONCE", 600)
    monkeypatch.setattr("bytejepa.codec.compress.encode_mixed", counted(encode_mixed, lambda block, *_: len(block)))
    decode = counted(CpuCoder.decode_mixed, lambda _self, _streams, lengths, *_: sum(lengths))
    monkeypatch.setattr(CpuCoder, "decode_mixed", decode)
    settings = Settings(threads=threads, lanes=lanes)
    blob = mixed_file(TEXT[:1200], block_bytes=250, settings=settings)
    assert 0 < most <= 600
    most = 0
    assert decompress(golden_model(), blob, settings=settings) == TEXT[:1200]
    assert 0 < most <= 600


@pytest.mark.parametrize("compile", [False, True])
def test_the_torch_path_says_the_same_of_every_bit(compile: bool) -> None:  # noqa: A002 - torch's word
    torch_coder = TorchCoder(golden_model(), 64, 32)
    torch_coder.fills_passes = compile  # as with compiled code: all passes of one shape
    assert np.array_equal(torch_coder.segment_paths(TEXT[:300]), cpu_coder().segment_paths(TEXT[:300]))


def test_paths_are_the_models_distribution() -> None:
    text = TEXT[:120]
    ones = cpu_coder().segment_paths(text) / 65536
    bits = np.unpackbits(np.frombuffer(text, np.uint8)).reshape(-1, 8)
    _, frequencies = cpu_coder().block_intervals(text)
    by_bits = np.where(bits, ones, 1 - ones).prod(axis=1)
    assert np.allclose(np.log2(by_bits), np.log2(frequencies) - 24, atol=0.05)


@given(st.integers(0, 10_000), st.integers(1, 5000))
def test_segments_are_of_one_length_and_lose_nothing(num_bytes: int, least: int) -> None:
    begins = segment_begins(num_bytes, least)
    lengths = [end - begin for begin, end in itertools.pairwise(begins)]
    assert (begins[0], begins[-1]) == (0, num_bytes)
    assert 1 <= len(lengths) <= MOST_SEGMENTS
    assert set(lengths[:-1]) <= {lengths[0]}
    assert lengths[-1] <= lengths[0]
    assert num_bytes == 0 or min(lengths) > 0
    assert len(lengths) == 1 or lengths[0] >= least


@pytest.mark.parametrize("segment_bytes", [1 << 20, 500])
def test_no_probability_sees_what_is_coded_later(segment_bytes: int) -> None:
    """Of two texts that differ from one byte on, all bits that are coded before get the same probabilities."""
    content, rng = TEXT * 2, np.random.default_rng(0)
    paths = rng.integers(1, 1 << 16, (len(content), 8)).astype(np.uint16)
    _, before, bits = mixed(content, paths, segment_bytes)
    for place in (0, 700, 1499, 2300):
        changed = bytearray(content)
        changed[place] ^= 16
        other_paths = paths.copy()
        other_paths[place, 4:] ^= 1  # what the model says of a bit may depend on the bits before it
        _, after, other_bits = mixed(bytes(changed), other_paths, segment_bytes)
        first = int(np.flatnonzero(bits != other_bits)[0])
        assert np.array_equal(before[: first + 1], after[: first + 1])
        assert not np.array_equal(before, after)


def test_the_stream_costs_its_information() -> None:
    content = TEXT * 3
    stream = encode_mixed(content, no_opinion(content), 1 << 20)
    assert len(stream) <= cost_bytes(content, no_opinion(content)) + 3


def test_counts_alone_beat_general_compressors_and_the_model_helps_them() -> None:
    text = embedded_text("val")[:60_000]
    alone = cost_bytes(text, no_opinion(text))
    others = compressed_bytes(text)
    assert alone < min(others.values())  # PPMd among them
    with_model = cost_bytes(text, cpu_coder(128, 96).segment_paths(text))
    assert with_model < 0.97 * alone


def test_text_of_other_kinds_beats_the_model_alone() -> None:
    languages = "\n".join(GREETINGS).encode()
    by_the_model = coder.encode(*cpu_coder().block_intervals(languages))
    assert len(mixed_stream(cpu_coder(), languages, 4096)) < 0.6 * len(by_the_model)


def test_repeats_cost_next_to_nothing_in_other_segments_too() -> None:
    noise = random.Random(0).randbytes(2000)
    once, twice = (cost_bytes(data, no_opinion(data)) for data in (noise, noise * 2))
    assert twice - once < 0.05 * once
    content = noise + noise[1500:] + noise[:1500]  # segment 1 repeats segment 0 from another place on
    _, probabilities, bits = mixed(content, no_opinion(content), 2000)
    ones = probabilities / 65536
    assert -np.log2(np.where(bits, ones, 1 - ones)).sum() / 8 < 1.6 * once


def test_tables_are_each_others_inverse() -> None:
    squash, stretch = squash_table(), stretch_table()
    assert (np.diff(squash) >= 0).all()
    assert (squash + squash[::-1] == 1 << 16).all()
    assert (np.diff(stretch) >= 0).all()
    for v in range(-2000, 2001, 40):
        assert squash[stretch[squash[v + 3071]] + 3071] == squash[v + 3071]


def test_a_damaged_block_loses_only_itself() -> None:
    blob = bytearray(mixed_file())
    blob[-5] ^= 1
    with pytest.raises(CodecError, match="bytes 1200 to 1500"):
        decompress(golden_model(), bytes(blob))
    restored = restore(golden_model(), bytes(blob))
    assert list(restored.pieces()) == [TEXT[:600], TEXT[600:1200], bytes(300)]


def test_damage_that_checksums_of_stored_bytes_do_not_tell_is_noticed() -> None:
    random_numbers, block_bytes = random.Random(0), 500
    contents = [TEXT[begin : begin + block_bytes] for begin in range(0, 1500, block_bytes)]
    blocks = [
        container.make_block(content, mixed_stream(cpu_coder(), content, 100), is_zstd=False) for content in contents
    ]
    for _ in range(20):
        payload = bytearray(blocks[1].payload)
        payload[random_numbers.randrange(len(payload) - 1)] ^= 1 << random_numbers.randrange(8)
        forged = [blocks[0], dataclasses.replace(blocks[1], payload=bytes(payload)), blocks[2]]
        blob = container.blocks_file(
            TEXT, forged, block_bytes=block_bytes, window=64, hop=32, model=golden_model().sha256, segment_bytes=100
        )
        restored = restore(golden_model(), blob)
        assert [(block.begin, block.num_bytes) for block in restored.damaged] == [(500, 500)]


def test_a_stream_of_no_bytes_is_a_block_of_zeros() -> None:
    assert cpu_coder().decode_mixed([b""], [50], 10) == [bytes(50)]
    least = np.full(40, 1, np.uint16)
    assert coder.encode_bits(least, np.zeros(40, np.uint8)) == b""
    assert len(coder.encode_bits(least, np.ones(40, np.uint8))) == 80  # 16 bits each


def test_impossible_segments_are_refused() -> None:
    for least in (0, -1, 1 << 32):
        with pytest.raises(ConfigError, match="segment bytes"):
            mixed_file(segment_bytes=least)
    blocks = [container.make_block(b"ab", b"x", is_zstd=False)]
    blob = container.blocks_file(
        b"ab", blocks, block_bytes=400, window=64, hop=32, model=golden_model().sha256, segment_bytes=0
    )
    with pytest.raises(CodecError, match="segments of 0 bytes"):
        decompress(golden_model(), blob)
