"""Measuring a run: scores of every stage, the price of every byte, the artifact's tensors, one backward pass."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bytejepa.artifact.container import Container, read_container
from bytejepa.artifact.export import pack_run
from bytejepa.artifact.load import TrainedRun, build, read_run, starting_point
from bytejepa.artifact.quantize import hidden_pairs
from bytejepa.artifact.store import code_bytes
from bytejepa.bits import NATS_PER_BIT, bits_per_byte
from bytejepa.config import RunConfig, replace
from bytejepa.config_model import JepaConfig
from bytejepa.data.loader import IdStream, validation_ids
from bytejepa.data.vocabulary import BYTE_OFFSET
from bytejepa.errors import BytejepaError, CheckpointError, DataError
from bytejepa.model.initialization import fill_sigreg_directions, initialize
from bytejepa.model.precision import on_device
from bytejepa.model.quantization import QuantizedMatrix
from bytejepa.model.transformer import ByteLM
from bytejepa.progress import StageProgress, silent, stage_count
from bytejepa.report.measurements import (
    Flow,
    GradientBatch,
    PricedText,
    RunMeasurements,
    StageScore,
    TensorFigures,
)
from bytejepa.scoring.evaluate import Scorer, target_losses
from bytejepa.scoring.windows import window_and_stride
from bytejepa.training import checkpoint, schedule
from bytejepa.training.gradient_step import GradientStep

DEFAULT_SCORE_BYTES = 262_144
"""Leading ids of the validation split that are priced unless told otherwise."""
GRADIENT_SEQUENCES = 4
"""Sequences of the one backward pass: few, so that a full-size model fits into a laptop's memory."""
UNMOVED = 1e-4
"""Relative distance from a multiple of the initial weights under which they count as unmoved: weight decay alone
shrinks weights in proportion, and thousands of float32 roundings stay below it."""


def measure(
    run: Path,
    *,
    data: Path | None = None,
    score_bytes: int | None = None,
    device: str = "cpu",
    on_progress: StageProgress | None = None,
) -> RunMeasurements:
    """Return what the newest whole checkpoint of `run` measures; the artifact is made in a temporary folder.

    `data`: its shards if they moved; `score_bytes`: leading ids of the validation split that are priced.
    Raises: CheckpointError without a whole checkpoint, DataError if the shards cannot be found or read.
    """
    tell = on_progress or silent
    trained = read_run(run)
    config, raw, average = trained.config, trained.raw, trained.average
    ids, is_whole = _validation_ids(trained, data, score_bytes or DEFAULT_SCORE_BYTES)
    tell("pack", 0, 1)
    _, zipped_code_bytes = code_bytes()
    with tempfile.TemporaryDirectory(prefix="bytejepa-report-") as folder:
        artifact = Path(folder) / "model.bjm"
        pack_run(trained, artifact, data=data, code_bytes=zipped_code_bytes)
        container = read_container(artifact)
    weights = {"raw": raw, "average": average, "artifact": container.tensors}
    scores, priced = {}, None
    for stage, tensors in weights.items():
        model = on_device(build(config, tensors, source=str(run)), device)
        priced = _price(model, ids, is_whole, stage_count(tell, f"score {stage}", len(ids) - 1))
        num_bytes = int((priced.targets >= BYTE_OFFSET).sum())
        nats = float(priced.bits.sum()) * NATS_PER_BIT
        scores[stage] = StageScore(bpb=bits_per_byte(nats, num_bytes), num_bytes=num_bytes)
    assert priced is not None
    tell("gradients", 0, 1)
    batch, gradients = _gradients(config, raw, ids, device)
    initial = weights_at_the_beginning(trained)
    restored = in_trained_order(container.tensors, average)
    return RunMeasurements(
        step=trained.step,
        scores=scores,
        priced=priced,
        tensors=tuple(
            _tensor_figures(name, raw, average, initial, container, restored, gradients) for name in gradients
        ),
        gradient_batch=batch,
        device=torch.cuda.get_device_name() if device.startswith("cuda") else device,
        weights_bytes=container.info.file_bytes,
        joint_bytes=container.info.joint_bytes,
        code_bytes=zipped_code_bytes,
        limit_bytes=config.artifact.limit_bytes,
    )


def _validation_ids(trained: TrainedRun, data: Path | None, limit: int) -> tuple[npt.NDArray[np.uint16], bool]:
    """Return the leading ids of the validation split, and whether they are all of it."""
    try:
        shards = trained.folder.data_path(data)
        ids = validation_ids(shards, limit)
        return ids, len(ids) == IdStream.open(shards, "val").num_ids
    except (CheckpointError, DataError) as problem:
        raise type(problem)(problem.message, hint="name the run's shards with --data, or use --measure none") from None


def _price(
    model: ByteLM, ids: npt.NDArray[np.uint16], is_whole: bool, on_progress: Callable[[int], None] | None
) -> PricedText:
    """Return what every target of `ids` costs, in non-overlapping windows."""
    evaluation = model.config.evaluation
    window, stride = window_and_stride(evaluation, sliding=False)
    parts: list[npt.NDArray[np.float64]] = []
    done = 0
    scorer = Scorer(model)
    for _, losses in target_losses(scorer, ids, window=window, stride=stride, batch_ids=evaluation.batch_bytes):
        parts.append(losses.double().flatten().cpu().numpy())
        done += losses.numel()
        if on_progress is not None:
            on_progress(done)
    return PricedText(
        ids=np.asarray(ids),
        bits=np.concatenate(parts) / NATS_PER_BIT,
        window=window,
        is_whole_split=is_whole,
    )


def _gradients(
    config: RunConfig, raw: dict[str, Tensor], ids: npt.NDArray[np.uint16], device: str
) -> tuple[GradientBatch, dict[str, Tensor | None]]:
    """Return (batch, gradient by parameter) of one backward pass of the run's loss.

    The latent losses enter with the largest weight they have in the run, so that a module that only they train counts
    as trained. SIGReg looks at the latents of the whole batch.
    """
    config = replace(config, jepa={"sigreg_group_sequences": None}, data={"micro_batch_bytes": None})
    model = ByteLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(raw[name])
    fill_sigreg_directions(model, config.training.seed)
    model.to(device)
    length = min(config.data.stages[-1][1], len(ids) - 1)
    rows = min(GRADIENT_SEQUENCES, (len(ids) - 1) // length)
    block = torch.from_numpy(ids[: rows * length + 1].astype(np.int64)).to(device)
    step = GradientStep(model, config, compile=False)
    jepa_lambda = largest_jepa_lambda(config.jepa)
    step(block[:-1].view(rows, length), block[1:].view(rows, length), jepa_lambda=jepa_lambda)
    gradients = {name: None if p.grad is None else p.grad.float().cpu() for name, p in model.named_parameters()}
    batch = GradientBatch(num_sequences=rows, sequence_bytes=length, jepa_lambda=jepa_lambda)
    return batch, gradients


def weights_at_the_beginning(trained: TrainedRun) -> dict[str, Tensor] | None:
    """Return what a run's weights were before its first step: those that the seed gives again, or of a run that began with an
    earlier model, the checkpoint of step 0 or that model, if one of them is still there; None otherwise."""
    config = trained.config
    started_from = trained.folder.read_manifest().get("started_from")
    if started_from is not None:
        with contextlib.suppress(CheckpointError):  # few checkpoints are kept, and the newest ones
            return checkpoint.read(trained.folder.checkpoints_path, 0).part("model")
    model = initialize(ByteLM(config), config.training.seed)
    if started_from is not None:
        try:
            start = starting_point(Path(str(started_from.get("path"))))
        except BytejepaError:
            return None
        if start.described()["weights_sha256"] != started_from.get("weights_sha256"):
            return None
        start.load_into(model)  # what it lacks began as the seed has it
    return {name: value.detach() for name, value in model.named_parameters()}


def largest_jepa_lambda(jepa: JepaConfig) -> float:
    """Return the largest weight of the latent losses in a run: where their ramp ends, or just before where it falls then."""
    ends = jepa.lambda_ramp_until
    return max(schedule.jepa_lambda(jepa, progress) for progress in (math.nextafter(ends, 0.0), ends))


def in_trained_order(stored: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what an artifact restores with its hidden units where those of `weights`, as trained, stand.

    An artifact does not say how `order_hidden_units` sorted them. Each stored unit is the trained one that its row and
    column are most alike; where two claim the same one, as many as possible are as alike as possible.
    """
    aligned = dict(stored)
    for up_name, down_name in hidden_pairs(stored):
        units, trained = (torch.cat((w[up_name], w[down_name].T), 1).float().cpu() for w in (stored, weights))
        likeness = F.normalize(units) @ F.normalize(trained).T
        order = likeness.argmax(1)
        if len(order.unique()) < len(order):
            order = torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])
        place = torch.argsort(order)
        aligned[up_name], aligned[down_name] = stored[up_name][place], stored[down_name][:, place]
    return aligned


def _tensor_figures(
    name: str,
    raw: dict[str, Tensor],
    average: dict[str, Tensor],
    initial: dict[str, Tensor] | None,
    container: Container,
    restored: dict[str, Tensor],
    gradients: dict[str, Tensor | None],
) -> TensorFigures:
    weights, gradient = average[name].float(), gradients[name]
    gradient = torch.zeros_like(weights) if gradient is None else gradient
    stored = container.stored.get(name)
    begun = None if initial is None else initial[name]
    return TensorFigures(
        name=name,
        num_elements=weights.numel(),
        rms=_rms(weights),
        initial_rms=None if begun is None else _rms(begun),
        scheme="not stored" if stored is None else _scheme(stored),
        artifact_bytes=container.info.tensor_bytes.get(name, 0),
        relative_error=0.0 if stored is None else _ratio(_rms(restored[name] - weights), _rms(weights)),
        gradient_rms=_rms(gradient),
        share_without_gradient=float((gradient == 0).double().mean()),
        flow=flow_of_weights(gradient, raw[name], begun),
    )


def flow_of_weights(gradient: Tensor, weights: Tensor, initial: Tensor | None) -> Flow:
    """Return whether a parameter learns, from its gradient on a batch and its weights after and before training (None: not
    known, so that nobody can say that they never moved)."""
    if bool((gradient != 0).any()):
        return "alive"
    if initial is None:
        return "no gradient"
    start = initial.to(weights.dtype).double().flatten()
    now = weights.double().flatten()
    shrunk = _ratio(float(now @ start), float(start @ start))
    moved = float((now - shrunk * start).norm())
    return "no gradient" if moved > UNMOVED * float(now.norm()) else "dead"


def _scheme(stored: QuantizedMatrix | Tensor) -> str:
    return f"int{stored.bits}_rows" if isinstance(stored, QuantizedMatrix) else str(stored.dtype).removeprefix("torch.")


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
