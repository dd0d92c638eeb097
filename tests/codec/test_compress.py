"""Whatever goes in comes out; whatever is damaged is noticed."""

import dataclasses
import random
import resource
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bytejepa
from bytejepa.codec import coder, container
from bytejepa.codec.compress import codec_model, compress, decompress, restore
from bytejepa.codec.cpu import CpuCoder
from bytejepa.codec.lanes import windows
from bytejepa.codec.torch_model import TorchCoder
from bytejepa.codec.workers import Settings
from bytejepa.codec.zstd_frame import compress_frame
from bytejepa.config import replace
from bytejepa.data.corpus import embedded_text
from bytejepa.errors import CodecError, ConfigError
from bytejepa.presets import PRESETS, preset
from codec.models import (
    GOLDEN_MODEL,
    GREETINGS,
    coded_blocks,
    coded_file,
    cpu_coder,
    file_of,
    golden_model,
    inputs,
)
from small_models import random_model, small_model

TEXT = embedded_text("val")[:1500]


def small_file(data: bytes = TEXT, **changes: object) -> bytes:
    """Blocks of 400 bytes under the model alone, windows of 64."""
    settings = {"mixing": False, "block_bytes": 400, "window": 64, "hop": 32, **changes}
    return compress(golden_model(), data, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", inputs())
def test_every_kind_of_input_comes_back(name: str) -> None:
    data = inputs()[name]
    assert decompress(golden_model(), small_file(data)) == data
    # most of these are zstd's frames then; the model restores them too
    assert decompress(golden_model(), coded_file(data)) == data


@pytest.mark.parametrize("name", PRESETS)
def test_the_model_of_every_preset_compresses(name: str) -> None:
    narrow = {"model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "rotary_dims": 4, "bigram_rows": 64, "ngram_rows": 64}
    latents = {"latent_dim": 16, "hidden_dim": 16, "sigreg_directions": 8}
    unfitted = {"rounding": "nearest", "clip": "max", "fit": False}
    model = random_model(replace(preset(name), model=narrow, jepa=latents, artifact=unfitted))
    for text in (TEXT[:150], bytes(range(150))):
        blob = compress(model, text, window=48, hop=24, segment_bytes=50)
        assert decompress(model, blob) == text
    lane_coder = CpuCoder(codec_model(model), 48, 24)
    stream = coder.encode(*lane_coder.block_intervals(TEXT[:150]))
    assert lane_coder.decode([stream], [150]) == [TEXT[:150]]


@given(st.binary(max_size=300), st.integers(1, 80), st.integers(1, 40), st.integers(0, 40))
def test_any_bytes_come_back(data: bytes, block_bytes: int, hop: int, more: int) -> None:
    text = data if len(data) % 2 else bytes(32 + byte % 90 for byte in data)
    window, hop = min(hop + more, 48, 16 * hop), min(hop, 48)
    blob = compress(golden_model(), text, mixing=False, block_bytes=block_bytes, window=window, hop=hop)
    assert decompress(golden_model(), blob) == text
    assert decompress(golden_model(), coded_file(data, block_bytes, cpu_coder(window, hop))) == data


@given(st.text(max_size=120), st.sampled_from(GREETINGS))
def test_text_in_any_language_comes_back(text: str, greeting: str) -> None:
    data = (text + greeting).encode()
    lane_coder = cpu_coder()
    stream = coder.encode(*lane_coder.block_intervals(data))
    assert lane_coder.decode([stream], [len(data)]) == [data]


@pytest.mark.parametrize("border", [64, 96, 128, 256])
def test_lengths_around_every_border(border: int) -> None:
    # window 64, hop 32: windows end at 64, 96, 128 ...; blocks at 128 and 256
    for length in range(border - 2, border + 3):
        for data in (TEXT[:length], random.Random(length).randbytes(length)):
            assert decompress(golden_model(), small_file(data, block_bytes=128)) == data
            assert decompress(golden_model(), coded_file(data, 128)) == data


def test_nothing_about_the_computation_changes_the_file() -> None:
    blob = small_file()
    for settings in (
        Settings(threads=1),
        Settings(threads=2),
        Settings(threads=3, lanes=1),
        Settings(lanes=64),
    ):
        assert small_file(settings=settings) == blob
        assert decompress(golden_model(), blob, settings=settings) == TEXT
    on_torch, text = Settings(backend="torch", threads=1), TEXT[:130]
    blob = coded_file(text, 50)
    assert coded_file(text, 50, TorchCoder(golden_model(), 64, 32)) == blob
    assert decompress(golden_model(), blob, settings=on_torch) == text


def test_one_lane_encodes_and_eight_decode() -> None:
    lane_coder = cpu_coder()
    pieces = [TEXT[first : first + 100 + first % 7] for first in range(0, 800, 100)]
    streams = [coder.encode(*lane_coder.block_intervals(piece)) for piece in pieces]
    assert lane_coder.decode(streams, [len(piece) for piece in pieces]) == pieces
    many = [TEXT[first : first + 70 + first % 3] for first in range(64)]
    streams_of_many = [coder.encode(*lane_coder.block_intervals(piece)) for piece in many]
    assert lane_coder.decode(streams_of_many, [len(piece) for piece in many]) == many
    torch_path = TorchCoder(golden_model(), 64, 32, container="float32")
    assert torch_path.decode(streams[:3], [len(piece) for piece in pieces[:3]]) == pieces[:3]


def test_text_of_its_domain_beats_zstd_and_costs_its_information() -> None:
    blob = compress(golden_model(), TEXT, mixing=False, window=128)
    assert len(blob) < 0.75 * len(compress_frame(TEXT))
    _, frequencies = cpu_coder().block_intervals(TEXT)
    stream = coder.encode(*cpu_coder().block_intervals(TEXT))
    assert 8 * len(stream) <= 1.005 * (24 - np.log2(frequencies)).sum()


def test_what_zstd_compresses_better_is_left_to_it() -> None:
    repeats = TEXT * 20
    assert compress(golden_model(), repeats, mixing=False, window=64) == compress_frame(repeats)
    # what a model cannot predict, and what it could, but zstd says shorter
    for other in (random.Random(1).randbytes(400), b"abc\x00\xff\x81" * 66 + b"abcd"):
        content = TEXT[:800] + other + TEXT[800:1200]
        mixed = small_file(content)
        parsed = container.parse(mixed)
        assert isinstance(parsed, container.Blocks)
        assert [block.is_zstd for block in parsed.blocks if block is not None] == [False, False, True, False]
        assert decompress(golden_model(), mixed) == content


def test_another_model_is_refused() -> None:
    blob = small_file()
    other = small_model()
    with pytest.raises(CodecError, match="made with the model"):
        decompress(other, blob)


def test_a_loaded_model_is_the_artifact() -> None:
    loaded = bytejepa.load(GOLDEN_MODEL)
    assert codec_model(loaded).sha256 == golden_model().sha256
    assert bytejepa.decompress(loaded, bytejepa.compress(GOLDEN_MODEL, TEXT[:200])) == TEXT[:200]
    with torch.no_grad():
        loaded.token_embedding.weight[7] += 0.5  # no longer the artifact's weights
    assert codec_model(loaded).sha256 != golden_model().sha256


def test_a_damaged_block_loses_only_itself() -> None:
    blob = bytearray(small_file())
    blob[-5] ^= 1
    with pytest.raises(CodecError, match="bytes 1200 to 1500"):
        decompress(golden_model(), bytes(blob))
    restored = restore(golden_model(), bytes(blob))
    assert list(restored.pieces()) == [TEXT[:400], TEXT[400:800], TEXT[800:1200], bytes(300)]
    assert [(block.begin, block.num_bytes) for block in restored.damaged] == [(1200, 300)]
    assert restored.damaged[0].reason == "its stored bytes are damaged"  # noticed before anything is decoded


def damaged_bytes(kind: str, blob: bytes, random_numbers: random.Random) -> bytes:
    """A file damaged in one way, its checksums left as they were."""
    damaged = bytearray(blob)
    place = random_numbers.randrange(len(blob))
    if kind == "bit":
        damaged[place] ^= 1 << random_numbers.randrange(8)
    elif kind == "cut":
        del damaged[place:]
    elif kind == "appended":
        damaged += random_numbers.randbytes(1 + place % 9)
    elif kind == "swapped":
        length = random_numbers.randrange(1, 60)
        first, second = sorted(random_numbers.sample(range(len(blob) - length), 2))
        a, b = damaged[first : first + length], damaged[second : second + length]
        damaged[first : first + length], damaged[second : second + length] = b, a
    elif kind == "overwritten":
        damaged[place : place + 16] = random_numbers.randbytes(16)
    return bytes(damaged)


def forged_file(kind: str, data: bytes, blocks: list[container.Block], random_numbers: random.Random) -> bytes:
    """A file of damaged blocks of 150 bytes whose checksums of stored bytes were made right again, so that it is decoded."""
    forged = list(blocks)
    first, second = random_numbers.sample(range(len(blocks)), 2)
    if kind == "payload":
        block = forged[first]
        payload = damaged_bytes(random_numbers.choice(("bit", "cut", "overwritten")), block.payload, random_numbers)
        forged[first] = dataclasses.replace(block, payload=payload)
    else:  # blocks in each other's place: nothing but the checksum of the whole can tell
        forged[first], forged[second] = forged[second], forged[first]
    return file_of(data, forged, 150)


BYTES_KINDS, FORGED_KINDS = ("bit", "cut", "appended", "swapped", "overwritten"), ("payload", "blocks")


def check_corruption(kind: str, text: bytes, random_numbers: random.Random) -> None:
    """Damage files in one way: each must be refused with a CodecError, or be whole all the same."""
    if kind in FORGED_KINDS:
        forgery = forged_file(kind, text, coded_blocks(cpu_coder(), text, 150), random_numbers)
        damaged_files = {text: forgery}
    else:
        blobs = (coded_file(text, 150), compress_frame(text))
        damaged_files = {blob: damaged_bytes(kind, blob, random_numbers) for blob in blobs}
    for original, damaged in damaged_files.items():
        if damaged == original:
            continue
        try:
            restored = decompress(golden_model(), damaged, settings=Settings(threads=1))
        except CodecError:
            continue
        # the end of a stream may have bits that decide nothing, and so may the tables of a zstd frame
        assert restored == text
        assert kind == "payload" or original == compress_frame(text)


@pytest.mark.parametrize("kind", BYTES_KINDS + FORGED_KINDS)
def test_corruption_is_noticed(kind: str) -> None:
    random_numbers = random.Random(kind)
    for _ in range(30):
        check_corruption(kind, TEXT[:450], random_numbers)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_corruptions_are_noticed() -> None:
    random_numbers = random.Random(0)
    check_corruption("payload", TEXT[:450], random_numbers)
    before_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kinds = BYTES_KINDS + FORGED_KINDS
    for index in range(10_000):
        began = time.perf_counter()
        check_corruption(kinds[index % len(kinds)], TEXT[:450], random_numbers)
        assert time.perf_counter() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kilobytes < 50_000


def test_blocks_that_changed_places_are_noticed() -> None:
    blob = small_file(TEXT[:800])
    parsed = container.parse(blob)
    assert isinstance(parsed, container.Blocks)
    first, second = parsed.blocks
    assert first is not None
    assert second is not None
    header = blob[: -len(first.payload) - len(second.payload)]
    with pytest.raises(CodecError):
        decompress(golden_model(), header + second.payload + first.payload)
    # the same payload twice: its two checksums differ, for they know the block's place
    twice = container.blocks_file(
        TEXT[:400] * 2, [first, first], block_bytes=400, window=64, hop=32, model=golden_model().sha256
    )
    assert decompress(golden_model(), twice) == TEXT[:400] * 2
    entries = container.PRELUDE.size + container.HEADER.size
    assert twice[entries + 4 : entries + 8] != twice[entries + 16 : entries + 20]


def test_a_block_that_decodes_to_something_else_is_named() -> None:
    blocks = coded_blocks(cpu_coder(), TEXT[:450], 150)
    payload = blocks[1].payload
    blocks[1] = dataclasses.replace(blocks[1], payload=payload[:9] + bytes([payload[9] ^ 64]) + payload[10:])
    restored = restore(golden_model(), file_of(TEXT[:450], blocks, 150))
    assert list(restored.pieces()) == [TEXT[:150], bytes(150), TEXT[300:450]]
    assert [(block.begin, block.num_bytes) for block in restored.damaged] == [(150, 150)]
    assert restored.damaged[0].reason == "it does not decode to what was compressed"


def test_hostile_headers_allocate_nothing() -> None:
    # a valid checksum over a header that claims the world
    for content_bytes, block_bytes in ((1 << 62, 1), (1 << 62, 1 << 20), (1 << 20, 1 << 31), (100, 0)):
        header = container.PRELUDE.pack(container.MAGIC, 1, container.KIND_BLOCKS)
        header += container.HEADER.pack(content_bytes, block_bytes, 64, 32, golden_model().sha256, bytes(16))
        with pytest.raises(CodecError, match="header claims"):
            decompress(golden_model(), header + container._checksum(header) + bytes(100))
    for window, hop in ((0, 0), (64, 65), (1 << 31, 1), (64, 3), (1 << 31, 1 << 30)):
        blob = container.blocks_file(
            b"ab", [container.make_block(b"ab", b"x", is_zstd=False)], block_bytes=400, window=window, hop=hop,
            model=golden_model().sha256,
        )  # fmt: skip
        with pytest.raises(CodecError, match="window"):
            decompress(golden_model(), blob)


@pytest.mark.parametrize(
    ("segment_bytes", "block_bytes", "version"),
    [(None, 1 << 20, 1), (9, 1 << 20, 2), (9, (1 << 20) + 1, 3), (9, 1 << 24, 3)],
)
def test_files_say_the_oldest_version_that_has_such_blocks(
    segment_bytes: int | None, block_bytes: int, version: int
) -> None:
    block = container.make_block(b"ab", b"x", is_zstd=False)
    settings = {"window": 64, "hop": 32, "model": bytes(32), "segment_bytes": segment_bytes}
    blob = container.blocks_file(b"ab", [block], block_bytes=block_bytes, **settings)  # type: ignore[arg-type]
    assert blob[4] == version
    parsed = container.parse(blob)
    assert isinstance(parsed, container.Blocks)
    assert (parsed.block_bytes, parsed.segment_bytes) == (block_bytes, segment_bytes)
    for claimed in (block_bytes + 1, 1 << 24, (1 << 24) + 1):
        header = bytearray(blob[: -container.CHECKSUM_BYTES - 1])
        header[14:18] = claimed.to_bytes(4, "little")
        if claimed > container.MAX_BLOCK_BYTES[version, header[5]]:
            with pytest.raises(CodecError, match=f"claims blocks of {claimed} bytes"):
                container.parse(bytes(header) + container._checksum(bytes(header)) + b"x")


def test_short_content_is_written_for_older_readers() -> None:
    parsed = container.parse(compress(golden_model(), TEXT))
    assert isinstance(parsed, container.Blocks)
    assert parsed.block_bytes == 1 << 20


@pytest.mark.slow
def test_content_longer_than_2_to_the_20_is_one_block() -> None:
    text = embedded_text("val")
    data = text + bytes(reversed(text)) + text[:300_000]  # 1.1 MB
    blob = compress(golden_model(), data, window=16, hop=16)
    parsed = container.parse(blob)
    assert isinstance(parsed, container.Blocks)
    assert (len(parsed.blocks), parsed.block_bytes) == (1, 1 << 22)
    assert decompress(golden_model(), blob) == data
    split = compress(golden_model(), data, window=16, hop=16, block_bytes=1 << 20)
    assert len(blob) < len(split)
    assert decompress(golden_model(), split) == data


def test_foreign_and_newer_files_are_told_apart() -> None:
    for blob, message in (
        (b"", "not a file that bytejepa compressed"),
        (b"PK\x03\x04" + bytes(90), "not a file that bytejepa compressed"),
        (container.MAGIC, "cut short"),
        (small_file()[:5] + b"\0" + small_file()[6:], "unknown kind 0"),
        (small_file()[:4] + b"\x02" + small_file()[5:], "unknown kind 1"),
        (small_file()[:4] + b"\x03" + small_file()[5:], "unknown kind 1"),
        (small_file()[:4] + b"\x04" + small_file()[5:], "version 4"),
    ):
        with pytest.raises(CodecError, match=message):
            decompress(golden_model(), blob)


def test_a_full_window_moves_by_three_quarters_unless_told() -> None:
    parsed = container.parse(compress(golden_model(), TEXT))
    assert isinstance(parsed, container.Blocks)
    assert (parsed.window, parsed.hop) == (128, 96)


def test_impossible_windows_are_refused() -> None:
    for settings in (
        {"window": 0}, {"window": 1 << 20}, {"window": 64, "hop": 65}, {"hop": 0}, {"block_bytes": 0},
        {"window": 64, "hop": 3}, {"window": 65, "hop": 4},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            small_file(**settings)


@given(st.integers(0, 500), st.integers(1, 90), st.integers(1, 90))
def test_windows_are_the_engines(length: int, window: int, hop: int) -> None:
    hop = min(hop, window)
    predicted = []
    for begin, end, first in windows(length, window, hop):
        assert 0 < end - begin <= window
        for t in range(first, end):
            expected = 0 if t < window else -(-(t - window + 1) // hop) * hop
            assert begin == expected
            predicted.append(t)
    assert predicted == list(range(length))


def test_a_gpu_gets_one_thread_many_lanes_and_compiled_code_for_long_content(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    class OnCpu(TorchCoder):
        def __init__(self, *given: object, device: str, compile: bool) -> None:  # noqa: A002 - torch's word
            assert device == "cuda"
            made.append(compile)
            super().__init__(*given)

    monkeypatch.setattr("bytejepa.codec.torch_model.TorchCoder", OnCpu)
    monkeypatch.setattr("bytejepa.codec.compress.COMPILED_FROM_BYTES", 500)
    settings = Settings(device="cuda")
    assert (settings.num_threads, settings.num_lanes) == (1, 1024)
    assert Settings(device="cuda", threads=2, lanes=3).num_lanes == 3
    small_file(TEXT[:499], settings=settings)
    small_file(TEXT[:500], settings=settings)
    small_file(TEXT[:500], settings=dataclasses.replace(settings, compile=False))
    assert made == [False, True, False]
