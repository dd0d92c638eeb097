"""Promise: what fails on one rank is said once, with the rank named, and every rank leaves with the same exit code."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import forked
from bytejepa.data.shards import write_shard
from bytejepa.training import checkpoint
from bytejepa.training.runlog import RunFolder
from conftest import minimal_with

pytestmark = pytest.mark.integration
COMMANDS = """
import contextlib, io, json, os, sys
from bytejepa.cli import main
from bytejepa.errors import CheckpointError
from bytejepa.training.runlog import RunFolder
append, outcomes = RunFolder.append_metrics, []
def fail(run, metrics):
    if metrics["step"] == 2:
        raise CheckpointError("disk full")
    append(run, metrics)
for words, port, disk_is_full in json.load(sys.stdin):
    os.environ["MASTER_PORT"] = port
    RunFolder.append_metrics = fail if disk_is_full else append
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        outcomes.append([main(words)])
    outcomes[-1].append(said.getvalue())
print(json.dumps(outcomes))
"""
"""Runs one command after the other, in the same two processes."""

PATIENT = """
import datetime, json, sys, time, weakref
import torch.distributed as dist
from bytejepa.training.distributed import join, leave
opened, open_one = [], dist.new_group
def remembered(**options):
    group = open_one(**options)
    opened.append(weakref.ref(group))
    return group
dist.new_group = remembered
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=1))
ranks = join("cpu")
with ranks.agree():
    time.sleep(2 if ranks.is_main else 0)
summed = ranks.sum_on_hosts([1.0])
leave()
print(json.dumps([summed, len(opened), sum(group() is not None for group in opened)]))
"""
"""Here `ranks` lives to the end, as in a program that goes on; a group that did, too, might abort the process (`leave`)."""


@contextlib.contextmanager
def two_ranks(
    words: list[str], program: str = forked.BYTEJEPA, inputs: tuple[object, object] = (None, None)
) -> Iterator[list[forked.Command]]:
    """Start `program` with `words` as two ranks, as if each were alone on its node, each with its input as JSON."""
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": forked.free_port()}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                forked.started(words, program=program, given=json.dumps(inputs[rank]), RANK=str(rank), **shared)
            )
            for rank in (0, 1)
        ]


def on_two_ranks(program: str, inputs: tuple[object, object] = (None, None)) -> list:
    """Run `program` as two ranks, each with its input as JSON, and return what they printed."""
    with two_ranks([], program, inputs) as ranks:
        ended = [rank.ended(120) for rank in ranks]
    assert [done.returncode for done in ended] == [0, 0], ended
    return [json.loads(done.stdout) for done in ended]


class Case:
    """A command on two ranks, and how it has to fail: `code`, and a line of rank 0 with `words`."""

    def __init__(
        self, first: list[object], second: list[object], code: int, words: str, *, disk_is_full: bool = False
    ) -> None:
        self.commands = [[str(word) for word in command] for command in (first, second)]
        self.code, self.words, self.disk_is_full = code, words, disk_is_full


@pytest.fixture(scope="module")
def cases(embedded_shards, minimal_run, minimal_artifact, seed_runs, tmp_path_factory) -> dict[str, Case]:
    place: Path = tmp_path_factory.mktemp("failing")
    missing, spoiled = place / "missing", place / "spoiled"
    spoiled.mkdir()
    ids = np.random.default_rng(0).integers(4, 260, 9000, dtype=np.uint16)
    write_shard(spoiled / "fineweb_val_000000.bin", ids)
    ids[1850] = 7000  # in the second half of the fourth batch
    write_shard(spoiled / "fineweb_train_000000.bin", ids)
    train = ["train", *minimal_with("--data.batch-bytes=512"), "--jepa.sigreg-group-sequences=2", "--data"]
    begin = [*train, embedded_shards, "--out", place / "run"]
    again = [*train, embedded_shards, "--out", minimal_run]
    export = ["export", minimal_run, "-o", minimal_artifact]
    score = ["--data", embedded_shards, "--device=cpu", "--max-bytes=200"]
    author = ["--author=A", "--github-id=a", "--score-bytes=200"]
    submission = ["submission", *seed_runs, "-o", place / "folder", *author]
    return {
        "shards that the second node lacks": Case(begin, [*train, missing, "--out", place / "run"], 3, "rank 1: "),
        "an id that is none": Case(
            *([*train, spoiled, "--out", place / "unread", "--data.order=sequential"],) * 2,
            3,
            "rank 1: the training split holds id 7000",
        ),
        "a run that exists": Case(again, again, 4, f"{minimal_run} holds a run already"),
        "a run that the second node lacks": Case(
            ["train", "--resume", minimal_run], ["train", "--resume", missing], 4, f"rank 1: {missing}"
        ),
        "an artifact that exists": Case(export, export, 2, f"{minimal_artifact} exists already"),
        "an artifact that the second node lacks": Case(
            ["eval", minimal_artifact, *score], ["eval", missing, *score], 5, "rank 1: "
        ),
        "a folder that cannot be made": Case(
            ["submission", *seed_runs, "-o", minimal_artifact / "folder", *author], submission, 3, "cannot write"
        ),
        "a full disk": Case(begin, begin, 4, "disk full", disk_is_full=True),
        "nothing: a submission": Case(submission, submission, 0, ""),
    }


@pytest.fixture(scope="module")
def outcomes(cases) -> dict[str, list[tuple[int, str]]]:
    """For every case, exit code and stderr of both ranks."""
    ports = [forked.free_port() for _ in cases]
    inputs = [
        [[case.commands[rank], port, case.disk_is_full] for case, port in zip(cases.values(), ports, strict=True)]
        for rank in (0, 1)
    ]
    first, second = on_two_ranks(COMMANDS, (inputs[0], inputs[1]))
    return {name: [tuple(a), tuple(b)] for name, a, b in zip(cases, first, second, strict=True)}


@pytest.mark.parametrize(
    "name",
    [
        "shards that the second node lacks",
        "an id that is none",
        "a run that exists",
        "a run that the second node lacks",
        "an artifact that exists",
        "an artifact that the second node lacks",
        "a folder that cannot be made",
        "a full disk",
    ],
)
def test_every_rank_leaves_alike_and_the_first_says_why(name, cases, outcomes) -> None:
    case, ((code, said), (other_code, other_said)) = cases[name], outcomes[name]
    assert code == other_code == case.code, said
    assert other_said == ""
    assert said.startswith(f"bytejepa {case.commands[0][0]}: {case.words}")
    assert said.count("\n") == 1


def test_a_signal_to_the_second_rank_alone_stops_both_with_a_checkpoint(embedded_shards, tmp_path) -> None:
    run = RunFolder(tmp_path / "run")
    words = minimal_with(
        "--data.batch-bytes=512",
        "--jepa.sigreg-group-sequences=2",
        "--schedule.steps=5000",
        "--training.validate-every-steps=None",
    )
    more = ["--data", str(embedded_shards), "--out", str(run.path)]
    with two_ranks(["train", *words, *more]) as (first, second):
        deadline = time.monotonic() + 120
        while not run.read_metrics() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert second.process.pid is not None
        os.kill(second.process.pid, signal.SIGTERM)
        ended = [rank.ended(60) for rank in (first, second)]
    assert [done.returncode for done in ended] == [7, 7]
    assert ended[0].stderr.count("checkpoint written") == ended[0].stderr.count("\n") == 1
    assert ended[1].stderr == ""
    assert 0 < checkpoint.steps_on_disk(run.checkpoints_path)[0] < 5000


def test_two_ranks_make_a_submission(cases, outcomes) -> None:
    """Its temporary folder has one name on both."""
    assert outcomes["nothing: a submission"] == [(0, ""), (0, "")]
    assert (Path(cases["nothing: a submission"].commands[0][5]) / "submission.json").is_file()


def test_ranks_wait_longer_for_one_that_packs_and_leave_no_group_behind() -> None:
    opened, left = 1, 0
    assert on_two_ranks(PATIENT) == [[[2.0], opened, left]] * 2
