"""The whole model: every option against the explicit writing of it, causality, documents, pruning, losses."""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from bytejepa.benchmark.speed import flop_per_byte, matmul_parameters
from bytejepa.config import replace
from bytejepa.model.initialization import initialize
from bytejepa.model.quantization import stored_bits
from bytejepa.model.transformer import ByteLM
from bytejepa.training.distributed import Ranks
from bytejepa.training.optimizers import Optimizers, role_of
from explicit_model import explicit_logits, explicit_weights
from small_models import BOS, random_ids, small_config, small_model

EVERY_TECHNIQUE = {
    "document_masking": True, "smear_gate": "input", "skip_gates": True, "parallel_last_layers": 1,
    "attention_gate_dims": 12, "value_embedding_last_layers": 1, "recurrent_layers": (1, 2), "ngram_orders": (3, 4),
    "ngram_rows": 50, "xsa_last_layers": 3,
}  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no smear": {"model": {"smear": False}},
    "no bigram": {"model": {"bigram_rows": None}},
    "no residual mix": {"model": {"residual_mix": False}},
    "no skips": {"model": {"skip_connections": False}},
    "no depth scale": {"model": {"depth_scaled_norm": False}},
    "no xsa": {"model": {"xsa_last_layers": 0}},
    "xsa everywhere": {"model": {"xsa_last_layers": 3}},
    "all dimensions rotate": {"model": {"rotary_dims": None}},
    "two dimensions rotate": {"model": {"rotary_dims": 2}},
    "beyond the rotary length": {"model": {"rotary_length_bytes": 16}},
    "low softcap": {"model": {"logit_softcap": 2.0}},
    "one kv head": {"model": {"num_kv_heads": 1}},
    "kv heads as heads": {"model": {"num_kv_heads": 4}},
    "one layer": {"model": {"num_layers": 1}},
    "four layers": {"model": {"num_layers": 4}},
    "wide mlp": {"model": {"mlp_ratio": 3.5}},
    "one window": {"model": {"attention_windows": (6,)}},
    "windows by layer": {"model": {"attention_windows": (5, 0, 9)}},
    "exact pairs": {"model": {"bigram_table": "exact", "bigram_rows": 65_537, "bigram_dim": 4}},
    "n-grams": {"model": {"ngram_orders": (3, 5), "ngram_rows": 50, "ngram_dim": 6}},
    "n-grams alone": {"model": {"ngram_orders": (4,), "ngram_rows": 50, "bigram_rows": None}},
    "documents, n-grams, exact pairs": {
        "model": {
            "document_masking": True,
            "ngram_orders": (3, 4),
            "ngram_rows": 50,
            "bigram_table": "exact",
            "bigram_rows": 65_537,
            "bigram_dim": 4,
        }
    },
    "input smear": {"model": {"smear_gate": "input"}},
    "input smear of documents that are not masked": {"model": {"smear_gate": "input"}},
    "gated skips": {"model": {"skip_gates": True, "num_layers": 4}},
    "parallel": {"model": {"parallel_last_layers": 2}},
    "gated heads": {"model": {"attention_gate_dims": 5}},
    "value embeddings": {"model": {"value_embedding_last_layers": 2}},
    "recurrence": {"model": {"recurrent_layers": (1, 1)}},
    "recurrence to the end": {"model": {"recurrent_layers": (0, 2)}},
    "chunk blocks": {"model": {"num_layers": 4, "chunk_blocks": (1, 2)}},
    "chunk blocks of an odd number of layers, stride 3": {"model": {"chunk_blocks": (0, 1), "chunk_stride_bytes": 3}},
    "chunk blocks without skips": {"model": {"chunk_blocks": (1, 1), "skip_connections": False}},
    "chunk blocks beyond the rotary length": {"model": {"chunk_blocks": (0, 1), "rotary_length_bytes": 16}},
    "chunk blocks and windows": {
        "model": {"num_layers": 4, "chunk_blocks": (1, 2), "attention_windows": (5, 9, 3, 0), "chunk_stride_bytes": 2}
    },
    "documents and chunk blocks": {"model": {"num_layers": 4, "chunk_blocks": (1, 2), "document_masking": True}},
    "documents, chunk blocks and every technique": {
        "model": {
            **EVERY_TECHNIQUE,
            "num_layers": 4,
            "chunk_blocks": (1, 2),
            "chunk_stride_bytes": 3,
            "attention_windows": (0, 9, 0, 5),
            "value_embedding_last_layers": 3,
            "parallel_last_layers": 2,
        }
    },
    "documents and every technique": {"model": EVERY_TECHNIQUE},
    "documents": {"model": {"document_masking": True}},
    "documents and windows": {"model": {"document_masking": True, "attention_windows": (9, 5, 0)}},
    "documents, no jepa": {"model": {"document_masking": True}, "jepa": {"enabled": False}},
    "no jepa": {"jepa": {"enabled": False}},
    "no injection": {"jepa": {"inject": False}},
    "detached": {"jepa": {"gradient": "detached"}},
    "causal context": {"jepa": {"context": "causal"}},
    "documents, causal context": {"model": {"document_masking": True}, "jepa": {"context": "causal"}},
    "horizons and next bytes": {"jepa": {"horizons": 3, "next_bytes_weight": 0.1}},
    "chunks of one byte": {"jepa": {"chunk_bytes": 1}},
    "chunks of eight bytes": {"jepa": {"chunk_bytes": 8}},
}
some_options = st.sampled_from(sorted(OPTIONS))


def model_of(option: str) -> ByteLM:
    return _cached.setdefault(option, small_model(**OPTIONS[option]))


_cached: dict[str, ByteLM] = {}


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_and_gradients_are_those_of_the_explicit_writing(option: str) -> None:
    model = model_of(option)
    ids = random_ids(2, 27, documents="documents" in option)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    weights = explicit_weights(model)
    expected = explicit_logits(model.config, weights, inputs)
    torch.testing.assert_close(model.logits(inputs).double(), expected, rtol=0, atol=1e-4)
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    model.zero_grad()
    model.losses(inputs, targets).ce.backward()
    for name, parameter in model.named_parameters():
        given, oracle = parameter.grad, weights[name].grad
        if oracle is None:
            assert given is None or not given.any(), name
        else:
            assert given is not None, name
            error = (given.double() - oracle).norm().item()
            assert error <= 1e-4 * oracle.norm().item() + 1e-6, name


@pytest.mark.parametrize(
    "option",
    [
        "as it is", "documents", "documents and windows", "documents, no jepa", "windows by layer", "no jepa",
        "no injection", "chunks of one byte", "chunks of eight bytes", "one layer", "no skips", "beyond the rotary length",
        "documents, n-grams, exact pairs", "input smear", "gated skips", "parallel", "gated heads", "value embeddings",
        "recurrence", "recurrence to the end", "documents and every technique", "causal context",
        "documents, causal context", "horizons and next bytes", "chunk blocks", "chunk blocks and windows",
        "chunk blocks of an odd number of layers, stride 3", "documents, chunk blocks and every technique",
    ],
)  # fmt: skip
def test_tail_logits_are_the_tail_of_logits(option: str) -> None:
    model = model_of(option)
    for length in (1, 4, 7, 9, 21):
        ids = random_ids(2, length, seed=length, documents="documents" in option)
        with torch.no_grad():
            whole = model.logits(ids)
            for tail in range(1, length + 1):
                pruned = model.tail_logits(ids, tail)
                torch.testing.assert_close(pruned, whole[:, -tail:], rtol=0, atol=2e-5, msg=f"{length} ids, {tail}")


@given(option=some_options, length=st.integers(2, 40), data=st.data())
def test_no_logit_depends_on_a_later_byte(option: str, length: int, data: st.DataObject) -> None:
    model = model_of(option)
    place = data.draw(st.integers(0, length - 1), label="changed position")
    ids = random_ids(1, length, seed=length, documents="documents" in option)
    changed = ids.clone()
    changed[0, place] = data.draw(st.integers(4, 259).filter(lambda value: value != ids[0, place].item()))
    with torch.no_grad():
        before, after = model.logits(ids), model.logits(changed)
    assert (before[:, :place] - after[:, :place]).abs().max().item() < 1e-5 if place else True
    assert not torch.allclose(before[:, place], after[:, place], atol=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        "as it is", "documents", "chunks of eight bytes", "windows by layer", "chunk blocks", "documents and chunk blocks",
        "chunk blocks of an odd number of layers, stride 3",
    ],
)  # fmt: skip
def test_causality_around_every_chunk_border(option: str) -> None:
    model, P = model_of(option), model_of(option).config.jepa.chunk_bytes
    ids = random_ids(1, 4 * P, seed=3)
    with torch.no_grad():
        before = model.logits(ids)
        for place in range(1, 4 * P):
            changed = ids.clone()
            changed[0, place] = 4 + (ids[0, place] - 3) % 256
            moved = (model.logits(changed) - before).abs().amax((0, 2)) > 1e-5
            assert not moved[:place].any(), place
            assert moved[place], place


@given(length=st.integers(4, 36), data=st.data())
def test_text_before_a_bos_changes_nothing_after_it(length: int, data: st.DataObject) -> None:
    model = model_of(
        data.draw(
            st.sampled_from(
                [
                    "documents",
                    "documents, n-grams, exact pairs",
                    "documents and every technique",
                    "documents and chunk blocks",
                    "documents, chunk blocks and every technique",
                ]
            )
        )
    )
    begin = data.draw(st.integers(1, length - 1), label="where the second document begins")
    ids, other = random_ids(1, length, seed=1), random_ids(1, length, seed=2)
    ids[:, begin] = BOS
    other[:, begin:] = ids[:, begin:]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids)[:, begin:], model.logits(other)[:, begin:], rtol=0, atol=1e-5)


def test_without_document_masking_it_does() -> None:
    model = model_of("as it is")
    ids, other = random_ids(1, 24, seed=1), random_ids(1, 24, seed=2)
    other[:, 12:] = ids[:, 12:]
    with torch.no_grad():
        assert not torch.allclose(model.logits(ids)[:, 12:], model.logits(other)[:, 12:], atol=1e-3)


def test_a_document_on_a_chunk_border_is_predicted_as_if_alone() -> None:
    model = model_of("documents")
    ids = random_ids(1, 24, seed=1)
    ids[:, 12] = BOS
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids)[:, 12:], model.logits(ids[:, 12:]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("option", ["as it is", "documents and windows"])
def test_logits_do_not_depend_on_the_rest_of_the_batch(option: str) -> None:
    model, ids = model_of(option), random_ids(5, 26, documents=True)
    with torch.no_grad():
        together = model.logits(ids)
        for row in range(5):
            torch.testing.assert_close(together[row : row + 1], model.logits(ids[row : row + 1]), rtol=0, atol=2e-5)


def test_less_than_a_chunk_gets_no_injection() -> None:
    model, ids = model_of("chunks of eight bytes"), random_ids(2, 7)
    without = ByteLM(replace(model.config, jepa={"inject": False}))
    without.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), without.logits(ids), rtol=0, atol=0)
    losses = model.losses(ids[:, :-1], ids[:, 1:])
    assert (losses.jepa_prediction.item(), losses.sigreg.item()) == (0, 0)


def test_logits_are_float32_and_capped() -> None:
    model = small_model(model={"logit_softcap": 1.5, "embedding_std": 5.0})
    logits = model.logits(random_ids(2, 9))
    assert logits.shape == (2, 9, 260)
    assert logits.dtype == torch.float32
    assert logits.abs().max().item() <= 1.5
    assert logits.abs().max().item() > 1.4


def test_the_head_is_tied_to_the_embedding() -> None:
    model = small_model()
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if 260 in p.shape]
    assert shapes == [(260, 32)]


def test_losses_are_means_in_nats() -> None:
    model, ids = small_model(), random_ids(3, 25)
    losses = model.losses(ids[:, :-1], ids[:, 1:])
    chosen = model.logits(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
    assert losses.ce.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)
    assert all(value.ndim == 0 and value.dtype == torch.float32 for value in losses[:4])
    assert losses.jepa_prediction.item() > 0
    assert losses.sigreg.item() > 0
    assert losses.latents is not None
    assert not any(part.requires_grad for part in losses.latents)


def test_latent_losses_can_be_left_out() -> None:
    model, ids = small_model(), random_ids(2, 25)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    with_them, without = model.losses(inputs, targets), model.losses(inputs, targets, jepa=False)
    assert without.ce.item() == with_them.ce.item()
    assert (without.jepa_prediction.item(), without.sigreg.item()) == (0, 0)


def test_extra_heads_predict_further_ahead() -> None:
    model = small_model(model={"multi_token_heads": 2})
    ids = random_ids(2, 25)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    losses = model.losses(inputs, targets)
    x = F.rms_norm(model.hidden(inputs)[0], (32,))
    expected = 0.0
    for ahead, head in enumerate(model.multi_token_heads, start=1):
        logits = 30 * torch.tanh(x[:, :-ahead] @ head.weight.T / 30)
        expected += F.cross_entropy(logits.flatten(0, 1), ids[:, 1 + ahead :].flatten()).item() / 2
    assert losses.multi_token.item() == pytest.approx(expected, rel=1e-5)
    losses.multi_token.backward()
    assert all(head.weight.grad is not None and head.weight.grad.any() for head in model.multi_token_heads)


def test_extra_heads_leave_the_logits_alone() -> None:
    plain = initialize(ByteLM(small_config()), 5)
    more = initialize(ByteLM(small_config(model={"multi_token_heads": 3})), 5)
    ids = random_ids(2, 20)
    assert torch.equal(plain.logits(ids), more.logits(ids))
    assert plain.losses(ids, ids).multi_token.item() == 0


def test_every_technique_learns_from_its_initial_value() -> None:
    model = initialize(ByteLM(small_config(model=EVERY_TECHNIQUE)), 0)
    optimizers = Optimizers(model, model.config.optimizer, Ranks())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for step in range(3):
        ids = random_ids(2, 25, seed=step, documents=True)
        optimizers.zero_grad()
        model.losses(ids[:, :-1], ids[:, 1:]).ce.backward()
        optimizers.step(learning_rate_scale=1.0, momentum=0.9)
    techniques = ("ngrams", "skip_gates", "smear.input_weight", "attention.gate", "value_embedding")
    of_techniques = [name for name in before if any(part in name for part in techniques)]
    assert len(of_techniques) == 3 + 1 + 1 + 3 + 1
    for name, value in model.named_parameters():
        moved = (value != before[name]).any().item()
        assert moved or not name.startswith(tuple(of_techniques)), name


def test_what_trains_and_stores_the_parameters_of_the_techniques() -> None:
    model = ByteLM(small_config(model=EVERY_TECHNIQUE))
    parameters = dict(model.named_parameters())
    artifact = dataclasses.replace(model.config.artifact, small_tensor_elements=0)
    for name, role, bits in (
        ("ngrams.embedding.weight", "embedding", 8),
        ("ngrams.projection.weight", "matrix", 8),
        ("skip_gates", "scalar", None),
        ("smear.input_weight", "scalar", None),
        ("blocks.0.attention.gate.weight", "scalar", 6),
        ("blocks.2.attention.value_embedding.weight", "embedding", 8),
    ):
        assert role_of(name, parameters[name]) == role, name
        assert stored_bits(name, parameters[name], artifact) == bits, name


def test_a_recurrent_block_counts_twice() -> None:
    once, twice = small_config(), small_config(model={"recurrent_layers": (1, 2)})
    assert twice.model.layer_order == (0, 1, 2, 1, 2)
    per_layer = (matmul_parameters(once) - matmul_parameters(small_config(model={"num_layers": 2}))) * 2
    assert matmul_parameters(twice) - matmul_parameters(once) == per_layer


def test_chunk_blocks_count_once_a_chunk() -> None:
    whole = small_config(model={"num_layers": 4})
    strided = replace(whole, model={"chunk_blocks": (1, 2), "chunk_stride_bytes": 4})
    one_layer = matmul_parameters(whole) - matmul_parameters(replace(whole, model={"num_layers": 3}))
    assert matmul_parameters(whole) - matmul_parameters(strided) == 2 * one_layer * 3 / 4
    # 16 positions see 16 * 17 / 2 pairs, 4 chunks 4 * 5 / 2
    whole, strided = (replace(c, data={"sequence_bytes": 16, "sequence_growth": None}) for c in (whole, strided))
    pairs = 6 * 32 * 2 * 2 * (16 * 17 / 2 - 4 * 5 / 2) / 16
    fewer_products = 6 * 2 * one_layer * 3 / 4
    assert flop_per_byte(whole) - flop_per_byte(strided) == pytest.approx(pairs + fewer_products)


def test_chunk_blocks_reach_the_positions_from_their_chunks_end_on() -> None:
    model = small_model(
        model={"num_layers": 4, "chunk_blocks": (1, 2), "chunk_stride_bytes": 4}, jepa={"enabled": False}
    )
    idle = small_model(
        model={"num_layers": 4, "chunk_blocks": (1, 2), "chunk_stride_bytes": 4}, jepa={"enabled": False}
    )
    ids = random_ids(1, 11)
    with torch.no_grad():
        idle.chunk_scale.zero_()
        moved = (model.logits(ids) - idle.logits(ids)).abs().amax((0, 2)) > 1e-4
    assert moved.tolist() == [False] * 3 + [True] * 8


@pytest.mark.parametrize("num_ids", [1, 3])
def test_less_than_a_chunk_passes_no_chunk_block(num_ids: int) -> None:
    model = model_of("chunk blocks")
    ids = random_ids(2, num_ids)
    model.zero_grad()
    model.losses(ids, ids).ce.backward()
    assert all(p.grad is None for layer in (1, 2) for p in model.blocks[layer].parameters())
    assert torch.isfinite(model.logits(ids)).all()


@pytest.mark.parametrize(("preset_like", "learns"), [("default", True), ("pr832", False)])
def test_the_bigram_learns_in_default_and_is_inert_in_pr832(preset_like: str, learns: bool) -> None:
    settings = {} if learns else {"model": {"bigram_projection_init": "zero", "output_projection_init": "zero"}}
    model = initialize(ByteLM(small_config(**settings)), 0)
    optimizers = Optimizers(model, model.config.optimizer, Ranks())
    assert not model.bigram.embedding.weight.any()
    before = model.bigram.projection.weight.detach().clone()
    for step in range(3):
        ids = random_ids(2, 25, seed=step)
        optimizers.zero_grad()
        model.losses(ids[:, :-1], ids[:, 1:]).ce.backward()
        optimizers.step(learning_rate_scale=1.0, momentum=0.9)
    assert bool(model.bigram.embedding.weight.any()) == learns
    assert bool((model.bigram.projection.weight != before).any()) == learns
