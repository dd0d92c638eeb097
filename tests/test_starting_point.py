"""A run that begins with an earlier model: it has its weights before the first step, and is as safe as any other run."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bytejepa.artifact.load import read_run, starting_point
from bytejepa.config import RunConfig, replace
from bytejepa.errors import CheckpointError, ConfigError, Interrupted
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM, prediction_weights
from bytejepa.report.configuration import commands, train_words
from bytejepa.report.inputs import read_inputs
from bytejepa.report.page import render_page
from bytejepa.submission.seeds import read_runs
from bytejepa.training import checkpoint
from bytejepa.training.runlog import RunFolder
from bytejepa.training.runs import resume, train
from bytejepa.training.starting_point import StartingPoint
from small_models import same_tensors


@pytest.fixture
def config(minimal_config: RunConfig) -> RunConfig:
    return replace(
        minimal_config,
        schedule={"steps": 6},
        training={"seed": 5, "validate_every_steps": None, "validation_bytes": 200, "keep_checkpoints": 9},
    )


def start_of(config: RunConfig, weights: dict[str, Tensor]) -> StartingPoint:
    return StartingPoint(source="earlier.bjm", config=config, weights=weights)


def other_weights(config: RunConfig) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in initialize(ByteLM(config), 77).named_parameters()}


def held_at(run: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.read(RunFolder(run).checkpoints_path, step)


@pytest.mark.parametrize("of", ["minimal_artifact", "minimal_run"])
def test_a_run_begins_with_the_weights_of_an_artifact_or_a_run(
    of: str, config: RunConfig, embedded_shards: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    start = starting_point(request.getfixturevalue(of))
    if of == "minimal_run":
        run = read_run(request.getfixturevalue(of))
        assert same_tensors(start.weights, run.average)
        assert not same_tensors(start.weights, run.raw)
    train(config, embedded_shards, tmp_path / "run", start=start)
    begun = held_at(tmp_path / "run", 0)
    for part in ("model", "average"):
        assert same_tensors(begun.part(part), start.weights)
    assert not same_tensors(held_at(tmp_path / "run", 6).part("model"), start.weights)
    recorded = RunFolder(tmp_path / "run").read_manifest()["started_from"]
    assert recorded == start.described()
    assert recorded["path"] == str(request.getfixturevalue(of))


def test_its_own_weights_as_a_start_change_nothing(config: RunConfig, embedded_shards: Path, tmp_path: Path) -> None:
    first = {name: value.detach() for name, value in initialize(ByteLM(config), 5).named_parameters()}
    train(config, embedded_shards, tmp_path / "random")
    train(config, embedded_shards, tmp_path / "given", start=start_of(config, first))
    ends = [held_at(tmp_path / run, 6).tensors for run in ("random", "given")]
    assert same_tensors(*ends)


@pytest.mark.parametrize("stops_at", [1, 4])
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    stops_at: int, config: RunConfig, embedded_shards: Path, tmp_path: Path
) -> None:
    start = start_of(config, other_weights(config))
    train(config, embedded_shards, tmp_path / "whole", start=start)

    def stop(at: Any) -> None:
        if at.step == stops_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config, embedded_shards, tmp_path / "stopped", start=start, on_progress=stop)
    if stops_at == 1:  # as after a kill: nothing is left but what there was before the first step
        checkpoint.remove(RunFolder(tmp_path / "stopped").checkpoints_path, 1)
    resume(tmp_path / "stopped")
    ends = [held_at(tmp_path / run, 6).tensors for run in ("whole", "stopped")]
    assert same_tensors(*ends)


def test_killed_before_its_weights_were_kept_it_is_not_gone_on_with_from_random_ones(
    config: RunConfig, embedded_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(config, embedded_shards, run, start=start_of(config, other_weights(config)))
    for step in checkpoint.steps_on_disk(RunFolder(run).checkpoints_path):
        checkpoint.remove(RunFolder(run).checkpoints_path, step)
    with pytest.raises(CheckpointError, match=r"before it held the weights of earlier\.bjm"):
        resume(run)


def test_what_only_training_needs_begins_anew(config: RunConfig, embedded_shards: Path, tmp_path: Path) -> None:
    more = replace(config, model={"multi_token_heads": 1})
    train(more, embedded_shards, tmp_path / "more", start=start_of(config, other_weights(config)))
    head = held_at(tmp_path / "more", 0).part("model")["multi_token_heads.0.weight"]
    assert torch.equal(head, dict(initialize(ByteLM(more), 5).named_parameters())["multi_token_heads.0.weight"])
    train(config, embedded_shards, tmp_path / "less", start=start_of(more, other_weights(more)))  # and is left out
    apart = replace(config, jepa={"inject": False})
    packed = prediction_weights(other_weights(apart), apart)  # all that an artifact of it holds
    train(apart, embedded_shards, tmp_path / "apart", start=start_of(apart, packed))
    begun = held_at(tmp_path / "apart", 0).part("model")
    assert same_tensors(prediction_weights(begun, apart), packed)
    assert begun.keys() > packed.keys()


@pytest.mark.parametrize(
    ("changed", "tensor"),
    [
        ({"model": {"model_dim": 16, "rotary_dims": 4}}, "skip_weights"),
        ({"model": {"num_layers": 3}}, "blocks.2"),
        ({"model": {"num_layers": 1, "xsa_last_layers": 0}}, "skip_weights"),
        ({"jepa": {"enabled": False}}, "jepa"),
        ({"model": {"bigram_rows": None}}, "bigram"),
    ],
)
def test_a_model_of_another_shape_is_refused_before_there_is_a_run(
    changed: dict[str, dict[str, Any]], tensor: str, config: RunConfig, embedded_shards: Path, tmp_path: Path
) -> None:
    start = start_of(config, other_weights(config))
    with pytest.raises(ConfigError, match=rf"earlier\.bjm: tensor [\w.]*{tensor}") as refused:
        train(replace(config, **changed), embedded_shards, tmp_path / "run", start=start)
    ((section, settings),) = changed.items()
    assert all(f"{section}.{name} {getattr(getattr(config, section), name)}" in refused.value.hint for name in settings)
    assert not (tmp_path / "run").exists()


def test_a_submission_of_it_is_refused(config: RunConfig, embedded_shards: Path, tmp_path: Path) -> None:
    train(config, embedded_shards, tmp_path / "run", start=start_of(config, other_weights(config)))
    with pytest.raises(CheckpointError, match=r"began with the weights of earlier\.bjm"):
        read_runs([tmp_path / "run"])


def test_a_run_cannot_replace_the_model_that_it_begins_with(
    config: RunConfig, embedded_shards: Path, tmp_path: Path, refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(config, embedded_shards, run)
    before = held_at(run, 6).tensors
    monkeypatch.chdir(tmp_path)
    assert "would be replaced" in refuses(2, "train", run, "--data", embedded_shards, "--out", "run", "--force")
    assert same_tensors(held_at(run, 6).tensors, before)


def test_a_report_names_the_model_and_repeats_the_run_from_it(
    config: RunConfig, embedded_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(config, embedded_shards, run, start=start_of(config, other_weights(config)))
    inputs = read_inputs([run])
    begin = commands(inputs.configurations[0].runs, None)[0]
    assert begin.split()[:3] == ["bytejepa", "train", "earlier.bjm"]
    assert "those of earlier.bjm" in render_page(inputs, {}, [], title="t", command="c", files="f")


def test_the_digest_is_of_the_weights_whatever_file_they_lie_in(config: RunConfig) -> None:
    weights = other_weights(config)
    described = start_of(config, weights).described()
    assert described == start_of(config, dict(reversed(weights.items()))).described()
    name = next(iter(weights))
    moved = weights | {name: weights[name] + 1e-3}
    assert described["weights_sha256"] != start_of(config, moved).described()["weights_sha256"]


def test_on_the_command_line_a_model_stands_where_a_preset_would(
    command, minimal_artifact: Path, embedded_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["--schedule.steps=2", "--training.validate-every-steps=None", "--training.validation-bytes=200"]
    done = command("train", minimal_artifact, "--data", embedded_shards, "--out", out, *words, "--json")
    assert done.code == 0, done.err
    start, run = starting_point(minimal_artifact), RunFolder(out)
    assert same_tensors(held_at(out, 0).part("model"), start.weights)
    expected = replace(
        start.config, schedule={"steps": 2}, training={"validate_every_steps": None, "validation_bytes": 200}
    )
    assert run.read_config() == expected
    repeated = train_words(run.read_config(), run.read_manifest()["started_from"])
    shown = command("config", *repeated, "--json")
    assert json.loads(shown.out) == json.loads((out / "config.json").read_text())


def test_what_is_no_model_is_named(refuses, tmp_path: Path, embedded_shards: Path, minimal_run: Path) -> None:
    words = ["--data", embedded_shards, "--out", tmp_path / "run"]
    assert "there is no model nothing.bjm" in refuses(2, "train", "nothing.bjm", *words)
    assert "unknown preset 'tinny'" in refuses(2, "train", "tinny", *words)
    assert "is not a run folder" in refuses(4, "train", tmp_path, *words)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(minimal_run, unfinished)
    shutil.rmtree(unfinished / "checkpoints")
    assert "has no checkpoint yet" in refuses(4, "train", unfinished, *words)
    assert not (tmp_path / "run").exists()
