"""How long full-Hessian GPTQ takes: calibration on training text, then the rounding of every matrix.

    python benchmarks/benchmark_gptq.py golf
    python benchmarks/benchmark_gptq.py golf --device cuda --json

Weights are initial ones and the text is the embedded corpus' training split: the time depends on neither.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from bytejepa.artifact.calibration import calibrate
from bytejepa.artifact.quantize import order_hidden_units
from bytejepa.artifact.store import store_weights
from bytejepa.artifact.write import calibration_sequences
from bytejepa.benchmark.bench import surroundings
from bytejepa.benchmark.memory import peak_bytes
from bytejepa.benchmark.speed import synchronize
from bytejepa.config import RunConfig, replace
from bytejepa.data.corpus import write_embedded_shards
from bytejepa.data.loader import IdStream
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import preset


def measure(config: RunConfig, device: torch.device) -> dict[str, object]:
    """Return the seconds of each stage, on the clock and of CPU time, what they worked on, and the most memory in use."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "shards"
        write_embedded_shards(place)
        sequences = calibration_sequences(IdStream.open(place, "train"), config, place)
    assert sequences is not None
    model = initialize(ByteLM(config), 0).to(device)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    marks = [_now(device)]  # the beginning, the end of every pass, of the Hessians, of rounding
    calibration = calibrate(
        model,
        torch.from_numpy(sequences).to(device),
        damping=config.artifact.gptq_damping,
        on_progress=lambda *_: marks.append(_now(device)),
    )
    marks.append(_now(device))
    by_sensitivity = config.artifact.clip == "sensitivity"
    weights, ordered = order_hidden_units(weights, calibration, by_sensitivity=by_sensitivity)
    store_weights(weights, config, ordered)
    marks.append(_now(device))
    stages = {"passes": marks[-3] - marks[0], "hessians": marks[-2] - marks[-3], "rounding": marks[-1] - marks[-2]}
    stages["total"] = marks[-1] - marks[0]
    return {
        **surroundings(device),
        "num_parameters": sum(value.numel() for value in weights.values()),
        "calibration_ids": sequences.size,
        **{f"{stage}_s": float(taken[0]) for stage, taken in stages.items()},
        **{f"{stage}_cpu_s": float(taken[1]) for stage, taken in stages.items()},
        "peak_memory_bytes": peak_bytes(device),
    }


def _now(device: torch.device) -> npt.NDArray[np.float64]:
    """Return seconds on the clock and of CPU time, once the device has done all it was given."""
    synchronize(device)
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="golf")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration-bytes", type=int, help="instead of the preset's")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    config = preset(words.preset)
    if words.calibration_bytes is not None:
        config = replace(config, artifact={"calibration_bytes": words.calibration_bytes})
    figures = measure(config, torch.device(words.device))
    if words.json:
        print(json.dumps(figures, indent=1))
        return
    table = Table("figure", "value", title=f"{words.preset}: calibration and GPTQ")
    for name, value in figures.items():
        table.add_row(name, f"{value:.1f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
