"""One forward and backward pass over this rank's share of a batch, compiled or not, in micro-batches or whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bytejepa.config import RunConfig
from bytejepa.model import fused_mlp
from bytejepa.model.attention import available_backends
from bytejepa.model.jepa import Latents
from bytejepa.model.quantization import fake_quantize_rows, is_block_matrix, row_rule, stored_bits
from bytejepa.model.transformer import ByteLM
from bytejepa.training.gradient_buckets import GradientBuckets

MOST_GRAPHS = 64
"""Versions of the compiled step that may exist: sequence lengths times latent losses on and off times quantiser on and off."""


class StepLosses(NamedTuple):
    """Losses of this rank's share of a step: detached 0-dimensional tensors that have not been waited for."""

    ce: Tensor
    jepa_prediction: Tensor
    sigreg: Tensor
    latents: Latents | None
    """Of the last micro-batch."""


class _WeightedLoss(nn.Module):
    """The scalar that is minimised, and its parts."""

    def __init__(self, model: ByteLM, config: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.sigreg_weight = config.jepa.sigreg_weight
        self.next_bytes_weight = config.jepa.next_bytes_weight if config.jepa.enabled else 0.0
        self.multi_token_weight = config.training.multi_token_weight

    def forward(self, inputs: Tensor, targets: Tensor, jepa_lambda: Tensor, jepa: bool) -> tuple[Tensor, ...]:
        losses = self.model.losses(inputs, targets, jepa=jepa)
        total = losses.ce
        # terms that are always zero are left out: the compiler folds them, and then mistakes the sum for its detached part
        if self.model.multi_token_heads:
            total = total + self.multi_token_weight * losses.multi_token
        if self.next_bytes_weight:
            total = total + self.next_bytes_weight * losses.next_bytes
        if jepa:
            total = total + jepa_lambda * (losses.jepa_prediction + self.sigreg_weight * losses.sigreg)
        parts = (total, losses.ce.detach(), losses.jepa_prediction.detach(), losses.sigreg.detach())
        return parts + (tuple(losses.latents) if losses.latents is not None else ())


class GradientStep:
    """Computes losses and leaves their gradients, averaged over micro-batches, in `.grad`."""

    def __init__(
        self,
        model: ByteLM,
        config: RunConfig,
        *,
        compile: bool,  # noqa: A002 - torch's word
        buckets: GradientBuckets | None = None,
    ) -> None:
        self.config = config
        self.buckets = buckets
        self.loss = _WeightedLoss(model, config)
        self.matrices = [
            name
            for name, parameter in model.named_parameters()
            if is_block_matrix(name) and stored_bits(name, parameter, config.artifact) is not None
        ]
        self.weighted_loss = self._compiled() if compile else self._forward

    def _compiled(self) -> Callable[..., tuple[Tensor, ...]]:
        # one graph each for a sequence length with and without latent losses, through the quantiser or not: shapes that are
        # left symbolic give slower kernels, and past its limit the compiler would run the rest uncompiled
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
        device_type = next(self.loss.parameters()).device.type
        available_backends(device_type)  # found while tracing, the first graph is made twice
        fused_mlp.find(device_type)
        return torch.compile(self._forward, dynamic=False)

    def _forward(
        self, inputs: Tensor, targets: Tensor, jepa_lambda: Tensor, jepa: bool, quantized: bool
    ) -> tuple[Tensor, ...]:
        # both switches are arguments: torch.compile guards them, where it would fold an attribute into the graph for good
        if not quantized:
            return self.loss(inputs, targets, jepa_lambda, jepa)
        parameters = dict(self.loss.model.named_parameters())
        bits, rounded = self.config.artifact.matrix_bits, {}
        for name in self.matrices:
            rule = row_rule(name, self.config.artifact)
            rounded[f"model.{name}"] = fake_quantize_rows(
                parameters[name], bits, clip=rule.clip, scale_floor=rule.scale_floor
            )
        return torch.func.functional_call(self.loss, rounded, (inputs, targets, jepa_lambda, jepa))

    def _rows_of_part(self, rows: int, most: int) -> int:
        """Return how many of a share's `rows` a micro-batch takes: at most `most`, all parts alike, SIGReg's samples whole."""
        jepa = self.config.jepa
        group = (jepa.enabled and jepa.losses and jepa.sigreg_group_sequences) or 1
        if rows % group:
            group = 1  # the whole batch is no multiple: one sample, and nothing to keep whole
        parts = range(max(1, min(rows, most) // group) * group, 0, -group)
        return next(part for part in parts if rows % part == 0)

    def __call__(
        self,
        inputs: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        *,
        jepa_lambda: float,
        latent_losses: bool | None = None,
        quantized: bool = False,
    ) -> StepLosses:
        """Return the mean losses over the rows; gradients are added to `.grad`, and `buckets` averages them over ranks
        from the last micro-batch on.

        `latent_losses`: whether they are computed at all; None: if their weight `jepa_lambda` is not zero.
        """
        latent_losses = jepa_lambda > 0 if latent_losses is None else latent_losses
        micro_bytes = self.config.data.micro_batch_bytes or inputs.numel()
        rows = self._rows_of_part(inputs.size(0), micro_bytes // inputs.size(1))
        num_parts = inputs.size(0) // rows
        weight = torch.tensor(jepa_lambda, device="cpu").to(inputs.device, non_blocking=True)
        sums = [torch.zeros((), device=inputs.device) for _ in range(3)]
        latents: Latents | None = None
        micro_batches = zip(inputs.split(rows), targets.split(rows), strict=True)
        for number, (part_inputs, part_targets) in enumerate(micro_batches, start=1):
            total, *parts = self.weighted_loss(part_inputs, part_targets, weight, latent_losses, quantized)
            if self.buckets is not None and number == num_parts:
                self.buckets.begin_last_backward()
            (total / num_parts).backward()
            sums = [so_far + part for so_far, part in zip(sums, parts[:3], strict=True)]
            latents = Latents(*parts[3:]) if len(parts) > 3 else None
        ce, prediction, regularizer = (value / num_parts for value in sums)
        return StepLosses(ce, prediction, regularizer, latents)
