"""Every verb on minimal settings: what it prints, what it leaves behind, and JSON that parses."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bytejepa
import forked
from bytejepa.cli.terminal import print_json
from bytejepa.config import RunConfig
from bytejepa.config_json import to_dict
from conftest import MINIMAL
from reference_weights import golden, reference_state_dict

TEXT = "Mr. Speaker, the state of our Union is strong — naïvely so.\n" * 5


def test_prepare_then_verify(command: Callable[..., Any], tmp_path: Path) -> None:
    source, out = tmp_path / "text.jsonl", tmp_path / "shards"
    source.write_text("".join(json.dumps({"text": f"{number} {TEXT}"}) + "\n" for number in range(4)), "utf-8")
    done = command("prepare", source, "--out", out, "--val-documents", 1, "--workers", 1, "--json")
    assert done.code == 0, done
    splits = json.loads(done.out)["manifest"]["splits"]
    assert (splits["val"]["num_documents"], splits["train"]["num_documents"]) == (1, 3)
    assert splits["train"]["num_text_bytes"] == 3 * len(f"0 {TEXT}".encode())
    checked = command("prepare", "--verify", out, "--json")
    assert checked.code == 0
    assert json.loads(checked.out)["problems"] == []
    table = command("prepare", "--verify", out)
    assert "problems" in table.out
    assert "┃" not in table.out, "a table without names of columns has no empty row for them"
    assert table.err == ""


def test_a_document_separator_may_be_escaped_as_shells_leave_it(command: Callable[..., Any], tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "shards"
    text.write_text("one\n\ntwo\n\nthree")
    words = ("prepare", text, "--out", out, "--val-documents", 1, "--workers", 1, "--json")
    done = command(*words, "--document-separator", r"\n\n")
    assert done.code == 0, done
    assert json.loads(done.out)["manifest"]["splits"]["train"]["num_documents"] == 2


def test_train_leaves_a_run(command: Callable[..., Any], tmp_path: Path, embedded_shards: Path) -> None:
    run = tmp_path / "run"
    done = command("train", *MINIMAL, "--data", embedded_shards, "--out", run, "--json")
    assert done.code == 0, done
    result = json.loads(done.out)
    assert (result["steps"], result["num_bytes"], result["is_new"]) == (6, 6 * 256, True)
    assert 3 < result["train_bpb"] < 9
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "train_bpb" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics if "val_bpb" in line] == [3, 6]
    first = metrics[0]
    for key in (
        "jepa_lambda",
        "jepa_explained_variance",
        "jepa_effective_rank",
        "gradient_norm",
        "learning_rate_scale",
    ):
        assert key in first, key
    assert {path.name for path in run.iterdir()} >= {"config.json", "manifest.json", "metrics.jsonl", "checkpoints"}


@pytest.mark.integration
def test_train_as_a_process_is_quiet_without_a_terminal(tmp_path: Path, embedded_shards: Path) -> None:
    done = forked.run(["train", *MINIMAL, "--data", str(embedded_shards), "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done
    assert done.stderr == ""
    assert "averaged weights" in done.stdout


def test_the_wallclock_ends_a_run(command: Callable[..., Any], tmp_path: Path, embedded_shards: Path) -> None:
    words = [word.replace("--schedule.steps=6", "--schedule.steps=None") for word in MINIMAL]
    words = [word for word in words if "max-wallclock" not in word]
    run = tmp_path / "run"
    done = command("train", *words, "--max-wallclock", 0.3, "--data", embedded_shards, "--out", run, "--json")
    assert done.code == 0, done
    assert 0.3 <= json.loads(done.out)["elapsed_s"] < 5
    assert json.loads((run / "config.json").read_text())["schedule"]["max_wallclock_s"] == 0.3


def test_no_wallclock_is_none_although_the_preset_has_one(
    command: Callable[..., Any], tmp_path: Path, embedded_shards: Path
) -> None:
    words = [word for word in MINIMAL if "max-wallclock" not in word]
    run = tmp_path / "run"
    assert command("train", *words, "--max-wallclock", "None", "--data", embedded_shards, "--out", run).code == 0
    assert json.loads((run / "config.json").read_text())["schedule"]["max_wallclock_s"] is None


def test_a_finished_run_resumes_to_the_same_end(command: Callable[..., Any], tmp_path: Path, minimal_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(minimal_run, run)
    done = command("train", "--resume", run, "--json")
    assert done.code == 0, done
    record = json.loads(done.out)
    assert (record["steps"], record["is_new"]) == (6, False)
    shown = "".join(command("train", "--resume", run).out.split())  # the title's lines break in the path
    assert f"{run.name}(wasfinishedalready)" in shown


def test_export_prints_every_stage(command: Callable[..., Any], tmp_path: Path, minimal_run: Path) -> None:
    out = tmp_path / "model.bjm"
    done = command("export", minimal_run, "-o", out, "--score-bytes", 300, "--json")
    assert done.code == 0, done
    record = json.loads(done.out)
    assert record["weights_bytes"] == out.stat().st_size
    assert record["total_bytes"] == record["weights_bytes"] + record["code_bytes"]
    assert set(record["bpb"] if "bpb" in record else record["scores"]) >= {"raw", "average", "artifact"}
    table = command("export", minimal_run, "-o", out, "--no-score", "--force")
    assert table.code == 0
    assert "16,000,000" in table.out


def test_eval_of_an_artifact_on_shards(
    command: Callable[..., Any], minimal_artifact: Path, embedded_shards: Path
) -> None:
    done = command("eval", minimal_artifact, "--data", embedded_shards, "--max-bytes", 500, "--json")
    assert done.code == 0, done
    record = json.loads(done.out)
    scores = record["scores"]
    assert set(scores) == {"non-overlapping", "sliding"}
    assert {score["num_targets"] for score in scores.values()} == {499}
    assert (scores["sliding"]["window"], scores["sliding"]["stride"]) == (64, 16)
    assert record["compressors"] == {}
    assert scores["sliding"]["bpb"] >= scores["sliding"]["bpb_without_bos"]


def test_eval_of_a_run_on_a_file_compares_compressors(
    command: Callable[..., Any], tmp_path: Path, minimal_run: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    words = ("eval", minimal_run, "--data", path, "--window", 32, "--stride", 8)
    record = json.loads(command(*words, "--json").out)
    assert record["scores"]["sliding"]["num_bytes"] == len(TEXT.encode())
    expected = bytejepa.score(bytejepa.load(minimal_run), TEXT.encode(), window=32, stride=8).bpb
    assert record["scores"]["sliding"]["bpb"] == pytest.approx(expected, rel=1e-9)
    assert set(record["compressors"]) == {"gzip -9", "bzip2 -9", "xz -9e", "zstd -19", "brotli -11", "PPMd H -o6"}
    table = command(*words)
    assert "sliding, window 32, stride 8" in table.out
    assert "brotli -11" in table.out
    one = json.loads(command(*words[:-2], "--no-sliding", "--json").out)
    assert set(one["scores"]) == {"non-overlapping"}


def test_eval_under_a_mixture_too(command: Callable[..., Any], tmp_path: Path, minimal_run: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 5, "utf-8")
    words = ("eval", minimal_run, "--data", path, "--window", 32, "--stride", 8)
    plain = json.loads(command(*words, "--json").out)["scores"]
    scores = json.loads(command(*words, "--mixing", "--json").out)["scores"]
    assert set(scores) == {"non-overlapping", "sliding", "sliding, mixed"}
    assert scores["sliding"]["bpb"] == pytest.approx(plain["sliding"]["bpb"], rel=1e-6)
    assert scores["sliding, mixed"]["bpb"] < 0.8 * plain["sliding"]["bpb"]
    assert "sliding, mixed, window 32, stride 8" in command(*words, "--mixing").out
    one = json.loads(command(*words[:-2], "--mixing", "--no-sliding", "--json").out)
    assert set(one["scores"]) == {"non-overlapping", "non-overlapping, mixed"}


def test_several_ranks_cannot_score_a_mixture(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = SimpleNamespace(world_size=2, is_main=True, device=torch.device("cpu"), agree=contextlib.nullcontext)
    monkeypatch.setattr("bytejepa.training.distributed.join", lambda _: ranks)
    done = command("eval", "model.bjm", "--data", "text.txt", "--mixing")
    assert done.code == 2
    assert "--mixing reads the text in one pass from left to right (run it without torchrun)" in done.err


def test_a_window_longer_than_the_data_is_shortened_and_said(
    command: Callable[..., Any], tmp_path: Path, minimal_artifact: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"\xff\x00 not UTF-8")
    done = command("eval", minimal_artifact, "--data", path, "--window", 4096, "--json")
    assert done.code == 0
    assert "14 ids to score" not in done.err  # "\xff\x00 not UTF-8" has 12 bytes
    assert "the data has 12 ids to score, fewer than the window of 4096" in done.err
    assert json.loads(done.out)["scores"]["non-overlapping"]["num_bytes"] == 12


def test_import_pr832_writes_an_artifact(command: Callable[..., Any], tmp_path: Path) -> None:
    source, out = tmp_path / "final_model.pt", tmp_path / "model.bjm"
    config = golden("small")[0]["config"]
    torch.save(reference_state_dict(config), source)
    words = ("import-pr832", source, "-o", out, "--xsa-last-n", 2, "--rope-dims", 8)
    done = command(*words, "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["file_bytes"] == out.stat().st_size
    assert bytejepa.load(out).config.model.xsa_last_layers == 2
    assert command(*words).code == 2
    assert "sha256" in command(*words, "--force").out


def test_a_run_remembers_its_configuration(minimal_run: Path, minimal_config: RunConfig) -> None:
    assert json.loads((minimal_run / "config.json").read_text()) == to_dict(minimal_config)


def test_surprise_does_not_advise_what_was_done(
    command: Callable[..., Any], minimal_artifact: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short text, priced in part.")
    done = command("surprise", minimal_artifact, text, "--max-bytes", 9, "-o", tmp_path / "page.html")
    assert done.code == 0, done
    assert "the first 9 of 29 bytes\n" in done.err


def test_json_has_null_where_there_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"bpb": math.nan, "scores": [math.inf, (1.5, -math.inf)], "of": {"empty": float("nan")}})
    printed = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert printed == {"bpb": None, "scores": [None, [1.5, None]], "of": {"empty": None}}


def test_a_name_that_looks_like_markup_is_printed_as_it_is(command: Callable[..., Any], tmp_path: Path) -> None:
    notes, out = tmp_path / "notes.txt", tmp_path / "sh[" / "red]x[" / "old]"
    notes.write_text(TEXT)
    done = command("prepare", notes, "--out", out, "--val-share", 0.1, "--workers", 1)
    assert done.code == 0, done
    assert str(out) in "".join(done.out.splitlines())


@pytest.mark.integration
@pytest.mark.parametrize("form", ["terminal", "html", "csv"])
def test_surprise_on_a_stdout_of_another_encoding(form: str, minimal_artifact: Path, tmp_path: Path, process) -> None:
    (tmp_path / "notes.txt").write_text(TEXT[:200], "utf-8")
    words = ("surprise", minimal_artifact, tmp_path / "notes.txt", "--format", form)
    done = process(*words, PYTHONIOENCODING="cp1252")
    assert (done.code, done.err) == (0, "")
