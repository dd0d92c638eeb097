"""Presets at full size on one GPU, at equal wallclock: train, pack, read back, score.

    python benchmarks/gpu_comparison.py DATA OUT --seconds 50 [--arms pr832 golf golf-chunks] [--seeds 1 2 3] [--also NAME=DATA]
                                        [--minutes 9]

DATA: byte260 shards of a training and a validation split; `--also` names further ones, of which the validation split is scored.
One process an arm: they compile side by side, then train turn by turn, seed by seed, each for the same seconds (compilation
not counted) at the reference's share of a batch, 49,152 bytes a step. What they trained is packed and scored by a process each,
once nothing is timed any more. On an H200 compiling takes 85 s (pr832) and 160 s (golf), packing and scoring 20 to 40 s; beside
three other programs that compile, 145 and 310 s. With `--minutes` no seed is begun that could not be scored by then. Writes
OUT/ARM-SEED.json and OUT/comparison.json, which ends with each arm against the first, paired by seed; run folders and
artifacts stay in OUT.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from turns import alone, wait_for

import bytejepa.training.runs as runs
from bytejepa.artifact.load import build, load, read_run
from bytejepa.artifact.write import calibration_sequences, write_artifact
from bytejepa.benchmark.bench import surroundings
from bytejepa.config import RunConfig, replace
from bytejepa.data.loader import IdStream, validation_ids
from bytejepa.model.precision import on_device
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import preset
from bytejepa.scoring.evaluate import Scorer, score_ids
from bytejepa.study.statistics import paired_difference
from bytejepa.training.runlog import RunFolder
from bytejepa.training.trainer import Trainer

GPU_SHARE_BYTES = 49_152
CALIBRATION_BYTES = 32_768
PACK_AND_SCORE_S = 60.0
"""What is set aside for it where time is limited."""


class NoTimeError(Exception):
    """A seed can no longer be trained by every arm and scored."""


def arm(name: str, seconds: float) -> RunConfig:
    """Return what the arm `name` trains: a preset, at one GPU's share of the batch and so many seconds.

    `pr832`: its warm-down in proportion (it would not begin in so short a run), its average warmed up (after 720 steps a
    ninth of one that decays by 0.997 is still the initial weights, which its 9,000 steps forget) and sequences shuffled,
    since a step of these reads one book. `golf`: two sequence lengths, to compile less. `golf-chunks`: its middle blocks every 4 bytes.
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
            **share
            | {
                "data": share["data"] | {"order": "shuffled"},
                "training": share["training"] | {"ema_warmup": True},
                "schedule": share["schedule"] | warmdown,
            },
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


def train_arm(name: str, config: RunConfig, options: argparse.Namespace) -> None:
    """Train one arm on each seed, in its turns."""
    turns = [(seed, arm_name) for seed in options.seeds for arm_name in options.arms]
    warm_up, begin, compile_s = Trainer.warm_up, time.perf_counter(), 0.0

    def warm_up_and_wait(trainer: Trainer) -> None:
        nonlocal compile_s
        warm_up(trainer)
        if not compile_s:  # later seeds find everything compiled
            compile_s = time.perf_counter() - begin
        before = turns[: turns.index((trainer.config.training.seed, name))]
        (options.out / f"{name}.compiled").touch()
        wait_for(*(options.out / f"{other}.compiled" for other in options.arms))
        wait_for(*(options.out / f"{other}-{seed}.trained" for seed, other in before))
        turn.enter_context(alone())
        this = trainer.config.training.seed
        arms_left = len(options.arms) - options.arms.index(name)
        is_late = options.deadline and time.time() + arms_left * options.seconds + PACK_AND_SCORE_S > options.deadline
        if is_late or not all((options.out / f"{arm}-{seed}.json").exists() for seed, arm in before if seed == this):
            raise NoTimeError(f"{name}: no time for seed {this}")

    Trainer.warm_up = warm_up_and_wait  # type: ignore[method-assign]
    runs.Trainer = functools.partial(Trainer, validate=False)  # type: ignore[misc, assignment]
    marks = [options.out / f"{name}.compiled", *(options.out / f"{name}-{seed}.trained" for seed in options.seeds)]
    atexit.register(lambda: [mark.touch() for mark in marks])  # nobody waits for an arm that failed
    for seed in options.seeds:
        run = options.out / f"{name}-{seed}"
        with contextlib.ExitStack() as turn:
            try:
                result = runs.train(replace(config, training={"seed": seed}), options.data, run, force=True)
            except NoTimeError as late:
                print(late, flush=True)
                return
        metrics = [line for line in RunFolder(run).read_metrics() if "train_bpb" in line]
        found = {
            "arm": name,
            "seed": seed,
            "steps": result.steps,
            "train_bytes": result.num_bytes,
            "train_s": result.elapsed_s,
            "bytes_per_s": result.num_bytes / result.elapsed_s,
            "compile_s": compile_s,
            "last_train_bpb": sum(line["train_bpb"] for line in metrics[-5:]) / len(metrics[-5:]),
        }
        write(options.out, found)
        (options.out / f"{name}-{seed}.trained").touch()
        gc.collect()
        torch.cuda.empty_cache()


def pack_and_score(name: str, seed: int, options: argparse.Namespace) -> None:
    """Pack what an arm trained, and score it as last trained, averaged and packed, on the validation split of every corpus."""
    run, artifact = options.out / f"{name}-{seed}", options.out / f"{name}-{seed}.bjm"
    trained = read_run(run)
    config, average = trained.config, trained.average
    device = torch.device("cpu" if options.rehearse else "cuda")
    corpora = {"books": options.data, **dict(options.also)}
    window = config.evaluation.window_bytes
    found = json.loads((options.out / f"{name}-{seed}.json").read_text())

    def bpb(model: ByteLM, corpora: dict[str, Path]) -> dict[str, float]:
        model.attention_backend = "math" if options.rehearse else "efficient"  # need no compilation
        scorer, scores = Scorer(on_device(model, device)), {}
        for corpus, data in corpora.items():
            ids = validation_ids(data, options.score_bytes + 1)
            with torch.no_grad():
                scores[corpus] = score_ids(scorer, ids, window=window, stride=window // 2, batch_ids=8 * window).bpb
        return scores

    begin = time.perf_counter()
    found |= {"num_parameters": sum(value.numel() for value in average.values()), **surroundings(device)}
    found |= {"window_bytes": window}
    for kind, weights in (("raw", trained.raw), ("average", average)):
        found[f"{kind}_bpb"] = bpb(build(config, weights, source=name), corpora)
    write(options.out, found)  # packing takes long; what there is is kept
    sequences = calibration_sequences(IdStream.open(options.data, "train"), config, options.data)
    info = write_artifact(artifact, average, config, sequences=sequences, device=device, force=True)
    found |= {"artifact_bytes": info.file_bytes, "artifact_bpb": bpb(load(artifact), corpora)}
    write(options.out, found | {"pack_and_score_s": time.perf_counter() - begin})


def write(out: Path, found: dict[str, Any]) -> None:
    """Write what came of an arm."""
    (out / f"{found['arm']}-{found['seed']}.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found), flush=True)


def compared(rows: list[dict[str, Any]], arms: list[str]) -> list[dict[str, Any]]:
    """Return every other arm minus the first, paired by seed, for each kind of score and corpus."""
    differences = []
    for name in arms[1:]:
        for kind in ("raw_bpb", "average_bpb", "artifact_bpb"):
            for text in sorted({text for row in rows for text in row.get(kind, {})}):
                first, other = (
                    {row["seed"]: row[kind][text] for row in rows if row["arm"] == arm and text in row.get(kind, {})}
                    for arm in (arms[0], name)
                )
                if found := paired_difference(other, first):
                    about = {"arm": name, "minus": arms[0], "score": kind, "corpus": text}
                    differences.append(about | dataclasses.asdict(found))
    return differences


def show(differences: list[dict[str, Any]]) -> None:
    """Print a table of `differences`."""
    table = Table("arm", "minus", "score", "corpus", "seeds", "bpb", "95 % interval")
    for row in differences:
        interval = "-" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        about = (row["arm"], row["minus"], row["score"].removesuffix("_bpb"), row["corpus"], str(row["num_pairs"]))
        table.add_row(*about, f"{row['mean']:+.4f}", interval)
    Console().print(table)


def corpus(words: str) -> tuple[str, Path]:
    """Return NAME and DATA of NAME=DATA."""
    name, _, data = words.partition("=")
    return name, Path(data)


def main() -> None:
    """Start a process an arm, then one for everything they trained, and gather what they wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--arms", nargs="+", default=["pr832", "golf", "golf-chunks"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--also", nargs="*", type=corpus, default=[], metavar="NAME=DATA")
    parser.add_argument("--score-bytes", type=int, default=500_000)
    parser.add_argument("--minutes", type=float, help="begin no seed that could not be scored by then")
    parser.add_argument("--rehearse", action="store_true", help="walk through it on a CPU, at a tiny size")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--score", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.train:
        config = arm(options.train, options.seconds)
        train_arm(options.train, rehearsed(config) if options.rehearse else config, options)
        return
    if options.score:
        pack_and_score(options.score[0], int(options.score[1]), options)
        return
    for pattern in ("*.compiled", "*.trained", "*.json"):  # of a run before
        for left in options.out.glob(pattern):
            left.unlink()
    until = [] if options.minutes is None else ["--deadline", str(time.time() + 60 * options.minutes)]
    failed = failures(["--train", name, *until] for name in options.arms)
    planned = [(name, seed) for name in options.arms for seed in options.seeds]
    trained = [(name, seed) for name, seed in planned if (options.out / f"{name}-{seed}.json").exists()]
    failed += failures(["--score", name, str(seed)] for name, seed in trained)
    rows = [json.loads((options.out / f"{name}-{seed}.json").read_text()) for name, seed in trained]
    differences = compared(rows, options.arms)
    (options.out / "comparison.json").write_text(json.dumps({"runs": rows, "differences": differences}, indent=1))
    show(differences)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def failures(commands: Iterable[list[str]]) -> list[str]:
    """Run this script with each of `commands` at the same time; return those that failed."""
    started = {" ".join(words): subprocess.Popen([sys.executable, *sys.argv, *words]) for words in commands}
    return [words for words, process in started.items() if process.wait()]


if __name__ == "__main__":
    main()
