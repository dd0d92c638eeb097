"""The run folder: what was asked (`config.json`), where it ran (`manifest.json`), what happened (`metrics.jsonl`).

Torch-free, so that reports and the command line read runs at once.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

from bytejepa.config import RunConfig
from bytejepa.config_json import fingerprint, from_dict, to_dict
from bytejepa.errors import CheckpointError, ConfigError, file_errors_as
from bytejepa.files import unfinished, write_atomically

METRICS: dict[str, str] = {
    "step": "optimiser steps done",
    "num_bytes": "ids read over all ranks",
    "elapsed_s": "seconds of training when the step began, pauses left out",
    "progress": "share of the run that was over then, 0 to 1",
    "train_loss_nats": "mean next-id loss of the step's batch, nats an id",
    "train_bpb": "the same in bits an id, a BOS counted as a byte",
    "gradient_norm": "global gradient norm before clipping",
    "learning_rate_scale": "factor on every learning rate",
    "muon_momentum": "Muon's momentum",
    "jepa_lambda": "weight of the latent losses",
    "jepa_prediction_loss": "mean squared error of the predicted latents",
    "jepa_sigreg": "distance of the latents' distribution from a standard normal",
    "jepa_explained_variance": "share of the latents' variance that the predictor explains, at most 1",
    "jepa_effective_rank": "exp of the spectral entropy of the latents' covariance, 1 to latent_dim",
    "jepa_latent_std": "root mean variance of the latents' dimensions: 1 for a standard normal, 0 collapsed",
    "sequence_bytes": "context of the step's sequences, ids",
    "val_bpb": "bits per byte of the live weights on the validation split, non-overlapping windows",
    "val_bpb_average": "the same of the averaged weights (EMA or SWA)",
}
"""Every key of metrics.jsonl, with unit and meaning."""


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.json"
        self.manifest_path = path / "manifest.json"
        self.metrics_path = path / "metrics.jsonl"
        self.clock_path = path / "clock.log"
        self.checkpoints_path = path / "checkpoints"
        self.lock_path = path / ".lock"

    @property
    def resume_command(self) -> str:
        """The command that goes on with it, as a shell takes it."""
        return shlex.join(["bytejepa", "train", "--resume", str(self.path)])

    def create(self, config: RunConfig, manifest: dict[str, Any], *, force: bool = False) -> None:
        """Write the resolved configuration and the manifest into a new folder.

        Raises: CheckpointError if the folder already holds a run and `force` is not given, or anything but a run, or if
        they cannot be written; a folder that held nothing then holds nothing.
        """
        with file_errors_as(CheckpointError, "create run folder", self.path):
            left = [entry.name for entry in self.path.iterdir() if entry.name != ".lock"] if self.path.is_dir() else []
            # made before any other file, so that a run which was killed at once is known by it
            if left and not self.checkpoints_path.is_dir():
                raise CheckpointError(
                    f"{self.path} is not empty and holds no run: {min(left)}", hint="name an empty or a new folder"
                )
            if left and not force:
                raise CheckpointError(
                    f"{self.path} holds a run already",
                    hint=f"continue it with `{self.resume_command}`, or start over with --force",
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints_path.mkdir(exist_ok=True)
            for old in (self.metrics_path, self.clock_path, *self.checkpoints_path.glob("step_*")):
                old.unlink(missing_ok=True)
            self.remove_unfinished_files()
            try:
                write_atomically(self.config_path, json.dumps(to_dict(config), indent=1).encode())
                write_atomically(self.manifest_path, json.dumps(manifest, indent=1).encode())
            except BaseException:
                if not left:
                    self._remove_beginning()
                raise

    def _remove_beginning(self) -> None:
        """Delete what `create` made in an empty folder, and the lock, which nobody else can hold by now."""
        with contextlib.suppress(OSError):
            self.config_path.unlink(missing_ok=True)
            self.checkpoints_path.rmdir()
            self.lock_path.unlink(missing_ok=True)

    def remove_unfinished_files(self) -> None:
        """Delete what a kill during a write left: temporary files, and a checkpoint's tensors without their JSON.

        Only for the process that holds the run's lock. Raises: CheckpointError if the system does not let it.
        """
        written = (self.config_path, self.manifest_path, self.metrics_path, self.clock_path)
        with file_errors_as(CheckpointError, "clear", self.path):
            for temporary in (
                *(old for path in written for old in unfinished(path)),
                *self.checkpoints_path.glob(".step_*.tmp"),
            ):
                temporary.unlink()
            for tensors in self.checkpoints_path.glob("step_*.safetensors"):
                if not tensors.with_suffix(".json").exists():
                    tensors.unlink()

    def read_config(self) -> RunConfig:
        """Return the run's resolved configuration. Raises: CheckpointError if there is none or it is damaged."""
        if not self.config_path.is_file():
            raise CheckpointError(f"{self.path} is not a run folder: it has no config.json")
        with file_errors_as(CheckpointError, "read", self.config_path):
            text = self.config_path.read_bytes()
        try:
            values = json.loads(text)
            if isinstance(values, dict) and "model" not in values:  # all the rest may take defaults that came later
                raise ConfigError("it has no section 'model'")
            return from_dict(values, where=str(self.config_path))
        except (ValueError, ConfigError) as problem:
            raise CheckpointError(f"{self.config_path}: damaged: {problem}") from None

    def add_resumption(self, machine: dict[str, Any]) -> None:
        """Note in the manifest, under `resumed`, after which step and on which machine the run went on."""
        manifest = self.read_manifest()
        manifest["resumed"] = [*manifest.get("resumed", []), machine]
        with file_errors_as(CheckpointError, "write", self.manifest_path):
            write_atomically(self.manifest_path, json.dumps(manifest, indent=1).encode())

    def data_path(self, moved_to: Path | None = None) -> Path:
        """Return the folder of the shards that the run began with, or `moved_to`, where they are now.

        Raises: CheckpointError if the manifest does not say it or is damaged.
        """
        if moved_to is not None:
            return moved_to
        path = self.read_manifest().get("data", {}).get("path")
        if not isinstance(path, str):
            raise CheckpointError(
                f"{self.manifest_path} does not say where the shards are: expected data.path, got {path!r}",
                hint="say it with --data",
            )
        return Path(path)

    def read_manifest(self) -> dict[str, Any]:
        """Return the run's manifest, empty if there is none. Raises: CheckpointError if it is damaged."""
        if not self.manifest_path.is_file():
            return {}
        with file_errors_as(CheckpointError, "read", self.manifest_path):
            text = self.manifest_path.read_bytes()
        try:
            manifest = json.loads(text)
        except ValueError as problem:
            raise CheckpointError(f"{self.manifest_path}: damaged: {problem}") from None
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{self.manifest_path}: damaged: expected an object, got {manifest!r:.40}")
        for name, kind in (("data", dict), ("resumed", list), ("started_from", dict)):
            if not isinstance(manifest.get(name, kind()), kind):
                raise CheckpointError(
                    f"{self.manifest_path}: damaged: expected {name} to be of type {kind.__name__}, got {manifest[name]!r:.40}"
                )
        return manifest

    def read_metrics(self) -> list[dict[str, float]]:
        """Return the lines of metrics.jsonl; a last line cut off by a kill is left out.

        Raises: CheckpointError naming the first line that is no object with a step.
        """
        if not self.metrics_path.is_file():
            return []
        with file_errors_as(CheckpointError, "read", self.metrics_path):
            lines = self.metrics_path.read_bytes().split(b"\n")[:-1]
        return [self._parse_metrics(number, line) for number, line in enumerate(lines, start=1)]

    def _parse_metrics(self, number: int, line: bytes) -> dict[str, float]:
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            raise CheckpointError(
                f"{self.metrics_path}: damaged: expected in line {number} an object with a step, got {line[:40]!r}",
                hint="mend or delete that line",
            )
        return values

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after `step`: the steps that a resumed run takes again."""
        kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
        if self.metrics_path.exists():
            with file_errors_as(CheckpointError, "write", self.metrics_path):
                write_atomically(self.metrics_path, "".join(kept).encode())

    def append_metrics(self, values: dict[str, float]) -> None:
        """Append one line; every key is declared in METRICS."""
        unknown = set(values) - set(METRICS)
        assert not unknown, f"undeclared metrics {unknown}"
        with file_errors_as(CheckpointError, "write", self.metrics_path), self.metrics_path.open("a") as file:
            file.write(json.dumps(values) + "\n")


DECIDING_PACKAGES = ("bytejepa", "torch", "numpy", "numba", "llvmlite", "zstandard", "brotli")
"""What computes a run's figures: training, attention on a CPU, compression. Where numba is not there, PyTorch's attention is."""


def describe_machine() -> dict[str, Any]:
    """Return versions, hardware and the git commit: what a figure needs beside it to be worth anything."""
    import psutil

    versions = {}
    for name in DECIDING_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "processor": processor_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "git_commit": _git_commit(),
    }


def processor_name() -> str:
    """Return what the CPU calls itself."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    source = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def run_manifest(config: RunConfig, data: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Return the content of manifest.json: the fingerprint of the configuration, the data and the machine."""
    return {"fingerprint": fingerprint(config), "data": data, **machine}
