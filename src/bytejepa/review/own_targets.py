"""Reviews of our own run folders and artifacts: the budget from the file, the behaviour from the model in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytejepa.bits import ARTIFACT_LIMIT_BYTES
from bytejepa.errors import BytejepaError
from bytejepa.review.claims import bpb_in
from bytejepa.review.findings import Evidence, Finding, Review, Status, Weight, judge

if TYPE_CHECKING:
    from bytejepa.artifact.container import Container

_CLEAN = "Track A: fixed predictor; the model was built and tried out"


def review_artifact(path: Path) -> Review:
    """Return the review of a `.bjm` file. A damaged file is a finding, not an error."""
    from bytejepa.artifact.container import read_container
    from bytejepa.review.own_round_trip import artifact_round_trip

    try:
        container = read_container(path)
    except BytejepaError as problem:
        return _unreadable(path, "artifact", problem)
    findings = [
        Finding(
            check="artifact.container", status=Status.PASS, summary=f"checksum right, sha256 {container.sha256[:16]}..."
        ),
        _budget(path),
        *_behaviour(path, artifact_round_trip),
    ]
    parameters = sum(tensor.numel() for tensor in container.tensors.values())
    facts: dict[str, Any] = {
        "num_seeds": 1,
        "seeds": [_seed_of(container)],
        "parameters": parameters,
        "artifact_bytes": path.stat().st_size,
    }
    return _review(path, "artifact", findings, facts)


def review_run(path: Path) -> Review:
    """Return the review of a run folder: what it recorded, and the model of its averaged weights."""
    from bytejepa.review.own_round_trip import run_round_trip
    from bytejepa.training.clock import read_log, steps_and_seconds
    from bytejepa.training.runlog import RunFolder

    folder = RunFolder(path)
    try:
        config, metrics, manifest = folder.read_config(), folder.read_metrics(), folder.read_manifest()
        readings_s = read_log(folder.clock_path)
    except (BytejepaError, ValueError, OSError, RecursionError) as problem:
        return _unreadable(path, "run", problem)
    findings = [_manifest(config, manifest), *_beginning(manifest), _metrics(metrics)]
    findings += [_budget(artifact) for artifact in sorted(path.rglob("*.bjm"))]
    findings += _behaviour(path, run_round_trip)
    values = [bpb for line in metrics if (bpb := bpb_in(line, "val_bpb_average")) is not None]
    facts: dict[str, Any] = {
        "mean_bpb": values[-1] if values else None,
        "num_seeds": 1,
        "seeds": [config.training.seed],
    }
    if metrics:
        steps, train_s = steps_and_seconds(metrics, readings_s)
        facts |= {"steps": [steps], "train_s": [train_s]}
    return _review(path, "run", findings, facts)


def _seed_of(container: Container) -> int | None:
    """Return the seed of the run; weights that were imported have a configuration, but no run of it."""
    training = None if "imported_from" in container.metadata else container.configuration.get("training")
    seed = training.get("seed") if isinstance(training, dict) else None
    return seed if type(seed) is int else None


def _review(path: Path, kind: str, findings: list[Finding], facts: dict[str, Any]) -> Review:
    name = path.resolve().name
    return Review(
        target=name, kind=kind, title=name, verdict=judge(findings, _CLEAN), findings=tuple(findings), facts=facts
    )


def _unreadable(path: Path, kind: str, problem: Exception) -> Review:
    finding = Finding(
        check=f"{kind}.container",
        status=Status.FAIL,
        weight=Weight.AUTHOR,
        summary=str(problem),
        evidence=(Evidence(file=path.name),),
    )
    return _review(path, kind, [finding], {})


def _budget(path: Path) -> Finding:
    from bytejepa.artifact.store import code_bytes

    weights, code = path.stat().st_size, code_bytes()[1]
    total = weights + code
    figures = {
        "weights_bytes": weights,
        "code_bytes": code,
        "largest_total_bytes": total,
        "limit_bytes": ARTIFACT_LIMIT_BYTES,
    }
    over = total - ARTIFACT_LIMIT_BYTES
    summary = f"{weights:,} bytes of weights + {code:,} of zipped package = {total:,}, {-over:,} left"
    return Finding(
        check="budget.bytes",
        status=Status.FAIL if over > 0 else Status.PASS,
        summary=summary,
        evidence=(Evidence(file=path.name, text=f"{weights:,} bytes"),),
        figures=figures,
    )


def _behaviour(path: Path, round_trip_of: Callable[[Path], Finding]) -> list[Finding]:
    import bytejepa
    from bytejepa.review.behaviour import model_findings

    try:
        model = bytejepa.load(path)
        round_trip = round_trip_of(path)
    except BytejepaError as problem:
        return [
            Finding(
                check="behaviour.load",
                status=Status.FAIL,
                weight=Weight.AUTHOR,
                summary=f"no model can be built: {problem}",
            )
        ]
    return [*model_findings(model.eval()), round_trip]


def _manifest(config: Any, manifest: dict[str, Any]) -> Finding:
    from bytejepa.config_json import fingerprint

    check = "run.manifest"
    if not manifest:
        return Finding(check=check, status=Status.UNKNOWN, weight=Weight.AUTHOR, summary="there is no manifest.json")
    if manifest.get("fingerprint") != fingerprint(config):
        return Finding(
            check=check,
            status=Status.FAIL,
            summary="config.json is not the configuration that the manifest was written for",
            evidence=(
                Evidence(file="manifest.json", text=str(manifest.get("fingerprint"))),
                Evidence(file="config.json", text=fingerprint(config)),
            ),
        )
    return Finding(check=check, status=Status.PASS, summary="the configuration has the fingerprint of the manifest")


def _beginning(manifest: dict[str, Any]) -> list[Finding]:
    check, begun_with = "run.beginning", manifest.get("started_from")
    if not manifest:
        return []
    if begun_with is None:
        return [Finding(check=check, status=Status.PASS, summary="the manifest names no model that the run began with")]
    return [
        Finding(
            check=check,
            status=Status.FAIL,
            summary="the run began with the weights of an earlier model, whose training its own time does not count",
            evidence=(Evidence(file="manifest.json", text=f"started_from: {begun_with.get('path')}"),),
        )
    ]


def _metrics(metrics: list[dict[str, float]]) -> Finding:
    check = "run.metrics"
    if not metrics:
        return Finding(check=check, status=Status.UNKNOWN, weight=Weight.AUTHOR, summary="metrics.jsonl is empty")
    steps = [line["step"] for line in metrics if "step" in line]
    if steps != sorted(steps):
        return Finding(
            check=check, status=Status.FAIL, weight=Weight.AUTHOR, summary="the steps in metrics.jsonl do not rise"
        )
    return Finding(
        check=check, status=Status.PASS, summary=f"{len(metrics)} lines up to step {steps[-1] if steps else 0}"
    )
