"""The codec on a GPU: the same integers as on the CPU, and bytes a second.

    python benchmarks/gpu_codec.py OUT.json TEXT [--lanes 64 1024] [--bytes 524288] [--eager-only]

The shipped model and `default` at full size with random weights: encoding TEXT, not compiled and compiled (compilation is timed
apart), and decoding so many lanes. What the GPU encodes a CPU decodes, and the other way round. Timings wait for their turn
(`turns`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from turns import alone

from bytejepa.artifact.store import store_weights
from bytejepa.benchmark.bench import surroundings
from bytejepa.benchmark.speed import synchronize
from bytejepa.codec.compress import checked_window, codec_model, compress, decompress
from bytejepa.codec.integer_model import IntegerModel, integer_model
from bytejepa.codec.torch_model import TorchCoder
from bytejepa.codec.workers import Settings
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import preset

DECODED_STEPS = 24


def seconds(task: Callable[[], Any], device: torch.device) -> float:
    """Return how long `task` takes, its work on the device included."""
    with alone():
        begin = time.perf_counter()
        task()
        synchronize(device)
        return time.perf_counter() - begin


def full_size() -> IntegerModel:
    """Return `default` with random weights."""
    config = preset("default")
    model = initialize(ByteLM(config), 0)
    return integer_model(store_weights(dict(model.named_parameters()), config), config)


def speeds(
    model: IntegerModel, text: bytes, lanes: list[int], window: int, device: torch.device, *, eager_only: bool
) -> dict[str, float]:
    """Return bytes a second by what was done, and the seconds that compiling took."""
    found, hop = {}, checked_window(model, window, None)[1]
    coders = {
        name: TorchCoder(model, window, hop, device=device.type, compile=compiled)
        for name, compiled in (("encode", False), *([] if eager_only else [("encode, compiled", True)]))
    }
    for name, coder in coders.items():  # compiling is no turn: others do so at the same time
        begin = time.perf_counter()
        coder.block_intervals(text[: window + (coder.windows_at_once - 1) * hop])
        synchronize(device)
        found[f"{name}: first pass, s"] = time.perf_counter() - begin
    for name, coder in coders.items():
        found[name] = len(text) / seconds(lambda c=coder: c.block_intervals(text), device)
    coder = TorchCoder(model, window, hop, device=device.type)
    for count in lanes:
        streams = [
            np.random.default_rng(lane).bytes(16 * DECODED_STEPS) for lane in range(count)
        ]  # they decode to something
        coder.decode(streams, [2] * count)
        taken = seconds(lambda s=streams, n=count: coder.decode(s, [DECODED_STEPS] * n), device)
        found[f"decode, {count} lanes"] = count * DECODED_STEPS / taken
    return found


def restored(text: bytes, device: torch.device) -> dict[str, bool]:
    """Return whether files made on one device come back on the other, with the shipped model."""
    gpu, cpu = Settings(device=device.type, backend="torch"), Settings(threads=2, lanes=3)
    found = {}
    for kind, words in (("mixed", {"segment_bytes": 100}), ("under the model alone", {"mixing": False})):
        on_gpu, on_cpu = (compress(None, text, block_bytes=1000, settings=s, **words) for s in (gpu, cpu))
        found[f"{kind}: files are equal"] = on_gpu == on_cpu
        found[f"{kind}: made on the GPU, read on the CPU"] = decompress(None, on_gpu, settings=cpu) == text
        found[f"{kind}: made on the CPU, read on the GPU"] = decompress(None, on_cpu, settings=gpu) == text
    return found


def main() -> None:
    """Check, measure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--lanes", type=int, nargs="*", default=[64, 1024])
    parser.add_argument("--bytes", type=int, default=524_288)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--models", nargs="+", default=["shipped", "full size"])
    options = parser.parse_args()
    device = torch.device(options.device)
    text = options.text.read_bytes()
    text = (text * (options.bytes // len(text) + 1))[: options.bytes]
    report: dict[str, Any] = {**surroundings(device), "text_bytes": len(text), "window": options.window}
    report["restored"] = restored(text[:2500], device)
    models = {"shipped": lambda: codec_model(None), "full size": full_size}
    for name in options.models:
        share = text if name == "shipped" else text[: len(text) // 4]
        report[name] = speeds(
            models[name](), share, options.lanes, options.window, device, eager_only=options.eager_only
        )
        print(name, json.dumps(report[name]), flush=True)
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
