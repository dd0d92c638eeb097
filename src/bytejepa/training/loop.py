"""The training loop: clock, decisions, log, validation, checkpoints, signals.

One iteration: rank 0 reads the clock, and ranks tell each other whether one of them wants to stop; the schedules turn
progress into rates; the trainer launches a step. A signal, and an error that one rank alone meets (a full disk), is
kept until ranks next tell each other, so that all stop at the same place.
Losses are read `READBACK_LAG` steps late, which also bounds how far the host runs ahead of the clock.
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
from typing import NoReturn

from bytejepa.bits import bits_from_nats
from bytejepa.config_json import to_dict
from bytejepa.errors import BytejepaError, CheckpointError, Interrupted
from bytejepa.training import checkpoint, schedule
from bytejepa.training.checkpoint import CheckpointWriter
from bytejepa.training.clock import Clock
from bytejepa.training.runlog import RunFolder
from bytejepa.training.trainer import PendingStep, Trainer

READBACK_LAG = 2
"""Steps between launching a step on a GPU and reading its loss."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainProgress:
    """What an observer is told after every step whose loss has arrived."""

    step: int
    progress: float
    num_bytes: int
    elapsed_s: float
    """When the step began: its own bytes were read after that."""
    train_bpb: float
    val_bpb: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended."""

    run: Path
    is_new: bool = dataclasses.field(compare=False)
    """False when the run was over when it was resumed: no step was taken then, and the result is that of before."""
    steps: int
    num_bytes: int
    elapsed_s: float
    train_bpb: float | None
    """Of the last step; None if the run was over when it was resumed and had not logged that step."""
    val_bpb: float | None
    """Of the live weights, non-overlapping windows; rank 0 alone has it from its log."""
    val_bpb_average: float | None
    """Of the averaged weights; rank 0 alone has it."""


class TrainingLoop:
    """Carries a trainer to the end of its schedule: clock, log, validation, checkpoints, signals."""

    def __init__(
        self,
        trainer: Trainer,
        run: RunFolder,
        on_progress: Callable[[TrainProgress], None] | None,
        *,
        keeps_beginning: bool = False,
    ) -> None:
        self.trainer = trainer
        self.keeps_beginning = keeps_beginning
        """Whether there is to be a checkpoint before the first step: of weights that no seed makes again."""
        self.config, self.run, self.ranks = trainer.config, run, trainer.ranks
        self.on_progress = on_progress
        self.clock = Clock(self.run.clock_path if self.ranks.is_main else None)
        self.writer = CheckpointWriter(self.run.checkpoints_path, keep=self.config.training.keep_checkpoints)
        self.pending: collections.deque[PendingStep] = collections.deque()
        self.last_bpb = math.nan
        self.val_bpb: float | None = None
        self.first_step = trainer.position.step
        # a resumed run begins from a checkpoint, which need not be written again
        begun_at_s = self.clock.readings[self.first_step : self.first_step + 1]
        self.last_checkpoint_s = begun_at_s[0] if begun_at_s else 0.0
        self.interrupted = threading.Event()
        self._kept_failure: BytejepaError | None = None

    @property
    def failure(self) -> BytejepaError | None:
        """Return what went wrong on this rank and is not yet known to the others."""
        return self._kept_failure or self.trainer.failure

    def run_to_end(self) -> TrainResult:
        """Train until the schedule ends and return how it did.

        Raises: Interrupted after a signal, CheckpointError for a loss that is not finite.
        """
        trainer, training = self.trainer, self.config.training
        with _noticing_signals(self.interrupted):
            trainer.warm_up()
            self._validate_if_owed()
            lag = READBACK_LAG if self.ranks.device.type == "cuda" else 0
            while True:
                at = trainer.position
                elapsed_s, save, stop = self.ranks.maximum([*self._reading(), self._wants_to_stop()])
                progress = self._progress(at.step, elapsed_s)
                if stop:
                    self._stop()
                if progress >= 1:
                    break
                if save:
                    self._save(elapsed_s)
                self.pending.append(trainer.take_step(progress=progress, elapsed_s=elapsed_s))
                self._read_back(keep=lag)
                every = training.validate_every_steps
                if every and trainer.position.step % every == 0:
                    self._validate(progress, elapsed_s)
            return self._finish(elapsed_s)

    def _progress(self, step: int, elapsed_s: float) -> float:
        """Return the share of the run that is over after `step` steps and `elapsed_s` seconds."""
        num_bytes = step * self.config.data.batch_bytes
        return schedule.progress(self.config.schedule, step=step, num_bytes=num_bytes, elapsed_s=elapsed_s)

    def _reading(self) -> tuple[float, float]:
        """Return rank 0's seconds at the start of this step and whether a checkpoint is due; zeros on other ranks."""
        if not self.ranks.is_main:
            return 0.0, 0.0
        step, every = self.trainer.position.step, self.config.training.checkpoint_every_s
        with self._keeping_failure():
            elapsed_s = self.clock.read(step)
            is_due = every is not None and step > 0 and elapsed_s - self.last_checkpoint_s >= every
            is_due |= step == 0 and self.keeps_beginning
            return elapsed_s, float(is_due)
        return 0.0, 0.0

    def _wants_to_stop(self) -> float:
        return float(self.interrupted.is_set() or self.failure is not None)

    @contextlib.contextmanager
    def _keeping_failure(self) -> Iterator[None]:
        try:
            yield
        except BytejepaError as problem:
            self._kept_failure = self.failure or problem

    def _log(self, metrics: dict[str, float]) -> None:
        with self._keeping_failure():
            self.run.append_metrics(metrics)

    def _read_back(self, *, keep: int) -> None:
        if self.failure is not None:
            self.pending.clear()  # the run ends here, and is gone on with from a checkpoint before
        while len(self.pending) > keep:
            done = self.pending.popleft()
            if done.arrived is not None:
                done.arrived.synchronize()
            ce, norm = done.values.tolist()
            if not (math.isfinite(ce) and math.isfinite(norm)):
                self.pending.clear()
                with self._keeping_failure():
                    self._refuse_nonfinite(done.step, ce, norm)
                return
            self.last_bpb = bits_from_nats(ce)
            num_bytes = done.step * self.config.data.batch_bytes
            if done.log is not None and self.ranks.is_main:
                extra = {key: float(value) for key, value in done.log.items()}
                self._log(
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
                        progress=self._progress(done.step, done.elapsed_s),
                        num_bytes=num_bytes,
                        elapsed_s=done.elapsed_s,
                        train_bpb=self.last_bpb,
                        val_bpb=self.val_bpb,
                    )
                )  # fmt: skip

    def _refuse_nonfinite(self, step: int, ce: float, norm: float) -> None:
        self.writer.close()
        on_disk = checkpoint.steps_on_disk(self.run.checkpoints_path)
        last = (
            f"the last good checkpoint is step {on_disk[0]} in {self.run.checkpoints_path}"
            if on_disk
            else "there is no checkpoint yet"
        )
        raise CheckpointError(
            f"step {step}: the loss is {ce:g} and the gradient norm {norm:g}; training stopped, {last}",
            hint="lower the learning rates, then start over or resume",
        )

    def _validate(self, progress: float, elapsed_s: float) -> bool:
        """Score the validation text; return whether that was done, which a signal prevents."""
        self._read_back(keep=0)
        self.clock.pause()
        try:
            live, averaged = self.trainer.validate(before_round=self._check_stop)
        except _ValidationStoppedError:
            return False
        finally:
            self.clock.resume()
        self.val_bpb = averaged
        if live is not None and averaged is not None and self.ranks.is_main:
            at = self.trainer.position
            self._log(
                {
                    "step": at.step,
                    "num_bytes": at.num_bytes,
                    "elapsed_s": elapsed_s,
                    "progress": progress,
                    "val_bpb": live,
                    "val_bpb_average": averaged,
                }
            )
        return True

    def _check_stop(self) -> None:
        if self.ranks.maximum([self._wants_to_stop()])[0]:
            raise _ValidationStoppedError

    def _validate_if_owed(self) -> None:
        """Validate where the run goes on if it was to be validated there and a signal came before."""
        at, every = self.trainer.position, self.config.training.validate_every_steps
        if not every or at.step == 0 or at.step % every:
            return
        owed, elapsed_s = 0.0, 0.0
        if self.ranks.is_main and not self._logged("val_bpb"):
            owed, elapsed_s = 1.0, self.clock.readings[at.step - 1]
        owed, elapsed_s = self.ranks.maximum([owed, elapsed_s])
        if owed:  # logged as it would have been right after the step
            self._validate(self._progress(at.step - 1, elapsed_s), elapsed_s)

    def _save(self, elapsed_s: float) -> None:
        self._read_back(keep=0)  # nothing that is not finite gets into a checkpoint
        self.clock.pause()
        self.last_checkpoint_s = elapsed_s
        state = self.trainer.state()
        if self.ranks.is_main and self.failure is None:
            at = self.trainer.position
            readings_s = self.clock.readings[: at.step + 1]
            with self._keeping_failure():
                self.writer.save(at, state, to_dict(self.config), readings_s=readings_s)
        self.clock.resume()

    def _stop(self) -> NoReturn:
        """End the run on every rank: with what failed on one of them, else with a checkpoint."""
        self._read_back(keep=0)
        with self.ranks.agree():
            self._raise_failure()
        self._save(0.0)
        with self.ranks.agree():
            self._close()
            raise Interrupted(
                f"stopped by a signal at step {self.trainer.position.step}, checkpoint written",
                hint=f"go on with `{self.run.resume_command}`",
            )

    def _raise_failure(self) -> None:
        if self.failure is not None:
            self.writer.close()
            raise self.failure

    def _close(self) -> None:
        """End what is being written. Raises: BytejepaError for what could not be written."""
        self._raise_failure()
        self.writer.close()
        self.clock.close()

    def release(self) -> None:
        """Wait for what is still being written: whatever ended the run, its folder may then be another process's."""
        with contextlib.suppress(BytejepaError):  # the run has ended well and said so, or ends with an earlier error
            self.writer.close()
        self.clock.close()

    def _finish(self, elapsed_s: float) -> TrainResult:
        at = self.trainer.position
        self._read_back(keep=0)
        # a run that was over already has both; rank 0 looks, because all ranks save and validate together
        saved, validated = 0.0, 0.0
        if self.ranks.is_main:
            saved = float(checkpoint.steps_on_disk(self.run.checkpoints_path)[:1] == [at.step])
            validated = float(bool(self._logged("val_bpb")))
        saved, validated, stop = self.ranks.maximum([saved, validated, self._wants_to_stop()])
        if stop:
            self._stop()
        if not saved:
            self._save(elapsed_s)
        if not validated and not self._validate(1.0, elapsed_s):
            self._stop()
        with self.ranks.agree():
            self._close()
        last = self._logged("val_bpb")
        return TrainResult(
            run=self.run.path,
            is_new=at.step > self.first_step,
            steps=at.step,
            num_bytes=at.num_bytes,
            elapsed_s=elapsed_s,
            train_bpb=self.last_bpb if math.isfinite(self.last_bpb) else self._logged("train_bpb").get("train_bpb"),
            val_bpb=last.get("val_bpb"),
            val_bpb_average=last.get("val_bpb_average"),
        )

    def _logged(self, key: str) -> dict[str, float]:
        """Return the line of metrics.jsonl that holds `key` at this step: this process's or, resumed, an earlier one's.

        Empty if there is none, and on ranks above 0, whose disks may not show it yet.
        """
        if not self.ranks.is_main:
            return {}
        step = self.trainer.position.step
        lines = (line for line in self.run.read_metrics() if key in line and line["step"] == step)
        return next(lines, {})


class _ValidationStoppedError(Exception):
    """Leads out of a validation on every rank."""


@contextlib.contextmanager
def _noticing_signals(interrupted: threading.Event) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C set `interrupted`; a second Ctrl-C interrupts at once, but for a checkpoint that is being
    written (`TrainingLoop.release`)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def notice(number: int, _: FrameType | None) -> None:
        if interrupted.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupted.set()

    previous = {number: signal.signal(number, notice) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
