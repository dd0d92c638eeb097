"""Plots of the log: learning curves, the latents, throughput."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bytejepa.report.curves import SMOOTHED_LINES, THROUGHPUT_POINTS, Band, seed_band, throughput
from bytejepa.report.drawing import FAINT, SERIES, Layout, Plot, new_figure, plain_numbers, style_of
from bytejepa.report.inputs import Configuration, LoggedRun
from bytejepa.report.tables import Cell, Table
from bytejepa.report.wording import once_or_each

CURVES = {
    "train_bpb": ("train, batches", FAINT),
    "val_bpb": ("validation, live weights", SERIES[1]),
    "val_bpb_average": ("validation, averaged weights", SERIES[0]),
}


CURVE_COLUMNS = ("configuration", "run", "seed", "step", "text_read_mb", "curve", "value")
LATENTS = {
    "jepa_explained_variance": (
        "explained variance",
        "Explained variance: share of the latents' variance that the predictor explains; 1 is all, 0 is what guessing "
        "their mean would give; below -1 the scale is logarithmic.",
    ),
    "jepa_effective_rank": (
        "effective rank",
        "Effective rank of the latents' covariance: how many dimensions they use; near 1 they have collapsed.",
    ),
    "jepa_latent_std": (
        "standard deviation",
        "Standard deviation: root mean variance of the latents' dimensions; 1 for a standard normal, 0 collapsed.",
    ),
}
"""Logged key: (title of its panel, what it says)."""


def learning_curves(configuration: Configuration, name: str) -> Plot:
    """Return train, validation and averaged validation loss of one configuration over the text read."""
    runs = configuration.runs
    validated = runs[0].config.training.validation_bytes
    text = f"the first {validated:,} ids of" if validated else "all of"
    many = len(runs) > 1
    curves = _curves_of(configuration)
    kinds = (
        "of the weights as they were (orange) and of their running average, which is what is exported (blue)"
        if "val_bpb_average" in curves
        else "of the weights as they were; no average is kept, the last weights are what is exported"
    )
    return Plot(
        name=name,
        title=f"Learning curves of {configuration.label}",
        caption=(
            f"Bits per byte against training text read, in MB; lower is better. {configuration.seeds}"
            + (": lines are means over the seeds, bands reach from the best to the worst seed. " if many else ". ")
            + f"Grey: loss of single training batches, moving average of at most {SMOOTHED_LINES} logged ones"
            + f". {'Orange and blue' if 'val_bpb_average' in curves else 'Orange'}: {text} the validation split in non-overlapping "
            f"windows of {runs[0].config.evaluation.window_bytes:,} ids, {kinds}. The first steps may lie above the frame. As "
            "logged while training."
        ),
        table=_long_table(runs, curves),
        draw=lambda layout: _draw_learning(configuration, layout),
    )


def _curves_of(configuration: Configuration) -> dict[str, tuple[str, str]]:
    """Return the curves to draw: without an average, the log repeats the live weights' loss as the average's."""
    kept = configuration.config.training.keeps_average
    return {key: curve for key, curve in CURVES.items() if kept or key != "val_bpb_average"}


def _long_table(runs: Sequence[LoggedRun], keys: dict[str, Any], label: str | None = None) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        for line in run.metrics:
            rows += [
                (label or "", run.name, run.seed, int(line["step"]), line["num_bytes"] / 1e6, key, line[key])
                for key in keys
                if key in line
            ]
    return Table.of(CURVE_COLUMNS, rows)


def _draw_learning(configuration: Configuration, layout: Layout) -> Any:
    figure = new_figure(layout, 3.9 if layout.is_narrow else 4.4)
    axes = figure.subplots()
    highest = []
    for key, (label, colour) in _curves_of(configuration).items():
        band = seed_band(configuration.runs, key, smooth=key == "train_bpb")
        if not len(band.x):
            continue
        marker = None if key == "train_bpb" else "o" if key == "val_bpb" else "s"
        _draw_band(axes, band, color=colour, marker=marker, label=label)
        highest.append(float(band.high[min(len(band.x) - 1, max(1, len(band.x) // 20))]))
    _frame_loss(axes, highest)
    legend_below(figure, layout)
    return figure


def _draw_band(
    axes: Any, band: Band, *, color: str, label: str, marker: str | None = None, linestyle: str = "-"
) -> None:
    marked = marker if len(band.x) <= 40 else None
    if len(band.x) == 1:  # there is no line to be seen
        marked = marker or "o"
    axes.plot(band.x, band.mean, color=color, label=label, marker=marked, markersize=4, linestyle=linestyle)
    if (band.high > band.low).any():
        axes.fill_between(band.x, band.low, band.high, color=color, alpha=0.22, linewidth=0)
        if len(band.x) == 1:  # a band without width
            axes.vlines(band.x, band.low, band.high, color=color, alpha=0.6)


def _frame_loss(axes: Any, highest: list[float]) -> None:
    """Label the axes and cut off the fall of the first steps, which would flatten everything else."""
    low, high = axes.get_ylim()
    if highest:
        axes.set_ylim(low, min(high, max(highest) + 0.1))
    axes.set_xlabel("training text read, MB")
    axes.set_ylabel("bits per byte")
    plain_numbers(axes.xaxis)


def compared_curves(configurations: Sequence[Configuration]) -> Plot:
    """Return the exported weights' validation loss of every configuration in one plot; of runs that were validated at
    their end only, the training loss."""
    validated = any(len(seed_band(c.runs, "val_bpb_average").x) > 1 for c in configurations)
    key = "val_bpb_average" if validated else "train_bpb"
    rows = [row for c in configurations for row in _long_table(c.runs, {key: None}, c.label).rows]
    weights = once_or_each(
        {
            c.label: "the averaged weights" if c.config.training.keeps_average else "the live weights"
            for c in configurations
        }
    )
    what = (
        f"Bits per byte of {weights} on validation text against training text read, in MB; lower is better. "
        if validated
        else f"Bits per byte of training batches, moving average of at most {SMOOTHED_LINES} logged ones, against training text "
        "read, in MB; lower is better. No run was validated before its end. "
    )

    def draw(layout: Layout) -> Any:
        figure = new_figure(layout, (3.4 if layout.is_narrow else 4.2) + _legend_inches(configurations, layout))
        axes = figure.subplots()
        highest = []
        for index, configuration in enumerate(configurations):
            band = seed_band(configuration.runs, key, smooth=not validated)
            _draw_band(axes, band, label=configuration.label, **style_of(index))
            if len(band.x):
                highest.append(float(band.high[min(len(band.x) - 1, max(1, len(band.x) // 20))]))
        _frame_loss(axes, highest)
        legend_below(figure, layout)
        return figure

    return Plot(
        name="learning_compared",
        title="Learning curves of all configurations",
        caption=(
            what
            + "; ".join(f"{c.label}: {c.seeds}" for c in configurations)
            + ". Lines are means over the seeds, bands reach from the best to the worst. As logged while training"
            + (", non-overlapping windows." if validated else ".")
        ),
        table=Table.of(CURVE_COLUMNS, rows),
        draw=draw,
    )


def _legend_inches(configurations: Sequence[Configuration], layout: Layout) -> float:
    return 0.2 * (len(configurations) if layout.is_narrow else -(-len(configurations) // 3))


def legend_below(figure: Any, layout: Layout) -> None:
    """Put one legend for the whole figure under it, in as many columns as fit."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower left", ncols=1 if layout.is_narrow else min(3, len(labels)))


def latents(configurations: Sequence[Configuration]) -> Plot | None:
    """Return explained variance, effective rank and size of JEPA's latents over training; None if no run has them."""
    logged = {key for c in configurations for line in c.runs[0].metrics for key in LATENTS if key in line}
    keys = {key: label for key, (label, _) in LATENTS.items() if key in logged}
    shown = [c for c in configurations if any(key in line for key in keys for line in c.runs[0].metrics)]
    if not shown:
        return None

    def draw(layout: Layout) -> Any:
        height = 2.4 * len(keys) if layout.is_narrow else 3.2
        figure = new_figure(layout, height + _legend_inches(shown, layout))
        panels = figure.subplots(*((len(keys), 1) if layout.is_narrow else (1, len(keys))), squeeze=False).flat
        for axes, (key, label) in zip(panels, keys.items(), strict=True):
            for index, configuration in enumerate(configurations):
                if configuration in shown:  # so that colours are those of the other plots
                    band = seed_band(configuration.runs, key, smooth=True)
                    _draw_band(axes, band, label=configuration.label, **{**style_of(index), "marker": None})
            axes.set_title(label)
            axes.set_xlabel("training text read, MB")
            axes.xaxis.get_major_locator().set_params(nbins=5)
            plain_numbers(axes.xaxis)
            if key != "jepa_explained_variance":
                axes.set_ylim(0, None)
            elif axes.get_ylim()[0] < -1:  # an untrained predictor's values would flatten all others
                axes.set_yscale("symlog", linthresh=1)
                axes.set_ylim(None, 1)
                plain_numbers(axes.yaxis)
            else:
                axes.set_ylim(-1, 1)
        legend_below(figure, layout)
        return figure

    dimensions = once_or_each({c.label: f"{c.config.jepa.latent_dim} dimensions" for c in shown})
    return Plot(
        name="latents",
        title="JEPA's latents",
        caption=(
            "".join(f"{LATENTS[key][1]} " for key in keys)
            + f"There are {dimensions}. "
            f"On training batches, moving average of at most {SMOOTHED_LINES} logged ones; bands from the least to the largest seed. "
            + "; ".join(f"{c.label}: {c.seeds}" for c in shown) + "."
        ),
        table=Table.of(CURVE_COLUMNS, [r for c in shown for r in _long_table(c.runs, keys, c.label).rows]),
        draw=draw,
    )  # fmt: skip


def throughput_plot(configurations: Sequence[Configuration]) -> Plot | None:
    """Return bytes a second along every run; None if no run has a clock."""
    curves = [(c, run, *throughput(run)) for c in configurations for run in c.runs]
    curves = [curve for curve in curves if len(curve[2])]
    if not curves:
        return None
    rows = [
        (configuration.label, run.name, run.seed, float(second), float(rate))
        for configuration, run, seconds, rates in curves
        for second, rate in zip(seconds, rates, strict=True)
    ]

    def draw(layout: Layout) -> Any:
        figure = new_figure(layout, (3.0 if layout.is_narrow else 3.2) + _legend_inches(configurations, layout))
        axes = figure.subplots()
        seen: set[str] = set()
        for configuration, _, seconds, rates in curves:
            style = style_of(configurations.index(configuration)) | {"marker": None}
            label = None if configuration.label in seen else configuration.label
            axes.plot(seconds, rates / 1e3, linewidth=1.1, label=label, **style)
            seen.add(configuration.label)
        axes.set_ylim(0, None)
        axes.set_xlabel("training time, s")
        axes.set_ylabel("kB per second")
        plain_numbers(axes.yaxis)
        plain_numbers(axes.xaxis)
        legend_below(figure, layout)
        return figure

    machines = sorted({machine for c in configurations for run in c.runs for machine in _machines(run)})
    return Plot(
        name="throughput",
        title="Throughput over time",
        caption=(
            "Training text read per second, in kB (1,000 bytes), against seconds of training; one line a run, "
            f"{len(curves)} in all, a point for each of {THROUGHPUT_POINTS} equal parts of the run's steps, or for every step where "
            "they are fewer. Compilation, validation and checkpoints do not count. From the clock that each run logs at every step. "
            f"Machine: {'; '.join(machines)}."
        ),
        table=Table.of(("configuration", "run", "seed", "elapsed_s", "bytes_per_s"), rows),
        draw=draw,
    )


def _machines(run: LoggedRun) -> Iterator[str]:
    """Yield on what a run began, and on what it went on each time that it was resumed."""
    for machine in (run.manifest, *run.manifest.get("resumed", ())):
        device = str(machine.get("device", "unknown"))
        where = str(machine.get("processor", "unknown processor")) if device == "cpu" else device
        ranks = int(machine.get("world_size", 1))
        yield f"{where}, {ranks} rank{'s' if ranks > 1 else ''}"


def mean_rate(run: LoggedRun) -> float | None:
    """Return the bytes a second of a whole run; None without a clock."""
    seconds = run.step_starts_s[-1] if run.step_starts_s else 0.0
    return (len(run.step_starts_s) - 1) * run.config.data.batch_bytes / seconds if seconds > 0 else None
