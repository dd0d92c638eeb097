"""Any bytes to a compressed file and back, exactly.

The content is cut into blocks. Each is coded by itself under the model's integer frequencies, mixed with what the block has
shown so far unless told otherwise, or with zstd where that is smaller; where zstd on the whole is smaller than all of it, the
file is that zstd frame. Blocks are coded by several threads, and decoded in several lanes a thread; neither changes a bit of the
result.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bytejepa.artifact.codecs import zstd_decompress
from bytejepa.artifact.container import read_container
from bytejepa.artifact.load import configuration_of, load, stored_weights
from bytejepa.codec import coder, container
from bytejepa.codec.integer_model import IntegerModel, integer_model
from bytejepa.codec.lanes import LaneCoder, Paths, Progress
from bytejepa.codec.mixed import encode_mixed
from bytejepa.codec.shipped import shipped_model_path
from bytejepa.codec.workers import Settings, in_threads
from bytejepa.codec.zstd_frame import compress_frame
from bytejepa.errors import CodecError, ConfigError
from bytejepa.kernels.mixing_state import MOST_SEGMENTS, segment_begins
from bytejepa.model.transformer import ByteLM
from bytejepa.processors import num_usable_processors

BLOCK_BYTES = 1 << 22
"""Content of a block: damage costs no more than this. Each block begins without context and without counts."""
BYTES_AT_ONCE = 1 << 26
"""Content of the blocks that all threads mix, or decode, at the same time: each takes memory of its own."""
MIXING_SHARE = 1 / 8
"""Of the progress that is reported of a block, how much is for mixing it after the model has read it: about as of the time."""
SEGMENT_BYTES = 16_384
"""Least content of a segment, which decodes in a lane of its own and begins without context, but not without counts."""
UNMIXED_BLOCK_BYTES = 32_768
"""Content of a block that is coded under the model alone: larger files decode in lanes."""
WINDOW = 1024
"""Longest default window: beyond it attention costs more than the context gains."""
COMPILED_FROM_BYTES = 4_000_000
"""Content from which on compiling the model for a GPU, half a minute, pays."""
INCOMPRESSIBLE = 0.98
"""A block that zstd cannot bring below this share is not given to the model."""

Model = IntegerModel | ByteLM | Path | str
_Numbered = tuple[int, container.Block]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """A block that could not be restored."""

    begin: int
    num_bytes: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Restored:
    """What could be restored of a file."""

    parts: tuple[bytes | Damage, ...]
    """Blocks in order: their content, or why they are lost; then what else is wrong with the file."""

    @property
    def damaged(self) -> list[Damage]:
        """What is lost."""
        return [part for part in self.parts if isinstance(part, Damage)]

    @property
    def num_bytes(self) -> int:
        """Length of the content, what is lost included."""
        return sum(part.num_bytes if isinstance(part, Damage) else len(part) for part in self.parts)

    def pieces(self) -> Iterator[bytes]:
        """Yield the content block after block, with zeros in place of what is lost: made only now, one block at a time."""
        for part in self.parts:
            yield bytes(part.num_bytes) if isinstance(part, Damage) else part


def codec_model(model: Model | None) -> IntegerModel:
    """Return the integer form of a model: of an artifact, a run folder, a loaded model, or None for the shipped one.

    Raises: CodecError if the codec cannot use it; ArtifactError or CheckpointError if it cannot be read.
    """
    if isinstance(model, IntegerModel):
        return model
    if isinstance(model, ByteLM):
        return integer_model(stored_weights(model), model.config)
    path = shipped_model_path() if model is None else Path(model)
    if path.is_dir():
        return codec_model(load(path))
    artifact = read_container(path)
    return integer_model(artifact.stored, configuration_of(artifact.configuration, str(path)))


def compress(
    model: Model | None,
    data: bytes,
    *,
    mixing: bool = True,
    block_bytes: int | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    window: int | None = None,
    hop: int | None = None,
    settings: Settings | None = None,
) -> bytes:
    """Return `data` compressed: the same bytes on every machine, for given versions of zstd.

    `mixing`: mix the model's predictions with what a block has shown so far (`kernels.context_mixing`); `segment_bytes`: least
    length of the up to 16 segments of a block, which decode at once. `block_bytes`: default 4,194,304, without mixing 32,768.
    `window`, `hop`: context of a prediction in ids and how far it moves (docs/codec.md), at least a sixteenth of it;
    default: the model's, at most 1,024, and three quarters of it. Raises: ConfigError for a window that the model does
    not have, CodecError as `codec_model`.
    """
    settings = settings or Settings()
    if block_bytes is None:
        block_bytes = BLOCK_BYTES if mixing else UNMIXED_BLOCK_BYTES
    longest = container.MAX_MIXED_BLOCK_BYTES if mixing else container.MAX_UNMIXED_BLOCK_BYTES
    if not 1 <= segment_bytes < 1 << 32:
        raise ConfigError(f"segment bytes: expected 1 to {(1 << 32) - 1}, got {segment_bytes}")
    if not 1 <= block_bytes <= longest:
        raise ConfigError(
            f"block bytes: expected 1 to {longest}{'' if mixing else ' without mixing'}, got {block_bytes}"
        )
    if not data and window is None and hop is None:
        return compress_frame(data)
    integers = codec_model(model)
    window, hop = checked_window(integers, window, hop)
    whole = compress_frame(data)
    if not data:
        return whole
    compiled = settings.compile
    if compiled is None:
        compiled = settings.device != "cpu" and len(data) >= COMPILED_FROM_BYTES
    chosen = _coder(integers, window, hop, settings, compiled=compiled)
    if len(data) <= container.MAX_UNMIXED_BLOCK_BYTES:  # one block, which readers of an older version know too
        block_bytes = min(block_bytes, container.MAX_UNMIXED_BLOCK_BYTES)
    contents = [data[begin : begin + block_bytes] for begin in range(0, len(data), block_bytes)]
    least = segment_bytes if mixing else None
    if least is None:
        blocks = in_threads(lambda content, report: _encode_block(chosen, content, report), contents, settings)
    else:
        blocks = _encode_mixed_blocks(chosen, contents, least, settings)
    coded = container.blocks_file(
        data, blocks, block_bytes=block_bytes, window=window, hop=hop, model=integers.sha256, segment_bytes=least
    )
    return coded if len(coded) < len(whole) else whole


def decompress(model: Model | None, blob: bytes, *, settings: Settings | None = None) -> bytes:
    """Return what was compressed. Raises: CodecError for damage, or if it was made with another model.

    Damage that the checksums of what is stored tell is found before anything is decoded, other damage ends the decoding.
    Where no block needs a model, as in a file that is one zstd frame, `model` is not looked at.
    """
    return b"".join(restore(model, blob, settings=settings, keep_going=False).pieces())


def restore(model: Model | None, blob: bytes, *, settings: Settings | None = None, keep_going: bool = True) -> Restored:
    """Return what can be restored, and which blocks cannot.

    Raises: CodecError if nothing can be: a foreign file, a damaged header, another model, no good block; without
    `keep_going` for any damage.
    """
    parsed = container.parse(blob)
    if isinstance(parsed, bytes):
        if settings is not None and settings.on_progress is not None:
            settings.on_progress(len(parsed))
        return Restored((parsed,))
    known = [_damage(parsed, index) for index, block in enumerate(parsed.blocks) if block is None]
    length_problem = [] if known else _length_damage(parsed)
    if (known or length_problem) and not keep_going:
        raise _failure(known + length_problem)
    integers = _model_of(parsed, model)
    contents = _decode_blocks(integers, parsed, settings or Settings(), keep_going=keep_going)
    if parsed.blocks and all(content is None for content in contents):
        raise CodecError(f"all blocks are damaged, {len(contents)} of them: nothing can be restored")
    if None not in contents and container.digest(content or b"" for content in contents) != parsed.content_digest:
        raise CodecError("the checksum of the whole differs", hint="the file is damaged, copy it again")
    parts = [_damage(parsed, index) if content is None else content for index, content in enumerate(contents)]
    return Restored((*parts, *length_problem))


def content_bytes(blob: bytes) -> int:
    """Return how many bytes `blob` was made from, as its header says. Raises: CodecError if it is no compressed file."""
    parsed = container.parse(blob)
    return len(parsed) if isinstance(parsed, bytes) else parsed.content_bytes


def checked_window(model: IntegerModel, window: int | None, hop: int | None) -> tuple[int, int]:
    """Return window and hop in ids with defaults filled in. Raises: ConfigError."""
    window = min(model.default_window, WINDOW) if window is None else window
    if not 1 <= window <= model.longest_window:
        raise ConfigError(f"window: expected 1 to {model.longest_window} ids for this model, got {window}")
    hop = default_hop(window) if hop is None else hop
    least = container.least_hop(window)
    if not least <= hop <= window:
        raise ConfigError(f"hop: expected {least} to {window} ids for a window of {window}, got {hop}")
    return window, hop


def default_hop(window: int) -> int:
    """Return three quarters of a window: it costs no bits against half of one, and two thirds of the work (docs/log.md)."""
    return max(1, window * 3 // 4)


def _coder(model: IntegerModel, window: int, hop: int, settings: Settings, *, compiled: bool = False) -> LaneCoder:
    on_gpu = settings.device != "cpu"
    if settings.backend == "torch" or (settings.backend == "auto" and on_gpu):
        from bytejepa.codec.torch_model import TorchCoder

        return TorchCoder(model, window, hop, device=settings.device, compile=compiled)
    from bytejepa.codec.cpu import CpuCoder

    return CpuCoder(model, window, hop)


def _encode_block(chosen: LaneCoder, content: bytes, report: Progress) -> container.Block:
    simple = compress_frame(content, checksum=False)
    if len(simple) < INCOMPRESSIBLE * len(content):
        payload = coder.encode(*chosen.block_intervals(content, report))
        if len(payload) < len(simple):
            return container.make_block(content, payload, is_zstd=False)
    else:
        report(len(content))
    return container.make_block(content, simple, is_zstd=True)


def _encode_mixed_blocks(
    chosen: LaneCoder, contents: Sequence[bytes], segment_bytes: int, settings: Settings
) -> list[container.Block]:
    """Return the blocks of `contents`: some at a time, for what the model says of a byte takes 16 bytes of memory."""
    blocks = list[container.Block]()
    mixing_settings = dataclasses.replace(settings, threads=settings.threads or num_usable_processors())
    at_once = max(1, min(mixing_settings.num_threads, BYTES_AT_ONCE // max(1, len(contents[0]))))
    for first in range(0, len(contents), at_once):
        together = contents[first : first + at_once]
        simple = [compress_frame(content, checksum=False) for content in together]
        modelled = [k for k, content in enumerate(together) if len(simple[k]) < INCOMPRESSIBLE * len(content)]
        paths = {k: np.empty((len(together[k]), 8), np.uint16) for k in modelled}
        pieces = [
            (together[k][begin:end], paths[k][begin:end])
            for k in modelled
            for begin, end in itertools.pairwise(segment_begins(len(together[k]), segment_bytes))
        ]
        in_threads(_say(chosen), pieces, settings)
        said = [(together[k], paths[k]) for k in modelled]
        streams = dict(zip(modelled, in_threads(_mix(segment_bytes), said, mixing_settings), strict=True))
        for k, content in enumerate(together):
            is_zstd = k not in streams or len(streams[k]) >= len(simple[k])
            blocks.append(container.make_block(content, simple[k] if is_zstd else streams[k], is_zstd=is_zstd))
            if k not in streams and settings.on_progress is not None:
                settings.on_progress(len(content))
    return blocks


def _say(chosen: LaneCoder) -> Callable[[tuple[bytes, Paths], Progress], None]:
    """Return the work that fills the place of a segment with what the model says of it."""

    def fill(piece: tuple[bytes, Paths], report: Progress) -> None:
        segment, place = piece
        reported = done = 0

        def report_share(num_bytes: int) -> None:
            nonlocal reported, done
            done += num_bytes
            report(_of_model(done) - reported)
            reported = _of_model(done)

        place[:] = chosen.segment_paths(segment, report_share)

    return fill


def _of_model(num_bytes: int) -> int:
    """Return how many of the bytes of a segment count as done when the model has read so many."""
    return int(num_bytes * (1 - MIXING_SHARE))


def _mix(segment_bytes: int) -> Callable[[tuple[bytes, Paths], Progress], bytes]:
    """Return the work that makes a stream of a block and of what the model says of it."""

    def mix(block: tuple[bytes, Paths], report: Progress) -> bytes:
        content, paths = block
        begins = segment_begins(len(content), segment_bytes)
        left = len(content) - sum(_of_model(end - begin) for begin, end in itertools.pairwise(begins))
        reported = 0

        def report_share(mixed_bytes: int) -> None:
            nonlocal reported
            share = left * mixed_bytes // len(content)
            report(share - reported)
            reported = share

        return encode_mixed(content, paths, segment_bytes, on_progress=report_share)

    return mix


def _model_of(parsed: container.Blocks, model: Model | None) -> IntegerModel | None:
    """Return the model in integer form, None where no block needs it. Raises: CodecError if it is not the one needed."""
    if all(block is None or block.is_zstd for block in parsed.blocks):
        return None
    integers = codec_model(model)
    if integers.sha256 != parsed.model_sha256:
        raise CodecError(
            f"made with the model {parsed.model_sha256.hex()[:16]}..., this is {integers.sha256.hex()[:16]}...",
            hint="name the model that it was compressed with",
        )
    if parsed.window > integers.longest_window:
        raise CodecError(
            f"the header claims a window of {parsed.window} ids",
            hint=f"this model has windows of up to {integers.longest_window}: the file is damaged",
        )
    return integers


def _decode_blocks(
    model: IntegerModel | None, parsed: container.Blocks, settings: Settings, *, keep_going: bool
) -> list[bytes | None]:
    """Return the contents of all blocks; None for those that fail. Raises: CodecError for these without `keep_going`."""
    contents: list[bytes | None] = [None] * len(parsed.blocks)
    coded = []

    def keep(index: int, block: container.Block, content: bytes | None) -> None:
        if content is not None and zlib.crc32(content) == block.content_crc:
            contents[index] = content
        elif not keep_going:
            raise _failure([_damage(parsed, index)])

    for index, block in enumerate(parsed.blocks):
        if block is not None and not block.is_zstd and block.payload:
            coded.append((index, block))
            continue
        if block is not None:
            # an empty stream points to the least of all numbers, where the first byte is each time
            content = zstd_decompress(block.payload, block.num_bytes) if block.is_zstd else bytes(block.num_bytes)
            keep(index, block, content)
        if settings.on_progress is not None:
            settings.on_progress(parsed.num_bytes(index))
    if model is None or not coded:
        return contents
    chosen = _coder(model, parsed.window, parsed.hop, settings)

    at_once = max(1, BYTES_AT_ONCE // max(1, coded[0][1].num_bytes))
    num_threads = min(settings.num_threads, at_once)
    lanes_of_block = 1 if parsed.segment_bytes is None else MOST_SEGMENTS
    # what are decoded together: no more than the lanes and the memory, and something for every thread
    size = max(1, min(settings.num_lanes // lanes_of_block, at_once // num_threads, -(-len(coded) // num_threads)))
    groups = [coded[first : first + size] for first in range(0, len(coded), size)]
    spare_threads = settings.num_threads // min(len(groups), num_threads)

    def decode(group: list[_Numbered], report: Progress) -> None:
        payloads, lengths = [block.payload for _, block in group], [block.num_bytes for _, block in group]
        if parsed.segment_bytes is None:
            found = chosen.decode(payloads, lengths, report)
        else:
            found = chosen.decode_mixed(payloads, lengths, parsed.segment_bytes, report, spare_threads)
        for (index, block), content in zip(group, found, strict=True):
            keep(index, block, content)

    in_threads(decode, groups, dataclasses.replace(settings, threads=num_threads))
    return contents


def _damage(parsed: container.Blocks, index: int) -> Damage:
    is_stored_so = parsed.blocks[index] is None
    reason = "its stored bytes are damaged" if is_stored_so else "it does not decode to what was compressed"
    return Damage(begin=parsed.begin(index), num_bytes=parsed.num_bytes(index), reason=reason)


def _length_damage(parsed: container.Blocks) -> list[Damage]:
    if parsed.length_problem is None:
        return []
    return [Damage(begin=parsed.content_bytes, num_bytes=0, reason=parsed.length_problem)]


def _failure(damaged: list[Damage]) -> CodecError:
    first = damaged[0]
    where = f"bytes {first.begin} to {first.begin + first.num_bytes}: {first.reason}"
    more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return CodecError(f"{where}{more}", hint="restore the rest with --keep-going")
