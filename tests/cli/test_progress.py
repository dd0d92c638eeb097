"""What a bar says of speed."""

from __future__ import annotations

import io

from rich.console import Console
from rich.progress import Progress

from bytejepa.cli.terminal import _RateColumn
from bytejepa.cli.train import train_observer
from bytejepa.training.loop import TrainProgress


def test_a_steady_run_has_one_rate_from_its_second_step_on() -> None:
    """A step's loss comes with the clock's reading of when the step began."""
    bar = Progress(console=Console(file=io.StringIO()))
    task = bar.add_task("train", total=1.0)
    show = train_observer(bar, task)
    rates = []
    for step in range(1, 6):
        show(
            TrainProgress(
                step=step, progress=step / 5, num_bytes=256 * step, elapsed_s=0.5 * (step - 1), train_bpb=4.0, val_bpb=None
            )
        )  # fmt: skip
        rates.append(bar.tasks[0].fields["bytes_per_s"])
    assert rates == [None, 512, 512, 512, 512]


def test_a_bar_of_runs_has_no_bytes_a_second() -> None:
    times = iter(range(100))
    bar = Progress(_RateColumn(), console=Console(file=io.StringIO()), get_time=lambda: float(next(times)))
    task = bar.add_task("study", total=1.0)
    for share in (0.25, 0.5, 0.75):
        bar.update(task, completed=share)
    assert bar.tasks[0].speed
    assert _RateColumn().render(bar.tasks[0]).plain == ""
    bar.update(task, bytes_per_s=2000.0)
    assert _RateColumn().render(bar.tasks[0]).plain == "2.00 kB/s"
