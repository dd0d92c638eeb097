"""Integers that do not depend on batch, lanes, container or path, and that are near the float model."""

import contextlib
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from bytejepa.artifact.load import build
from bytejepa.artifact.packing import restore
from bytejepa.artifact.store import store_weights
from bytejepa.bits import bits_per_byte
from bytejepa.codec import fixed_point as fp
from bytejepa.codec.cpu import CpuCoder
from bytejepa.codec.integer_model import ALWAYS_DECIDING, DECIDING_WHERE_OTHER, WITHOUT_EFFECT, integer_model
from bytejepa.codec.integer_tensors import IntegerMatrix
from bytejepa.codec.lanes import LaneCoder
from bytejepa.codec.torch_model import TorchCoder
from bytejepa.codec.torch_parts import Matrix as TorchMatrix
from bytejepa.codec.torch_parts import Placement, square_root
from bytejepa.config_model import ModelConfig
from bytejepa.errors import CodecError
from bytejepa.scoring.evaluate import score
from codec.models import EVERY_CODE, GOLDEN_MODEL, STRUCTURES, cpu_coder, golden_model
from small_models import random_ids, small_model


def integers(**sections: dict[str, Any]) -> Any:
    model = small_model(**{"artifact": EVERY_CODE, **sections})
    return integer_model(store_weights(dict(model.named_parameters()), model.config), model.config)


def in_parts(lane_coder: LaneCoder, ids: np.ndarray, borders: list[int]) -> np.ndarray:
    state = lane_coder.start(len(ids))
    if borders:  # an earlier window, of which nothing may be left
        lane_coder.logits(state, np.ascontiguousarray(ids[:, :0:-1]), 0)
    parts = [
        lane_coder.logits(state, np.ascontiguousarray(ids[:, first:last]), first).reshape(len(ids), -1, 256)
        for first, last in zip([0, *borders], [*borders, ids.shape[1]], strict=True)
    ]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", STRUCTURES)
def test_all_paths_give_the_same_integers(name: str) -> None:
    model = integers(**STRUCTURES[name])
    compiled, ids = CpuCoder(model, 32, 16), random_ids(3, 32).numpy()
    expected = in_parts(compiled, ids, [])
    assert np.array_equal(in_parts(compiled, ids, list(range(1, 32))), expected)
    assert np.array_equal(in_parts(compiled, ids[1:2], [5, 6, 19]), expected[1:2])
    for container in ("float64", "float32", "int64"):
        torch_path = TorchCoder(model, 32, 16, container=container)
        assert np.array_equal(in_parts(torch_path, ids, [1, 7, 8, 21]), expected), container


@pytest.mark.parametrize("windows", [(7,), (40, 33, 64), (1, 0, 95)])
def test_windows_longer_than_a_tile_give_the_same_integers(windows: tuple[int, ...]) -> None:
    """Keys are read in blocks of 32, the first of which a window may leave out."""
    model, ids = integers(model={"attention_windows": windows}), random_ids(2, 150).numpy()
    compiled = CpuCoder(model, 150, 75)
    expected = in_parts(TorchCoder(model, 150, 75), ids, [])
    assert np.array_equal(in_parts(compiled, ids, []), expected)
    assert np.array_equal(in_parts(compiled, ids, [*range(1, 75), 100]), expected)


@pytest.mark.parametrize("name", ["residual_mix", "skip_weights", "chunk_scale", "smear.gate", "smear.input_weight"])
def test_weights_of_2_to_the_15_are_refused(name: str) -> None:
    """They are 32-bit numbers with 16 fraction bits on the compiled path."""
    model = small_model(**{"artifact": EVERY_CODE, **STRUCTURES["everything"]})
    stored = store_weights(dict(model.named_parameters()), model.config)
    key = next(key for key in stored if key.endswith(name))
    for largest, is_refused in ((32_760.0, False), (-32_768.0, True)):
        stored[key] = torch.full_like(model.get_parameter(key).detach(), largest)
        with pytest.raises(CodecError, match="too large") if is_refused else contextlib.nullcontext():
            integer_model(stored, model.config)


def test_products_of_the_widest_rows_are_exact_in_float32() -> None:
    codes = np.full((2, 4096), 127, dtype=np.int8)
    codes[1, ::3] = -128
    matrix = IntegerMatrix(codes=codes, multiplier=np.ones(2, np.int64), shift=1, input_bits=15)
    a = torch.full((3, 4096), 127)  # sums of odd numbers beyond 2^24, of which float32 would drop the last digit
    a[1, 7], a[2] = 126, 32_767
    in_float32 = TorchMatrix.of(matrix, Placement(device=torch.device("cpu"), container="float32")).sums(a)
    assert torch.equal(in_float32, a @ torch.from_numpy(codes).long().T)


@pytest.mark.compiled
def test_compiled_torch_gives_the_same_integers() -> None:
    model = integers(model={"num_layers": 1, "xsa_last_layers": 1}, jepa={"enabled": False})
    compiled, block = TorchCoder(model, 16, 8, compile=True), bytes(range(200))
    compiled.windows_at_once = 4
    passes: list[tuple[int, ...]] = []
    whole = compiled._compiled

    def counted(state, ids, position):
        passes.append((*ids.shape, position))
        return whole(state, ids, position)

    compiled._compiled = counted
    for found, expected in zip(
        compiled.block_intervals(block), CpuCoder(model, 16, 8).block_intervals(block), strict=True
    ):
        assert np.array_equal(found, expected)
    assert passes == [(4, 16, 0)] * 6  # 24 windows; the last one is shorter


def test_a_last_pass_that_is_filled_up_changes_nothing() -> None:
    coder, plain = (TorchCoder(integers(), 16, 8) for _ in range(2))
    coder.fills_passes, coder.windows_at_once, plain.windows_at_once = True, 4, 3
    for num_bytes in (1, 16, 40, 41, 90):
        block = bytes(range(num_bytes))
        for found, expected in zip(coder.block_intervals(block), plain.block_intervals(block), strict=True):
            assert np.array_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["default", "everything"])
def test_a_gpu_gives_the_same_integers(name: str) -> None:
    model, ids = integers(**STRUCTURES[name]), random_ids(4, 32).numpy()
    for container in ("float64", "float32"):
        on_gpu = TorchCoder(model, 32, 16, device="cuda", container=container)
        assert np.array_equal(in_parts(on_gpu, ids, [1, 9]), in_parts(CpuCoder(model, 32, 16), ids, []))


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "kept as float16"])
def test_logits_are_near_the_float_model(name: str) -> None:
    model = small_model(**{"artifact": EVERY_CODE, **STRUCTURES[name]})
    stored = store_weights(dict(model.named_parameters()), model.config)
    quantised = build(model.config, {key: restore(value) for key, value in stored.items()}, source="test")
    ids = random_ids(2, 32)
    expected = quantised.logits(ids)[:, :, 4:].detach().numpy()
    lane_coder = CpuCoder(integer_model(stored, model.config), 32, 16)
    found = in_parts(lane_coder, ids.numpy(), []) / 2**fp.LOGIT_BITS * math.log(2)
    assert np.sqrt(np.square(found - expected).mean()) < 0.005
    assert np.abs(found - expected).max() < 0.05


def test_bits_per_byte_are_those_of_the_float_artifact() -> None:
    from bytejepa import load
    from bytejepa.data.corpus import embedded_text

    text = embedded_text("val")[:3000]
    _, frequencies = CpuCoder(golden_model(), 128, 64).block_intervals(text)
    nats = math.log(2) * (fp.TOTAL_BITS - np.log2(frequencies)).sum()
    # the score gives some probability to the four specials, which the codec does not
    expected = score(load(GOLDEN_MODEL), text, window=128, stride=64).bpb
    assert bits_per_byte(nats, len(text)) == pytest.approx(expected, rel=0.003)


def test_frequencies_are_whole_and_both_paths_agree() -> None:
    random = np.random.default_rng(0)
    logits = np.concatenate([
        random.integers(-(40 << 16), 40 << 16, (50, 256)), np.zeros((1, 256), np.int64), random.integers(0, 3, (50, 256))
    ])  # fmt: skip
    logits[0, 7] = 90 << 16
    table = cpu_coder().frequencies(logits.copy())
    assert np.array_equal(TorchCoder(golden_model(), 8, 8).frequencies(logits.copy()), table)
    assert (table >= 1).all()
    assert (table.sum(axis=1) == 1 << 24).all()
    shares = np.exp2((logits - logits.max(axis=1, keepdims=True)) / 2.0**16)
    shares /= shares.sum(axis=1, keepdims=True)
    assert np.abs(table / 2**24 - shares).max() < 2e-4


def test_tables_are_the_nearest_integers() -> None:
    j = np.arange(4096)
    assert np.abs(fp.exp2_table() - 2.0**30 * np.exp2(-j / 4096)).max() <= 0.5001
    assert np.abs(fp.tanh_table() - 2.0**24 * np.tanh(np.arange(2049) / 256)).max() <= 0.5001
    assert np.abs(fp.sigmoid_table() - 2.0**15 / (1 + np.exp(-np.arange(1025) / 64))).max() <= 0.5001
    cosines, sines = fp.rotary_tables(300, 16, 10_000.0)
    angles = np.outer(np.arange(300), 10_000.0 ** (-np.arange(0, 16, 2) / 16))
    assert np.abs(cosines - 2.0**14 * np.cos(angles)).max() <= 0.5001
    assert np.abs(sines - 2.0**14 * np.sin(angles)).max() <= 0.5001


def test_square_roots_are_exact() -> None:
    root = torch.cat((torch.randint(1, 1 << 31, (1000,)), torch.tensor([1, 2, 3, (1 << 31) - 1])))
    for offset, expected in ((0, root), (-1, root - 1), (1, root.where(root > 1, root))):
        assert torch.equal(square_root(root * root + offset), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"multi_token_heads": 2}},
        {"jepa": {"horizons": 2, "next_bytes_weight": 0.1}},
        {"jepa": {"losses": False}},
    ],
)
def test_what_only_training_reads_changes_nothing(changes: dict[str, Any]) -> None:
    assert integers(**changes).head.codes.shape == (256, 32)


def test_every_setting_of_the_model_is_in_its_identity_or_is_said_to_decide_nothing() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    named = [*ALWAYS_DECIDING, *DECIDING_WHERE_OTHER, *WITHOUT_EFFECT, "chunk_stride_bytes"]
    assert sorted(named) == sorted(defaults)
    # what an artifact that is older than a setting is read with
    assert {name: defaults[name] for name in DECIDING_WHERE_OTHER} == DECIDING_WHERE_OTHER
