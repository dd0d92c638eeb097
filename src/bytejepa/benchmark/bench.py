"""What `bytejepa bench` runs: training, scoring, preparation and loading, each against the plain way to do it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bytejepa.benchmark.against_plain import measure_against_plain, speedup
from bytejepa.benchmark.memory import peak_bytes, restart_peak
from bytejepa.benchmark.processes import PeakOfProcesses
from bytejepa.benchmark.speed import (
    Speed,
    TrainingStep,
    flop_per_byte,
    matmul_peak_flop_per_s,
    measure,
    measure_parts,
    random_loader,
    synchronize,
)
from bytejepa.config import RunConfig, replace
from bytejepa.data.corpus import embedded_documents
from bytejepa.data.vocabulary import BYTE_OFFSET, VOCABULARY_SIZE
from bytejepa.model.initialization import initialize
from bytejepa.model.precision import on_device
from bytejepa.model.transformer import ByteLM
from bytejepa.scoring.evaluate import Scorer, score_ids
from bytejepa.scoring.windows import plan_windows, window_and_stride
from bytejepa.training.runlog import processor_name


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return what a figure needs beside it: hardware, versions, threads, load."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_average": psutil.getloadavg()[0],
    }


def bench_train(
    config: RunConfig,
    device: torch.device,
    *,
    against_plain: bool,
    parts: bool,
    compile: bool,  # noqa: A002 - torch's word
    steps: int,
) -> dict[str, Any]:
    """Return the speed of training at the full sequence length, and with `against_plain` that of the plain writing and
    the ratios."""
    config = replace(config, data={"sequence_growth": None})
    peak = matmul_peak_flop_per_s(device)
    step = TrainingStep(config, device, compile=compile)
    report: dict[str, Any] = {
        **surroundings(device),
        "matmul_peak_tflop_per_s": peak / 1e12,
        "mflop_per_byte": flop_per_byte(config) / 1e6,
        "batch_bytes": config.data.batch_bytes,
        "sequence_bytes": config.data.sequence_bytes,
        "compiled": compile,
    }
    speeds: list[Speed] = []
    if against_plain:
        ours, plain = measure_against_plain(config, step, peak=peak, steps=steps)
        speeds = [ours, plain]
        report["times_plain_median"], report["times_plain_fastest"] = speedup(ours, plain)
    else:
        speeds = [measure("ours", step, config, device, peak=peak, steps=steps)]
    if parts:
        speeds[0] = dataclasses.replace(speeds[0], parts_ms=measure_parts(step, steps=max(3, steps // 3)))
    report["speeds"] = [dataclasses.asdict(speed) for speed in speeds]
    return report


def bench_eval(config: RunConfig, device: torch.device, *, num_bytes: int, compile: bool) -> dict[str, Any]:  # noqa: A002
    """Return the speed of scoring random bytes: one pass, sliding as configured, and sliding without the pruned tail."""
    model = on_device(initialize(ByteLM(config), 0), device).eval()
    random = np.random.default_rng(0)
    ids = random.integers(BYTE_OFFSET, VOCABULARY_SIZE, num_bytes + 1, dtype=np.uint16)
    window, stride = window_and_stride(config.evaluation)
    report: dict[str, Any] = {
        **surroundings(device),
        "num_bytes": num_bytes,
        "window": window,
        "stride": stride,
        "ways": {},
    }
    ways = {
        "one pass": (window, True),
        "sliding": (stride, True),
        "sliding, nothing pruned": (stride, False),
    }
    for name, (every, prune) in ways.items():
        scorer = Scorer(model, compile=compile, prune=prune)

        restart_peak(device)
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            score = score_ids(scorer, ids, window=window, stride=every, batch_ids=config.evaluation.batch_bytes)
            synchronize(device)
            taken.append(time.perf_counter() - begin)
        elapsed_s = min(taken)
        report["ways"][name] = {
            "bpb": score.bpb,
            "elapsed_s": elapsed_s,
            "bytes_per_s": num_bytes / elapsed_s,
            "peak_memory_bytes": peak_bytes(device),
        }
    one, sliding = report["ways"]["one pass"]["elapsed_s"], report["ways"]["sliding"]["elapsed_s"]
    report["sliding_over_one_pass"] = sliding / one
    whole, overlapping = (len(list(plan_windows(num_bytes, window=window, stride=s))) for s in (window, stride))
    report["windows_over_one_pass"] = overlapping / whole
    return report


def bench_load(config: RunConfig, device: torch.device, *, steps: int) -> dict[str, Any]:
    """Return the time a batch takes to make and, made ahead, to be handed over."""
    loader = random_loader(replace(config, data={"sequence_growth": None}).data, device)
    begin = time.perf_counter()
    for index in range(steps):
        loader.make(0, index)
    made_s = (time.perf_counter() - begin) / steps
    waits = []
    for index in range(steps):
        begin = time.perf_counter()
        loader.batch(0, index)
        waits.append(time.perf_counter() - begin)
        time.sleep(2 * made_s)  # a step takes longer than its batch
    loader.close()
    return {
        **surroundings(device),
        "make_ms": made_s * 1e3,
        "hand_over_ms": statistics.median(waits) * 1e3,
        "bytes_per_s": config.data.batch_bytes / made_s,
    }


def bench_prepare(*, num_megabytes: int, workers: int) -> dict[str, Any]:
    """Return the speed of turning JSONL made of the embedded corpus into shards, and the memory of all that takes part."""
    from bytejepa.data.prepare import prepare

    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.jsonl"
        source_bytes = _write_documents(source, num_megabytes * 1_000_000)
        restart_peak(cpu)
        # one worker is this process, whose peak the system knows: nobody needs to look while it is timed
        watching = contextlib.nullcontext(None) if workers == 1 else PeakOfProcesses()
        with watching as seen:
            begin = time.perf_counter()
            result = prepare([source], Path(folder) / "out", val_documents=10, workers=workers)
            elapsed_s = time.perf_counter() - begin
        peak_memory_bytes = max(peak_bytes(cpu), seen.peak_bytes if seen else 0)
        text_bytes = sum(split.num_text_bytes for split in result.manifest.splits.values())
    return {
        **surroundings(cpu),
        "source_bytes": source_bytes,
        "text_bytes": text_bytes,
        "workers": result.num_workers,
        "elapsed_s": elapsed_s,
        "bytes_per_s": text_bytes / elapsed_s,
        "bytes_per_s_a_worker": text_bytes / elapsed_s / result.num_workers,
        "peak_memory_bytes": peak_memory_bytes,
    }


def _write_documents(path: Path, num_bytes: int) -> int:
    """Write the embedded corpus as JSONL, again and again, until the file has `num_bytes`, and return how many it has: the
    last document is whole."""
    lines = [
        json.dumps({"id": document.id, "text": document.data.decode("utf-8", errors="replace")}).encode() + b"\n"
        for document in embedded_documents()
    ]
    written = 0
    with path.open("wb") as file:
        for line in itertools.cycle(lines):
            written += file.write(line)
            if written >= num_bytes:
                return written
    raise AssertionError("the corpus is empty")
