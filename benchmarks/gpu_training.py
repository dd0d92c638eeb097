"""One call checks and measures on a GPU all that a CPU cannot: speed, memory, each choice on and off, agreement.

    python benchmarks/gpu_training.py OUT.json [--minutes 8]

Writes one JSON object after every section, so that a run cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bytejepa.benchmark.speed import (
    Speed,
    TrainingStep,
    flop_per_byte,
    matmul_peak_flop_per_s,
    measure,
    measure_parts,
    synchronize,
    time_step,
)
from bytejepa.config import RunConfig, replace
from bytejepa.model.attention import available_backends, causal_attention
from bytejepa.presets import preset

GPU_SHARE_BYTES = 49_152
"""The reference's bytes a step on each of its 8 GPUs."""


def at_gpu_share(config: RunConfig, **training: object) -> RunConfig:
    """Return `config` with one GPU's share of the batch."""
    changed = {"batch_bytes": GPU_SHARE_BYTES, "num_streams": 1}
    return replace(config, data=changed, training=training)


def check_attention(device: torch.device, rows: int = 12, length: int = 4096) -> dict[str, object]:
    """Return each kernel's error against an explicit softmax in float64 and its time at the reference's shape."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: dict[str, object] = {}
    q, k, v = (torch.randn(2, 300, h, 64, device=device, dtype=dtype) for h in (8, 4, 4))
    exact = explicit_attention(*(x.double() for x in (q, k, v)))
    shapes = [(rows, length, heads, 64) for heads in (8, 4, 4)]
    big = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    gradient = torch.randn_like(big[0])
    for name, reason in available_backends(device.type).items():
        if reason is not None or name == "math":
            results[name] = reason or "not timed: it writes all scores"
            continue
        try:
            out = attend(name, (q, k, v))
            error = ((out.double() - exact).norm() / exact.norm()).item()
            results[name] = {"relative_error": error, **attention_times(name, big, gradient)}
        except Exception as problem:  # what fails here is a finding, not the end of the run
            results[name] = f"failed: {type(problem).__name__}: {str(problem)[:200]}"
    return results


def attend(backend: str, qkv: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return causal attention by one kernel; FlexAttention compiled and with its causal mask."""
    if backend != "flex":
        return causal_attention(*qkv, backend=backend)
    from bytejepa.model.flex_masks import block_mask

    mask = block_mask(qkv[0].size(1), None, None, qkv[0].device)
    return torch.compile(causal_attention)(*qkv, backend=backend, mask=mask)


def attention_times(backend: str, qkv: Sequence[torch.Tensor], gradient: torch.Tensor) -> dict[str, float]:
    """Return median milliseconds of a forward pass, and of a forward and a backward pass."""
    device = gradient.device
    forward = time_step(lambda: attend(backend, qkv), device, steps=10)
    both = time_step(lambda: attend(backend, qkv).backward(gradient), device, steps=10)
    return {"forward_ms": statistics.median(forward), "forward_backward_ms": statistics.median(both)}


def explicit_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return causal attention by the formula."""
    repeats = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / q.size(-1) ** 0.5
    future = torch.ones(scores.shape[-2:], device=q.device, dtype=torch.bool).triu(1)
    return torch.einsum("bhqk,bkhe->bqhe", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def _make_batches_when_needed(step: TrainingStep) -> None:
    step.loader.device = torch.device("cpu")  # nothing is pinned, and every copy is waited for
    numbers = itertools.count()
    step.read = lambda: tuple(part.to(step.device) for part in step.loader.make(0, next(numbers)))


def _average_weight_by_weight(step: TrainingStep) -> None:
    @torch.no_grad()
    def update(**_: object) -> None:
        for average, live in zip(step.average.average, step.average.live, strict=True):
            average.lerp_(live.float(), 0.003)

    step.average.update = update


def _adam_weight_by_weight(step: TrainingStep) -> None:
    for group in step.optimizers.adam.param_groups:
        group["fused"] = group["foreach"] = False


def _muon_matrix_by_matrix(step: TrainingStep) -> None:
    muon = step.optimizers.muon
    muon.batches = [muon._batch([matrix]) for matrix in muon.parameters]


def _mix_order_reduction(_: TrainingStep) -> None:
    import torch._inductor.config as inductor

    inductor.triton.mix_order_reduction = True  # the next TrainingStep switches it off again


SWITCHES: dict[str, Callable[[TrainingStep], None]] = {
    "batches made ahead": _make_batches_when_needed,
    "foreach average": _average_weight_by_weight,
    "fused AdamW": _adam_weight_by_weight,
    "batched Muon": _muon_matrix_by_matrix,
    "mix_order_reduction off": _mix_order_reduction,
}
"""What of the hot path can be taken away, each alone."""


def measured(
    name: str,
    config: RunConfig,
    device: torch.device,
    peak: float,
    *,
    compile: bool = True,  # noqa: A002 - torch's word
    steps: int = 20,
    without: str | None = None,
    **call: object,
) -> Speed:
    """Return the speed of the fast path under `config`, `without` one of `SWITCHES`."""
    step = TrainingStep(config, device, compile=compile)
    if without is not None:
        SWITCHES[without](step)
    speed = measure(name, lambda: step(**call), config, device, peak=peak, steps=steps)
    if name == "ours":
        speed = dataclasses.replace(speed, parts_ms=measure_parts(step, steps=8))
    del step
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return speed


def full_size() -> tuple[RunConfig, RunConfig]:
    """Return (default, the reference) at one GPU's share of the reference's batch."""
    return at_gpu_share(preset("default"), bfloat16_embeddings=True), at_gpu_share(preset("pr832"))


def rehearsal() -> tuple[RunConfig, RunConfig]:
    """Return two small configurations with which a CPU can walk through the whole script."""
    small = replace(
        preset("tiny"),
        model={"num_layers": 2, "model_dim": 32, "rotary_dims": 8, "xsa_last_layers": 1},
        data={"sequence_bytes": 64, "batch_bytes": 256, "sequence_growth": None},
        training={"compile": "off"},
    )
    return small, replace(small, jepa={"gradient": "detached"})


def variants(ours: RunConfig, reference: RunConfig) -> dict[str, tuple[RunConfig, dict[str, object]]]:
    """Return what is measured: name -> (configuration, arguments of `measured`)."""
    L = ours.model.num_layers
    windows = tuple(0 if i % 4 == 3 else ours.data.sequence_bytes // 8 for i in range(L))
    return {
        "ours": (ours, {}),
        "reference's settings": (reference, {}),
        "loss read every step": (ours, {"wait": True}),
        "latent losses at weight zero": (ours, {"jepa_lambda": 0.0}),
        "without JEPA": (replace(ours, jepa={"enabled": False}), {}),
        "float32 embeddings": (replace(ours, training={"bfloat16_embeddings": False}), {}),
        "plain flash attention": (replace(ours, training={"attention": "flash"}), {}),
        "windows of T/8 in 3 of 4 layers": (replace(ours, model={"attention_windows": windows}), {}),
        "document masking": (replace(ours, model={"document_masking": True}), {}),
        "not compiled": (ours, {"compile": False, "steps": 8}),
        **{f"without {name}": (ours, {"without": name}) for name in SWITCHES},
    }


TARGETS = {
    "step_ms": ("at most", 45.0),
    "utilization": ("at least", 0.35),
    "peak_memory_bytes": ("at most", 10.8 * 2**30),
}
"""What one H100 is to reach at the reference's share; the reference itself took 63 ms at a utilisation of 24 %."""


def against_targets(speed: dict[str, float]) -> dict[str, str]:
    """Return for each target whether `speed` meets it."""
    return {
        name: f"{'met' if (speed[name] <= bound) == (sense == 'at most') else 'missed'}: {speed[name]:.4g}, {sense} {bound:.4g}"
        for name, (sense, bound) in TARGETS.items()
    }


def check_agreement(steps: int = 200, devices: Sequence[str] = ("cpu", "cuda")) -> dict[str, object]:
    """Return the losses of a small model trained on each device: bfloat16 on a GPU, float32 on a CPU, same data."""
    config = replace(
        preset("tiny"),
        model={"num_layers": 4, "num_heads": 2, "num_kv_heads": 1},
        data={"sequence_bytes": 256, "batch_bytes": 4096, "sequence_growth": None},
        schedule={"steps": steps},
        training={"warmup_steps": 0, "validate_every_steps": None},
    )
    import tempfile

    from bytejepa.data.corpus import write_embedded_shards
    from bytejepa.training.runlog import RunFolder
    from bytejepa.training.runs import train

    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_embedded_shards(Path(folder) / "data")
        for device in devices:
            run = Path(folder) / device
            result = train(replace(config, training={"device": device}), Path(folder) / "data", run)
            losses = [line["train_loss_nats"] for line in RunFolder(run).read_metrics() if "train_loss_nats" in line]
            results[device] = {"last_losses_nats": losses[-5:], "val_bpb": result.val_bpb}
            results[device] |= {"val_bpb_average": result.val_bpb_average}
    return results


def main(words: Sequence[str] | None = None) -> None:
    """Run every section that fits into the time given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rehearse", action="store_true", help="walk through all of it on a CPU, at a tiny size")
    options = parser.parse_args(words)
    begin = time.perf_counter()
    device = torch.device("cpu" if options.rehearse else "cuda")
    ours, reference = rehearsal() if options.rehearse else full_size()
    peak = matmul_peak_flop_per_s(device)
    report: dict[str, object] = {
        "device": "cpu, rehearsal" if options.rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "matmul_peak_tflop_per_s": peak / 1e12,
        "bytes_a_step": ours.data.batch_bytes,
        "flop_per_byte": flop_per_byte(ours),
    }
    sections = {"attention": lambda: check_attention(device, *((2, 256) if options.rehearse else ()))}
    for name, (config, arguments) in variants(ours, reference).items():
        if options.rehearse:
            arguments |= {"compile": False, "steps": 2}
        sections[f"speed: {name}"] = lambda n=name, c=config, a=arguments: dataclasses.asdict(
            measured(n, c, device, peak, **a)
        )
    sections["agreement"] = lambda: check_agreement(3, ("cpu",)) if options.rehearse else check_agreement()
    first = ["attention", "speed: ours", "speed: reference's settings", "agreement"]  # what a run cut short must have
    sections = {name: sections[name] for name in [*first, *sections]}
    for section, run in sections.items():
        if time.perf_counter() - begin > 60 * options.minutes:
            report[section] = "not reached in the time given"
            continue
        try:
            report[section] = run()
        except Exception as problem:  # the other sections still count
            report[section] = f"failed: {type(problem).__name__}: {str(problem)[:500]}"
        if section == "speed: ours" and isinstance(report[section], dict):
            report["targets"] = against_targets(report[section])
        synchronize(device)
        print(f"{time.perf_counter() - begin:6.0f} s  {section}: {report[section]}", flush=True)
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
