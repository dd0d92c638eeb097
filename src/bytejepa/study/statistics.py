"""Paired differences between variants, seed by seed, with intervals, corrected p values and a verdict. Torch-free.

Runs of one seed share initial weights (by name) and data order, so that the difference of two variants on the same seed
is less noisy than either. The interval is Student's t over the seeds; a plan may pool the noise of all its variants.

The p values are corrected by Holm's step-down rule, which bounds the chance that any verdict of the study is wrong,
however the variants depend on each other (all are compared with one baseline). SciPy's false_discovery_control bounds the
expected share of wrong ones among those called, which is weaker: here each verdict is read on its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from bytejepa.study.results import Verdict

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
"""Corrected p value under which a difference is called."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairedDifference:
    """A variant minus the baseline over their common seeds."""

    num_pairs: int
    mean: float
    low: float | None
    """Of the 95 % confidence interval; None: fewer than two pairs."""
    high: float | None
    p_value: float | None
    """Two-sided."""


def paired_difference(variant: Mapping[int, float], baseline: Mapping[int, float]) -> PairedDifference | None:
    """Return variant minus baseline over the seeds that both have; None if they have none in common.

    Source: the paired t-test, `scipy.stats.ttest_1samp` on the differences.
    """
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        return None
    differences = np.array([variant[seed] - baseline[seed] for seed in seeds], dtype=np.float64)
    mean = float(differences.mean())
    if len(seeds) < 2:
        return PairedDifference(num_pairs=len(seeds), mean=mean, low=None, high=None, p_value=None)
    if np.ptp(differences) == 0:  # such as two variants that are the same run: the t statistic is 0/0
        return PairedDifference(num_pairs=len(seeds), mean=mean, low=mean, high=mean, p_value=1.0 if mean == 0 else 0.0)
    from scipy import stats

    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return PairedDifference(
        num_pairs=len(seeds),
        mean=mean,
        low=float(interval.low),
        high=float(interval.high),
        p_value=float(test.pvalue),
    )


def pooled_differences(variants: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, PairedDifference]:
    """Return every variant minus the baseline, over the seeds that all variants have, with one noise for all of them.

    The model is a randomised block design: value = variant + seed + noise, the noise alike for all variants. Its
    variance comes from what remains when the means of variant and seed are taken out, with (V - 1)(S - 1) degrees of
    freedom, so that a few seeds of many variants say more than each pair of variants alone. Without two such seeds, or
    with fewer than two variants: no intervals.
    """
    seeds = sorted(set.intersection(*(set(values) for values in variants.values()))) if variants else []
    if not seeds or baseline not in variants:
        return {}
    names = list(variants)
    table = np.array([[variants[name][seed] for seed in seeds] for name in names], dtype=np.float64)
    means = table.mean(axis=1)
    remains = table - means[:, None] - table.mean(axis=0)[None, :] + table.mean()
    freedom = (len(names) - 1) * (len(seeds) - 1)
    half = standard_error = None
    if freedom > 0:
        from scipy import stats

        standard_error = float(np.sqrt(2 * (remains**2).sum() / freedom / len(seeds)))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * standard_error
    found = {}
    for name, mean in zip(names, means - means[names.index(baseline)], strict=True):
        if name == baseline:
            continue
        p_value = None
        if standard_error is not None:
            # no noise at all, as between variants that are the same runs: the t statistic is 0/0
            p_value = (
                float(mean == 0) if standard_error == 0 else float(2 * stats.t.sf(abs(mean) / standard_error, freedom))
            )
        found[name] = PairedDifference(
            num_pairs=len(seeds),
            mean=float(mean),
            low=None if half is None else float(mean) - half,
            high=None if half is None else float(mean) + half,
            p_value=p_value,
        )
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values after Holm's correction, in the given order: the k-th smallest of n times n - k + 1, at least
    the one before, at most 1.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979. SciPy has no function for it.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return corrected.tolist()


def verdict(mean_difference: float, p_corrected: float | None) -> Verdict:
    """Return what a paired difference in bits per byte says: fewer bits are better."""
    if p_corrected is None:
        return "undecided"
    if p_corrected >= SIGNIFICANCE:
        return "tie"
    return "better" if mean_difference < 0 else "worse"


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if a value is missing or there is none."""
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present and len(present) == len(values) else None


def sample_std(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
