"""Each behavioural check passes on a sound model and fails on one that is broken in exactly that way."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bytejepa.config import RunConfig, replace
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import preset
from bytejepa.review.behaviour import (
    batch_order,
    border_distances,
    byte_model_loss,
    dead_parameters,
    future_change,
    model_findings,
    normalised,
    positions_to_try,
    round_trip,
    scored_once,
)  # fmt: skip
from bytejepa.review.findings import Status
from bytejepa.scoring.windows import Window, plan_windows


@pytest.fixture(scope="module")
def model() -> ByteLM:
    built = initialize(ByteLM(preset("tiny")), seed=1).eval()
    with torch.no_grad():
        assert built.jepa is not None
        built.jepa.injection.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return built


def test_a_sound_model_passes_everything(model: ByteLM) -> None:
    for finding in model_findings(model):
        assert finding.status is Status.PASS, finding


def test_an_injection_that_is_a_chunk_too_early_is_caught(model: ByteLM) -> None:
    def leaky(ids: torch.Tensor) -> torch.Tensor:
        logits = model.logits(ids).clone()
        chunk = (
            ids.unfold(1, 8, 8).float().mean(dim=2).repeat_interleave(8, dim=1)
        )  # of the chunk itself, not the one before
        logits[:, : chunk.size(1), 0] += chunk
        return logits

    found = future_change(leaky, length=69)
    assert found.status is Status.FAIL
    assert "moves the prediction" in found.evidence[0].text


@pytest.mark.parametrize("border", [8, 16, 64])
def test_a_leak_at_one_border_only_is_caught(model: ByteLM, border: int) -> None:
    def leaky(ids: torch.Tensor) -> torch.Tensor:
        logits = model.logits(ids).clone()
        logits[:, border - 1, 7] += ids[:, border].float()
        return logits

    assert future_change(leaky, length=69).status is Status.FAIL


def test_a_leak_at_borders_beyond_a_short_window_is_caught(model: ByteLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, distance = model.logits, 128

    def leaky(ids: torch.Tensor) -> torch.Tensor:
        logits = sound(ids).clone()
        borders = distance * torch.arange(1, (ids.size(1) - 1) // distance + 1)
        logits[:, borders - 1, 7] += ids[:, borders].float()
        return logits

    assert model.config.evaluation.window_bytes == 512
    monkeypatch.setattr(model, "logits", leaky)
    findings = model_findings(model)
    leaks = [found for found in findings if found.check == "behaviour.future_change"]
    assert [found.status is Status.FAIL for found in leaks] == [False, True]
    assert [found for found in findings if found.status is not Status.PASS] == leaks[1:]


def test_the_positions_lie_on_every_kind_of_border_and_few_are_the_most_telling() -> None:
    sparse = {"attention_windows": (96, 0, 96, 0, 96, 0), "chunk_blocks": (1, 4), "chunk_stride_bytes": 7}
    config = replace(preset("tiny"), model=sparse, evaluation={"stride_bytes": 40})
    assert border_distances(config) == [40, 64, 8, 7, 96]
    positions = positions_to_try(512, border_distances(config))
    for border in (40, 64, 8, 7, 96, 480, 448, 504, 511, 256):
        assert {border - 1, border, border + 1} - {512} <= set(positions), border
    assert positions_to_try(512, [64], at_most=4) == [64, 448, 256, 128]


def test_probabilities_that_do_not_sum_to_one_are_caught(model: ByteLM) -> None:
    sound = lambda ids: model.logits(ids).softmax(-1)  # noqa: E731
    assert normalised(sound, length=20).status is Status.PASS
    for broken in (
        lambda ids: sound(ids) * 1.01,
        lambda ids: sound(ids)[..., 4:],
        lambda ids: sound(ids) - 0.01,
        lambda ids: sound(ids) / 0,
    ):
        assert normalised(broken, length=20).status is Status.FAIL


def tail_again(num_targets: int, window: int, stride: int) -> Iterator[Window]:
    for begin in range(0, num_targets, stride):
        length = min(window, num_targets - begin)
        yield Window(begin=begin, length=length, scored=length if begin == 0 else min(stride, length))


def tail_dropped(num_targets: int, window: int, stride: int) -> Iterator[Window]:
    return (w for w in plan_windows(num_targets, window=window, stride=stride) if w.length == window)


@pytest.mark.parametrize("broken", [tail_again, tail_dropped])
def test_plans_that_price_twice_or_never_are_caught(broken) -> None:
    assert scored_once(broken).status is Status.FAIL


def test_losses_that_look_at_the_batch_are_caught(model: ByteLM) -> None:
    def losses(ids: torch.Tensor) -> torch.Tensor:
        logits = model.logits(ids[:, :-1])
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    carried = {"previous": 0.0}

    def stateful(ids: torch.Tensor) -> torch.Tensor:
        rows = losses(ids)
        out = rows + carried["previous"]
        carried["previous"] = 0.5 * float(ids[-1].float().mean())
        return out

    assert batch_order(losses, length=33).status is Status.PASS
    assert batch_order(lambda ids: losses(ids) - losses(ids).mean(), length=33).status is Status.FAIL
    assert batch_order(lambda ids: losses(ids).cumsum(0), length=33).status is Status.FAIL
    assert batch_order(stateful, length=33).status is Status.FAIL


def test_a_round_trip_that_loses_something_is_caught(model: ByteLM) -> None:
    def export() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in model.state_dict().items()}

    def load(state: object):
        other = ByteLM(model.config).eval()
        other.load_state_dict(state)
        return other.logits

    def forgetful(state: object):
        other = ByteLM(model.config).eval()
        other.load_state_dict({k: v for k, v in state.items() if "mlp_scale" not in k}, strict=False)
        with torch.no_grad():
            other.blocks[0].mlp_scale.fill_(0.5)
        return other.logits

    assert round_trip(export, load, model.logits, length=32).status is Status.PASS
    assert round_trip(export, forgetful, model.logits, length=32).status is Status.FAIL


def test_dead_parameters_are_named(model: ByteLM) -> None:
    dead = initialize(ByteLM(replace(preset("tiny"), model={"bigram_projection_init": "zero"})), seed=1)
    found = dead_parameters(dead, byte_model_loss, length=48)
    assert found.status is Status.FAIL
    names = [evidence.text for evidence in found.evidence]
    assert "bigram.embedding.weight" in names
    assert "bigram.projection.weight" in names
    assert found.weight == "note"


def test_the_model_is_left_as_it_was(model: ByteLM) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dead_parameters(model, byte_model_loss, length=48)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_artifact_is_reviewed_from_the_file(minimal_artifact: Path, minimal_config: RunConfig, tmp_path) -> None:
    from bytejepa.artifact.container import read_container, write_container
    from bytejepa.review import Word, review

    found = review(minimal_artifact)
    assert found.facts["seeds"] == [minimal_config.training.seed]
    assert found.verdict.word is Word.CLEAN, found.verdict
    assert found.kind == "artifact"
    assert found.finding("behaviour.future_change").status is Status.PASS
    assert found.finding("behaviour.round_trip").status is Status.PASS
    path = tmp_path / "model.bjm"
    read = read_container(minimal_artifact)
    origin = {"imported_from": "final_model.pt"}
    write_container(path, configuration=read.configuration, tensors=read.stored, metadata=origin)
    assert review(path).facts["seeds"] == [None]  # a configuration, but no run of it
    damaged = bytearray(minimal_artifact.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(bytes(damaged))
    assert review(path).verdict.word is Word.AUTHOR
    assert dataclasses.asdict(review(path))["kind"] == "artifact"


@pytest.mark.parametrize("artifact", [{}, {"clip": "sensitivity", "rounding": "gptq", "hidden_order": "by_scale"}])
def test_a_run_comes_back_as_stored(minimal_run: Path, tmp_path: Path, artifact: dict[str, str]) -> None:
    from bytejepa.review import review

    run = tmp_path / "run"
    shutil.copytree(minimal_run, run)
    values = json.loads((run / "config.json").read_text())
    values["artifact"] |= artifact
    (run / "config.json").write_text(json.dumps(values))
    assert review(run).finding("behaviour.round_trip").status is Status.PASS


@pytest.mark.parametrize("kind", ["run", "artifact"])
@pytest.mark.parametrize("lost", ["weights", "score"])
def test_a_loaded_model_that_predicts_otherwise_is_caught(
    minimal_run: Path, minimal_artifact: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lost: str
) -> None:
    from bytejepa.review import Word, own_round_trip, review

    def broken(place: Path) -> ByteLM:
        loaded = load(place)
        if lost == "weights":
            with torch.no_grad():
                loaded.blocks[0].mlp_scale.mul_(0.9)
        else:  # sliding windows ask for the last positions only
            monkeypatch.setattr(loaded, "tail_logits", lambda ids, scored: loaded.logits(ids)[:, :scored])
        return loaded

    load = own_round_trip.load
    monkeypatch.setattr(own_round_trip, "load", broken)
    found = review({"run": minimal_run, "artifact": minimal_artifact}[kind])
    assert found.finding("behaviour.round_trip").status is Status.FAIL
    assert found.verdict.word is Word.FLAG


def test_steps_and_seconds_of_a_run_are_those_of_its_clock(
    minimal_config: RunConfig, embedded_shards: Path, tmp_path: Path
) -> None:
    from bytejepa.review import review
    from bytejepa.training.runs import train

    # validated right after its last step, it ends its log with the seconds at the beginning of that step
    config = replace(minimal_config, training={"validate_every_steps": 3})
    ended = train(config, embedded_shards, tmp_path / "run")
    facts = review(tmp_path / "run").facts
    assert (facts["steps"], facts["train_s"]) == ([ended.steps], [ended.elapsed_s])
    (tmp_path / "run" / "clock.log").write_text("no seconds\n")
    assert review(tmp_path / "run").finding("run.container").status is Status.FAIL


def test_a_run_folder_is_reviewed_from_its_records(tmp_path) -> None:
    from bytejepa.review import Word, review
    from bytejepa.training.runlog import RunFolder, run_manifest

    config = preset("tiny")
    folder = RunFolder(tmp_path / "run")
    folder.create(config, run_manifest(config, {}, {}))
    folder.append_metrics({"step": 1, "elapsed_s": 1.0, "val_bpb_average": 2.5})
    found = review(folder.path)
    assert found.kind == "run"
    assert found.facts["mean_bpb"] == 2.5
    assert found.finding("run.manifest").status is Status.PASS
    assert found.finding("run.beginning").status is Status.PASS
    assert found.verdict.word is Word.AUTHOR  # it has no checkpoint to build a model from
    folder.manifest_path.write_text('{"fingerprint": "other"}')
    assert review(folder.path).finding("run.manifest").status is Status.FAIL
    folder.manifest_path.write_text('{"started_from": {"path": "earlier.bjm"}}')
    beginning = review(folder.path).finding("run.beginning")
    assert beginning.status is Status.FAIL
    assert "earlier.bjm" in beginning.evidence[0].text
