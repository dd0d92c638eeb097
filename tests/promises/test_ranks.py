"""Promise: the number of ranks changes nothing but rounding."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest

from bytejepa.training import checkpoint
from bytejepa.training.runlog import RunFolder
from conftest import minimal_with
from forked import TORCHRUN, run_on_ranks, started

pytestmark = pytest.mark.integration
SETTINGS = minimal_with(
    "--schedule.steps=20", "--data.batch-bytes=512", "--jepa.sigreg-group-sequences=2", "--data.order=shuffled",
    "--training.validate-every-steps=None", "--optimizer.muon-beta2=0.9", "--optimizer.muon-cautious-weight-decay",
)  # fmt: skip


def losses(run: Path) -> list[float]:
    return [line["train_loss_nats"] for line in RunFolder(run).read_metrics() if "train_loss_nats" in line]


def latent_losses(run: Path) -> list[float]:
    return [line["jepa_sigreg"] for line in RunFolder(run).read_metrics() if "jepa_sigreg" in line]


def train_on(ranks: int, data: Path, run: Path, *more: str) -> dict[str, float]:
    words = [*minimal_with(*SETTINGS, *more), "--data", str(data), "--out", str(run), "--json"]
    done = run_on_ranks(ranks, "train", *words)
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


def test_the_last_loss_is_of_all_ranks_though_its_step_is_not_logged(one_rank, embedded_shards, tmp_path) -> None:
    result = train_on(2, embedded_shards, tmp_path / "run", "--training.log-every-steps=7")
    assert len(losses(tmp_path / "run")) == 3
    assert result["train_bpb"] == pytest.approx(losses(one_rank)[-1] / math.log(2), abs=2e-4)


def test_a_run_of_two_ranks_goes_on_with_one(one_rank, embedded_shards, tmp_path) -> None:
    run = tmp_path / "run"
    train_on(2, embedded_shards, run, "--training.checkpoint-every-s=0", "--training.keep-checkpoints=100")
    folder = RunFolder(run)
    for path in folder.checkpoints_path.glob("step_*"):
        if int(path.stem.removeprefix("step_")) > 10:
            path.unlink()
    done = run_on_ranks(1, "train", "--resume", str(run), "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(run) == pytest.approx(losses(one_rank), abs=1e-4)


def test_beginning_with_a_model_two_ranks_do_as_one(one_rank, embedded_shards, tmp_path) -> None:
    words = ["train", str(one_rank), "--data", str(embedded_shards), "--schedule.steps=6", "--json", "--out"]
    for ranks in (1, 2):
        done = run_on_ranks(ranks, *words, str(tmp_path / str(ranks)))
        assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), abs=1e-4)
    assert losses(tmp_path / "1")[0] < losses(one_rank)[0] - 0.5


def test_ranks_that_do_not_divide_the_batch_are_refused_with_all_numbers(embedded_shards, tmp_path) -> None:
    done = run_on_ranks(3, "train", *SETTINGS, "--data", str(embedded_shards), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "3 ranks do not divide the 8 sequences of a step" in done.stderr


def test_sigterm_to_torchrun_leaves_a_whole_checkpoint(embedded_shards, tmp_path) -> None:
    run = tmp_path / "run"
    words = ["--standalone", "--nproc_per_node=2", "-m", "bytejepa", "train"]
    words += minimal_with(*SETTINGS, "--schedule.steps=2000", "--training.checkpoint-every-s=None")
    words += ["--data", str(embedded_shards), "--out", str(run)]
    with started(words, program=TORCHRUN) as going:
        deadline = time.monotonic() + 120
        while len(losses(run)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert going.process.pid is not None
        os.kill(going.process.pid, signal.SIGTERM)
        done = going.ended(60)
    assert done.returncode != 0
    said = done.stderr
    assert said.count("checkpoint written") == 1
    (stopped_at,) = checkpoint.steps_on_disk(RunFolder(run).checkpoints_path)
    assert 3 <= stopped_at < 2000
    assert checkpoint.read(RunFolder(run).checkpoints_path, stopped_at).position.step == stopped_at


def test_scoring_and_export_on_two_ranks_are_those_of_one(one_rank, embedded_shards, tmp_path) -> None:
    words = ["--data", str(embedded_shards), "--json"]
    scored, exported = [], []
    for ranks in (1, 2):
        done = run_on_ranks(ranks, "eval", str(one_rank), *words, "--max-bytes=900", "--device=cpu")
        assert done.returncode == 0, done.stderr[-2000:]
        scored.append(json.loads(done.stdout)["scores"])
        model = str(tmp_path / f"{ranks}.bjm")
        done = run_on_ranks(ranks, "export", str(one_rank), "-o", model, *words, "--score-bytes=900")
        assert done.returncode == 0, done.stderr[-2000:]
        exported.append(json.loads(done.stdout))
    for way in ("non-overlapping", "sliding"):
        assert scored[0][way]["num_targets"] == scored[1][way]["num_targets"] == 899
        assert scored[0][way]["bpb"] == pytest.approx(scored[1][way]["bpb"], abs=1e-6)
    assert exported[0]["sha256"] == exported[1]["sha256"]
    assert exported[0]["bpb"] == pytest.approx(exported[1]["bpb"], abs=1e-6)
