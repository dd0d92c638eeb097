"""Everything that wants a GPU, on one GPU: tests, training speed, codec, JEPA study, comparison.

    python benchmarks/gpu_checks.py DATA OUT TEXT [--seconds 48] [--seeds 1 2 3] [--also NAME=DATA ...]

DATA: byte260 shards of a training and a validation split, 75 MB or more, so that nothing is read twice. TEXT: a file for the
codec. All programs start at once and compile side by side; what is not timed (tests, agreement with the CPU, the plan
`jepa-larger`, a process a seed) runs meanwhile. When that is over, or after `--untimed-s`, which stops what is left of it, the
timed ones take their turns, then the arms of `gpu_comparison.py`. It wants many cores: on 16 of them, with 3 seeds, the twelve
programs had not compiled after 8 minutes, where `gpu_training.py` alone takes 90 s. With fewer cores than programs times four,
call the scripts one after another. Results: OUT/NAME.log, OUT/NAME.json, OUT/comparison, OUT/jepa.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
Process = subprocess.Popen[bytes]


def untimed(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the commands that nobody times, by name."""
    study = ["-m", "bytejepa", "ablate", "jepa-larger", "--data", str(options.data)]
    agreement = [str(HERE / "gpu_training.py"), str(options.out / "agreement.json"), "--only", "agreement"]
    return {
        "tests": ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(HERE.parent / "tests")],
        "agreement": agreement,
        **{f"jepa-{s}": [*study, "--seeds", str(s), "--out", str(options.out / f"jepa-{s}")] for s in options.seeds},
    }


def timed(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the commands that take turns, by name."""
    training, codec = str(HERE / "gpu_training.py"), str(HERE / "gpu_codec.py")
    own = ["loss read every step", "latent losses at weight zero"]
    own += [f"without {name}" for name in ("batches made ahead", "foreach average", "fused AdamW", "batched Muon")]
    sections = {
        "ours": ["--only", "speed: ours", *(f"speed: {name}" for name in own)],
        "ours-cudnn": ["--only", "speed: ours", "--attention", "cudnn"],
        "mix-order-reduction": ["--only", "speed: with mix_order_reduction"],
    }
    models = {
        "codec-shipped": ["shipped", "--lanes", "1024", "4096"],
        "codec-full": ["full size", "--lanes", "64", "512"],
    }
    return {
        **{name: [training, str(options.out / f"{name}.json"), *words] for name, words in sections.items()},
        **{
            name: [codec, str(options.out / f"{name}.json"), str(options.text), "--models", *words]
            for name, words in models.items()
        },
    }


def comparison(options: argparse.Namespace) -> list[str]:
    """Return the command of the comparison."""
    seeds = [str(seed) for seed in options.seeds]
    also = ["--also", *options.also] if options.also else []
    words = [str(options.data), str(options.out / "comparison"), "--seconds", str(options.seconds), "--seeds", *seeds]
    return [str(HERE / "gpu_comparison.py"), *words, "--arms", *options.arms, *also]


def start(name: str, words: list[str], out: Path, turn: str | None) -> Process:
    """Start python with `words`, its log in OUT/NAME.log."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "4", "PYTHONUNBUFFERED": "1"}
    environment |= {"BYTEJEPA_TURN_FILE": str(out / turn)} if turn else {}
    with (out / f"{name}.log").open("wb") as log:
        return subprocess.Popen([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, env=environment)


def gather_study(options: argparse.Namespace) -> None:
    """Put the seeds of the study that are complete into one, whose runs are all finished."""
    complete = []
    for seed in options.seeds:
        file = options.out / f"jepa-{seed}" / "study.json"
        study = json.loads(file.read_text()) if file.is_file() else {"runs": []}
        if study["runs"] and len(study["runs"]) == len(study["plan"]["variants"]):
            complete.append(str(seed))
            shutil.copytree(file.parent / "runs", options.out / "jepa" / "runs", dirs_exist_ok=True)
    if complete:
        words = ["ablate", "jepa-larger", "--data", str(options.data), "--out", str(options.out / "jepa")]
        start("jepa", ["-m", "bytejepa", *words, "--seeds", *complete], options.out, None).wait()


def main() -> None:
    """Start everything, and open the turns when it is quiet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seconds", type=float, default=48.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=["pr832", "golf-chunks"])
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=DATA")
    parser.add_argument("--untimed-s", type=float, default=290.0)
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True)
    begin, out = time.perf_counter(), options.out

    def report(text: str) -> None:
        print(f"{time.perf_counter() - begin:5.0f} s  {text}", flush=True)

    compared = start("comparison", comparison(options), out, "comparison-turn")
    waiting = {name: start(name, words, out, "turn") for name, words in timed(options).items()}
    others = {name: start(name, words, out, None) for name, words in untimed(options).items()}
    quiet, stopped = dict.fromkeys(others | waiting, False), list[str]()
    while not all(quiet.values()) or not is_compiled(out, options.arms, compared):
        time.sleep(0.2)
        if time.perf_counter() - begin > options.untimed_s and not stopped:
            stopped = [name for name, process in others.items() if process.poll() is None]
            for name in stopped:
                report(f"{name} is stopped, it took too long")
                others[name].kill()
        for name, process in (others | waiting).items():
            ready = process.poll() is not None or (out / f"turn.{process.pid}.ready").exists()
            if ready and not quiet[name]:
                report(f"{name}: {'at its turn' if process.poll() is None else f'ended with {process.poll()}'}")
            quiet[name] = ready
    gather_study(options)
    report("the timed begin")
    (out / "turn.open").touch()
    for name, process in waiting.items():
        process.wait()
        report(f"{name}: ended with {process.returncode}")
    (out / "comparison-turn.open").touch()
    compared.wait()
    report(f"comparison: ended with {compared.returncode}")


def is_compiled(out: Path, arms: list[str], compared: Process) -> bool:
    """Return whether every arm waits for its turn, or none will."""
    return compared.poll() is not None or all((out / "comparison" / f"{arm}.compiled").exists() for arm in arms)


if __name__ == "__main__":
    main()
