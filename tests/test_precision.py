"""A model computes in bfloat16 on CUDA and in float32 elsewhere, unless it was trained or is asked to in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bytejepa
from bytejepa.artifact.export import export
from bytejepa.cli import main
from bytejepa.inference.engine import Engine
from bytejepa.inference.surprise import surprise
from bytejepa.model.precision import compute_dtype, on_device
from bytejepa.model.transformer import ByteLM
from bytejepa.report.measure import measure
from bytejepa.scoring.evaluate import Scorer, score_ids
from bytejepa.submission.program import packed_scorer
from bytejepa.training.distributed import Ranks
from bytejepa.training.runlog import RunFolder
from small_models import random_ids, small_model


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device that models say they are on and are not."""
    monkeypatch.setattr(ByteLM, "to", lambda model, _device: model)
    return "cuda"


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_bfloat16_is_for_cuda_alone(precision: str) -> None:
    assert compute_dtype(precision, "cpu") == torch.float32
    assert compute_dtype(precision, "cuda:1") == (torch.float32 if precision == "float32" else torch.bfloat16)


def test_a_model_computes_as_it_was_trained(pretended_gpu: str) -> None:
    for trained_in, dtype in (("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model = small_model(training={"precision": trained_in})
        assert on_device(model, pretended_gpu).compute_dtype == dtype
        assert on_device(model, pretended_gpu, precision="float32").compute_dtype == torch.float32
        assert on_device(model, "cpu").compute_dtype == torch.float32


def test_what_is_loaded_does(pretended_gpu: str, minimal_run: Path, minimal_artifact: Path) -> None:
    for path in (minimal_run, minimal_artifact):
        assert bytejepa.load(path, device=pretended_gpu).compute_dtype == torch.bfloat16
        assert bytejepa.load(path, device=pretended_gpu, precision="float32").compute_dtype == torch.float32
        assert bytejepa.load(path).compute_dtype == torch.float32


@pytest.fixture
def bfloat16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device would choose, on this machine."""
    monkeypatch.setattr("bytejepa.model.precision.compute_dtype", lambda _precision, _device: torch.bfloat16)


@pytest.mark.usefixtures("bfloat16_everywhere")
def test_whatever_scores_a_model_asks_for_its_precision(
    minimal_run: Path, minimal_artifact: Path, embedded_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[torch.dtype]()
    make = Scorer.__init__

    def noted(scorer: Scorer, model: ByteLM, **options: Any) -> None:
        seen.append(model.compute_dtype)
        make(scorer, model, **options)

    monkeypatch.setattr(Scorer, "__init__", noted)
    export(minimal_run, tmp_path / "model.bjm", score_bytes=200)
    measure(minimal_run, score_bytes=200)
    main(["eval", str(minimal_artifact), "--data", str(embedded_shards), "--max-bytes", "200", "--json"])
    packed_scorer(minimal_artifact, RunFolder(minimal_run).read_config(), Ranks())
    assert len(seen) == 8  # raw, average and artifact twice, and one each
    assert set(seen) == {torch.bfloat16}


TEXT = b"It was a bright cold day in April, and the clocks were striking thirteen."
EVERYTHING = {
    "model": {
        "document_masking": True, "attention_windows": (16, 0, 16), "ngram_orders": (3, 4), "ngram_rows": 64, "ngram_dim": 4,
        "chunk_blocks": (0, 1), "chunk_stride_bytes": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("sections", [{}, EVERYTHING])
def test_every_way_to_predict_computes_in_bfloat16(sections: dict[str, Any]) -> None:
    model = small_model(**sections)
    ids = random_ids(1, 200, documents=True)
    stored = ids[0].numpy().astype(np.uint16)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        score = score_ids(Scorer(model), stored, window=64, stride=16, batch_ids=256)
        engine = Engine(model, window=64)
        results[dtype] = score.bpb, engine.feed(engine.start(), ids[:, :100]), surprise(model, TEXT).bits
    (bpb, logits, bits), expected = results[torch.bfloat16], results[torch.float32]
    assert bpb != expected[0]
    assert bpb == pytest.approx(expected[0], abs=0.02)
    assert logits.dtype == torch.float32
    assert float((logits - expected[1]).abs().mean()) < 0.1
    assert np.abs(bits - expected[2]).mean() < 0.1
