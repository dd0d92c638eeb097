"""Checkpoints: everything that decides how a run goes on, in safetensors plus JSON.

`checkpoints/step_00000040.safetensors` holds the tensors (`model.`, `average.`, `optimizer.`) and the clock's readings,
the `.json` beside it the rest and the sha256 of the tensors. The JSON is written last: a checkpoint exists when its JSON
does. Writing happens in a thread on a copy, so training goes on; an error there surfaces at the next save or at the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bytejepa.errors import CheckpointError, file_errors_as
from bytejepa.files import write_atomically

FORMAT_VERSION = 1

CLOCK_READINGS = "clock.readings_s"
"""Name of the tensor that holds the clock's readings: float64, exact, and small beside the weights."""


class DamagedCheckpoint(CheckpointError):  # noqa: N818 - it names the thing, and is an error by its base
    """A checkpoint whose bytes are not those that were written; the one before it can be used."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where in a run a checkpoint was taken; the data order and every random number follow from it."""

    step: int
    """Optimiser steps done."""
    stage: int
    """Stage of sequence growth."""
    stage_index: int
    """Batches read in that stage."""
    num_bytes: int
    """Ids read over all ranks."""
    num_swa_samples: int
    """Weights taken into the SWA average."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint as read from disk."""

    path: Path
    position: Position
    configuration: dict[str, Any]
    tensors: dict[str, Tensor]
    readings_s: list[float]
    """Seconds of training at the start of each step, that after the last one done included; empty in old checkpoints."""

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one part: model, average or optimizer."""
        prefix = name + "."
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


class CheckpointWriter:
    """Writes checkpoints of one run and keeps the newest few."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        position: Position,
        tensors: dict[str, Tensor],
        configuration: dict[str, Any],
        *,
        readings_s: Sequence[float] = (),
    ) -> None:
        """Start writing a checkpoint; `tensors` and the clock's `readings_s` are copied before this returns.

        Raises: CheckpointError if the write before this one failed.
        """
        self.wait()
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        if readings_s:
            copies[CLOCK_READINGS] = torch.tensor(readings_s, dtype=torch.float64)
        self._pending = self._thread.submit(self._write, position, copies, configuration)

    def wait(self) -> None:
        """Wait for the write under way. Raises: CheckpointError if it failed; older checkpoints are intact."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, then stop the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, position: Position, tensors: dict[str, Tensor], configuration: dict[str, Any]) -> None:
        path = self.folder / f"step_{position.step:08d}.safetensors"
        with file_errors_as(CheckpointError, "write checkpoint", path):
            self.folder.mkdir(parents=True, exist_ok=True)
            data = safetensors.torch.save(tensors)
            write_atomically(path, data)
            described = {
                "format_version": FORMAT_VERSION,
                "position": dataclasses.asdict(position),
                "configuration": configuration,
                "tensors_sha256": hashlib.sha256(data).hexdigest(),
            }
            write_atomically(path.with_suffix(".json"), json.dumps(described, indent=1).encode())
            for old in steps_on_disk(self.folder)[self.keep :]:
                remove(self.folder, old)


def steps_on_disk(folder: Path) -> list[int]:
    """Return the steps of which `folder` has a checkpoint, newest first."""
    names = (re.fullmatch(r"step_(\d+)\.json", entry.name) for entry in folder.glob("step_*.json"))
    return sorted((int(name.group(1)) for name in names if name), reverse=True)


def remove(folder: Path, step: int) -> None:
    """Delete a checkpoint; the JSON first, so that half a deletion leaves no half checkpoint."""
    for suffix in (".json", ".safetensors"):
        (folder / f"step_{step:08d}{suffix}").unlink(missing_ok=True)


def set_aside(folder: Path, step: int) -> str:
    """Rename a checkpoint to a new name that nothing reads or removes, and return that name without its suffix.

    Raises: CheckpointError if the system does not let it.
    """
    name = f"step_{step:08d}"
    for number in itertools.count(1):
        kept = f"damaged_{name}" if number == 1 else f"damaged_{name}_{number}"
        if not any(folder.glob(f"{kept}.*")):
            break
    for suffix in (".json", ".safetensors"):
        path = folder / f"{name}{suffix}"
        with file_errors_as(CheckpointError, "set aside", path):
            if path.exists():
                path.rename(folder / f"{kept}{suffix}")
    return kept


def read(folder: Path, step: int) -> Checkpoint:
    """Return the checkpoint of `step`, every byte of it checked.

    Raises: DamagedCheckpoint naming what is wrong with it; CheckpointError if the system cannot read it just now.
    """
    path = folder / f"step_{step:08d}.safetensors"
    described = path.with_suffix(".json")
    with file_errors_as(CheckpointError, "read checkpoint", path):
        try:
            description, data = described.read_bytes(), path.read_bytes()
        except FileNotFoundError as problem:
            raise DamagedCheckpoint(f"{problem.filename}: this half of a checkpoint is missing") from None
    position, configuration, expected = _parse_description(description, described)
    if position.step != step:
        raise DamagedCheckpoint(f"{described}: damaged: expected position.step {step}, got {position.step}")
    if hashlib.sha256(data).hexdigest() != expected:
        raise DamagedCheckpoint(f"{path}: damaged: its sha256 is not the one in {described.name}")
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as problem:
        raise DamagedCheckpoint(f"{path}: damaged: {problem}") from None
    readings = tensors.pop(CLOCK_READINGS, None)
    return Checkpoint(
        path=path,
        position=position,
        configuration=configuration,
        tensors=tensors,
        readings_s=[] if readings is None else readings.tolist(),
    )


def _parse_description(description: bytes, path: Path) -> tuple[Position, dict[str, Any], str]:
    """Return (position, configuration, sha256 of the tensors) out of a checkpoint's JSON."""
    try:
        described = json.loads(description)
        fields = {"position": dict, "configuration": dict, "tensors_sha256": str}
        if not isinstance(described, dict):
            raise TypeError(f"expected an object, got {type(described).__name__}")
        for name, kind in fields.items():
            if not isinstance(described.get(name), kind):
                raise TypeError(f"expected {name} to be of type {kind.__name__}, got {described.get(name)!r}")
        position = Position(**described["position"])
        for name, value in dataclasses.asdict(position).items():
            if type(value) is not int or value < 0:
                raise TypeError(f"expected position.{name} to be a whole number, got {value!r}")
    except (ValueError, TypeError) as problem:
        raise DamagedCheckpoint(f"{path}: damaged: {problem}") from None
    return position, described["configuration"], described["tensors_sha256"]


def read_newest(folder: Path, *, on_damaged: list[tuple[int, str]] | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None if there is none at all.

    The steps of newer ones, with what is wrong with them, are appended to `on_damaged`.
    Raises: CheckpointError if all are damaged, or if the system cannot read one.
    """
    problems: list[tuple[int, str]] = [] if on_damaged is None else on_damaged
    for step in steps_on_disk(folder):
        try:
            return read(folder, step)
        except DamagedCheckpoint as problem:
            problems.append((step, problem.message))
    if problems:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {problems[0][1]}", hint="start the run again")
    return None


def as_parts(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of several parts in one dictionary, names prefixed with the part's."""
    return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
