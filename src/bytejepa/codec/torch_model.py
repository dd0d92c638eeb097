"""The integer forward pass in PyTorch: written for reading, and for GPUs. Its parts are in `bytejepa.codec.torch_parts`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bytejepa.codec import fixed_point as fp
from bytejepa.codec.integer_model import IntegerModel
from bytejepa.codec.lanes import Ids, LaneCoder
from bytejepa.codec.torch_parts import (
    Container,
    Embedding,
    Latents,
    Layer,
    Placement,
    TorchState,
    interpolated,
    mlp,
    normalize,
    rounded,
    saturated,
    sigmoid_of,
    turned,
    without_own_value,
)
from bytejepa.kernels.mixing_tables import PROBABILITY_BITS
from bytejepa.model.chunk_stride import at_chunk_ends, of_last_chunk


class _Rows(NamedTuple):
    """What blocks read besides the residual: of N bytes a lane, or of N chunks."""

    first: Tensor
    """(L, N, D): the first block's input."""
    ids: Tensor
    cosines: Tensor
    """(N, 1, half)."""
    sines: Tensor
    begin: int
    """Place of the first row in the caches."""


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
        self.model, self.device = model, torch.device(device)
        self.placement = Placement(device=self.device, container=container)
        self.cosines, self.sines = (
            self.placement.tensor(table) for table in fp.rotary_tables(window, model.rotary_dims, model.rotary_base)
        )
        self.exp2, self.tanh, self.sigmoid = (
            self.placement.tensor(table) for table in (fp.exp2_table(), fp.tanh_table(), fp.sigmoid_table())
        )
        self.embedding = Embedding(model.embedding, self.placement)
        self.head = self.placement.matrix(model.head)
        layers = [Layer(layer, self.placement) for layer in model.layers]
        self.places = [layers[layer] for layer in model.layer_of_place]
        self.skips, self.skip_gates, self.chunk_scale = self.placement.tensors(
            model.skips, model.skip_gates, model.chunk_scale
        )
        self.latents = None if model.latents is None else Latents(model.latents, self.placement)
        self._compiled = torch.compile(self._advance, dynamic=False) if compile else None

    def start(self, num_lanes: int) -> TorchState:
        """Return zeroed buffers."""
        m = self.model

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        def caches() -> tuple[Tensor, ...]:
            strides = (m.chunk_stride if place in m.chunk_places else 1 for place in range(len(self.places)))
            shapes = ((num_lanes, m.num_kv_heads, self.window // stride, m.head_dim) for stride in strides)
            return tuple(zeros(*shape, dtype=torch.int16) for shape in shapes)

        return TorchState(
            keys=caches(),
            values=caches(),
            recent_ids=zeros(num_lanes, self.embedding.reach),
            smear_previous=zeros(num_lanes, m.width),
            chunk_change=zeros(num_lanes, m.width),
            latent_sum=zeros(num_lanes, m.width),
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
        symbol = self.placement.tensor(symbols).view(-1, 1)
        chosen = table.gather(-1, symbol)
        starts = table.cumsum(-1).gather(-1, symbol) - chosen
        both: Ids = torch.cat((starts, chosen), dim=-1).cpu().numpy().reshape(*symbols.shape, 2)
        return both[..., 0], both[..., 1]

    @torch.no_grad()
    def paths(self, state: TorchState, ids: Ids, position: int, first_wanted: int, symbols: Ids) -> Ids:
        """See `LaneCoder.paths`; the tables stay on the device."""
        table = self._frequencies_of(self._logits_after(state, ids, position, first_wanted))
        sums = F.pad(table.cumsum(-1), (1, 0))
        symbol = self.placement.tensor(symbols).view(-1, 1)
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
        x = run(state, self.placement.tensor(ids), position)[:, first_wanted:]
        return self._logits(x).flatten(0, 1)

    @torch.no_grad()
    def frequencies(self, logits: Ids) -> Ids:
        """See `LaneCoder.frequencies`."""
        found: Ids = self._frequencies_of(self.placement.tensor(logits)).cpu().numpy()
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
        end, chunked, skips = position + ids.size(1), self.model.chunk_places, list[Tensor]()
        first = self.embedding.embed(state, ids, position)
        cosines, sines = (table[position:end, None] for table in (self.cosines, self.sines))
        rows = _Rows(first, ids, cosines, sines, position)
        x = self._pass(range(chunked.start), state, first, rows, skips)
        if self.chunk_scale is not None:
            x = self._chunk_blocks(state, x, rows, skips, self.chunk_scale)
        x = self._pass(range(chunked.stop, len(self.places)), state, x, rows, skips)
        return x if self.latents is None else self._inject(state, x, position)

    def _pass(self, places: range, state: TorchState, x: Tensor, rows: _Rows, skips: list[Tensor]) -> Tensor:
        """Return the residuals after the blocks at `places`, which push to `skips` and pop from it."""
        for place in places:
            if (popped := self.model.popped_place(place)) is not None:
                x = self._skipped(x, skips.pop(), self.model.num_pushing - 1 - popped)
            layer = self.places[place]
            if layer.mix is not None:
                x = saturated(rounded(x * layer.mix[0] + rows.first * layer.mix[1], fp.MIX_BITS))
            a = self._normed(x)
            window = self.model.window_of_place[place]
            y = self._attention(layer, a, rows, state.keys[place], state.values[place], window)
            x = saturated(x + layer.output.apply(y))
            x = saturated(x + mlp(layer, a if layer.is_parallel else self._normed(x)))
            if place < self.model.num_pushing:
                skips.append(x)
        return x

    def _skipped(self, x: Tensor, popped: Tensor, index: int) -> Tensor:
        assert self.skips is not None
        skip = rounded(popped * self.skips[index], fp.MIX_BITS)
        if self.skip_gates is None:
            return saturated(x + skip)
        skip = saturated(skip)
        return saturated(skip + rounded((x - skip) * self.skip_gates[index], fp.GATE_BITS))

    def _chunk_blocks(self, state: TorchState, x: Tensor, rows: _Rows, skips: list[Tensor], scale: Tensor) -> Tensor:
        """Return the residuals with what the chunk blocks changed at the last chunk that ended there or before."""
        stride, position, length = self.model.chunk_stride, rows.begin, x.size(1)
        before, ended = position // stride, (position + length) // stride
        changes = (torch.zeros_like(state.chunk_change) if position == 0 else state.chunk_change)[:, None]
        if ended > before:
            at_ends, first, ids = (at_chunk_ends(each, stride, first=position) for each in (x, rows.first, rows.ids))
            turns = slice((before + 1) * stride - 1, ended * stride, stride)
            cosines, sines = self.cosines[turns, None], self.sines[turns, None]
            chunks = _Rows(first, ids, cosines, sines, before)
            after = self._pass(self.model.chunk_places, state, at_ends, chunks, skips)
            changes = torch.cat((changes, after - at_ends), dim=1)
        state.chunk_change = changes[:, -1]
        change = of_last_chunk(changes, stride, length=length, first=position)
        return saturated(x + rounded(change * scale, fp.MIX_BITS))

    def _attention(
        self, layer: Layer, a: Tensor, rows: _Rows, keys: Tensor, values: Tensor, window: int | None
    ) -> Tensor:
        """Return the heads' outputs of normalised residuals `a` (L, N, D), (L, N, D); keys and values are kept."""
        m, position, end = self.model, rows.begin, rows.begin + a.size(1)
        H, G, E = m.num_heads, m.num_kv_heads, m.head_dim
        qk = layer.heads.apply(a).clamp(-fp.PRENORM_LIMIT, fp.PRENORM_LIMIT).unflatten(-1, (H + G, E))
        epsilon = fp.norm_epsilon(E, fp.PRENORM_BITS)
        qk = normalize(qk, fp.norm_constant(E), epsilon, fp.NORMED_BITS, fp.INT16_MAX)
        qk = turned(qk, rows.cosines, rows.sines)
        q = qk[:, :, :H] * layer.query_sign[:, None]
        v = layer.value.apply(a).clamp(-fp.INT16_MAX, fp.INT16_MAX)
        if layer.value_embedding is not None:
            v = (v + layer.value_embedding[rows.ids]).clamp(-fp.INT16_MAX, fp.INT16_MAX)
        v = v.unflatten(-1, (G, E))
        keys[:, :, position:end] = qk[:, :, H:].transpose(1, 2).short()
        values[:, :, position:end] = v.transpose(1, 2).short()
        exact = torch.int64 if self.placement.container == "int64" else torch.float64
        queries = q.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).to(exact)  # (L, G, H / G, N, E)
        scores = (queries @ keys[:, :, None, :end].to(exact).transpose(-1, -2)).long()
        back = torch.arange(position, end, device=a.device)[:, None] - torch.arange(end, device=a.device)
        visible = (back >= 0) & (back < (window or end))
        largest = scores.masked_fill(~visible, -(1 << 40)).amax(-1, keepdim=True)
        multiplier = layer.score_multiplier.view(G, H // G, 1, 1)
        exponent = rounded((largest - scores).clamp_min(0) * multiplier, layer.score_shift)
        weight = self._exp2(exponent).masked_fill(~visible, 0)
        total = weight.sum(-1, keepdim=True)
        shares = rounded(weight * (torch.full_like(total, fp.INT16_MAX << fp.INVERSE_BITS) // total), fp.INVERSE_BITS)
        y = (shares.to(exact) @ values[:, :, None, :end].to(exact)).long()
        y = rounded(y, fp.ATTENTION_BITS).clamp(-fp.INT16_MAX, fp.INT16_MAX).permute(0, 3, 1, 2, 4)
        if layer.gate is not None:
            gate = sigmoid_of(self.sigmoid, layer.gate.apply(a[..., : layer.gate.codes.size(1)]))
            gate = gate.unflatten(-1, (G, H // G))[..., None]
            y = rounded(y * gate, fp.GATE_BITS - 1).clamp(-fp.INT16_MAX, fp.INT16_MAX)
        if layer.drop_own_value:
            y = without_own_value(y, v[:, :, :, None])
        return y.flatten(2)

    def _inject(self, state: TorchState, x: Tensor, position: int) -> Tensor:
        """Return the residuals with their chunks' injections, and move the chunks on."""
        latents = self.latents
        assert latents is not None
        P, length = latents.chunk_bytes, x.size(1)
        chunk = torch.arange(position, position + length, device=x.device) // P - position // P
        num_chunks = (position + length - 1) // P - position // P + 1
        if latents.reads_residual:
            last_of_chunk = (torch.arange(1, num_chunks + 1, device=x.device) + position // P) * P - 1 - position
            read = self._normed(x[:, last_of_chunk.clamp_max(length - 1)])
        else:
            read = torch.zeros((x.size(0), num_chunks, x.size(2)), dtype=torch.int64, device=x.device)
            read.index_add_(1, chunk, x)
            if position % P:
                read[:, 0] += state.latent_sum
        if position % P:
            first = state.injection
        elif position:
            first = latents.after_chunk(state.latent_sum)
        else:
            first = latents.at_start.expand(x.size(0), -1)
        injections = torch.cat((first[:, None], latents.after_chunk(read[:, :-1])), dim=1)
        state.latent_sum, state.injection = read[:, -1], injections[:, -1]
        return saturated(x + injections[:, chunk])

    def _logits(self, x: Tensor) -> Tensor:
        scaled = self.head.apply(self._normed(x))
        size = scaled.abs().clamp_max((fp.TANH_RANGE << fp.LOGIT_BITS) - 1)
        bounded = interpolated(self.tanh, size, fp.LOGIT_BITS - fp.TANH_STEP_BITS)
        return rounded(torch.where(scaled < 0, -bounded, bounded) * self.model.softcap, fp.TANH_BITS)
