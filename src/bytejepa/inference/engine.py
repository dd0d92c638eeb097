"""The incremental engine: a ByteLM fed one id or a block of ids at a time, in any number of lanes.

The rule for contexts beyond the window. The engine predicts within windows of `window` ids that begin at multiples of
`hop`. When a window is full and another id comes, the first `hop` ids leave it and the model is run again over the
`window - hop` ids that stay. So the logits at position t are those of `ByteLM.logits` over the ids begin .. t, where begin
is 0 for t < window and otherwise the smallest multiple of `hop` with t - begin < window: what sliding evaluation
computes (`bytejepa.scoring.windows`, with `stride` = `hop`). Nothing older than begin has any influence.

Ragged ends. `ByteLM.logits` adds no JEPA injection to a chunk that the end of its input cuts off, so its last logits
depend on where the text ends. A stream does not know that and gets the injection everywhere: its logits equal those of a
forward pass that goes on to the end of the chunk. Where the length is known, `start(num_ids=...)` leaves the injection
out of the cut chunk, and then every logit equals that of scoring.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bytejepa.data.vocabulary import VOCABULARY_SIZE
from bytejepa.errors import ConfigError
from bytejepa.inference.chunks import ChunkInjector
from bytejepa.inference.state import AttentionCache, EngineState, JepaState
from bytejepa.inference.weights import BlockWeights, block_weights
from bytejepa.model.chunk_stride import add_changes, at_chunk_ends
from bytejepa.model.layers import document_starts, softcap
from bytejepa.model.transformer import ByteLM

BLOCK_IDS = 32_768
"""Most ids of all lanes in one pass: bounds the memory of a prefill."""
BLOCK_POSITIONS = 512
"""Most positions in one pass: the scores above the diagonal, computed in vain, stay under half a block."""


class _BlockInputs(NamedTuple):
    """What blocks read besides the residual of n new positions: bytes, or for the chunk blocks chunks."""

    x0: Tensor
    """(L, n, D)."""
    ids: Tensor
    """(L, n)."""
    first: int
    """Place of the first new position in the caches."""
    cosines: Tensor
    """For every position of the window."""
    sines: Tensor
    document_ids: Tensor | None
    """(L, positions of the window)."""


class Engine:
    """Incremental inference with a copy of a model's weights; the lanes' state lives in `EngineState`.

    `window` and `hop` in ids: see the module's docstring. By default the window is the model's evaluation window, or the
    context it was trained for if that is shorter, and the hop its evaluation stride.

    Raises: ConfigError if the window is longer than `model.rotary_length_bytes` (the rotary base would change with every
    byte, and keys could not be kept), or chunks of overlapping windows would not coincide.
    """

    def __init__(self, model: ByteLM, *, window: int | None = None, hop: int | None = None) -> None:
        config = model.config
        self.model = model
        self.injector = (
            ChunkInjector(model.jepa, model.compute_dtype) if model.jepa is not None and config.jepa.inject else None
        )
        self.window, self.hop = _checked_window(model, window, hop)
        self.blocks = block_weights(model)
        self.device = model.token_embedding.weight.device
        self.dtype = model.compute_dtype
        self.cosines, self.sines = (table.to(self.dtype) for table in model.rotary(self.window))
        self.chunk_scale = None if model.chunk_scale is None else model.chunk_scale.detach().to(self.dtype, copy=True)
        self.half = self.cosines.size(-1)
        self.epsilon = torch.tensor(torch.finfo(self.dtype).eps, dtype=self.dtype, device=self.device)
        self.head = model.token_embedding.weight.detach().to(self.dtype, copy=True)

    @torch.inference_mode()
    def start(self, *, num_lanes: int = 1, num_ids: int | None = None) -> EngineState:
        """Return the state of `num_lanes` empty lanes.

        `num_ids`: how many ids will be fed to each lane in all, if known: the injection is then left out of the chunk
        that the text's end cuts off, as in a forward pass over the whole text. None: it is added everywhere.
        """
        model = self.model.config.model
        L, W = num_lanes, self.window

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return EngineState(
            num_lanes=L,
            num_ids=num_ids,
            begin=0,
            position=0,
            window_ids=torch.zeros(L, W, dtype=torch.int64, device=self.device),
            document_ids=torch.zeros(L, W, dtype=torch.int32, device=self.device) if model.document_masking else None,
            smear_previous=zeros(L, 1, model.model_dim),
            blocks=tuple(
                AttentionCache(
                    keys=zeros(L, model.num_kv_heads, W // stride, model.head_dim),
                    values=zeros(L, model.num_kv_heads, W // stride, model.head_dim),
                )
                for stride in model.stride_of_place
            ),
            chunk_change=zeros(L, model.model_dim) if model.chunk_blocks else None,
            jepa=None if self.injector is None else self.injector.start(L),
        )

    @torch.inference_mode()
    def feed(self, state: EngineState, ids: Int[Tensor, "L N"]) -> Float[Tensor, "L N V"]:
        """Return the float32 logits of the id after each of `ids`, (L, N, 260), and move `state` on by N ids."""
        if ids.size(0) != state.num_lanes:
            raise ConfigError(f"expected ids for {state.num_lanes} lanes, got {ids.size(0)}")
        ids = ids.to(self.device, torch.int64)
        logits = [self._logits(hidden) for hidden in self._advance(state, ids)]
        if len(logits) == 1:
            return logits[0]
        return (
            torch.cat(logits, dim=1) if logits else torch.zeros(state.num_lanes, 0, VOCABULARY_SIZE, device=self.device)
        )

    @torch.inference_mode()
    def step(self, state: EngineState, ids: Int[Tensor, " L"]) -> Float[Tensor, "L V"]:
        """Return the logits after one id a lane, (L, 260)."""
        return self.feed(state, ids[:, None])[:, 0]

    @torch.inference_mode()
    def prefill(self, state: EngineState, ids: Int[Tensor, "L N"]) -> Float[Tensor, "L V"]:
        """Return the logits after the last of `ids`, (L, 260): the last of `feed`'s, for less work.

        From an empty state windows are skipped that later ones make irrelevant. Raises: ConfigError without ids.
        """
        length = ids.size(1)
        if length == 0:
            raise ConfigError("prefill needs at least one id", hint="begin a text with BOS")
        ids = ids.to(self.device, torch.int64)
        if state.num_fed == 0 and length > self.window:
            state.begin = -(-(length - self.window) // self.hop) * self.hop
            ids = ids[:, state.begin :]
        for hidden in self._advance(state, ids):
            last = hidden
        return self._logits(last[:, -1])

    @torch.inference_mode()
    def select(self, state: EngineState, lanes: list[int]) -> EngineState:
        """Return a new state whose lane j is a copy of lane `lanes[j]`: to fork a prompt, or to drop lanes."""
        index = torch.tensor(lanes, device=self.device)

        def picked(x: Tensor) -> Tensor:
            return x.index_select(0, index)

        return EngineState(
            num_lanes=len(lanes),
            num_ids=state.num_ids,
            begin=state.begin,
            position=state.position,
            window_ids=picked(state.window_ids),
            document_ids=None if state.document_ids is None else picked(state.document_ids),
            smear_previous=picked(state.smear_previous),
            blocks=tuple(AttentionCache(keys=picked(c.keys), values=picked(c.values)) for c in state.blocks),
            chunk_change=None if state.chunk_change is None else picked(state.chunk_change),
            jepa=None
            if state.jepa is None
            else JepaState(
                residual_sum=picked(state.jepa.residual_sum),
                num_summed=picked(state.jepa.num_summed),
                injection=picked(state.jepa.injection),
            ),
        )

    def _advance(self, state: EngineState, ids: Tensor) -> Iterator[Tensor]:
        """Yield the last residuals of consecutive parts of `ids`, (L, n, D) each, injection included."""
        done, length = 0, ids.size(1)
        while done < length:
            if state.position == self.window:
                self._slide(state)
            room = min(self.window - state.position, BLOCK_POSITIONS, max(1, BLOCK_IDS // state.num_lanes))
            part = ids[:, done : done + room]
            yield self._advance_within_window(state, part)
            done += part.size(1)

    def _slide(self, state: EngineState) -> None:
        """Let the first `hop` ids leave the window and run the model over those that stay."""
        kept = state.window_ids[:, self.hop :].clone()
        state.begin += self.hop
        state.position = 0
        state.smear_previous.zero_()
        if state.chunk_change is not None:
            state.chunk_change.zero_()
        if self.injector is not None and state.jepa is not None:
            self.injector.reset(state.jepa)
        for _ in self._advance(state, kept):
            pass

    def _advance_within_window(self, state: EngineState, ids: Tensor) -> Tensor:
        first, last = state.position, state.position + ids.size(1)
        starts = document_starts(ids) if state.document_ids is not None else None
        state.window_ids[:, first:last] = ids
        if state.document_ids is not None and starts is not None:
            document = starts.cumsum(1, dtype=torch.int32)
            if first:
                document += state.document_ids[:, first - 1 : first]
            state.document_ids[:, first:last] = document
        x0 = self._embed(state, ids, starts)
        inputs = _BlockInputs(x0, ids, first, self.cosines, self.sines, state.document_ids)
        chunked, skips = self.model.config.model.chunk_places, list[Tensor]()
        x = self._pass(range(chunked.start), state, x0, inputs, skips)
        if state.chunk_change is not None:
            x = self._chunk_blocks(state, state.chunk_change, x, inputs, skips)
        x = self._pass(range(chunked.stop, len(self.blocks)), state, x, inputs, skips)
        if self.injector is not None and state.jepa is not None:
            x = self._inject(state, x, starts)
        state.position = last
        return x

    def _pass(self, places: range, state: EngineState, x: Tensor, inputs: _BlockInputs, skips: list[Tensor]) -> Tensor:
        """Return the residual after the blocks at `places`, which push to `skips` and pop from it."""
        masks: dict[int | None, Tensor | None] = {}
        for place in places:
            weights = self.blocks[place]
            if weights.window not in masks:
                masks[weights.window] = self._mask(inputs, weights.window)
            if weights.skip is not None and weights.skip_gate is not None:
                x = torch.lerp(weights.skip * skips.pop(), x, weights.skip_gate.expand_as(x))
            elif weights.skip is not None:
                x = torch.addcmul(x, weights.skip, skips.pop())
            x = self._block(weights, state.blocks[place], x, inputs, masks[weights.window])
            if place < self.model.num_encoder_layers:
                skips.append(x)
        return x

    def _chunk_blocks(
        self, state: EngineState, chunk_change: Tensor, x: Tensor, inputs: _BlockInputs, skips: list[Tensor]
    ) -> Tensor:
        """Return the residual with what the chunk blocks changed at the chunks that end in it, and at the last before."""
        model, scale = self.model.config.model, self.chunk_scale
        assert scale is not None
        stride, first, last = model.chunk_stride_bytes, inputs.first, inputs.first + x.size(1)
        before, ended = first // stride, last // stride
        changes = chunk_change[:, None]
        of_chunks = None if inputs.document_ids is None else at_chunk_ends(inputs.document_ids, stride)
        if ended > before:
            at_ends, x0, ids = (at_chunk_ends(given, stride, first=first) for given in (x, inputs.x0, inputs.ids))
            cosines, sines = self.cosines[stride - 1 :: stride], self.sines[stride - 1 :: stride]
            chunkwise = _BlockInputs(x0, ids, before, cosines, sines, of_chunks)
            change = self._pass(model.chunk_places, state, at_ends, chunkwise, skips) - at_ends
            changes = torch.cat((changes, change), dim=1)
            chunk_change.copy_(change[:, -1])
        documents = None
        if inputs.document_ids is not None and of_chunks is not None:
            # before the first chunk's end the change is zero, whatever document stands for it
            of_last = F.pad(of_chunks, (1, 0))[:, before : ended + 1]
            documents = of_last, inputs.document_ids[:, first:last]
        return add_changes(x, changes, scale, stride, first=first, documents=documents)

    def _embed(self, state: EngineState, ids: Tensor, starts: Tensor | None) -> Tensor:
        model, first = self.model, state.position
        x = F.embedding(ids, self.head)
        for table in model.context_tables:
            # what came before is read from the window, its own rows are thrown away
            known = min(first, table.reach)
            context = state.window_ids[:, first - known : first + ids.size(1)]
            context_starts = None if starts is None else document_starts(context)
            x = x + table(context, self.dtype, context_starts)[:, known:]
        x = self._rms_norm(x)
        if model.smear is None:
            return x
        extended = torch.cat((state.smear_previous, x), dim=1)
        state.smear_previous.copy_(x[:, -1:])
        padded = F.pad(document_starts(ids), (1, 0)) if model.config.model.smear_stops_at_bos else None
        return model.smear(extended, padded)[:, 1:]

    def _block(
        self, weights: BlockWeights, cache: AttentionCache, x: Tensor, inputs: _BlockInputs, mask: Tensor | None
    ) -> Tensor:
        if weights.mix is not None:
            x = torch.addcmul(weights.mix[0] * x, weights.mix[1], inputs.x0)
        normalized = self._rms_norm(x)
        x = torch.addcmul(x, weights.attention_scale, self._attention(weights, cache, normalized, inputs, mask))
        hidden = F.linear(normalized if weights.is_parallel else self._rms_norm(x), weights.up)
        hidden = F.leaky_relu_(hidden, 0.5).square_()
        return torch.addcmul(x, weights.mlp_scale, F.linear(hidden, weights.down))

    def _attention(
        self, weights: BlockWeights, cache: AttentionCache, x: Tensor, inputs: _BlockInputs, mask: Tensor | None
    ) -> Tensor:
        H, G = weights.num_heads, weights.num_kv_heads
        first, last = inputs.first, inputs.first + x.size(1)
        heads = F.linear(x, weights.qkv).unflatten(-1, (H + 2 * G, -1))  # (L, n, H + 2G, E)
        qk = self._rms_norm(heads[:, :, : H + G]) * weights.head_gain
        # the product is a new tensor, so its rotating part can be turned in place
        cos, sin = inputs.cosines[first:last, None], inputs.sines[first:last, None]
        a, b = qk[..., : self.half], qk[..., self.half : 2 * self.half]
        turned = a * cos + b * sin
        b.mul_(cos).addcmul_(a, sin, value=-1)
        a.copy_(turned)
        v = heads[:, :, H + G :]
        if weights.value_embedding is not None:
            v = v + weights.value_embedding[inputs.ids]
        cache.keys[:, :, first:last] = qk[:, :, H:].transpose(1, 2)
        cache.values[:, :, first:last] = v.transpose(1, 2)
        oldest = 0 if weights.window is None else max(0, first - weights.window + 1)
        y = _grouped_attention(qk[:, :, :H], cache.keys[:, :, oldest:last], cache.values[:, :, oldest:last], mask)
        if weights.gate is not None:
            gates = 2 * torch.sigmoid(F.linear(x[..., : weights.gate.size(1)], weights.gate))
            y = y * gates.unflatten(-1, (G, H // G))[..., None]
        if weights.drop_own_value:
            direction = F.normalize(v, dim=-1)[:, :, :, None]
            y = y - (y * direction).sum(-1, keepdim=True) * direction
        return F.linear(y.flatten(2), weights.output)

    def _mask(self, inputs: _BlockInputs, window: int | None) -> Tensor | None:
        """Return which keys the queries of the new positions may see, bool (1 or L, 1, n, keys), or None: all of them.

        The keys begin with the oldest that the first query sees.
        """
        first, last, documents = inputs.first, inputs.first + inputs.ids.size(1), inputs.document_ids
        if last - first == 1 and documents is None:
            return None
        oldest = 0 if window is None else max(0, first - window + 1)
        query = torch.arange(first, last, device=self.device)[:, None]
        key = torch.arange(oldest, last, device=self.device)
        mask = None
        if last - first > 1:
            mask = (key <= query)[None, None]
            if window is not None:
                mask = mask & (query - key < window)
        if documents is not None:
            same = (documents[:, first:last, None] == documents[:, None, oldest:last])[:, None]
            mask = same if mask is None else mask & same
        return mask

    def _inject(self, state: EngineState, x: Tensor, starts: Tensor | None) -> Tensor:
        assert self.injector is not None
        assert state.jepa is not None
        injected = self.injector.advance(state.jepa, x, state.position, starts)
        if state.num_ids is None:
            return injected
        P = self.injector.chunk_bytes
        whole = max(0, state.num_ids // P * P - state.num_fed)  # positions of this block before the cut chunk
        return injected if whole >= x.size(1) else torch.cat((injected[:, :whole], x[:, whole:]), dim=1)

    def _rms_norm(self, x: Tensor) -> Tensor:
        # one id at a time the number of operations is what costs: these are half of F.rms_norm's
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.epsilon, norm, norm, value=1 / x.size(-1)).rsqrt_()

    def _logits(self, x: Tensor) -> Tensor:
        return softcap(F.linear(self._rms_norm(x), self.head), self.model.config.model.logit_softcap)


def _grouped_attention(
    q: Float[Tensor, "L N H E"], k: Float[Tensor, "L G S E"], v: Float[Tensor, "L G S E"], mask: Tensor | None
) -> Float[Tensor, "L N G R E"]:
    """Return attention of N queries, R = H / G heads of them for each key head, without repeating keys or values."""
    L, N, H, E = q.shape
    G = k.size(1)
    R = H // G
    queries = q.unflatten(2, (G, R)).permute(0, 2, 3, 1, 4).reshape(L, G, R * N, E)
    if mask is not None:
        mask = mask.repeat(1, 1, R, 1)  # the heads of a group are R runs of N queries
    y = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask)
    return y.unflatten(2, (R, N)).permute(0, 3, 1, 2, 4)


def chunk_multiple(model: ByteLM) -> int:
    """Return what windows and hops of `model` must be multiples of: its chunks where their latents are injected, else 1."""
    return model.config.jepa.chunk_bytes if model.jepa is not None and model.config.jepa.inject else 1


def default_window(model: ByteLM) -> int:
    """Return the model's evaluation window, or the longest that the rotary codes allow, in whole chunks."""
    window = min(model.config.evaluation.window_bytes, model.config.model.rotary_length_bytes)
    return window - window % chunk_multiple(model)


def _checked_window(model: ByteLM, window: int | None, hop: int | None) -> tuple[int, int]:
    longest, chunk_bytes = model.config.model.rotary_length_bytes, chunk_multiple(model)
    if window is None:
        window = default_window(model)
    if hop is None:
        hop = min(model.config.evaluation.stride_bytes, window)
    if not 1 <= window <= longest:
        raise ConfigError(
            f"engine window: expected 1 to model.rotary_length_bytes {longest}, got {window}",
            hint="beyond it the rotary base changes with the length of the context",
        )
    if not 1 <= hop <= window:
        raise ConfigError(f"engine hop: expected 1 to the window {window}, got {hop}")
    if window % chunk_bytes or hop % chunk_bytes:
        raise ConfigError(
            f"engine window {window} and hop {hop} must be multiples of jepa.chunk_bytes {chunk_bytes}",
            hint="chunks of overlapping windows must coincide",
        )
    return window, hop
