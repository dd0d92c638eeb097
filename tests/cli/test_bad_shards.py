"""Shards that are damaged, missing or not what their manifest says: one line, exit code 3, nothing begun."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytejepa.data.shards import write_shard
from bytejepa.data.vocabulary import BOS, ids_from_bytes
from conftest import MINIMAL

Refuses = Callable[..., str]
DATA = 3
TEXT = b"The state of the Union is strong. " * 40


def test_bare_shards_are_good_input(command: Callable[..., Any], shards: Path, tmp_path: Path) -> None:
    assert command("train", *MINIMAL, "--data", shards, "--out", tmp_path / "run").code == 0


def damaged(shards: Path, split: str, how: str) -> str:
    """Damage a shard; returns what the message must say."""
    path = shards / f"fineweb_{split}_000000.bin"
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return f"no shard of the {split} split"
    if how == "empty":
        path.write_bytes(b"")
        return "is empty (0 bytes)"
    if how == "truncated":
        path.write_bytes(data[:-7])
        return "is truncated"
    if how == "cut in the header":
        path.write_bytes(data[:100])
        return "is truncated"
    if how == "wrong magic":
        path.write_bytes(b"\x01" + bytes(data[1:]))
        return "expected magic 20240520"
    if how == "too long":
        path.write_bytes(bytes(data) + b"ab")
        return "is too long"
    assert how == "ids over 259"
    for place in range(1024 + 2, len(data), 40):  # often enough that every sequence holds one
        data[place : place + 2] = (260).to_bytes(2, "little")
    path.write_bytes(data)
    return "id 260"


DAMAGES = ("missing", "empty", "truncated", "cut in the header", "wrong magic", "too long", "ids over 259")


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_training_shards(refuses: Refuses, shards: Path, tmp_path: Path, how: str) -> None:
    words = damaged(shards, "train", how)
    assert words in refuses(DATA, "train", *MINIMAL, "--data", shards, "--out", tmp_path / "run")


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_validation_shards(refuses: Refuses, shards: Path, minimal_artifact: Path, how: str) -> None:
    words = damaged(shards, "val", how)
    assert words in refuses(DATA, "eval", minimal_artifact, "--data", shards)


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "wrong magic"])
def test_validation_shards_are_looked_at_before_training(
    refuses: Refuses, shards: Path, tmp_path: Path, how: str
) -> None:
    words = damaged(shards, "val", how)
    assert words in refuses(DATA, "train", *MINIMAL, "--data", shards, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_ids_are_checked_before_training(refuses: Refuses, shards: Path, tmp_path: Path) -> None:
    words = damaged(shards, "val", "ids over 259")
    assert words in refuses(DATA, "train", *MINIMAL, "--data", shards, "--out", tmp_path / "run")


def test_validation_ids_are_checked_at_export(
    refuses: Refuses, shards: Path, tmp_path: Path, minimal_run: Path
) -> None:
    words = damaged(shards, "val", "ids over 259")
    assert words in refuses(DATA, "export", minimal_run, "-o", tmp_path / "model.bjm", "--data", shards)
    assert not (tmp_path / "model.bjm").exists()


def test_a_validation_split_of_nothing(refuses: Refuses, shards: Path, tmp_path: Path, minimal_artifact: Path) -> None:
    write_shard(shards / "fineweb_val_000000.bin", np.array([BOS], dtype=np.uint16))
    words = "has 1 ids to read: scoring needs a BOS and at least one byte"
    assert words in refuses(DATA, "eval", minimal_artifact, "--data", shards, "--json")
    assert words in refuses(DATA, "train", *MINIMAL, "--data", shards, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_manifest_that_does_not_match(command: Callable[..., Any], embedded_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(embedded_shards, folder)
    path = next(folder.glob("fineweb_val_*.bin"))
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    outcome = command("prepare", "--verify", folder)
    assert outcome.code == DATA
    assert outcome.err.count("\n") == 1
    assert "the manifest says" in outcome.err
    (folder / "manifest.json").write_text("{")
    outcome = command("prepare", "--verify", folder)
    assert (outcome.code, outcome.err.count("\n")) == (DATA, 1)


def unlike_its_manifest(folder: Path, split: str, how: str) -> str:
    """Change a folder so that its manifest is no longer true; returns what the message must say."""
    path = folder / f"fineweb_{split}_000000.bin"
    if how == "a shard too many":
        shutil.copy(path, folder / f"fineweb_{split}_000001.bin")
        return f"fineweb_{split}_000001.bin is not in the manifest"
    if how == "a shard too few":
        path.rename(folder / f"fineweb_{split}_000001.bin")
        return f"fineweb_{split}_000000.bin is missing"
    if how == "another shard":
        write_shard(path, np.array([BOS, *ids_from_bytes(TEXT)], dtype=np.uint16))
        return "ids: the manifest says"
    if how == "a changed byte":
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        return "was changed since the manifest was made"
    assert how == "no JSON"
    (folder / "manifest.json").write_text('{"format": ')
    return "manifest.json is no JSON object"


@pytest.mark.parametrize("how", ["a shard too many", "a shard too few", "another shard", "a changed byte", "no JSON"])
def test_no_score_of_a_split_that_is_not_what_the_manifest_says(
    refuses: Refuses, embedded_shards: Path, tmp_path: Path, minimal_artifact: Path, how: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(embedded_shards, folder)
    words = unlike_its_manifest(folder, "val", how)
    assert words in refuses(DATA, "eval", minimal_artifact, "--data", folder)


@pytest.mark.parametrize("how", ["a shard too many", "a shard too few", "another shard", "no JSON"])
def test_no_training_on_a_split_that_is_not_what_the_manifest_says(
    refuses: Refuses, embedded_shards: Path, tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(embedded_shards, folder)
    words = unlike_its_manifest(folder, "train", how)
    assert words in refuses(DATA, "train", *MINIMAL, "--data", folder, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_verifying_bare_shards_that_are_damaged_is_one_line(command: Callable[..., Any], shards: Path) -> None:
    damaged(shards, "val", "truncated")
    outcome = command("prepare", "--verify", shards)
    assert (outcome.code, outcome.err.count("\n")) == (DATA, 1)


def test_a_line_names_the_first_problems_of_many(command: Callable[..., Any], shards: Path) -> None:
    for number in range(9):
        (shards / f"fineweb_train_{number:06d}.bin").write_bytes(b"no shard")
    outcome = command("prepare", "--verify", shards)
    assert (outcome.code, outcome.err.count("\n")) == (DATA, 1)
    assert outcome.err.count("fineweb_train_") == 3
    assert re.search(r"and \d+ more \(--json has them all\)", outcome.err)
