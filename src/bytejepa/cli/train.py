"""`bytejepa train`: a new run, or `--resume` to go on with one. Under torchrun the command is the same."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from bytejepa.cli.parsing import ConfigField, ConfiguredByField, PresetField
from bytejepa.errors import ConfigError
from bytejepa.presets import PRESETS

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from bytejepa.training.loop import TrainProgress, TrainResult

AS_CONFIGURED: Literal["configured"] = "configured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model: `bytejepa train PRESET --data DIR --out RUN`; begin with an earlier one, an artifact or a run, on other
    text or for longer: `bytejepa train MODEL --data DIR --out RUN`; go on with a run that was stopped: `bytejepa train
    --resume RUN`."""

    TAKES_MODELS: ClassVar[bool] = True

    config: ConfigField
    preset: PresetField = "default"
    configured_by: ConfiguredByField = ()
    data: Path | None = None
    """Folder of byte260 shards (bytejepa prepare); with --resume only if it moved."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the run."""
    resume: Path | None = None
    """Run to go on with; its own configuration holds, settings given here are refused."""
    max_wallclock: float | Literal["configured"] | None = AS_CONFIGURED
    """Seconds of training, short for --schedule.max-wallclock-s; None: no bound."""
    force: bool = False
    """Start over in a folder that holds a run."""
    json: bool = False
    """Print the result as one JSON object."""

    def run_command(self) -> int:
        """Train and print how the run ended."""
        result = self._resume() if self.resume is not None else self._train()
        _print_result(result, as_json=self.json)
        return 0

    def _train(self) -> TrainResult:
        from bytejepa.config import replace
        from bytejepa.training.runs import train

        if self.data is None or self.out is None:
            raise ConfigError("train needs --data DIR and --out RUN", hint="or --resume RUN to go on with a run")
        config = self.config
        if self.max_wallclock != AS_CONFIGURED:
            config = replace(config, schedule={"max_wallclock_s": self.max_wallclock})
        start = None
        if self.preset not in PRESETS:
            from bytejepa.artifact.load import starting_point

            start = starting_point(Path(self.preset))
        with training_bar() as on_progress:
            return train(config, self.data, self.out, start=start, force=self.force, on_progress=on_progress)

    def _resume(self) -> TrainResult:
        from bytejepa.cli.terminal import note
        from bytejepa.training.runs import resume

        if self.configured_by or self.out is not None or self.force or self.max_wallclock != AS_CONFIGURED:
            raise ConfigError(
                "--resume goes on with the run's own settings",
                hint="leave out every other option but --data and --json",
            )
        assert self.resume is not None
        with training_bar() as on_progress:
            return resume(self.resume, data=self.data, on_progress=on_progress, on_note=note)


@contextlib.contextmanager
def training_bar() -> Iterator[Callable[[TrainProgress], None]]:
    """Yield an observer that draws a bar over a run."""
    from bytejepa.cli.terminal import progress_bar

    with progress_bar("train", total=1.0) as (bar, task):
        yield train_observer(bar, task)


def train_observer(bar: Progress, task: TaskID) -> Callable[[TrainProgress], None]:
    """Return an observer that shows smoothed bits per byte, bytes a second and time left on `task` of `bar`."""
    smooth_bpb: float | None = None

    def show(at: TrainProgress) -> None:
        nonlocal smooth_bpb
        smooth_bpb = at.train_bpb if smooth_bpb is None else 0.9 * smooth_bpb + 0.1 * at.train_bpb
        validated = f" val {at.val_bpb:.4f}" if at.val_bpb is not None else ""
        read_before = at.num_bytes * (at.step - 1) // at.step  # elapsed_s is of when the step began
        bar.update(
            task,
            completed=at.progress,
            status=f"step {at.step} {smooth_bpb:.4f} bpb{validated}",
            bytes_per_s=read_before / at.elapsed_s if at.elapsed_s else None,
        )

    return show


def _print_result(result: TrainResult, *, as_json: bool) -> None:
    from bytejepa.bits import format_bytes
    from bytejepa.cli.terminal import print_json, print_table
    from bytejepa.training.distributed import leave

    leave()
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if as_json:
        print_json(result)
        return
    rate = result.num_bytes / result.elapsed_s if result.elapsed_s else 0.0
    rows = [
        ["steps", str(result.steps)],
        ["text read", format_bytes(result.num_bytes)],
        ["training time", f"{result.elapsed_s:.1f} s"],
        ["rate", f"{format_bytes(rate)}/s"],
    ]
    if result.train_bpb is not None:
        rows.append(["last train loss", f"{result.train_bpb:.4f} bpb"])
    if result.val_bpb is not None:
        rows.append(["validation, live weights", f"{result.val_bpb:.4f} bpb"])
    if result.val_bpb_average is not None:
        rows.append(["validation, averaged weights", f"{result.val_bpb_average:.4f} bpb"])
    state = "" if result.is_new else " (was finished already)"
    print_table(f"run {result.run}{state}", ["", ""], rows)
