"""The `.bjm` file on disk: written whole or not at all, nothing lost, and unusable paths in one line."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from bytejepa.artifact import container as container_module
from bytejepa.artifact.container import read_container, write_container
from bytejepa.errors import ArtifactError, ConfigError
from bytejepa.model.quantization import QuantizedMatrix
from example_container import CONFIGURATION, METADATA, assert_is_example, example_tensors


def write(path: Path, **options: Any) -> None:
    write_container(path, configuration=CONFIGURATION, tensors=example_tensors(), metadata=METADATA, **options)


def test_existing_output_is_refused_before_the_compression(tmp_path, monkeypatch):
    path = tmp_path / "model.bjm"
    path.write_text("precious")
    monkeypatch.setattr(container_module, "pack", None)
    with pytest.raises(ConfigError, match="exists already"):
        write(path)


def test_replacing_is_renaming_and_never_rewriting_in_place(tmp_path):
    path = tmp_path / "model.bjm"
    path.write_text("precious")
    (tmp_path / "link").hardlink_to(path)
    write(path, force=True)
    assert (tmp_path / "link").read_text() == "precious"


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    link, place = tmp_path / "latest.bjm", tmp_path / "elsewhere" / "model.bjm"
    place.parent.mkdir()
    link.symlink_to(place)
    write(link)
    write(link, force=True)
    assert link.is_symlink()
    assert read_container(place).info.file_bytes == place.stat().st_size
    assert [file.name for file in place.parent.iterdir()] == ["model.bjm"]


def test_existing_output_is_refused_without_force(tmp_path):
    path = tmp_path / "model.bjm"
    path.write_text("precious")
    with pytest.raises(ConfigError, match=r"model.bjm exists already .*force"):
        write(path)
    assert path.read_text() == "precious"
    write(path, force=True)
    assert_is_example(read_container(path))


@pytest.mark.parametrize("name", ["blocks.10.weight", "blocks.2.gain", "scalar"])
def test_what_does_not_decode_to_the_weights_never_takes_the_files_name(tmp_path, monkeypatch, name):
    path, encode = tmp_path / "model.bjm", container_module.container_to_bytes
    path.write_text("precious")

    def with_a_fault(*, tensors, **options: Any) -> bytes:
        changed = dict(tensors)
        weights = changed[name]
        if isinstance(weights, QuantizedMatrix):
            changed[name] = dataclasses.replace(weights, codes=weights.codes.flip(0))
        else:
            changed[name] = weights + 1
        return encode(tensors=changed, **options)

    monkeypatch.setattr(container_module, "container_to_bytes", with_a_fault)
    with pytest.raises(ArtifactError, match=f"tensor '{name}' does not come back"):
        write(path, force=True)
    assert path.read_text() == "precious"
    assert [file.name for file in tmp_path.iterdir()] == ["model.bjm"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "model.bjm"
    fsync = os.fsync

    def somebody_else_writes(descriptor: int) -> None:
        fsync(descriptor)
        path.write_text("precious")

    monkeypatch.setattr(container_module.os, "fsync", somebody_else_writes)
    with pytest.raises(ConfigError, match="exists already"):
        write(path)
    assert path.read_text() == "precious"
    assert [file.name for file in tmp_path.iterdir()] == ["model.bjm"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_or_none_to_write_in_is_refused_before_the_work(tmp_path, monkeypatch, force):
    monkeypatch.setattr(container_module, "pack", lambda *_, **__: pytest.fail("it packed"))
    with pytest.raises(ArtifactError, match=r"Is a directory .name a file"):
        write(tmp_path, force=force)
    with pytest.raises(ArtifactError, match=r"No such file or directory .make its folder first"):
        write(tmp_path / "none" / "model.bjm", force=force)


@pytest.mark.parametrize(
    ("problem", "raised", "match"),
    [
        (OSError(28, "No space left on device"), ArtifactError, "No space left on device .free some space"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_full_disk_or_interrupt_leaves_what_existed(tmp_path, monkeypatch, problem, raised, match):
    path = tmp_path / "model.bjm"
    path.write_text("precious")

    def fail(descriptor: int) -> None:
        raise problem

    monkeypatch.setattr(container_module.os, "fsync", fail)
    with pytest.raises(raised, match=match):
        write(path, force=True)
    assert path.read_text() == "precious"
    assert [file.name for file in tmp_path.iterdir()] == ["model.bjm"]


def test_the_file_is_synchronised_before_it_takes_its_name(tmp_path, monkeypatch):
    path = tmp_path / "model.bjm"
    fsync, present = os.fsync, []
    monkeypatch.setattr(container_module.os, "fsync", lambda d: (present.append(path.exists()), fsync(d)))
    write(path)
    assert present == [False, True]  # the file, then its folder


def test_paths_that_cannot_be_used_are_one_line(tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot write .*: No such file or directory"):
        write(tmp_path / "missing" / "model.bjm")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"cannot write .*: Not a directory"):
        write(tmp_path / "file" / "model.bjm")
    with pytest.raises(ArtifactError, match=r"cannot read .*: No such file or directory"):
        read_container(tmp_path / "missing.bjm")
    with pytest.raises(ArtifactError, match=r"cannot read .*: Is a directory"):
        read_container(tmp_path)
