"""Exports: the artifact is the average, within quantisation; sizes add up; what cannot be stored is refused."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import bytejepa
from bytejepa import presets
from bytejepa.artifact.container import read_container, write_container
from bytejepa.artifact.export import export
from bytejepa.artifact.load import build, load, read_run
from bytejepa.artifact.packing import restore
from bytejepa.artifact.store import code_archive, code_bytes, store_weights
from bytejepa.artifact.write import write_artifact
from bytejepa.config import RunConfig, replace
from bytejepa.config_json import to_dict
from bytejepa.data.loader import validation_ids
from bytejepa.errors import ArtifactError, CheckpointError, ConfigError, DataError
from bytejepa.model.quantization import dequantize, quantize_rows, reference_int6, reference_int8, stored_bits
from bytejepa.model.transformer import ByteLM
from bytejepa.report.measure import measure
from bytejepa.training import checkpoint
from small_models import random_ids, small_config, small_model

TEXT = b"The state of the Union is strong. " * 20


def weights_of(model: ByteLM) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def test_what_is_reloaded_is_what_was_scored(tmp_path: Path, minimal_run: Path, embedded_shards: Path) -> None:
    out = tmp_path / "model.bjm"
    result = export(minimal_run, out, score_bytes=600, stride=16)
    trained = read_run(minimal_run)
    average, raw = trained.average, trained.raw
    assert set(result.scores) == {"raw", "average", "artifact"}
    ids = validation_ids(embedded_shards, 600)
    assert all(score.num_targets == len(ids) - 1 == 599 for score in result.scores.values())
    by_hand = bytejepa.scoring.evaluate.score_ids(
        bytejepa.scoring.evaluate.Scorer(load(out)), ids, window=64, stride=16, batch_ids=65_536
    )
    assert result.scores["artifact"].bpb == pytest.approx(by_hand.bpb, rel=1e-12)
    assert result.scores["artifact"].bpb == pytest.approx(result.scores["average"].bpb, abs=0.01)
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    assert result.scores["raw"].bpb != result.scores["average"].bpb


def test_a_reloaded_artifact_computes_the_same_logits_bit_for_bit(tmp_path: Path) -> None:
    model = small_model()
    path = tmp_path / "model.bjm"
    write_artifact(path, weights_of(model), model.config)
    stored = read_container(path).tensors
    in_memory = build(model.config, stored, source="memory")
    ids = random_ids(2, 24)
    with torch.no_grad():
        assert torch.equal(load(path).logits(ids), in_memory.logits(ids))
        assert torch.equal(load(path).logits(ids), load(path).logits(ids))
    for name, value in weights_of(model).items():
        assert (stored[name] - value).abs().max() <= 0.02 * value.abs().max() + 1e-6, name


def test_an_artifact_carries_its_configuration(
    tmp_path: Path, minimal_artifact: Path, minimal_config: RunConfig
) -> None:
    assert load(minimal_artifact).config == minimal_config


def test_a_run_folder_loads_as_its_average(minimal_run: Path) -> None:
    average = read_run(minimal_run).average
    assert all(torch.equal(value, average[name]) for name, value in load(minimal_run).named_parameters())


def test_loaded_models_are_ready_to_predict(minimal_artifact: Path) -> None:
    model = load(minimal_artifact)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_sizes_add_up(tmp_path: Path, minimal_run: Path) -> None:
    out = tmp_path / "model.bjm"
    result = export(minimal_run, out, score=False)
    assert result.weights_bytes == out.stat().st_size
    assert result.total_bytes == result.weights_bytes + result.code_bytes
    assert result.code_bytes == len(code_archive())
    assert result.bits_per_parameter == pytest.approx(8 * result.weights_bytes / result.num_parameters)
    assert result.num_parameters == sum(p.numel() for p in load(out).parameters())
    assert result.scores == {}
    assert result.fits


def test_the_budget_is_kept_to_the_byte(tmp_path: Path, minimal_run: Path) -> None:
    result = export(minimal_run, tmp_path / "model.bjm", score=False)
    assert dataclasses.replace(result, limit_bytes=result.total_bytes).fits
    assert not dataclasses.replace(result, limit_bytes=result.total_bytes - 1).fits


def test_the_code_is_the_same_bytes_every_time_and_can_be_imported(tmp_path: Path) -> None:
    archive = code_archive()
    assert archive == code_archive()
    path = tmp_path / "code.zip"
    path.write_bytes(archive)
    with zipfile.ZipFile(path) as code:
        names = code.namelist()
    assert "bytejepa/model/transformer.py" in names
    assert all(name.endswith(".py") for name in names)
    source, zipped = code_bytes()
    assert zipped == len(archive) < source


def test_exports_of_a_run_are_the_same_bytes(tmp_path: Path, minimal_run: Path) -> None:
    files = [tmp_path / name for name in ("a.bjm", "b.bjm")]
    for path in files:
        export(minimal_run, path, score=False)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_schemes_of_the_reference() -> None:
    """Spec section 5: up to 65,536 elements float16, block matrices int6, other large tensors int8."""
    with torch.device("meta"):
        model = ByteLM(presets.pr832())
    config = model.config.artifact
    bits = {name: stored_bits(name, value, config) for name, value in model.named_parameters()}
    ends = ("query", "key", "value", "output", "mlp.up", "mlp.down")
    assert {name for name, b in bits.items() if b == 6} == {
        f"blocks.{i}.{'' if end.startswith('mlp') else 'attention.'}{end}.weight" for i in range(13) for end in ends
    }
    assert {name for name, b in bits.items() if b == 8} == {
        "token_embedding.weight", "bigram.embedding.weight", "jepa.projector.up.weight", "jepa.injection.weight",
    }  # fmt: skip
    assert bits["jepa.predictor.up.weight"] is None  # float16: exactly 65,536 elements


def test_schemes_of_default() -> None:
    with torch.device("meta"):
        model = ByteLM(replace(presets.default(), model={"num_layers": 24}))
    bits = {name: stored_bits(name, v, model.config.artifact) for name, v in model.named_parameters()}
    assert bits["jepa.predictor.up.weight"] == 8
    assert bits["blocks.0.mlp.up.weight"] == 6
    vectors = {name for name, value in model.named_parameters() if value.ndim < 2}
    stacks = {name for name in bits if name.endswith(("residual_mix", "skip_weights"))}
    assert {bits[name] for name in vectors | stacks} == {None}


def test_scales_of_the_reference_have_a_floor_and_those_of_default_do_not() -> None:
    weight = 0.01 * torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    tensors = {"blocks.0.mlp.up.weight": weight, "token_embedding.weight": weight}
    theirs = store_weights(tensors, presets.pr832())
    assert torch.equal(theirs["blocks.0.mlp.up.weight"].codes, reference_int6(weight).codes)
    assert torch.equal(theirs["token_embedding.weight"].codes, reference_int8(weight).codes)
    assert set(theirs["blocks.0.mlp.up.weight"].scales.tolist()) == {torch.tensor(1 / 31).half().item()}
    ours = store_weights(tensors, presets.default())["blocks.0.mlp.up.weight"]
    assert ours.scales.max().item() < 0.01 * 5 / 31
    plain = quantize_rows(weight, bits=6)
    errors = [(dequantize(q) - weight).norm().item() for q in (ours, plain, theirs["blocks.0.mlp.up.weight"])]
    assert errors == sorted(errors)
    assert errors[2] > 10 * errors[0]


@pytest.mark.parametrize("bits", [4, 5])
def test_fewer_bits_make_a_smaller_file(tmp_path: Path, bits: int) -> None:
    model = small_model()
    sizes = [
        write_artifact(tmp_path / f"{b}.bjm", weights_of(model), replace(model.config, artifact={
            "matrix_bits": b, "small_tensor_elements": 64})).file_bytes
        for b in (bits, 6)
    ]  # fmt: skip
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    model, out = small_model(), tmp_path / "model.bjm"
    weights = weights_of(model)
    for name in ("blocks.1.mlp.up.weight", "smear.gate"):
        broken = {**weights, name: torch.full_like(weights[name], value)}
        for config in (model.config, presets.compact(model.config)):  # the latter runs the model first
            with pytest.raises(ArtifactError, match=name):
                write_artifact(out, broken, config, sequences=random_ids(2, 24).numpy())
    assert list(tmp_path.iterdir()) == []


def test_extra_heads_are_not_in_the_artifact(tmp_path: Path) -> None:
    model = small_model(model={"multi_token_heads": 2}, jepa={"horizons": 3, "next_bytes_weight": 0.1})
    path = tmp_path / "model.bjm"
    write_artifact(path, weights_of(model), model.config)
    plain = dict(small_model().named_parameters())
    assert set(read_container(path).tensors) == set(plain)
    again = load(path)
    assert again.config.model.multi_token_heads == 0
    assert (again.config.jepa.horizons, again.config.jepa.next_bytes_weight) == (1, 0)
    ids = random_ids(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(again.logits(ids), model.logits(ids), rtol=0, atol=2.0)


def test_an_existing_output_is_refused_and_kept(tmp_path: Path, minimal_run: Path) -> None:
    out = tmp_path / "model.bjm"
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        export(minimal_run, out, score=False)
    assert out.read_bytes() == b"mine"
    assert export(minimal_run, out, score=False, force=True).weights_bytes == out.stat().st_size


def test_data_that_is_gone_is_noticed_before_anything_is_written(tmp_path: Path, minimal_run: Path) -> None:
    with pytest.raises(DataError):
        export(minimal_run, tmp_path / "model.bjm", data=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "jepa",
    [
        {"inject": False},
        {"inject": False, "losses": False, "next_bytes_weight": 0.1},
        {"inject": False, "horizons": 2, "context": "causal"},
    ],
)
def test_what_no_logit_depends_on_is_in_no_artifact(jepa, tmp_path: Path) -> None:
    model = small_model(jepa=jepa)
    path = tmp_path / "model.bjm"
    write_artifact(path, weights_of(model), model.config)
    assert not [name for name in read_container(path).tensors if name.startswith("jepa.")]
    loaded, ids = load(path), random_ids(2, 24)
    rounded = build(
        model.config,
        {n: restore(w) for n, w in store_weights(weights_of(model), model.config).items()},
        source="memory",
    )
    assert torch.equal(loaded.logits(ids), rounded.logits(ids))


def test_an_artifact_of_before_that_holds_more_is_read(tmp_path: Path) -> None:
    model = small_model(jepa={"inject": False})
    everything = store_weights(weights_of(model), replace(model.config, jepa={"inject": True}))
    assert "jepa.injection.weight" in everything
    path = tmp_path / "model.bjm"
    write_container(path, configuration=to_dict(model.config), tensors=everything, metadata={})
    assert load(path).jepa is None


@pytest.mark.parametrize("recorded", [{}, {"path": 3}])
def test_a_run_that_does_not_say_where_its_shards_are(minimal_run: Path, tmp_path: Path, refuses, recorded) -> None:
    run = shutil.copytree(minimal_run, tmp_path / "run")
    manifest = run / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "data": recorded}))
    author = ("--author", "A. Name", "--github-id", "aname")
    for words in (
        ("export", run, "-o", tmp_path / "m.bjm"),
        ("report", run, "-o", tmp_path / "r.html"),
        ("submission", run, "-o", tmp_path / "submission", *author),
        ("train", "--resume", run),
    ):
        assert "manifest.json does not say where the shards are: expected data.path" in refuses(4, *words)


def test_weights_and_average_are_of_one_checkpoint(minimal_run: Path, tmp_path: Path, monkeypatch) -> None:
    reads, read = list[Path](), checkpoint.read_newest
    monkeypatch.setattr(checkpoint, "read_newest", lambda folder: reads.append(folder) or read(folder))
    export(minimal_run, tmp_path / "m.bjm", score_bytes=200)
    assert len(reads) == 1, "while the run goes on, two reads may find two checkpoints"
    measure(minimal_run, score_bytes=200)
    assert len(reads) == 2


def test_a_damaged_checkpoint_gives_way_to_the_one_before_or_an_error(tmp_path: Path, minimal_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(minimal_run, run)
    for path in (run / "checkpoints").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        export(run, tmp_path / "model.bjm")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        export(run, tmp_path / "model.bjm")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("smear.gate"), "tensor smear.gate: expected shape .32,., got nothing"),
        (lambda w: w.update({"smear.gate": torch.ones(3)}), "smear.gate: expected shape .32,., got .3,."),
        (lambda w: w.update({"other": torch.ones(3)}), "tensor other has no place"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    weights = weights_of(small_model())
    change(weights)
    path = tmp_path / "model.bjm"
    write_artifact(path, weights, small_config())
    with pytest.raises(ArtifactError, match=words):
        load(path)


def test_a_model_of_one_layer_can_be_stored(tmp_path: Path) -> None:
    model = small_model(model={"num_layers": 1})
    write_artifact(tmp_path / "model.bjm", weights_of(model), model.config)
    assert bytejepa.score(load(tmp_path / "model.bjm"), TEXT[:50]).num_bytes == 50
