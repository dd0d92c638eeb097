"""What data a study reads: shards by their content, the embedded corpus where none are named, a split that is too short."""

import shutil
from pathlib import Path

from bytejepa.study.plan import override
from bytejepa.study.runner import run_study
from bytejepa.training.runlog import RunFolder
from study.plans import small_plan


def test_other_data_has_other_fingerprints(tmp_path: Path, embedded_shards: Path) -> None:
    from bytejepa.study.environment import data_sha256

    bare = tmp_path / "bare"
    bare.mkdir()
    for shard in embedded_shards.glob("*.bin"):
        shutil.copy(shard, bare)
    assert data_sha256(bare) == data_sha256(embedded_shards)  # with a manifest or without
    shard = next(bare.glob("*train*.bin"))
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    assert data_sha256(bare) != data_sha256(embedded_shards)


def test_without_data_the_embedded_corpus_is_written_into_the_study(tmp_path: Path) -> None:
    plan = override(small_plan(), steps=1, seeds=(1,))
    study = run_study(plan, tmp_path / "study")
    assert study.data_path == "data"
    assert (tmp_path / "study" / "data" / "manifest.json").is_file()
    assert all(RunFolder(tmp_path / "study" / run.run).read_metrics() for run in study.runs)


def test_a_split_shorter_than_the_plan_asks_for_is_noted(tmp_path: Path, tiny_shards: Path) -> None:
    asked = {"window_bytes": 64, "stride_bytes": 32, "validation_bytes": 10**9}
    study = run_study(small_plan(evaluation=asked, seeds=[1]), tmp_path / "study", data=tiny_shards)
    notes = [note for note in study.notes if "of the plan" in note]
    assert len(notes) == 1
    assert "fewer than the 1,000,000,000 of the plan" in notes[0]
