"""Character substitution: one symbol for another throughout, reproducibly, and nothing else."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bytejepa.config import DataConfig
from bytejepa.data.augmentation import random_character, substitute_character
from bytejepa.data.loader import IdStream, Loader
from bytejepa.data.vocabulary import BOS, BYTE_OFFSET, ids_from_bytes


def text_of(ids: np.ndarray) -> bytes:
    return bytes((ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8))


@given(seed=st.integers(0, 10_000))
def test_a_random_character_is_one_character_of_two_or_three_bytes(seed: int) -> None:
    character = random_character(np.random.default_rng(seed))
    assert len(character) in (2, 3)
    assert len(character.decode("utf-8")) == 1


@given(data=st.binary(min_size=1, max_size=80).map(lambda b: bytes(x % 128 for x in b)), seed=st.integers(0, 1000))
def test_one_value_is_replaced_throughout(data: bytes, seed: int) -> None:
    ids = ids_from_bytes(data)
    changed = substitute_character(ids, np.random.default_rng(seed))
    assert changed.dtype == ids.dtype
    assert len(changed) == len(ids)
    fresh = [byte for byte in text_of(changed) if byte >= 128]
    assert fresh, "a byte that occurs was to be replaced"
    candidates = [
        data.replace(bytes([value]), character)[: len(data)]
        for value in set(data)
        for character in (bytes(fresh[:2]), bytes(fresh[:3]), bytes(fresh[:1]))
    ]
    assert text_of(changed) in candidates


def test_specials_stay() -> None:
    ids = np.concatenate(([BOS], ids_from_bytes(b"aaaa"), [BOS])).astype(np.uint16)
    changed = substitute_character(ids, np.random.default_rng(0))
    assert changed[0] == BOS
    assert np.array_equal(substitute_character(ids[:1], np.random.default_rng(0)), ids[:1])


def test_the_share_is_kept_and_rank_count_changes_nothing() -> None:
    text = ids_from_bytes(b"the quick brown fox jumps over the lazy dog. " * 400)
    config = DataConfig(sequence_bytes=32, batch_bytes=512, character_substitution=0.25)

    def rows(rank: int, world_size: int, index: int) -> torch.Tensor:
        made = Loader(IdStream([text]), config, seed=3, rank=rank, world_size=world_size, device=torch.device("cpu"))
        inputs, targets = made.batch(0, index)
        made.close()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        return inputs

    whole = torch.cat([rows(0, 1, index) for index in range(8)])
    share = (whole >= BYTE_OFFSET + 128).any(1).float().mean().item()
    assert 0.1 < share < 0.4
    assert torch.equal(torch.cat([rows(rank, 4, 5) for rank in range(4)]), rows(0, 1, 5))
