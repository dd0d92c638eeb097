"""Paired differences against numbers worked out by hand and against SciPy; Holm against its published rule."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bytejepa.study.statistics import holm, mean_or_none, paired_difference, pooled_differences, sample_std, verdict

BASELINE = {1: 2.00, 2: 2.10, 3: 1.90}
VARIANT = {1: 1.97, 2: 2.09, 3: 1.88}


def test_a_paired_difference_by_hand() -> None:
    found = paired_difference(VARIANT, BASELINE)
    assert found is not None
    # differences -0.03, -0.01, -0.02: mean -0.02, sd 0.01, standard error 0.01 / sqrt(3), t(0.975, 2) = 4.30265
    assert found.num_pairs == 3
    assert found.mean == pytest.approx(-0.02)
    half_width = 4.302652729911275 * 0.01 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((-0.02 - half_width, -0.02 + half_width))
    # t = -2 sqrt(3) with 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2) for t > 0
    t = 2 * math.sqrt(3)
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_a_paired_difference_is_scipys_paired_t_test() -> None:
    found = paired_difference(VARIANT, BASELINE)
    assert found is not None
    expected = stats.ttest_rel(list(VARIANT.values()), list(BASELINE.values()))
    assert found.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_only_common_seeds_are_paired_and_by_seed_not_by_order() -> None:
    found = paired_difference({3: 1.88, 1: 1.97, 9: 5.0}, BASELINE)
    assert found is not None
    assert (found.num_pairs, found.mean) == (2, pytest.approx(-0.025))
    assert paired_difference({9: 5.0}, BASELINE) is None


def test_one_pair_has_a_difference_but_no_interval() -> None:
    found = paired_difference({1: 1.9}, BASELINE)
    assert found is not None
    assert (found.low, found.high, found.p_value) == (None, None, None)
    assert found.mean == pytest.approx(-0.1)
    assert verdict(found.mean, found.p_value) == "undecided"


def test_the_same_runs_twice_are_a_tie() -> None:
    found = paired_difference(BASELINE, BASELINE)
    assert found is not None
    assert (found.mean, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert verdict(found.mean, found.p_value) == "tie"


def test_pooled_noise_by_hand() -> None:
    # variant and seed means taken out of (2.0, 2.2), (1.9, 2.0), (2.1, 2.4) leaves 0, 0; 0.05, -0.05; -0.05, 0.05
    found = pooled_differences({"a": {1: 2.0, 2: 2.2}, "b": {1: 1.9, 2: 2.0}, "c": {1: 2.1, 2: 2.4}}, "a")
    assert set(found) == {"b", "c"}
    error = math.sqrt(2 * (4 * 0.05**2) / 2 / 2)  # two degrees of freedom, two seeds
    half_width = 4.302652729911275 * error
    assert (found["b"].mean, found["b"].num_pairs) == (pytest.approx(-0.15), 2)
    assert (found["b"].low, found["b"].high) == pytest.approx((-0.15 - half_width, -0.15 + half_width))
    t = 0.15 / error
    assert found["b"].p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_two_variants_pooled_are_the_paired_t_test() -> None:
    pooled, paired = (
        pooled_differences({"base": BASELINE, "other": VARIANT}, "base"),
        paired_difference(VARIANT, BASELINE),
    )
    assert paired is not None
    assert dataclasses.astuple(pooled["other"]) == pytest.approx(dataclasses.astuple(paired))


def test_pooled_noise_needs_complete_seeds() -> None:
    found = pooled_differences({"a": {1: 2.0, 2: 2.1}, "b": {1: 1.9}, "c": {1: 2.0, 2: 2.2}}, "a")
    assert [(d.num_pairs, d.low, d.p_value) for d in found.values()] == [(1, None, None)] * 2
    assert pooled_differences({"b": {1: 1.9}}, "a") == {}
    same = pooled_differences({"a": BASELINE, "b": BASELINE}, "a")["b"]
    assert (same.mean, same.low, same.p_value) == (0, 0, 1)


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04 -> 0.04, 0.06, 0.06, 0.06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_raw_value_and_bonferronis(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for raw, after in zip(p_values, corrected, strict=True):
        assert raw <= after <= min(1.0, raw * len(p_values)) + 1e-12
    assert corrected[p_values.index(min(p_values))] == pytest.approx(min(1.0, min(p_values) * len(p_values)))
    # never milder than the false discovery rate, which promises less
    assert all(a >= b - 1e-12 for a, b in zip(corrected, stats.false_discovery_control(p_values), strict=True))


@pytest.mark.parametrize(
    ("difference", "p", "word"),
    [(-0.1, 0.049, "better"), (0.1, 0.049, "worse"), (-0.1, 0.05, "tie"), (0.1, 0.9, "tie"), (-0.1, None, "undecided")],
)
def test_verdicts(difference: float, p: float | None, word: str) -> None:
    assert verdict(difference, p) == word


def test_means_do_not_hide_what_is_missing() -> None:
    assert mean_or_none([1.0, 3.0]) == 2.0
    assert mean_or_none([1.0, None]) is None
    assert mean_or_none([]) is None
    assert sample_std([1.0]) is None
    assert sample_std([1.0, 3.0]) == pytest.approx(math.sqrt(2))
