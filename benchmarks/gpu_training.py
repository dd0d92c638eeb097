"""One call checks and measures on a GPU all that a CPU cannot: speed, memory, each choice on and off, agreement.

    python benchmarks/gpu_training.py OUT.json [--minutes 8] [--only "speed: ours" agreement] [--attention cudnn]

Writes one JSON object after every section, so that a run cut short keeps what it has. Its figures
are worth something on a GPU without other work only: several of these at once take turns (`turns`).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from switches import SWITCHES
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from turns import alone

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
from bytejepa.model import attention, fused_mlp
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
    attend(backend, qkv).backward(gradient)  # compiles
    with alone():
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


class Steps:
    """Measures steps; one that is compiled serves every section that can use it."""

    def __init__(self, device: torch.device, *, compile: bool, steps: int) -> None:  # noqa: A002 - torch's word
        self.device, self.compile, self.steps = device, compile, steps
        self.peak: float | None = None
        """Of a matrix product, FLOP/s; measured in the first turn."""
        self.ours: TrainingStep | None = None

    def of_ours(self, config: RunConfig, name: str, *, without: str | None = None, **call: object) -> Speed:
        """Return the speed of `config`'s step called with `call`, `without` one of `SWITCHES`."""
        if self.ours is None:
            self.ours = TrainingStep(config, self.device, compile=self.compile)
            self.ours()
            self.ours(jepa_lambda=0.0)  # both graphs, before anything is timed
        undo = SWITCHES[without](self.ours) if without else None
        speed = self._measured(name, self.ours, config, **call)
        if undo is not None:
            undo()
        if name == "ours":
            with alone():
                parts = measure_parts(self.ours, steps=8)
            speed = dataclasses.replace(speed, parts_ms=parts)
        return speed

    def kernels(self, steps: int = 4) -> dict[str, object]:
        """Return what the device runs in a step of ours: milliseconds and calls by kernel, and which operator asks for copies.

        What a step takes beyond the sum of its kernels is time in which the device waited.
        """
        assert self.ours is not None, "after ours has been measured"
        on_gpu = self.device.type == "cuda"
        kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with alone(), profile(activities=sorted({ProfilerActivity.CPU, kind}, key=str), acc_events=True) as profiled:
            for _ in range(steps):
                self.ours()
            synchronize(self.device)
        copies = collections.Counter(
            event.name
            for event in profiled.events()
            for kernel in event.kernels
            if kernel.name.startswith("Memcpy DtoD")
        )
        rows = [
            (
                row.key,
                (row.self_device_time_total if on_gpu else row.self_cpu_time_total) / steps / 1e3,
                row.count / steps,
            )
            for row in profiled.key_averages()
            if (row.device_type == DeviceType.CUDA) == on_gpu and "#" not in row.key  # those are names of ranges
        ]
        rows.sort(key=lambda row: -row[1])
        return {
            "all_ms": sum(ms for _, ms, _ in rows),
            "all_calls": sum(calls for *_, calls in rows),
            "ms_and_calls": {name: [ms, calls] for name, ms, calls in rows[:80]},
            "copies_asked_for_by": {name: count / steps for name, count in copies.most_common()},
        }

    def of_other(
        self,
        config: RunConfig,
        name: str,
        *,
        inductor: dict[str, bool] | None = None,
        plain_mlp: bool = False,
        grouped_keys: bool = False,
        graphs: bool = False,
        **how: object,
    ) -> Speed:
        """Return the speed of another configuration, or of the same one compiled with settings of the `inductor`, with the
        products of the MLP by a library, with groups of queries left to the attention kernel, or with CUDA `graphs` of the
        forward and the backward pass."""
        self.ours = None
        self._forget()
        import torch._inductor.config as settings

        step = TrainingStep(config, self.device, compile=bool(how.get("compile", self.compile)))
        if (
            graphs and self.compile
        ):  # Muon's updates are not in them: a graph that begins would overwrite their gradients
            gradient_step, options = step.gradient_step, {"triton.cudagraphs": True}
            gradient_step.weighted_loss = torch.compile(gradient_step._forward, dynamic=False, options=options)
        found = {self.device.type: not plain_mlp and fused_mlp.find(self.device.type)}
        repeated = frozenset() if grouped_keys else attention.FASTER_WITHOUT_GROUPS
        with (
            settings.patch(inductor or {}),
            mock.patch.dict(fused_mlp.possible, found),
            mock.patch.object(attention, "FASTER_WITHOUT_GROUPS", repeated),
        ):
            speed = self._measured(name, step, config, steps=8 if how else self.steps)
        del step
        self._forget()
        return speed

    def _measured(
        self, name: str, step: TrainingStep, config: RunConfig, steps: int | None = None, **call: object
    ) -> Speed:
        for _ in range(2):  # compiles
            step(**call)
        synchronize(self.device)
        with alone():
            if self.peak is None:
                self.peak = matmul_peak_flop_per_s(self.device)
            return measure(name, lambda: step(**call), config, self.device, peak=self.peak, steps=steps or self.steps)

    def _forget(self) -> None:
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


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


def speeds(steps: Steps, ours: RunConfig, reference: RunConfig) -> dict[str, Callable[[], Speed]]:
    """Return what is measured by name; those that need no compilation of their own come first."""
    L = ours.model.num_layers
    windows = tuple(0 if i % 4 == 3 else ours.data.sequence_bytes // 8 for i in range(L))
    same: dict[str, dict[str, object]] = {
        "ours": {},
        "loss read every step": {"wait": True},
        **{f"without {name}": {"without": name} for name in SWITCHES},
        "latent losses at weight zero": {"jepa_lambda": 0.0},
    }
    other: dict[str, tuple[RunConfig, dict[str, object]]] = {
        "reference's settings": (reference, {}),
        "without the kernels of the MLP": (ours, {"plain_mlp": True}),
        "with mix_order_reduction": (ours, {"inductor": {"triton.mix_order_reduction": True}}),
        "with groups of queries left to the attention kernel": (ours, {"grouped_keys": True}),
        "with CUDA graphs": (ours, {"graphs": True}),
        "with combo_kernels": (ours, {"inductor": {"combo_kernels": True}}),
        "with coordinate_descent_tuning": (ours, {"inductor": {"coordinate_descent_tuning": True}}),
        "without JEPA": (replace(ours, jepa={"enabled": False}), {}),
        "float32 embeddings": (replace(ours, training={"bfloat16_embeddings": False}), {}),
        "windows of T/8 in 3 of 4 layers": (replace(ours, model={"attention_windows": windows}), {}),
        "document masking": (replace(ours, model={"document_masking": True}), {}),
        "not compiled": (ours, {"compile": False}),
    }
    return {
        **{name: lambda n=name, c=call: steps.of_ours(ours, n, **c) for name, call in same.items()},
        **{name: lambda n=name, c=config, h=how: steps.of_other(c, n, **h) for name, (config, how) in other.items()},
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
    last: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_embedded_shards(Path(folder) / "data")
        for device in devices:
            run = Path(folder) / device
            result = train(replace(config, training={"device": device}), Path(folder) / "data", run)
            losses = [line["train_loss_nats"] for line in RunFolder(run).read_metrics() if "train_loss_nats" in line]
            results[device] = {"last_losses_nats": losses[-5:], "val_bpb": result.val_bpb}
            results[device] |= {"val_bpb_average": result.val_bpb_average}
            last[device] = statistics.mean(losses[-5:])
    if len(last) == 2:
        results |= compared(*last.values())
    return results


def compared(expected_nats: float, got_nats: float) -> dict[str, object]:
    """Return how far apart two losses are, and whether within the rounding of a bfloat16 number (8 bits)."""
    difference = abs(got_nats / expected_nats - 1)
    return {"relative_difference": difference, "target": f"{'met' if difference <= 2**-8 else 'missed'}: at most 2^-8"}


def main(words: Sequence[str] | None = None) -> None:
    """Run every section that fits into the time given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections, by the names that are printed")
    parser.add_argument("--attention", default="auto", help="kernel of every section but the comparison of kernels")
    parser.add_argument("--rehearse", action="store_true", help="walk through all of it on a CPU, at a tiny size")
    options = parser.parse_args(words)
    begin = time.perf_counter()
    device = torch.device("cpu" if options.rehearse else "cuda")
    ours, reference = (
        replace(config, training={"attention": options.attention})
        for config in (rehearsal() if options.rehearse else full_size())
    )
    report: dict[str, object] = {
        "device": "cpu, rehearsal" if options.rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "bytes_a_step": ours.data.batch_bytes,
        "flop_per_byte": flop_per_byte(ours),
    }
    steps = Steps(device, compile=not options.rehearse, steps=2 if options.rehearse else 20)
    sections: dict[str, Callable[[], object]] = {
        "attention": lambda: check_attention(device, *((2, 256) if options.rehearse else ()))
    }
    agreement = (3, ("cpu",)) if options.rehearse else ()
    for name, run in speeds(steps, ours, reference).items():
        if name == "reference's settings":  # from here on every section compiles anew
            sections["kernels"] = steps.kernels
            sections["agreement"] = lambda: check_agreement(*agreement)
        sections[f"speed: {name}"] = lambda r=run: dataclasses.asdict(r())
    if unknown := set(options.only or ()) - set(sections):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    for section, run in sections.items():
        if options.only and section not in options.only:
            continue
        if time.perf_counter() - begin > 60 * options.minutes:
            report[section] = "not reached in the time given"
            continue
        try:
            report[section] = run()
        except Exception as problem:  # the other sections still count
            report[section] = f"failed: {type(problem).__name__}: {str(problem)[:500]}"
        if section == "speed: ours" and isinstance(report[section], dict):
            report["targets"] = against_targets(report[section])
        report["matmul_peak_tflop_per_s"] = steps.peak and steps.peak / 1e12
        synchronize(device)
        print(f"{time.perf_counter() - begin:6.0f} s  {section}: {report[section]}", flush=True)
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
