"""Run the demo with several seeds and write a record: config, per-seed figures and metrics, a table with intervals.

python benchmarks/record_demo.py records/2026-11-28_demo --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from scipy import stats

from bytejepa.training.runlog import describe_machine

FIGURES = {
    "artifact_sliding_bpb": "artifact, sliding windows, all validation addresses, bpb",
    "artifact_sliding_mixed_bpb": "the same mixed with counts of this text, as `compress` codes it",
    "xz_bpb": "xz -9e on the same text, bpb",
    "smaller_than_xz": "share by which the model's bits are fewer",
    "quantization_loss_bpb": "artifact less average, same text and windows, bpb",
    "bits_per_parameter": "bits of the artifact a parameter",
    "weights_bytes": "artifact, bytes",
    "train_bytes_per_s": "bytes trained a second",
    "steps": "steps within the wallclock",
    "total_s": "seconds in all",
}


def interval(values: list[float]) -> str:
    """Return mean and 95 % interval (Student's t) of a few figures."""
    mean = statistics.mean(values)
    if len(values) < 2 or len(set(values)) == 1:
        return f"{mean:.5g}"
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean:.5g} +- {half:.2g}"


def main() -> None:
    """Run every seed, one after the other, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    options.record.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "bytejepa", "demo", "--training.seed", str(seed), "--json"]
            subprocess.run(
                [sys.executable, *command, "--out", folder, "--force"], check=True, stdout=subprocess.DEVNULL
            )
            result = json.loads((Path(folder) / "result.json").read_text())
            result.pop("seed_run")
            results.append({"seed": seed, **result})
            (options.record / f"seed_{seed}.json").write_text(json.dumps(results[-1], indent=1) + "\n")
            shutil.copy(Path(folder) / "run" / "metrics.jsonl", options.record / f"seed_{seed}_metrics.jsonl")
            shutil.copy(Path(folder) / "run" / "config.json", options.record / "config.json")
            shutil.copy(Path(folder) / "learning_curve.png", options.record / f"seed_{seed}_learning_curve.png")
    write_readme(options.record, results)


def write_readme(record: Path, results: list[dict[str, float]]) -> None:
    """Write the table of all seeds, with the machine and the command."""
    machine = describe_machine()
    head = " | ".join(f"seed {result['seed']}" for result in results)
    lines = [
        "# Demo: `golf-tiny` on the embedded corpus, from text to artifact",
        "",
        f"Command: `bytejepa demo --training.seed N` for N in {', '.join(str(r['seed']) for r in results)}.",
        f"Machine: {machine['processor']}, {machine['physical_cores']} cores, PyTorch {machine['versions']['torch']}, "
        f"Python {machine['python']}, {machine['created'][:10]}, commit {machine['git_commit']}.",
        "`seed_N.json` holds every figure, `seed_N_metrics.jsonl` the curve, `config.json` the configuration (last seed's).",
        "",
        f"| figure | {head} | mean, 95 % interval |",
        "|---|" + "---|" * (len(results) + 1),
    ]
    for key, meaning in FIGURES.items():
        values = [result[key] for result in results]
        lines.append(f"| {meaning} | {' | '.join(f'{v:.5g}' for v in values)} | {interval(values)} |")
    (record / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
