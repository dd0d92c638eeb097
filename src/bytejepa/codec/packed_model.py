"""An `IntegerModel` in the arrays that the compiled functions of the fast path read, and the state that they change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bytejepa.codec import fixed_point as fp
from bytejepa.codec.integer_model import IntegerEmbedding, IntegerLatents, IntegerModel
from bytejepa.codec.integer_tensors import IntegerMatrix
from bytejepa.codec.tiles import pack
from bytejepa.data.vocabulary import BYTE_OFFSET

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


class PackedEmbedding(NamedTuple):
    """What `embedding.embed` reads."""

    token: Array
    """(260, D) int32."""
    pairs: Array
    """(rows, D) int32."""
    exact_pairs_from: int
    """The id of byte 0 where each pair of bytes has a row, 0 where rows are hashed."""
    runs: Array
    """(orders * rows, D) int32."""
    orders: Array
    """(orders,) int64."""
    norm: int
    """sqrt(D) with 40 fraction bits."""
    epsilon: int
    smear: Array
    """(D,) int32: gates, or what is added to them where they read their input."""
    smear_input: Array
    """(dimensions read,) int64."""


class PackedLatents(NamedTuple):
    """What `latents.add_injections` reads."""

    chunk_bytes: int
    """0: no injection."""
    reads_residual: int
    latent_dim: int
    maps: PackedMatrices
    """Projector up and down, predictor up and down, injection, as five layers padded to one size."""
    widths: Array
    """(2, 3) int64: hidden width, norm constant and epsilon of the projector and of the predictor."""
    start: Array
    """(Z,) or (D,) int64."""


class PackedModel(NamedTuple):
    """The model. Numbers are int64; arrays are as wide as said. Empty arrays stand for parts that are left out."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_pushing: int
    chunk_places: tuple[int, int]
    """First and end of the places passed once a chunk; equal where there are none."""
    chunk_stride: int
    softcap: int
    norm_width: int
    """sqrt(D) with 40 fraction bits."""
    norm_head: int
    residual_epsilon: int
    head_epsilon: int
    embedding: PackedEmbedding
    latents: PackedLatents
    cosines: Array
    """(W, half) int32."""
    sines: Array
    layer_of_place: Array
    """(places,) int64, as the others of places."""
    cache_of_place: Array
    """Its index among the caches of bytes or of chunks."""
    window_of_place: Array
    popped_place: Array
    """-1: none."""
    skips: Array
    """(pops, D) int32."""
    skip_gates: Array
    """(pops, D) int32, or (0, 0)."""
    chunk_scale: Array
    """(D,) int32."""
    mix: Array
    """(layers, 2, D) int32, or (layers, 0, 0)."""
    drops_own_value: Array
    """(layers,) int64, 1 or 0."""
    is_parallel: Array
    """(layers,) int64, 1 or 0."""
    query_sign: Array
    """(layers, H) int64."""
    score_multiplier: Array
    """(layers, H) int64."""
    score_shift: Array
    """(layers,) int64."""
    value_embedding: Array
    """(layers with one, 260, G * E) int32."""
    value_embedding_of: Array
    """(layers,) int64: its index, -1 for none."""
    gate_codes: Array
    """(layers, H, dimensions read) int8, or (layers, 0, 0)."""
    gate_multiplier: Array
    """(layers, H) int64."""
    gate_shift: Array
    """(layers,) int64."""
    qkv: PackedMatrices
    output: PackedMatrices
    up: PackedMatrices
    down: PackedMatrices
    head: PackedMatrices
    exp2: Array
    """(4096,) uint32."""
    tanh: Array
    sigmoid: Array


class LaneState(NamedTuple):
    """What lanes at one common position remember. At a window's beginning nothing of it is read."""

    keys: Array
    """(places, L, G, W / 16, E / 2, 16, 2) int16: packed columns, one output a position."""
    values: Array
    """(places, L, G, E / 16, W / 2, 16, 2) int16: packed columns, one input a position."""
    chunk_keys: Array
    """The same of the places passed once a chunk, one position a chunk."""
    chunk_values: Array
    recent_ids: Array
    """(L, reach + 1) int64, the newest one first."""
    smear_previous: Array
    """(L, D) int32."""
    chunk_change: Array
    """(L, D) int64: what the chunk places changed at the last chunk that ended."""
    latent_read: Array
    """(L, D) int64: the sum of the residuals of JEPA's chunk so far, or the last of them."""
    injection: Array
    """(L, D) int32: what JEPA's chunk gets."""


def pack_model(model: IntegerModel, window: int) -> PackedModel:
    """Return `model` for windows of up to `window` ids."""
    D, E, layers, places = model.width, model.head_dim, model.layers, range(len(model.layer_of_place))
    cosines, sines = fp.rotary_tables(window, model.rotary_dims, model.rotary_base)
    chunked = model.chunk_places
    popped = [model.popped_place(place) for place in places]
    embeddings = [layer.value_embedding for layer in layers if layer.value_embedding is not None]
    with_embedding = np.cumsum([layer.value_embedding is not None for layer in layers])
    return PackedModel(
        width=D,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=E,
        num_pushing=model.num_pushing,
        chunk_places=(chunked.start, chunked.stop),
        chunk_stride=model.chunk_stride,
        softcap=model.softcap,
        norm_width=fp.norm_constant(D),
        norm_head=fp.norm_constant(E),
        residual_epsilon=fp.norm_epsilon(D, fp.RESIDUAL_BITS),
        head_epsilon=fp.norm_epsilon(E, fp.PRENORM_BITS),
        embedding=_packed_embedding(model.embedding),
        latents=_packed_latents(model.latents),
        cosines=cosines.astype(np.int32),
        sines=sines.astype(np.int32),
        layer_of_place=_numbers(model.layer_of_place),
        cache_of_place=_numbers(
            place - chunked.start if place in chunked else place - len(chunked) * (place >= chunked.stop)
            for place in places
        ),
        window_of_place=_numbers(bound or window for bound in model.window_of_place),
        popped_place=_numbers(-1 if place is None else place for place in popped),
        skips=_or_empty(model.skips, (0, D)),
        skip_gates=_or_empty(model.skip_gates, (0, 0)),
        chunk_scale=_or_empty(model.chunk_scale, (0,)),
        mix=np.stack([_or_empty(layer.mix, (0, 0)) for layer in layers]),
        drops_own_value=_numbers(layer.drop_own_value for layer in layers),
        is_parallel=_numbers(layer.is_parallel for layer in layers),
        query_sign=np.stack([layer.query_sign for layer in layers]),
        score_multiplier=np.stack([layer.score_multiplier for layer in layers]),
        score_shift=_numbers(layer.score_shift for layer in layers),
        value_embedding=np.stack(embeddings).astype(np.int32) if embeddings else np.zeros((0, 0, 0), np.int32),
        value_embedding_of=np.where([layer.value_embedding is None for layer in layers], -1, with_embedding - 1),
        gate_codes=np.stack([np.zeros((0, 0), np.int8) if each.gate is None else each.gate.codes for each in layers]),
        gate_multiplier=np.stack([np.zeros(0, np.int64) if e.gate is None else e.gate.multiplier for e in layers]),
        gate_shift=_numbers(1 if layer.gate is None else layer.gate.shift for layer in layers),
        qkv=_stacked([(layer.heads, layer.value) for layer in layers]),
        output=_stacked([(layer.output,) for layer in layers]),
        up=_stacked([(layer.up,) for layer in layers]),
        down=_stacked([(layer.down,) for layer in layers]),
        head=_stacked([(model.head,)]),
        exp2=fp.exp2_table().astype(np.uint32),
        tanh=fp.tanh_table(),
        sigmoid=fp.sigmoid_table(),
    )


def _numbers(values: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.array(list(values), dtype=np.int64)


def _or_empty(array: Array | None, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    return np.zeros(shape, np.int32) if array is None else array.astype(np.int32)


def _packed_embedding(embedding: IntegerEmbedding) -> PackedEmbedding:
    D = embedding.token.shape[1]
    return PackedEmbedding(
        token=embedding.token.astype(np.int32),
        pairs=_or_empty(embedding.pairs, (0, D)),
        exact_pairs_from=BYTE_OFFSET if embedding.pairs_are_exact else 0,
        runs=_or_empty(embedding.runs, (0, D)),
        orders=_numbers(embedding.run_orders),
        norm=fp.norm_constant(D),
        epsilon=fp.norm_epsilon(D, embedding.bits),
        smear=_or_empty(embedding.smear, (0,)),
        smear_input=np.zeros(0, np.int64) if embedding.smear_input is None else embedding.smear_input,
    )


def _packed_latents(latents: IntegerLatents | None) -> PackedLatents:
    empty = IntegerMatrix(codes=np.zeros((1, 2), np.int8), multiplier=np.zeros(1, np.int64), shift=1, input_bits=15)
    if latents is None:
        return PackedLatents(
            chunk_bytes=NO_CHUNKS,
            reads_residual=0,
            latent_dim=1,
            maps=_stacked([(empty,)]),
            widths=np.ones((2, 3), np.int64),
            start=np.zeros(0, np.int64),
        )
    projector = latents.projector or (empty, empty)
    widths = [len(up.codes) for up, _ in (projector, latents.predictor)]
    return PackedLatents(
        chunk_bytes=latents.chunk_bytes,
        reads_residual=int(latents.reads_residual),
        latent_dim=latents.injection.codes.shape[1],
        maps=_stacked([(matrix,) for matrix in (*projector, *latents.predictor, latents.injection)]),
        widths=np.array([[w, fp.norm_constant(w), fp.norm_epsilon(w, fp.PRENORM_BITS)] for w in widths], np.int64),
        start=latents.start,
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


def new_state(model: PackedModel, num_lanes: int) -> LaneState:
    """Return zeroed buffers for `num_lanes` lanes; `forward.feed` at position 0 makes them a window's beginning."""
    L, D, window, (first, end) = num_lanes, model.width, len(model.cosines), model.chunk_places
    keys, values = _caches(model, L, len(model.layer_of_place) - (end - first), window)
    chunk_keys, chunk_values = _caches(model, L, end - first, window // model.chunk_stride)
    return LaneState(
        keys=keys,
        values=values,
        chunk_keys=chunk_keys,
        chunk_values=chunk_values,
        recent_ids=np.zeros((L, max((2, *model.embedding.orders.tolist()))), np.int64),
        smear_previous=np.zeros((L, D), np.int32),
        chunk_change=np.zeros((L, D), np.int64),
        latent_read=np.zeros((L, D), np.int64),
        injection=np.zeros((L, D), np.int32),
    )


def _caches(model: PackedModel, num_lanes: int, num_places: int, window: int) -> tuple[Array, Array]:
    L, G, E = num_lanes, model.num_kv_heads, model.head_dim
    positions, outputs = -(-window // 32) * 32, -(-E // 32) * 32
    return (
        np.zeros((num_places, L, G, positions // 16, E // 2, 16, 2), np.int16),
        np.zeros((num_places, L, G, outputs // 16, positions // 2, 16, 2), np.int16),
    )
