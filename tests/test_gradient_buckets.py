"""Gradients averaged in buckets: when they leave, what arrives. Real messages are sent in promises/test_ranks.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bytejepa.config import RunConfig, replace
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM
from bytejepa.training.distributed import Ranks
from bytejepa.training.gradient_buckets import GradientBuckets, backward_order
from bytejepa.training.gradient_step import GradientStep
from bytejepa.training.muon import Muon


class Message:
    """A message of a pretended second rank that has the same gradients; it arrives when it is waited for."""

    def __init__(self, events: list[str], values: Tensor) -> None:
        self.events, self.values = events, values

    def wait(self) -> None:
        self.events.append("wait")
        self.values *= 2


class TwoRanks(Ranks):
    """Rank 0 of two, without the other one."""

    events: list[str] = []  # noqa: RUF012 - replaced for each test

    def start_sum(self, values: Tensor) -> Message:
        self.events.append(f"send {values.numel()}")
        return Message(self.events, values)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> TwoRanks:
    monkeypatch.setattr(TwoRanks, "events", [])
    return TwoRanks(rank=0, world_size=2)


def gradients(config: RunConfig, ranks: Ranks, *, jepa_lambda: float = 0.1, **settings: Any) -> dict[str, Tensor]:
    model = initialize(ByteLM(config), 0)
    buckets = GradientBuckets(backward_order(model), ranks, **settings)
    if isinstance(ranks, TwoRanks):
        model.token_embedding.weight.register_hook(lambda _: ranks.events.append("embedding"))
    ids = torch.randint(4, 260, (4, 65), generator=torch.Generator().manual_seed(0))
    GradientStep(model, config, compile=False, buckets=buckets)(ids[:, :-1], ids[:, 1:], jepa_lambda=jepa_lambda)
    buckets.finish()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def test_every_parameter_is_in_a_bucket_once(minimal_config: RunConfig, ranks: TwoRanks) -> None:
    model = ByteLM(minimal_config)
    buckets = GradientBuckets(backward_order(model), ranks, bucket_bytes=20_000).buckets
    held = [id(p) for bucket in buckets for p in bucket.parameters]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert len(buckets) > 4
    large = [b for b in buckets if b.flat.numel() * 4 > 20_000 + 128 * len(b.parameters)]
    assert all(len(bucket.parameters) == 1 for bucket in large)


@pytest.mark.parametrize("jepa_lambda", [0.1, 0.0])
@pytest.mark.parametrize("micro_batch_bytes", [None, 128])
def test_ranks_that_agree_get_the_gradients_of_one(
    minimal_config: RunConfig, ranks: TwoRanks, jepa_lambda: float, micro_batch_bytes: int | None
) -> None:
    config = replace(minimal_config, data={"micro_batch_bytes": micro_batch_bytes}, jepa={"gradient": "detached"})
    averaged = gradients(config, ranks, jepa_lambda=jepa_lambda)
    for name, alone in gradients(config, Ranks(), jepa_lambda=jepa_lambda).items():
        torch.testing.assert_close(averaged[name], alone, rtol=0, atol=0)


@pytest.mark.parametrize("jepa_lambda", [0.1, 0.0])
@pytest.mark.parametrize("micro_batch_bytes", [None, 128])
def test_gradients_leave_before_the_backward_pass_ends_and_once(
    minimal_config: RunConfig, ranks: TwoRanks, jepa_lambda: float, micro_batch_bytes: int | None
) -> None:
    config = replace(minimal_config, data={"micro_batch_bytes": micro_batch_bytes}, jepa={"gradient": "detached"})
    gradients(config, ranks, jepa_lambda=jepa_lambda, bucket_bytes=20_000)
    events = ranks.events
    *earlier_ends, last_end = [place for place, event in enumerate(events) if event == "embedding"]
    sent = [place for place, event in enumerate(events) if event.startswith("send")]
    assert len(earlier_ends) == (1 if micro_batch_bytes else 0)
    assert all(end < sent[0] for end in earlier_ends)  # only the last micro-batch sends
    assert sum(place < last_end for place in sent) >= 3
    assert events.index("wait") > sent[-1]
    assert events.count("wait") == len(sent)


def test_what_a_step_leaves_out_changes_no_order(minimal_config: RunConfig, ranks: TwoRanks) -> None:
    orders = []
    for jepa_lambda in (0.1, 0.0):
        ranks.events.clear()
        gradients(
            replace(minimal_config, jepa={"gradient": "detached"}), ranks, jepa_lambda=jepa_lambda, bucket_bytes=5000
        )
        orders.append([event for event in ranks.events if event.startswith("send")])
    assert orders[0] == orders[1]


def test_dtypes_travel_apart(ranks: TwoRanks) -> None:
    parameters = [torch.nn.Parameter(torch.ones(5, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float32)]
    buckets = GradientBuckets(parameters, ranks)
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number)
    buckets.finish()
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[float(n)] * 5 for n in range(3)]
    assert [p.grad.dtype for p in parameters if p.grad is not None] == [p.dtype for p in parameters]


def test_muon_computes_every_share_before_it_waits_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Gathering:
        def __init__(self, mine: Tensor, count: int) -> None:
            self.gathered = torch.cat((mine, mine))[:count]

        def wait(self) -> Tensor:
            events.append("wait")
            return self.gathered

    def send(_: Ranks, mine: Tensor, count: int) -> Gathering:
        events.append("send")
        return Gathering(mine, count)

    monkeypatch.setattr(Ranks, "all_gather_shares", send)
    shapes = [(8, 8), (8, 8), (8, 16), (16, 8), (4, 8), (4, 8)]
    named = [(str(number), torch.nn.Parameter(torch.ones(shape))) for number, shape in enumerate(shapes)]
    muon = Muon(named, learning_rate=0.1, weight_decay=0.0, ranks=Ranks(world_size=2))
    for _, parameter in named:
        parameter.grad = torch.eye(max(parameter.shape))[: parameter.size(0), : parameter.size(1)]
    muon.finish(muon.start(momentum=0.9, clip=torch.tensor(1.0)), learning_rate_scale=1.0)
    assert events == ["send"] * len(set(shapes)) + ["wait"] * len(set(shapes))
