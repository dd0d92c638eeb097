"""The plan of windows on small cases; its laws are in laws/test_scoring_laws.py."""

import pytest

from bytejepa.errors import ConfigError
from bytejepa.scoring.windows import Window, batch_windows, plan_windows


def planned(num_targets: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    return [(w.begin, w.length, w.scored) for w in plan_windows(num_targets, window=window, stride=stride)]


def test_windows_that_do_not_overlap() -> None:
    assert planned(8, 4, 4) == [(0, 4, 4), (4, 4, 4)]
    assert planned(10, 4, 4) == [(0, 4, 4), (4, 4, 4), (8, 2, 2)]


def test_sliding_windows_score_what_no_window_before_did() -> None:
    assert planned(8, 4, 2) == [(0, 4, 4), (2, 4, 2), (4, 4, 2)]
    assert planned(9, 4, 2) == [(0, 4, 4), (2, 4, 2), (4, 4, 2), (6, 3, 1)]


def test_input_shorter_than_a_window() -> None:
    assert planned(3, 4096, 512) == [(0, 3, 3)]
    assert planned(1, 4096, 512) == [(0, 1, 1)]
    assert planned(0, 4096, 512) == []


def test_the_whole_validation_split_is_covered() -> None:
    """The reference prices 3,584 targets too often and drops 778 ids (spec section 7, item 8)."""
    scored = sum(scored for _, _, scored in planned(151_130_890 // 1000, 4096, 512))
    assert scored == 151_130_890 // 1000


def test_the_first_target_of_a_window() -> None:
    assert Window(begin=10, length=4, scored=4).first_target == 11
    assert Window(begin=10, length=4, scored=1).first_target == 14


@pytest.mark.parametrize(("window", "stride"), [(4, 0), (4, 5), (0, 0), (-1, 1)])
def test_an_impossible_stride_is_refused(window: int, stride: int) -> None:
    in_window = f"stride must be from 1 to the window {window}, got {stride}"
    expected = in_window if window > 0 else f"the window must be 1 or more, got {window}"
    with pytest.raises(ConfigError, match=expected):
        list(plan_windows(10, window=window, stride=stride))


def test_batches_are_of_one_shape_and_no_larger_than_asked() -> None:
    windows = plan_windows(21, window=4, stride=2)
    batches = list(batch_windows(windows, batch_ids=12))
    assert [len(batch) for batch in batches] == [1, 3, 3, 2, 1]
    assert all(len({(w.length, w.scored) for w in batch}) == 1 for batch in batches)


def test_a_window_larger_than_a_batch_is_a_batch_of_one() -> None:
    assert [len(b) for b in batch_windows(plan_windows(8, window=4, stride=4), batch_ids=1)] == [1, 1]
