"""A run at some position: model, optimisers, data, and how one step is taken (spec section 4).

The host never waits for the device inside a step: what a step computed is a `PendingStep` that is read later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bytejepa.config import RunConfig
from bytejepa.data.loader import IdStream, Loader, validation_ids
from bytejepa.data.manifest import check_split
from bytejepa.data.shards import shards_in
from bytejepa.errors import ConfigError, DataError
from bytejepa.model.initialization import initialize
from bytejepa.model.jepa import effective_rank, explained_variance, latent_std
from bytejepa.model.precision import on_device
from bytejepa.model.transformer import ByteLM
from bytejepa.scoring.evaluate import Score, Scorer
from bytejepa.scoring.windows import window_and_stride
from bytejepa.training import schedule
from bytejepa.training.allocator import keep_freed_memory
from bytejepa.training.averaging import WeightAverage, averaged_weights
from bytejepa.training.checkpoint import Position, as_parts
from bytejepa.training.distributed import Ranks
from bytejepa.training.gradient_step import GradientStep, StepLosses
from bytejepa.training.optimizers import Optimizers
from bytejepa.training.shared_scoring import score_on_ranks


@dataclasses.dataclass(slots=True)
class PendingStep:
    """A step whose loss and gradient norm, both of all ranks together, are still on their way."""

    step: int
    progress: float
    elapsed_s: float
    values: Tensor
    arrived: torch.cuda.Event | None
    log: dict[str, float | Tensor] | None


class StepKind(NamedTuple):
    """What makes one step another program than the next; each kind has its own compiled graph."""

    stage: int
    """Of `data.stages`: the sequence length."""
    latent_losses: bool
    quantized: bool


class Trainer:
    """A run: model, optimisers, data and clock, at some position."""

    def __init__(self, config: RunConfig, data: Path, ranks: Ranks, *, validate: bool = True) -> None:
        self.config, self.ranks = config, ranks
        on_gpu = ranks.device.type == "cuda"
        if not on_gpu:
            keep_freed_memory()
        self._check_division()
        self._check_rounding()
        model = initialize(ByteLM(config), config.training.seed)
        precision = config.training.precision
        if precision == "bfloat16" and not on_gpu:
            raise ConfigError(
                "training.precision bfloat16 needs a CUDA device: CPUs without bfloat16 units compute it far slower than float32",
                hint="use --training.precision float32",
            )
        if on_gpu and config.training.bfloat16_embeddings:
            keep_in_bfloat16(model)
        self.model = on_device(model, ranks.device)
        # a kernel that is asked for in vain is refused here, before there is a run folder
        lengths = {length for _, length in config.data.stages}
        self.compiled = config.training.compiles_on(ranks.device.type)
        found = [self.model.attention_kernels(length, ranks.device, compiled=self.compiled) for length in lengths]
        self.attention_kernels = sorted({kernel for kernels in found for kernel in kernels})
        if self.compiled and on_gpu:
            avoid_known_regressions()
        self.optimizers = Optimizers(self.model, config.optimizer, ranks, compile_update=self.compiled and on_gpu)
        self.gradient_step = GradientStep(
            self.model, config, compile=self.compiled, buckets=self.optimizers.gradient_buckets
        )
        self.average = WeightAverage(self.model, config.training)
        self.loader = Loader(
            IdStream.open(data, "train"),
            config.data,
            seed=config.training.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
        )
        self.validation_ids = self._validation_ids(data) if validate else None
        self.scorer = Scorer(self.model, compile=self.compiled)
        self.position = Position(step=0, stage=0, stage_index=0, num_bytes=0, num_swa_samples=0)
        self.failure: DataError | None = None
        """Why a batch could not be read on this rank; steps from there on must not count."""

    def _check_division(self) -> None:
        world = self.ranks.world_size
        for _, length in self.config.data.stages:
            rows = self.config.data.batch_bytes // length
            if rows % world:
                raise ConfigError(
                    f"{world} ranks do not divide the {rows} sequences of a step "
                    f"(data.batch_bytes {self.config.data.batch_bytes} / {length} ids)",
                    hint="change --data.batch-bytes or the number of ranks",
                )
            group = self.config.jepa.sigreg_group_sequences
            if self.config.jepa.enabled and self.config.jepa.losses and group and (rows // world) % group:
                raise ConfigError(
                    f"a rank's {rows // world} sequences are no multiple of jepa.sigreg_group_sequences {group}",
                    hint=f"use at most {rows // group} ranks, a divisor of it",
                )

    def _check_rounding(self) -> None:
        """Refuse training on rounded weights where only the finished weights decide to what they are rounded."""
        training, artifact = self.config.training, self.config.artifact
        if training.qat_start is not None and (artifact.clip == "sensitivity" or artifact.fit):
            decided_by = "artifact.clip sensitivity" if artifact.clip == "sensitivity" else "artifact.fit"
            raise ConfigError(
                f"training.qat_start {training.qat_start:g} would not round as the artifact does: {decided_by} chooses its steps "
                "when training is over",
                hint="use artifact.clip standard_deviations and artifact.fit false, or training.qat_start None",
            )

    def _validation_ids(self, data: Path) -> npt.NDArray[np.uint16] | None:
        if self.config.training.validate_every_steps is None and not shards_in(data, "val"):
            check_split(data, "val", {})  # missing is not the same as never promised
            return None
        return validation_ids(data, self.config.training.validation_bytes)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that decides how the run goes on (a collective call)."""
        model: dict[str, Tensor] = dict(self.model.named_parameters())
        average = self.average.state() if self.average.is_kept else {}
        return as_parts(model=model, average=average, optimizer=self.optimizers.state())

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Continue from what `state` returned at `position`."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        for name, parameter in self.model.named_parameters():
            parameter.copy_(parts["model"][name])
        self.average.load_state(parts["average"], position.num_swa_samples)
        self.optimizers.load_state(parts["optimizer"])
        self.position = position

    def warm_up(self) -> None:
        """Take a few steps of every kind the run will take, so that all is compiled and allocated, and undo them."""
        steps = self.config.training.warmup_steps
        if not steps:
            return
        kept, position = {name: value.detach().clone() for name, value in self.state().items()}, self.position
        kinds = self.step_kinds()
        for number in range(max(steps, len(kinds))):
            kind = kinds[number % len(kinds)]
            inputs, targets = self._batch(kind.stage, number)
            self.optimizers.zero_grad()
            self.gradient_step(
                inputs, targets, jepa_lambda=1.0, latent_losses=kind.latent_losses, quantized=kind.quantized
            )
            self.optimizers.step(learning_rate_scale=1.0, momentum=0.9)
            self.average.update(step=number + 1, progress=0.0)
        self.optimizers.zero_grad()
        self.restore(kept, position)
        self.synchronize()

    def step_kinds(self) -> list[StepKind]:
        """Return every kind of step that the run takes, in the order of their first one."""
        data, jepa, qat_start = self.config.data, self.config.jepa, self.config.training.qat_start
        changes = [0.0, *(begin for begin, _ in data.stages), jepa.lambda_zero_until, jepa.lambda_ramp_until]
        shares = sorted(share for share in {*changes, 1.0 if qat_start is None else qat_start} if share < 1)
        if self.config.schedule.warmdown == "mean_step_time":  # its latent losses follow the steps, not the wallclock
            return list(dict.fromkeys(self._kind(share, of_steps) for share in shares for of_steps in shares))
        return list(dict.fromkeys(self._kind(share, share) for share in shares))

    def _kind(self, progress: float, latent_progress: float) -> StepKind:
        training, stages = self.config.training, self.config.data.stages
        return StepKind(
            stage=max(index for index, (begin, _) in enumerate(stages) if begin <= progress),
            latent_losses=schedule.computes_latent_losses(self.config.jepa, latent_progress),
            quantized=training.qat_start is not None and progress >= training.qat_start,
        )

    def take_step(self, *, progress: float, elapsed_s: float) -> PendingStep:
        """Launch one optimiser step and move the position past it."""
        config, at = self.config, self.position
        latent_progress = self._latent_progress(progress)
        kind = self._kind(progress, latent_progress)
        index = at.stage_index if kind.stage == at.stage else 0
        inputs, targets = self._batch(kind.stage, index)
        lr_scale = schedule.learning_rate_scale(config.schedule, progress=progress, step=at.step, elapsed_s=elapsed_s)
        momentum = schedule.muon_momentum(config.optimizer, at.step)
        jepa_lambda = schedule.jepa_lambda(config.jepa, latent_progress)
        self.optimizers.zero_grad()
        losses = self.gradient_step(
            inputs, targets, jepa_lambda=jepa_lambda, latent_losses=kind.latent_losses, quantized=kind.quantized
        )
        norm = self.optimizers.step(learning_rate_scale=lr_scale, momentum=momentum)
        step = at.step + 1
        self.average.update(step=step, progress=progress)
        self.position = Position(
            step=step,
            stage=kind.stage,
            stage_index=index + 1,
            num_bytes=at.num_bytes + config.data.batch_bytes,
            num_swa_samples=self.average.num_swa_samples,
        )
        log: dict[str, float | Tensor] | None = None
        if step % config.training.log_every_steps == 0 or step == 1:
            log = {
                "learning_rate_scale": lr_scale,
                "muon_momentum": momentum,
                "sequence_bytes": inputs.size(1),
                **self._latent_metrics(losses, jepa_lambda),
            }
        return self._launched(torch.stack((losses.ce.float(), norm.float())), progress, elapsed_s, log)

    def _batch(self, stage: int, index: int) -> tuple[Tensor, Tensor]:
        """Return this rank's rows; ids of no text where they cannot be read, because the other ranks wait for a gradient."""
        try:
            return self.loader.batch(stage, index)
        except DataError as problem:
            self.failure = self.failure or problem
            length = self.config.data.stages[stage][1]
            rows = self.config.data.batch_bytes // length // self.ranks.world_size
            nothing = torch.zeros((rows, length), dtype=torch.int64, device=self.ranks.device)
            return nothing, nothing

    def _latent_progress(self, progress: float) -> float:
        """Return the progress that lambda follows: the reference counts steps, not seconds."""
        if self.config.schedule.warmdown == "mean_step_time":
            assert self.config.schedule.steps is not None
            return self.position.step / self.config.schedule.steps
        return progress

    @torch.no_grad()
    def _latent_metrics(self, losses: StepLosses, jepa_lambda: float) -> dict[str, float | Tensor]:
        if losses.latents is None:
            return {}
        metrics: dict[str, float | Tensor] = {
            "jepa_lambda": jepa_lambda,
            "jepa_explained_variance": self.ranks.mean(explained_variance(losses.latents)),
            "jepa_effective_rank": self.ranks.mean(effective_rank(losses.latents.target)),
            "jepa_latent_std": self.ranks.mean(latent_std(losses.latents.target)),
        }
        if jepa_lambda > 0:
            metrics["jepa_prediction_loss"] = self.ranks.mean(losses.jepa_prediction)
            metrics["jepa_sigreg"] = self.ranks.mean(losses.sigreg)
        return metrics

    def _launched(
        self, values: Tensor, progress: float, elapsed_s: float, log: dict[str, float | Tensor] | None
    ) -> PendingStep:
        values = torch.stack((self.ranks.mean(values[0]), values[1]))  # the norm is of all ranks' gradients already
        arrived = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return PendingStep(self.position.step, progress, elapsed_s, values, arrived, log)

    def validate(self, before_round: Callable[[], None] | None = None) -> tuple[float | None, float | None]:
        """Return the bits per byte of the live and of the averaged weights on validation text, non-overlapping windows.

        `before_round` is called before each batch, on every rank equally often; what it raises ends the validation.
        """
        if self.validation_ids is None:
            return None, None
        live = self._score(self.validation_ids, before_round).bpb
        if not self.average.is_kept:
            return live, live
        with averaged_weights(self.model, self.average.average):
            return live, self._score(self.validation_ids, before_round).bpb

    def _score(self, ids: npt.NDArray[np.uint16], before_round: Callable[[], None] | None) -> Score:
        evaluation = self.config.evaluation
        window, stride = window_and_stride(evaluation, sliding=False)
        return score_on_ranks(
            self.scorer,
            ids,
            self.ranks,
            window=window,
            stride=stride,
            batch_ids=evaluation.batch_bytes,
            before_round=before_round,
        )

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def close(self) -> None:
        """Stop the loader's thread."""
        self.loader.close()


def keep_in_bfloat16(model: ByteLM) -> None:
    """Keep embeddings and JEPA matrices in bfloat16, as the reference does on a GPU."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and (name.startswith("jepa.") or name.endswith("embedding.weight")):
            parameter.data = parameter.data.bfloat16()


def avoid_known_regressions() -> None:
    """Switch off what slows PyTorch 2.11: mix_order_reduction over-fuses the backward of RMS norms (+9 % a step)."""
    import torch._inductor.config as inductor

    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False
