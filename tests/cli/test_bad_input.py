"""Bad input: exactly one line on stderr, the documented exit code, no traceback, nothing lost."""

import json
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forked
from bytejepa.training import checkpoint
from conftest import MINIMAL, minimal_with

Refuses = Callable[..., str]
CONFIG, DATA, RUN, ARTIFACT, REVIEW = 2, 3, 4, 5, 10
AUTHOR = ("--author", "A", "--github-id", "a")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("size", ["-5", "0"])
def test_sizes_out_of_range_are_refused(refuses: Refuses, tmp_path: Path, minimal_run: Path, size: str) -> None:
    wrong, option = f"--score-bytes: expected 2 or more, got {size}", f"--score-bytes={size}"
    assert wrong in refuses(CONFIG, "submission", minimal_run, "-o", tmp_path / "folder", *AUTHOR, option)
    assert wrong in refuses(CONFIG, "report", minimal_run, "-o", tmp_path / "page.html", option)
    assert wrong in refuses(CONFIG, "export", minimal_run, "-o", tmp_path / "m.bjm", option)


def test_the_length_of_the_demos_sample_is_checked_before_it_trains(refuses: Refuses, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert "--sample-bytes: expected 0 or more, got -1" in refuses(CONFIG, "demo", "-o", folder, "--sample-bytes=-1")
    assert not folder.exists()


@pytest.mark.parametrize("verb", ["report", "eval"])
def test_devices_that_are_not_there_are_refused(
    refuses: Refuses, tmp_path: Path, minimal_run: Path, shards: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = {"report": ("-o", tmp_path / "page.html"), "eval": ("--data", shards)}[verb]
    assert "no CUDA device here" in refuses(CONFIG, verb, minimal_run, *words, "--device", "cuda")
    assert "invalid choice 'foo'" in refuses(CONFIG, verb, minimal_run, *words, "--device", "foo")


@pytest.mark.parametrize("verb", ["train", "eval", "prepare"])
def test_a_data_folder_that_is_not_there(refuses: Refuses, tmp_path: Path, minimal_artifact: Path, verb: str) -> None:
    nowhere = tmp_path / "nowhere"
    words = {
        "train": (*MINIMAL, "--data", nowhere, "--out", tmp_path / "run"),
        "eval": (minimal_artifact, "--data", nowhere),
        "prepare": (nowhere, "--out", tmp_path / "out"),
    }[verb]
    assert str(nowhere) in refuses(DATA, verb, *words)
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_not_utf8_is_kept_as_it_is(command: Callable[..., Any], tmp_path: Path) -> None:
    data = bytes(range(256)) * 20
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_bytes(data[::-1])
    words = (tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "s", "--val-documents", 1, "--workers", 1)
    assert command("prepare", *words).code == 0
    shard = (tmp_path / "s" / "fineweb_train_000000.bin").read_bytes()
    ids = np.frombuffer(shard[1024:], dtype="<u2")
    assert (ids[1:] - 4).astype(np.uint8).tobytes() == data[::-1]


def test_too_little_text_for_a_sequence(refuses: Refuses, shards: Path, tmp_path: Path) -> None:
    words = minimal_with("--data.sequence-bytes=65536", "--data.batch-bytes=131072")
    line = refuses(DATA, "train", *words, "--data", shards, "--out", tmp_path / "run")
    assert "a sequence needs 65537" in line


def test_an_empty_file_has_no_score(refuses: Refuses, tmp_path: Path, minimal_artifact: Path) -> None:
    path = tmp_path / "empty.txt"
    path.touch()
    assert "is empty: there is nothing to score" in refuses(DATA, "eval", minimal_artifact, "--data", path)


@pytest.mark.parametrize(
    "words", [("--stride", 0), ("--window", 0), ("--stride", 99, "--window", 64), ("--max-bytes", 0)]
)
def test_impossible_windows(refuses: Refuses, shards: Path, minimal_artifact: Path, words: tuple[object, ...]) -> None:
    refuses(CONFIG, "eval", minimal_artifact, "--data", shards, *words)


def test_an_impossible_stride_on_a_file_shorter_than_the_window(
    refuses: Refuses, tmp_path: Path, minimal_artifact: Path
) -> None:
    (tmp_path / "short.txt").write_bytes(b"hello")
    assert "stride must be" in refuses(CONFIG, "eval", minimal_artifact, "--data", tmp_path / "short.txt", "--stride=0")


def test_a_window_longer_than_the_data_scores_every_byte(
    command: Callable[..., Any], tmp_path: Path, minimal_artifact: Path
) -> None:
    (tmp_path / "short.txt").write_bytes(b"hello")
    words = ("--data", tmp_path / "short.txt", "--window", 4096, "--stride", 512, "--json")
    outcome = command("eval", minimal_artifact, *words)
    assert (outcome.code, outcome.err.count("\n")) == (0, 1)
    scores = json.loads(outcome.out)["scores"]
    assert {name: score["num_bytes"] for name, score in scores.items()} == {"non-overlapping": 5, "sliding": 5}


@pytest.mark.parametrize("place", [0, 9, 30, 200, -40, -1])
def test_any_flipped_byte_of_an_artifact_is_noticed(
    refuses: Refuses, tmp_path: Path, shards: Path, minimal_artifact: Path, place: int
) -> None:
    data = bytearray(minimal_artifact.read_bytes())
    data[place] ^= 4
    path = tmp_path / "model.bjm"
    path.write_bytes(data)
    assert str(path) in refuses(ARTIFACT, "eval", path, "--data", shards)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89BJM\r\n\x1a\n", b"PK\x03\x04" * 99, b"\x80\x02}q\x00."])
def test_a_foreign_artifact(refuses: Refuses, tmp_path: Path, shards: Path, content: bytes) -> None:
    path = tmp_path / "model.bjm"
    path.write_bytes(content)
    assert str(path) in refuses(ARTIFACT, "eval", path, "--data", shards)


def test_the_review_of_a_damaged_artifact_says_once_what_is_wrong(
    command: Callable[..., Any], tmp_path: Path, minimal_artifact: Path
) -> None:
    path = tmp_path / "model.bjm"
    path.write_bytes(minimal_artifact.read_bytes()[:3000])
    done = command("review", path)
    assert done.code == REVIEW
    why = f"{path} is cut short: expected {minimal_artifact.stat().st_size} bytes, got 3000 (copy it again)"
    assert done.err == f"bytejepa review: model.bjm: NEEDS AUTHOR ACTION: {why}\n"


def test_an_artifact_that_is_not_there(refuses: Refuses, tmp_path: Path, shards: Path) -> None:
    assert "No such file" in refuses(ARTIFACT, "eval", tmp_path / "model.bjm", "--data", shards)


def test_a_folder_that_is_no_run(refuses: Refuses, tmp_path: Path, shards: Path) -> None:
    for words in (("eval", shards, "--data", shards), ("export", shards, "-o", tmp_path / "m.bjm")):
        assert "is not a run folder" in refuses(RUN, *words)
    assert "is not a run folder" in refuses(RUN, "train", "--resume", tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "5", '{"model": 5}', '{"modle": {}}'])
def test_a_run_whose_configuration_is_damaged(
    refuses: Refuses, tmp_path: Path, minimal_run: Path, content: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(minimal_run, run)
    (run / "config.json").write_text(content)
    assert "config.json: damaged" in refuses(RUN, "export", run, "-o", tmp_path / "model.bjm")


@pytest.mark.parametrize(
    "words", [("--model.num-heads=5",), ("--evaluation.stride-bytes=20",), ("--jepa.lambda-max=inf",)]
)
def test_impossible_configurations(refuses: Refuses, shards: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    refuses(CONFIG, "train", *minimal_with(*words), "--data", shards, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_options_are_named(refuses: Refuses, shards: Path) -> None:
    assert "--data DIR and --out RUN" in refuses(CONFIG, "train", "tiny", "--data", shards)
    assert "SOURCE... and --out DIR" in refuses(CONFIG, "prepare")


def test_resume_takes_no_other_settings(refuses: Refuses, minimal_run: Path) -> None:
    for words in (
        ("tiny", "--schedule.steps=7"),
        ("--training.seed", "1337"),
        ("default",),
        ("--force",),
    ):  # defaults too
        assert "the run's own settings" in refuses(CONFIG, "train", *words, "--resume", minimal_run)


@pytest.mark.parametrize(
    "settings", [("--artifact.clip=sensitivity",), ("--artifact.clip=standard_deviations", "--artifact.fit")]
)
def test_training_on_rounded_weights_needs_steps_that_it_can_know(
    refuses: Refuses, shards: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    words = (*MINIMAL, "--training.qat-start=0.5", *settings, "--data", shards, "--out", tmp_path / "run")
    assert "use artifact.clip standard_deviations and artifact.fit false" in refuses(CONFIG, "train", *words)
    assert not (tmp_path / "run").exists()


def test_existing_outputs_are_refused_and_kept(
    refuses: Refuses, tmp_path: Path, shards: Path, minimal_run: Path, minimal_artifact: Path
) -> None:
    out, run = tmp_path / "model.bjm", tmp_path / "run"
    out.write_bytes(b"mine")
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert "exists already" in refuses(CONFIG, "export", minimal_run, "-o", out, "--no-score")
    assert "model.bjm exists" in refuses(CONFIG, "review", minimal_run, "-o", out)
    assert "model.bjm exists" in refuses(CONFIG, "generate", minimal_artifact, "-o", out)
    assert "model.bjm exists" in refuses(CONFIG, "surprise", minimal_artifact, out, "-o", out, "--format", "csv")
    assert "model.bjm exists" in refuses(CONFIG, "submission", minimal_run, "-o", out, *AUTHOR)
    assert "make its folder first" in refuses(DATA, "review", minimal_run, "-o", tmp_path / "missing" / "review.md")
    assert "is not empty" in refuses(RUN, "train", *MINIMAL, "--data", shards, "--out", run)
    assert "is not empty" in refuses(RUN, "demo", "--out", run)
    assert out.read_bytes() == b"mine"
    assert (run / "notes.txt").read_text() == "mine"


def test_a_run_is_not_overwritten(refuses: Refuses, tmp_path: Path, shards: Path, minimal_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(minimal_run, run)
    before = snapshot(run)
    refuses(RUN, "train", *MINIMAL, "--data", shards, "--out", run)
    assert {k: v for k, v in snapshot(run).items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}


def test_a_command_in_a_hint_is_one_that_a_shell_takes(
    refuses: Refuses, tmp_path: Path, shards: Path, minimal_run: Path
) -> None:
    run = tmp_path / "a run's folder"
    shutil.copytree(minimal_run, run)
    lines = [refuses(RUN, "train", *MINIMAL, "--data", shards, "--out", run)]
    shutil.rmtree(run / "checkpoints")
    lines += [
        refuses(RUN, "eval", run, "--data", shards),
        refuses(RUN, "submission", run, "-o", tmp_path / "submission", *AUTHOR),
    ]
    for line in lines:
        assert shlex.split(line.split("`")[1]) == ["bytejepa", "train", "--resume", str(run)]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_checkpoint(
    refuses: Refuses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: Path
) -> None:
    from bytejepa.model.transformer import ByteLM

    run = tmp_path / "run"
    original, calls = ByteLM.losses, []

    def losses(self: ByteLM, *arguments: Any, **options: Any) -> Any:
        calls.append(None)
        result = original(self, *arguments, **options)
        return result._replace(ce=result.ce * torch.nan) if len(calls) >= 4 else result

    monkeypatch.setattr(ByteLM, "losses", losses)
    words = ("--training.checkpoint-every-s=0", "--data", shards, "--out", run)
    line = refuses(RUN, "train", *MINIMAL, *words)
    assert line.startswith("bytejepa train: step 4: the loss is nan")
    assert f"the last good checkpoint is step 3 in {run / 'checkpoints'}" in line
    kept = checkpoint.read_newest(run / "checkpoints")
    assert kept.position.step == 3
    assert all(torch.isfinite(value).all() for value in kept.tensors.values())


def test_weights_that_are_not_finite_are_not_exported(refuses: Refuses, tmp_path: Path, minimal_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(minimal_run, run)
    newest = checkpoint.read_newest(run / "checkpoints")
    tensors = {name: torch.full_like(value, torch.nan) for name, value in newest.tensors.items()}
    writer = checkpoint.CheckpointWriter(run / "checkpoints", keep=1)
    writer.save(newest.position, tensors, newest.configuration)
    writer.close()
    assert "not finite" in refuses(ARTIFACT, "export", run, "-o", tmp_path / "model.bjm", "--no-score")
    assert not (tmp_path / "model.bjm").exists()


def test_cuda_where_there_is_none(refuses: Refuses, shards: Path, tmp_path: Path, minimal_artifact: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = ("--data", shards, "--out", tmp_path / "run")
    assert "no CUDA device" in refuses(CONFIG, "train", *MINIMAL, "--training.device=cuda", *words)
    assert "needs a CUDA device" in refuses(CONFIG, "train", *MINIMAL, "--training.precision=bfloat16", *words)
    assert "no CUDA device" in refuses(CONFIG, "eval", minimal_artifact, "--data", shards, "--device", "cuda")


@pytest.mark.integration
def test_a_pickle_that_is_no_model_is_one_line_of_our_own(tmp_path: Path) -> None:
    path = tmp_path / "final_model.pt"
    path.write_bytes(pickle.dumps({"a": 1}, protocol=4))  # of which torch warns, on stderr, beside refusing it
    done = forked.run(["import-pr832", str(path), "-o", str(tmp_path / "model.bjm")])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ARTIFACT, "", 1)
    assert "nothing in it was executed" in done.stderr


@pytest.mark.integration
def test_a_failure_as_a_process_has_the_same_code(process: Callable[..., Any], tmp_path: Path) -> None:
    done = process("eval", tmp_path / "nothing.bjm", "--data", tmp_path)
    assert done.code == ARTIFACT
    assert done.out == ""
    assert done.err.count("\n") == 1
