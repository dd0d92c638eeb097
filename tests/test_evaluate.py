"""Scores: equal to brute force, pruned or not, on any input; BOS costs but is no byte."""

import math

import numpy as np
import pytest
import torch

import bytejepa
from bytejepa.data.vocabulary import BOS, ids_from_bytes
from bytejepa.errors import ConfigError
from bytejepa.model.transformer import ByteLM
from bytejepa.scoring.evaluate import Score, Scorer, score_ids
from small_models import small_model

TEXT = "Fellow citizens: naïve plans — half of them".encode()


@pytest.fixture(scope="module")
def model() -> ByteLM:
    return small_model(evaluation={"window_bytes": 16, "stride_bytes": 4})


def document(data: bytes) -> np.ndarray:
    return np.concatenate((np.array([BOS], dtype=np.uint16), ids_from_bytes(data)))


def brute_force(model: ByteLM, ids: np.ndarray, window: int, stride: int) -> list[float]:
    """Nats of each target, one forward pass a target, by the definition in words: the first window that holds it."""
    nats = []
    for target in range(1, len(ids)):
        begin = next(b for b in range(0, len(ids), stride) if target <= min(b + window, len(ids) - 1))
        end = min(begin + window, len(ids) - 1)
        fed = torch.from_numpy(ids[begin:end].astype(np.int64))[None]
        with torch.no_grad():
            logits = model.logits(fed)[0, target - 1 - begin].double()
        nats.append(-logits.log_softmax(-1)[int(ids[target])].item())
    return nats


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 4), (13, 5), (200, 200)])
def test_a_score_is_the_sum_by_definition(model: ByteLM, window: int, stride: int) -> None:
    ids = document(TEXT)
    ids[30] = BOS
    expected = brute_force(model, ids, window, stride)
    score = score_ids(Scorer(model), ids, window=window, stride=stride, batch_ids=64)
    assert score.nats == pytest.approx(sum(expected), rel=1e-6)
    assert score.nats_of_bos == pytest.approx(expected[29], rel=1e-5)
    assert (score.num_targets, score.num_bytes) == (len(ids) - 1, len(ids) - 2)


@pytest.mark.parametrize("options", [{}, {"jepa": {"enabled": False}}, {"model": {"document_masking": True}}])
def test_pruning_changes_nothing(options: dict) -> None:
    model, ids = small_model(**options), document(TEXT * 3)
    pruned, whole = (
        score_ids(Scorer(model, prune=prune), ids, window=32, stride=8).bpb for prune in (True, False)
    )  # fmt: skip
    assert pruned == pytest.approx(whole, abs=1e-6)


def test_pruning_is_less_work(model: ByteLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "logits", lambda *_: pytest.fail("the whole window was computed"))
    scorer = Scorer(model)
    windows = [bytejepa.scoring.windows.Window(begin=0, length=16, scored=4)]
    assert scorer.window_losses(document(TEXT), windows).shape == (1, 4)


def test_shares_of_ranks_add_up(model: ByteLM) -> None:
    ids = document(TEXT)
    whole = score_ids(Scorer(model), ids, window=16, stride=4, batch_ids=32)
    shares = [
        score_ids(Scorer(model), ids, window=16, stride=4, batch_ids=32, share=(rank, 3)) for rank in range(3)
    ]  # fmt: skip
    for quantity in ("nats", "nats_of_bos", "num_targets", "num_bytes"):
        total = sum(getattr(share, quantity) for share in shares)
        assert total == pytest.approx(getattr(whole, quantity), rel=1e-9)


def test_progress_ends_at_the_number_of_targets(model: ByteLM) -> None:
    seen: list[int] = []
    score_ids(Scorer(model), document(TEXT), window=16, stride=4, batch_ids=64, on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(TEXT)


def test_the_public_score_is_of_one_document(model: ByteLM) -> None:
    ours = bytejepa.score(model, TEXT, window=16, stride=4)
    assert ours == score_ids(Scorer(model), document(TEXT), window=16, stride=4, batch_ids=65_536)
    assert bytejepa.score(model, TEXT) == ours  # the model's own window and stride
    assert ours.num_bytes == len(TEXT)
    assert ours.bpb == pytest.approx(ours.nats / len(TEXT) / math.log(2))


def test_a_short_window_bounds_the_default_stride(model: ByteLM) -> None:
    assert bytejepa.score(model, TEXT, window=2).stride == 2


def test_empty_text_costs_nothing_and_has_no_rate(model: ByteLM) -> None:
    empty = bytejepa.score(model, b"")
    assert (empty.nats, empty.num_bytes, empty.num_targets) == (0, 0, 0)
    assert math.isnan(empty.bpb)


def test_one_byte(model: ByteLM) -> None:
    one = bytejepa.score(model, b"F")
    logits = model.logits(torch.tensor([[BOS]]))[0, 0].double().log_softmax(-1)
    assert one.nats == pytest.approx(-logits[ord("F") + 4].item(), rel=1e-6)
    assert one.num_bytes == 1


def test_any_byte_can_be_scored(model: ByteLM) -> None:
    score = bytejepa.score(model, bytes(range(256)))
    assert score.num_bytes == 256
    assert math.isfinite(score.bpb)


@pytest.mark.parametrize("settings", [{"window": 0}, {"stride": 0}, {"window": 4, "stride": 5}, {"window": -3}])
def test_impossible_windows_are_refused(model: ByteLM, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"must be (1 or more|from 1 to the window)"):
        bytejepa.score(model, TEXT, **settings)


def test_bos_counts_above_the_line_only() -> None:
    score = Score(nats=30.0, nats_of_bos=10.0, num_bytes=10, num_targets=12, window=4, stride=4)
    assert score.bpb == pytest.approx(3 / math.log(2))
    assert score.bpb_without_bos == pytest.approx(2 / math.log(2))
