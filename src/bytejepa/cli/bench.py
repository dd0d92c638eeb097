"""`bytejepa bench`: how fast, against the plain way and against what the machine could do."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from bytejepa.cli.options import NumThreads
from bytejepa.cli.output import check_output
from bytejepa.cli.parsing import ConfigField, ConfiguredByField, PresetField
from bytejepa.config_fields import PositiveInt, Range
from bytejepa.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed: `bytejepa bench [PRESET] --what train|eval|generate|codec|prepare|load [--against plain] [--scaling]`."""

    DEFAULT_PRESET: ClassVar[str] = "tiny"

    config: ConfigField
    preset: PresetField = "tiny"
    configured_by: ConfiguredByField = ()
    what: Literal["train", "eval", "generate", "codec", "prepare", "load"] = "train"
    """What to measure."""
    against: Literal["plain"] | None = None
    """Run the plain eager writing of the same model and optimiser beside it, step by step in turn (train)."""
    parts: bool = False
    """Time data, forward, backward, optimiser, average, JEPA losses and attention apart (train)."""
    scaling: bool = False
    """Repeat over context, batch, width and ranks, and plot cost against work (train)."""
    steps: PositiveInt = 10
    """Timed steps (train, load), tenths of a second a figure (generate)."""
    num_bytes: Annotated[int, Range(2)] = 65_536
    """Bytes scored (eval), bytes of a block (codec, at most)."""
    lanes: Annotated[tuple[int, ...], Range(1)] = (1, 8)
    """Texts that advance together (generate), blocks a thread decodes together (codec)."""
    contexts: Annotated[tuple[int, ...], Range(1)] = (64, 256)
    """Ids before the timed byte (generate), windows (codec)."""
    threads: NumThreads | None = None
    """Threads (codec); default: one a processor."""
    megabytes: PositiveInt = 100
    """Size of the input in MB (prepare)."""
    workers: PositiveInt = 1
    """Worker processes (prepare)."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Plot of --scaling, .png, .svg or .pdf; default: scaling.png."""
    force: bool = False
    """Replace an existing plot."""
    json: bool = False
    """Print the result as one JSON object."""

    def run_command(self) -> int:
        """Measure and print; then draw, so that a plot that cannot be written costs no figure."""
        from bytejepa.cli.terminal import print_json

        self._refuse_what_does_not_belong()
        plot = self.output or Path("scaling.png")
        if self.scaling:
            _require_new_plot(plot, force=self.force)
        report = self._measure()
        if self.json:
            print_json(report)
        else:
            _print(report)
        sys.stdout.flush()
        if self.scaling:
            from bytejepa.benchmark.scaling import plot_scaling

            plot_scaling(report, plot)
        return 0

    def _refuse_what_does_not_belong(self) -> None:
        """Refuse options that this measurement would ignore."""
        for field in dataclasses.fields(self):
            belongs_to = _MEASUREMENTS_OF.get(field.name, (self.what,))
            if self.what not in belongs_to and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"--{field.name.replace('_', '-')} belongs to --what {' or '.join(belongs_to)}, got --what {self.what}",
                    hint="leave it out",
                )
        if self.what == "prepare" and self.configured_by:
            raise ConfigError(
                f"--what prepare measures no model, got {' '.join(self.configured_by)}",
                hint="leave out preset and settings",
            )
        if self.scaling and (self.against is not None or self.parts):
            raise ConfigError(
                "--scaling times whole steps of the fast path only",
                hint="leave out --against and --parts, or --scaling",
            )
        if not self.scaling and (self.output is not None or self.force):
            raise ConfigError("--output and --force are about the plot of --scaling", hint="leave them out")

    def _measure(self) -> Any:
        from bytejepa.benchmark import bench
        from bytejepa.training.distributed import join

        device = join(self.config.training.device).device
        compiled = self.config.training.compiles_on(device.type)
        if self.what == "prepare":
            return bench.bench_prepare(num_megabytes=self.megabytes, workers=self.workers)
        if self.what == "load":
            return bench.bench_load(self.config, device, steps=self.steps)
        if self.what == "eval":
            return bench.bench_eval(self.config, device, num_bytes=self.num_bytes, compile=compiled)
        if self.what == "generate":
            return self._generate(device)
        if self.what == "codec":
            return self._codec()
        if self.scaling:
            from bytejepa.benchmark.scaling import bench_scaling

            return bench_scaling(self.config, device, steps=self.steps, compile=compiled)
        return bench.bench_train(
            self.config,
            device,
            against_plain=self.against == "plain",
            parts=self.parts,
            compile=compiled,
            steps=self.steps,
        )

    def _generate(self, device: torch.device) -> dict[str, Any]:
        from bytejepa.benchmark.generation import bench_generate

        return bench_generate(
            self.config, device, lanes=self.lanes, contexts=self.contexts, runs=3, at_least_s=self.steps / 10
        )

    def _codec(self) -> dict[str, Any]:
        from bytejepa.benchmark.codec import bench_codec
        from bytejepa.codec.compress import default_hop

        # a window and three hops: near enough to a long block, in which every hop's rest is computed again
        longest = max(self.contexts)
        num_bytes = min(self.num_bytes, longest + 3 * default_hop(longest))
        return bench_codec(
            self.config, num_bytes=num_bytes, lanes=self.lanes, windows=self.contexts, threads=self.threads
        )


_MEASUREMENTS_OF = {
    "against": ("train",),
    "parts": ("train",),
    "scaling": ("train",),
    "output": ("train",),
    "force": ("train",),
    "steps": ("train", "load", "generate"),
    "num_bytes": ("eval", "codec"),
    "lanes": ("generate", "codec"),
    "contexts": ("generate", "codec"),
    "threads": ("codec",),
    "megabytes": ("prepare",),
    "workers": ("prepare",),
}
"""Options that not every measurement reads, and those that do."""


def _require_new_plot(path: Path, *, force: bool) -> None:
    """Refuse a plot that could not be written once all is measured. Raises: ConfigError."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{path}: expected a name that ends in .png, .svg or .pdf")
    check_output(path, ConfigError, force=force)


def _print(report: Any) -> None:
    from bytejepa.cli.terminal import print_table

    if isinstance(report, list):
        rows = [
            [row["axis"], f"{row['value']:g}", f"{row['gflop_per_step']:.2f}", *_speed_cells(row)] for row in report
        ]
        print_table("scaling", ["axis", "value", "GFLOP a step", *_SPEED_COLUMNS], rows)
        return
    rows = [
        [key, f"{value:.4g}" if isinstance(value, float) else str(value)]
        for key, value in report.items()
        if not isinstance(value, list | dict)
    ]
    print_table("", ["", ""], rows)
    if "speeds" in report:
        print_table("training", ["", *_SPEED_COLUMNS], [[s["name"], *_speed_cells(s)] for s in report["speeds"]])
        parts = report["speeds"][0]["parts_ms"]
        if parts:
            print_table("parts, each waited for", ["part", "ms"], [[name, f"{ms:.2f}"] for name, ms in parts.items()])
    if "ways" in report:
        rows = [
            [name, f"{way['elapsed_s']:.2f}", f"{way['bytes_per_s']:,.0f}", f"{way['bpb']:.6f}", _gigabytes(way)]
            for name, way in report["ways"].items()
        ]
        print_table("scoring", ["windows", "seconds", "bytes/s", "bpb", "peak memory"], rows)
    if "codec" in report:
        rows = [[r["what"], f"{r['window']}", f"{r['lanes']}", f"{r['bytes_per_s']:,.0f}"] for r in report["codec"]]
        print_table("codec", ["", "window", "lanes of all threads", "bytes/s"], rows)
    if "generate" in report:
        columns = ("engine_bytes_per_s", "naive_bytes_per_s", "engine_bytes_per_cpu_s", "naive_bytes_per_cpu_s")
        rows = [
            [f"{r['lanes']}", f"{r['context']}", *(f"{r[c]:,.0f}" for c in columns), f"{r['speedup']:.1f}x"]
            for r in report["generate"]
        ]
        titles = ["lanes", "context", "engine B/s", "naive B/s", "engine B/CPU-s", "naive B/CPU-s", "speed-up"]
        print_table("generate", titles, rows)


_SPEED_COLUMNS = ["ms a step", "fastest", "kB/s", "TFLOP/s", "utilisation", "peak memory"]


def _speed_cells(speed: dict[str, Any]) -> list[str]:
    return [
        f"{speed['step_ms']:.1f}",
        f"{speed['fastest_ms']:.1f}",
        f"{speed['bytes_per_s'] / 1e3:.1f}",
        f"{speed['tflop_per_s']:.4f}",
        f"{speed['utilization']:.1%}",
        _gigabytes(speed),
    ]


def _gigabytes(measured: dict[str, Any]) -> str:
    return f"{measured['peak_memory_bytes'] / 1e9:.2f} GB"
