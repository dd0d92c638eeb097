"""The page: everything drawn and counted, put into one HTML file that needs no network and no script."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from bytejepa.report.configuration import Setting, commands, settings_against_preset, shown, study_command
from bytejepa.report.drawing import DrawnPlot
from bytejepa.report.inputs import Configuration, LoggedRun, ReportInputs
from bytejepa.report.learning_plots import mean_rate
from bytejepa.report.measurements import RunMeasurements
from bytejepa.report.wording import once_or_each
from bytejepa.study.results import StudyResult

Measured = Mapping[str, Sequence[RunMeasurements]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page with an entry in the table of contents."""

    name: str
    title: str
    text: str
    plots: Sequence[DrawnPlot]
    folded: Sequence[tuple[str, Sequence[DrawnPlot]]] = ()
    """(summary line, plots) of what is shown on demand."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number at the top of the page."""

    label: str
    value: str
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table for the eye: the first column to the left, the others to the right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConfigurationText:
    """A configuration as the page shows it."""

    label: str
    preset: str
    differing: Sequence[Setting]
    settings: Sequence[Setting]
    commands: Sequence[str]
    provenance: Mapping[str, str]


def render_page(
    inputs: ReportInputs, measured: Measured, sections: Sequence[Section], *, title: str, command: str, files: str
) -> str:
    """Return the page; `files` is the name of the folder beside it, `command` what made the report."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bytejepa.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    tables = [run_table(inputs, measured)]
    if inputs.study is not None:
        tables.insert(0, study_table(inputs.study))
    page: str = environment.get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle(inputs),
        figures=summary(inputs.configurations[0], measured) if len(inputs.configurations) == 1 else (),
        tables=tables,
        study=inputs.study,
        sections=[section for section in sections if section.plots or section.folded],
        configurations=[
            _configuration_text(configuration, _scored_ids(inputs, configuration, measured))
            for configuration in inputs.configurations
        ],
        study_command=study_command(inputs.study, inputs.study_path),
        command=command,
        files=files,
    )
    return page


def subtitle(inputs: ReportInputs) -> str:
    """Return what the report is about, in a line."""
    runs = [run for configuration in inputs.configurations for run in configuration.runs]
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    if inputs.study is not None:
        whole = "complete" if inputs.study.is_complete else "not complete yet"
        return f"Study {inputs.study.plan.name}: {count} of {len(inputs.configurations)} variants, {whole}"
    if len(inputs.configurations) > 1:
        return f"{count} of {len(inputs.configurations)} configurations"
    return f"{inputs.configurations[0].seeds}, preset {settings_against_preset(runs[0].config)[0]}"


def with_spread(values: Sequence[float | None], form: str) -> str:
    """Return the mean of several values with their sample standard deviation, or the one value; a dash for none."""
    present = [value for value in values if value is not None]
    if not present:
        return "–"
    mean = format(statistics.fmean(present), form)
    return f"{mean} ± {format(statistics.stdev(present), form)}" if len(present) > 1 else mean


def summary(configuration: Configuration, measured: Measured) -> list[Figure]:
    """Return the numbers at the top: bits per byte of every stage, bytes, steps, seconds."""
    runs, of_runs = configuration.runs, measured.get(configuration.label, ())
    figures = []
    for stage, key in (("artifact", None), ("average", "val_bpb_average"), ("raw", "val_bpb")):
        if stage == "average" and not configuration.config.training.keeps_average:
            continue
        values = [m.scores[stage].bpb for m in of_runs] or [run.last(key) if key else None for run in runs]
        names = {"artifact": "artifact", "average": "averaged weights", "raw": "raw weights"}
        mean, _, spread = with_spread(values, ".4f").partition(" ± ")
        # measured runs are the first ones
        seeds = [run.seed for run, value in zip(runs, values, strict=False) if value is not None]
        detail = f"± {spread}, {len(seeds)} seeds" if spread else f"seed {seeds[0]}" if seeds else "not measured"
        figures.append(Figure(label=f"bpb, {names[stage]}", value=mean, detail=detail))
    if of_runs:
        limit = of_runs[0].limit_bytes
        sizes = [float(m.total_bytes) for m in of_runs]
        share = statistics.fmean(sizes) / limit
        detail = f"{share:.1%} of {limit:,}" + (", mean" if len(sizes) > 1 else "")
        figures.append(Figure(label="bytes, weights and code", value=f"{statistics.fmean(sizes):,.0f}", detail=detail))
    read = f"{statistics.fmean(run.num_bytes for run in runs) / 1e6:,.2f} MB read"
    steps, _, spread = with_spread([float(run.steps) for run in runs], ",.0f").partition(" ± ")
    figures.append(
        Figure(label="steps", value=steps, detail=f"± {spread}, {read}" if spread not in ("", "0") else read)
    )
    rates = [mean_rate(run) for run in runs]
    rate = statistics.fmean(known) if (known := [value for value in rates if value]) else math.nan
    seconds, _, spread = with_spread([run.train_s for run in runs], ",.0f").partition(" ± ")
    detail = (f"± {spread}, " if spread else "") + ("training" if math.isnan(rate) else f"{rate / 1e3:,.1f} kB/s")
    return [*figures, Figure(label="seconds of training", value=seconds, detail=detail)]


def run_table(inputs: ReportInputs, measured: Measured) -> Grid:
    """Return one line a run: bits per byte of every stage, bytes, steps, seconds."""
    rows = []
    for configuration in inputs.configurations:
        of_runs = list(measured.get(configuration.label, ()))
        padded = [*of_runs, *[None] * (len(configuration.runs) - len(of_runs))]
        name = configuration.label if len(inputs.configurations) > 1 else ""
        rows += [_run_row(name, run, found) for run, found in zip(configuration.runs, padded, strict=True)]
    dash, logged = "not measured", "the averaged weights' last validation while training"
    if not all(configuration.config.training.keeps_average for configuration in inputs.configurations):
        dash, logged = f"{dash}, or no average kept", f"{logged}, without an average the last weights'"
    scored = {
        label: f"the first {of_runs[0].scores['artifact'].num_bytes:,} bytes of the validation split, non-overlapping windows "
        f"of {of_runs[0].priced.window:,} ids"
        for label, of_runs in measured.items()
        if of_runs
    }
    text = (
        f"Raw, average and artifact: bits per byte on {once_or_each(scored)}; a dash: {dash}. "
        if scored
        else "Nothing was measured beyond the log. "
    )
    earlier = [
        f"{run.name} after {found.step:,} of {run.steps:,} steps"
        for configuration in inputs.configurations
        for run, found in zip(configuration.runs, measured.get(configuration.label, ()), strict=False)
        if found.step < run.steps
    ]
    if earlier:
        text += f"Measured at the newest checkpoint, before the last logged step: {', '.join(earlier)}. "
    return Grid(
        caption=f"Runs. {text}Logged: {logged}. Bytes: weights and code.",
        columns=("run", "seed", "raw", "average", "artifact", "logged", "bytes", "steps", "MB read", "seconds"),
        rows=rows,
    )


def _run_row(configuration: str, run: LoggedRun, found: RunMeasurements | None) -> list[str]:
    kept = run.config.training.keeps_average
    scores = [
        f"{found.scores[stage].bpb:.4f}" if found and (kept or stage != "average") else "–"
        for stage in ("raw", "average", "artifact")
    ]
    label = run.name if configuration in run.name else f"{configuration}: {run.name}"
    return [
        label,
        str(run.seed),
        *scores,
        with_spread([run.last("val_bpb_average")], ".4f"),
        f"{found.total_bytes:,}" if found else "–",
        f"{run.steps:,}",
        f"{run.num_bytes / 1e6:,.2f}",
        with_spread([run.train_s], ",.1f"),
    ]


def study_table(study: StudyResult) -> Grid:
    """Return one line a variant: what the study found."""
    rows = []
    for v in study.variants:
        interval = (
            "–"
            if v.interval_low_bpb is None or v.interval_high_bpb is None
            else f"{v.interval_low_bpb:+.4f} to {v.interval_high_bpb:+.4f}"
        )
        rows.append(
            [
                v.variant,
                v.verdict or "baseline",
                f"{v.mean_bpb:.4f}" + (f" ± {v.std_bpb:.4f}" if v.std_bpb is not None else ""),
                "–" if v.difference_bpb is None else f"{v.difference_bpb:+.4f}",
                interval,
                "–" if v.p_corrected is None else f"{v.p_corrected:.3g}",
                with_spread([v.mean_explained_variance], ".3f"),
                with_spread([v.mean_effective_rank], ".1f"),
                with_spread([v.mean_latent_std], ".3f"),
                f"{v.mean_bytes_per_s:,.0f}",
                str(v.num_seeds),
            ]
        )
    return Grid(
        caption=(
            "Variants. Bits per byte of the artifact (mean ± standard deviation over seeds), difference to the baseline with "
            "its 95 % interval, p value after Holm's correction; of JEPA's latents: explained variance, effective rank and "
            "root mean variance, means of what the log has of the last tenth of the run, its last line at least; bytes read a "
            "second of training."
        ),
        columns=(
            "variant", "verdict", "bpb", "difference", "95 % interval", "p", "explained", "rank", "latent std", "bytes/s",
            "seeds",
        ),
        rows=rows,
    )  # fmt: skip


def _configuration_text(configuration: Configuration, scored_ids: int | None) -> ConfigurationText:
    preset, settings = settings_against_preset(configuration.config)
    return ConfigurationText(
        label=configuration.label,
        preset=preset,
        differing=[setting for setting in settings if setting.differs and setting.name != "training.seed"],
        settings=settings,
        commands=commands(configuration.runs, scored_ids),
        provenance=_provenance(configuration.runs[0]),
    )


def _scored_ids(inputs: ReportInputs, configuration: Configuration, measured: Measured) -> int | None:
    """Return how many leading ids of the validation split the page's scores of a configuration are of; None: all."""
    if inputs.study is not None:
        return inputs.study.plan.evaluation.validation_bytes
    of_runs = measured.get(configuration.label)
    if of_runs:
        priced = of_runs[0].priced
        return None if priced.is_whole_split else len(priced.ids)
    return configuration.config.training.validation_bytes


def _beginning(started_from: dict[str, Any] | None) -> str:
    if started_from is None:
        return "random, of the seed"
    return f"those of {started_from.get('path')}, sha256 {str(started_from.get('weights_sha256'))[:16]}…"


def _provenance(run: LoggedRun) -> dict[str, str]:
    manifest = run.manifest
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    device = str(manifest.get("device", "unknown"))
    return {
        "code": f"commit {manifest.get('git_commit') or 'unknown'}",
        "versions": f"Python {manifest.get('python', 'unknown')}, {versions}" if versions else "unknown",
        "machine": f"{manifest.get('processor', 'unknown')}, {manifest.get('physical_cores', '?')} cores",
        "device": f"{device}, {manifest.get('world_size', 1)} rank(s), attention {manifest.get('attention', 'unknown')}, "
        + ("compiled" if manifest.get("compiled") else "not compiled"),
        "data": f"sha256 of the shards' ends {str(manifest.get('data', {}).get('sha256_of_ends', 'unknown'))[:16]}…",
        "weights at the beginning": _beginning(manifest.get("started_from")),
        "fingerprint": f"{str(manifest.get('fingerprint', 'unknown'))[:16]}… of the configuration",
        "begun": str(manifest.get("created", "unknown")),
    }
