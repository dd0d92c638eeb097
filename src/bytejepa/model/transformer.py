"""ByteLM: the whole network (spec sections 2 and 3).

e  = token_embedding[ids] + bigram(ids) + ngrams(ids);   x0 = smear(rms(e))
x  = first half of the blocks, pushing each output;  second half, adding each popped output times its skip weight
     (with chunk_blocks the middle ones run once a chunk: bytejepa.model.chunk_stride)
x  = x + JEPA's injection of the latent predicted for each chunk
logits = softcap(rms(x) @ token_embedding^T)          the head is tied to the embedding
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytejepa.config import AttentionBackend, RunConfig, replace
from bytejepa.data.vocabulary import VOCABULARY_SIZE
from bytejepa.model.attention import Kernel, Mask, attention_mask, choose_backend, masked_attention
from bytejepa.model.block import Block
from bytejepa.model.blocked_attention import first_keys
from bytejepa.model.chunk_stride import add_changes, at_chunk_ends
from bytejepa.model.jepa import Jepa, Latents
from bytejepa.model.layers import (
    Linear,
    RotaryTables,
    SmearGate,
    document_starts,
    rms_norm,
    softcap,
    softcapped_cross_entropy,
)
from bytejepa.model.ngram_embedding import BigramHash, NgramHash

TRAINING_ONLY = ("multi_token_heads", "jepa.further_predictors", "jepa.byte_head")
"""How the names of parameters begin that no logit depends on."""


def prediction_config(config: RunConfig) -> RunConfig:
    """Return the configuration of the same model without what only training needs."""
    if not config.jepa.inject:
        return replace(config, model={"multi_token_heads": 0}, jepa={"enabled": False})
    return replace(config, model={"multi_token_heads": 0}, jepa={"horizons": 1, "next_bytes_weight": 0.0})


def prediction_weights(weights: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return the weights that logits depend on, those of a model of `prediction_config`: no others are in an artifact."""
    left_out = TRAINING_ONLY if config.jepa.inject else (*TRAINING_ONLY, "jepa.")
    return {name: value for name, value in weights.items() if not name.startswith(left_out)}


class Losses(NamedTuple):
    """Losses of one batch: float32 scalars."""

    ce: Tensor
    """Mean next-id cross-entropy in nats."""
    jepa_prediction: Tensor
    """Mean squared error of the predicted latents; 0 without JEPA."""
    next_bytes: Tensor
    """Mean loss in nats of predicting a chunk's ids from its predicted latent; 0 without such a head."""
    sigreg: Tensor
    """SIGReg of the latents; 0 without JEPA."""
    multi_token: Tensor
    """Mean loss in nats of the extra heads, each predicting further ahead; 0 without them."""
    latents: Latents | None
    """Detached latents, for diagnostics."""


class _BlockInputs(NamedTuple):
    """What the blocks that run at the same positions read besides the residual."""

    x0: Tensor
    ids: Tensor
    cosines: Tensor
    sines: Tensor
    document_ids: Tensor | None
    backend: Kernel
    masks: dict[int | None, Mask]
    """By window, in positions."""


class ByteLM(nn.Module):
    """A byte-level language model. Build it with `bytejepa.load`, `bytejepa.interop.pr832.build` or from a RunConfig
    (weights are then zero until `bytejepa.model.initialization.initialize` fills them)."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        model = config.model
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, model.model_dim)
        self.bigram = (
            BigramHash(model.bigram_rows, model.bigram_dim, model.model_dim, model.bigram_table)
            if model.bigram_rows
            else None
        )
        self.ngrams = (
            NgramHash(model.ngram_orders, model.ngram_rows, model.ngram_dim, model.model_dim)
            if model.ngram_orders
            else None
        )
        self.smear = SmearGate(model.model_dim, reads_input=model.smear_gate == "input") if model.smear else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(model.num_layers))
        self.num_encoder_layers = len(model.layer_order) // 2
        skips = torch.ones(self.num_encoder_layers, model.model_dim)
        self.skip_weights = nn.Parameter(skips) if model.skip_connections else None
        self.skip_gates = nn.Parameter(torch.zeros_like(skips)) if model.skip_gates else None
        self.chunk_scale = nn.Parameter(torch.ones(model.model_dim)) if model.chunk_blocks else None
        self.jepa = Jepa(model.model_dim, config.jepa) if config.jepa.enabled else None
        self.multi_token_heads = nn.ModuleList(
            Linear(model.model_dim, VOCABULARY_SIZE) for _ in range(model.multi_token_heads)
        )
        self.rotary = RotaryTables(model.rotary_dims or model.head_dim, model.rotary_base, model.rotary_length_bytes)
        self.attention_backend: AttentionBackend = config.training.attention
        self.compute_dtype = torch.float32
        """Precision of activations and products; weights keep their own and are cast where they are used."""

    @property
    def context_tables(self) -> tuple[BigramHash | NgramHash, ...]:
        """The tables whose rows are added to the token embedding."""
        return tuple(table for table in (self.bigram, self.ngrams) if table is not None)

    def hidden(self, ids: Int[Tensor, "B T"], *, scored_tail: int | None = None) -> tuple[Tensor, Latents | None]:
        """Return the last residual before the final norm, (B, T, D), injection included, and JEPA's latents.

        With `scored_tail` n only the last n positions are returned, (B, n, D), and the last block computes no more than
        they need; latents are then None.
        """
        model = self.config.model
        starts = document_starts(ids) if model.document_masking else None
        x = F.embedding(ids, self.token_embedding.weight).to(self.compute_dtype)
        for table in self.context_tables:
            x = x + table(ids, self.compute_dtype, starts)
        x0 = rms_norm(x)
        if self.smear is not None:
            x0 = self.smear(x0, document_starts(ids) if model.smear_stops_at_bos else None)
        x = self._blocks(x0, ids, starts, scored_tail)
        if self.jepa is None:
            return (x if scored_tail is None else x[:, -scored_tail:]), None
        if scored_tail is not None:
            return self._inject_tail(x, ids.size(1), scored_tail, starts), None
        latents = self.jepa.latents(x, starts)
        if self.config.jepa.inject:
            x = self.jepa.inject(x, latents.predicted, starts)
        return x, latents

    def _blocks(self, x0: Tensor, ids: Tensor, starts: Tensor | None, scored_tail: int | None) -> Tensor:
        model = self.config.model
        length, last, chunked = ids.size(1), len(model.layer_order) - 1, model.chunk_places
        bytewise = self._inputs(x0, ids, starts)
        skips: list[Tensor] = []
        x = self._pass(range(chunked.start), x0, bytewise, skips)
        if chunked and length >= model.chunk_stride_bytes:
            x = self._chunk_blocks(x, bytewise, skips)
        x = self._pass(range(chunked.stop, last), x, bytewise, skips)
        if scored_tail is None:
            return self._pass(range(last, last + 1), x, bytewise, skips)
        block, x = self.blocks[model.layer_order[last]], self._skipped(x, skips, last)
        mask = attention_mask(length, model.window_of_place[last], bytewise.document_ids, x.device)
        kept = self._kept_tail(length, scored_tail)
        return self._last_block_tail(block, x, x0, ids, bytewise.cosines, bytewise.sines, mask, kept)

    def _pass(self, places: range, x: Tensor, inputs: _BlockInputs, skips: list[Tensor]) -> Tensor:
        """Return the residual after the blocks at `places`, which push to `skips` and pop from it."""
        model = self.config.model
        for place in places:
            x = self.blocks[model.layer_order[place]](
                self._skipped(x, skips, place),
                inputs.x0,
                inputs.ids,
                inputs.cosines,
                inputs.sines,
                backend=inputs.backend,
                mask=inputs.masks[model.window_of_place[place]],
            )
            if place < self.num_encoder_layers:
                skips.append(x)
        return x

    def _chunk_blocks(self, x: Tensor, bytewise: _BlockInputs, skips: list[Tensor]) -> Tensor:
        """Return the residual of all positions with what the chunk blocks changed at the last one of each chunk."""
        assert self.chunk_scale is not None
        stride = self.config.model.chunk_stride_bytes
        chunkwise = self._inputs_of_chunks(bytewise)
        before = at_chunk_ends(x, stride).contiguous()
        change = self._pass(self.config.model.chunk_places, before, chunkwise, skips) - before
        changes = F.pad(change, (0, 0, 1, 0))
        if bytewise.document_ids is None or chunkwise.document_ids is None:
            return add_changes(x, changes, self.chunk_scale, stride)
        documents = F.pad(chunkwise.document_ids, (1, 0)), bytewise.document_ids
        return add_changes(x, changes, self.chunk_scale, stride, documents=documents)

    def _inputs(self, x0: Tensor, ids: Tensor, starts: Tensor | None) -> _BlockInputs:
        """Return what the blocks read that run at every byte."""
        document_ids = None if starts is None else starts.cumsum(1, dtype=torch.int32)
        backend, masks = self.attention_masks(
            1, ids.size(1), document_ids, x0.device, compiled=torch.compiler.is_compiling()
        )
        cosines, sines = self.rotary(ids.size(1))
        return _BlockInputs(x0, ids, cosines, sines, document_ids, backend, masks)

    def _inputs_of_chunks(self, bytewise: _BlockInputs) -> _BlockInputs:
        """Return what the chunk blocks read: that of each chunk's last byte, whose position also rotates."""
        stride = self.config.model.chunk_stride_bytes
        x0, ids = (at_chunk_ends(given, stride).contiguous() for given in (bytewise.x0, bytewise.ids))
        cosines, sines = bytewise.cosines[stride - 1 :: stride], bytewise.sines[stride - 1 :: stride]
        document_ids = None if bytewise.document_ids is None else at_chunk_ends(bytewise.document_ids, stride)
        backend, masks = self.attention_masks(
            stride, ids.size(1), document_ids, x0.device, compiled=torch.compiler.is_compiling()
        )
        return _BlockInputs(x0, ids, cosines, sines, document_ids, backend, masks)

    def _skipped(self, x: Tensor, skips: list[Tensor], place: int) -> Tensor:
        """Return the residual `x` that comes to `place`, in the second half with the output popped that belongs to it."""
        index = place - self.num_encoder_layers
        if index < 0 or not skips:
            return x
        skip = skips.pop()
        if self.skip_weights is None:
            return x
        weight = self.skip_weights[index].to(x.dtype)
        if self.skip_gates is None:
            return torch.addcmul(x, weight, skip)
        return torch.lerp(weight * skip, x, torch.sigmoid(self.skip_gates[index]).to(x.dtype).expand_as(x))

    def attention_masks(
        self,
        stride: int,
        length: int,
        document_ids: Int[Tensor, "B T"] | None,
        device: torch.device,
        *,
        compiled: bool,
    ) -> tuple[Kernel, dict[int | None, Mask]]:
        """Return the kernel of the blocks that run every `stride` bytes, and one mask for each of their windows in its form.

        `length`: of those positions; `document_ids`: a number at each of them that rises where a document starts, None
        without document masking. Raises: ConfigError as `attention_kernel` does.
        """
        windows = self._windows(stride)
        backend = self.attention_kernel(stride, length, device, compiled=compiled)
        if backend == "flex":
            from bytejepa.model.flex_masks import block_mask

            return backend, {window: block_mask(length, window, document_ids, device) for window in windows}
        if backend in ("flash3", "flash4"):
            return backend, {window: window if window is not None and window < length else None for window in windows}
        form = first_keys if backend == "blocked" else attention_mask
        return backend, {window: form(length, window, document_ids, device) for window in windows}

    def _windows(self, stride: int) -> set[int | None]:
        model = self.config.model
        return {w for w, s in zip(model.window_of_place, model.stride_of_place, strict=True) if s == stride}

    def attention_kernel(self, stride: int, length: int, device: torch.device, *, compiled: bool) -> Kernel:
        """Return the kernel of the blocks that run every `stride` bytes on `length` of those positions.

        Raises: ConfigError, with the reason, where `training.attention` asks for one that cannot do it.
        """
        bounded = any(w is not None and w < length for w in self._windows(stride))
        documents = self.config.model.document_masking
        return choose_backend(
            self.attention_backend,
            device.type,
            windows=bounded,
            documents=documents,
            dtype=self.compute_dtype,
            compiled=compiled,
            head_width=self.config.model.head_dim,
        )

    def attention_kernels(self, length: int, device: torch.device, *, compiled: bool) -> list[Kernel]:
        """Return every kernel that sequences of `length` ids go through, `compiled` or not, sorted."""
        strides = set(self.config.model.stride_of_place)
        kernels = (self.attention_kernel(s, length // s, device, compiled=compiled) for s in strides)
        return sorted(set(kernels))

    def _kept_tail(self, length: int, scored_tail: int) -> int:
        """Return how many last positions the last block must compute: the scored ones from their chunk's border on, and
        the chunk before, whose latent is injected into them."""
        if self.jepa is None or not self.config.jepa.inject:
            return scored_tail
        P = self.config.jepa.chunk_bytes
        first = max(0, (length - scored_tail) // P - 1) * P
        return length - first

    def _last_block_tail(
        self,
        block: nn.Module,
        x: Tensor,
        x0: Tensor,
        ids: Tensor,
        cosines: Tensor,
        sines: Tensor,
        mask: Tensor | None,
        kept: int,
    ) -> Tensor:
        assert isinstance(block, Block)
        x = block.mix(x, x0)
        first = x.size(1) - kept
        normalized = rms_norm(x)
        q, k, v = block.attention.project_tail(
            normalized, ids, cosines, sines, first_query=first, norm_scale=block.norm_scale
        )
        if mask is None:
            position = torch.arange(x.size(1), device=x.device)
            mask = (position[first:, None] >= position)[None, None]
        else:
            mask = mask[:, :, first:]
        tail = normalized[:, first:]
        y = block.attention.gated(masked_attention(q, k, v, mask), tail)
        x = block.attention.merge(y, v[:, first:], x[:, first:], block.attention_scale)
        return block.transform(tail, x)

    def _inject_tail(self, x: Tensor, length: int, scored_tail: int, starts: Tensor | None) -> Tensor:
        """Return the scored tail with its injection, given the residual of the positions `_kept_tail` counted."""
        assert self.jepa is not None
        if not self.config.jepa.inject:
            return x[:, -scored_tail:]
        kept = x.size(1)
        tail_starts = None if starts is None else starts[:, length - kept :]
        latents = self.jepa.latents(x, tail_starts)
        if kept == length:
            return self.jepa.inject(x, latents.predicted, tail_starts)[:, -scored_tail:]
        # the first kept chunk has no predecessor here and is not scored
        P = self.config.jepa.chunk_bytes
        return self.jepa.inject(x, latents.predicted[:, 1:], tail_starts, first_position=P)[:, -scored_tail:]

    def _uncapped(self, x: Tensor) -> Tensor:
        return F.linear(rms_norm(x), self.token_embedding.weight.to(x.dtype))

    def _head(self, x: Tensor) -> Tensor:
        return softcap(self._uncapped(x), self.config.model.logit_softcap)

    def logits(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the float32 logits of the next id at every position, (B, T, 260)."""
        return self._head(self.hidden(ids)[0])

    forward = logits

    def tail_logits(self, ids: Int[Tensor, "B T"], scored_tail: int) -> Float[Tensor, "B N V"]:
        """Return the logits of the last `scored_tail` positions; equal to those of `logits` up to rounding, for less work."""
        return self._head(self.hidden(ids, scored_tail=scored_tail)[0])

    def losses(self, inputs: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], *, jepa: bool = True) -> Losses:
        """Return the losses of predicting `targets` from `inputs` (targets are the inputs, one id later).

        `jepa` False leaves out the latent losses, which costs nothing while their weight is zero; they are then 0, as
        they are for inputs shorter than a chunk.
        """
        x, latents = self.hidden(inputs)
        ce = softcapped_cross_entropy(
            self._uncapped(x).flatten(0, 1), targets.flatten().long(), self.config.model.logit_softcap
        )
        zero = ce.new_zeros(())
        prediction = regularizer = next_bytes = zero
        starts = document_starts(inputs) if self.config.model.document_masking else None
        if jepa and self.jepa is not None and latents is not None and latents.target.size(1):
            prediction, regularizer = self.jepa.prediction_loss(latents, starts), self.jepa.sigreg(latents.target)
        if self.jepa is not None and latents is not None:
            next_bytes = self.jepa.next_bytes_loss(latents.predicted, inputs, starts)
        detached = None if latents is None else Latents(*(part.detach() for part in latents))
        return Losses(ce, prediction, next_bytes, regularizer, self._multi_token_loss(x, targets), detached)

    def _multi_token_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        total = x.new_zeros((), dtype=torch.float32)
        for ahead, head in enumerate(self.multi_token_heads, start=1):
            logits, bound = head(rms_norm(x[:, :-ahead])).flatten(0, 1), self.config.model.logit_softcap
            total = total + softcapped_cross_entropy(logits, targets[:, ahead:].flatten().long(), bound)
        return total / max(1, len(self.multi_token_heads))
