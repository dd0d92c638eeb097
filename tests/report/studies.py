"""A finished study for the tests of its report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bytejepa.study.plan import Budget, Evaluation, Plan, Variant
from bytejepa.study.results import Environment, RunResult, StudyResult, VariantSummary, write_study


def study_of(folder: Path, runs: dict[str, list[Path]], bpb: dict[str, list[float]]) -> Path:
    """Write into `folder` a study of `runs` with these bits per byte, by variant and seed, and return it."""
    environment = Environment(
        processor="p", device="cpu", world_size=1, num_threads=1, compiled=False, attention="blocked", python="3",
        versions={}, code_sha256="0",
    )  # fmt: skip
    results = [
        RunResult(
            variant=variant, seed=seed, run=str(path), fingerprint="0", bpb=value, bpb_average=value, bpb_live=value,
            steps=6, num_bytes=1536, train_s=1.0, num_parameters=1, artifact_bytes=1, final_learning_rate_scale=0.0,
            explained_variance=None, effective_rank=None, latent_std=None, environment=environment,
        )
        for variant in runs
        for seed, path, value in zip((1337, 7), runs[variant], bpb[variant], strict=True)
    ]  # fmt: skip
    summaries = [
        VariantSummary(
            variant=variant, tests="t", num_seeds=2, mean_bpb=float(np.mean(bpb[variant])), std_bpb=0.1, mean_train_s=1.0,
            mean_bytes_per_s=1536.0, mean_artifact_bytes=1.0, mean_quantization_loss_bpb=0.0, mean_explained_variance=None,
            mean_effective_rank=None,
            mean_latent_std=None, difference_bpb=None if variant == "base" else -0.03,
            interval_low_bpb=None if variant == "base" else -0.05, interval_high_bpb=None if variant == "base" else -0.01,
            p_value=None if variant == "base" else 0.02, p_corrected=None if variant == "base" else 0.02,
            verdict=None if variant == "base" else "better",
        )
        for variant in runs
    ]  # fmt: skip
    plan = Plan(
        name="trial", question="Which <seed> is better?", base="tiny", baseline="base",
        variants=tuple(Variant(name=variant, tests="t") for variant in runs), seeds=(1337, 7), budget=Budget(steps=6),
        evaluation=Evaluation(window_bytes=64, stride_bytes=16, validation_bytes=1500),
    )  # fmt: skip
    folder.mkdir()
    study = StudyResult(
        plan=plan, data_path="d", data_sha256="0", environment=environment, runs=tuple(results),
        variants=tuple(summaries), notes=("One & only note.",),
    )  # fmt: skip
    write_study(folder, study)
    return folder
