"""Everything that wants a GPU, on one GPU and in the time there is: comparison, training speed, tests, codec, JEPA study.

    python benchmarks/gpu_checks.py DATA OUT TEXT --minutes 14 [--only comparison speed] [--seconds 34] [--seeds 1 2 3]

DATA: byte260 shards of a training and a validation split, 75 MB or more, so that nothing is read twice. TEXT: a file for the
codec. Stages run one after another, each of at most two programs, which compile side by side and are timed in turns: on 16
cores one program compiles in 65 to 85 s (`golf` in 160), two in 130, five in up to 310, and nine had not after 200. A stage is
left out if what it usually takes is no longer there, and stopped at the end of the time. Results: OUT/NAME.log, OUT/NAME.json,
OUT/comparison, OUT/jepa.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
Process = subprocess.Popen[bytes]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Programs that run side by side."""

    name: str
    usual_s: float
    programs: dict[str, list[str]]
    """Words after `python`, by name."""


def stages(options: argparse.Namespace, seconds_left: float) -> list[Stage]:
    """Return all stages, the most wanted first; `seconds_left` bounds the comparison."""
    training, codec, seeds = str(HERE / "gpu_training.py"), str(HERE / "gpu_codec.py"), list(map(str, options.seeds))
    own = ["loss read every step", "latent losses at weight zero"]
    own += [f"without {name}" for name in ("batches made ahead", "foreach average", "fused AdamW", "batched Muon")]
    speed = {
        "ours": ["--only", "speed: ours", *(f"speed: {name}" for name in own), "kernels"],
        "cuda-graphs": ["--only", "speed: with CUDA graphs"],
        "mix-order-reduction": ["--only", "speed: with mix_order_reduction"],
        "ours-cudnn": ["--only", "speed: ours", "--attention", "cudnn"],
        "agreement": ["--only", "agreement"],
    }
    measured = {name: [training, str(options.out / f"{name}.json"), *words] for name, words in speed.items()}
    models = {
        "codec-shipped": ["shipped", "--lanes", "1024", "4096"],
        "codec-full": ["full size", "--lanes", "64", "512"],
    }
    coded = {
        name: [codec, str(options.out / f"{name}.json"), str(options.text), "--models", *words]
        for name, words in models.items()
    }
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(HERE.parent / "tests")]
    study = ["-m", "bytejepa", "ablate", "jepa-larger", "--data", str(options.data), "--seeds", *seeds]
    compared = 240 + len(options.arms) * len(seeds) * options.seconds
    return [
        Stage("comparison", compared, {"comparison": comparison(options, seconds_left)}),
        Stage("speed", 150, {name: measured[name] for name in ("ours", "cuda-graphs")}),
        Stage("variants", 150, {name: measured[name] for name in ("mix-order-reduction", "ours-cudnn")}),
        Stage("tests", 120, {"tests": tests, "agreement": measured["agreement"]}),
        Stage("codec", 150, coded),
        Stage("jepa", 300, {"jepa": [*study, "--out", str(options.out / "jepa")]}),
    ]


def comparison(options: argparse.Namespace, seconds_left: float) -> list[str]:
    """Return the command of the comparison, which ends by itself within `seconds_left`."""
    words = [str(options.data), str(options.out / "comparison"), "--seconds", str(options.seconds)]
    words += ["--minutes", f"{seconds_left / 60:.2f}", "--seeds", *map(str, options.seeds), "--arms", *options.arms]
    return [str(HERE / "gpu_comparison.py"), *words, *(["--also", *options.also] if options.also else [])]


def start(name: str, words: list[str], out: Path, turn: Path | None) -> Process:
    """Start python with `words`, its log in OUT/NAME.log."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"BYTEJEPA_TURN_FILE": str(turn)} if turn else {})
    with (out / f"{name}.log").open("wb") as log:
        return subprocess.Popen([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, env=environment)


def run(stage: Stage, out: Path, deadline_s: float) -> dict[str, str]:
    """Run a stage until its programs end or `time.perf_counter` reaches `deadline_s`; return how each ended.

    Turns are opened once every program that is still there waits for its own.
    """
    turn = out / f"{stage.name}-turn"
    alone = len(stage.programs) == 1  # and may have programs of its own, which take turns among themselves
    running = {name: start(name, words, out, None if alone else turn) for name, words in stage.programs.items()}
    while any(process.poll() is None for process in running.values()) and time.perf_counter() < deadline_s:
        waits = [Path(f"{turn}.{process.pid}.ready").exists() for process in running.values() if process.poll() is None]
        if waits and all(waits):
            Path(f"{turn}.open").touch()
        time.sleep(0.2)
    ended = {}
    for name, process in running.items():
        late = process.poll() is None
        if late:
            process.terminate()
        ended[name] = "stopped, it took too long" if late else f"ended with {process.wait()}"
    return ended


def main() -> None:
    """Run what there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages, by the names that are printed")
    parser.add_argument("--seconds", type=float, default=34.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=["pr832", "golf"])
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=DATA")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True)
    begin = time.perf_counter()
    deadline_s = begin + 60 * options.minutes
    known = stages(options, 60 * options.minutes)
    if unknown := set(options.only or ()) - {stage.name for stage in known}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage.name for stage in known)}")
    for name in [stage.name for stage in known if not options.only or stage.name in options.only]:
        left = deadline_s - time.perf_counter()
        stage = next(stage for stage in stages(options, left) if stage.name == name)
        ended = (
            run(stage, options.out, deadline_s)
            if left >= stage.usual_s
            else {name: "left out, too little time is left"}
        )
        for program, how in ended.items():
            print(f"{time.perf_counter() - begin:5.0f} s  {program}: {how}", flush=True)


if __name__ == "__main__":
    main()
