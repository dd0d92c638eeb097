"""Files with right header checksums that claim far more than they hold: one line, no work and no memory for it."""

import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait

import pytest

from bytejepa.codec import coder, container
from bytejepa.codec.compress import Restored, compress, decompress, restore
from bytejepa.codec.lanes import Progress
from bytejepa.codec.workers import Settings
from bytejepa.data.corpus import embedded_text
from bytejepa.errors import CodecError
from codec.models import coded_file, cpu_coder, file_of, golden_model

TEXT = embedded_text("val")[:1500]
ENTRIES = container.PRELUDE.size + container.HEADER.size
"""Where the table of blocks begins."""


class Decoder:
    """Counts what it is asked to decode, and gets all of it wrong."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def decode(self, _streams: Sequence[bytes], lengths: Sequence[int], _report: Progress) -> list[bytes]:
        self.lengths += lengths
        return [bytes(length) for length in lengths]


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    decoder = Decoder()
    monkeypatch.setattr("bytejepa.codec.compress._coder", lambda *_: decoder)
    return decoder


def forged(
    payload: bytes, number: int, *, damaged: int = 0, num_bytes: int = container.MAX_UNMIXED_BLOCK_BYTES
) -> bytes:
    """A file that claims `number` blocks of zeros, the last `damaged` of them with wrong checksums of what is stored."""
    content = bytes(num_bytes)
    blocks = [container.make_block(content, payload, is_zstd=False)] * number
    honest = container.blocks_file(
        content, blocks, block_bytes=num_bytes, window=64, hop=32, model=golden_model().sha256
    )
    header = bytearray(honest[: ENTRIES + number * container.ENTRY.size])
    header[6:14] = (number * num_bytes).to_bytes(8, "little")
    for index in range(number - damaged, number):
        header[ENTRIES + index * container.ENTRY.size + 4] ^= 1
    return bytes(header) + container._checksum(bytes(header)) + payload * number


def wake_late(futures: Iterable[Future[object]], return_when: str) -> object:
    woken = wait(futures, return_when=return_when)
    time.sleep(0.2)
    return woken


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_damage_of_what_is_stored_is_told_before_anything_is_decoded(decoder: Decoder) -> None:
    damaged = forged(b"x", 30, damaged=2, num_bytes=400)
    with pytest.raises(CodecError, match="bytes 11200 to 11600: its stored bytes are damaged, and 1 more"):
        decompress("no such model", damaged)
    with pytest.raises(CodecError, match=r"the file has \d+ bytes, its header claims"):
        decompress("no such model", forged(b"x", 30, num_bytes=400) + b"more")
    assert not decoder.lengths
    assert len(restore(golden_model(), damaged, settings=Settings(threads=1)).damaged) == 2
    assert len(decoder.lengths) == 28


def test_the_first_block_that_decodes_to_something_else_ends_the_decoding(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bytejepa.codec.workers.wait", wake_late)
    blob = coded_file(TEXT, 10)
    with pytest.raises(CodecError, match="bytes 0 to 10: it does not decode to what was compressed"):
        decompress(golden_model(), blob, settings=Settings(threads=1, lanes=2))
    assert decoder.lengths == [10, 10]  # of 150: the first two lanes, however late the waiting thread wakes
    with pytest.raises(CodecError, match="nothing can be restored"):
        restore(golden_model(), blob, settings=Settings(threads=1))


def refuse(blob: bytes, message: str, *, keep_going: bool) -> None:
    with pytest.raises(CodecError, match=message):
        restore(golden_model(), blob, keep_going=keep_going)


def test_lost_blocks_take_no_memory() -> None:
    lost, restored = forged(b"", 3000, damaged=3000), list[Restored]()
    assert peak_bytes(lambda: refuse(lost, "and 2999 more", keep_going=False)) < 3_000_000
    assert peak_bytes(lambda: refuse(lost, "nothing can be restored", keep_going=True)) < 3_000_000
    blob = forged(b"", 3000, damaged=2999)
    assert peak_bytes(lambda: restored.append(restore(golden_model(), blob))) < 5_000_000
    assert restored[0].num_bytes == 3000 << 20
    assert len(restored[0].damaged) == 2999
    pieces = restored[0].pieces()
    assert peak_bytes(lambda: [len(next(pieces)) for _ in range(30)]) < 5_000_000


def test_an_empty_stream_is_zeros_without_a_pass_of_the_model(decoder: Decoder) -> None:
    assert coder.encode(*cpu_coder().block_intervals(bytes(500))) == b""
    assert cpu_coder().decode([b""], [500]) == [bytes(500)]
    assert decompress(golden_model(), coded_file(bytes(500))) == bytes(500)
    wrong = [container.make_block(TEXT[:9], b"", is_zstd=False)]
    with pytest.raises(CodecError, match="decode to what was compressed"):
        decompress(golden_model(), file_of(TEXT[:9], wrong, 9))
    assert not decoder.lengths


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 33, 64, 100, 128])
def test_every_window_moves_by_a_sixteenth_at_least(window: int) -> None:
    least = container.least_hop(window)
    assert 16 * (least - 1) < window <= 16 * least
    for hop in (least, window):
        assert decompress(golden_model(), compress(golden_model(), TEXT[:200], window=window, hop=hop)) == TEXT[:200]
    honest = bytearray(coded_file(TEXT[:40])[: ENTRIES + container.ENTRY.size])
    for hop in (least - 1, window + 1):
        honest[18:26] = window.to_bytes(4, "little") + hop.to_bytes(4, "little")
        with pytest.raises(CodecError, match=f"a window of {window} ids and a hop of {hop}"):
            decompress(golden_model(), bytes(honest) + container._checksum(bytes(honest)) + b"payload")
