"""Presets at full size on one GPU, at equal wallclock: train, pack, read back, score.

    python benchmarks/gpu_comparison.py DATA OUT --seconds 70 [--arms pr832 golf golf-chunks]

DATA: byte260 shards of a training and a validation split. One process an arm: they compile side by side, train one after the
other, each for the same seconds (compilation not counted) at the reference's share of a batch, 49,152 bytes a step. On one
H100 compiling takes 100 s (pr832) to 200 s (golf), so that three arms of 70 s need seven minutes of a GPU without other work.
Writes OUT/ARM.json as soon as an arm is scored, and OUT/comparison.json; run folders and artifacts stay in OUT.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from turns import alone

import bytejepa.training.runs as runs
from bytejepa.artifact.load import build, load, run_weights
from bytejepa.artifact.write import calibration_sequences, write_artifact
from bytejepa.benchmark.bench import surroundings
from bytejepa.config import RunConfig, replace
from bytejepa.data.loader import IdStream, leading_ids
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import preset
from bytejepa.scoring.evaluate import Scorer, score_ids
from bytejepa.training.runlog import RunFolder
from bytejepa.training.trainer import Trainer

GPU_SHARE_BYTES = 49_152
CALIBRATION_BYTES = 32_768


def arm(name: str, seconds: float) -> RunConfig:
    """Return what the arm `name` trains: a preset, at one GPU's share of the batch and so many seconds.

    `pr832`: its warm-down in proportion (it would not begin in so short a run) and sequences shuffled, since a step of
    these reads one book. `golf`: two sequence lengths, to compile less. `golf-chunks`: its middle blocks every 4 bytes.
    """
    share = {
        "data": {"batch_bytes": GPU_SHARE_BYTES, "num_streams": 1},
        "training": {
            "bfloat16_embeddings": True, "validate_every_steps": None, "checkpoint_every_s": None, "warmup_steps": 1,
        },
        "schedule": {"steps": None, "max_wallclock_s": seconds},
        "artifact": {"fit": False, "calibration_bytes": CALIBRATION_BYTES},
    }  # fmt: skip
    if name == "pr832":
        warmdown = {"warmdown": "progress", "warmdown_fraction": 0.28, "warmdown_to": 0.167}
        return replace(
            preset("pr832"),
            **share | {"data": share["data"] | {"order": "shuffled"}, "schedule": share["schedule"] | warmdown},
        )
    config = replace(preset("golf"), **share)
    config = replace(config, data={"sequence_growth": ((0.0, 1024), (0.5, 4096))})
    if name == "golf-chunks":
        config = replace(config, model={"chunk_blocks": (3, 10), "chunk_stride_bytes": 4})
    return config


def rehearsed(config: RunConfig) -> RunConfig:
    """Return `config` small enough for a CPU."""
    chunks = {"chunk_blocks": (1, 2)} if config.model.chunk_blocks else {}
    windows = {"attention_windows": (16, 0, 16, 0)} if config.model.attention_windows else {}
    growth = {"sequence_growth": ((0.0, 32), (0.5, 64))} if config.data.sequence_growth else {}
    return replace(
        config,
        model={
            "num_layers": 4, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rotary_dims": 8, "rotary_length_bytes": 64,
            "xsa_last_layers": 1, "ngram_rows": 64, **chunks, **windows,
        },
        jepa={"latent_dim": 16, "hidden_dim": 16, "sigreg_directions": 8, "sigreg_group_sequences": None},
        data={"sequence_bytes": 64, "batch_bytes": 256, **growth},
        training={"compile": "off", "device": "cpu"},
        artifact={"calibration_bytes": 64},
        evaluation={"window_bytes": 64, "stride_bytes": 64},
    )  # fmt: skip


def run_arm(name: str, config: RunConfig, data: Path, out: Path, score_bytes: int) -> None:
    """Train, score and pack one arm."""
    warm_up, begin = Trainer.warm_up, time.perf_counter()
    compile_s = 0.0

    def warm_up_and_wait(trainer: Trainer) -> None:
        nonlocal compile_s
        warm_up(trainer)
        compile_s = time.perf_counter() - begin
        turn.enter_context(alone())

    Trainer.warm_up = warm_up_and_wait  # type: ignore[method-assign]
    runs.Trainer = functools.partial(Trainer, validate=False)  # type: ignore[misc, assignment]
    run, artifact = out / name, out / f"{name}.bjm"
    device = torch.device("cpu" if config.training.device == "cpu" else "cuda")
    ids = leading_ids(IdStream.open(data, "val"), score_bytes + 1, data)
    window = config.evaluation.window_bytes

    def bpb(model: ByteLM) -> float:
        model.attention_backend = "math"  # needs no compilation
        with torch.no_grad():
            scorer = Scorer(model.to(device))
            return score_ids(scorer, ids, window=window, stride=window, batch_ids=4 * window).bpb

    with contextlib.ExitStack() as turn:  # taken once all is compiled
        result = runs.train(config, data, run, force=True)
        config, average = run_weights(run)
        metrics = [line for line in RunFolder(run).read_metrics() if "train_bpb" in line]
        found = {
            "arm": name,
            "steps": result.steps,
            "train_bytes": result.num_bytes,
            "train_s": result.elapsed_s,
            "bytes_per_s": result.num_bytes / result.elapsed_s,
            "compile_s": compile_s,
            "last_train_bpb": sum(line["train_bpb"] for line in metrics[-5:]) / len(metrics[-5:]),
            "num_parameters": sum(value.numel() for value in average.values()),
            "scored_bytes": score_bytes,
            "window_bytes": window,
            "average_bpb": bpb(build(config, average, source=name)),
            **surroundings(device),
        }
        write(out, found)  # packing takes long; what there is is kept
        begin = time.perf_counter()
        sequences = calibration_sequences(IdStream.open(data, "train"), config, data)
        info = write_artifact(artifact, average, config, sequences=sequences, device=device, force=True)
        found |= {"pack_s": time.perf_counter() - begin, "artifact_bytes": info.file_bytes}
        found["artifact_bpb"] = bpb(load(artifact))
        write(out, found)


def write(out: Path, found: dict[str, Any]) -> None:
    """Write what came of an arm."""
    (out / f"{found['arm']}.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found), flush=True)


def main() -> None:
    """Start a process an arm, and gather what they wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=70.0)
    parser.add_argument("--arms", nargs="+", default=["pr832", "golf", "golf-chunks"])
    parser.add_argument("--score-bytes", type=int, default=1_000_000)
    parser.add_argument("--rehearse", action="store_true", help="walk through it on a CPU, at a tiny size")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.alone:
        config = arm(options.alone, options.seconds)
        config = rehearsed(config) if options.rehearse else config
        run_arm(options.alone, config, options.data, options.out, options.score_bytes)
        return
    os.environ.setdefault("BYTEJEPA_TURN_FILE", str(options.out.resolve() / "turn.lock"))
    started = [subprocess.Popen([sys.executable, *sys.argv, "--alone", name]) for name in options.arms]
    failed = [name for name, process in zip(options.arms, started, strict=True) if process.wait()]
    rows = [json.loads((options.out / f"{name}.json").read_text()) for name in options.arms if name not in failed]
    (options.out / "comparison.json").write_text(json.dumps(rows, indent=1))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
