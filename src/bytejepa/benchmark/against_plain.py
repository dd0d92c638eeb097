"""The fast path and the plain one side by side, step by step in turn, so that a busy machine slows both alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bytejepa.benchmark.plain import (
    PlainConfig,
    PlainJepa,
    PlainModel,
    build_plain_optimizers,
    plain_train_step,
    start_ema,
)
from bytejepa.benchmark.speed import Speed, TrainingStep, speed_of, synchronize, time_step
from bytejepa.config import RunConfig
from bytejepa.errors import ConfigError


def plain_config(config: RunConfig) -> PlainConfig:
    """Return the plain model's settings for the same arithmetic. Raises: ConfigError for options it does not have."""
    model, jepa = config.model, config.jepa
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
            ("model.attention_gate_dims", model.attention_gate_dims),
            ("model.value_embedding_last_layers", model.value_embedding_last_layers),
            ("jepa.context causal", jepa.context == "causal"),
            ("jepa.horizons", jepa.horizons > 1),
            ("jepa.next_bytes_weight", jepa.next_bytes_weight),
            ("model.multi_token_heads", model.multi_token_heads),
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


def plain_step(config: RunConfig, fast: TrainingStep) -> Callable[[], Tensor]:
    """Return a call that takes one plain step on the fast path's next batch and returns its loss, waited for."""
    model = PlainModel(plain_config(config), seed=0).to(fast.device)
    optimizers, ema = build_plain_optimizers(model), start_ema(model)
    on_gpu = fast.device.type == "cuda"

    def step() -> Tensor:
        inputs, targets = fast.read()
        with torch.autocast(fast.device.type, torch.bfloat16, enabled=on_gpu):
            taken = plain_train_step(
                model, optimizers, ema, inputs, targets, lr_scale=0.1, momentum=0.95, jepa_lambda=0.001
            )
        taken.ce.item()
        return taken.ce

    return step


def measure_against_plain(config: RunConfig, fast: TrainingStep, *, peak: float, steps: int) -> tuple[Speed, Speed]:
    """Return (ours, plain), measured in turn."""
    plain = plain_step(config, fast)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for index in range(steps):
        for name, step in (("ours", fast), ("plain", plain)):
            times[name] += time_step(step, fast.device, steps=1, warmup=2 if index == 0 else 0)
    synchronize(fast.device)
    ours, other = (
        speed_of(name, times[name], config, fast.device, peak=peak, loss=float(step()))
        for name, step in (("ours", fast), ("plain", plain))
    )
    return ours, other


def speedup(ours: Speed, plain: Speed) -> tuple[float, float]:
    """Return (ratio of the medians, ratio of the fastest steps): how many times as many bytes a second ours trains."""
    return plain.step_ms / ours.step_ms, plain.fastest_ms / ours.fastest_ms
