"""Laws of scoring: every target exactly once, whatever the length, window and stride; the price follows from the plan."""

import functools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from bytejepa.model.transformer import ByteLM
from bytejepa.scoring.evaluate import Scorer, score_ids, target_losses
from bytejepa.scoring.windows import batch_windows, plan_windows
from small_models import small_model


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int]:
    """(number of targets, window, stride)."""
    window = draw(st.integers(1, 40))
    return draw(st.integers(0, 200)), window, draw(st.integers(1, window))


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[int, int, int]:
    """Cases that cost at most a dozen forward passes."""
    window = draw(st.integers(3, 20))
    return draw(st.integers(0, 50)), window, draw(st.integers(3, window))


@settings(max_examples=300)
@given(case=cases())
def test_every_target_is_priced_exactly_once_and_in_order(case: tuple[int, int, int]) -> None:
    num_targets, window, stride = case
    priced = [
        target
        for w in plan_windows(num_targets, window=window, stride=stride)
        for target in range(w.first_target, w.begin + w.length + 1)
    ]
    assert priced == list(range(1, num_targets + 1))


@settings(max_examples=300)
@given(case=cases())
def test_every_target_has_the_context_that_the_stride_leaves(case: tuple[int, int, int]) -> None:
    num_targets, window, stride = case
    for w in plan_windows(num_targets, window=window, stride=stride):
        assert 1 <= w.scored <= w.length <= window
        assert w.begin + w.length <= num_targets  # no target beyond the end
        context = w.first_target - w.begin  # ids before the first target priced
        assert w.begin == 0 or context > window - stride


@settings(max_examples=100)
@given(case=cases(), batch_ids=st.integers(1, 500))
def test_batching_keeps_every_window_in_order(case: tuple[int, int, int], batch_ids: int) -> None:
    num_targets, window, stride = case
    plan = list(plan_windows(num_targets, window=window, stride=stride))
    batches = list(batch_windows(iter(plan), batch_ids=batch_ids))
    assert [w for batch in batches for w in batch] == plan
    assert all(len(batch) == 1 or sum(w.length for w in batch) <= batch_ids for batch in batches)


@functools.cache
def model() -> ByteLM:
    return small_model()


@settings(max_examples=10)
@given(case=small_cases(), batch_ids=st.integers(1, 300), seed=st.integers(0, 9))
def test_a_score_does_not_depend_on_batches_or_pruning(case: tuple[int, int, int], batch_ids: int, seed: int) -> None:
    num_targets, window, stride = case
    ids = np.random.default_rng(seed).integers(1, 260, num_targets + 1).astype(np.uint16)
    ours = score_ids(Scorer(model()), ids, window=window, stride=stride, batch_ids=batch_ids)
    plain = score_ids(Scorer(model(), prune=False), ids, window=window, stride=stride, batch_ids=65_536)
    assert ours.num_targets == plain.num_targets == num_targets
    assert ours.num_bytes == int((ids[1:] >= 4).sum())
    assert ours.nats == pytest.approx(plain.nats, abs=1e-5 * max(1, num_targets))


@settings(max_examples=6)
@given(case=small_cases(), seed=st.integers(0, 9))
def test_a_price_is_that_of_its_window_alone(case: tuple[int, int, int], seed: int) -> None:
    num_targets, window, stride = case
    ids = np.random.default_rng(seed).integers(1, 260, num_targets + 1).astype(np.uint16)
    for windows, losses in target_losses(Scorer(model()), ids, window=window, stride=stride, batch_ids=100):
        for w, nats in zip(windows, losses, strict=True):
            fed = torch.from_numpy(ids[w.begin : w.begin + w.length].astype(np.int64))[None]
            with torch.no_grad():
                log_p = model().logits(fed)[0].double().log_softmax(-1)
            targets = torch.from_numpy(ids[w.first_target : w.begin + w.length + 1].astype(np.int64))
            expected = -log_p[-w.scored :].gather(1, targets[:, None])[:, 0]
            torch.testing.assert_close(nats.double(), expected, rtol=0, atol=1e-4)
