"""The behaviour of a model and of an evaluator, tried out: causality, normalisation, every target once, order, round trip.

Each check takes what it needs as a function, so that it works on a ByteLM as well as on anyone's model wrapped in
`ids -> logits`, and so that a test can break exactly that one thing. None of them trusts a name or a comment.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bytejepa.config import RunConfig
from bytejepa.data.vocabulary import VOCABULARY_SIZE
from bytejepa.model.blocked_attention import BLOCK
from bytejepa.model.transformer import ByteLM
from bytejepa.review.findings import Evidence, Finding, Status, Weight

Logits = Callable[[Tensor], Tensor]
"""ids (B, T) int64 -> logits of the next id (B, T, V)."""
Predictions = Callable[[Tensor], Tensor]
"""ids (B, T) int64 -> what a model makes of them, in any shape."""
TOLERANCE = 1e-4
"""Largest difference of logits that counts as rounding: float32, sums in another order."""
AFFORDABLE = 5e11
"""Multiplications that trying changed bytes in whole windows may take: about half a minute of one core."""
LEAST_POSITIONS = 12
"""Places in whole windows that are tried, however large the model."""
GRADIENT_STEPS = 4
"""Steps after which a branch that starts at zero has passed a gradient on to what feeds it."""


class WindowLike(Protocol):
    """What an evaluation prices in one pass: `begin`, `length`, and the last `scored` targets."""

    @property
    def begin(self) -> int: ...  # noqa: D102
    @property
    def length(self) -> int: ...  # noqa: D102
    @property
    def scored(self) -> int: ...  # noqa: D102


def _finding(check: str, problem: str, good: str, evidence: Iterable[str] = ()) -> Finding:
    status = Status.FAIL if problem else Status.PASS
    return Finding(
        check=f"behaviour.{check}",
        status=status,
        summary=problem or good,
        evidence=tuple(Evidence(text=t) for t in evidence),
    )


def probe_ids(batch: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Return ids that look like text to a byte model: a BOS, then printable bytes; (batch, length) int64."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(36, min(126, vocabulary), (batch, length), generator=random)
    ids[:, 0] = 1
    return ids


def positions_to_try(length: int, distances: Sequence[int], at_most: int | None = None) -> list[int]:
    """Return the positions whose change is tried, the most telling first: borders, the ends, both sides of the borders.

    A model or an evaluator has borders at the multiples of each of `distances`: chunks, blocks, windows, strides. Of each
    kind the first, the last, the middle one and the second are tried.
    """
    borders = [
        border
        for distance in distances
        for border in (distance, (length - 1) // distance * distance, length // 2 // distance * distance, 2 * distance)
    ]
    sides = [border + side for border in borders for side in (-1, 1)]
    wanted = dict.fromkeys((*borders, length - 1, length - 2, 1, length // 2, *sides))  # in this order, each once
    return [position for position in wanted if 0 < position < length][:at_most]


@torch.no_grad()
def future_change(
    logits: Logits,
    *,
    length: int,
    vocabulary: int = VOCABULARY_SIZE,
    distances: Sequence[int] = (8,),
    at_most: int | None = None,
    batch_ids: int = 65_536,
) -> Finding:
    """Judge whether a change of the byte at a position leaves every earlier prediction as it was (C1).

    `distances` and `at_most` as in `positions_to_try`; `batch_ids`: ids a forward pass.
    """
    ids = probe_ids(1, length, vocabulary)
    positions = positions_to_try(length, distances, at_most)
    before = logits(ids)[0].float()
    leaks = []
    for batch in torch.tensor(positions).split(max(1, batch_ids // length)):
        changed = ids.repeat(len(batch), 1)
        changed[torch.arange(len(batch)), batch] = 5 + (ids[0, batch] + 31) % (vocabulary - 10)
        for position, after in zip(batch.tolist(), logits(changed), strict=True):
            # the logits at p - 1 predict the id at p, so they must not know it
            difference = (after[:position].float() - before[:position]).abs().amax(dim=-1)
            if float(difference.max()) > TOLERANCE:
                first = int((difference > TOLERANCE).nonzero()[0])
                leaks.append(f"a change at {position} moves the prediction at {first} by {float(difference.max()):.3g}")
    where = f"in a window of {length}"
    problem = f"{len(leaks)} of {len(positions)} changed bytes {where} alter earlier predictions" if leaks else ""
    good = f"{len(positions)} changed bytes {where} alter no earlier prediction"
    return _finding("future_change", problem, good, leaks[:6])


@torch.no_grad()
def normalised(probabilities: Logits, *, length: int, vocabulary: int = VOCABULARY_SIZE) -> Finding:
    """Judge whether the probabilities over the whole vocabulary are finite, not negative and sum to one (C2)."""
    table = probabilities(probe_ids(2, length, vocabulary)).double()
    problems = []
    if table.size(-1) != vocabulary:
        problems.append(f"{table.size(-1)} probabilities for {vocabulary} ids")
    if not bool(torch.isfinite(table).all()) or bool((table < 0).any()):
        problems.append("some are negative or not finite")
    off = float((table.sum(dim=-1) - 1).abs().max())
    if not off <= TOLERANCE:
        problems.append(f"they sum to 1 +- {off:.3g}")
    return _finding("normalised", "; ".join(problems), f"probabilities over {vocabulary} ids sum to one")


def scored_once(
    plan: Callable[[int, int, int], Iterable[WindowLike]], *, sizes: Sequence[tuple[int, int, int]] = ()
) -> Finding:
    """Judge by brute force whether a plan of windows prices every target exactly once.

    `plan(num_targets, window, stride)` yields windows; `sizes` are the triples tried, tails of every length by default.
    """
    tried = sizes or [
        (n, w, s) for w, s in ((16, 16), (16, 4), (16, 5), (16, 1)) for n in (1, 3, 15, 16, 17, 31, 64, 79, 100)
    ]
    problems = []
    for num_targets, window, stride in tried:
        counts = [0] * (num_targets + 1)
        for part in plan(num_targets, window, stride):
            last = part.begin + part.length
            for target in range(last - part.scored + 1, last + 1):
                if 0 < target <= num_targets:
                    counts[target] += 1
                else:
                    problems.append(
                        f"{num_targets} targets, window {window}, stride {stride}: target {target} does not exist"
                    )
        if twice := sum(count > 1 for count in counts[1:]):
            problems.append(f"{num_targets} targets, window {window}, stride {stride}: {twice} priced again")
        if never := counts[1:].count(0):
            problems.append(f"{num_targets} targets, window {window}, stride {stride}: {never} never priced")
    problem = f"{len(problems)} of {len(tried)} plans do not price every target once" if problems else ""
    return _finding("scored_once", problem, f"every target priced once in {len(tried)} plans", problems[:6])


@torch.no_grad()
def batch_order(losses: Callable[[Tensor], Tensor], *, length: int, vocabulary: int = VOCABULARY_SIZE) -> Finding:
    """Judge whether the loss of a sequence depends on the other sequences of its batch or on their order.

    `losses(ids)` returns the nats of ids (B, T): (B,) or (B, T - 1). The whole batch, each row alone, and the batch
    turned round are compared.
    """
    ids = probe_ids(4, length, vocabulary)
    whole = losses(ids).double()
    turned = losses(ids.flip(0)).double().flip(0)
    alone = torch.cat([losses(row[None]).double() for row in ids])
    worst = max(float((whole - turned).abs().max()), float((whole - alone).abs().max()))
    problem = (
        f"the loss of a sequence moves by {worst:.3g} nats with the batch around it"
        if worst > TOLERANCE * length
        else ""
    )
    return _finding("batch_order", problem, "losses do not depend on the batch around them")


def round_trip(
    export: Callable[[], Any],
    load: Callable[[Any], Predictions],
    reference: Predictions,
    *,
    length: int,
    vocabulary: int = VOCABULARY_SIZE,
) -> Finding:
    """Judge whether a model that was exported and loaded again predicts what the stored weights say.

    `export()` stores and returns where; `load(where)` returns a model from there; `reference` is the model whose
    weights were stored, after quantisation.
    """
    ids = probe_ids(1, length, vocabulary)
    with torch.no_grad():
        expected, loaded = reference(ids).double(), load(export())(ids).double()
    off = float((expected - loaded).abs().max())
    problem = "" if off <= TOLERANCE else f"what was loaded predicts otherwise than the stored weights, by {off:.3g}"
    return _finding("round_trip", problem, "export, load and predict agree")


def dead_parameters(
    model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], *, length: int, vocabulary: int = VOCABULARY_SIZE
) -> Finding:
    """Judge whether every parameter gets a gradient within a few steps; a copy of the model is trained, not the model.

    A note, not a rule: dead weight is allowed, it only costs bytes (the reference's BigramHash, spec section 7, item 1).
    """
    student = copy.deepcopy(model).train()
    largest = {name: 0.0 for name, parameter in student.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    for step in range(GRADIENT_STEPS):
        optimizer.zero_grad(set_to_none=True)
        loss(student, probe_ids(2, length, vocabulary, seed=step)).backward()
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                largest[name] = max(largest[name], float(parameter.grad.abs().max()))
        optimizer.step()
    dead = [name for name, value in largest.items() if value == 0.0]
    count = sum(parameter.numel() for name, parameter in student.named_parameters() if name in dead)
    evidence = tuple(Evidence(text=name) for name in dead[:12])
    if dead:
        summary = f"{len(dead)} tensors with {count:,} numbers never get a gradient"
        return Finding(
            check="behaviour.dead_parameters",
            status=Status.FAIL,
            weight=Weight.NOTE,
            summary=summary,
            evidence=evidence,
            figures={"dead_numbers": count},
        )
    return Finding(check="behaviour.dead_parameters", status=Status.PASS, summary="every parameter gets a gradient")


def byte_model_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return everything a ByteLM can be trained with, in one scalar: bytes, latents, extra heads."""
    assert isinstance(model, ByteLM)
    losses = model.losses(ids[:, :-1], ids[:, 1:])
    return losses.ce + losses.jepa_prediction + losses.sigreg + losses.next_bytes + losses.multi_token


def border_distances(config: RunConfig) -> list[int]:
    """Return the distances at which one of our models, or its evaluation, has borders, in ids."""
    model = config.model
    distances = [config.evaluation.stride_bytes, BLOCK, config.jepa.chunk_bytes]
    distances += [model.chunk_stride_bytes] if model.chunk_blocks is not None else []
    distances += [window for window in model.attention_windows or () if window > 0]
    return list(dict.fromkeys(distances))


def model_findings(model: ByteLM) -> list[Finding]:
    """Return the behavioural findings about one of our models and our own plan of windows.

    Changed bytes are tried in a short window, and in as many places as AFFORDABLE allows in the evaluation's own.
    """
    from bytejepa.scoring.windows import plan_windows

    config = model.config
    window, distances = config.evaluation.window_bytes, border_distances(config)
    length = min(window, max(64, 8 * config.jepa.chunk_bytes + 5))
    at_once = int(AFFORDABLE / (window * sum(parameter.numel() for parameter in model.parameters())))

    def losses(ids: Tensor) -> Tensor:
        logits = model.logits(ids[:, :-1])
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    return [
        *(
            future_change(model.logits, length=n, distances=distances, at_most=at_most)
            for n, at_most in {length: None, window: max(LEAST_POSITIONS, at_once)}.items()
        ),
        normalised(lambda ids: model.logits(ids).softmax(dim=-1), length=length),
        scored_once(lambda num_targets, window, stride: plan_windows(num_targets, window=window, stride=stride)),
        batch_order(losses, length=length),
        dead_parameters(model, byte_model_loss, length=length),
    ]
