"""The incremental engine against the full forward pass: every option, every border, every way to cut the input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from bytejepa.config import RunConfig, replace
from bytejepa.data.vocabulary import BOS, VOCABULARY_SIZE
from bytejepa.errors import ConfigError
from bytejepa.inference.engine import Engine
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import tiny
from bytejepa.scoring.evaluate import Scorer, target_losses

torch.set_num_threads(1)

TOLERANCE = 1e-4
WINDOW, HOP, CHUNK = 48, 16, 8

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "no jepa": {"jepa": {"enabled": False}},
    "no injection": {"jepa": {"inject": False}},
    "windows": {"model": {"attention_windows": (5, 0, 3, 16, 1)}},
    "one window for all": {"model": {"attention_windows": (9,)}},
    "documents": {"model": {"document_masking": True}},
    "documents and windows": {"model": {"document_masking": True, "attention_windows": (5, 0, 3, 16, 1)}},
    "documents, no jepa": {"model": {"document_masking": True}, "jepa": {"enabled": False}},
    "no bigram": {"model": {"bigram_rows": None}},
    "exact pairs": {"model": {"bigram_table": "exact", "bigram_rows": 65_537}},
    "n-grams": {"model": {"ngram_orders": (3, 5), "ngram_rows": 50, "ngram_dim": 6}},
    "documents and n-grams": {"model": {"document_masking": True, "ngram_orders": (3, 4, 6), "bigram_rows": None}},
    "input smear": {"model": {"smear_gate": "input"}},
    "gated skips": {"model": {"skip_gates": True}},
    "parallel": {"model": {"parallel_last_layers": 3}},
    "gated heads": {"model": {"attention_gate_dims": 12}},
    "value embeddings": {"model": {"value_embedding_last_layers": 3}},
    "recurrence": {"model": {"recurrent_layers": (2, 3), "attention_windows": (5, 0, 3, 16, 1)}},
    "chunk blocks": {"model": {"chunk_blocks": (1, 2)}},
    "chunk blocks, stride 5": {"model": {"chunk_blocks": (0, 3), "chunk_stride_bytes": 5}},
    "chunk blocks and windows": {
        "model": {"chunk_blocks": (1, 2), "chunk_stride_bytes": 3, "attention_windows": (5, 0, 12, 16, 1)}
    },
    "documents and chunk blocks": {"model": {"document_masking": True, "chunk_blocks": (1, 2)}},
    "chunk blocks and every technique": {
        "model": {
            "num_layers": 6,
            "chunk_blocks": (1, 4),
            "chunk_stride_bytes": 3,
            "document_masking": True,
            "smear_gate": "input",
            "skip_gates": True,
            "parallel_last_layers": 3,
            "attention_gate_dims": 12,
            "attention_windows": (0, 9, 0, 5, 20, 0),
            "value_embedding_last_layers": 4,
            "recurrent_layers": (2, 3),
            "ngram_orders": (3, 4),
            "xsa_last_layers": 5,
        }
    },
    "every technique": {
        "model": {
            "document_masking": True,
            "smear_gate": "input",
            "skip_gates": True,
            "parallel_last_layers": 2,
            "attention_gate_dims": 12,
            "value_embedding_last_layers": 2,
            "recurrent_layers": (1, 4),
            "ngram_orders": (3, 4),
            "xsa_last_layers": 5,
        }
    },
    "no smear": {"model": {"smear": False}},
    "no skips": {"model": {"skip_connections": False}},
    "no mix, no depth scale": {"model": {"residual_mix": False, "depth_scaled_norm": False}},
    "all dimensions rotate": {"model": {"rotary_dims": None}},
    "detached": {"jepa": {"gradient": "detached"}},
    "causal context": {"jepa": {"context": "causal"}},
    "documents and causal context": {"model": {"document_masking": True}, "jepa": {"context": "causal"}},
    "horizons and next bytes": {"jepa": {"horizons": 2, "next_bytes_weight": 0.1}},
    "odd chunk": {"jepa": {"chunk_bytes": 16}},
    "one key head": {"model": {"num_kv_heads": 1}},
    "as many key heads": {"model": {"num_kv_heads": 4}},
}


def small_config(**changes: dict[str, Any]) -> RunConfig:
    base = replace(
        tiny(),
        model={
            "num_layers": 5,
            "num_heads": 4,
            "num_kv_heads": 2,
            "model_dim": 32,
            "xsa_last_layers": 2,
            "bigram_rows": 61,
            "bigram_dim": 8,
            "rotary_dims": 4,
            "rotary_length_bytes": 64,
        },
        jepa={"latent_dim": 12, "hidden_dim": 20, "sigreg_directions": 4, "chunk_bytes": CHUNK},
        data={"sequence_bytes": 64, "sequence_growth": None},
        evaluation={"window_bytes": WINDOW, "stride_bytes": HOP},
    )
    return replace(base, **changes)


def random_model(seed: int = 0, **changes: dict[str, Any]) -> ByteLM:
    """A model in which every part matters: all weights random, gates open, injection far from zero."""
    model = ByteLM(small_config(**changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if parameter.ndim < 2 or "embedding" in name or "jepa" in name else parameter.size(-1) ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(
                noise if parameter.ndim == 2 and "mix" not in name and "skip" not in name else 1 + 0.3 * noise
            )
    return model


def random_ids(lanes: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ids with documents that begin within, at the border of, and twice in a chunk."""
    ids = torch.randint(4, VOCABULARY_SIZE, (lanes, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    for lane in range(lanes):
        for position in (3, 8 + lane, 16, 21, 22, 23, 40 + 3 * lane, 64, 77):
            if position < length:
                ids[lane, position] = BOS
    return ids


def expected_logits(model: ByteLM, ids: torch.Tensor, *, window: int, hop: int, known_length: bool) -> torch.Tensor:
    """The engine's stated rule, by full forward passes over its windows."""
    length, P = ids.size(1), model.config.jepa.chunk_bytes
    # unknown length: the text goes on to the end of the chunk; what follows cannot matter, where it ends can
    followed = ids if known_length else torch.nn.functional.pad(ids, (0, -length % P), value=5)
    windows: dict[int, torch.Tensor] = {}
    rows = []
    for t in range(length):
        begin = 0
        while t - begin >= window:
            begin += hop
        if begin not in windows:
            windows[begin] = model.logits(followed[:, begin : begin + window])
        rows.append(windows[begin][:, t - begin])
    return torch.stack(rows, dim=1)


def fed(engine: Engine, ids: torch.Tensor, cuts: list[int], num_ids: int | None = None) -> torch.Tensor:
    state = engine.start(num_lanes=ids.size(0), num_ids=num_ids)
    borders = [0, *cuts, ids.size(1)]
    return torch.cat([engine.feed(state, ids[:, a:b]) for a, b in itertools.pairwise(borders)], dim=1)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("known_length", [False, True])
@torch.no_grad()
def test_every_option_agrees_with_the_full_forward_pass(option: str, known_length: bool) -> None:
    model = random_model(**OPTIONS[option])
    length = 93  # past the window three times, ragged
    ids = random_ids(2, length)
    expected = expected_logits(model, ids, window=WINDOW, hop=HOP, known_length=known_length)
    engine = Engine(model)
    num_ids = length if known_length else None
    for cuts in ([], list(range(1, length)), [1, 2, 9, 20, 47, 48, 49, 64, 90]):
        actual = fed(engine, ids, cuts, num_ids)
        assert (actual - expected).abs().max() < TOLERANCE, f"cut at {cuts[:3]}..."


@pytest.mark.parametrize("length", [8, 9, 15, 16, 17, 47, 48, 49, 63, 64, 65])
@torch.no_grad()
def test_ragged_ends_agree_where_the_length_is_known(length: int) -> None:
    model = random_model()
    ids = random_ids(1, length)
    actual = fed(Engine(model), ids, list(range(1, length)), num_ids=length)
    expected = expected_logits(model, ids, window=WINDOW, hop=HOP, known_length=True)
    assert (actual - expected).abs().max() < TOLERANCE
    if length <= WINDOW:
        assert (actual - model.logits(ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize("length", [1, 7])
@torch.no_grad()
def test_text_shorter_than_a_chunk_gets_no_injection(length: int) -> None:
    model = random_model()
    ids = random_ids(1, length)
    actual = fed(Engine(model), ids, list(range(1, length)), num_ids=length)
    without = random_model(jepa={"inject": False})
    without.load_state_dict(model.state_dict())
    assert (actual - without.logits(ids)).abs().max() < TOLERANCE


@torch.no_grad()
def test_the_cut_chunk_depends_on_the_length() -> None:
    """The promise above is not empty: without the length the last chunk differs, and only it."""
    model = random_model()
    ids = random_ids(1, 21)
    difference = (fed(Engine(model), ids, []) - model.logits(ids)).abs().amax(dim=(0, 2))
    assert difference[:16].max() < TOLERANCE
    assert difference[16:].min() > 100 * TOLERANCE


@pytest.mark.parametrize(("window", "hop"), [(48, 8), (48, 48), (16, 8), (64, 32), (40, 24)])
@torch.no_grad()
def test_known_length_gives_the_losses_of_sliding_evaluation(window: int, hop: int) -> None:
    model = random_model()
    ids = random_ids(1, 142)
    logits = fed(Engine(model, window=window, hop=hop), ids[:, :-1], [30], num_ids=141)
    actual = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
    scorer = Scorer(model)
    parts = target_losses(scorer, ids[0].numpy().astype(np.uint16), window=window, stride=hop)
    expected = torch.cat([losses.flatten() for _, losses in parts])
    assert (actual - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_prefill_skips_windows_and_changes_nothing() -> None:
    model = random_model()
    ids = random_ids(2, 200)
    engine = Engine(model)
    for length in (1, 48, 49, 64, 65, 130):
        whole, short = engine.start(num_lanes=2), engine.start(num_lanes=2)
        expected = engine.feed(whole, ids[:, :length])[:, -1]
        assert (engine.prefill(short, ids[:, :length]) - expected).abs().max() < TOLERANCE
        assert (short.begin, short.position) == (whole.begin, whole.position)
        following = ids[:, length : length + 60]
        assert (engine.feed(short, following) - engine.feed(whole, following)).abs().max() < TOLERANCE


@pytest.mark.parametrize("chunk_blocks", [None, (1, 2)])
@torch.no_grad()
def test_lanes_are_independent_and_can_be_forked_and_dropped(chunk_blocks: tuple[int, int] | None) -> None:
    model = random_model(model={"document_masking": True, "chunk_blocks": chunk_blocks})
    engine = Engine(model)
    ids = random_ids(4, 70)
    together = fed(engine, ids, list(range(1, 70)))
    alone = torch.cat([fed(engine, ids[lane : lane + 1], []) for lane in range(4)])
    assert (together - alone).abs().max() < TOLERANCE

    state = engine.start(num_lanes=4)
    engine.feed(state, ids[:, :30])
    fork = engine.select(state, [2, 0, 2])
    after = engine.feed(fork, ids[[2, 0, 2], 30:])
    assert (after - together[[2, 0, 2], 30:]).abs().max() < TOLERANCE
    assert (engine.feed(state, ids[:, 30:]) - together[:, 30:]).abs().max() < TOLERANCE, "a fork shares nothing"


@torch.no_grad()
def test_buffers_are_allocated_once() -> None:
    model = random_model()
    engine = Engine(model)
    state = engine.start(num_lanes=2)
    tensors = [state.window_ids, state.smear_previous, *(t for c in state.blocks for t in (c.keys, c.values))]
    addresses = [tensor.data_ptr() for tensor in tensors]
    for column in random_ids(2, 120).T:
        engine.step(state, column)
    now = [state.window_ids, state.smear_previous, *(t for c in state.blocks for t in (c.keys, c.values))]
    assert [tensor.data_ptr() for tensor in now] == addresses
    assert state.num_fed == 120


@torch.no_grad()
def test_chunk_blocks_run_and_keep_keys_once_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(random_model(model={"chunk_blocks": (1, 2), "chunk_stride_bytes": 4}))
    state = engine.start()
    assert [cache.keys.size(2) for cache in state.blocks] == [WINDOW, WINDOW // 4, WINDOW // 4, WINDOW, WINDOW]
    passes: list[int] = []
    run_block = engine._block
    monkeypatch.setattr(engine, "_block", lambda *given: passes.append(1) or run_block(*given))
    per_step = []
    for column in random_ids(1, 9).T:
        passes.clear()
        engine.step(state, column)
        per_step.append(len(passes))
    assert per_step == [3, 3, 3, 5, 3, 3, 3, 5, 3]


def test_long_blocks_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    ids = random_ids(2, 90)
    expected = fed(Engine(model), ids, [])
    monkeypatch.setattr("bytejepa.inference.engine.BLOCK_POSITIONS", 5)
    assert (fed(Engine(model), ids, []) - expected).abs().max() < TOLERANCE


def test_feeding_nothing_gives_nothing() -> None:
    engine = Engine(random_model())
    state = engine.start(num_lanes=3)
    assert engine.feed(state, torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0, VOCABULARY_SIZE)
    with pytest.raises(ConfigError, match="at least one id"):
        engine.prefill(state, torch.zeros(3, 0, dtype=torch.int64))
    with pytest.raises(ConfigError, match="3 lanes, got 2"):
        engine.feed(state, torch.zeros(2, 1, dtype=torch.int64))


def test_impossible_windows_are_refused() -> None:
    model = random_model()
    for window, hop, match in (
        (65, 8, "rotary_length_bytes 64"),
        (48, 49, "hop"),
        (48, 12, "chunk_bytes 8"),
        (44, 8, "chunk_bytes 8"),
        (0, 8, "window"),
    ):
        with pytest.raises(ConfigError, match=match):
            Engine(model, window=window, hop=hop)
    free = random_model(jepa={"enabled": False})
    assert (Engine(free, window=47, hop=11).window, Engine(free).hop) == (47, HOP)


def test_the_default_window_stays_within_the_rotary_tables() -> None:
    config = small_config(model={"rotary_length_bytes": 44})
    model = ByteLM(config)
    assert Engine(model).window == 40


def test_the_engine_keeps_its_own_weights() -> None:
    model = random_model()
    ids = random_ids(1, 20)
    engine = Engine(model)
    before = fed(engine, ids, [])
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.zero_()
    assert torch.equal(fed(engine, ids, []), before)
    assert not torch.allclose(fed(Engine(model), ids, []), before)
