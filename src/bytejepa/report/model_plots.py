"""Plots of the model itself: weights and quantisation error, gradient flow, and the size budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bytejepa.report.drawing import DEAD, FAINT, SERIES, Layout, Plot, log_axis, new_figure, style_of
from bytejepa.report.measurements import Flow, RunMeasurements, TensorFigures
from bytejepa.report.tables import Table
from bytejepa.report.wording import once_or_each

KINDS = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down")
"""The matrices of a block, in the order in which they are used."""
JOINT_CODES, HEADER, CODE = "codes of several matrices", "header and checksum", "code"
PARTS = ("attention", "mlp", "embeddings", "jepa", "vectors")
"""Groups of tensors by which an artifact's bytes are counted."""
PART_COLOURS = {part: SERIES[n % len(SERIES)] for n, part in enumerate((*PARTS, HEADER, CODE, JOINT_CODES))}


def layer_of(name: str) -> tuple[int, str] | None:
    """Return (layer, kind) of a block's parameter, such as (3, "mlp.up"); None for any other."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+?)(?:\.weight)?", name)
    return (int(found[1]), found[2]) if found else None


def module_of(name: str) -> str:
    """Return the module that a parameter belongs to: `blocks.3.attention`, `jepa.predictor`, `bigram`."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return ".".join((*parts[:2], parts[2].removesuffix("_scale")))
    return ".".join(parts[:2]) if parts[0] in ("jepa", "multi_token_heads") else parts[0]


def modules(tensors: Sequence[TensorFigures]) -> dict[str, list[TensorFigures]]:
    """Return the parameters of every module, in the network's order: embeddings, blocks by number, the rest."""
    grouped: dict[str, list[TensorFigures]] = {}
    for tensor in tensors:
        grouped.setdefault(module_of(tensor.name), []).append(tensor)
    order = (
        "token_embedding", "bigram", "ngrams", "smear", "blocks", "skip_weights", "skip_gates", "chunk_scale", "jepa",
        "multi_token_heads",
    )  # fmt: skip

    def place(module: str) -> tuple[int, int]:
        first, _, rest = module.partition(".")
        layer = int(rest.partition(".")[0]) if first == "blocks" else 0
        return (order.index(first) if first in order else len(order), layer)

    return dict(sorted(grouped.items(), key=lambda item: place(item[0])))


def flow_of(tensors: Sequence[TensorFigures]) -> Flow:
    """Return a module's flow: dead if all its parameters are, alive if one is alive."""
    flows = {tensor.flow for tensor in tensors}
    return "dead" if flows == {"dead"} else "alive" if "alive" in flows else "no gradient"


def gradient_rms(tensors: Sequence[TensorFigures]) -> float:
    """Return the root mean square of the gradient over all elements of a module."""
    squares = sum(tensor.num_elements * tensor.gradient_rms**2 for tensor in tensors)
    return float(np.sqrt(squares / sum(tensor.num_elements for tensor in tensors)))


def weights_plot(measured: RunMeasurements, *, name: str, about: str) -> Plot:
    """Return size of the weights and error of their storage, layer by layer."""
    stored = [tensor for tensor in measured.tensors if tensor.scheme != "not stored"]
    others = [tensor for tensor in stored if layer_of(tensor.name) is None and "rows" in tensor.scheme]

    def draw(layout: Layout) -> Any:
        figure = new_figure(layout, 6.6 if layout.is_narrow else 3.9)
        panels = figure.subplots(*((2, 1) if layout.is_narrow else (1, 2)))
        for axes, field in zip(panels, ("rms", "relative_error"), strict=True):
            for index, kind in enumerate(KINDS):
                values = {p[0]: getattr(t, field) for t in stored if (p := layer_of(t.name)) and p[1] == kind}
                axes.plot(list(values), list(values.values()), label=kind, markersize=4, **style_of(index))
            axes.set_xlabel("block")
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0].set_ylim(0, None)
        log_axis(panels[1].yaxis)
        panels[0].set_title("RMS of the weights")
        panels[1].set_title("RMS of the quantisation error / RMS of the weights")
        if layout.is_narrow:
            panels[1].set_title("relative quantisation error")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2 if layout.is_narrow else 6
        )
        return figure

    rest = "; ".join(f"{t.name} {t.rms:.3g} and {t.relative_error:.2%} ({t.scheme})" for t in others)
    schemes = sorted({t.scheme for t in stored if layer_of(t.name) and layer_of(t.name)[1] in KINDS})  # type: ignore[index]
    return Plot(
        name=name,
        title="Weights and quantisation error per layer",
        caption=(
            "Left or above: root mean square of the exported weights of each block's matrices. Right or below: root mean "
            "square of what storing changes, as a share of the weights' own (0.01 is 1 %), logarithmic; each matrix kept as "
            f"{' or '.join(schemes)}. "
            + (f"Outside the blocks, RMS and relative error: {rest}. " if rest else "")
            + f"Every tensor stands in the CSV. {about}"
        ),
        table=tensor_table(measured),
        draw=draw,
    )


def tensor_table(measured: RunMeasurements) -> Table:
    """Return every figure of every tensor."""
    columns = (
        "tensor", "num_elements", "rms", "initial_rms", "scheme", "artifact_bytes", "relative_error", "gradient_rms",
        "share_without_gradient", "flow",
    )  # fmt: skip
    return Table.of(
        columns, [tuple(getattr(t, c if c != "tensor" else "name") for c in columns) for t in measured.tensors]
    )


def gradient_plot(measured: RunMeasurements, *, name: str, about: str) -> Plot:
    """Return the gradient that reaches every module; dead ones are marked in red."""
    by_module = modules(measured.tensors)
    flows = {module: flow_of(tensors) for module, tensors in by_module.items()}
    values = {module: gradient_rms(tensors) for module, tensors in by_module.items()}
    dead = [module for module, flow in flows.items() if flow == "dead"]
    partly = [t.name for t in measured.tensors if t.flow == "dead" and module_of(t.name) not in dead]
    least = min((value for value in values.values() if value > 0), default=1e-9) / 3

    def draw(layout: Layout) -> Any:
        figure = new_figure(layout, 0.9 + 0.19 * len(by_module))
        axes = figure.subplots()
        for row, (module, flow) in enumerate(flows.items()):
            if flow == "alive":
                axes.plot([least, values[module]], [row, row], color=SERIES[0], linewidth=0.8, alpha=0.5)
                axes.plot([values[module]], [row], "o", color=SERIES[0], markersize=5)
            else:
                word = "dead: no gradient, never moved" if flow == "dead" else "no gradient on this batch"
                colour = DEAD if flow == "dead" else FAINT
                axes.text(least * 1.15, row, f"✕ {word}", color=colour, va="center", fontweight="bold", fontsize=8.5)
        axes.set_xlim(least, max([*values.values(), 10 * least]) * 1.5)
        axes.set_yticks(range(len(flows)), list(flows), fontsize=8.5)
        for label, flow in zip(axes.get_yticklabels(), flows.values(), strict=True):
            label.set_color(DEAD if flow == "dead" else FAINT)
        axes.tick_params(axis="y", length=0)
        log_axis(axes.xaxis)
        axes.set_ylim(len(flows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("RMS of the gradient per element")
        return figure

    batch = measured.gradient_batch
    verdict = f"Dead: {', '.join(dead)}. " if dead else "No module is dead. "
    if any(tensor.initial_rms is None for tensor in measured.tensors):
        verdict = "What is dead cannot be told: the weights that the run began with are not there any more. "
    if partly:
        verdict += f"Dead parameters in modules that are alive: {', '.join(partly)}. "
    return Plot(
        name=name,
        title="Gradient flow per module",
        caption=(
            "Root mean square of the gradient over the elements of each module, in nats per unit of weight, on a logarithmic "
            f"axis, in the network's order. {verdict}A module is dead (red) if the gradient of every one of its parameters is "
            "exactly zero and its weights are still a multiple of their initial values, as weight decay alone leaves them. One "
            f"backward pass of the run's loss at its last weights, latent losses at weight {batch.jepa_lambda:.3g}, the largest "
            f"they have in the run; {batch.num_sequences} validation sequences of {batch.sequence_bytes:,} ids. {about}"
        ),
        table=Table.of(
            ("module", "num_elements", "gradient_rms", "flow", "dead_parameters"),
            [
                (m, sum(t.num_elements for t in ts), values[m], flows[m], " ".join(t.name for t in ts if t.flow == "dead"))
                for m, ts in by_module.items()
            ],
        ),
        draw=draw,
    )  # fmt: skip


def artifact_parts(measured: RunMeasurements) -> dict[str, int]:
    """Return the bytes of every part of an artifact: those of PARTS, the joint codes if there are any, the header."""
    parts = dict.fromkeys(PARTS, 0)
    for tensor in measured.tensors:
        parts[_part_of(tensor)] += tensor.artifact_bytes
    if measured.joint_bytes:
        parts[JOINT_CODES] = measured.joint_bytes
    parts[HEADER] = measured.weights_bytes - sum(parts.values())
    return parts


def _part_of(tensor: TensorFigures) -> str:
    placed = layer_of(tensor.name)
    if placed and placed[1] in (*KINDS, "attention.gate"):
        return placed[1].partition(".")[0]
    if tensor.name.startswith("jepa."):
        return "jepa"
    return "embeddings" if "embedding" in tensor.name or tensor.name.endswith("projection.weight") else "vectors"


def size_plot(measured: Mapping[str, RunMeasurements]) -> Plot:
    """Return the bytes of weights and code as bars against the budget."""
    limits = {label: m.limit_bytes for label, m in measured.items()}
    shared = next(iter(limits.values())) if len(set(limits.values())) == 1 else None
    segments = {label: {**artifact_parts(m), CODE: m.code_bytes} for label, m in measured.items()}

    def draw(layout: Layout) -> Any:
        figure = new_figure(layout, (2.1 if layout.is_narrow else 1.5) + 0.42 * len(segments))
        axes = figure.subplots()
        labelled: set[str] = set()
        for row, (of_run, limit) in enumerate(zip(segments.values(), limits.values(), strict=True)):
            left = 0.0
            for part, size in of_run.items():
                label = None if part in labelled else part
                axes.barh(row, size / 1e6, left=left, height=0.55, color=PART_COLOURS[part], label=label)
                left += size / 1e6
                labelled.add(part)
            # in a column of its own: beside a bar it may be where the red line is
            figures = (f"{left:.2f} MB", f"{1e6 * left / limit:.1%}")
            text = ("\n" if layout.is_narrow else ", ").join(figures)
            axes.text(1.01, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
            if shared is None:
                axes.vlines(limit / 1e6, row - 0.4, row + 0.4, color=DEAD, linewidth=1.5)
        if shared is not None:
            axes.axvline(shared / 1e6, color=DEAD, linewidth=1.5)
            axes.annotate(
                f"budget {shared / 1e6:g} MB", (shared / 1e6, -0.62), xytext=(-4, 0), textcoords="offset points",
                color=DEAD, ha="right", va="bottom", fontsize=9,
            )  # fmt: skip
        axes.set_yticks(range(len(segments)), list(segments) if len(segments) > 1 else [""])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(segments) - 0.5, -0.9)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("MB")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2 if layout.is_narrow else 7)
        return figure

    totals = "; ".join(
        f"{label}: {m.weights_bytes:,} weights + {m.code_bytes:,} code = {m.total_bytes:,} bytes, {m.total_bytes / m.limit_bytes:.1%}"
        for label, m in measured.items()
    )
    budget = once_or_each({label: f"{limit:,} bytes" for label, limit in limits.items()})
    return Plot(
        name="size_budget",
        title="Size budget",
        caption=(
            f"Bytes counted against the budget (red line) of {budget}, in MB of 1,000,000 bytes. {totals}. Weights: the "
            "artifact's file, compressed, its parts as they lie in it; code: the package's source as an importable zip."
        ),
        table=Table.of(
            ("configuration", "part", "num_bytes", "limit_bytes"),
            [(label, part, size, limits[label]) for label, of_run in segments.items() for part, size in of_run.items()],
        ),
        draw=draw,
    )
