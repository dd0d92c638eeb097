"""Batches: every sequence of an epoch once, the reference's order to the id, the same for any number of ranks."""

import threading

import numpy as np
import pytest
import torch

from bytejepa.config import DataConfig
from bytejepa.data.loader import IdStream, Loader
from bytejepa.errors import DataError


def stream(*lengths: int) -> IdStream:
    ids = 4 + np.arange(sum(lengths)) % 256
    return IdStream([part.astype(np.uint16) for part in np.split(ids, np.cumsum(lengths)[:-1])])


def loader(ids: IdStream, config: DataConfig, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> Loader:
    return Loader(ids, config, seed=seed, rank=rank, world_size=world_size, device=torch.device("cpu"))


def test_reading_crosses_shards_and_wraps_around() -> None:
    ids = stream(5, 3, 4)
    whole = ids.read(0, 12)
    assert np.array_equal(ids.read(3, 6), whole[3:9])
    assert np.array_equal(ids.read(10, 5), np.concatenate((whole[10:], whole[:3])))
    assert np.array_equal(ids.read(12 * 7 + 2, 30), np.tile(whole, 4)[2:32])


def test_targets_are_the_inputs_one_id_later() -> None:
    made = loader(stream(1000), DataConfig(sequence_bytes=16, batch_bytes=64))
    inputs, targets = made.batch(0, 3)
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    made.close()


def test_sequential_order_is_the_reference_s() -> None:
    # spec section 4: each step takes world * (local + 1) ids, rank r its slice, inputs all but the last id
    config = DataConfig(sequence_bytes=8, batch_bytes=64, order="sequential", num_streams=2)
    made = loader(stream(5000), config)
    flat = made.stream.read(0, 1000).astype(np.int64)
    step, local = 3, 32
    span = flat[step * 2 * (local + 1) :][: 2 * (local + 1)].reshape(2, local + 1)
    inputs, targets = made.batch(0, step)
    assert np.array_equal(inputs.numpy(), span[:, :-1].reshape(8, 8))
    assert np.array_equal(targets.numpy(), span[:, 1:].reshape(8, 8))
    made.close()


def test_shuffled_reads_each_sequence_of_an_epoch_once_then_another_order() -> None:
    config = DataConfig(sequence_bytes=10, batch_bytes=40)
    made = loader(stream(423), config)
    num_sequences = (423 - 1 - 9) // 10
    starts = [start for index in range(-(-3 * num_sequences // 4)) for start in made.sequence_starts(0, index)]
    epochs = [starts[i * num_sequences : (i + 1) * num_sequences] for i in range(3)]
    for epoch in epochs:
        phase = min(epoch)
        assert sorted(epoch) == [phase + 10 * i for i in range(num_sequences)]
        assert max(epoch) + 11 <= 423
    assert epochs[0] != epochs[1]
    made.close()


def test_order_is_a_function_of_the_seed() -> None:
    config = DataConfig(sequence_bytes=10, batch_bytes=40)
    first, same, other = (loader(stream(4000), config, seed=seed).sequence_starts(0, 7) for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_what_one_reads(world_size: int) -> None:
    config = DataConfig(sequence_bytes=10, batch_bytes=80)
    whole, _ = loader(stream(4000), config).batch(0, 5)
    parts = [loader(stream(4000), config, rank=r, world_size=world_size).batch(0, 5)[0] for r in range(world_size)]
    assert torch.equal(torch.cat(parts), whole)


def test_prefetching_changes_nothing() -> None:
    config = DataConfig(sequence_bytes=10, batch_bytes=40)
    ahead, alone = loader(stream(4000), config), loader(stream(4000), config)
    for index in (0, 1, 2, 7, 8, 3):
        assert torch.equal(ahead.batch(0, index)[0], alone.make(0, index)[0])


def test_the_next_batch_is_made_in_a_thread_while_this_one_is_used() -> None:
    batches, makers = loader(stream(4000), DataConfig(sequence_bytes=10, batch_bytes=40)), []
    make = batches.make

    def noticed(stage: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        makers.append((index, threading.current_thread().name.partition("_")[0]))
        return make(stage, index)

    batches.make = noticed  # type: ignore[method-assign]
    for index in range(4):
        batches.batch(0, index)
    batches._worker.shutdown()
    assert makers[0] == (0, "MainThread")
    assert makers[1:] == [(index, "loader") for index in range(1, 5)]


def test_what_a_gpu_will_copy_is_pinned_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Size] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batches = loader(stream(4000), DataConfig(sequence_bytes=10, batch_bytes=40))
    batches.make(0, 0)
    assert pinned == []
    batches.device = torch.device("cuda")
    batches.make(0, 0)
    assert pinned == [(4, 10), (4, 10)]


def test_stages_have_their_own_lengths() -> None:
    config = DataConfig(sequence_bytes=8, batch_bytes=64, sequence_growth=((0.5, 16),))
    made = loader(stream(4000), config)
    assert made.batch(0, 0)[0].shape == (8, 8)
    assert made.batch(1, 0)[0].shape == (4, 16)


def test_too_little_text_and_foreign_ids_are_refused() -> None:
    config = DataConfig(sequence_bytes=64, batch_bytes=64)
    with pytest.raises(DataError, match="64 ids, a sequence needs 65"):
        loader(stream(64), config)
    foreign = IdStream([np.full(1000, 999, dtype=np.uint16)])
    with pytest.raises(DataError, match="id 999"):
        loader(foreign, config).batch(0, 0)
