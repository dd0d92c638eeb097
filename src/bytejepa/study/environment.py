"""What all runs of a study must share: machine, threads, compilation, versions, code, data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import bytejepa
from bytejepa.config import RunConfig
from bytejepa.config_json import to_dict
from bytejepa.data.manifest import MANIFEST_NAME, load_manifest
from bytejepa.data.shards import SPLITS, file_sha256, shards_in
from bytejepa.errors import CheckpointError
from bytejepa.study.plan import Evaluation
from bytejepa.study.results import Environment
from bytejepa.training.runlog import describe_machine

DECIDING_SOURCES = (
    "bits.py",
    "config*.py",
    "presets.py",
    "kernels/*.py",
    "data/*.py",
    "model/*.py",
    "scoring/*.py",
    "training/*.py",
    "artifact/*.py",
)
"""Files of the package on which a run's figures depend."""


def environment_of(manifest: dict[str, Any]) -> Environment:
    """Return the environment of the run with this manifest.json, as far as it was trained in this process."""
    return Environment(
        processor=manifest["processor"],
        device=manifest["device"],
        world_size=manifest["world_size"],
        num_threads=manifest.get("num_threads", torch.get_num_threads()),  # an older manifest does not say
        compiled=manifest["compiled"],
        attention=manifest["attention"],
        python=manifest["python"],
        versions=manifest["versions"],
        code_sha256=code_sha256(),
    )


def environment_here() -> dict[str, Any]:
    """Return the part of `Environment` that is known before anything runs."""
    machine = describe_machine()
    return {
        "processor": machine["processor"],
        "num_threads": torch.get_num_threads(),
        "python": machine["python"],
        "versions": machine["versions"],
        "code_sha256": code_sha256(),
    }


def code_sha256() -> str:
    """Return the sha256 of the sources that decide a run's figures, names included."""
    root = Path(bytejepa.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for pattern in DECIDING_SOURCES for path in root.glob(pattern)):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def require_same(theirs: Environment, ours: Environment, *, what: str) -> None:
    """Refuse to compare runs of two environments. Raises: CheckpointError naming the first difference."""
    _refuse_difference(dataclasses.asdict(theirs), dataclasses.asdict(ours), what)


def require_same_machine(manifest: dict[str, Any], here: dict[str, Any], *, what: str) -> None:
    """Refuse to go on here with a half-done run of another machine. Raises: CheckpointError naming the first difference."""
    _refuse_difference({name: manifest[name] for name in here if name in manifest}, here, what)


def _refuse_difference(theirs: dict[str, Any], ours: dict[str, Any], what: str) -> None:
    for label, was in theirs.items():
        found = ours[label]
        if was == found:
            continue
        if isinstance(was, dict):
            name = next(key for key in sorted({*was, *found}) if was.get(key) != found.get(key))
            was, found, label = was.get(name), found.get(name), f"version of {name}"
        raise CheckpointError(
            f"{what} was made with another {label}: {was}, now {found}",
            hint="all runs of a study share hardware, threads, compilation, versions and code; "
            "go on where it began, or begin another study with another --out",
        )


def data_sha256(folder: Path) -> str:
    """Return one sha256 over the names and digests of all shards in `folder`, both splits.

    Digests that `prepare` wrote into the manifest are believed (`bytejepa prepare --verify` checks them); shards of a
    folder without one are read. Raises: DataError for a damaged manifest or an unreadable shard.
    """
    promised: dict[str, str] = {}
    if (folder / MANIFEST_NAME).is_file():
        splits = load_manifest(folder).splits
        promised = {file.name: file.sha256 for split in splits.values() for file in split.files}
    digest = hashlib.sha256()
    for path in (path for split in SPLITS for path in shards_in(folder, split)):
        digest.update(f"{path.name}:{promised.get(path.name) or file_sha256(path)}\n".encode())
    return digest.hexdigest()


def run_fingerprint(
    config: RunConfig, evaluation: Evaluation, *, data: str, code: str, versions: dict[str, str]
) -> str:
    """Return the sha256 of all that decides a run's figures but the machine: equal fingerprints, interchangeable runs."""
    decided_by = {
        "config": to_dict(config),
        "evaluation": dataclasses.asdict(evaluation),
        "data": data,
        "code": code,
        "versions": versions,
    }
    return hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()
