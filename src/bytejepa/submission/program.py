"""What a submission's script does: train, pack, read back, score. The end of the generated `train_gpt.py`.

It runs alone or under torchrun, logs in the challenge's form, and needs the shards only. A run of it is the run that
`bytejepa train` and `bytejepa export` make of the same configuration: the same trainer, packing and scoring, without
checkpoints.
"""

from __future__ import annotations

import collections
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bytejepa.artifact.container import read_container
from bytejepa.artifact.load import build
from bytejepa.artifact.write import calibration_sequences, write_artifact
from bytejepa.config import RunConfig
from bytejepa.data.loader import IdStream, validation_ids
from bytejepa.data.vocabulary import BOS
from bytejepa.errors import BytejepaError, CheckpointError
from bytejepa.model.precision import on_device
from bytejepa.model.transformer import prediction_weights
from bytejepa.scoring.evaluate import Score, Scorer
from bytejepa.scoring.windows import window_and_stride
from bytejepa.submission import log_lines
from bytejepa.submission.environment import configured
from bytejepa.training import schedule
from bytejepa.training.averaging import averaged_weights
from bytejepa.training.clock import Clock
from bytejepa.training.distributed import Ranks, join, leave
from bytejepa.training.shared_scoring import score_on_ranks
from bytejepa.training.trainer import PendingStep, Trainer

DEFAULT_DATA = "./data/datasets/fineweb10B_byte260"
ARTIFACT = "final_model.bjm"
STEPS_AHEAD = 2
"""Steps that the host may be ahead of the GPU, so that the clock it reads is that of the training."""


class Log:
    """Lines for the terminal and for `logs/RUN_ID.txt`, of rank 0 alone."""

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")

    def write(self, *lines: str) -> None:
        """Print and keep lines."""
        if not self.enabled:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for line in lines:
                sys.stdout.write(line + "\n")
                file.write(line + "\n")
        sys.stdout.flush()


def main(config: RunConfig, script: Path) -> int:
    """Do everything as the environment says and return the exit code; what goes wrong is one line on stderr."""
    try:
        run(config, script, os.environ)
    except BytejepaError as problem:
        if problem.rank is None or os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{script.name}: {problem}\n")
        leave(together=problem.rank is not None)
        return problem.exit_code
    finally:
        leave()
    return 0


def run(config: RunConfig, script: Path, environment: Mapping[str, str]) -> Score:
    """Train, pack, read back and score; return the score of the packed model in sliding windows."""
    world_size = int(environment.get("WORLD_SIZE", "1"))
    config, notes = configured(config, environment, world_size=world_size)
    data = Path(environment.get("DATA_PATH") or DEFAULT_DATA)
    ranks = join(config.training.device)
    run_id = environment.get("RUN_ID") or f"seed{config.training.seed}"
    log = Log(Path("logs") / f"{run_id}.txt", enabled=ranks.is_main)
    with ranks.agree():
        trainer = Trainer(config, data, ranks)
    # those that the artifact holds, as `bytejepa submission` and `export` count them
    kept = prediction_weights(dict(trainer.model.named_parameters()), config)
    num_parameters = sum(weight.numel() for weight in kept.values())
    log.write(
        *log_lines.settings_lines(config),
        *(f"note: {note}" for note in notes),
        f"world_size: {world_size}",
        log_lines.parameters_line(num_parameters),
    )
    try:
        train(trainer, log)
    finally:
        trainer.close()
    return pack_and_score(trainer, data, log, code_bytes=script.stat().st_size)


def train(trainer: Trainer, log: Log) -> None:
    """Train until the schedule ends. Raises: DataError for a batch that some rank cannot read."""
    config, ranks, clock = trainer.config, trainer.ranks, Clock()
    trainer.warm_up()
    pending: collections.deque[PendingStep] = collections.deque()
    lag = STEPS_AHEAD if ranks.device.type == "cuda" else 0
    every = config.training.validate_every_steps
    while True:
        at = trainer.position
        now_s = clock.read(at.step) if ranks.is_main else 0.0
        elapsed_s, failed = ranks.maximum([now_s, float(trainer.failure is not None)])
        if failed:
            with ranks.agree():
                if trainer.failure is not None:
                    raise trainer.failure
        progress = schedule.progress(config.schedule, step=at.step, num_bytes=at.num_bytes, elapsed_s=elapsed_s)
        validate = progress >= 1 or (every is not None and at.step > 0 and at.step % every == 0)
        if validate and trainer.validation_ids is not None:
            clock.pause()
            report(pending, log, config, keep=0)
            live = score(trainer.scorer, trainer.validation_ids, trainer, sliding=False)
            log.write(log_lines.validation_line(config, live, step=at.step, elapsed_s=elapsed_s))
            clock.resume()
        if progress >= 1:
            report(pending, log, config, keep=0)
            return
        pending.append(trainer.take_step(progress=progress, elapsed_s=elapsed_s))
        report(pending, log, config, keep=lag)


def report(pending: collections.deque[PendingStep], log: Log, config: RunConfig, *, keep: int) -> None:
    """Read the losses of all but the last `keep` steps. Raises: CheckpointError for one that is not finite."""
    while len(pending) > keep:
        done = pending.popleft()
        if done.arrived is not None:
            done.arrived.synchronize()
        loss_nats, norm = done.values.tolist()
        if not (math.isfinite(loss_nats) and math.isfinite(norm)):
            raise CheckpointError(f"step {done.step}: the loss is {loss_nats:g} and the gradient norm {norm:g}")
        if done.log is not None:
            log.write(log_lines.train_line(config, step=done.step, loss_nats=loss_nats, elapsed_s=done.elapsed_s))


def pack_and_score(trainer: Trainer, data: Path, log: Log, *, code_bytes: int) -> Score:
    """Write the averaged weights, read them back and score them; return the score in sliding windows."""
    config, ranks = trainer.config, trainer.ranks
    ids = validation_ids(data)
    with averaged_weights(trainer.model, trainer.average.average):
        log.write(log_lines.average_line(score(trainer.scorer, ids, trainer, sliding=False)))
    path = Path(ARTIFACT)
    with ranks.agree():
        if ranks.is_main:
            write_artifact(
                path,
                trainer.average.state(),
                config,
                sequences=calibration_sequences(IdStream.open(data, "train"), config, data),
                code_bytes=code_bytes,
                device=ranks.device,
                force=True,
            )
    log.write(*log_lines.size_lines(config, weights_bytes=path.stat().st_size, code_bytes=code_bytes))
    if ranks.device.type == "cuda":
        peak_mib = torch.cuda.max_memory_allocated(ranks.device) / 2**20
        log.write(f"peak memory allocated: {peak_mib:.0f} MiB")
    scorer = packed_scorer(path, config, ranks, compiled=trainer.compiled)
    for kind, sliding in (("roundtrip", False), ("sliding_window", True)):
        begin = time.perf_counter()
        result = score(scorer, ids, trainer, sliding=sliding)
        log.write(log_lines.final_line(config, result, kind=kind, evaluation_s=time.perf_counter() - begin))
    log.write(log_lines.counts_line(result, int((ids == BOS).sum())))
    return result


def packed_scorer(path: Path, config: RunConfig, ranks: Ranks, *, compiled: bool = False) -> Scorer:
    """Return a scorer of the model in the artifact at `path`. Raises: ArtifactError if it is damaged."""
    model = build(config, read_container(path).tensors, source=str(path))
    return Scorer(on_device(model, ranks.device), compile=compiled)


def score(scorer: Scorer, ids: npt.NDArray[np.uint16], trainer: Trainer, *, sliding: bool) -> Score:
    """Return the score of ids[1:] in windows that slide as the configuration says, or that do not overlap."""
    evaluation = trainer.config.evaluation
    window, stride = window_and_stride(evaluation, sliding=sliding)
    batch_ids = evaluation.batch_bytes
    return score_on_ranks(scorer, ids, trainer.ranks, window=window, stride=stride, batch_ids=batch_ids)
