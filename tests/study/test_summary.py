"""From runs to verdicts: what counts as a run of its own."""

import dataclasses

import pytest

from bytejepa.report.study_plots import forest_plot
from bytejepa.study.plan import Plan
from bytejepa.study.results import RunResult, StudyResult, VariantSummary
from bytejepa.study.summary import summarise
from study.plans import small_plan, small_values

SCORES = {"control": (2.0, 2.1, 1.9), "path": (1.97, 2.09, 1.84)}
"""Bits per byte of the only two configurations, by seed."""


def finished(variant: str, configuration: str, seed: int) -> RunResult:
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(RunResult))
    measured = dict.fromkeys(("bpb_average", "steps", "num_bytes", "train_s", "artifact_bytes"), 1)
    known = {
        "variant": variant,
        "seed": seed,
        "fingerprint": f"{configuration} {seed}",
        "bpb": SCORES[configuration][seed - 1],
    }
    return RunResult(**{**unknown, **measured, **known})  # type: ignore[arg-type]


def study(*names: str, noise: str = "pooled") -> tuple[Plan, list[RunResult], dict[str, VariantSummary]]:
    """A study of a control and a path, each also under other names; a name says which of them it is."""
    control, path = small_values()["variants"]
    kinds = {"without": "control", "with": "path", **{name: name.split("-")[0] for name in names}}
    shown = [{**(control if kind == "control" else path), "name": name} for name, kind in kinds.items()]
    plan = small_plan(variants=shown, noise=noise, seeds=[1, 2, 3])
    runs = [finished(name, kind, seed) for name, kind in kinds.items() for seed in plan.seeds]
    return plan, runs, {summary.variant: summary for summary in summarise(plan, runs)[0]}


def test_pooled_noise_counts_a_run_once_however_many_names_it_has() -> None:
    _, _, alone = study()
    _, _, repeated = study("path-again", "control-again")
    for name in ("with", "path-again"):
        assert (repeated[name].p_value, repeated[name].interval_low_bpb) == (
            alone["with"].p_value, alone["with"].interval_low_bpb
        )  # fmt: skip
    same = repeated["control-again"]
    assert (same.difference_bpb, same.interval_low_bpb, same.interval_high_bpb, same.verdict) == (0, 0, 0, "tie")


@pytest.mark.parametrize(
    ("noise", "words"), [("own", "(paired t)"), ("pooled", "(t, with the noise of all variants pooled)")]
)
def test_the_forest_plot_says_which_interval_it_shows(noise: str, words: str) -> None:
    plan, runs, summaries = study(noise=noise)
    result = StudyResult(
        plan=plan, data_path="shards", data_sha256="", environment=None, runs=tuple(runs), variants=tuple(summaries.values()), notes=()
    )  # fmt: skip
    plot = forest_plot(result)
    assert plot is not None
    assert f"confidence intervals {words}" in plot.caption


def test_a_second_name_costs_no_verdict() -> None:
    for noise in ("own", "pooled"):
        _, _, alone = study(noise=noise)
        plan, runs, repeated = study("path-again", "control-again", noise=noise)
        assert repeated["path-again"].p_corrected == repeated["with"].p_corrected == alone["with"].p_corrected
        assert not [note for note in summarise(plan, runs)[1] if "corrected for" in note]


def test_one_seed_gives_no_verdict_to_a_second_name_either() -> None:
    plan, runs, _ = study("control-again")
    (same,) = [s for s in summarise(plan, [run for run in runs if run.seed == 1])[0] if s.variant == "control-again"]
    assert (same.difference_bpb, same.interval_low_bpb, same.p_value, same.verdict) == (0, None, None, "undecided")


def test_noise_is_never_pooled_over_other_seeds_for_some_variants_than_for_others() -> None:
    plan, runs, _ = study()
    apart = [run for run in runs if (run.variant == "with") == (run.seed == 3)]  # no seed in common
    assert {s.variant: s.difference_bpb for s in summarise(plan, apart)[0]} == {"without": None, "with": None}
    three = small_plan(
        variants=[*small_values()["variants"], {**small_values()["variants"][1], "name": "late"}],
        noise="pooled",
        seeds=[1, 2, 3],
    )
    late = [*runs, dataclasses.replace(finished("late", "path", 3), fingerprint="another")]
    only_third = [run for run in late if run.variant != "with" or run.seed != 3]  # "with" and "late" share no seed
    assert {s.verdict for s in summarise(three, only_third)[0]} == {None}
