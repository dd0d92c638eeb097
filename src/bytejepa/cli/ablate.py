"""`bytejepa ablate`: a study of paired runs, its table and its verdicts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bytejepa.cli.options import refuse_ignored
from bytejepa.errors import ConfigError

if TYPE_CHECKING:
    from bytejepa.study.results import StudyResult, VariantSummary
    from bytejepa.study.runner import StudyProgress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablate:
    """Run an ablation study: `bytejepa ablate PLAN --out STUDY`. The same command goes on with a study that was stopped."""

    plan: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="PLAN")] = None
    """A built-in plan (see --list), or a plan file (.toml or .json)."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the study; finished runs in it are kept."""
    data: Path | None = None
    """Folder of byte260 shards; default: the plan's, or the embedded corpus."""
    steps: int | None = None
    """Optimiser steps of every run, instead of the plan's budget."""
    seeds: tuple[int, ...] | None = None
    """Seeds, instead of the plan's."""
    list: bool = False
    """List the built-in plans, or the variants of PLAN, and run nothing."""
    force: bool = False
    """Run everything anew."""
    json: bool = False
    """Print study.json."""

    def run_command(self) -> int:
        """Run the study and print what it found."""
        if self.list:
            refuse_ignored(self, "with --list, which runs nothing", "out", "data", "force")
            if self.plan is None:
                refuse_ignored(self, "with --list alone", "steps", "seeds", instead="name a PLAN")
        from bytejepa.study.plan import load_plan, override

        if self.plan is None:
            if not self.list:
                raise ConfigError("ablate needs a plan", hint="`bytejepa ablate --list` shows the built-in ones")
            _print_plans(as_json=self.json)
            return 0
        plan = override(load_plan(self.plan), steps=self.steps, seeds=self.seeds)
        if self.list:
            _print_variants(plan, as_json=self.json)
            return 0
        if self.out is None:
            raise ConfigError("ablate needs --out STUDY, the folder of the study")
        from bytejepa.study.runner import run_study

        with study_bar() as on_progress:
            study = run_study(plan, self.out, data=self.data, force=self.force, on_progress=on_progress)
        _print_study(study, self.out, as_json=self.json)
        return 0


def _print_plans(*, as_json: bool) -> None:
    from bytejepa.cli.terminal import print_json, print_table
    from bytejepa.study.plan import built_in_plans, load_plan

    plans = [load_plan(name) for name in built_in_plans()]
    if as_json:
        print_json({plan.name: dataclasses.asdict(plan) for plan in plans})
        return
    rows = [
        [plan.name, plan.base, str(len(plan.variants)), str(len(plan.variants) * len(plan.seeds)), plan.question]
        for plan in plans
    ]
    print_table("built-in plans", ["plan", "base", "variants", "runs", "question"], rows, prose=["question"])


def _print_variants(plan: object, *, as_json: bool) -> None:
    from bytejepa.cli.terminal import print_json, print_table
    from bytejepa.study.plan import Plan

    assert isinstance(plan, Plan)
    if as_json:
        print_json(plan)
        return
    rows = [[variant.name, variant.tests] for variant in plan.variants]
    print_table(f"{plan.name}: {plan.question}", ["variant", "tests"], rows, prose=["tests"])


@contextlib.contextmanager
def study_bar() -> Iterator[Callable[[StudyProgress], None]]:
    """Yield an observer that draws one bar over all runs and, above it, a line for every run that is done."""
    from bytejepa.cli.terminal import progress_bar

    with progress_bar("study", total=1.0) as (bar, task):

        def show(at: StudyProgress) -> None:
            share = (0.8 if at.stage == "score" else 0.0) + at.share * {"train": 0.8, "score": 0.2}.get(at.stage, 1.0)
            status = (
                f"{at.stage}" if at.training is None else f"step {at.training.step} {at.training.train_bpb:.3f} bpb"
            )
            bar.update(
                task,
                description=f"{at.number}/{at.num_runs} {at.variant} seed {at.seed}",
                completed=(at.number - 1 + share) / at.num_runs,
                status=status,
            )
            if at.result is not None and bar.console.is_terminal:
                bar.console.print(
                    f"{at.number}/{at.num_runs} {at.variant} seed {at.seed}: {at.result.bpb:.4f} bpb, "
                    f"{at.result.train_s:.1f} s{', finished before' if at.stage == 'reused' else ''}",
                    highlight=False,
                )

        yield show


def _print_study(study: StudyResult, out: Path, *, as_json: bool) -> None:
    from bytejepa.cli.terminal import note, print_json, print_table
    from bytejepa.study.results import study_record

    if as_json:
        print_json(study_record(study))
        return
    plan = study.plan
    columns = ["variant", "bpb", "sd", f"against {plan.baseline}", "95 % interval", "p (Holm)", "verdict"]
    print_table(plan.question, columns, [_difference_row(summary) for summary in study.variants])
    columns = [
        "variant",
        "explained variance",
        "effective rank",
        "latent sd",
        "quantisation",
        "artifact bytes",
        "train s",
        "bytes/s",
    ]
    print_table("latents, artifact, time (means over seeds)", columns, [_detail_row(s) for s in study.variants])
    for sentence in study.notes:
        note(sentence)
    note(f"{len(study.runs)} runs, {len(plan.seeds)} seeds; everything is in {out / 'study.json'}")


def _difference_row(summary: VariantSummary) -> list[str]:
    low, high = summary.interval_low_bpb, summary.interval_high_bpb
    return [
        summary.variant,
        f"{summary.mean_bpb:.4f}",
        _number(summary.std_bpb, ".4f"),
        _number(summary.difference_bpb, "+.4f"),
        "" if low is None or high is None else f"{low:+.4f} to {high:+.4f}",
        _number(summary.p_corrected, ".3g"),
        summary.verdict or "baseline",
    ]


def _detail_row(summary: VariantSummary) -> list[str]:
    return [
        summary.variant,
        _number(summary.mean_explained_variance, ".3f"),
        _number(summary.mean_effective_rank, ".2f"),
        _number(summary.mean_latent_std, ".3f"),
        f"{summary.mean_quantization_loss_bpb:+.4f}",
        f"{summary.mean_artifact_bytes:,.0f}",
        f"{summary.mean_train_s:.1f}",
        f"{summary.mean_bytes_per_s:,.0f}",
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
