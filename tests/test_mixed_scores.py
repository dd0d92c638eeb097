"""Scores of a mixture: one distribution, every byte scored before anything learns from it, better where text repeats itself."""

import numpy as np
import pytest
import torch

from bytejepa.bits import bits_from_nats
from bytejepa.data.corpus import embedded_text
from bytejepa.data.vocabulary import BOS, BYTE_OFFSET, ids_from_bytes
from bytejepa.model.transformer import ByteLM
from bytejepa.scoring.evaluate import Scorer, score_ids
from bytejepa.scoring.mixed import MixedScorer, score_mixed
from small_models import random_model, small_config, small_model

TEXT = embedded_text("val")[:400] + "naïve — plans".encode()


@pytest.fixture(scope="module")
def model() -> ByteLM:
    return small_model(evaluation={"window_bytes": 32, "stride_bytes": 8})


def document(data: bytes) -> np.ndarray:
    return np.concatenate((np.array([BOS], dtype=np.uint16), ids_from_bytes(data)))


@pytest.mark.parametrize(("window", "stride"), [(32, 8), (32, 32)])
def test_the_models_own_score_comes_with_it(model: ByteLM, window: int, stride: int) -> None:
    ids = document(TEXT)
    ids[100] = BOS
    expected = score_ids(Scorer(model), ids, window=window, stride=stride)
    found, mixed = score_mixed(MixedScorer(model), ids, window=window, stride=stride)
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert found.nats_of_bos == pytest.approx(expected.nats_of_bos, rel=1e-6)
    assert (found.num_bytes, found.num_targets) == (expected.num_bytes, expected.num_targets)
    assert (mixed.num_bytes, mixed.num_targets, mixed.nats_of_bos) == (
        found.num_bytes, found.num_targets, found.nats_of_bos,
    )  # fmt: skip


def test_the_bits_of_a_byte_are_the_models_distribution(model: ByteLM) -> None:
    ids = document(TEXT[:33])
    fed, targets = torch.from_numpy(ids[None, :-1].astype(np.int64)), torch.from_numpy(ids[None, 1:].astype(np.int64))
    with torch.no_grad():
        priced = MixedScorer(model)._batch_losses(fed, targets)[0].double()
        log_p = model.logits(fed)[0].double().log_softmax(-1)
    assert torch.allclose(priced[:, 1], -log_p[:, BYTE_OFFSET:].logsumexp(-1), atol=1e-5)
    ones = priced[:, 2:] / 65536
    bits = torch.from_numpy(np.unpackbits(np.frombuffer(TEXT[:33], np.uint8)).reshape(-1, 8))
    nats = priced[:, 1] - torch.where(bits == 1, ones, 1 - ones).log().sum(-1)
    assert torch.allclose(nats, priced[:, 0], atol=2e-3)


def test_batches_change_nothing(model: ByteLM) -> None:
    ids = document(TEXT)
    one, many = (
        score_mixed(MixedScorer(model), ids, window=32, stride=8, batch_ids=batch_ids)[1].nats
        for batch_ids in (1 << 20, 32)
    )
    # float32 sums of other batches may round a probability to the next 2^-16
    assert one == pytest.approx(many, rel=1e-4)


def test_no_byte_is_learned_before_it_is_scored(model: ByteLM) -> None:
    """The cost of a text's beginning does not depend on what follows."""
    ids = document(TEXT)
    whole = [score_mixed(MixedScorer(model), ids[:n], window=32, stride=8)[1].nats for n in (200, 300)]
    other = ids.copy()
    other[200:] = ids[200:][::-1]
    again = [score_mixed(MixedScorer(model), other[:n], window=32, stride=8)[1].nats for n in (200, 300)]
    assert again[0] == pytest.approx(whole[0], rel=1e-4)
    assert again[1] != pytest.approx(whole[1], rel=1e-2)


def test_bytes_that_the_model_gives_no_probability_have_a_price_nevertheless() -> None:
    """Also where floats below the least normal one are 0, as on GPUs."""
    certain = random_model(small_config(model={"logit_softcap": 3000.0}), strength=8.0)
    torch.set_flush_denormal(True)
    try:
        plain, mixed = score_mixed(MixedScorer(certain), document(TEXT), window=32, stride=8)
    finally:
        torch.set_flush_denormal(False)
    assert plain.nats > 50 * plain.num_bytes
    assert mixed.nats < 8 * 12 * mixed.num_bytes


def test_progress_ends_at_the_number_of_targets(model: ByteLM) -> None:
    ids, seen = document(TEXT), list[int]()
    ids[100] = BOS
    score_mixed(MixedScorer(model), ids, window=32, stride=8, batch_ids=64, on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(ids) - 1


@pytest.mark.compiled
def test_compiled_code_says_the_same(model: ByteLM) -> None:
    """As on a GPU; all windows are of one shape, for each one is compiled."""
    ids = document(TEXT[:384])
    ids[100] = BOS
    plain, compiled = (
        score_mixed(MixedScorer(model, compile=is_compiled), ids, window=32, stride=32)[1].nats
        for is_compiled in (False, True)
    )
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_text_that_repeats_itself_costs_less_mixed(model: ByteLM) -> None:
    plain, mixed = score_mixed(MixedScorer(model), document(TEXT * 4), window=32, stride=8)
    assert bits_from_nats(mixed.nats) < 0.45 * bits_from_nats(plain.nats)
    assert mixed.bpb < plain.bpb


def test_text_of_nothing_but_documents_costs_what_the_model_says(model: ByteLM) -> None:
    plain, mixed = score_mixed(MixedScorer(model), np.full(20, BOS, np.uint16), window=32, stride=8)
    assert mixed.nats == plain.nats == plain.nats_of_bos
    assert plain.num_bytes == 0
