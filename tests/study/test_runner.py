"""A study of two variants and two seeds: paired, interleaved, resumable, reusing, refusing to mix machines."""

import dataclasses
import html
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bytejepa
from bytejepa.errors import CheckpointError, Interrupted
from bytejepa.study import runner
from bytejepa.study.environment import DECIDING_SOURCES
from bytejepa.study.plan import load_plan, override
from bytejepa.study.results import RunResult, StudyResult, read_study
from bytejepa.study.runner import StudyProgress, run_study
from bytejepa.training.runlog import RunFolder
from study.plans import small_plan, small_values

PLAN = small_plan()


class Finished(NamedTuple):
    """A finished study and what was seen of it on the way."""

    folder: Path
    study: StudyResult
    order: list[tuple[int, str]]
    batches: dict[tuple[int, str], list[Any]]
    """Input ids of every step, by (seed, variant)."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, embedded_shards: Path) -> Finished:
    from bytejepa.data.loader import Loader

    folder = tmp_path_factory.mktemp("study") / "study"
    order: list[tuple[int, str]] = []
    batches: dict[tuple[int, str], list[Any]] = {}
    batch = Loader.batch

    def see(at: StudyProgress) -> None:
        if at.stage == "done":
            order.append((at.seed, at.variant))

    def recorded(self: Loader, stage: int, index: int) -> Any:
        inputs, targets = batch(self, stage, index)
        which = (PLAN.seeds[len(order) // 2], PLAN.variants[len(order) % 2].name)
        batches.setdefault(which, []).append(inputs.tolist())
        return inputs, targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "batch", recorded)
        study = run_study(PLAN, folder, data=embedded_shards, on_progress=see)
    return Finished(folder, study, order, batches)


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """The finished study in a folder that a test may change."""
    return Path(shutil.copytree(finished.folder, tmp_path / "study"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """What the runner trained from the start and what it resumed, in order: ("train" or "resume", folder name)."""
    calls: list[tuple[str, str]] = []

    def spy(name: str, place: int) -> None:
        function = getattr(runner, name)

        def called(*arguments: Any, **settings: Any) -> Any:
            calls.append((name, arguments[place].name.rsplit("_", 1)[0]))
            return function(*arguments, **settings)

        monkeypatch.setattr(runner, name, called)

    spy("train", 2)
    spy("resume", 0)
    return calls


def figures(study: StudyResult) -> list[dict[str, Any]]:
    """The runs without what time decides: their seconds, and the file's size (it holds the compressed time of creation)."""
    return [{**dataclasses.asdict(run), "train_s": 0.0, "artifact_bytes": 0} for run in study.runs]


def test_seed_by_seed_and_variant_by_variant(finished: Finished) -> None:
    assert finished.order == [(1, "without"), (1, "with"), (2, "without"), (2, "with")]
    assert [(run.seed, run.variant) for run in finished.study.runs] == finished.order


def test_variants_read_the_same_ids_and_seeds_read_others(finished: Finished) -> None:
    seen = finished.batches
    assert len(seen) == 4
    assert len(seen[1, "with"]) == 4
    assert seen[1, "with"] == seen[1, "without"]
    assert seen[2, "with"] == seen[2, "without"]
    assert seen[1, "with"] != seen[2, "with"]


def test_what_a_run_reports(finished: Finished) -> None:
    without, with_path = finished.study.runs[:2]
    for run in (without, with_path):
        assert (run.steps, run.num_bytes, run.final_learning_rate_scale) == (4, 4 * 256, 0.0)
        assert run.artifact_bytes == (finished.folder / run.run / "model.bjm").stat().st_size
        assert 4 < run.bpb < 9
        assert run.environment.device == "cpu"
        assert run.environment.num_threads == 1
        assert abs(run.quantization_loss_bpb) < 0.1
    assert (without.explained_variance, without.effective_rank, without.latent_std) == (None, None, None)
    assert with_path.effective_rank is not None
    assert 1 <= with_path.effective_rank <= 16
    assert with_path.explained_variance is not None
    assert with_path.explained_variance <= 1
    assert with_path.latent_std is not None
    assert with_path.latent_std > 0
    assert with_path.num_parameters > without.num_parameters


def test_the_score_is_that_of_the_artifact(finished: Finished, embedded_shards: Path) -> None:
    from bytejepa.artifact.load import load
    from bytejepa.data.loader import IdStream
    from bytejepa.scoring.evaluate import Scorer, score_ids

    run = finished.study.runs[1]
    ids = IdStream.open(embedded_shards, "val").read(0, 600)
    score = score_ids(Scorer(load(finished.folder / run.run / "model.bjm")), ids, window=64, stride=32)
    assert run.bpb == pytest.approx(score.bpb, rel=1e-6)


def test_differences_are_paired_by_seed(finished: Finished) -> None:
    baseline, tested = finished.study.variants
    assert (baseline.verdict, baseline.difference_bpb) == (None, None)
    bpb = {(run.seed, run.variant): run.bpb for run in finished.study.runs}
    expected = sum(bpb[seed, "with"] - bpb[seed, "without"] for seed in (1, 2)) / 2
    assert tested.difference_bpb == pytest.approx(expected)
    assert tested.verdict in ("better", "worse", "tie")
    assert tested.p_corrected == tested.p_value  # one comparison: nothing to correct
    assert any(note.startswith("Two seeds") for note in finished.study.notes)


def test_study_json_holds_it_all(finished: Finished) -> None:
    assert read_study(finished.folder) == finished.study
    assert finished.study.is_complete
    content = json.loads((finished.folder / "study.json").read_text())
    assert (content["format"], content["format_version"], content["is_complete"]) == ("bytejepa-study", 1, True)


@pytest.mark.parametrize("content", ["", "[]", '{"format": "bytejepa-study", "format_version": 2}', '{"format": 1}'])
def test_a_damaged_study_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"study\.json"):
        read_study(tmp_path)


def test_finished_runs_are_not_run_again(
    copied: Path, finished: Finished, embedded_shards: Path, started: list[tuple[str, str]]
) -> None:
    study = run_study(PLAN, copied, data=embedded_shards)
    assert started == []
    assert study == finished.study


def test_another_configuration_is_not_taken_for_the_same(
    copied: Path, embedded_shards: Path, started: list[tuple[str, str]]
) -> None:
    values = small_values(seeds=[1])
    values["variants"][1]["overrides"] = {"jepa.gradient": "backbone"}
    values["variants"].append(
        {"name": "twin", "tests": "The same as the control.", "overrides": {"jepa.enabled": False}}
    )
    study = run_study(small_plan(**values), copied, data=embedded_shards)
    assert started == [("train", "with_seed_1")]
    assert study.runs[0].run == study.runs[2].run  # one configuration, run once
    assert any("one configuration" in note for note in study.notes)
    assert any(note.startswith("One seed") for note in study.notes)
    assert [summary.verdict for summary in study.variants] == [None, "undecided", "undecided"]


def test_a_stopped_run_is_resumed_and_ends_as_if_never_stopped(
    tmp_path: Path, finished: Finished, embedded_shards: Path, started: list[tuple[str, str]]
) -> None:
    def stop_in_the_second_run(at: StudyProgress) -> None:
        if at.number == 2 and at.training is not None and at.training.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    plan = override(PLAN, seeds=(1,))
    folder = tmp_path / "study"
    with pytest.raises(Interrupted, match="the same command goes on") as stopped:
        run_study(plan, folder, data=embedded_shards, on_progress=stop_in_the_second_run)
    assert stopped.value.exit_code == 7
    partial = read_study(folder)
    assert not partial.is_complete
    assert partial.notes[0] == "1 of 2 runs are not finished."
    started.clear()
    study = run_study(plan, folder, data=embedded_shards)
    assert started == [("resume", "with_seed_1")]
    assert study.is_complete
    assert figures(study) == figures(finished.study)[:2]


def test_a_run_killed_before_its_score_is_only_scored(
    copied: Path, finished: Finished, embedded_shards: Path, started: list[tuple[str, str]]
) -> None:
    last = finished.study.runs[-1]
    (copied / last.run / "study_run.json").unlink()
    (copied / last.run / "model.bjm").unlink()
    study = run_study(PLAN, copied, data=embedded_shards)
    assert started == [("resume", "with_seed_2")]
    assert figures(study) == figures(finished.study)


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"processor": "Another CPU"}, "another processor: Another CPU, now "),
        ({"num_threads": 64}, "another num_threads: 64, now 1"),
        ({"versions": {"torch": "1.0"}}, "another version of "),
        ({"code_sha256": "0" * 64}, "another code_sha256: 000"),
        ({"device": "NVIDIA H100"}, "another device: NVIDIA H100, now cpu"),
        ({"compiled": True}, "another compiled: True, now False"),
        ({"attention": "flash4"}, "another attention: flash4, now "),
    ],
)
def test_runs_of_another_environment_are_refused_by_name(
    copied: Path, finished: Finished, embedded_shards: Path, change: dict[str, Any], difference: str
) -> None:
    first = finished.study.runs[0]
    edited(copied / first.run / "study_run.json", lambda run: run["environment"].update(change))
    with pytest.raises(CheckpointError) as refused:
        run_study(PLAN, copied, data=embedded_shards)
    assert difference in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_variant_may_need_another_attention_kernel(
    tmp_path: Path, embedded_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bytejepa.model.attention._takes_masks", lambda name, **_: name != "blocked")
    control, other = small_values()["variants"]
    masked = {**other, "overrides": {"jepa.enabled": False, "model.document_masking": True}}
    study = run_study(small_plan(variants=[control, masked]), tmp_path / "study", data=embedded_shards)
    assert [run.environment.attention for run in study.runs] == ["blocked", "flash"] * 2


def test_a_half_done_run_of_another_machine_is_not_resumed(
    copied: Path, finished: Finished, embedded_shards: Path
) -> None:
    last = finished.study.runs[-1]
    (copied / last.run / "study_run.json").unlink()
    edited(copied / last.run / "manifest.json", lambda manifest: manifest.update(processor="Another CPU"))
    with pytest.raises(CheckpointError, match="another processor: Another CPU"):
        run_study(PLAN, copied, data=embedded_shards)


def test_threads_are_those_that_trained_and_may_not_change_within_a_run(
    copied: Path, finished: Finished, embedded_shards: Path
) -> None:
    from bytejepa.study.environment import environment_of

    last = finished.study.runs[-1]
    manifest = RunFolder(copied / last.run).read_manifest()
    assert manifest.pop("num_threads") == 1
    assert environment_of(manifest).num_threads == 1  # an older manifest does not say
    assert environment_of({**manifest, "num_threads": 64}).num_threads == 64
    (copied / last.run / "study_run.json").unlink()
    edited(copied / last.run / "manifest.json", lambda manifest: manifest.update(num_threads=64))
    with pytest.raises(CheckpointError, match="another num_threads: 64, now 1"):
        run_study(PLAN, copied, data=embedded_shards)


def test_folders_that_are_not_this_study_are_refused(
    copied: Path, tmp_path: Path, embedded_shards: Path, started: list[tuple[str, str]]
) -> None:
    with pytest.raises(CheckpointError, match="holds the study 'small', not 'other'"):
        run_study(small_plan(name="other"), copied, data=embedded_shards)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="not empty and holds no study"):
            run_study(PLAN, tmp_path / "full", data=embedded_shards, force=force)
    assert started == []


def test_force_runs_anew_whatever_was_there(
    copied: Path, embedded_shards: Path, started: list[tuple[str, str]]
) -> None:
    (copied / "study.json").write_text("damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        run_study(PLAN, copied, data=embedded_shards)
    study = run_study(override(PLAN, seeds=(1,)), copied, data=embedded_shards, force=True)
    assert started == [("train", "without_seed_1"), ("train", "with_seed_1")]
    assert study.is_complete


def test_the_verb_prints_verdicts_and_json(
    command: Callable[..., Any], copied: Path, tmp_path: Path, embedded_shards: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(small_values()))
    shown = command("ablate", plan, "--out", copied, "--data", embedded_shards)
    assert shown.code == 0
    for word in ("Does the path help?", "baseline", "95 % interval", "effective rank", "bytes/s", "with"):
        assert word in shown.out, word
    assert "4 runs, 2 seeds" in shown.err
    record = json.loads(command("ablate", plan, "--out", copied, "--data", embedded_shards, "--json").out)
    assert record["is_complete"]
    assert len(record["runs"]) == 4


def test_the_commands_of_a_report_repeat_the_study_and_its_score(
    command: Callable[..., Any], copied: Path, monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, str]]
) -> None:
    from bytejepa.report.configuration import commands, study_command
    from bytejepa.report.inputs import read_inputs
    from bytejepa.report.page import render_page

    monkeypatch.chdir(copied.parent)
    inputs = read_inputs([copied])
    words = shlex.split(study_command(inputs.study, copied))
    assert words[:3] == ["bytejepa", "ablate", "study/plan.json"]
    before = (copied / "study.json").read_bytes()
    assert command(*words[1:]).code == 0
    assert started == []
    assert (copied / "study.json").read_bytes() == before

    export, evaluate = (line.replace("\\\n", "") for line in commands(inputs.configurations[0].runs, 600)[-2:])
    page = render_page(inputs, {}, [], title="t", command="c", files="f")
    assert evaluate in html.unescape(page).replace("\\\n", "")
    run = inputs.study.runs[0]
    shutil.copytree(copied / run.run, Path(run.run).name)  # what the first commands would train
    assert command(*shlex.split(export)[1:]).code == 0
    scored = json.loads(command(*shlex.split(evaluate)[1:], "--json").out)["scores"]["sliding"]
    assert scored["bpb"] == pytest.approx(run.bpb, abs=1e-12)


def test_several_ranks_are_refused_before_anything_is_written(
    refuses: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(small_values()))
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "without torchrun" in refuses(2, "ablate", plan, "--out", tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_study_that_lacks_the_speed_gets_it_from_its_runs(finished: Finished, tmp_path: Path) -> None:
    record = json.loads((finished.folder / "study.json").read_text())
    speeds = [variant.pop("mean_bytes_per_s") for variant in record["variants"]]
    (tmp_path / "study.json").write_text(json.dumps(record))
    assert [variant.mean_bytes_per_s for variant in read_study(tmp_path).variants] == speeds
    runs = [run for run in finished.study.runs if run.variant == "with"]
    assert speeds[1] == pytest.approx(sum(run.num_bytes for run in runs) / sum(run.train_s for run in runs))


def test_a_mean_over_the_last_tenth() -> None:
    lines = [{"step": float(step), "x": float(step)} for step in range(10, 101, 10)]
    assert runner.mean_at_end(lines, "x") == 100.0
    assert runner.mean_at_end([{"step": 1.0, "x": 5.0}], "x") == 5.0
    assert runner.mean_at_end(lines, "y") is None


def test_a_run_result_survives_json(finished: Finished) -> None:
    from bytejepa.study.results import run_from_dict

    run: RunResult = finished.study.runs[1]
    assert run_from_dict(json.loads(json.dumps(dataclasses.asdict(run)))) == run


def test_what_shows_figures_is_not_among_the_sources_that_decide_them() -> None:
    package = Path(bytejepa.__file__).parent
    deciding = {path.relative_to(package).as_posix() for pattern in DECIDING_SOURCES for path in package.glob(pattern)}
    assert {"config_model.py", "bits.py", "model/block.py", "training/muon.py", "scoring/windows.py"} <= deciding
    assert not {name for name in deciding if name.startswith(("demo", "cli", "report"))}


def test_a_plan_that_was_given_data_names_them_and_others_are_refused(
    copied: Path, embedded_shards: Path, tiny_shards: Path
) -> None:
    plan = load_plan(copied / "plan.json")
    assert plan.data == str(embedded_shards.resolve())
    assert run_study(plan, copied).is_complete
    with pytest.raises(CheckpointError, match="was made with other data than"):
        run_study(PLAN, copied, data=tiny_shards)
    before = sorted(copied.iterdir())
    with pytest.raises(CheckpointError, match="was made with other data than the embedded corpus"):
        run_study(PLAN, copied)
    assert sorted(copied.iterdir()) == before


def test_a_study_made_anew_in_part_goes_on_from_there(copied: Path, embedded_shards: Path) -> None:
    alone = dataclasses.replace(PLAN, seeds=(1,))
    for path in copied.glob("runs/*/study_run.json"):
        edited(path, lambda run: run["environment"].update(num_threads=64))
    assert run_study(alone, copied, data=embedded_shards, force=True).is_complete
    assert run_study(alone, copied, data=embedded_shards).is_complete
    assert len(list(copied.glob("runs/*/study_run.json"))) == len(alone.variants)
