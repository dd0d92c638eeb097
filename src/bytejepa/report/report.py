"""`report`: from paths to a page with its plots beside it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bytejepa.errors import ConfigError, DataError, file_errors_as
from bytejepa.files import require_writable, write_atomically
from bytejepa.progress import StageProgress, silent
from bytejepa.report.drawing import DrawnPlot, Plot, draw_plots, write_plot_files
from bytejepa.report.inputs import ReportInputs, read_inputs
from bytejepa.report.learning_plots import compared_curves, latents, learning_curves, throughput_plot
from bytejepa.report.loss_plots import loss_plots, missing_losses
from bytejepa.report.measurements import RunMeasurements
from bytejepa.report.model_plots import flow_of, gradient_plot, modules, size_plot, weights_plot
from bytejepa.report.page import Section, render_page
from bytejepa.report.study_plots import forest_plot

Which = Literal["all", "first", "none"]
"""Which runs are measured beyond their log: all, the first of each configuration, or none."""

_PLOT_FILE = re.compile(
    r"(ablation|learning_compared|latents|throughput|size_budget|loss_by_(position|byte_class|document_length)"
    r"|(learning_curves|weights|gradient_flow)(_\d+)?)\.(png|csv)"
)
"""The names of a report's files, by which a folder of them is known."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportResult:
    """A report as it lies on the disk."""

    page: Path
    files: tuple[Path, ...]
    """PNG and CSV of every plot."""
    inputs: ReportInputs
    measured: dict[str, tuple[RunMeasurements, ...]]
    """By the configuration's label; shorter than its runs where only the first was measured."""


def report(
    paths: Sequence[Path],
    out: Path,
    *,
    data: Path | None = None,
    score_bytes: int | None = None,
    which: Which | None = None,
    device: str = "cpu",
    force: bool = False,
    on_progress: StageProgress | None = None,
) -> ReportResult:
    """Write the report of the runs, or of the study, in `paths` as the page `out`, its plots in a folder beside it.

    `data`: the runs' shards if they moved; `score_bytes`: leading ids of the validation split that are priced;
    `which`: what is measured, by default all runs, of a study the first of each variant.
    Raises: ConfigError if `out` exists and `force` is off, or if the folder beside it is no report's; CheckpointError and
    DataError for what cannot be read.
    """
    tell = on_progress or silent
    folder = out.with_name(f"{out.stem}_files")
    _require_replaceable(out, folder, force=force)
    with file_errors_as(DataError, "write", out):
        require_writable(out)
    inputs = read_inputs(paths)
    measured = _measured(inputs, which, data, score_bytes, device, tell)
    plan = _plan(inputs, measured)
    plots = [plot for _, _, shown, folded in plan for plot in (*shown, *(p for _, group in folded for p in group))]
    drawn: dict[str, DrawnPlot] = {}
    for number, one in enumerate(draw_plots(plots)):
        tell("draw", number, len(plots))
        drawn[one.plot.name] = one
    sections = [
        Section(
            name=f"section-{title.lower().replace(' ', '-')}", title=title, text=text, plots=[drawn[plot.name] for plot in shown],
            folded=[(label, [drawn[plot.name] for plot in group]) for label, group in folded],
        )
        for title, text, shown, folded in plan
    ]  # fmt: skip
    command = shlex.join(["bytejepa", "report", *map(str, paths), "-o", str(out)])
    page = render_page(inputs, measured, sections, title=_title(inputs), command=command, files=folder.name)
    _require_replaceable(out, folder, force=force)  # somebody may have written one during the measuring
    with file_errors_as(DataError, "write", out):
        files = _replace_folder(folder, list(drawn.values()))
        write_atomically(out, page.encode(errors="surrogateescape"))
    return ReportResult(page=out, files=tuple(files), inputs=inputs, measured=measured)


def _measured(
    inputs: ReportInputs,
    which: Which | None,
    data: Path | None,
    score_bytes: int | None,
    device: str,
    tell: StageProgress,
) -> dict[str, tuple[RunMeasurements, ...]]:
    which = which or ("all" if inputs.study is None else "first")
    if which == "none":
        return {}
    from bytejepa.report.measure import measure

    chosen = {c.label: c.runs if which == "all" else c.runs[:1] for c in inputs.configurations}
    total, done = sum(map(len, chosen.values())), 0
    measured: dict[str, tuple[RunMeasurements, ...]] = {}
    for label, runs in chosen.items():
        for run in runs:

            def told(what: str, _done: int, _total: int, name: str = run.name, done: int = done) -> None:
                tell(f"{name}: {what}", done, total)

            one = measure(run.path, data=data, score_bytes=score_bytes, device=device, on_progress=told)
            measured[label] = (*measured.get(label, ()), one)
            done += 1
    return measured


Planned = tuple[str, str, list[Plot], list[tuple[str, list[Plot]]]]
"""Title and text of a section, its plots, and what is folded in it: (summary line, plots)."""


def _plan(inputs: ReportInputs, measured: dict[str, tuple[RunMeasurements, ...]]) -> list[Planned]:
    """Return the sections of the page. What concerns one configuration of several is folded, but for the first."""
    configurations = inputs.configurations
    forest = forest_plot(inputs.study) if inputs.study is not None else None
    curves = [learning_curves(c, _numbered("learning_curves", i)) for i, c in enumerate(configurations)]
    many = len(configurations) > 1
    labels = [c.label for c in configurations]
    inside = [_inside(label, i, measured[label], many) for i, label in enumerate(labels) if measured.get(label)]
    sizes = [size_plot({label: of_runs[0] for label, of_runs in measured.items()})] if measured else []
    question = inputs.study.plan.question if inputs.study is not None else ""
    return [
        ("Ablation", question, [forest] if forest else [], []),
        (
            "Learning",
            "",
            [compared_curves(configurations)] if many else curves,
            [(label, [plot]) for label, plot in zip(labels, curves, strict=True)] if many else [],
        ),
        ("Where the bits go", missing_losses(measured), loss_plots(measured), []),
        (
            "Inside the model",
            "",
            inside[0] if inside else [],
            [
                (_with_dead(label, measured[label][0]), plots)
                for label, plots in zip(list(measured)[1:], inside[1:], strict=True)
            ],
        ),
        ("Size", "", sizes, []),
        ("Latents", "", _present(latents(configurations)), []),
        ("Speed", "", _present(throughput_plot(configurations)), []),
    ]


def _present(plot: Plot | None) -> list[Plot]:
    return [plot] if plot else []


def _inside(label: str, index: int, of_runs: tuple[RunMeasurements, ...], many: bool) -> list[Plot]:
    first = of_runs[0]
    about = f"Of {label}, its first run." if many or len(of_runs) > 1 else "Of the one run."
    return [
        weights_plot(first, name=_numbered("weights", index), about=about),
        gradient_plot(first, name=_numbered("gradient_flow", index), about=about),
    ]


def _with_dead(label: str, measured: RunMeasurements) -> str:
    """Return the label of what is folded, with the dead modules that are to be found there."""
    dead = [module for module, tensors in modules(measured.tensors).items() if flow_of(tensors) == "dead"]
    return f"{label} (dead: {', '.join(dead)})" if dead else label


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index + 1}" if index else name


def _title(inputs: ReportInputs) -> str:
    if inputs.study is not None:
        return inputs.study.plan.name
    labels = [configuration.label for configuration in inputs.configurations]
    return " against ".join(labels) if len(labels) < 4 else f"{labels[0]} and {len(labels) - 1} other configurations"


def _require_replaceable(out: Path, folder: Path, *, force: bool) -> None:
    """Refuse a page or folder that exists, unless `force` is on and no report can have left the folder. Raises: ConfigError."""
    for path in (out, folder):
        if path.exists() and not force:
            raise ConfigError(f"{path} exists", hint="use --force to replace it")
    entries = list(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
    foreign = [entry.name for entry in entries if entry.is_dir() or not _PLOT_FILE.fullmatch(entry.name)]
    if foreign:
        raise ConfigError(
            f"{folder} is not of a report: it holds {min(foreign)}" if folder.is_dir() else f"{folder} is a file",
            hint="give the page another name",
        )


def _replace_folder(folder: Path, drawn: list[DrawnPlot]) -> list[Path]:
    """Write the plots' files into a new folder and put it in the place of an earlier report's. Raises: OSError."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh.chmod(0o755)
        names = [path.name for path in write_plot_files(drawn, fresh)]
        assert all(_PLOT_FILE.fullmatch(name) for name in names), (
            "a later report would take the folder for a foreign one"
        )
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return [folder / name for name in names]
