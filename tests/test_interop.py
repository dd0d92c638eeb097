"""The reference's own files: read without executing anything, refused when wrong, written as our artifact."""

import io
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

import bytejepa
from bytejepa.artifact.container import read_container
from bytejepa.artifact.load import load
from bytejepa.errors import ArtifactError, ConfigError
from bytejepa.interop import pr832
from bytejepa.model.quantization import dequantize, reference_int6, reference_int8
from reference_weights import golden, reference_state_dict, sigreg_directions

SMALL = golden("small")[0]["config"]
WIDE = {**SMALL, "num_layers": 1, "model_dim": 264, "xsa_last_n": 1, "jepa_latent_dim": 40, "bigram_vocab_size": 4400}
"""Wide enough that its matrices are over the reference's limit of 65,536 elements: these are quantised."""
SETTINGS = {"xsa_last_n": 1, "rope_dims": 8, "jepa_chunk_size": 8}
TEXT = b"We the People of the United States, in Order to form a more perfect Union, establish Justice" * 3


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def quantised(state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the reference's export makes of a state dict (spec section 5)."""
    weights, kinds = {}, {}
    for name, value in state_dict.items():
        if value.numel() <= 65_536:
            control = value.ndim < 2 or name.endswith(("resid_mix", "skip_weights"))
            weights[name] = value if control else value.half()
            kinds[name] = "passthrough_ctrl" if control else "passthrough"
            continue
        int6 = name.startswith("blocks.")
        rows = (reference_int6 if int6 else reference_int8)(value)
        weights[name + ".q"], weights[name + ".scale"] = rows.codes, rows.scales
        kinds[name] = {"type": "int6" if int6 else "int8"}
    return {"w": weights, "m": kinds}


def compressed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=22).compress(data)


@pytest.fixture(scope="module")
def wide() -> dict[str, torch.Tensor]:
    state_dict = reference_state_dict(WIDE)
    # weights of a trained size: the floor of 1/31 then acts on some rows, not on others
    return {name: value * (0.5 if value.ndim == 2 else 1) for name, value in state_dict.items()}


def test_a_state_dict_comes_back_as_it_was(tmp_path: Path) -> None:
    state_dict = reference_state_dict(SMALL)
    path = tmp_path / "final_model.pt"
    path.write_bytes(saved({**state_dict, "jepa_sigreg.directions": sigreg_directions(32)}))
    loaded = pr832.load_state_dict_file(path)
    assert loaded.keys() == state_dict.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state_dict.items())


def test_bfloat16_weights_become_float32(tmp_path: Path) -> None:
    path = tmp_path / "final_model.pt"
    path.write_bytes(saved({name: v.bfloat16() for name, v in reference_state_dict(SMALL).items()}))
    assert {v.dtype for v in pr832.load_state_dict_file(path).values()} == {torch.float32}


@pytest.mark.parametrize("compress", [compressed, zlib.compress, bytes], ids=["zstd", "zlib", "none"])
def test_a_quantised_file_is_dequantised(tmp_path: Path, wide: dict[str, torch.Tensor], compress: Any) -> None:
    path = tmp_path / "final_model.int6.ptz"
    path.write_bytes(compress(saved(quantised(wide))))
    loaded = pr832.load_state_dict_file(path)
    assert loaded.keys() == wide.keys()
    name = "blocks.0.mlp.fc.weight"
    assert torch.equal(loaded[name], dequantize(reference_int6(wide[name])))
    assert torch.equal(loaded["tok_emb.weight"], dequantize(reference_int8(wide["tok_emb.weight"])))
    assert torch.equal(loaded["blocks.0.attn_scale"], wide["blocks.0.attn_scale"])


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", [saved, pickle.dumps, lambda value: compressed(saved({"w": value, "m": {}}))])
def test_code_in_a_file_is_not_executed(tmp_path: Path, wrap: Any) -> None:
    path, proof = tmp_path / "final_model.pt", tmp_path / "executed"
    path.write_bytes(wrap(Exploit(proof)))
    with pytest.raises(ArtifactError, match="nothing in it was executed") as refused:
        pr832.load_state_dict_file(path)
    assert not proof.exists()
    assert "\n" not in str(refused.value)
    assert "weights_only" not in str(refused.value)  # torch's own text, which tells how to run the code after all


NOT_MODELS: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "cut zstd": compressed(b"x" * 5000)[:20],
    "cut zlib": zlib.compress(b"x" * 5000)[:20],
    "zstd of nothing": compressed(b"junk"),
    "a tensor": saved(torch.ones(3)),
    "a list": saved([torch.ones(3)]),
    "numbers": saved({"a": 1}),
    "numbered tensors": saved({1: torch.ones(3)}),
    "no tensors": saved({}),
    "w is no dict": saved({"w": 1, "m": {}}),
    "m is no dict": saved({"w": {}, "m": [1]}),
    "w holds numbers": saved({"w": {"a": 3}, "m": {"a": "passthrough"}}),
    "missing tensor": saved({"w": {}, "m": {"a": "passthrough"}}),
    "unknown kind": saved({"w": {"a": torch.ones(3)}, "m": {"a": "int4"}}),
    "scales of other rows": saved(
        {"w": {"a.q": torch.ones(3, 4), "a.scale": torch.ones(2)}, "m": {"a": {"type": "int6"}}}
    ),
    **{
        f"quantised: {name}": saved({"w": {"a.q": codes, "a.scale": scales}, "m": {"a": kind}})
        for name, codes, scales, kind in (
            ("codes of halves", torch.full((3, 4), 0.5), torch.ones(3), {"type": "int6"}),
            ("a negative scale", torch.ones(3, 4, dtype=torch.int8), -torch.ones(3), {"type": "int6"}),
            ("int4", torch.ones(3, 4, dtype=torch.int8), torch.ones(3), {"type": "int4"}),
            ("no type", torch.ones(3, 4, dtype=torch.int8), torch.ones(3), {}),
        )
    },
    **{
        f"smear gate: {name}": saved({**reference_state_dict(SMALL), "smear.gate": value})
        for name, value in (
            ("nowhere", torch.ones(64, device="meta")),
            ("sparse", torch.ones(64).to_sparse()),
            ("complex", torch.ones(64, dtype=torch.complex64)),
            ("whole numbers", torch.ones(64, dtype=torch.int8)),
        )
    },
    "other names": saved({"weight": torch.ones(3)}),
    "embedding is no matrix": saved({**reference_state_dict(SMALL), "tok_emb.weight": torch.ones(3)}),
    "embedding of nothing": saved({**reference_state_dict(SMALL), "tok_emb.weight": torch.ones(260, 0)}),
    "no projector": saved({k: v for k, v in reference_state_dict(SMALL).items() if "projector" not in k}),
    "a matrix too few": saved({k: v for k, v in reference_state_dict(SMALL).items() if "2.mlp.fc" not in k}),
    "an unknown tensor": saved({**reference_state_dict(SMALL), "blocks.0.mlp.gate": torch.ones(3)}),
    "another shape": saved({**reference_state_dict(SMALL), "smear.gate": torch.ones(3)}),
    "another vocabulary": saved({**reference_state_dict(SMALL), "tok_emb.weight": torch.ones(1024, 64)}),
}


def test_a_flipped_byte_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    path, whole = tmp_path / "final_model.pt", bytearray(saved(reference_state_dict(SMALL)))
    numbers = reference_state_dict(SMALL)["tok_emb.weight"].numpy().tobytes()[:64]
    whole[whole.index(numbers) + 10] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ArtifactError, match=r"damaged: the checksum of .*data/.* differs"):
        pr832.load_state_dict_file(path)


@pytest.mark.parametrize("claimed_bytes", [1 << 33, 1 << 40, 1 << 62])
def test_a_zstd_frame_is_not_believed_in_its_size(tmp_path: Path, claimed_bytes: int) -> None:
    path = tmp_path / "final_model.int6.ptz"
    frame_header = b"\x28\xb5\x2f\xfd\xe0" + claimed_bytes.to_bytes(8, "little")
    path.write_bytes(frame_header + b"\x01\x00\x00")
    with pytest.raises(ArtifactError, match="unpacks to more than"):
        pr832.load_state_dict_file(path)


def test_zlib_data_are_unpacked_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "final_model.int6.ptz"
    path.write_bytes(zlib.compress(bytes(100_000)))
    monkeypatch.setattr(pr832, "_MAX_FILE_BYTES", 10_000)
    with pytest.raises(ArtifactError, match="unpacks to more than 10,000 bytes"):
        pr832.load_state_dict_file(path)


@pytest.mark.parametrize("case", NOT_MODELS)
def test_what_is_no_model_of_the_reference_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    path, out = tmp_path / "final_model.pt", tmp_path / "model.bjm"
    path.write_bytes(NOT_MODELS[case])
    with pytest.raises((ArtifactError, ConfigError)) as refused:
        pr832.convert(path, out)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*nowhere\.pt: No such file"):
        pr832.load_state_dict_file(tmp_path / "nowhere.pt")


def test_the_configuration_follows_from_the_shapes() -> None:
    implied = pr832.config_of_state_dict(reference_state_dict(SMALL))
    assert {**SMALL, **implied} == {**SMALL, "jepa_chunk_size": 8}
    no_jepa = golden("no_jepa")[0]["config"]
    assert pr832.config_of_state_dict(reference_state_dict(no_jepa))["jepa_chunk_size"] == 0


def test_a_chunk_size_without_jepa_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "final_model.pt"
    source.write_bytes(saved(reference_state_dict(golden("no_jepa")[0]["config"])))
    with pytest.raises(ConfigError, match=r"has no JEPA: .* \(leave out --jepa-chunk-size\)"):
        pr832.convert(source, tmp_path / "model.bjm", settings=SETTINGS)


def test_a_converted_model_scores_the_same(tmp_path: Path, wide: dict[str, torch.Tensor]) -> None:
    source, out = tmp_path / "final_model.pt", tmp_path / "model.bjm"
    source.write_bytes(saved(wide))
    info = pr832.convert(source, out, settings=SETTINGS)
    assert info.file_bytes == out.stat().st_size
    ours = bytejepa.score(load(out), TEXT).bpb
    assert ours == pytest.approx(bytejepa.score(pr832.build({**WIDE, **SETTINGS}, wide), TEXT).bpb, abs=0.2)
    source.write_bytes(saved(quantised(wide)))  # what the reference itself would have scored after its round trip
    rounded = pr832.build({**WIDE, **SETTINGS}, pr832.load_state_dict_file(source))
    assert ours == pytest.approx(bytejepa.score(rounded, TEXT).bpb, abs=1e-4)
    assert read_container(out).metadata == {"imported_from": "final_model.pt"}


def test_codes_of_a_quantised_file_stay_the_same_codes(tmp_path: Path, wide: dict[str, torch.Tensor]) -> None:
    source, out = tmp_path / "final_model.int6.ptz", tmp_path / "model.bjm"
    contents = quantised(wide)
    source.write_bytes(compressed(saved(contents)))
    pr832.convert(source, out, settings=SETTINGS)
    stored = read_container(out).stored
    compared = 0
    for name, kind in contents["m"].items():
        if isinstance(kind, dict):
            rows = stored[pr832.our_name(name)]
            assert torch.equal(rows.codes, contents["w"][name + ".q"]), name
            torch.testing.assert_close(rows.scales, contents["w"][name + ".scale"], rtol=1e-3, atol=0)
            compared += 1
    assert compared == 6
    ours = bytejepa.score(load(out), TEXT).bpb
    theirs = pr832.build({**WIDE, **SETTINGS}, pr832.load_state_dict_file(source))
    assert ours == pytest.approx(bytejepa.score(theirs, TEXT).bpb, abs=1e-4)


def test_names_go_both_ways() -> None:
    model = pr832.build(SMALL, reference_state_dict(SMALL))
    parameters = pr832.reference_parameters(model)
    assert parameters.keys() == reference_state_dict(SMALL).keys()
    ours = dict(model.named_parameters())
    assert all(parameters[name] is ours[pr832.our_name(name)] for name in parameters)


def test_build_refuses_what_does_not_fit() -> None:
    state_dict = reference_state_dict(SMALL)
    with pytest.raises(ArtifactError, match=r"smear\.gate: expected shape \(64,\), got \(3,\)"):
        pr832.build(SMALL, {**state_dict, "smear.gate": torch.ones(3)})
    with pytest.raises(ArtifactError, match=r"'smear\.gates' is not a parameter of the reference"):
        pr832.build(SMALL, {**state_dict, "smear.gates": torch.ones(3)})
    with pytest.raises(ArtifactError, match=r"lacks 1 tensors, among them smear\.gate"):
        pr832.build(SMALL, {k: v for k, v in state_dict.items() if k != "smear.gate"})
    with pytest.raises(ConfigError, match="unknown setting of the reference: 'num_layer'"):
        pr832.build({**SMALL, "num_layer": 3}, state_dict)
    with pytest.raises(ArtifactError, match="has no place in a model of this configuration"):
        pr832.build({**SMALL, "jepa_chunk_size": 0}, state_dict)
    with pytest.raises(ConfigError, match="sigreg_directions: expected 32 rows, got 12"):
        pr832.build(SMALL, state_dict, sigreg_directions(12))


def test_settings_are_the_references_environment_variables() -> None:
    config = pr832.run_config({"NUM_LAYERS": 6, "ROPE_DIMS": 0, "BIGRAM_VOCAB_SIZE": 0, "JEPA_CHUNK_SIZE": 16})
    assert (config.model.num_layers, config.model.rotary_dims, config.model.bigram_rows) == (6, None, None)
    assert config.jepa.chunk_bytes == 16
    assert pr832.run_config({"jepa_chunk_size": 12}).evaluation.stride_bytes % 12 == 0
    ramp = pr832.run_config({"jepa_phase1_frac": 0.1, "jepa_phase2_frac": 0.4}).jepa
    assert (ramp.lambda_zero_until, ramp.lambda_ramp_until) == pytest.approx((0.1, 0.5))


def test_the_state_dict_is_copied() -> None:
    state_dict = reference_state_dict(SMALL)
    model = pr832.build(SMALL, state_dict)
    before = model.smear.gate.detach().clone()
    state_dict["smear.gate"].zero_()
    assert torch.equal(model.smear.gate, before)


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "final_model.pt", tmp_path / "model.bjm"
    source.write_bytes(saved(reference_state_dict(SMALL)))
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        pr832.convert(source, out)
    assert out.read_bytes() == b"mine"
    pr832.convert(source, out, force=True)
    assert load(out).config.model.model_dim == 64
