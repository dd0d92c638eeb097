"""The folder: complete, true to its runs, clean under review, and never half there."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bytejepa.config import replace
from bytejepa.errors import ArtifactError, CheckpointError, ConfigError, DataError
from bytejepa.model.attention import available_backends
from bytejepa.review import Review, Word, review
from bytejepa.submission import folder as folder_module
from bytejepa.submission.folder import Author, make_submission
from bytejepa.submission.seeds import read_runs
from bytejepa.training.runlog import RunFolder
from bytejepa.training.runs import train
from submission.seeds_of_one_run import finished_run, seed_config

AUTHOR = Author(author="A. Name", github_id="aname", name="Small bytes", blurb="Tiny.")
KEYS = {
    "author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb", "pre_quant_val_loss", "pre_quant_val_bpb",
    "int6_zstd_val_loss", "int6_zstd_val_bpb", "bytes_total", "bytes_model_int6_zstd", "bytes_code",
}  # fmt: skip


@pytest.fixture(scope="module")
def reviewed(submission) -> Review:
    """Its review, where it is packed with the smoke test."""
    return review(submission.path, run=(submission.path / "train_gpt_readable.py").exists())


@pytest.mark.integration
def test_review_finds_it_clean(reviewed) -> None:
    outcome = reviewed
    assert outcome.verdict.word is Word.CLEAN, outcome.verdict
    statuses = {finding.check: finding.status.value for finding in outcome.findings}
    assert {name for name, status in statuses.items() if status == "fail"} == set()
    for check in ("budget.bytes", "budget.code_bytes", "scores.claims", "scores.same_configuration", "scores.seeds",
                  "scores.bpb_from_loss", "source.visible", "source.scoring", "source.test_time_training"):  # fmt: skip
        assert statuses[check] == "pass", check


@pytest.mark.integration
@pytest.mark.parametrize("submission", ["packed"], indirect=True)
def test_review_sees_what_is_hidden_in_it(submission, tmp_path) -> None:
    """The clean verdict means something: the same script with one step on validation data before packing is flagged."""
    from bytejepa.submission.script import packed_script

    folder = tmp_path / "doctored"
    shutil.copytree(submission.path, folder)
    source = (folder / "train_gpt_readable.py").read_text()
    honest = "    path = Path(ARTIFACT)\n"
    assert source.count(honest) == 1
    sly = (
        "    rows = torch.from_numpy(ids.astype(np.int64))[None]\n"
        "    sgd = torch.optim.SGD(trainer.model.parameters(), lr=0.1)\n"
        "    for _ in range(3):\n"
        "        loss = F.cross_entropy(trainer.model.logits(rows[:, :-1]).flatten(0, 1), rows[0, 1:])\n"
        "        loss.backward()\n"
        "        sgd.step()\n"
    )
    (folder / "train_gpt.py").write_text(packed_script(source.replace(honest, sly + honest)))
    outcome = review(folder)
    assert outcome.verdict.word is Word.FLAG
    assert "source.pre_quant_training" in {f.check for f in outcome.findings if f.status.value == "fail"}


@pytest.mark.integration
@pytest.mark.parametrize("submission", ["packed"], indirect=True)
def test_the_smoke_test_builds_its_model(submission, reviewed) -> None:
    finding = reviewed.finding("smoke.cpu")
    assert finding is not None
    assert finding.status.value == "pass", finding.summary
    assert f"params={submission.seeds[0].num_parameters:,}" in finding.summary
    assert "dim=32, layers=2" in finding.summary
    assert 5.3 < finding.figures["forward_loss_nats"] < 5.9  # near ln 260: its own initialisation


def test_figures_are_those_of_the_runs(submission) -> None:
    claims = json.loads((submission.path / "submission.json").read_text())
    first = submission.seeds[0]
    assert set(claims) >= KEYS
    assert claims["val_bpb"] == pytest.approx(first.sliding.bpb, abs=1e-8)
    assert claims["bytes_code"] == (submission.path / "train_gpt.py").stat().st_size
    assert claims["bytes_total"] == claims["bytes_code"] + claims["bytes_model_int6_zstd"]
    readme = (submission.path / "README.md").read_text()
    first = submission.seeds[0]
    assert f" to {8 * first.weights_bytes / first.num_parameters:.2f} bits a parameter." in readme
    for seed in submission.seeds:
        assert f"| {seed.seed} | 6 |" in readme
        assert f"{seed.sliding.bpb:.4f}" in readme
        assert f"{seed.sliding.bpb:.8f}" in (submission.path / f"train_seed{seed.seed}.log").read_text()
    assert "not the challenge's split" in readme
    assert (submission.path / "requirements.txt").read_text().split() == ["torch", "numpy", "zstandard"]


@pytest.mark.parametrize("submission", ["packed"], indirect=True)
def test_the_log_of_a_run_and_of_the_script_read_the_same(submission) -> None:
    from bytejepa.review.log_parser import parse_log

    log = parse_log((submission.path / "train_seed42.log").read_text(), "train_seed42.log")
    assert (log.seed, log.steps, log.planned_steps) == (42, 6, 6)
    assert log.settings["num_layers"] == 2
    assert log.final is not None
    assert log.final.bpb == pytest.approx(submission.seeds[1].sliding.bpb, abs=1e-8)
    assert log.total_bytes == log.model_bytes + log.code_bytes
    assert log.train_s == pytest.approx(submission.seeds[1].run.train_s, abs=0.01)


def test_runs_that_are_no_seeds_of_one_configuration_are_refused(seed_runs, tiny_shards, tmp_path) -> None:
    other = finished_run(tmp_path / "other", tiny_shards, 9, model={"query_gain": 2.0})
    with pytest.raises(CheckpointError, match=r"another configuration than .*: model\.query_gain"):
        make_submission([seed_runs[0], other], tmp_path / "out", AUTHOR)
    with pytest.raises(CheckpointError, match="two runs have the same seed"):
        make_submission([seed_runs[0], seed_runs[0]], tmp_path / "out", AUTHOR)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_over_is_refused(seed_runs, tmp_path) -> None:
    run = tmp_path / "cut"
    shutil.copytree(seed_runs[0], run)
    config = json.loads((run / "config.json").read_text())
    config["schedule"]["steps"] = 60
    (run / "config.json").write_text(json.dumps(config))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(CheckpointError, match="stopped at 10% of its schedule"):
        make_submission([run], tmp_path / "out", AUTHOR)


def test_over_the_budget_nothing_is_written(tiny_shards, tmp_path) -> None:
    run = finished_run(tmp_path / "run", tiny_shards, 1, artifact={"limit_bytes": 100_000})
    with pytest.raises(ArtifactError, match=r"over the budget of 100,000"):
        make_submission([run], tmp_path / "out", AUTHOR)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_existing_folder_is_replaced_only_by_force(seed_runs, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(ConfigError, match="exists already"):
        make_submission(seed_runs[:1], out, AUTHOR)
    for foreign in (out, out / "precious"):  # also by force no other folder is deleted, and no file
        with pytest.raises(DataError, match=r"is no submission, it has no submission\.json"):
            make_submission(seed_runs[:1], foreign, AUTHOR, force=True)
    assert (out / "precious").read_text() == "kept"
    (out / "submission.json").write_text("{}")
    make_submission(seed_runs[:1], out, AUTHOR, force=True, score_bytes=500)
    assert not (out / "precious").exists()
    assert (out / "train_gpt.py").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    link = tmp_path / "link"
    link.symlink_to(out)
    make_submission(seed_runs[:1], link, AUTHOR, force=True, score_bytes=500)
    assert (link / "train_gpt.py").is_file()
    assert not link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_a_folder_that_appears_meanwhile_is_kept(seed_runs, tmp_path, monkeypatch) -> None:
    out, fill = tmp_path / "out", folder_module._fill

    def somebody_else_writes(*arguments: Any) -> None:
        fill(*arguments)
        out.mkdir()
        (out / "submission.json").write_text("theirs")

    monkeypatch.setattr(folder_module, "_fill", somebody_else_writes)
    with pytest.raises(ConfigError, match="exists already"):
        make_submission(seed_runs[:1], out, AUTHOR, score_bytes=500)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("out"), Path("out/submission.json")]


def test_a_study_becomes_a_table(seed_runs, tmp_path) -> None:
    from bytejepa.study.plan import Budget, Evaluation, Plan, Variant
    from bytejepa.study.results import StudyResult, VariantSummary

    row = VariantSummary(
        variant="no-jepa", tests="The byte loss alone.", num_seeds=3, mean_bpb=2.0, std_bpb=0.01, mean_train_s=1.0,
        mean_bytes_per_s=900.0, mean_artifact_bytes=1000.0, mean_quantization_loss_bpb=0.0, mean_explained_variance=None,
        mean_effective_rank=None,
        mean_latent_std=None, difference_bpb=-0.0123, interval_low_bpb=-0.02, interval_high_bpb=-0.004, p_value=0.01,
        p_corrected=0.03, verdict="better",
    )  # fmt: skip
    plan = Plan(
        name="jepa", question="Does it help?", base="tiny", baseline="full", seeds=(1, 2, 3), budget=Budget(steps=6),
        variants=(Variant(name="full", tests="All of it."), Variant(name="no-jepa", tests="The byte loss alone.")),
        evaluation=Evaluation(window_bytes=64, stride_bytes=16, validation_bytes=1000),
    )  # fmt: skip
    study = StudyResult(
        plan=plan, data_path="shards", data_sha256="0", environment=None, runs=(), variants=(row,),
        notes=("One note for the reader.",),
    )  # fmt: skip
    make_submission(seed_runs[:1], tmp_path / "out", AUTHOR, study=study, score_bytes=500)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "| no-jepa: The byte loss alone. | 3 | 2.0000 | -0.0123 | -0.0200 to -0.0040 | 0.03 | better |" in readme
    assert "One note for the reader." in readme


def test_the_command(seed_runs: list[Path], tmp_path, command) -> None:
    out = tmp_path / "folder"
    words = ["submission", *seed_runs[:2], "-o", out, "--author", "A", "--github-id", "a", "--score-bytes", "700"]
    done = command(*words, "--packed", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert set(record["bpb"]) == {"2025", "42"}
    assert record["code_bytes"] < record["readable_bytes"]
    again = command(*words)
    assert again.code == 2
    assert "exists already" in again.err
    shown = command(*words, "--force")
    assert "sliding" in shown.out


@pytest.mark.parametrize(
    ("missing", "says"), [(0, "FineWeb, byte260 shards, the whole"), (1, "not the challenge's split")]
)
def test_the_challenges_split_is_told_by_its_counts(submission, missing: int, says: str) -> None:
    from bytejepa.submission.folder import _dataset

    seed = submission.seeds[0]
    whole = dataclasses.replace(seed.sliding, num_bytes=151_080_891 - missing)
    assert says in _dataset(seed.run, dataclasses.replace(seed, sliding=whole), 50_000)


def test_a_run_whose_attention_a_script_does_not_have_is_refused(minimal_config, embedded_shards, tmp_path) -> None:
    if available_backends("cpu")["blocked"] is not None:
        pytest.skip("its kernels are not there")
    config = replace(minimal_config, model={"num_heads": 2, "num_kv_heads": 1}, training={"attention": "blocked"})
    train(config, embedded_shards, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"training\.attention blocked, whose kernels a submission's script"):
        read_runs([tmp_path / "run"])


@pytest.mark.parametrize("schedule", [{"steps": 6}, {"steps": None, "max_wallclock_s": 0.05}])
def test_training_seconds_are_those_of_the_whole_run(schedule, tiny_shards, tmp_path) -> None:
    """The log's last line holds the clock at the beginning of the last step where that step was validated: by it, a run
    that is bounded by time would not be over."""
    config = seed_config(1, schedule=schedule, training={"validate_every_steps": 1})
    ended = train(config, tiny_shards, tmp_path / "run")
    (run,) = read_runs([tmp_path / "run"])
    assert (run.steps, run.num_bytes, run.train_s) == (ended.steps, ended.num_bytes, ended.elapsed_s)


def test_a_run_without_a_clock_has_the_seconds_of_its_log(seed_runs, tmp_path) -> None:
    copy = shutil.copytree(seed_runs[0], tmp_path / "run")
    (copy / "clock.log").unlink()
    (run,) = read_runs([copy])
    assert run.train_s == max(line["elapsed_s"] for line in RunFolder(copy).read_metrics())
