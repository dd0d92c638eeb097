"""A study from plan to study.json: seed by seed and, within a seed, variant by variant, so that whatever drifts on the
machine meets all variants alike. What is finished is kept; a half-done run is resumed where its checkpoint stands."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

from bytejepa.artifact.export import export
from bytejepa.config import RunConfig
from bytejepa.data.corpus import write_embedded_shards
from bytejepa.data.loader import IdStream
from bytejepa.errors import CheckpointError, ConfigError, Interrupted, file_errors_as
from bytejepa.files import locked, write_atomically
from bytejepa.study.environment import (
    data_sha256,
    environment_here,
    environment_of,
    require_same,
    require_same_machine,
    run_fingerprint,
)
from bytejepa.study.plan import Plan, Variant
from bytejepa.study.results import (
    EMBEDDED_DATA,
    FILE_NAME,
    PLAN_NAME,
    RunResult,
    StudyResult,
    read_study,
    run_from_dict,
    write_plan,
    write_study,
)
from bytejepa.study.summary import summarise
from bytejepa.training.loop import TrainProgress, TrainResult
from bytejepa.training.runlog import RunFolder
from bytejepa.training.runs import resume, train
from bytejepa.training.schedule import learning_rate_scale

RESULT_NAME = "study_run.json"
"""In a run folder: its RunResult, written when all of it is done."""
LAST_SHARE = 0.1
"""Share of a run, at its end, over which the latents' figures are averaged."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StudyProgress:
    """What an observer is told of the run at hand."""

    number: int
    """Of the run, from 1."""
    num_runs: int
    variant: str
    seed: int
    stage: str
    """`train`, `score`, `done` (scored now) or `reused` (finished before)."""
    share: float
    """Of the stage, 0 to 1."""
    training: TrainProgress | None = None
    result: RunResult | None = None
    """With `done` and `reused`."""


Observer = Callable[[StudyProgress], None]


def run_study(
    plan: Plan, out: Path, *, data: Path | None = None, force: bool = False, on_progress: Observer | None = None
) -> StudyResult:
    """Carry out `plan` in the folder `out`, or go on with it, and return what it found, as study.json has it.

    `data`: folder of shards, before the plan's; without either the embedded corpus is written into the study.
    `force`: run everything anew. Raises: ConfigError, DataError; CheckpointError if `out` holds another study or one of
    other data, is in use, or began in another environment; Interrupted after a signal (the same command goes on).
    """
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"ablate runs in one process, and here are {ranks}: a study of several ranks is not supported",
            hint="start it without torchrun",
        )
    if data is not None:
        plan = dataclasses.replace(plan, data=str(data.resolve()))  # so that plan.json repeats it
    _refuse_other_study(plan, out, force=force)
    with file_errors_as(CheckpointError, "create the study folder", out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", CheckpointError, f"is at work in {out}"):
        study = _Study(plan, out, force=force, on_progress=on_progress)
        with file_errors_as(CheckpointError, "write a study in", out):
            return study.run_all()


def _refuse_other_study(plan: Plan, out: Path, *, force: bool) -> None:
    """Refuse a folder of another study unless `force` is on, and of anything else. Raises: CheckpointError."""
    if (out / FILE_NAME).is_file():
        if force:
            return
        found = read_study(out).plan.name
        if found != plan.name:
            raise CheckpointError(
                f"{out} holds the study {found!r}, not {plan.name!r}", hint="name another --out, or --force"
            )
    elif out.is_dir() and [entry for entry in out.iterdir() if entry.name not in _OWN_ENTRIES]:
        raise CheckpointError(f"{out} is not empty and holds no study", hint="name another --out")


_OWN_ENTRIES = (".lock", EMBEDDED_DATA, PLAN_NAME, "runs")
"""What a study killed before its first run was done has left."""


def _other_data(out: Path, these: str) -> CheckpointError:
    return CheckpointError(
        f"the study in {out} was made with other data than {these}", hint="name its --data, or another --out"
    )


class _Study:
    """The state of a study under way."""

    def __init__(self, plan: Plan, out: Path, *, force: bool, on_progress: Observer | None) -> None:
        self.plan, self.out = plan, out
        self.on_progress = on_progress or (lambda _: None)
        named = Path(plan.data) if plan.data is not None else None
        earlier = read_study(out) if (out / FILE_NAME).is_file() and not force else None
        if named is None and earlier is not None and not (out / EMBEDDED_DATA).is_dir():
            raise _other_data(out, "the embedded corpus")  # before that is written
        if named is None:
            write_embedded_shards(out / EMBEDDED_DATA)
        self.data = named or out / EMBEDDED_DATA
        self.data_path = str(self.data.resolve()) if named else EMBEDDED_DATA
        self.data_sha256 = data_sha256(self.data)
        if earlier is not None and earlier.data_sha256 != self.data_sha256:
            raise _other_data(out, str(self.data))
        self.here = environment_here()
        self.results: list[RunResult] = []
        self.finished = {} if force else self._read_finished()
        self.redo = force

    def _read_finished(self) -> dict[str, RunResult]:
        """Return the finished runs in the folder by fingerprint."""
        found = {}
        for path in sorted(self.out.glob(f"runs/*/{RESULT_NAME}")):
            try:
                result = run_from_dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, KeyError) as problem:
                raise CheckpointError(f"{path}: damaged: {problem}", hint="remove its folder and go on") from None
            found[result.fingerprint] = result
        return found

    def run_all(self) -> StudyResult:
        """Run what is missing and return the whole."""
        self._refuse_another_beginning()
        write_plan(self.out, self.plan)
        if self.redo:  # stopped, it goes on with what was made anew only
            for path in self.out.glob(f"runs/*/{RESULT_NAME}"):
                path.unlink()
        pairs = [(seed, variant) for seed in self.plan.seeds for variant in self.plan.variants]
        for number, (seed, variant) in enumerate(pairs, start=1):
            at = StudyProgress(
                number=number, num_runs=len(pairs), variant=variant.name, seed=seed, stage="train", share=0.0
            )
            result = self._run(variant, seed, at)
            self._refuse_another_environment(result)
            self.results.append(result)
            self.finished[result.fingerprint] = result
            study = self._so_far()
            write_study(self.out, study)
        return study

    def _refuse_another_beginning(self) -> None:
        """Refuse, before anything runs, to go on where the machine, versions or code are not those of the finished runs."""
        for result in self.finished.values():
            theirs = result.environment
            require_same(theirs, dataclasses.replace(theirs, **self.here), what=f"run {result.run}")

    def _refuse_another_environment(self, result: RunResult) -> None:
        """Refuse a run that was computed in another way than the first: device and compilation, known only now, and the
        attention kernel, which a variant's masks may decide, so that it is that of the variant's own first run."""
        for first in self.results[:1]:
            own = next((run for run in self.results if run.variant == result.variant), result)
            expected = dataclasses.replace(first.environment, attention=own.environment.attention)
            require_same(expected, result.environment, what=f"run {own.run}")

    def _so_far(self) -> StudyResult:
        variants, notes = summarise(self.plan, self.results)
        return StudyResult(
            plan=self.plan,
            data_path=self.data_path,
            data_sha256=self.data_sha256,
            environment=self.results[0].environment,
            runs=tuple(self.results),
            variants=variants,
            notes=(*notes, *self._notes_on_data()),
        )

    def _notes_on_data(self) -> list[str]:
        asked, there = self.plan.evaluation.validation_bytes, IdStream.open(self.data, "val").num_ids
        if asked <= there:
            return []
        return [
            f"The validation split has {there:,} ids: all of them were scored, fewer than the {asked:,} of the plan."
        ]

    def _run(self, variant: Variant, seed: int, at: StudyProgress) -> RunResult:
        """Return the run of `variant` and `seed`: as it was finished, or trained, exported and scored now."""
        config = self.plan.config(variant, seed)
        fingerprint = run_fingerprint(
            config,
            self.plan.evaluation,
            data=self.data_sha256,
            code=self.here["code_sha256"],
            versions=self.here["versions"],
        )
        finished = self.finished.get(fingerprint)
        if finished is not None:
            # another variant of the same configuration may have run it; figures of the same run are the same
            finished = dataclasses.replace(finished, variant=variant.name)
            self.on_progress(dataclasses.replace(at, stage="reused", share=1.0, result=finished))
            return finished
        run = self.out / "runs" / f"{variant.name}_seed_{seed}_{fingerprint[:8]}"
        trained = self._train(config, run, at)
        scale = learning_rate_scale(config.schedule, progress=1.0, step=trained.steps, elapsed_s=trained.elapsed_s)
        self.plan.check_learning_rate_end(variant, scale)
        result = self._score(run, trained, scale, fingerprint, at)
        self._refuse_another_environment(result)
        write_atomically(run / RESULT_NAME, json.dumps(dataclasses.asdict(result), indent=1).encode() + b"\n")
        self.on_progress(dataclasses.replace(at, stage="done", share=1.0, result=result))
        return result

    def _train(self, config: RunConfig, run: Path, at: StudyProgress) -> TrainResult:
        def observe(progress: TrainProgress) -> None:
            self.on_progress(dataclasses.replace(at, share=progress.progress, training=progress))

        folder = RunFolder(run)
        try:
            if not self.redo and folder.config_path.is_file() and folder.manifest_path.is_file():
                require_same_machine(folder.read_manifest(), self.here, what=f"run {run.relative_to(self.out)}")
                return resume(run, data=self.data, on_progress=observe)
            return train(config, self.data, run, force=True, on_progress=observe)
        except Interrupted as stopped:
            raise Interrupted(stopped.message, hint="the same command goes on with the study") from None

    def _score(self, run: Path, trained: TrainResult, scale: float, fingerprint: str, at: StudyProgress) -> RunResult:
        stages = ("calibrate", "fit", "score raw", "score average", "score artifact")
        exported = export(
            run,
            run / "model.bjm",
            data=self.data,
            score_bytes=self.plan.evaluation.validation_bytes,
            stride=self.plan.evaluation.stride_bytes,
            force=True,
            on_progress=lambda stage, done, total: self.on_progress(
                dataclasses.replace(at, stage="score", share=(stages.index(stage) + done / total) / len(stages))
            ),
        )
        folder = RunFolder(run)
        metrics = folder.read_metrics()
        return RunResult(
            variant=at.variant,
            seed=at.seed,
            run=str(run.relative_to(self.out)),
            fingerprint=fingerprint,
            bpb=exported.scores["artifact"].bpb,
            bpb_average=exported.scores["average"].bpb,
            bpb_live=exported.scores["raw"].bpb,
            steps=trained.steps,
            num_bytes=trained.num_bytes,
            train_s=trained.elapsed_s,
            num_parameters=exported.num_parameters,
            artifact_bytes=exported.weights_bytes,
            final_learning_rate_scale=scale,
            explained_variance=mean_at_end(metrics, "jepa_explained_variance"),
            effective_rank=mean_at_end(metrics, "jepa_effective_rank"),
            latent_std=mean_at_end(metrics, "jepa_latent_std"),
            environment=environment_of(folder.read_manifest()),
        )


def mean_at_end(metrics: list[dict[str, float]], key: str) -> float | None:
    """Return the mean of `key` over the lines of the last tenth of a run (the last line at least); None if it has none."""
    logged = [line for line in metrics if key in line]
    if not logged:
        return None
    late = [line[key] for line in logged if line["step"] > (1 - LAST_SHARE) * logged[-1]["step"]]
    return sum(late) / len(late)
