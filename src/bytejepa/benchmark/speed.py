"""How fast training is, against what the machine could do: bytes a second, TFLOP/s, utilisation, time by part.

Arithmetic is counted as in the field: 6 N + 6 D T L floating-point operations a byte trained, N the weights that enter
a matrix product, attention counted causally, recomputation not counted. The peak is a matrix product timed in the same
process, so that utilisation means the same on every machine.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bytejepa.benchmark.memory import peak_bytes, restart_peak
from bytejepa.config import DataConfig, RunConfig
from bytejepa.data.loader import IdStream, Loader
from bytejepa.data.vocabulary import BYTE_OFFSET, VOCABULARY_SIZE
from bytejepa.model.attention import causal_attention
from bytejepa.model.chunk_stride import at_chunk_ends
from bytejepa.model.initialization import initialize
from bytejepa.model.layers import document_starts
from bytejepa.model.precision import on_device
from bytejepa.model.transformer import ByteLM
from bytejepa.training.allocator import keep_freed_memory
from bytejepa.training.averaging import WeightAverage
from bytejepa.training.distributed import Ranks
from bytejepa.training.gradient_step import GradientStep
from bytejepa.training.optimizers import Optimizers
from bytejepa.training.trainer import avoid_known_regressions, keep_in_bfloat16

FEWEST_PAIRS = 12
"""Of steps with and without the JEPA losses."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What was measured of one way to train."""

    name: str
    step_ms: float
    """Median of the timed steps."""
    fastest_ms: float
    bytes_per_s: float
    tflop_per_s: float
    """By the formula above, at the median."""
    utilization: float
    """Share of the matrix-product peak measured beside it."""
    peak_memory_bytes: int
    """The most memory in use while it was timed: tensors on a GPU, the whole process on a CPU."""
    parts_ms: dict[str, float]
    """Median milliseconds of each part, measured apart with the device waited for after each; empty if not asked for."""
    last_loss_nats: float


def matmul_parameters(config: RunConfig) -> float:
    """Return the number of weights that enter a matrix product for each byte; JEPA's and those of chunk blocks count once
    a chunk."""
    model, jepa = config.model, config.jepa
    D, kv = model.model_dim, model.num_kv_heads * model.head_dim
    gate = (model.attention_gate_dims or 0) * model.num_heads
    passes = sum(1 / stride for stride in model.stride_of_place)
    heads = 1 + model.multi_token_heads
    count = passes * (2 * D * D + 2 * D * kv + 2 * D * model.mlp_dim + gate) + heads * VOCABULARY_SIZE * D
    if model.bigram_rows is not None:
        count += model.bigram_dim * D
    if model.ngram_orders is not None:
        count += len(model.ngram_orders) * model.ngram_dim * D
    per_chunk = 0
    if jepa.enabled:
        Z = jepa.latent_dim
        predictor = (D if jepa.context == "causal" else Z) * Z + Z * Z
        per_chunk = D * jepa.hidden_dim + jepa.hidden_dim * Z + jepa.horizons * predictor
        if jepa.inject:
            per_chunk += Z * D
        if jepa.next_bytes_weight:
            per_chunk += Z * jepa.chunk_bytes * VOCABULARY_SIZE
    return count + per_chunk / jepa.chunk_bytes


def flop_per_byte(config: RunConfig) -> float:
    """Return the floating-point operations of training on one byte: 6 N + 6 D * (bytes a query sees, doubled) a layer.

    For full causal attention that is 6 D T L (the performance notes' formula); a window w < T counts its own pairs, and a
    chunk block those of its T // stride chunks.
    """
    T = config.data.sequence_bytes
    attended = 0.0
    for window, stride in zip(config.model.window_of_place, config.model.stride_of_place, strict=True):
        queries = T // stride
        w = min(window or queries, queries)
        attended += 2 * (w * (w + 1) / 2 + (queries - w) * w) / T  # pairs of a sequence, doubled, a byte
    return 6 * matmul_parameters(config) + 6 * config.model.model_dim * attended


def matmul_peak_flop_per_s(device: torch.device, *, seconds: float = 0.5) -> float:
    """Return the floating-point operations a second of a large matrix product: bfloat16 on CUDA, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == 0.0:
        begin = time.perf_counter()
        for _ in range(5):
            a @ b
        synchronize(device)
        best = max(best, 5 * 2 * size**3 / (time.perf_counter() - begin))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TrainingStep:
    """The fast path as the trainer takes it, on random bytes, with each part callable apart."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        compile: bool,  # noqa: A002 - torch's word
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.device, self.compiled = config, device, compile
        self.has_latent_losses = config.jepa.enabled and config.jepa.losses
        ranks = ranks or Ranks(device=device)
        on_gpu = device.type == "cuda"
        if not on_gpu:
            keep_freed_memory()
        model = initialize(ByteLM(config), config.training.seed)
        if on_gpu and config.training.bfloat16_embeddings:
            keep_in_bfloat16(model)
        if on_gpu and compile:
            avoid_known_regressions()
        self.model = on_device(model, device)
        self.optimizers = Optimizers(self.model, config.optimizer, ranks, compile_update=compile and on_gpu)
        self.gradient_step = GradientStep(self.model, config, compile=compile, buckets=self.optimizers.gradient_buckets)
        self.average = WeightAverage(self.model, config.training)
        self.loader = random_loader(config.data, device, ranks=ranks)
        self.index = 0

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the next batch."""
        self.index += 1
        return self.loader.batch(0, self.index)

    def __call__(self, *, jepa_lambda: float = 0.001, wait: bool = False) -> Tensor:
        """Take one step and return its loss; `wait` reads the loss at once, as a plain loop does."""
        inputs, targets = self.read()
        self.optimizers.zero_grad()
        losses = self.gradient_step(inputs, targets, jepa_lambda=jepa_lambda if self.has_latent_losses else 0.0)
        self.optimizers.step(learning_rate_scale=0.1, momentum=0.95)
        self.average.update(step=1000, progress=0.5)
        if wait:
            losses.ce.item()
        return losses.ce


def random_loader(config: DataConfig, device: torch.device, *, ranks: Ranks | None = None) -> Loader:
    """Return a loader over random bytes held in memory, of one rank's rows."""
    rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
    random = np.random.default_rng(0)
    length = max(config.batch_bytes, 2 * config.sequence_bytes) * 4
    ids = random.integers(BYTE_OFFSET, VOCABULARY_SIZE, length, dtype=np.uint16)
    return Loader(IdStream([ids]), config, seed=0, rank=rank, world_size=world_size, device=device)


def time_step(step: Callable[[], object], device: torch.device, *, steps: int, warmup: int = 3) -> list[float]:
    """Return the milliseconds of each of `steps` calls; on CUDA by events, so that the host is not waited for."""
    for _ in range(warmup):
        step()
    synchronize(device)
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        synchronize(device)
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def measure(
    name: str, step: Callable[[], Tensor], config: RunConfig, device: torch.device, *, peak: float, steps: int
) -> Speed:
    """Return the speed of `step`, a call that trains on one batch of `config` and returns its loss."""
    restart_peak(device)
    times = time_step(step, device, steps=steps)
    memory = peak_bytes(device)
    return speed_of(name, times, config, peak=peak, loss=float(step()), peak_memory_bytes=memory)


def speed_of(
    name: str, times_ms: list[float], config: RunConfig, *, peak: float, loss: float, peak_memory_bytes: int
) -> Speed:
    """Return the summary of timed steps."""
    median_ms = statistics.median(times_ms)
    rate = config.data.batch_bytes / median_ms * 1e3
    achieved = rate * flop_per_byte(config)
    return Speed(
        name=name,
        step_ms=median_ms,
        fastest_ms=min(times_ms),
        bytes_per_s=rate,
        tflop_per_s=achieved / 1e12,
        utilization=achieved / peak,
        peak_memory_bytes=peak_memory_bytes,
        parts_ms={},
        last_loss_nats=loss,
    )


def measure_parts(step: TrainingStep, *, steps: int) -> dict[str, float]:
    """Return median milliseconds of data, forward, backward, optimiser, average, the JEPA losses and attention.

    Each part is timed apart and the device waited for, so the sum exceeds the step, in which they overlap.
    """
    device = step.device
    inputs, targets = step.read()
    weight = torch.tensor(0.001, device=device)

    def forward() -> Tensor:
        return step.gradient_step.weighted_loss(inputs, targets, weight, step.has_latent_losses, False)[0]

    def forward_backward() -> None:
        step.optimizers.zero_grad()
        forward().backward()

    def median(call: Callable[[], object]) -> float:
        def waited_for() -> None:
            call()
            synchronize(device)

        return statistics.median(time_step(waited_for, device, steps=steps, warmup=2))

    parts = {"data": median(step.read), "forward": median(forward)}
    parts["backward"] = max(0.0, median(forward_backward) - parts["forward"])
    parts["optimizer"] = median(lambda: step.optimizers.step(learning_rate_scale=0.0, momentum=0.9))
    parts["average"] = median(lambda: step.average.update(step=1000, progress=0.5))
    if step.has_latent_losses:
        parts["jepa losses"] = jepa_losses_ms(step, device, pairs=max(FEWEST_PAIRS, steps))
    parts["attention"] = attention_ms(step, steps=steps)
    return parts


def jepa_losses_ms(step: Callable[..., object], device: torch.device, *, pairs: int) -> float:
    """Return the median milliseconds by which a step with the JEPA losses takes longer than the one beside it without.

    They are a few hundredths of a step, less than what other programs of the machine do to it within a minute: steps with
    and without follow each other at once, each kind first in every other pair.
    """

    def timed(jepa_lambda: float) -> float:
        return time_step(lambda: step(jepa_lambda=jepa_lambda), device, steps=1, warmup=0)[0]

    differences = []
    for number in range(2 + pairs):  # two to warm up
        if number % 2:
            without, with_losses = timed(0.0), timed(0.001)
        else:
            with_losses, without = timed(0.001), timed(0.0)
        differences.append(with_losses - without)
    return max(0.0, statistics.median(differences[2:]))


def attention_ms(step: TrainingStep, *, steps: int) -> float:
    """Return the median milliseconds of forward and backward of all layers' attention kernels alone, masks included."""
    model = step.config.model
    counts = collections.Counter(zip(model.window_of_place, model.stride_of_place, strict=True))
    ids, _ = step.read()
    return sum(count * _kernel_ms(step, ids, *kind, steps=steps) for kind, count in counts.items())


def _kernel_ms(step: TrainingStep, ids: Tensor, window: int | None, stride: int, *, steps: int) -> float:
    """Return the median milliseconds of the kernel that the model takes for a layer with this window and stride."""
    model, device, dtype = step.config.model, step.device, step.model.compute_dtype
    document_ids = document_starts(ids).cumsum(1, dtype=torch.int32) if model.document_masking else None
    if document_ids is not None and stride > 1:
        document_ids = at_chunk_ends(document_ids, stride)
    rows, length = ids.size(0), ids.size(1) // stride
    backend, masks = step.model.attention_masks(stride, length, document_ids, device, compiled=step.compiled)
    # FlexAttention that is not compiled writes all scores, as the compiled step does not
    attention = torch.compile(causal_attention) if backend == "flex" and step.compiled else causal_attention
    shapes = [
        (rows, length, heads, model.head_dim) for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    ]
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    gradient = torch.randn(shapes[0], device=device, dtype=dtype)

    def once() -> None:
        attention(q, k, v, backend=backend, mask=masks[window]).backward(gradient)
        synchronize(device)

    return statistics.median(time_step(once, device, steps=steps, warmup=2))
