"""Plots of where the bits go: by position in the window, by byte class, by document length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bytejepa.report.byte_classes import CLASSES
from bytejepa.report.drawing import Layout, Plot, log_axis, new_figure, plain_numbers, style_of
from bytejepa.report.learning_plots import legend_below
from bytejepa.report.losses import Bin, ClassCost, by_class, by_document, by_document_length, by_position
from bytejepa.report.measurements import PricedText, RunMeasurements
from bytejepa.report.tables import Table
from bytejepa.report.wording import once_or_each

Measured = Mapping[str, Sequence[RunMeasurements]]
"""Measurements of one or more runs of every configuration that was measured, by its label."""
FEW_DOCUMENTS = 300
"""Up to here each document is a dot."""
INTERVAL_FROM = 3
"""Documents in a bin from which its mean and interval are drawn."""


def loss_plots(measured: Measured) -> list[Plot]:
    """Return the plots of where the artifacts' bits go, for every configuration that was measured."""
    if not measured:
        return []
    texts = {label: mean_price([run.priced for run in runs]) for label, runs in measured.items()}
    how = _how_priced(measured)
    plots = (_position_plot(texts, how), _class_plot(texts, how), _document_plot(texts, how))
    return [plot for plot in plots if plot is not None]


def missing_losses(measured: Measured) -> str:
    """Return a sentence on what `loss_plots` had to leave out; empty if nothing."""
    texts = {label: runs[0].priced for label, runs in measured.items()}
    left_out = []
    if short := {label: text for label, text in texts.items() if not by_position(text)}:
        counts = _words(short, lambda text: f"{len(text.bits):,} targets")
        left_out.append(f"No loss by position{_of(short, texts)}: {counts} are less than a window.")
    if cut := {label: text for label, text in texts.items() if not by_document(text)}:
        counts = _words(cut, lambda text: f"{len(text.bits):,} targets")
        left_out.append(f"No loss by document length{_of(cut, texts)}: among the {counts} scored is no whole document.")
    return " ".join([*left_out, "--score-bytes scores more."]) if left_out else ""


def _words(texts: Mapping[str, PricedText], words: Callable[[PricedText], str]) -> str:
    return once_or_each({label: words(text) for label, text in texts.items()})


def _of(some: Mapping[str, PricedText], every: Mapping[str, PricedText]) -> str:
    return f" of {', '.join(some)}" if len(some) < len(every) else ""


def mean_price(texts: Sequence[PricedText]) -> PricedText:
    """Return one text in which every target costs the mean of what it costs in `texts`, all of the same ids."""
    return dataclasses.replace(texts[0], bits=np.mean([text.bits for text in texts], axis=0))


def _how_priced(measured: Measured) -> str:
    """Return how the bits were computed, in a sentence."""
    counts = sorted({len(runs) for runs in measured.values()})
    seeds = "1 run" if counts == [1] else f"the mean of {' or '.join(map(str, counts))} seeds"
    each = " of each configuration" if len(measured) > 1 else ""
    on = _words({label: runs[0].priced for label, runs in measured.items()}, _text_priced)
    ids = [runs[0].priced.ids for runs in measured.values()]
    shortest = min(map(len, ids))
    of_one_text = all(np.array_equal(some[:shortest], ids[0][:shortest]) for some in ids)
    others = "" if of_one_text else " The configurations were not priced on the same text."
    return f"Artifacts, {seeds}{each}, on {on}.{others}"


def _text_priced(text: PricedText) -> str:
    which = "the whole validation split" if text.is_whole_split else "the beginning of the validation split"
    return f"{which}: {len(text.bits):,} targets in non-overlapping windows of {text.window:,} ids"


def _position_plot(texts: Mapping[str, PricedText], how: str) -> Plot | None:
    """Return the plot of the configurations whose text holds a whole window; None if none does."""
    bins = {label: by_position(text) for label, text in texts.items()}
    if not any(bins.values()):
        return None

    def draw(layout: Layout) -> Any:
        figure = new_figure(layout, 3.4 if layout.is_narrow else 3.8)
        axes = figure.subplots()
        for index, (label, of_run) in enumerate(bins.items()):
            if of_run:
                _draw_bins(axes, of_run, offset=1, label=label, style=style_of(index))
        axes.set_xscale("log", base=2)
        plain_numbers(axes.xaxis)
        axes.set_xlabel("ids of context, the target's position in the window")
        axes.set_ylabel("bits per target")
        legend_below(figure, layout)
        return figure

    windows = once_or_each({label: f"{of_run[0].num_samples:,} windows" for label, of_run in bins.items() if of_run})
    return Plot(
        name="loss_by_position",
        title="Loss by position in the window",
        caption=(
            "Mean bits per target (a byte, or a BOS) against how many ids of its window the model has seen, on a logarithmic "
            f"axis. Bands: 95 % confidence intervals of the mean (Student's t) over {windows}. {how}"
        ),
        table=Table.of(
            ("configuration", "first_position", "last_position", "num_windows", "bits_per_target", "low", "high"),
            [
                (k, b.first, b.end - 1, b.num_samples, b.mean, b.low, b.high)
                for k, of_run in bins.items()
                for b in of_run
            ],
        ),
        draw=draw,
    )


def _draw_bins(axes: Any, bins: Sequence[Bin], *, offset: int, label: str, style: Mapping[str, str]) -> None:
    """Draw means at the geometric middle of their bins; `offset` 1 for positions counted from 0."""
    x = [math.sqrt((b.first + offset) * (b.end - 1 + offset)) for b in bins]
    axes.plot(x, [b.mean for b in bins], label=label, markersize=4, **style)
    axes.fill_between(x, [b.low for b in bins], [b.high for b in bins], color=style["color"], alpha=0.2, linewidth=0)


def _class_plot(texts: Mapping[str, PricedText], how: str) -> Plot:
    costs = {label: {cost.name: cost for cost in by_class(text)} for label, text in texts.items()}
    names = [name for name in CLASSES if any(name in of_run for of_run in costs.values())]
    totals = {label: sum(cost.count for cost in of_run.values()) for label, of_run in costs.items()}
    bits = {label: sum(cost.bits for cost in of_run.values()) for label, of_run in costs.items()}
    shares = {
        name: sum(of_run[name].count for of_run in costs.values() if name in of_run) / sum(totals.values())
        for name in names
    }
    counts = [{cost.name: cost.count for cost in of_run.values()} for of_run in costs.values()]
    together = "" if all(count == counts[0] for count in counts) else " of all configurations together"

    def draw(layout: Layout) -> Any:
        figure = new_figure(layout, 1.2 + 0.34 * len(names) + 0.2 * (len(costs) if layout.is_narrow else 1))
        axes = figure.subplots()
        spread = 0.5 / max(1, len(costs) - 1)
        for index, (label, of_run) in enumerate(costs.items()):
            shift = (index * spread - 0.25) if len(costs) > 1 else 0.0
            found = [(row, of_run[name]) for row, name in enumerate(names) if name in of_run]
            means = [cost.bits / cost.count for _, cost in found]
            y = [row + shift for row, _ in found]
            axes.plot(means, y, label=label, linestyle="none", markersize=6, **style_of(index))
            axes.hlines(y, 0, means, color=style_of(index)["color"], linewidth=1, alpha=0.5)
        axes.set_yticks(range(len(names)), [_class_label(name, shares[name], layout) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, None)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("bits per target")
        legend_below(figure, layout)
        return figure

    costliest = once_or_each({label: _costliest(of_run.values(), bits[label]) for label, of_run in costs.items()})
    return Plot(
        name="loss_by_byte_class",
        title="Loss by byte class",
        caption=(
            f"Mean bits per target of each class of bytes, and in brackets the class's share of all targets{together}. The CSV "
            f"holds each class's share of the bits too. Most bits go to {costliest}. {how}"
        ),
        table=Table.of(
            ("configuration", "byte_class", "count", "share_of_targets", "bits_per_target", "share_of_bits"),
            [
                (label, c.name, c.count, c.count / totals[label], c.bits / c.count, c.bits / bits[label])
                for label, of_run in costs.items() for c in of_run.values()
            ],
        ),
        draw=draw,
    )  # fmt: skip


def _class_label(name: str, share: float, layout: Layout) -> str:
    percent = "<0.1" if share < 0.001 else f"{100 * share:.1f}"
    return f"{name}{chr(10) if layout.is_narrow else ' '}({percent} %)"


def _costliest(costs: Iterable[ClassCost], total_bits: float) -> str:
    most = max(costs, key=lambda cost: cost.bits)
    return f"{most.name}: {most.bits / total_bits:.0%}"


def _document_plot(texts: Mapping[str, PricedText], how: str) -> Plot | None:
    documents = {label: by_document(text) for label, text in texts.items()}
    count = max(len(of_run) for of_run in documents.values())
    if not count:
        return None
    bins = {label: by_document_length(of_run) for label, of_run in documents.items()}
    drawn = {label: [b for b in of_run if b.num_samples >= INTERVAL_FROM] for label, of_run in bins.items()}
    drawn = {label: of_run if len(of_run) > 1 else [] for label, of_run in drawn.items()}

    def draw(layout: Layout) -> Any:
        figure = new_figure(layout, 3.4 if layout.is_narrow else 3.8)
        axes = figure.subplots()
        for index, (label, of_run) in enumerate(documents.items()):
            if not of_run:
                continue
            style = style_of(index)
            if count <= FEW_DOCUMENTS:
                x, y = [d.num_bytes for d in of_run], [d.bpb for d in of_run]
                axes.plot(x, y, linestyle="none", markersize=4, alpha=0.6, label=label, **style)
            _draw_bins(axes, drawn[label], offset=0, label="_" if count <= FEW_DOCUMENTS else label, style=style)
        log_axis(axes.xaxis)
        axes.set_xlabel("length of the document, bytes")
        axes.set_ylabel("bits per byte")
        legend_below(figure, layout)
        return figure

    rows: list[tuple[str | int | float, ...]] = [
        (label, "document", d.num_bytes, d.num_bytes, 1, d.bpb, "", "") for label, of in documents.items() for d in of
    ]
    if count > FEW_DOCUMENTS:
        rows = []
    rows += [
        (label, "bin", b.first, b.end - 1, b.num_samples, b.mean, b.low, b.high)
        for label, of in bins.items()
        for b in of
    ]
    counts = once_or_each({label: f"{len(of):,} documents" for label, of in documents.items() if of})
    dots = f"Each dot is one of {counts}. " if count <= FEW_DOCUMENTS else f"{counts}. "
    lines = (
        "Lines: means over the documents of each octave of length, with 95 % confidence intervals (Student's t). "
        if any(drawn.values())
        else "Too few documents of like length for means. "
    )
    return Plot(
        name="loss_by_document_length",
        title="Loss by document length",
        caption=(
            f"Bits per byte of whole documents against their length in bytes, on a logarithmic axis. {dots}{lines}"
            f"Documents that the priced text cuts off are left out. {how}"
        ),
        table=Table.of(
            ("configuration", "kind", "shortest_bytes", "longest_bytes", "num_documents", "bpb", "low", "high"), rows
        ),
        draw=draw,
    )
