"""The codec's speed by lanes and window, against float32 stepping, and its ratio against other compressors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from bytejepa.artifact.store import store_weights
from bytejepa.benchmark.bench import surroundings
from bytejepa.benchmark.generation import chunk_period
from bytejepa.bits import bits_per_byte_of_size
from bytejepa.codec.compress import Model, codec_model, compress, decompress, default_hop
from bytejepa.codec.cpu import CpuCoder
from bytejepa.codec.integer_model import IntegerModel, integer_model
from bytejepa.codec.mixed import encode_mixed
from bytejepa.codec.workers import Settings
from bytejepa.compressors import compressed_bytes
from bytejepa.config import RunConfig, replace
from bytejepa.data.vocabulary import BYTE_OFFSET
from bytejepa.errors import ConfigError
from bytejepa.inference.engine import chunk_multiple
from bytejepa.inference.generate import generation_engine
from bytejepa.kernels.mixing_state import MOST_SEGMENTS
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM
from bytejepa.processors import num_usable_processors


def bench_codec(
    config: RunConfig, *, num_bytes: int, lanes: Sequence[int], windows: Sequence[int], threads: int | None
) -> dict[str, Any]:
    """Return bytes a second of the codec on blocks of `num_bytes` random bytes, with random weights.

    For every window, with its default hop: encoding one block a thread, decoding mixed blocks of so many segments a thread,
    mixing both times included, and what float32 stepping reaches with as many lanes in all (without an entropy coder, at 3/4
    of the window). The lanes of a row are those of all threads together.
    """
    threads = threads or num_usable_processors()
    model = initialize(ByteLM(config), 0).eval()
    # random weights have no text to calibrate on
    config = replace(config, artifact={"rounding": "nearest", "clip": "mean_squared_error", "fit": False})
    integers = integer_model(store_weights(dict(model.named_parameters()), config), config)
    block = np.random.default_rng(0).bytes(num_bytes)
    rows = []
    for window in windows:
        if not 2 <= window <= integers.longest_window:
            raise ConfigError(f"bench window: expected 2 to {integers.longest_window} ids for this model, got {window}")
        rows += _codec_rows(integers, block, window, lanes, threads)
        rows += [_float_row(model, window, count * threads) for count in lanes]
    return {
        **surroundings(torch.device("cpu")),
        "codec_threads": threads,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "block_bytes": num_bytes,
        "codec": rows,
    }


def _codec_rows(
    model: IntegerModel, block: bytes, window: int, lanes: Sequence[int], threads: int
) -> list[dict[str, Any]]:
    coder = CpuCoder(model, window, default_hop(window))

    def encode(content: bytes) -> None:
        encode_mixed(content, coder.segment_paths(content), len(content))

    encode(block[:2])  # compiles, or reads the compiled code
    coder.decode_mixed([block], [2], 1)
    with ThreadPoolExecutor(threads) as pool:

        def rate(task: Callable[[int], Any], num_bytes: int) -> float:
            began = time.perf_counter()
            list(pool.map(task, range(threads)))
            return threads * num_bytes / (time.perf_counter() - began)

        rows = [_row("encode", window, threads, rate(lambda _: encode(block), len(block)))]
        for count in lanes:
            segments = [min(MOST_SEGMENTS, count - first) for first in range(0, count, MOST_SEGMENTS)]
            streams = [block * n for n in segments]  # any bytes decode to something
            measured = rate(
                lambda _, s=streams: coder.decode_mixed(s, [len(stream) for stream in s], len(block)),
                count * len(block),
            )
            rows.append(_row("decode", window, count * threads, measured))
    return rows


def _row(what: str, window: int, lanes: int, bytes_per_s: float) -> dict[str, Any]:
    return {"what": what, "window": window, "lanes": lanes, "bytes_per_s": bytes_per_s}


def _float_row(model: ByteLM, window: int, lanes: int) -> dict[str, Any]:
    multiple = chunk_multiple(model)  # the codec's windows need not be whole chunks, the engine's must
    engine = generation_engine(model, window=max(multiple, window - window % multiple))
    state = engine.start(num_lanes=lanes)
    period = min(chunk_period(model.config), engine.window)  # what runs once a chunk does so in its share of the steps
    first = min(window * 3 // 4, engine.window - period)
    engine.feed(state, torch.full((lanes, 1), BYTE_OFFSET))
    steps, began = 0, time.perf_counter()
    while steps < max(3, period) or time.perf_counter() - began < 1:
        state.position = first + steps % period  # what the cache holds does not change the speed
        engine.step(state, torch.full((lanes,), BYTE_OFFSET))
        steps += 1
    return _row("float32 steps", window, lanes, lanes * steps / (time.perf_counter() - began))


def compare(model: Model | None, texts: dict[str, bytes], *, settings: Settings | None = None) -> list[dict[str, Any]]:
    """Return one row a text: bits per byte of the codec and of the others, and the codec's bytes a second.

    Every file is decompressed again and compared. The model's bytes are not counted in any figure.
    """
    integers, rows = codec_model(model), list[dict[str, Any]]()
    for name, text in texts.items():
        began = time.perf_counter()
        blob = compress(integers, text, settings=settings)
        encoded = time.perf_counter()
        assert decompress(integers, blob, settings=settings) == text, f"{name} did not come back"
        decoded = time.perf_counter()
        sizes = {"bytejepa": len(blob), **compressed_bytes(text)}
        rows.append(
            {
                "text": name,
                "num_bytes": len(text),
                "bpb": {program: bits_per_byte_of_size(size, len(text)) for program, size in sizes.items()},
                "encode_bytes_per_s": len(text) / (encoded - began),
                "decode_bytes_per_s": len(text) / (decoded - encoded),
            }
        )
    return rows
