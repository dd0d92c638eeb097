"""The integer forward pass in PyTorch: written for reading, and for GPUs.

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
from bytejepa.codec.integer_model import IntegerLatents, IntegerLayer, IntegerMatrix, IntegerModel
from bytejepa.codec.lanes import Ids, LaneCoder
from bytejepa.kernels.mixing_tables import PROBABILITY_BITS

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


@dataclasses.dataclass(kw_only=True, slots=True)
class TorchState:
    """What lanes at one common position remember."""

    keys: Int[Tensor, "layers L G W E"]
    values: Int[Tensor, "layers L G W E"]
    smear_previous: Int[Tensor, "L D"]
    previous_id: Int[Tensor, " L"]
    chunk_sum: Int[Tensor, "L D"]
    injection: Int[Tensor, "L D"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Matrix:
    """An `IntegerMatrix` on a device."""

    codes: Tensor
    """(N, K) in the container's dtype."""
    multiplier: Tensor
    shift: int
    input_bits: int
    largest_code: int

    @classmethod
    def of(cls, matrix: IntegerMatrix, container: Container, device: torch.device) -> _Matrix:
        """Return `matrix` for products in `container`."""
        codes = torch.from_numpy(np.ascontiguousarray(matrix.codes)).to(device, getattr(torch, container))
        return cls(
            codes=codes,
            multiplier=torch.from_numpy(matrix.multiplier).to(device),
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


class TorchCoder(LaneCoder):
    """`LaneCoder` in PyTorch, on a CPU or GPU."""

    windows_at_once = 16
    chunk_rows = 1 << 14

    def __init__(
        self,
        model: IntegerModel,
        window: int,
        hop: int,
        *,
        device: str = "cpu",
        container: Container = "float64",
        compile: bool = False,  # noqa: A002 - torch's word
    ) -> None:
        super().__init__(window, hop)
        self.windows_at_once = max(1, min(self.windows_at_once, self.chunk_rows // window))
        self.fills_passes = compile
        self.model, self.device, self.container = model, torch.device(device), container
        self.cosines, self.sines = (
            self._tensor(table) for table in fp.rotary_tables(window, model.rotary_dims, model.rotary_base)
        )
        self.exp2, self.tanh, self.sigmoid = (
            self._tensor(table) for table in (fp.exp2_table(), fp.tanh_table(), fp.sigmoid_table())
        )
        self.embedding = self._tensor(model.embedding)
        self.bigram = None if model.bigram is None else self._tensor(model.bigram)
        self.smear = None if model.smear is None else self._tensor(model.smear)
        self.head = self._matrix(model.head)
        self.layers = [_Layer(layer, self) for layer in model.layers]
        self.latents = None if model.latents is None else _Latents(model.latents, self)
        self._compiled = torch.compile(self._advance, dynamic=False) if compile else None

    def _tensor(self, array: Ids) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _matrix(self, matrix: IntegerMatrix) -> _Matrix:
        return _Matrix.of(matrix, self.container, self.device)

    def start(self, num_lanes: int) -> TorchState:
        """Return zeroed buffers."""
        m = self.model
        shape = (len(m.layers), num_lanes, m.num_kv_heads, self.window, m.head_dim)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        return TorchState(
            keys=zeros(*shape, dtype=torch.int16),
            values=zeros(*shape, dtype=torch.int16),
            smear_previous=zeros(num_lanes, m.width),
            previous_id=zeros(num_lanes),
            chunk_sum=zeros(num_lanes, m.width),
            injection=zeros(num_lanes, m.width),
        )

    @torch.no_grad()
    def logits(self, state: TorchState, ids: Ids, position: int, first_wanted: int = 0) -> Ids:
        """See `LaneCoder.logits`."""
        found: Ids = self._logits_after(state, ids, position, first_wanted).cpu().numpy()
        return found

    @torch.no_grad()
    def intervals(self, state: TorchState, ids: Ids, position: int, first_wanted: int, symbols: Ids) -> tuple[Ids, Ids]:
        """See `LaneCoder.intervals`; the tables stay on the device."""
        table = self._frequencies_of(self._logits_after(state, ids, position, first_wanted))
        symbol = self._tensor(symbols).view(-1, 1)
        chosen = table.gather(-1, symbol)
        starts = table.cumsum(-1).gather(-1, symbol) - chosen
        both: Ids = torch.cat((starts, chosen), dim=-1).cpu().numpy().reshape(*symbols.shape, 2)
        return both[..., 0], both[..., 1]

    @torch.no_grad()
    def paths(self, state: TorchState, ids: Ids, position: int, first_wanted: int, symbols: Ids) -> Ids:
        """See `LaneCoder.paths`; the tables stay on the device."""
        table = self._frequencies_of(self._logits_after(state, ids, position, first_wanted))
        sums = F.pad(table.cumsum(-1), (1, 0))
        symbol = self._tensor(symbols).view(-1, 1)
        size = 256 >> torch.arange(8, device=self.device)
        first = symbol // size * size
        begin, middle, end = (sums.gather(-1, first + part) for part in (0 * size, size // 2, size))
        share = ((end - middle) << PROBABILITY_BITS) // (end - begin)
        found: Ids = share.clamp(1, (1 << PROBABILITY_BITS) - 1).cpu().numpy().reshape(*symbols.shape, 8)
        return found

    def _logits_after(self, state: TorchState, ids: Ids, position: int, first_wanted: int) -> Tensor:
        # one shape is compiled, that of whole windows; each other one would take longer to compile than it saves
        is_whole = ids.shape == (self.windows_at_once, self.window)
        run = self._compiled if self._compiled is not None and is_whole else self._advance
        x = run(state, self._tensor(ids), position)[:, first_wanted:]
        return self._logits(x).flatten(0, 1)

    @torch.no_grad()
    def frequencies(self, logits: Ids) -> Ids:
        """See `LaneCoder.frequencies`."""
        found: Ids = self._frequencies_of(self._tensor(logits)).cpu().numpy()
        return found

    def _frequencies_of(self, logit: Tensor) -> Tensor:
        best = logit.argmax(-1, keepdim=True)  # the first of equals, checked by a test
        weight = self._exp2(rounded(logit.gather(-1, best) - logit, fp.LOGIT_BITS - fp.SOFTMAX_BITS))
        total = torch.full_like(weight[:, :1], ((1 << fp.TOTAL_BITS) - 256) << fp.FREQUENCY_BITS)
        gain = total // weight.sum(-1, keepdim=True)
        table = 1 + ((weight * gain) >> fp.FREQUENCY_BITS)
        return table.scatter_add_(-1, best, (1 << fp.TOTAL_BITS) - table.sum(-1, keepdim=True))

    def _exp2(self, exponent: Tensor) -> Tensor:
        """Return 2^30 * 2^(-exponent), the exponent with 12 fraction bits."""
        fraction = exponent & ((1 << fp.SOFTMAX_BITS) - 1)
        return self.exp2[fraction] >> (exponent >> fp.SOFTMAX_BITS).clamp_max(63)

    def _normed(self, x: Tensor) -> Tensor:
        m = self.model
        epsilon = fp.norm_epsilon(m.width, fp.RESIDUAL_BITS)
        return normalize(x, fp.norm_constant(m.width), epsilon, fp.NORMED_BITS, fp.INT16_MAX)

    def _advance(self, state: TorchState, ids: Tensor, position: int) -> Tensor:
        """Return the last residuals of `ids` (L, N), (L, N, D), injection included, and move the state on."""
        first = self._embed(state, ids, position)
        x, skips = first, list[Tensor]()
        for index, layer in enumerate(self.layers):
            if layer.skip is not None:
                x = _saturated(x + rounded(skips.pop() * layer.skip, fp.MIX_BITS))
            if layer.mix is not None:
                x = _saturated(rounded(x * layer.mix[0] + first * layer.mix[1], fp.MIX_BITS))
            y = self._attention(layer, self._normed(x), state.keys[index], state.values[index], position)
            x = _saturated(x + layer.output.apply(y))
            x = _saturated(x + _mlp(layer, self._normed(x)))
            if index < self.model.num_encoder_layers:
                skips.append(x)
        return x if self.latents is None else self._inject(state, x, position)

    def _embed(self, state: TorchState, ids: Tensor, position: int) -> Tensor:
        m = self.model
        x = self.embedding[ids]
        previous = torch.cat((state.previous_id[:, None], ids[:, :-1]), dim=1)
        if self.bigram is not None:
            last = len(self.bigram) - 1
            row = ((36313 * ids) ^ (27191 * previous)) % last
            if position == 0:
                row[:, 0] = last
            x = x + self.bigram[row]
        epsilon = fp.norm_epsilon(m.width, m.embedding_bits)
        x = normalize(x, fp.norm_constant(m.width), epsilon, fp.RESIDUAL_BITS, fp.RESIDUAL_LIMIT)
        state.previous_id = ids[:, -1]
        if self.smear is None:
            return x
        carried = torch.zeros_like(state.smear_previous) if position == 0 else state.smear_previous
        before = torch.cat((carried[:, None], x[:, :-1]), dim=1)
        state.smear_previous = x[:, -1]
        return x + rounded(self.smear * (before - x), fp.GATE_BITS)

    def _attention(self, layer: _Layer, a: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """Return the heads' outputs of normalised residuals `a` (L, N, D), (L, N, D); keys and values are kept."""
        m, end = self.model, position + a.size(1)
        H, G, E = m.num_heads, m.num_kv_heads, m.head_dim
        qk = layer.heads.apply(a).clamp(-fp.PRENORM_LIMIT, fp.PRENORM_LIMIT).unflatten(-1, (H + G, E))
        epsilon = fp.norm_epsilon(E, fp.PRENORM_BITS)
        qk = normalize(qk, fp.norm_constant(E), epsilon, fp.NORMED_BITS, fp.INT16_MAX)
        qk = _turned(qk, self.cosines[position:end, None], self.sines[position:end, None])
        q = qk[:, :, :H] * layer.query_sign[:, None]
        v = layer.value.apply(a).clamp(-fp.INT16_MAX, fp.INT16_MAX).unflatten(-1, (G, E))
        keys[:, :, position:end] = qk[:, :, H:].transpose(1, 2).short()
        values[:, :, position:end] = v.transpose(1, 2).short()
        exact = torch.int64 if self.container == "int64" else torch.float64
        queries = q.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).to(exact)  # (L, G, H / G, N, E)
        scores = (queries @ keys[:, :, None, :end].to(exact).transpose(-1, -2)).long()
        visible = torch.arange(end, device=a.device) <= torch.arange(position, end, device=a.device)[:, None]
        largest = scores.masked_fill(~visible, -(1 << 40)).amax(-1, keepdim=True)
        multiplier = layer.score_multiplier.view(G, H // G, 1, 1)
        exponent = rounded((largest - scores).clamp_min(0) * multiplier, layer.score_shift)
        weight = self._exp2(exponent).masked_fill(~visible, 0)
        total = weight.sum(-1, keepdim=True)
        shares = rounded(weight * (torch.full_like(total, fp.INT16_MAX << fp.INVERSE_BITS) // total), fp.INVERSE_BITS)
        y = (shares.to(exact) @ values[:, :, None, :end].to(exact)).long()
        y = rounded(y, fp.ATTENTION_BITS).clamp(-fp.INT16_MAX, fp.INT16_MAX).permute(0, 3, 1, 2, 4)
        if layer.drop_own_value:
            y = _without_own_value(y, v[:, :, :, None])
        return y.flatten(2)

    def _inject(self, state: TorchState, x: Tensor, position: int) -> Tensor:
        """Return the residuals with their chunks' injections, and move the chunks on."""
        latents = self.latents
        assert latents is not None
        P, length = latents.chunk_bytes, x.size(1)
        chunk = torch.arange(position, position + length, device=x.device) // P - position // P
        num_chunks = (position + length - 1) // P - position // P + 1
        sums = torch.zeros((x.size(0), num_chunks, x.size(2)), dtype=torch.int64, device=x.device)
        sums.index_add_(1, chunk, x)
        if position % P:
            first = state.injection
            sums[:, 0] += state.chunk_sum
        elif position:
            first = latents.after_chunk(state.chunk_sum)
        else:
            first = latents.at_start.expand(x.size(0), -1)
        injections = torch.cat((first[:, None], latents.after_chunk(sums[:, :-1])), dim=1)
        state.chunk_sum, state.injection = sums[:, -1], injections[:, -1]
        return _saturated(x + injections[:, chunk])

    def _logits(self, x: Tensor) -> Tensor:
        scaled = self.head.apply(self._normed(x))
        size = scaled.abs().clamp_max((fp.TANH_RANGE << fp.LOGIT_BITS) - 1)
        bounded = interpolated(self.tanh, size, fp.LOGIT_BITS - fp.TANH_STEP_BITS)
        return rounded(torch.where(scaled < 0, -bounded, bounded) * self.model.softcap, fp.TANH_BITS)


class _Layer:
    """An `IntegerLayer` on a device."""

    def __init__(self, layer: IntegerLayer, owner: TorchCoder) -> None:
        self.mix = None if layer.mix is None else owner._tensor(layer.mix)
        self.skip = None if layer.skip is None else owner._tensor(layer.skip)
        self.heads, self.value, self.output, self.up, self.down = (
            owner._matrix(matrix) for matrix in (layer.heads, layer.value, layer.output, layer.up, layer.down)
        )
        self.query_sign = owner._tensor(layer.query_sign)
        self.score_multiplier = owner._tensor(layer.score_multiplier)
        self.score_shift = layer.score_shift
        self.drop_own_value = layer.drop_own_value


class _Latents:
    """`IntegerLatents` on a device."""

    def __init__(self, latents: IntegerLatents, owner: TorchCoder) -> None:
        self.chunk_bytes = latents.chunk_bytes
        self.sigmoid = owner.sigmoid
        self.projector = (owner._matrix(latents.projector_up), owner._matrix(latents.projector_down))
        self.predictor = (owner._matrix(latents.predictor_up), owner._matrix(latents.predictor_down))
        self.injection = owner._matrix(latents.injection)
        self.at_start = self._after_latent(owner._tensor(latents.start))

    def after_chunk(self, residual_sum: Tensor) -> Tensor:
        """Return what the chunk after one with this sum of residuals gets."""
        return self._after_latent(self._mlp(residual_sum, *self.projector))

    def _after_latent(self, latent: Tensor) -> Tensor:
        return _saturated(self.injection.apply_dynamic(self._mlp(latent, *self.predictor)))

    def _mlp(self, vector: Tensor, up: _Matrix, down: _Matrix) -> Tensor:
        hidden = up.apply_dynamic(vector).clamp(-fp.PRENORM_LIMIT, fp.PRENORM_LIMIT)
        width = hidden.size(-1)
        epsilon = fp.norm_epsilon(width, fp.PRENORM_BITS)
        hidden = normalize(hidden, fp.norm_constant(width), epsilon, fp.NORMED_BITS, fp.INT16_MAX)
        size = hidden.abs().clamp_max((fp.SIGMOID_RANGE << fp.NORMED_BITS) - 1)
        gate = interpolated(self.sigmoid, size, fp.NORMED_BITS - fp.SIGMOID_STEP_BITS)
        gate = torch.where(hidden < 0, (1 << fp.GATE_BITS) - gate, gate)
        hidden = rounded(hidden * gate, fp.GATE_BITS)
        return down.apply_dynamic(hidden).clamp(-fp.PRENORM_LIMIT, fp.PRENORM_LIMIT)


def _saturated(x: Tensor) -> Tensor:
    return x.clamp(-fp.RESIDUAL_LIMIT, fp.RESIDUAL_LIMIT)


def _mlp(layer: _Layer, a: Tensor) -> Tensor:
    hidden = layer.up.apply(a).clamp(-fp.HIDDEN_LIMIT, fp.HIDDEN_LIMIT)
    square = hidden * hidden
    return layer.down.apply_dynamic(torch.where(hidden < 0, (square + 2) >> 2, square))


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return heads (L, N, heads, E) with their leading dimensions rotated."""
    half = cosines.size(-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat((a * cosines + b * sines, b * cosines - a * sines), dim=-1)
    return torch.cat((rounded(turned, fp.ROTARY_BITS).clamp(-fp.INT16_MAX, fp.INT16_MAX), rest), dim=-1)


def _without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Return the heads' outputs (L, N, G, H / G, E) without their component along `v` (L, N, G, 1, E)."""
    squares = (v * v).sum(-1, keepdim=True)
    share = torch.div((y * v).sum(-1, keepdim=True) << 16, squares.clamp_min(1), rounding_mode="floor")
    return (y - rounded(share * v, 16)).clamp(-fp.INT16_MAX, fp.INT16_MAX)
