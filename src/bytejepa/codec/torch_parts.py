"""The parts of the integer forward pass in PyTorch: `bytejepa.codec.torch_model` puts them together.

All numbers are int64 tensors; only products of matrices use another container, in which every sum is exact: float64
(below 2^53), int64, or float32 with the activations in two planes of 8 bits (below 2^24). The containers, the device and the
shapes of the call change nothing in the result. Formats and tables are those of `fixed_point`; `docs/codec.md` has the formulas.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from bytejepa.codec import fixed_point as fp
from bytejepa.codec.fixed_point import IntArray
from bytejepa.codec.integer_model import IntegerEmbedding, IntegerLatents, IntegerLayer
from bytejepa.codec.integer_tensors import IntegerMatrix
from bytejepa.data.vocabulary import BYTE_OFFSET
from bytejepa.kernels.ngram_hash import HASH_BITS, HASH_MULTIPLIER

Container = Literal["float64", "float32", "int64"]
EXACT_FLOAT32 = 1 << 24


def rounded(value: Tensor, shift: Tensor | int) -> Tensor:
    """Return value / 2^shift to the nearest integer, halves upwards."""
    half = torch.ones_like(value) << (shift - 1)
    return (value + half) >> shift


def square_root(value: Tensor) -> Tensor:
    """Return the largest integers whose squares are at most `value`."""
    root = value.double().sqrt().long()
    root = root - (root * root > value).long()
    return root + ((root + 1) * (root + 1) <= value).long()


def normalize(x: Tensor, constant: int, epsilon: int, fraction_bits: int, limit: int) -> Tensor:
    """Return x / rms(x) along the last axis, with `fraction_bits`."""
    gain = constant // square_root((x * x).sum(-1, keepdim=True) + epsilon)
    return rounded(x * gain, fp.NORM_BITS - fraction_bits).clamp(-limit, limit)


def bit_length(value: Tensor) -> Tensor:
    """Return how many binary digits the numbers >= 0 have, below 2^62."""
    powers = 1 << torch.arange(62, device=value.device)
    return (value[..., None] >= powers).sum(-1)


def interpolated(table: Tensor, size: Tensor, fine: int) -> Tensor:
    """Return the table at size / 2^fine, linearly between its entries."""
    index, rest = size >> fine, size & ((1 << fine) - 1)
    return table[index] + rounded((table[index + 1] - table[index]) * rest, fine)


def sigmoid_of(table: Tensor, x: Tensor) -> Tensor:
    """Return the sigmoids, 15 fraction bits, of numbers with 10."""
    size = x.abs().clamp_max((fp.SIGMOID_RANGE << fp.NORMED_BITS) - 1)
    gate = interpolated(table, size, fp.NORMED_BITS - fp.SIGMOID_STEP_BITS)
    return torch.where(x < 0, (1 << fp.GATE_BITS) - gate, gate)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Matrix:
    """An `IntegerMatrix` on a device."""

    codes: Tensor
    """(N, K) in the container's dtype."""
    multiplier: Tensor
    shift: int
    input_bits: int
    largest_code: int

    @classmethod
    def of(cls, matrix: IntegerMatrix, placement: Placement) -> Matrix:
        """Return `matrix` for products in the placement's container."""
        codes = torch.from_numpy(np.ascontiguousarray(matrix.codes))
        codes = codes.to(placement.device, getattr(torch, placement.container))
        return cls(
            codes=codes,
            multiplier=placement.tensor(matrix.multiplier),
            shift=matrix.shift,
            input_bits=matrix.input_bits,
            largest_code=max(1, int(np.abs(matrix.codes.astype(np.int64)).max())),
        )

    def sums(self, a: Tensor) -> Tensor:
        """Return a @ codes^T for int16 numbers `a` (..., K), exactly, as int64."""
        if self.codes.dtype != torch.float32:
            return F.linear(a.to(self.codes.dtype), self.codes).long()
        high = (a + 128) >> 8
        low = a - (high << 8)
        columns = EXACT_FLOAT32 // (128 * self.largest_code) - 1
        total = torch.zeros((*a.shape[:-1], len(self.codes)), dtype=torch.int64, device=a.device)
        for first in range(0, a.size(-1), columns):
            part = slice(first, first + columns)
            codes = self.codes[:, part]
            total += (F.linear(high[..., part].float(), codes).long() << 8) + F.linear(
                low[..., part].float(), codes
            ).long()
        return total

    def apply(self, a: Tensor) -> Tensor:
        """Return the product with the multipliers in."""
        return rounded(self.sums(a) * self.multiplier, self.shift)

    def apply_dynamic(self, vector: Tensor) -> Tensor:
        """Return the product with vectors of any integers, each under a common exponent."""
        largest = vector.abs().amax(-1, keepdim=True)
        exponent = (bit_length(largest) - self.input_bits).clamp_min(0)
        most = (1 << self.input_bits) - 1
        a = ((vector + ((torch.ones_like(exponent) << exponent) >> 1)) >> exponent).clamp(-most, most)
        return rounded(self.sums(a) * self.multiplier, self.shift - exponent)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where arrays and matrices go, and the container of products."""

    device: torch.device
    container: Container

    def tensor(self, array: IntArray) -> Tensor:
        """Return `array` on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def tensors(self, *arrays: IntArray | None) -> tuple[Tensor | None, ...]:
        """Return each array on the device, None for None."""
        return tuple(None if array is None else self.tensor(array) for array in arrays)

    def matrix(self, matrix: IntegerMatrix) -> Matrix:
        """Return `matrix` on the device."""
        return Matrix.of(matrix, self)


@dataclasses.dataclass(kw_only=True, slots=True)
class TorchState:
    """What lanes at one common position remember."""

    keys: tuple[Int[Tensor, "L G positions E"], ...]
    """One a place: of every byte, or of every chunk."""
    values: tuple[Int[Tensor, "L G positions E"], ...]
    recent_ids: Int[Tensor, "L reach"]
    """The last ids fed, the last one at the end; at a window's beginning not read."""
    smear_previous: Int[Tensor, "L D"]
    chunk_change: Int[Tensor, "L D"]
    """What the chunk blocks changed at the last chunk that ended; at a window's beginning not read."""
    latent_sum: Int[Tensor, "L D"]
    """The residuals of JEPA's chunk so far, or where the predictor reads residuals the last of them."""
    injection: Int[Tensor, "L D"]


class Embedding:
    """An `IntegerEmbedding` on a device."""

    def __init__(self, embedding: IntegerEmbedding, placement: Placement) -> None:
        self.token = placement.tensor(embedding.token)
        self.pairs, self.runs, self.smear, self.smear_input = placement.tensors(
            embedding.pairs, embedding.runs, embedding.smear, embedding.smear_input
        )
        self.pairs_are_exact, self.orders = embedding.pairs_are_exact, embedding.run_orders
        self.sigmoid = placement.tensor(fp.sigmoid_table())
        width = self.token.size(1)
        self.norm = fp.norm_constant(width), fp.norm_epsilon(width, embedding.bits)
        self.reach = max((2, *self.orders)) - 1

    def embed(self, state: TorchState, ids: Tensor, position: int) -> Tensor:
        """Return the first block's input (L, N, D) of `ids` (L, N), and move the state on."""
        context = torch.cat((state.recent_ids, ids), dim=1)  # what comes before a window's beginning is masked below
        state.recent_ids = context[:, -self.reach :]
        place = torch.arange(position, position + ids.size(1), device=ids.device)
        x = self.token[ids]
        if self.pairs is not None:
            x = x + self.pairs[self._pair_rows(context, ids, place, len(self.pairs) - 1)]
        if self.runs is not None:
            x = x + self.runs[self._run_rows(context, ids, place, len(self.runs) // len(self.orders))].sum(2)
        x = normalize(x, *self.norm, fp.RESIDUAL_BITS, fp.RESIDUAL_LIMIT)
        if self.smear is None:
            return x
        carried = torch.zeros_like(state.smear_previous) if position == 0 else state.smear_previous
        before = torch.cat((carried[:, None], x[:, :-1]), dim=1)
        state.smear_previous = x[:, -1]
        gate = self.smear
        if self.smear_input is not None:
            read = (x[..., : len(self.smear_input)] * self.smear_input).sum(-1, keepdim=True)
            gate = sigmoid_of(self.sigmoid, gate + rounded(read, fp.MIX_BITS + fp.RESIDUAL_BITS - fp.NORMED_BITS))
        return x + rounded(gate * (before - x), fp.GATE_BITS)

    def _earlier(self, context: Tensor, ids: Tensor, offset: int) -> Tensor:
        end = context.size(1) - offset
        return context[:, end - ids.size(1) : end]

    def _pair_rows(self, context: Tensor, ids: Tensor, place: Tensor, last: int) -> Tensor:
        previous = self._earlier(context, ids, 1)
        if self.pairs_are_exact:
            row = (previous - BYTE_OFFSET) * 256 + ids - BYTE_OFFSET
            row = row.masked_fill(torch.minimum(previous, ids) < BYTE_OFFSET, last)
        else:
            row = ((36313 * ids) ^ (27191 * previous)) % last
        return row.masked_fill(place < 1, last)

    def _run_rows(self, context: Tensor, ids: Tensor, place: Tensor, num_rows: int) -> Tensor:
        """Return (L, N, orders)."""
        hashed, found, low = ids, list[Tensor](), (1 << HASH_BITS) - 1
        for offset in range(1, self.reach + 1):
            hashed = (hashed * HASH_MULTIPLIER + self._earlier(context, ids, offset)) & low
            if offset + 1 in self.orders:
                row = ((hashed * HASH_MULTIPLIER & low) * (num_rows - 1)) >> HASH_BITS
                found.append(row.masked_fill(place < offset, num_rows - 1) + num_rows * len(found))
        return torch.stack(found, dim=-1)


class Layer:
    """An `IntegerLayer` on a device."""

    def __init__(self, layer: IntegerLayer, placement: Placement) -> None:
        self.mix, self.value_embedding = placement.tensors(layer.mix, layer.value_embedding)
        self.heads, self.value, self.output, self.up, self.down = (
            placement.matrix(matrix) for matrix in (layer.heads, layer.value, layer.output, layer.up, layer.down)
        )
        self.gate = None if layer.gate is None else placement.matrix(layer.gate)
        self.query_sign = placement.tensor(layer.query_sign)
        self.score_multiplier = placement.tensor(layer.score_multiplier)
        self.score_shift = layer.score_shift
        self.drop_own_value, self.is_parallel = layer.drop_own_value, layer.is_parallel


class Latents:
    """`IntegerLatents` on a device."""

    def __init__(self, latents: IntegerLatents, placement: Placement) -> None:
        self.chunk_bytes, self.reads_residual = latents.chunk_bytes, latents.reads_residual
        self.sigmoid = placement.tensor(fp.sigmoid_table())
        self.projector = [placement.matrix(matrix) for matrix in latents.projector or ()]
        self.predictor = [placement.matrix(matrix) for matrix in latents.predictor]
        self.injection = placement.matrix(latents.injection)
        self.at_start = self._after_latent(placement.tensor(latents.start))

    def after_chunk(self, read: Tensor) -> Tensor:
        """Return what the chunk after one gets of which this is read: the sum of its residuals, or the last one, normalised."""
        return self._after_latent(read if self.reads_residual else self._mlp(read, *self.projector))

    def _after_latent(self, latent: Tensor) -> Tensor:
        return saturated(self.injection.apply_dynamic(self._mlp(latent, *self.predictor)))

    def _mlp(self, vector: Tensor, up: Matrix, down: Matrix) -> Tensor:
        hidden = up.apply_dynamic(vector).clamp(-fp.PRENORM_LIMIT, fp.PRENORM_LIMIT)
        width = hidden.size(-1)
        epsilon = fp.norm_epsilon(width, fp.PRENORM_BITS)
        hidden = normalize(hidden, fp.norm_constant(width), epsilon, fp.NORMED_BITS, fp.INT16_MAX)
        hidden = rounded(hidden * sigmoid_of(self.sigmoid, hidden), fp.GATE_BITS)
        return down.apply_dynamic(hidden).clamp(-fp.PRENORM_LIMIT, fp.PRENORM_LIMIT)


def saturated(x: Tensor) -> Tensor:
    """Return residuals within their bounds."""
    return x.clamp(-fp.RESIDUAL_LIMIT, fp.RESIDUAL_LIMIT)


def mlp(layer: Layer, a: Tensor) -> Tensor:
    """Return what a block's MLP adds for normalised residuals `a` (L, N, D)."""
    hidden = layer.up.apply(a).clamp(-fp.HIDDEN_LIMIT, fp.HIDDEN_LIMIT)
    square = hidden * hidden
    return layer.down.apply_dynamic(torch.where(hidden < 0, (square + 2) >> 2, square))


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return heads (L, N, heads, E) with their leading dimensions rotated."""
    half = cosines.size(-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat((a * cosines + b * sines, b * cosines - a * sines), dim=-1)
    return torch.cat((rounded(turned, fp.ROTARY_BITS).clamp(-fp.INT16_MAX, fp.INT16_MAX), rest), dim=-1)


def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Return the heads' outputs (L, N, G, H / G, E) without their component along `v` (L, N, G, 1, E)."""
    squares = (v * v).sum(-1, keepdim=True)
    share = torch.div((y * v).sum(-1, keepdim=True) << 16, squares.clamp_min(1), rounding_mode="floor")
    return (y - rounded(share * v, 16)).clamp(-fp.INT16_MAX, fp.INT16_MAX)
