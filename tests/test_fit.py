"""The size solver: never over, just under, and frank where it cannot."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytejepa.artifact.container import container_to_bytes, read_container
from bytejepa.artifact.export import export
from bytejepa.artifact.fit import (
    CLOSE_ENOUGH,
    GAUSSIAN_CLIPS,
    MAX_TRIALS,
    NEAR_ENOUGH,
    SizeError,
    _Trials,
    fit,
    fullest,
    look_around,
    narrow,
)
from bytejepa.artifact.load import load
from bytejepa.artifact.store import code_bytes
from bytejepa.config import RunConfig, replace
from bytejepa.config_json import to_dict
from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import ClipRule, dequantize, quantize_rows
from bytejepa.presets import compact
from bytejepa.training.runs import train
from small_models import small_model

pytestmark = pytest.mark.usefixtures("many_lanes")


def weights_and_config(seed: int, **artifact: object):
    model = small_model(seed=seed)
    settings = {
        "small_tensor_elements": 256,
        "clip": "standard_deviations",
        "matrix_bits": 8,
        "codecs": ("rans", "zstd"),
    }
    config = replace(model.config, artifact={**settings, **artifact})
    return {name: value.detach() for name, value in model.named_parameters()}, config


@pytest.mark.parametrize("seed", [0, 1])
def test_every_seed_fits_closely_and_never_over(seed: int) -> None:
    weights, config = weights_and_config(seed)
    found = fit(weights, config, None, file_bytes=25_000, metadata={})
    assert 0.995 * 25_000 < found.file_bytes <= 25_000
    written = container_to_bytes(
        configuration=to_dict(found.config), tensors=found.tensors, metadata={}, codecs=("rans", "zstd", "raw")
    )
    assert len(written) == found.file_bytes


def test_more_room_makes_finer_steps() -> None:
    weights, config = weights_and_config(0)
    clips = [
        fit(weights, config, None, file_bytes=budget, metadata={}).config.artifact.clip_standard_deviations
        for budget in (20_000, 28_000)
    ]
    assert clips[0] > clips[1]


def searched(
    size: Callable[[int], int], file_bytes: int, most_sizes: int = MAX_TRIALS
) -> tuple[int | None, dict[int, int]]:
    """The clip found among 20,000, and the sizes that were measured on the way."""
    asked: list[int] = []

    def noted(clip: int) -> int:
        asked.append(clip)
        return size(clip)

    clips = range(20_000)
    sizes = narrow(clips, noted, file_bytes, most_sizes, CLOSE_ENOUGH)
    look_around(sizes, clips, noted, file_bytes, most_sizes)
    assert len(asked) == len(set(asked)) <= most_sizes
    assert sizes == {clip: size(clip) for clip in asked}
    return fullest(sizes, file_bytes), sizes


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), jump=st.integers(0, 3000), budget=st.integers(16_000, 30_000))
def test_sizes_that_jump_are_searched_within_bounds_and_the_fullest_that_fits_is_kept(
    seed: int, jump: int, budget: int
) -> None:
    def size(clip: int) -> int:
        return 32_000 - clip + random.Random(f"{seed} {clip // 7}").randrange(jump + 1)

    found, sizes = searched(size, budget)
    assert found is not None
    assert sizes[found] == max(taken for taken in sizes.values() if taken <= budget)


def test_a_coarser_clip_that_was_seen_and_is_fuller_wins() -> None:
    def size(clip: int) -> int:  # the bracket ends on 19,280
        return {12_346: 20_153, 12_347: 19_280}.get(clip, 32_499 - clip if clip < 12_347 else 32_337 - clip)

    found, sizes = searched(size, 20_000)
    assert found is not None
    assert 12_347 in sizes
    assert sizes[found] >= (1 - NEAR_ENOUGH) * 20_000


@pytest.mark.parametrize("fuller", [12_347 + 64, 12_347 - 64])
def test_where_much_stays_free_clips_further_on_are_tried(fuller: int) -> None:
    def size(clip: int) -> int:  # the bracket ends on 19,200 and sees nothing of the few that fill the budget
        if abs(clip - fuller) < 5:
            return 19_990
        return 32_747 - clip if clip < 12_347 else 31_547 - clip

    found, sizes = searched(size, 20_000)
    assert found is not None
    assert sizes[found] == 19_990


def test_the_number_of_sizes_is_bounded_with_gptq_too(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, config = weights_and_config(0)
    counted: list[tuple[int, str]] = []

    def jumping(trials: _Trials, clip: int, rounding: str) -> int:
        counted.append((clip, rounding))
        trials.sizes[clip, rounding] = 20_153 if clip < 12_347 - 500 * (rounding == "gptq") else 12_000
        return trials.sizes[clip, rounding]

    monkeypatch.setattr(_Trials, "size", jumping)
    monkeypatch.setattr(_Trials, "tensors", lambda *_: {})
    found = fit(weights, replace(config, artifact={"rounding": "gptq"}), None, file_bytes=20_000, metadata={})
    assert found.file_bytes == 12_000
    assert found.num_trials == len(set(counted)) <= MAX_TRIALS
    assert {rounding for _, rounding in counted} == {"nearest", "gptq"}


@pytest.mark.parametrize(("clip", "others"), [(500.0, 20.0), (0.1, 10_000.0)])
def test_any_legal_clip_can_be_fitted(clip: float, others: float) -> None:
    weights, config = weights_and_config(0, clip_standard_deviations=clip, other_clip_standard_deviations=others)
    found = fit(weights, config, None, file_bytes=10_000_000, metadata={}).config.artifact
    assert found.clip_standard_deviations == pytest.approx(GAUSSIAN_CLIPS[8], rel=1e-3)
    assert 0.1 <= found.other_clip_standard_deviations <= 10_000


def test_a_budget_that_holds_everything_gets_the_finest_steps_there_are() -> None:
    weights, config = weights_and_config(0)
    found = fit(weights, config, None, file_bytes=10_000_000, metadata={})
    assert found.config.artifact.clip_standard_deviations == pytest.approx(GAUSSIAN_CLIPS[8], rel=1e-3)
    assert found.num_trials == 1  # the finest fits: nothing is searched


@pytest.mark.parametrize("bits", range(2, 9))
def test_more_room_never_loses_more(bits: int) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))

    def error(clip: float) -> float:
        rule = ClipRule(kind="standard_deviations", standard_deviations=clip)
        return float((dequantize(quantize_rows(weight, bits=bits, clip=rule)) - weight).square().mean())

    finest = GAUSSIAN_CLIPS[bits]
    assert error(finest) < error(finest * 1.1) < error(finest * 1.5)
    assert error(finest) < error(finest / 1.2)


def test_a_budget_that_is_too_small_names_the_smallest_possible_size() -> None:
    weights, config = weights_and_config(0)
    with pytest.raises(SizeError) as refusal:
        fit(weights, config, None, file_bytes=5_000, metadata={})
    smallest = refusal.value.smallest_bytes
    assert fit(weights, config, None, file_bytes=smallest, metadata={}).file_bytes <= smallest


def test_a_clip_without_a_number_cannot_be_fitted() -> None:
    weights, config = weights_and_config(0, clip="max")
    with pytest.raises(ArtifactError, match="leaves nothing to fit"):
        fit(weights, config, None, file_bytes=5_000, metadata={})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, embedded_shards: Path, minimal_config: RunConfig) -> Path:
    """`minimal_run`'s model, whose matrices are all quantised."""
    folder = tmp_path_factory.mktemp("fit") / "run"
    train(
        replace(minimal_config, artifact={"small_tensor_elements": 256, "calibration_bytes": 1024}),
        embedded_shards,
        folder,
    )
    return folder


def test_export_fits_code_and_weights_together(tmp_path: Path, run: Path) -> None:
    out, code = tmp_path / "model.bjm", code_bytes()[1]
    plain = export(run, tmp_path / "plain.bjm", score=False, pack_compactly=True).weights_bytes
    budget = code + plain - 500
    result = export(run, out, fit_bytes=budget, score_bytes=600)
    assert out.stat().st_size + code == result.total_bytes <= budget
    assert result.total_bytes > budget - 300
    assert result.fits
    container = read_container(out)
    assert container.info.joint_bytes > 0
    stored = load(out).config.artifact
    found = ("clip_standard_deviations", "other_clip_standard_deviations", "limit_bytes", "fit")
    asked = dataclasses.replace(compact(load(run).config).artifact, **{name: getattr(stored, name) for name in found})
    assert stored == asked
    assert (stored.limit_bytes, stored.fit) == (budget, True)
    assert result.fitted_clip == stored.clip_standard_deviations


def test_the_command_says_by_how_much_it_fits(tmp_path: Path, run: Path, command) -> None:
    out, budget = tmp_path / "model.bjm", code_bytes()[1] + 30_000
    outcome = command("export", run, "-o", out, "--fit", budget, "--no-score", "--json")
    assert outcome.code == 0, outcome
    record = json.loads(outcome.out)
    assert record["free_bytes"] == budget - record["total_bytes"] >= 0
    assert record["weights_bytes"] == out.stat().st_size


def test_the_command_refuses_what_cannot_fit(tmp_path: Path, run: Path, refuses) -> None:
    out, code = tmp_path / "model.bjm", code_bytes()[1]
    said = refuses(5, "export", run, "-o", out, "--fit", code + 3_000, "--no-score")
    assert f"cannot be packed into {code + 3_000} bytes: the smallest possible are about" in said
    assert "the code alone takes" in refuses(5, "export", run, "-o", out, "--fit", 1000, "--no-score")
    assert not out.exists()
