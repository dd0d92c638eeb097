"""How far a GPU's rounding alone moves a loss: the runs of `gpu_training.py agreement` on a CPU, in float32 and rounded.

    python benchmarks/gpu_rounding_on_cpu.py OUT.json [--seeds 1 2 3 ...] [--steps 200]

Rounded: activations and products in bfloat16 with the MLP's and the heads' formulas that GPUs take, and Newton-Schulz
iterations in bfloat16. Writes the relative difference of the last losses for each seed, their mean and standard deviation, and
the interval that one more run falls into 95 times in 100. About two minutes a seed on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import gpu_training
import torch
from rich.progress import track
from scipy import stats
from torch import Tensor

from bytejepa.config import RunConfig, replace
from bytejepa.model import fused_heads, fused_mlp
from bytejepa.model.precision import on_device
from bytejepa.training import muon, trainer


@contextlib.contextmanager
def rounded_as_on_a_gpu() -> Iterator[None]:
    """Let models that are trained within it compute as they do on a GPU, as far as rounding to bfloat16 goes."""

    def in_bfloat16(model: trainer.ByteLM, device: torch.device) -> trainer.ByteLM:
        model = on_device(model, device)
        model.compute_dtype = torch.bfloat16
        return model

    def orthogonalize(matrices: Tensor, iteration: tuple[muon.Coefficients, ...]) -> Tensor:
        x = matrices.bfloat16()
        x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True) + 1e-7).bfloat16()
        tall = x.size(-2) > x.size(-1)
        for coefficients in iteration:
            x = muon._without_copies(x, x.mT @ x if tall else x @ x.mT, tall, *coefficients)
        return x

    with (
        mock.patch.object(trainer, "on_device", in_bfloat16),
        mock.patch.object(muon, "orthogonalize", orthogonalize),
        mock.patch.dict(fused_mlp.possible, {"cpu": True}),
        mock.patch.object(fused_heads, "is_half_on_gpu", lambda x: x.dtype == torch.bfloat16),
    ):
        yield


def last_loss_nats(seed: int, steps: int) -> float:
    """Return the mean of the last five losses that the agreement's model logs on a CPU."""
    unseeded = gpu_training.preset

    def seeded(name: str) -> RunConfig:
        return replace(unseeded(name), training={"seed": seed})

    with mock.patch.object(gpu_training, "preset", seeded):
        found = gpu_training.check_agreement(steps, ("cpu",))["cpu"]
    assert isinstance(found, dict)
    return statistics.mean(found["last_losses_nats"])


def summary(differences: list[float]) -> dict[str, object]:
    """Return mean, standard deviation and the 95 % prediction interval of one more of the relative `differences`."""
    mean, deviation, n = statistics.mean(differences), statistics.stdev(differences), len(differences)
    reach = float(stats.t.ppf(0.975, n - 1)) * deviation * (1 + 1 / n) ** 0.5
    return {"mean": mean, "standard_deviation": deviation, "one_more_run": [mean - reach, mean + reach]}


def main() -> None:
    """Train each seed both ways, and write what came of it after every one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, *range(1, 12)])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    runs: list[dict[str, float]] = []
    for seed in track(options.seeds, description="seeds"):
        exact = last_loss_nats(seed, options.steps)
        with rounded_as_on_a_gpu():
            rounded = last_loss_nats(seed, options.steps)
        runs.append({"seed": seed, "float32_nats": exact, "rounded_nats": rounded, "difference": rounded / exact - 1})
        found = {"torch": torch.__version__, "steps": options.steps, "runs": runs}
        if len(runs) > 1:
            found |= summary([run["difference"] for run in runs])
        options.out.write_text(json.dumps(found, indent=1))
    print(options.out.read_text())


if __name__ == "__main__":
    main()
