"""Promise: the number of ranks changes nothing but rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bytejepa.training.runlog import RunFolder
from conftest import MINIMAL

SETTINGS = [
    *MINIMAL, "--schedule.steps=20", "--data.batch-bytes=512", "--jepa.sigreg-group-sequences=2", "--data.order=shuffled",
    "--training.validate-every-steps=None",
]  # fmt: skip


def torchrun(ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "-m",
        "bytejepa",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *words], capture_output=True, text=True, check=False, env=environment, timeout=240)


def losses(run: Path) -> list[float]:
    return [line["train_loss_nats"] for line in RunFolder(run).read_metrics() if "train_loss_nats" in line]


def latent_losses(run: Path) -> list[float]:
    return [line["jepa_sigreg"] for line in RunFolder(run).read_metrics() if "jepa_sigreg" in line]


def train_on(ranks: int, data: Path, run: Path, *more: str) -> dict[str, float]:
    done = torchrun(ranks, "train", *SETTINGS, *more, "--data", str(data), "--out", str(run), "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def one_rank(embedded_shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("ranks") / "one"
    train_on(1, embedded_shards, run)
    return run


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_over_20_steps_agree(ranks, one_rank, embedded_shards, tmp_path) -> None:
    result = train_on(ranks, embedded_shards, tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(one_rank), abs=1e-4)
    assert latent_losses(tmp_path / "run") == pytest.approx(latent_losses(one_rank), abs=1e-4)
    assert len(losses(one_rank)) == 20
    alone = RunFolder(one_rank).read_metrics()[-1]
    assert result["val_bpb_average"] == pytest.approx(alone["val_bpb_average"], abs=1e-4)


def test_a_run_of_two_ranks_goes_on_with_one(one_rank, embedded_shards, tmp_path) -> None:
    run = tmp_path / "run"
    train_on(2, embedded_shards, run, "--training.checkpoint-every-s=0", "--training.keep-checkpoints=100")
    folder = RunFolder(run)
    for path in folder.checkpoints_path.glob("step_*"):
        if int(path.stem.removeprefix("step_")) > 10:
            path.unlink()
    done = torchrun(1, "train", "--resume", str(run), "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(run) == pytest.approx(losses(one_rank), abs=1e-4)


def test_ranks_that_do_not_divide_the_batch_are_refused_with_all_numbers(embedded_shards, tmp_path) -> None:
    done = torchrun(3, "train", *SETTINGS, "--data", str(embedded_shards), "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "3 ranks do not divide the 8 sequences of a step" in done.stderr
