"""An `IntegerModel` in the arrays that the compiled functions of the fast path read, and the state that they change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bytejepa.codec import fixed_point as fp
from bytejepa.codec.integer_model import IntegerLatents, IntegerMatrix, IntegerModel
from bytejepa.codec.tiles import pack

Array = npt.NDArray[Any]
NO_CHUNKS = 0


class PackedMatrices(NamedTuple):
    """One `IntegerMatrix` a layer, columns packed (`tiles.pack`); rows padded to a multiple of 32."""

    codes: Array
    """(layers, N / 16, K / 2, 16, 2) int8."""
    multiplier: Array
    """(layers, N) int64."""
    shift: Array
    """(layers, N) int64: one number a matrix, but query, key and value maps lie in one."""
    input_bits: Array
    """(layers,) int64."""


class PackedModel(NamedTuple):
    """The model. Numbers are int64; arrays are as wide as said. Empty arrays stand for parts that are left out."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    half: int
    """Half the rotating dimensions of a head."""
    num_encoder_layers: int
    chunk_bytes: int
    """0: no injection."""
    softcap: int
    norm_width: int
    """sqrt(D) with 40 fraction bits."""
    norm_head: int
    embedding_epsilon: int
    residual_epsilon: int
    head_epsilon: int
    embedding: Array
    """(260, D) int32."""
    bigram: Array
    """(rows, D) int32."""
    smear: Array
    """(D,) int32."""
    cosines: Array
    """(W, half) int32."""
    sines: Array
    mix: Array
    """(layers, 2, D) int32, or (layers, 0, 0)."""
    skip: Array
    """(layers, D) int32; zeros where nothing is popped."""
    has_skip: Array
    """(layers,) int64, 1 or 0."""
    drops_own_value: Array
    """(layers,) int64, 1 or 0."""
    query_sign: Array
    """(layers, H) int64."""
    score_multiplier: Array
    """(layers, H) int64."""
    score_shift: Array
    """(layers,) int64."""
    qkv: PackedMatrices
    output: PackedMatrices
    up: PackedMatrices
    down: PackedMatrices
    head: PackedMatrices
    latent_maps: PackedMatrices
    """Projector up and down, predictor up and down, injection, as five layers padded to one size."""
    latent_widths: Array
    """(2, 3) int64: hidden width, norm constant and epsilon of the projector and of the predictor."""
    latent_start: Array
    """(Z,) int64."""
    exp2: Array
    """(4096,) uint32."""
    tanh: Array
    sigmoid: Array


class LaneState(NamedTuple):
    """What lanes at one common position remember."""

    keys: Array
    """(layers, L, G, W / 16, E / 2, 16, 2) int16: packed columns, one output a position."""
    values: Array
    """(layers, L, G, E / 16, W / 2, 16, 2) int16: packed columns, one input a position."""
    smear_previous: Array
    """(L, D) int32."""
    previous_id: Array
    """(L,) int64; -1 at a window's beginning."""
    chunk_sum: Array
    """(L, D) int64: the residuals of the chunk so far."""
    injection: Array
    """(L, D) int32: what the chunk gets."""


def pack_model(model: IntegerModel, window: int) -> PackedModel:
    """Return `model` for windows of up to `window` ids."""
    D, E, layers = model.width, model.head_dim, model.layers
    cosines, sines = fp.rotary_tables(window, model.rotary_dims, model.rotary_base)
    latents = model.latents
    return PackedModel(
        width=D,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=E,
        half=model.rotary_dims // 2,
        num_encoder_layers=model.num_encoder_layers,
        chunk_bytes=NO_CHUNKS if latents is None else latents.chunk_bytes,
        softcap=model.softcap,
        norm_width=fp.norm_constant(D),
        norm_head=fp.norm_constant(E),
        embedding_epsilon=fp.norm_epsilon(D, model.embedding_bits),
        residual_epsilon=fp.norm_epsilon(D, fp.RESIDUAL_BITS),
        head_epsilon=fp.norm_epsilon(E, fp.PRENORM_BITS),
        embedding=model.embedding.astype(np.int32),
        bigram=np.zeros((0, D), np.int32) if model.bigram is None else model.bigram.astype(np.int32),
        smear=np.zeros(0, np.int32) if model.smear is None else model.smear.astype(np.int32),
        cosines=cosines.astype(np.int32),
        sines=sines.astype(np.int32),
        mix=np.stack([np.zeros((0, 0)) if layer.mix is None else layer.mix for layer in layers]).astype(np.int32),
        skip=np.stack([np.zeros(D) if layer.skip is None else layer.skip for layer in layers]).astype(np.int32),
        has_skip=np.array([layer.skip is not None for layer in layers], dtype=np.int64),
        drops_own_value=np.array([layer.drop_own_value for layer in layers], dtype=np.int64),
        query_sign=np.stack([layer.query_sign for layer in layers]),
        score_multiplier=np.stack([layer.score_multiplier for layer in layers]),
        score_shift=np.array([layer.score_shift for layer in layers], dtype=np.int64),
        qkv=_stacked([(layer.heads, layer.value) for layer in layers]),
        output=_stacked([(layer.output,) for layer in layers]),
        up=_stacked([(layer.up,) for layer in layers]),
        down=_stacked([(layer.down,) for layer in layers]),
        head=_stacked([(model.head,)]),
        latent_maps=_latent_maps(latents),
        latent_widths=_latent_widths(latents),
        latent_start=np.zeros(0, np.int64) if latents is None else latents.start,
        exp2=fp.exp2_table().astype(np.uint32),
        tanh=fp.tanh_table(),
        sigmoid=fp.sigmoid_table(),
    )


def _stacked(matrices: Sequence[tuple[IntegerMatrix, ...]]) -> PackedMatrices:
    """Return one packed matrix a layer, all padded to the largest; those of a tuple lie one above the other."""
    joined = [np.concatenate([part.codes for part in parts]) for parts in matrices]
    outputs, inputs = (max(codes.shape[axis] for codes in joined) for axis in (0, 1))
    codes = np.stack([pack(np.pad(c, ((0, outputs - len(c)), (0, inputs - c.shape[1])))) for c in joined])
    rows = codes.shape[1] * codes.shape[3]
    multiplier = np.zeros((len(matrices), rows), np.int64)
    shift = np.full((len(matrices), rows), matrices[0][0].shift, np.int64)
    for index, parts in enumerate(matrices):
        first = 0
        for part in parts:
            multiplier[index, first : first + len(part.codes)] = part.multiplier
            shift[index, first : first + len(part.codes)] = part.shift
            first += len(part.codes)
    bits = np.array([parts[0].input_bits for parts in matrices], dtype=np.int64)
    return PackedMatrices(codes=codes, multiplier=multiplier, shift=shift, input_bits=bits)


def _latent_maps(latents: IntegerLatents | None) -> PackedMatrices:
    if latents is None:
        empty = IntegerMatrix(codes=np.zeros((1, 2), np.int8), multiplier=np.zeros(1, np.int64), shift=1, input_bits=15)
        return _stacked([(empty,)])
    maps = (
        latents.projector_up, latents.projector_down, latents.predictor_up, latents.predictor_down, latents.injection,
    )  # fmt: skip
    return _stacked([(matrix,) for matrix in maps])


def _latent_widths(latents: IntegerLatents | None) -> npt.NDArray[np.int64]:
    if latents is None:
        return np.ones((2, 3), np.int64)
    widths = [len(latents.projector_up.codes), len(latents.predictor_up.codes)]
    return np.array([[w, fp.norm_constant(w), fp.norm_epsilon(w, fp.PRENORM_BITS)] for w in widths], dtype=np.int64)


def new_state(model: PackedModel, num_lanes: int) -> LaneState:
    """Return zeroed buffers for `num_lanes` lanes; `forward.feed` at position 0 makes them a window's beginning."""
    layers, window = len(model.score_shift), len(model.cosines)
    L, G, E = num_lanes, model.num_kv_heads, model.head_dim
    positions, outputs = -(-window // 32) * 32, -(-E // 32) * 32
    return LaneState(
        keys=np.zeros((layers, L, G, positions // 16, E // 2, 16, 2), np.int16),
        values=np.zeros((layers, L, G, outputs // 16, positions // 2, 16, 2), np.int16),
        smear_previous=np.zeros((L, model.width), np.int32),
        previous_id=np.full(L, -1, np.int64),
        chunk_sum=np.zeros((L, model.width), np.int64),
        injection=np.zeros((L, model.width), np.int32),
    )
