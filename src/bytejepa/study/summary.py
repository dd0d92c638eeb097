"""From finished runs to one line a variant: means, paired differences to the baseline, verdicts. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from bytejepa.study.plan import Plan, Variant
from bytejepa.study.results import RunResult, VariantSummary, bytes_per_s
from bytejepa.study.statistics import (
    PairedDifference,
    holm,
    mean_or_none,
    paired_difference,
    pooled_differences,
    sample_std,
    verdict,
)


def summarise(plan: Plan, runs: Sequence[RunResult]) -> tuple[tuple[VariantSummary, ...], tuple[str, ...]]:
    """Return (a summary of every variant that has a finished run, in the plan's order; notes for the reader)."""
    by_variant = {variant.name: [run for run in runs if run.variant == variant.name] for variant in plan.variants}
    first_of = first_of_the_same_runs(plan, runs)
    differences = _differences(plan, by_variant, set(first_of.values()))
    p_values = {name: d.p_value for name, d in differences.items() if d.p_value is not None and name != plan.baseline}
    corrected: dict[str, float | None] = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    if plan.baseline in differences:  # of one that is the baseline under another name, no question of chance
        corrected[plan.baseline] = differences[plan.baseline].p_value
    summaries = []
    for variant in plan.variants:
        if found := by_variant[variant.name]:
            first = first_of[variant.name]
            difference = differences.get(first) if variant.name != plan.baseline else None
            summaries.append(_summary(variant, found, difference, None if difference is None else corrected.get(first)))
    return tuple(summaries), _notes(plan, by_variant, len(p_values))


def _differences(plan: Plan, by_variant: dict[str, list[RunResult]], distinct: set[str]) -> dict[str, PairedDifference]:
    """Return the difference of each of the `distinct` variants to the baseline, where they have a seed in common."""
    bpb = {name: {run.seed: run.bpb for run in by_variant[name]} for name in by_variant if name in distinct}
    baseline = bpb.get(plan.baseline, {})
    found = {name: difference for name in bpb if (difference := paired_difference(bpb[name], baseline)) is not None}
    if plan.noise == "own":
        return found
    # the baseline's difference to itself, for its second names, has no noise that could be pooled
    itself = {name: difference for name, difference in found.items() if name == plan.baseline}
    return itself | pooled_differences(bpb, plan.baseline)


def first_of_the_same_runs(plan: Plan, runs: Sequence[RunResult]) -> dict[str, str]:
    """Return for each variant that has runs the first one that has the same runs, the baseline before all others.

    A run is one sample and one comparison, however many names it has: counted again, it would lend false certainty to pooled
    noise and take certainty from Holm's correction.
    """
    owner: dict[str, str] = {}
    first_of: dict[str, str] = {}
    names = [variant.name for variant in plan.variants]
    for name in sorted(names, key=lambda name: name != plan.baseline):
        fingerprints = [run.fingerprint for run in runs if run.variant == name]
        if fingerprints:
            first_of[name] = next((owner[f] for f in fingerprints if f in owner), name)
            owner |= dict.fromkeys(fingerprints, first_of[name])
    return first_of


def _summary(
    variant: Variant, runs: Sequence[RunResult], difference: PairedDifference | None, p_corrected: float | None
) -> VariantSummary:
    bpb = [run.bpb for run in runs]
    return VariantSummary(
        variant=variant.name,
        tests=variant.tests,
        num_seeds=len(runs),
        mean_bpb=_mean(bpb),
        std_bpb=sample_std(bpb),
        mean_train_s=_mean([run.train_s for run in runs]),
        mean_bytes_per_s=bytes_per_s(runs),
        mean_artifact_bytes=_mean([float(run.artifact_bytes) for run in runs]),
        mean_quantization_loss_bpb=_mean([run.quantization_loss_bpb for run in runs]),
        mean_explained_variance=mean_or_none([run.explained_variance for run in runs]),
        mean_effective_rank=mean_or_none([run.effective_rank for run in runs]),
        mean_latent_std=mean_or_none([run.latent_std for run in runs]),
        difference_bpb=None if difference is None else difference.mean,
        interval_low_bpb=None if difference is None else difference.low,
        interval_high_bpb=None if difference is None else difference.high,
        p_value=None if difference is None else difference.p_value,
        p_corrected=p_corrected,
        verdict=None if difference is None else verdict(difference.mean, p_corrected),
    )


def _mean(values: Sequence[float]) -> float:
    mean = mean_or_none(values)
    assert mean is not None, "a variant without runs has no summary"
    return mean


def _notes(plan: Plan, by_variant: dict[str, list[RunResult]], num_compared: int) -> tuple[str, ...]:
    notes = []
    missing = sum(len(plan.seeds) - len(found) for found in by_variant.values())
    if missing:
        notes.append(f"{missing} of {len(plan.seeds) * len(plan.variants)} runs are not finished.")
    pooled = plan.noise == "pooled"
    if len(plan.seeds) < 2:
        notes.append("One seed: there is no measure of the noise, so no interval, no p value and no verdict.")
    elif pooled:
        notes.append(
            "The intervals rest on the scatter of all variants over the seeds that all have finished, as if it were alike for each."
        )
    elif len(plan.seeds) < 3:
        notes.append("Two seeds: one degree of freedom, so intervals are very wide; three or more are usual.")
    if plan.budget.seconds is not None:
        notes.append(f"Every run trained for {plan.budget.seconds:g} s: a faster variant has read more bytes.")
    for variant in plan.variants:
        if variant.reads_otherwise and variant.name != plan.baseline:
            notes.append(f"{variant.name} reads the data in another way than {plan.baseline}.")
    if num_compared > 1:
        notes.append(f"p values are corrected for {num_compared} variants compared with one baseline (Holm).")
    shared: dict[str, list[str]] = {}
    for found in by_variant.values():
        for run in found:
            shared.setdefault(run.fingerprint, []).append(run.variant)
    same = sorted({" and ".join(names) for names in shared.values() if len(names) > 1})
    notes += [f"{names} are one configuration: the same runs." for names in same]
    return tuple(notes)
