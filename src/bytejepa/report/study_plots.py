"""The forest plot of a study: what every variant changes, with its confidence interval."""

from __future__ import annotations

from typing import Any

from bytejepa.report.drawing import DEAD, FAINT, INK, SERIES, Layout, Plot, new_figure, plain_numbers
from bytejepa.report.tables import Table
from bytejepa.study.results import StudyResult, VariantSummary
from bytejepa.study.summary import first_of_the_same_runs

VERDICT_COLOURS = {"better": SERIES[2], "worse": DEAD, "tie": FAINT, "undecided": FAINT}


def seed_differences(study: StudyResult, variant: str) -> dict[int, float]:
    """Return variant minus baseline in bits per byte for every seed that both have finished."""
    bpb = {(run.variant, run.seed): run.bpb for run in study.runs}
    baseline = study.plan.baseline
    pairs = {seed: (bpb.get((variant, seed)), bpb.get((baseline, seed))) for seed in study.plan.seeds}
    return {seed: ours - theirs for seed, (ours, theirs) in pairs.items() if ours is not None and theirs is not None}


def forest_plot(study: StudyResult) -> Plot | None:
    """Return the paired differences to the baseline with their intervals; None if there is no difference yet."""
    shown = [variant for variant in study.variants if variant.difference_bpb is not None]
    if not shown:
        return None
    evaluation = study.plan.evaluation
    num_compared = len({*first_of_the_same_runs(study.plan, study.runs).values()} - {study.plan.baseline})
    interval = "paired t" if study.plan.noise == "own" else "t, with the noise of all variants pooled"

    def draw(layout: Layout) -> Any:
        figure = new_figure(layout, 1.1 + (0.55 if layout.is_narrow else 0.4) * len(shown))
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=1)
        for row, variant in enumerate(shown):
            _draw_variant(axes, row, variant, seed_differences(study, variant.variant), layout)
        labels = [variant.variant for variant in shown]
        axes.set_yticks(range(len(shown)), labels)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.08)
        axes.set_xlabel("← better · bpb minus the baseline's · worse →")
        plain_numbers(axes.xaxis)
        axes.xaxis.get_major_locator().set_params(nbins=4 if layout.is_narrow else 8)
        return figure

    rows = [
        (v.variant, v.num_seeds, v.mean_bpb, v.difference_bpb, v.interval_low_bpb, v.interval_high_bpb, v.p_value,
         v.p_corrected, v.verdict)
        for v in study.variants
    ]  # fmt: skip
    return Plot(
        name="ablation",
        title="What each variant changes",
        caption=(
            f"Bits per byte of each variant minus the baseline's ({study.plan.baseline}), left of the line is better. Squares: "
            "means over seeds of the differences on the same seed, which share initial weights and data order; lines: their 95 % "
            f"confidence intervals ({interval}); dots: single seeds. Green: better, red: worse, after Holm's correction for "
            f"{num_compared} comparisons at 5 %; grey: a tie or undecided. {_seeds(study)}. Artifacts, sliding windows of "
            f"{evaluation.window_bytes:,} ids, {evaluation.stride_bytes:,} scored each, on up to the first "
            f"{evaluation.validation_bytes:,} ids of the validation split."
        ),
        table=Table.of(
            (
                "variant", "num_seeds", "mean_bpb", "difference_bpb", "interval_low_bpb", "interval_high_bpb", "p_value",
                "p_corrected", "verdict",
            ),
            rows,
        ),
        draw=draw,
    )  # fmt: skip


def _draw_variant(axes: Any, row: int, variant: VariantSummary, differences: dict[int, float], layout: Layout) -> None:
    colour = VERDICT_COLOURS[variant.verdict or "undecided"]
    axes.plot(list(differences.values()), [row + 0.18] * len(differences), "o", color=colour, markersize=3, alpha=0.6)
    if variant.interval_low_bpb is not None and variant.interval_high_bpb is not None:
        axes.plot([variant.interval_low_bpb, variant.interval_high_bpb], [row, row], color=colour, linewidth=2)
    axes.plot([variant.difference_bpb], [row], "s", color=colour, markersize=7)
    words = f"{variant.difference_bpb:+.4f}{chr(10) if layout.is_narrow else ' '}{variant.verdict}"
    axes.text(1.01, row, words, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=colour)


def _seeds(study: StudyResult) -> str:
    counts = sorted(
        {len(seed_differences(study, v.variant)) for v in study.variants if v.variant != study.plan.baseline}
    )
    return f"{' or '.join(map(str, counts))} seed{'' if counts == [1] else 's'} a variant"
