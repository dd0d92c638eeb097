"""Where zstd compresses better than a model the file is a frame as `zstd -19` writes it: no longer, and read by the same rules."""

import random
import shutil
import subprocess
import tracemalloc
import zlib
from pathlib import Path

import pytest
import zstandard

import bytejepa
from bytejepa.codec.compress import compress, restore
from bytejepa.codec.zstd_frame import MAGIC, compress_frame, read_frame
from bytejepa.data.corpus import embedded_text
from bytejepa.errors import CodecError
from codec.models import GOLDEN_MODEL, coded_file, golden_model, inputs

TEXT = embedded_text("val")[:3000]
NOISE = random.Random(0).randbytes(20_000)
SMALL = {
    "empty": b"",
    "one byte": b"a",
    "two bytes": b"ab",
    "noise": NOISE[:300],  # stored
    "zeros": bytes(500),
    "long zeros": bytes(200_000),  # a block of which is a run
    "text": TEXT[:400],
}
LONG = bytes((8 << 20) + 5)
"""More than a window holds."""


def zstd_19(data: bytes) -> bytes:
    """What the command writes, made by the library alone."""
    return zstandard.ZstdCompressor(level=19, write_checksum=True, write_content_size=True).compress(data)


def refusal(frame: bytes) -> str:
    with pytest.raises(CodecError) as refused:
        read_frame(frame)
    return str(refused.value)


@pytest.mark.parametrize("name", inputs())
def test_no_file_is_longer_than_zstds(name: str) -> None:
    data = inputs()[name]
    for content in (data, data + TEXT, TEXT + data):
        blob = compress(golden_model(), content, window=64, block_bytes=2000)
        assert len(blob) <= 1.001 * len(zstd_19(content))
        assert bytejepa.decompress(golden_model(), blob) == content


def test_incompressible_data_grow_by_what_a_frame_needs() -> None:
    for num_bytes in (*range(20), *range(250, 262), *range(300, 20_001, 997), 20_000):
        noise = NOISE[:num_bytes]
        packed = zlib.compress(noise)
        for content in (noise, packed):
            blob = compress(golden_model(), content, window=64)
            assert len(blob) <= 1.001 * len(zstd_19(content))
            assert len(blob) <= len(content) + (13 if len(content) < 256 else 14)
            assert len(blob) < 1.001 * len(content) or len(content) <= 14_000


def test_text_is_the_models_once_that_is_shorter() -> None:
    is_frame = []
    for num_bytes in range(0, 1001, 100):
        text = TEXT[:num_bytes]
        blob = compress(golden_model(), text, mixing=False, window=64, hop=32)
        assert len(blob) == min(len(zstd_19(text)), len(coded_file(text, 1000)))
        assert bytejepa.decompress(golden_model(), blob) == text
        is_frame.append(blob.startswith(MAGIC))
    assert is_frame == sorted(is_frame, reverse=True)
    assert set(is_frame) == {False, True}


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the program zstd is not installed")
def test_the_program_zstd_reads_and_writes_the_same_frames(tmp_path: Path) -> None:
    file = tmp_path / "content"
    for content in (*SMALL.values(), TEXT, LONG):
        frame = compress_frame(content)
        file.write_bytes(frame)
        assert subprocess.run(["zstd", "-dcq", file], capture_output=True, check=True).stdout == content
        file.write_bytes(content)
        theirs = subprocess.run(["zstd", "-19cq", file], capture_output=True, check=True).stdout
        assert read_frame(theirs) == content
        header = 5 + 4 + (content is LONG)
        assert frame[:header] == theirs[:header]
        # another version of zstd may find other matches, but what it stores is the same
        assert frame == theirs or (len(frame) < len(content) and abs(len(frame) - len(theirs)) <= 4)


@pytest.mark.parametrize("name", SMALL)
def test_every_damaged_bit_is_noticed_or_means_nothing(name: str) -> None:
    content, frame = SMALL[name], compress_frame(SMALL[name])
    harmless = []
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert read_frame(bytes(damaged)) == content
        except CodecError:
            continue
        harmless.append(divmod(bit, 8))
    # Every bit of header and checksum counts, and of what is stored; but one stored byte is also a run of one (type 1 for 0).
    # In compressed blocks nothing hangs on some bits of their tables, such as codes that the content does not use.
    if name in ("empty", "one byte", "two bytes", "noise"):
        assert harmless == ([(6, 1)] if name == "one byte" else [])
    header = 9 if len(content) >= 65_792 else 7 if len(content) >= 256 else 6
    assert all(header <= place < len(frame) - 4 for place, _ in harmless)


@pytest.mark.parametrize("name", SMALL)
def test_cut_and_longer_frames_are_refused(name: str) -> None:
    frame = compress_frame(SMALL[name])
    assert read_frame(frame) == SMALL[name]
    for length in range(4, len(frame)):
        assert "cut short" in refusal(frame[:length])
    for length in range(4):
        with pytest.raises(CodecError, match="not a file" if length == 0 else "cut short"):
            restore(None, frame[:length])
    skippable = b"\x50\x2a\x4d\x18" + bytes(4)
    for more in (b"\0", frame, skippable):
        assert f"{len(more)} bytes follow" in refusal(frame + more)
    with pytest.raises(CodecError, match="not a file"):
        restore(None, skippable + frame)


def test_long_content_has_a_window_of_8_mib() -> None:
    frame = compress_frame(LONG)
    assert frame[:6] == MAGIC + b"\x84\x68"
    assert read_frame(frame) == LONG
    longer = frame[:6] + (40 << 20).to_bytes(4, "little") + frame[10:]
    for window in (b"\x61", b"\x69", b"\x70", b"\xff"):  # 4.5 MiB, 9 MiB, 16 MiB and the largest
        assert "header" in refusal(frame[:5] + window + frame[6:])
        assert "header" in refusal(longer[:5] + window + longer[6:])
    assert "its blocks hold" in refusal(longer)


@pytest.mark.parametrize(("num_bytes", "header_bytes"), [(255, 6), (256, 7), (65_791, 7), (65_792, 9)])
def test_the_content_size_takes_as_few_bytes_as_it_can(num_bytes: int, header_bytes: int) -> None:
    frame = compress_frame(bytes(num_bytes))
    assert read_frame(frame) == bytes(num_bytes)
    written = num_bytes - 256 if header_bytes == 7 else num_bytes
    assert frame[5:header_bytes] == written.to_bytes(header_bytes - 5, "little")


def frame_of(content: bytes, *, level: int = 19, **settings: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(level, **settings)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(content)


def test_other_headers_are_refused() -> None:
    stored = compress_frame(NOISE[:300])
    long_size = MAGIC + b"\xa4" + (300).to_bytes(4, "little") + stored[7:]
    moving = MAGIC + b"\x44\x00" + stored[5:]  # a window of 1 KiB although the content fits into it
    unused_bit = MAGIC + bytes([stored[4] | 16]) + stored[5:]
    dictionary = MAGIC + bytes([stored[4] | 1]) + b"\0" + stored[5:]
    plain = zstandard.ZstdDecompressor()
    frames = {
        "no checksum": frame_of(TEXT, write_checksum=0),
        "no content size": frame_of(TEXT, write_checksum=1, write_content_size=0),
        "more bytes for the content size than needed": long_size,
        "a window that no content moves through": moving,
        "the unused bit": unused_bit,
        "an empty dictionary id": dictionary,
    }
    for what, frame in frames.items():
        zstd_reads_it = plain.decompressobj().decompress(frame)
        assert zstd_reads_it in (TEXT, NOISE[:300]), what
        assert "header of the zstd frame" in refusal(frame), what
    assert "header of the zstd frame" in refusal(MAGIC + bytes([stored[4] | 8]) + stored[5:])  # the reserved bit
    million = NOISE * 50  # more than the window of level 1 holds
    for level in (1, 3, 12):
        for content in (TEXT, million):
            assert read_frame(frame_of(content, level=level, write_checksum=1, write_content_size=1)) == content


def test_a_claim_of_terabytes_allocates_nothing() -> None:
    stored = compress_frame(NOISE[:300])
    blocks = stored[7:-4]
    run = ((1 << 17) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"  # 128 KiB
    tracemalloc.start()
    try:
        for claim in (1 << 40, (1 << 63) + 5, (1 << 64) - 2, (1 << 64) - 1):
            wide = MAGIC + b"\xe4" + claim.to_bytes(8, "little")
            assert "its blocks hold 300" in refusal(wide + blocks + bytes(4))
            assert f"its blocks hold {3 * (1 << 17) + 300}" in refusal(wide + 3 * run + blocks + bytes(4))
        reserved = (300 << 3 | 7).to_bytes(3, "little") + bytes(300)
        assert "block of the zstd frame" in refusal(stored[:7] + reserved + bytes(4))
        huge_run = ((1 << 21) - 1 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"  # longer than a block may be
        assert "block of the zstd frame" in refusal(
            MAGIC + b"\xa4" + (1 << 20).to_bytes(4, "little") + huge_run + bytes(4)
        )
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_content_beyond_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def decompress(frame: bytes, num_bytes: int) -> bytes:
        raise MemoryError

    monkeypatch.setattr("bytejepa.codec.zstd_frame.zstd_decompress", decompress)
    assert "500 bytes, does not fit into the memory" in refusal(compress_frame(bytes(500)))


def test_the_checksum_is_held_against_the_content() -> None:
    for content in SMALL.values():
        frame = compress_frame(content)
        for place in range(-4, 0):
            damaged = bytearray(frame)
            damaged[place] ^= 1
            assert "does not decode" in refusal(bytes(damaged))


def test_a_frame_needs_no_model_and_takes_any() -> None:
    frame = compress_frame(NOISE)
    assert bytejepa.compress(GOLDEN_MODEL, NOISE) == frame
    for model in (None, GOLDEN_MODEL, golden_model(), "there is no such file"):
        assert bytejepa.decompress(model, frame) == NOISE
    for reader in (bytejepa.decompress, restore):  # no part of a frame stands by itself
        with pytest.raises(CodecError, match="does not decode"):
            reader(None, frame[:-1] + bytes([frame[-1] ^ 1]))
