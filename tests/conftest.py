"""One thread, runtime shape checks, and what most tests begin from: shards, a short run, its artifact, the command line.

Nothing of bytejepa is imported at the top: the jaxtyping hook has to be in place first. Compiled and GPU tests run in a
pytest call of their own (`pytest -m compiled`), without the hook, because torch.compile cannot trace through its checks.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
import pytest
import torch

import runtime_checks

if TYPE_CHECKING:
    from bytejepa.config import RunConfig
    from bytejepa.submission.folder import SubmissionResult

torch.set_num_threads(1)
hypothesis.settings.register_profile("unit", max_examples=30, deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("unit")

MINIMAL = (
    "tiny",
    "--model.num-layers=2", "--model.model-dim=32", "--model.num-heads=2", "--model.num-kv-heads=1",
    "--model.rotary-dims=8", "--model.xsa-last-layers=1", "--model.bigram-rows=64", "--model.bigram-dim=8",
    "--jepa.latent-dim=16", "--jepa.hidden-dim=16", "--jepa.sigreg-directions=8",
    "--data.sequence-bytes=64", "--data.batch-bytes=256", "--data.sequence-growth=None", "--schedule.steps=6",
    "--schedule.max-wallclock-s=None", "--training.warmup-steps=0",
    "--training.validate-every-steps=3", "--training.validation-bytes=1500", "--training.log-every-steps=1",
    "--evaluation.window-bytes=64", "--evaluation.stride-bytes=16", "--artifact.calibration-bytes=512",
)  # fmt: skip
"""The words after `bytejepa train` that make a run of a second: the preset and overrides of `minimal_config`."""


def minimal_with(*settings: str) -> tuple[str, ...]:
    """Return the words of MINIMAL and `settings` (`--name=value`), of several with the same name the last."""
    return tuple({word.partition("=")[0]: word for word in (*MINIMAL, *settings)}.values())


TENSOR_WINGS = ("model", "scoring", "interop", "inference", "benchmark", "training.gradient_step", "data.loader")
"""Where tensors pass through public signatures; what has no shapes to check is not slowed down."""


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.getoption("markexpr", default="")
    for left_out in ("not compiled", "not gpu"):
        chosen = chosen.replace(left_out, "")
    if "compiled" in chosen or "gpu" in chosen:
        return
    import jaxtyping

    jaxtyping.install_import_hook([f"bytejepa.{wing}" for wing in TENSOR_WINGS], "runtime_checks.check")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole programs come first: two workers that take file by file then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("integration")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def runtime_checks_begin() -> None:
    """The first calls of every test are checked."""
    runtime_checks.begin_test()


def make_minimal_config() -> "RunConfig":
    from bytejepa.config import replace
    from bytejepa.presets import tiny

    return replace(
        tiny(),
        model={
            "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rotary_dims": 8, "xsa_last_layers": 1,
            "bigram_rows": 64, "bigram_dim": 8,
        },
        jepa={"latent_dim": 16, "hidden_dim": 16, "sigreg_directions": 8},
        data={"sequence_bytes": 64, "batch_bytes": 256, "sequence_growth": None},
        schedule={"steps": 6, "max_wallclock_s": None},
        training={"warmup_steps": 0, "validate_every_steps": 3, "validation_bytes": 1500, "log_every_steps": 1},
        evaluation={"window_bytes": 64, "stride_bytes": 16},
        artifact={"calibration_bytes": 512},
    )  # fmt: skip


@pytest.fixture(scope="session")
def minimal_config() -> "RunConfig":
    """`tiny` made so small that a run of it takes a second."""
    return make_minimal_config()


@pytest.fixture(scope="session")
def embedded_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded corpus as shards; read-only, copy it before changing it."""
    from bytejepa.data.corpus import write_embedded_shards

    folder = tmp_path_factory.mktemp("embedded") / "shards"
    write_embedded_shards(folder)
    return folder


@pytest.fixture(scope="session")
def minimal_run(tmp_path_factory: pytest.TempPathFactory, embedded_shards: Path, minimal_config: "RunConfig") -> Path:
    """A finished run of `minimal_config` on the embedded corpus; read-only."""
    from bytejepa.training.runs import train

    run = tmp_path_factory.mktemp("minimal") / "run"
    train(minimal_config, embedded_shards, run)
    return run


@pytest.fixture(scope="session")
def minimal_artifact(tmp_path_factory: pytest.TempPathFactory, minimal_run: Path) -> Path:
    """The artifact of `minimal_run`; read-only."""
    from bytejepa.artifact.export import export

    path = tmp_path_factory.mktemp("artifact") / "model.bjm"
    export(minimal_run, path, score=False)
    return path


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of a few kilobytes; read-only."""
    from submission.seeds_of_one_run import write_tiny_shards

    return write_tiny_shards(tmp_path_factory.mktemp("tiny") / "shards")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A small folder of bare shards, without a manifest, to be spoiled."""
    import numpy as np

    from bytejepa.data.shards import shard_name, write_shard
    from bytejepa.data.vocabulary import BOS, ids_from_bytes

    folder = tmp_path / "shards"
    folder.mkdir()
    text = b"The state of the Union is strong. " * 40
    for split in ("train", "val"):
        write_shard(folder / shard_name(split, 0), np.r_[np.uint16(BOS), ids_from_bytes(text)])
    return folder


@pytest.fixture(scope="session")
def seed_runs(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> list[Path]:
    """Finished runs of three seeds; read-only."""
    from submission.seeds_of_one_run import finished_run

    place = tmp_path_factory.mktemp("seeds")
    return [finished_run(place / f"seed{seed}", tiny_shards, seed) for seed in (2025, 42, 7)]


@pytest.fixture(scope="session", params=["readable", "packed"])
def submission(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, seed_runs: list[Path]
) -> "SubmissionResult":
    """A submission of `seed_runs` in both forms; read-only."""
    from bytejepa.submission.folder import Author, make_submission

    out = tmp_path_factory.mktemp("submission") / request.param
    author = Author(author="A. Name", github_id="aname", name="Small bytes", blurb="Tiny.")
    return make_submission(seed_runs, out, author, packed=request.param == "packed")


@pytest.fixture
def many_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model's codes are packed in as many lanes as a large one's: numpy takes a round of them at a time."""
    monkeypatch.setattr("bytejepa.artifact.rans.CODES_PER_LANE", 2048)


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `bytejepa ARGUMENTS...` in this process."""
    from bytejepa.cli import main

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def process() -> Callable[..., Outcome]:
    """Runs `python -m bytejepa ARGUMENTS...` as a process of its own."""

    def run(*arguments: object, **settings: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "bytejepa", *map(str, arguments)],
            capture_output=True, text=True, errors="replace", check=False, timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **settings},
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def refuses(command: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs a command that must fail with `code`: nothing on stdout, one line on stderr, which is returned."""

    def run(code: int, *arguments: object) -> str:
        outcome = command(*arguments)
        assert outcome.code == code, outcome
        assert outcome.out == ""
        assert outcome.err.count("\n") == 1, outcome.err
        assert outcome.err.startswith("bytejepa"), outcome.err
        assert "Traceback" not in outcome.err
        return outcome.err

    return run
