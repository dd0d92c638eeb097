"""The generated script: it stands alone, repeats the package's run, and counts its own bytes."""

import ast
import base64
import dataclasses
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import forked
from bytejepa import load, presets
from bytejepa.config import replace
from bytejepa.data.shards import write_shard
from bytejepa.errors import ConfigError
from bytejepa.review.log_parser import parse_log
from bytejepa.submission.bundle import bundle
from bytejepa.submission.folder import Author, make_submission
from bytejepa.submission.program import main, run
from bytejepa.submission.script import PERMITTED, packed_script, readable_script
from submission.seeds_of_one_run import finished_run, seed_config

MISSING = (
    "bytejepa", "jaxtyping", "safetensors", "cattrs", "tyro", "rich", "filelock", "psutil", "scipy", "matplotlib", "jinja2", "brotli",
)  # fmt: skip
"""What a machine of the challenge does not have."""
ALONE = f"""
import runpy, sys

class OnlyWhatIsPermitted:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING}:
            raise ImportError(name + " is not there")

for name in [name for name in sys.modules if name.partition(".")[0] in {MISSING}]:
    del sys.modules[name]
sys.meta_path.insert(0, OnlyWhatIsPermitted())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs the script that is its first argument where nothing but torch, numpy and zstandard can be imported."""


AUTHOR = Author(author="A. Name", github_id="aname", name="Small bytes", blurb="Tiny.")
LIMIT_BYTES = 128_000
"""Of the packed script and the small model's weights."""


def fork(script: Path, place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script alone in `place`, in a process forked from one that has imported torch."""
    return forked.run([str(script)], place=place, program=ALONE, **variables)


def start(script: Path, place: Path, *launcher: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script alone in `place`, in a process that begins with nothing."""
    alone = place / "alone.py"
    alone.write_text(ALONE)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    words = [sys.executable, *launcher, str(alone), str(script)]
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=240)


def logged(done: subprocess.CompletedProcess[str]):
    assert done.returncode == 0, done.stderr[-3000:]
    return parse_log(done.stdout, "train.log")


def bpb_of(log, label: str) -> float:
    return next(score.bpb for score in log.scores if label in score.label)


@pytest.mark.integration
@pytest.mark.parametrize("submission", ["readable"], indirect=True)
def test_alone_it_repeats_the_run_and_its_score(submission, tiny_shards, tmp_path) -> None:
    script = submission.path / "train_gpt.py"
    log = logged(start(script, tmp_path, DATA_PATH=str(tiny_shards), RUN_ID="again"))
    first = submission.seeds[0]
    assert log.seed == first.seed == 2025
    assert bpb_of(log, "sliding_window") == pytest.approx(first.sliding.bpb, abs=1e-6)
    assert bpb_of(log, "roundtrip") == pytest.approx(first.roundtrip.bpb, abs=1e-6)
    assert bpb_of(log, "pre_quant") == pytest.approx(first.average.bpb, abs=1e-6)
    assert log.code_bytes == script.stat().st_size == submission.code_bytes
    assert log.model_bytes == first.weights_bytes == (tmp_path / "final_model.bjm").stat().st_size
    assert log.total_bytes == log.code_bytes + log.model_bytes
    assert log.steps == log.planned_steps == 6
    assert log.counts == {"bytes": first.sliding.num_bytes, "documents": 2}
    assert parse_log((tmp_path / "logs" / "again.txt").read_text(), "again.txt").scores == log.scores


@pytest.mark.integration
def test_it_fills_its_budget_as_the_package_does(tiny_shards, tmp_path) -> None:
    artifact = dataclasses.asdict(presets.compact(seed_config(7)).artifact)
    artifact |= {"small_tensor_elements": 512, "calibration_bytes": 512, "fit": True, "limit_bytes": LIMIT_BYTES}
    artifact["codecs"] = ("rans", "zstd")
    smaller = {"num_layers": 1, "bigram_rows": 32}
    run = finished_run(tmp_path / "run", tiny_shards, 7, artifact=artifact, model=smaller)
    made = make_submission([run], tmp_path / "folder", AUTHOR, packed=True)
    log = logged(fork(made.path / "train_gpt.py", tmp_path, DATA_PATH=str(tiny_shards)))
    assert log.model_bytes == made.seeds[0].weights_bytes
    assert log.total_bytes == log.code_bytes + log.model_bytes <= LIMIT_BYTES
    assert log.total_bytes > LIMIT_BYTES - 1000  # so few codes are packed in steps of some hundred bytes
    assert bpb_of(log, "sliding_window") == pytest.approx(made.seeds[0].sliding.bpb, abs=1e-6)


def test_the_parameters_that_its_log_counts_are_those_of_the_artifact(
    tiny_shards, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    config = seed_config(7, model={"multi_token_heads": 2}, schedule={"steps": 1})
    run(config, Path(__file__), {"DATA_PATH": str(tiny_shards)})
    packed = load(tmp_path / "final_model.bjm")
    counted = parse_log(capsys.readouterr().out, "train.log").parameters
    assert counted == sum(parameter.numel() for parameter in packed.parameters())


@pytest.mark.integration
@pytest.mark.parametrize("submission", ["packed"], indirect=True)
def test_two_ranks_under_torchrun_score_the_same(submission, tiny_shards, tmp_path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = start(submission.path / "train_gpt.py", tmp_path, *launcher, DATA_PATH=str(tiny_shards))
    log = logged(done)
    assert bpb_of(log, "sliding_window") == pytest.approx(submission.seeds[0].sliding.bpb, abs=1e-4)
    assert done.stdout.count("final_int6_sliding_window_exact") == 1, "rank 0 alone writes"
    assert log.counts["bytes"] == submission.seeds[0].sliding.num_bytes
    assert log.code_bytes == (submission.path / "train_gpt.py").stat().st_size == submission.code_bytes


@pytest.mark.integration
@pytest.mark.parametrize("submission", ["readable"], indirect=True)
def test_environment_variables_change_the_run(submission, tiny_shards, tmp_path) -> None:
    variables = {"ITERATIONS": "2", "NUM_LAYERS": "1", "SEED": "5", "WARMDOWN_ITERS": "3", "TRAIN_LOG_EVERY": "1"}
    done = fork(submission.path / "train_gpt.py", tmp_path, DATA_PATH=str(tiny_shards), **variables)
    log, log_text = logged(done), done.stdout
    assert (log.steps, log.planned_steps, log.seed, log.settings["num_layers"]) == (2, 2, 5, 1)
    assert log.parameters is not None
    assert log.parameters < submission.seeds[0].num_parameters
    assert "note: WARMDOWN_ITERS has no effect" in log_text


def test_what_goes_wrong_is_one_line_and_an_exit_code(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_PATH", "nowhere")
    assert main(seed_config(1), Path(__file__)) == 3
    assert re.fullmatch(r"test_script\.py: the data folder nowhere does not exist[^\n]*\n", capsys.readouterr().err)


def test_a_batch_that_cannot_be_read_ends_the_run(tmp_path, monkeypatch, capsys) -> None:
    ids = np.random.default_rng(0).integers(4, 260, 9000, dtype=np.uint16)
    write_shard(tmp_path / "fineweb_val_000000.bin", ids)
    ids[1500] = 7000  # in a later batch than the first
    write_shard(tmp_path / "fineweb_train_000000.bin", ids)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    config = replace(seed_config(1), data={"order": "sequential", "num_streams": 1})
    assert main(config, Path(__file__)) == 3
    assert "the training split holds id 7000 at position 1500" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.bjm"))


def test_every_name_is_defined_once(tmp_path) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text(readable_script(presets.pr832()))
    words = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select=F821,F811,E9,F823",
        "--ignore=F722",
        str(path),
    ]
    checked = subprocess.run(words, capture_output=True, text=True, check=False)
    # axes in annotations (`Float[Tensor, "B T"]`) are names to ruff and nothing to Python
    axes = r"F821 Undefined name `([A-Z]|heads|half)`"
    problems = [line for line in checked.stdout.splitlines() if re.match(r"(F8\d\d|E9)", line)]
    assert not [line for line in problems if not re.match(axes, line)], checked.stdout


def test_the_configuration_is_the_scripts_default() -> None:
    config = seed_config(3)
    tree = ast.parse(readable_script(config))
    source = next(
        ast.unparse(s.value) for s in tree.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "CONFIG"
    )
    names = {kind.__name__: kind for kind in (type(config), *(type(getattr(config, n)) for n in config.__slots__))}
    assert eval(source, names) == config  # our own text


def test_packing_hides_nothing() -> None:
    source = readable_script(seed_config(3))
    packed = packed_script(source)
    assert lzma.decompress(base64.b85decode(re.search(r'b85decode\("([^"]+)"\)', packed)[1])).decode() == source
    assert len(packed) < 0.4 * len(source)


def test_only_what_is_needed_is_taken_over() -> None:
    source = readable_script(seed_config(3))
    assert "class ByteLM(nn.Module)" in source
    assert "class ShardWriter" not in source
    assert "import safetensors" not in source
    assert "bytejepa.review" not in source


def test_a_name_that_a_local_variable_hides_is_qualified() -> None:
    made = bundle(("bytejepa.submission.program", "main"), permitted=PERMITTED)
    assert made.names["bytejepa.training.schedule", "progress"] == "progress_of_schedule"
    assert len(set(made.names.values())) == len(made.names)


def test_a_package_that_is_not_permitted_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bytejepa\.training\.checkpoint needs the package safetensors"):
        bundle(("bytejepa.training.checkpoint", "CheckpointWriter"), permitted=PERMITTED)
