"""The training loop (spec section 4): on a CPU, a GPU, or under torchrun on many.

One iteration: rank 0 reads the clock and decides; the schedules turn progress into rates; a batch goes forward and
backward; Muon and AdamW step; the average follows. The host never waits for the device inside a step: losses are read
`READBACK_LAG` steps late, which also bounds how far the host runs ahead of the clock.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import filelock
import torch
from torch import Tensor

from bytejepa.bits import bits_from_nats
from bytejepa.config import RunConfig, to_dict
from bytejepa.data.loader import IdStream, Loader
from bytejepa.errors import CheckpointError, ConfigError, DataError, Interrupted
from bytejepa.model.attention import choose_backend
from bytejepa.model.initialization import initialize
from bytejepa.model.jepa import effective_rank, explained_variance
from bytejepa.model.transformer import ByteLM
from bytejepa.scoring.evaluate import Score, Scorer, score_ids
from bytejepa.training import checkpoint, schedule
from bytejepa.training.averaging import WeightAverage
from bytejepa.training.checkpoint import CheckpointWriter, Position, as_parts
from bytejepa.training.clock import Clock
from bytejepa.training.distributed import Ranks, join
from bytejepa.training.gradient_step import GradientStep, StepLosses, averaged_weights
from bytejepa.training.optimizers import Optimizers
from bytejepa.training.runlog import RunFolder, describe_machine, run_manifest

READBACK_LAG = 2
"""Steps between launching a step on a GPU and reading its loss."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainProgress:
    """What an observer is told after every step whose loss has arrived."""

    step: int
    progress: float
    num_bytes: int
    elapsed_s: float
    train_bpb: float
    val_bpb: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended."""

    run: Path
    steps: int
    num_bytes: int
    elapsed_s: float
    train_bpb: float
    val_bpb: float | None
    """Of the live weights, non-overlapping windows."""
    val_bpb_average: float | None
    """Of the averaged weights."""


@dataclasses.dataclass(slots=True)
class _Pending:
    """A step whose loss and gradient norm are still on their way."""

    step: int
    progress: float
    elapsed_s: float
    values: Tensor
    arrived: torch.cuda.Event | None
    log: dict[str, float | Tensor] | None


class Trainer:
    """A run: model, optimisers, data and clock, at some position."""

    def __init__(self, config: RunConfig, data: Path, run: RunFolder, ranks: Ranks, *, validate: bool = True) -> None:
        self.config, self.run, self.ranks = config, run, ranks
        on_gpu = ranks.device.type == "cuda"
        self._check_division()
        model = initialize(ByteLM(config), config.training.seed)
        precision = config.training.precision
        if precision == "bfloat16" and not on_gpu:
            raise ConfigError(
                "training.precision bfloat16 needs a CUDA device: CPUs without bfloat16 units compute it far slower than float32",
                hint="use --training.precision float32",
            )
        model.compute_dtype = torch.bfloat16 if on_gpu and precision != "float32" else torch.float32
        if on_gpu and config.training.bfloat16_embeddings:
            _keep_in_bfloat16(model)
        self.model = model.to(ranks.device)
        self.backend = choose_backend(config.training.attention, ranks.device.type, masked=False)
        self.compiled = config.training.compile == "on" or (config.training.compile == "auto" and on_gpu)
        if self.compiled and on_gpu:
            _avoid_known_regressions()
        self.gradient_step = GradientStep(self.model, config, compile=self.compiled)
        self.optimizers = Optimizers(self.model, config.optimizer, ranks, compile_update=self.compiled and on_gpu)
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

    def _validation_ids(self, data: Path):  # type: ignore[no-untyped-def]
        try:
            stream = IdStream.open(data, "val")
        except DataError:
            if self.config.training.validate_every_steps is not None:
                raise
            return None
        count = min(stream.num_ids, self.config.training.validation_bytes or stream.num_ids)
        return stream.read(0, count)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that decides how the run goes on (a collective call)."""
        model = {name: parameter for name, parameter in self.model.named_parameters()}
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
        lambdas = {schedule.jepa_lambda(self.config.jepa, share / 64) > 0 for share in range(64)}
        quantized = {False} if self.config.training.qat_start is None else {False, True}
        kinds = [(stage, lam, q) for stage in range(len(self.config.data.stages)) for lam in lambdas for q in quantized]
        for number in range(max(steps, len(kinds))):
            stage, with_lambda, through_quantizer = kinds[number % len(kinds)]
            inputs, targets = self.loader.batch(stage, number)
            self.optimizers.zero_grad()
            self.gradient_step(inputs, targets, jepa_lambda=float(with_lambda), quantized=through_quantizer)
            self.optimizers.step(learning_rate_scale=1.0, momentum=0.9)
            self.average.update(step=number + 1, progress=0.0)
        self.optimizers.zero_grad()
        self.restore(kept, position)
        self._synchronize()

    def take_step(self, *, progress: float, elapsed_s: float) -> _Pending:
        """Launch one optimiser step and move the position past it."""
        config, at = self.config, self.position
        stage = max(index for index, (begin, _) in enumerate(config.data.stages) if begin <= progress)
        index = at.stage_index if stage == at.stage else 0
        inputs, targets = self.loader.batch(stage, index)
        lr_scale = schedule.learning_rate_scale(config.schedule, progress=progress, step=at.step, elapsed_s=elapsed_s)
        momentum = schedule.muon_momentum(config.optimizer, at.step)
        jepa_lambda = schedule.jepa_lambda(config.jepa, self._schedule_progress(progress))
        quantized = config.training.qat_start is not None and progress >= config.training.qat_start
        self.optimizers.zero_grad()
        losses = self.gradient_step(inputs, targets, jepa_lambda=jepa_lambda, quantized=quantized)
        norm = self.optimizers.step(learning_rate_scale=lr_scale, momentum=momentum)
        step = at.step + 1
        self.average.update(step=step, progress=progress)
        self.position = Position(
            step=step,
            stage=stage,
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
        return self._pending(torch.stack((losses.ce.float(), norm.float())), progress, elapsed_s, log)

    def _schedule_progress(self, progress: float) -> float:
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
        }
        if jepa_lambda > 0:
            metrics["jepa_prediction_loss"] = self.ranks.mean(losses.jepa_prediction)
            metrics["jepa_sigreg"] = self.ranks.mean(losses.sigreg)
        return metrics

    def _pending(self, values: Tensor, progress: float, elapsed_s: float, log: dict[str, float | Tensor] | None) -> _Pending:
        if log is not None:
            values = torch.stack((self.ranks.mean(values[0]), values[1]))
        arrived = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return _Pending(self.position.step, progress, elapsed_s, values, arrived, log)

    def validate(self) -> tuple[float | None, float | None]:
        """Return bits per byte of the live and of the averaged weights on the validation split, non-overlapping windows."""
        if self.validation_ids is None:
            return None, None
        live = self._score(self.validation_ids).bpb
        if not self.average.is_kept:
            return live, live
        with averaged_weights(self.model, self.average.average):
            return live, self._score(self.validation_ids).bpb

    def _score(self, ids) -> Score:  # type: ignore[no-untyped-def]
        window = min(self.config.evaluation.window_bytes, len(ids) - 1)
        share = (self.ranks.rank, self.ranks.world_size)
        mine = score_ids(
            self.scorer, ids, window=window, stride=window, batch_ids=self.config.evaluation.batch_bytes, share=share
        )
        counted = [mine.nats, mine.nats_of_bos, mine.num_bytes, mine.num_targets]
        nats, bos, num_bytes, targets = self.ranks.sum_on_hosts(counted)
        return dataclasses.replace(
            mine, nats=nats, nats_of_bos=bos, num_bytes=int(num_bytes), num_targets=int(targets)
        )

    def _synchronize(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def close(self) -> None:
        """Stop the loader's thread."""
        self.loader.close()


class TrainingLoop:
    """Carries a trainer to the end of its schedule: clock, log, validation, checkpoints, signals."""

    def __init__(self, trainer: Trainer, on_progress: Callable[[TrainProgress], None] | None) -> None:
        self.trainer = trainer
        self.config, self.run, self.ranks = trainer.config, trainer.run, trainer.ranks
        self.on_progress = on_progress
        self.clock = Clock(self.run.clock_path if self.ranks.is_main else None)
        self.writer = CheckpointWriter(self.run.checkpoints_path, keep=self.config.training.keep_checkpoints)
        self.pending: collections.deque[_Pending] = collections.deque()
        self.last_bpb = math.nan
        self.val_bpb: float | None = None
        self.last_checkpoint_s = 0.0

    def go(self) -> TrainResult:
        """Train until the schedule ends. Raises: Interrupted after a signal, CheckpointError for a loss that is not finite."""
        trainer, training = self.trainer, self.config.training
        with _noticing_signals() as interrupted:
            trainer.warm_up()
            lag = READBACK_LAG if self.ranks.device.type == "cuda" else 0
            while True:
                at = trainer.position
                reading = self.clock.read(at.step) if self.ranks.is_main else 0.0
                elapsed_s, stop, save = self.ranks.decide([reading, float(interrupted.is_set()), self._is_checkpoint_due(reading)])
                progress = schedule.progress(
                    self.config.schedule, step=at.step, num_bytes=at.num_bytes, elapsed_s=elapsed_s
                )
                if stop:
                    self._interrupt()
                if progress >= 1:
                    break
                if save:
                    self._save(elapsed_s)
                self.pending.append(trainer.take_step(progress=progress, elapsed_s=elapsed_s))
                self._read_back(keep=lag)
                every = training.validate_every_steps
                if every and trainer.position.step % every == 0:
                    self._validate(progress, elapsed_s)
            self._read_back(keep=0)
            return self._finish(elapsed_s)

    def _is_checkpoint_due(self, elapsed_s: float) -> float:
        every = self.config.training.checkpoint_every_s
        return float(every is not None and self.trainer.position.step > 0 and elapsed_s - self.last_checkpoint_s >= every)

    def _read_back(self, *, keep: int) -> None:
        while len(self.pending) > keep:
            done = self.pending.popleft()
            if done.arrived is not None:
                done.arrived.synchronize()
            ce, norm = done.values.tolist()
            if not (math.isfinite(ce) and math.isfinite(norm)):
                self._stop_on_nonfinite(done.step, ce, norm)
            self.last_bpb = bits_from_nats(ce)
            num_bytes = done.step * self.config.data.batch_bytes
            if done.log is not None and self.ranks.is_main:
                extra = {key: float(value) for key, value in done.log.items()}
                self.run.append_metrics(
                    {
                        "step": done.step,
                        "num_bytes": num_bytes,
                        "elapsed_s": done.elapsed_s,
                        "progress": done.progress,
                        "train_loss_nats": ce,
                        "train_bpb": self.last_bpb,
                        "gradient_norm": norm,
                        **extra,
                    }
                )
            if self.on_progress is not None and self.ranks.is_main:
                self.on_progress(
                    TrainProgress(
                        step=done.step,
                        progress=schedule.progress(self.config.schedule, step=done.step, num_bytes=num_bytes, elapsed_s=done.elapsed_s),
                        num_bytes=num_bytes,
                        elapsed_s=done.elapsed_s,
                        train_bpb=self.last_bpb,
                        val_bpb=self.val_bpb,
                    )
                )  # fmt: skip

    def _stop_on_nonfinite(self, step: int, ce: float, norm: float) -> None:
        self.writer.close()
        on_disk = checkpoint.steps_on_disk(self.run.checkpoints_path)
        last = f"the last good checkpoint is step {on_disk[0]} in {self.run.checkpoints_path}" if on_disk else "there is no checkpoint yet"
        raise CheckpointError(
            f"step {step}: the loss is {ce:g} and the gradient norm {norm:g}; training stopped, {last}",
            hint="lower the learning rates, then start over or resume",
        )

    def _validate(self, progress: float, elapsed_s: float) -> None:
        self._read_back(keep=0)
        self.clock.pause()
        live, averaged = self.trainer.validate()
        self.val_bpb = averaged
        if live is not None and averaged is not None and self.ranks.is_main:
            at = self.trainer.position
            self.run.append_metrics(
                {
                    "step": at.step,
                    "num_bytes": at.num_bytes,
                    "elapsed_s": elapsed_s,
                    "progress": progress,
                    "val_bpb": live,
                    "val_bpb_average": averaged,
                }
            )

    def _save(self, elapsed_s: float) -> None:
        self._read_back(keep=0)  # nothing that is not finite gets into a checkpoint
        self.clock.pause()
        self.last_checkpoint_s = elapsed_s
        state = self.trainer.state()
        if self.ranks.is_main:
            self.writer.save(self.trainer.position, state, to_dict(self.config))

    def _interrupt(self) -> None:
        self._save(0.0)
        self.writer.close()
        raise Interrupted(
            f"stopped by a signal at step {self.trainer.position.step}, checkpoint written",
            hint=f"go on with `bytejepa train --resume {self.run.path}`",
        )

    def _finish(self, elapsed_s: float) -> TrainResult:
        at = self.trainer.position
        on_disk = checkpoint.steps_on_disk(self.run.checkpoints_path)
        if not on_disk or on_disk[0] != at.step:
            self._save(elapsed_s)
        every = self.config.training.validate_every_steps
        validated = bool(every) and at.step % (every or 1) == 0
        metrics = [line for line in self.run.read_metrics() if "val_bpb" in line] if validated else []
        if not (metrics and metrics[-1]["step"] == at.step):
            self._validate(1.0, elapsed_s)
            metrics = [line for line in self.run.read_metrics() if "val_bpb" in line]
        self.writer.close()
        self.clock.close()
        last = metrics[-1] if metrics else {}
        return TrainResult(
            run=self.run.path,
            steps=at.step,
            num_bytes=at.num_bytes,
            elapsed_s=elapsed_s,
            train_bpb=self.last_bpb,
            val_bpb=last.get("val_bpb"),
            val_bpb_average=last.get("val_bpb_average"),
        )


def train(
    config: RunConfig,
    data: Path,
    out: Path,
    *,
    force: bool = False,
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Train a new run of `config` on the shards in `data`, in the folder `out`, and return how it ended.

    Raises: ConfigError, DataError and CheckpointError for what cannot be; Interrupted after SIGTERM or Ctrl-C.
    """
    ranks = join(config.training.device)
    run = RunFolder(out)
    trainer = Trainer(config, data, run, ranks)
    with _locked(run, ranks):
        if ranks.is_main:
            described = {"path": str(data.resolve()), **_described_data(data)}
            machine = {**describe_machine(), "device": _device_name(ranks), "world_size": ranks.world_size}
            machine |= {"attention": trainer.backend, "compiled": trainer.compiled}
            run.create(config, run_manifest(config, described, machine), force=force)
        ranks.barrier()
        return _loop(trainer, on_progress)


def resume(
    run_path: Path,
    *,
    data: Path | None = None,
    on_progress: Callable[[TrainProgress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> TrainResult:
    """Continue the run in `run_path` from its newest whole checkpoint (or from the start if it has none yet).

    `data` says where its shards are now, if they moved. Damaged checkpoints are named through `on_note`.
    Raises: CheckpointError if the folder holds no run, is in use, or no checkpoint is whole.
    """
    run = RunFolder(run_path)
    config = run.read_config()
    ranks = join(config.training.device)
    manifest = run.read_manifest()
    data = data or Path(manifest.get("data", {}).get("path", ""))
    trainer = Trainer(config, data, run, ranks)
    with _locked(run, ranks):
        _check_same_data(manifest.get("data", {}), _described_data(data), data)
        damaged: list[str] = []
        found = checkpoint.read_newest(run.checkpoints_path, on_damaged=damaged)
        ranks.barrier()
        if ranks.is_main:
            for problem in damaged:
                if on_note is not None:
                    on_note(f"{problem}; it was set aside and the one before it is used")
            for step in checkpoint.steps_on_disk(run.checkpoints_path):
                if found is None or step > found.position.step:
                    checkpoint.remove(run.checkpoints_path, step)
            run.truncate_metrics(found.position.step if found is not None else 0)
        if found is not None:
            trainer.restore(found.tensors, found.position)
        return _loop(trainer, on_progress)


def _loop(trainer: Trainer, on_progress: Callable[[TrainProgress], None] | None) -> TrainResult:
    loop = TrainingLoop(trainer, on_progress)
    try:
        return loop.go()
    finally:
        trainer.close()


@contextlib.contextmanager
def _locked(run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Hold the run folder's lock on rank 0; every rank raises if another process has it."""
    lock = filelock.FileLock(run.lock_path)
    taken = 1.0
    if ranks.is_main:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            taken = 0.0
        except OSError as problem:
            raise CheckpointError(f"cannot create run folder {run.path}: {problem.strerror}") from problem
    if not ranks.decide([taken])[0]:
        raise CheckpointError(f"another process is training in {run.path}", hint="wait for it or stop it")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _noticing_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or Ctrl-C sets; a second Ctrl-C interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def notice(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupted.set()

    previous = {number: signal.signal(number, notice) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _described_data(data: Path) -> dict[str, object]:
    """Return what tells one data folder from another: shard names, sizes and first and last ids."""
    import hashlib

    digest = hashlib.sha256()
    for split in ("train", "val"):
        with contextlib.suppress(DataError):
            stream = IdStream.open(data, split)
            for shard in stream.shards:
                digest.update(f"{split}:{len(shard)}:".encode() + shard[:4096].tobytes() + shard[-4096:].tobytes())
    return {"sha256_of_ends": digest.hexdigest()}


def _check_same_data(recorded: dict[str, object], found: dict[str, object], data: Path) -> None:
    if recorded.get("sha256_of_ends") not in (None, found["sha256_of_ends"]):
        raise CheckpointError(f"{data} does not hold the shards that the run began with", hint="say where they are with --data")


def _device_name(ranks: Ranks) -> str:
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"


def _keep_in_bfloat16(model: ByteLM) -> None:
    """Keep embeddings and JEPA matrices in bfloat16, as the reference does on a GPU."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and (name.startswith("jepa.") or name.endswith("embedding.weight")):
            parameter.data = parameter.data.bfloat16()


def _avoid_known_regressions() -> None:
    """Switch off what makes PyTorch 2.11 slower: mix_order_reduction over-fuses the backward of RMS norms (+9 % a step)."""
    import torch._inductor.config as inductor

    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False
