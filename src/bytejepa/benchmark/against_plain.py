"""The fast path and the plain one side by side, step by step in turn, so that a busy machine slows both alike."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from bytejepa.benchmark.memory import peak_bytes, restart_peak
from bytejepa.benchmark.plain import (
    PlainConfig,
    PlainJepa,
    PlainModel,
    PlainRecipe,
    build_plain_optimizers,
    plain_train_step,
    start_ema,
)
from bytejepa.benchmark.plain_model import SIGREG_KNOTS
from bytejepa.benchmark.speed import Speed, TrainingStep, random_loader, speed_of, synchronize, time_step
from bytejepa.config import RunConfig
from bytejepa.errors import BytejepaError, ConfigError

PlainStep = tuple[float, float, int]
"""Milliseconds, loss in nats and peak memory in bytes of a plain step."""


def plain_config(config: RunConfig) -> PlainConfig:
    """Return the plain model's settings for the same arithmetic. Raises: ConfigError for options it does not have."""
    model, jepa, optimizer, recipe = config.model, config.jepa, config.optimizer, PlainRecipe()
    unsupported = [
        name
        for name, value in (
            ("model.attention_windows", model.attention_windows),
            ("model.document_masking", model.document_masking),
            ("model.ngram_orders", model.ngram_orders),
            ("model.bigram_table exact", model.bigram_table == "exact"),
            ("model.smear_gate input", model.smear_gate == "input"),
            ("model.skip_gates", model.skip_gates),
            ("model.parallel_last_layers", model.parallel_last_layers),
            ("model.recurrent_layers", model.recurrent_layers),
            ("model.chunk_blocks", model.chunk_blocks),
            ("model.attention_gate_dims", model.attention_gate_dims),
            ("model.value_embedding_last_layers", model.value_embedding_last_layers),
            ("jepa.context causal", jepa.context == "causal"),
            ("jepa.horizons", jepa.horizons > 1),
            ("jepa.next_bytes_weight", jepa.next_bytes_weight),
            ("model.multi_token_heads", model.multi_token_heads),
            ("model.depth_scaled_norm off", not model.depth_scaled_norm),
            ("jepa.inject off", jepa.enabled and not jepa.inject),
            ("jepa.losses off", jepa.enabled and not jepa.losses),
            (f"jepa.sigreg_knots {jepa.sigreg_knots}", jepa.enabled and jepa.sigreg_knots != SIGREG_KNOTS[2]),
            ("optimizer.muon_row_normalization", optimizer.muon_row_normalization),
            ("optimizer.muon_beta2", optimizer.muon_beta2 is not None),
            ("optimizer.muon_cautious_weight_decay", optimizer.muon_cautious_weight_decay),
            (
                f"optimizer.newton_schulz_coefficients {optimizer.newton_schulz_coefficients}",
                optimizer.newton_schulz_coefficients != "quintic",
            ),
            (
                f"optimizer.newton_schulz_steps {optimizer.newton_schulz_steps}",
                optimizer.newton_schulz_steps != recipe.newton_schulz_steps,
            ),
        )
        if value
    ]
    if unsupported or not (model.bigram_rows and model.smear and model.skip_connections and model.residual_mix):
        raise ConfigError(
            f"the plain baseline has the reference's arithmetic only, not {', '.join(unsupported) or 'this'}"
        )
    return PlainConfig(
        num_layers=model.num_layers,
        model_dim=model.model_dim,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        mlp_ratio=model.mlp_ratio,
        bigram_rows=model.bigram_rows,
        bigram_dim=model.bigram_dim,
        xsa_last_layers=model.xsa_last_layers,
        rotary_dims=model.rotary_dims or model.head_dim,
        jepa=PlainJepa(
            chunk_size=jepa.chunk_bytes,
            latent_dim=jepa.latent_dim,
            hidden_dim=jepa.hidden_dim,
            num_directions=jepa.sigreg_directions,
        )
        if jepa.enabled
        else None,
    )


def plain_step(
    config: RunConfig, device: torch.device, read: Callable[[], tuple[Tensor, Tensor]]
) -> Callable[[], Tensor]:
    """Return a call that takes one plain step on the next batch of `read` and returns its loss, waited for."""
    model = PlainModel(plain_config(config), seed=0).to(device)
    optimizers, ema = build_plain_optimizers(model), start_ema(model)
    on_gpu = device.type == "cuda"

    def step() -> Tensor:
        inputs, targets = read()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            taken = plain_train_step(
                model, optimizers, ema, inputs, targets, lr_scale=0.1, momentum=0.95, jepa_lambda=0.001
            )
        taken.ce.item()
        return taken.ce

    return step


def _serve_plain_steps(config: RunConfig, num_threads: int, connection: Connection) -> None:
    """Take a plain step whenever asked to and answer with its milliseconds and its loss; end when told None."""
    torch.set_num_threads(num_threads)
    cpu = torch.device("cpu")
    loader, batches = random_loader(config.data, cpu), itertools.count()
    step = plain_step(config, cpu, lambda: loader.batch(0, next(batches)))
    while connection.recv() is not None:
        connection.send(_timed(step, cpu))
    loader.close()


def _timed(step: Callable[[], Tensor], device: torch.device) -> PlainStep:
    """Return what one step of `step` takes, and its loss."""
    losses: list[Tensor] = []
    (milliseconds,) = time_step(lambda: losses.append(step()), device, steps=1, warmup=0)
    return milliseconds, float(losses[0]), peak_bytes(device)


@contextlib.contextmanager
def _plain_in_its_own_process(config: RunConfig) -> Iterator[Callable[[], PlainStep]]:
    """Give a call that takes a plain step and returns what it took, in a process in which nothing is tuned: on a
    CPU the fast path changes how its own process keeps memory (`bytejepa.training.allocator`)."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve_plain_steps, args=(config, torch.get_num_threads(), theirs), daemon=True)
    process.start()
    theirs.close()

    def step() -> PlainStep:
        try:
            ours.send("step")
            milliseconds, loss, memory = ours.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise BytejepaError(
                f"the process of the plain baseline ended (exit code {process.exitcode})", hint="out of memory?"
            ) from None
        return milliseconds, loss, memory

    try:
        yield step
    finally:
        # a broken pipe would be taken for that of our output, and for a good end
        with contextlib.suppress(ConnectionError):
            ours.send(None)
        process.join()
        ours.close()


def measure_against_plain(config: RunConfig, fast: TrainingStep, *, peak: float, steps: int) -> tuple[Speed, Speed]:
    """Return (ours, plain), measured in turn: on a CPU in two processes, on a GPU in one."""
    if fast.device.type == "cuda":
        step = plain_step(config, fast.device, fast.read)
        return _in_turn(config, fast, lambda: _timed(step, fast.device), peak=peak, steps=steps)
    plain_config(config)  # what it cannot do is refused here, not in the other process
    with _plain_in_its_own_process(config) as timed_plain:
        return _in_turn(config, fast, timed_plain, peak=peak, steps=steps)


def _in_turn(
    config: RunConfig, fast: TrainingStep, plain: Callable[[], PlainStep], *, peak: float, steps: int
) -> tuple[Speed, Speed]:
    for _ in range(3):
        fast()
        plain()
    synchronize(fast.device)
    ours_ms, plain_ms = [], []
    ours_memory = plain_memory = 0
    for _ in range(steps):
        restart_peak(fast.device)
        ours_ms += time_step(fast, fast.device, steps=1, warmup=0)
        ours_memory = max(ours_memory, peak_bytes(fast.device))
        restart_peak(fast.device)
        milliseconds, plain_loss, memory = plain()
        plain_ms.append(milliseconds)
        plain_memory = max(plain_memory, memory)
    return (
        speed_of("ours", ours_ms, config, peak=peak, loss=float(fast()), peak_memory_bytes=ours_memory),
        speed_of("plain", plain_ms, config, peak=peak, loss=plain_loss, peak_memory_bytes=plain_memory),
    )


def speedup(ours: Speed, plain: Speed) -> tuple[float, float]:
    """Return (ratio of the medians, ratio of the fastest steps): how many times as many bytes a second ours trains."""
    return plain.step_ms / ours.step_ms, plain.fastest_ms / ours.fastest_ms
