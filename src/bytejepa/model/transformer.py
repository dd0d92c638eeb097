"""ByteLM: the whole network (spec sections 2 and 3).

e  = token_embedding[ids] + bigram(ids) + ngrams(ids);   x0 = smear(rms(e))
x  = first half of the blocks, pushing each output;  second half, adding each popped output times its skip weight
x  = x + JEPA's injection of the latent predicted for each chunk
logits = softcap(rms(x) @ token_embedding^T)          the head is tied to the embedding
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytejepa.config import AttentionBackend, RunConfig, replace
from bytejepa.data.vocabulary import VOCABULARY_SIZE
from bytejepa.model.attention import Kernel, Mask, attention_mask, choose_backend, masked_attention
from bytejepa.model.block import Block
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
"""How the names of parameters begin that no logit depends on: they are in no artifact."""


def prediction_config(config: RunConfig) -> RunConfig:
    """Return the configuration of the same model without what only training needs."""
    return replace(config, model={"multi_token_heads": 0}, jepa={"horizons": 1, "next_bytes_weight": 0.0})


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
        length = ids.size(1)
        cosines, sines = self.rotary(length)
        backend = choose_backend(self.attention_backend, x0.device.type, masked=self._is_masked(length))
        masks = self._masks(length, starts, x0.device, backend)
        windows, order = self.config.model.window_of_layer, self.config.model.layer_order
        x = x0
        skips: list[Tensor] = []
        for place, layer in enumerate(order):
            block = self.blocks[layer]
            if place >= self.num_encoder_layers and skips:
                x = self._skipped(x, skips.pop(), place - self.num_encoder_layers)
            if scored_tail is not None and place == len(order) - 1:
                document_ids = None if starts is None else starts.cumsum(1, dtype=torch.int32)
                mask = attention_mask(length, windows[layer], document_ids, x.device)
                kept = self._kept_tail(length, scored_tail)
                return self._last_block_tail(block, x, x0, ids, cosines, sines, mask, kept)
            x = block(x, x0, ids, cosines, sines, backend=backend, mask=masks[windows[layer]])
            if place < self.num_encoder_layers:
                skips.append(x)
        return x

    def _skipped(self, x: Tensor, skip: Tensor, index: int) -> Tensor:
        """Return the residual with the output of the first half that belongs to step `index` of the second."""
        if self.skip_weights is None:
            return x
        weight = self.skip_weights[index].to(x.dtype)
        if self.skip_gates is None:
            return torch.addcmul(x, weight, skip)
        return torch.lerp(weight * skip, x, torch.sigmoid(self.skip_gates[index]).to(x.dtype).expand_as(x))

    def _is_masked(self, length: int) -> bool:
        windows = self.config.model.window_of_layer
        return self.config.model.document_masking or any(w is not None and w < length for w in windows)

    def _masks(
        self, length: int, starts: Tensor | None, device: torch.device, backend: Kernel
    ) -> dict[int | None, Mask]:
        """Return one mask for each distinct window, in the form that `backend` takes."""
        document_ids = None if starts is None else starts.cumsum(1, dtype=torch.int32)
        windows = set(self.config.model.window_of_layer)
        if backend == "flex":
            from bytejepa.model.flex_masks import block_mask

            return {window: block_mask(length, window, document_ids, device) for window in windows}
        return {window: attention_mask(length, window, document_ids, device) for window in windows}

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
        if jepa and self.jepa is not None and latents is not None and latents.target.size(1):
            starts = document_starts(inputs) if self.config.model.document_masking else None
            prediction, regularizer = self.jepa.prediction_loss(latents, starts), self.jepa.sigreg(latents.target)
        if self.jepa is not None and latents is not None:
            next_bytes = self.jepa.next_bytes_loss(latents.predicted, inputs)
        detached = None if latents is None else Latents(*(part.detach() for part in latents))
        return Losses(ce, prediction, next_bytes, regularizer, self._multi_token_loss(x, targets), detached)

    def _multi_token_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        total = x.new_zeros((), dtype=torch.float32)
        for ahead, head in enumerate(self.multi_token_heads, start=1):
            logits, bound = head(rms_norm(x[:, :-ahead])).flatten(0, 1), self.config.model.logit_softcap
            total = total + softcapped_cross_entropy(logits, targets[:, ahead:].flatten().long(), bound)
        return total / max(1, len(self.multi_token_heads))
