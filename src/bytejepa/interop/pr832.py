"""The reference's own files and names (openai/parameter-golf PR #832).

`build` makes a ByteLM from the reference's configuration keys and state dict; `reference_parameters` gives the way back.
`load_state_dict_file` reads `final_model.pt` and `final_model.int6.ptz` through torch's restricted unpickler: tensors,
numbers, strings and containers only, so no code in the file can run.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import zstandard
from jaxtyping import Float
from torch import Tensor, nn

from bytejepa import presets
from bytejepa.artifact.container import ContainerInfo
from bytejepa.artifact.write import write_artifact
from bytejepa.config import RunConfig, replace
from bytejepa.errors import ArtifactError, ConfigError, file_errors_as
from bytejepa.model.initialization import fill_sigreg_directions
from bytejepa.model.transformer import ByteLM

_MODEL_KEYS = {
    "num_layers": "num_layers",
    "model_dim": "model_dim",
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "mlp_mult": "mlp_ratio",
    "bigram_vocab_size": "bigram_rows",
    "bigram_dim": "bigram_dim",
    "xsa_last_n": "xsa_last_layers",
    "rope_dims": "rotary_dims",
    "ln_scale": "depth_scaled_norm",
    "qk_gain_init": "query_gain",
    "logit_softcap": "logit_softcap",
    "rope_base": "rotary_base",
    "train_seq_len": "rotary_length_bytes",
    "tied_embed_init_std": "embedding_std",
}
_JEPA_KEYS = {
    "jepa_chunk_size": "chunk_bytes",
    "jepa_latent_dim": "latent_dim",
    "jepa_proj_hidden": "hidden_dim",
    "jepa_sigreg_projs": "sigreg_directions",
    "jepa_sigreg_knots": "sigreg_knots",
    "jepa_lambda_max": "lambda_max",
    "jepa_sigreg_weight": "sigreg_weight",
    "jepa_phase1_frac": "lambda_zero_until",
    "jepa_phase2_frac": "lambda_ramp_until",  # the length of the ramp, made its end in `run_config`
}
_MAX_FILE_BYTES = 1 << 30
"""Ten times the reference's weights in float32."""
_IGNORED_KEYS = {"vocab_size", "jepa_lr"}

_OURS_FROM_REFERENCE = [
    (r"tok_emb\.weight", "token_embedding.weight"),
    (r"bigram\.embed\.weight", "bigram.embedding.weight"),
    (r"bigram\.proj\.weight", "bigram.projection.weight"),
    (r"bigram\.scale", "bigram.scale"),
    (r"smear\.gate", "smear.gate"),
    (r"skip_weights", "skip_weights"),
    (r"blocks\.(\d+)\.attn_scale", r"blocks.\1.attention_scale"),
    (r"blocks\.(\d+)\.mlp_scale", r"blocks.\1.mlp_scale"),
    (r"blocks\.(\d+)\.resid_mix", r"blocks.\1.residual_mix"),
    (r"blocks\.(\d+)\.attn\.c_q\.weight", r"blocks.\1.attention.query.weight"),
    (r"blocks\.(\d+)\.attn\.c_k\.weight", r"blocks.\1.attention.key.weight"),
    (r"blocks\.(\d+)\.attn\.c_v\.weight", r"blocks.\1.attention.value.weight"),
    (r"blocks\.(\d+)\.attn\.proj\.weight", r"blocks.\1.attention.output.weight"),
    (r"blocks\.(\d+)\.attn\.q_gain", r"blocks.\1.attention.query_gain"),
    (r"blocks\.(\d+)\.mlp\.fc\.weight", r"blocks.\1.mlp.up.weight"),
    (r"blocks\.(\d+)\.mlp\.proj\.weight", r"blocks.\1.mlp.down.weight"),
    (r"jepa_projector\.fc1\.weight", "jepa.projector.up.weight"),
    (r"jepa_projector\.fc2\.weight", "jepa.projector.down.weight"),
    (r"jepa_predictor\.start_token", "jepa.start"),
    (r"jepa_predictor\.fc1\.weight", "jepa.predictor.up.weight"),
    (r"jepa_predictor\.fc2\.weight", "jepa.predictor.down.weight"),
    (r"jepa_injection\.weight", "jepa.injection.weight"),
]


def our_name(reference_name: str) -> str:
    """Return this project's name of the reference's parameter. Raises: ArtifactError if it has none."""
    for pattern, replacement in _OURS_FROM_REFERENCE:
        match = re.fullmatch(pattern, reference_name)
        if match:
            return match.expand(replacement)
    raise ArtifactError(f"{reference_name!r} is not a parameter of the reference", hint="is this a PR #832 state dict?")


def run_config(config: Mapping[str, Any]) -> RunConfig:
    """Return preset `pr832` with the reference's own settings (its environment variables, in either case) applied.

    A zero means off where the reference says so: bigram_vocab_size, jepa_chunk_size; rope_dims 0 is all dimensions.
    Raises: ConfigError for a key the reference does not have.
    """
    model: dict[str, Any] = {}
    jepa: dict[str, Any] = {"sigreg_group_sequences": None}
    for key, value in ((key.lower(), value) for key, value in config.items()):
        if key in _MODEL_KEYS:
            model[_MODEL_KEYS[key]] = value
        elif key in _JEPA_KEYS:
            jepa[_JEPA_KEYS[key]] = value
        elif key not in _IGNORED_KEYS:
            raise ConfigError(
                f"unknown setting of the reference: {key!r}", hint=f"known: {', '.join([*_MODEL_KEYS, *_JEPA_KEYS])}"
            )
    model["depth_scaled_norm"] = bool(model.get("depth_scaled_norm", True))
    for off_at_zero in ("bigram_rows", "rotary_dims"):
        if model.get(off_at_zero) == 0:
            model[off_at_zero] = None
    base = presets.pr832()
    if {"lambda_zero_until", "lambda_ramp_until"} & set(jepa):
        begin = jepa.get("lambda_zero_until", base.jepa.lambda_zero_until)
        length = jepa.get("lambda_ramp_until", base.jepa.lambda_ramp_until - base.jepa.lambda_zero_until)
        jepa["lambda_ramp_until"] = min(1.0, begin + length)
    if not config.get("jepa_chunk_size", config.get("JEPA_CHUNK_SIZE", 8)):
        return replace(base, model=model, jepa={"enabled": False})
    chunk = jepa.get("chunk_bytes", base.jepa.chunk_bytes)
    stride = max(chunk, base.evaluation.stride_bytes // chunk * chunk)
    evaluation = {"stride_bytes": stride, "window_bytes": base.evaluation.window_bytes // chunk * chunk}
    return replace(base, model=model, jepa=jepa, evaluation=evaluation)


def build(
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    sigreg_directions: Float[Tensor, "Z S"] | None = None,
) -> ByteLM:
    """Return a float32 ByteLM with the reference's weights.

    `config` has the reference's keys (num_layers, model_dim, ..., jepa_chunk_size 0 for no JEPA), `state_dict` its tensor
    names; `sigreg_directions` are unit columns, drawn from seed 1337 when left out.
    Raises: ConfigError for an unknown key, ArtifactError for a tensor that is missing, unknown or of another shape.
    """
    model = ByteLM(run_config(config))
    parameters = dict(model.named_parameters())
    weights = {}
    for name, value in state_dict.items():
        ours = our_name(name)
        if ours not in parameters:
            raise ArtifactError(
                f"{name} has no place in a model of this configuration", hint="check jepa and bigram settings"
            )
        if parameters[ours].shape != value.shape:
            raise ArtifactError(f"{name}: expected shape {tuple(parameters[ours].shape)}, got {tuple(value.shape)}")
        weights[ours] = value.float()
    missing = sorted(set(parameters) - set(weights))
    if missing:
        raise ArtifactError(f"the state dict lacks {len(missing)} tensors, among them {missing[0]}")
    model.load_state_dict(weights, strict=False)
    if model.jepa is not None:
        if sigreg_directions is None:
            fill_sigreg_directions(model, model.config.training.seed)
            sigreg_directions = model.jepa.directions
        if sigreg_directions.size(0) != model.jepa.config.latent_dim:
            raise ConfigError(
                f"sigreg_directions: expected {model.jepa.config.latent_dim} rows, got {sigreg_directions.size(0)}"
            )
        model.jepa.directions = sigreg_directions.float().clone()
    return model


def reference_parameters(model: ByteLM) -> dict[str, nn.Parameter]:
    """Return {the reference's name: parameter} of every parameter of `model`; the parameters are the model's own."""
    pairs = [(re.sub(r"\\\.", ".", pattern), replacement) for pattern, replacement in _OURS_FROM_REFERENCE]
    names = {}
    for ours, parameter in model.named_parameters():
        layer = re.match(r"blocks\.(\d+)\.", ours)
        number = layer.group(1) if layer else ""
        generic = re.sub(r"^blocks\.\d+\.", r"blocks.\\1.", ours)
        matching = [reference for reference, replacement in pairs if replacement == generic]
        if matching:
            names[matching[0].replace(r"(\d+)", number)] = parameter
    return names


def load_state_dict_file(path: Path | str) -> dict[str, Tensor]:
    """Return the float32 state dict in the reference's `final_model.pt` or (dequantised) `final_model.int6.ptz`.

    Raises: ArtifactError if the file is missing, is neither of the two, or holds anything but tensors and plain data.
    """
    path = Path(path)
    with file_errors_as(ArtifactError, "read", path):
        data = path.read_bytes()
    loaded = _restricted_load(_decompressed(data, path), path)
    if isinstance(loaded, dict) and set(loaded) == {"w", "m"}:
        if not _is_state_dict(loaded["w"]) or not isinstance(loaded["m"], dict):
            raise ArtifactError(f"{path}: expected tensors under 'w' and how each is stored under 'm'")
        return _dequantized(loaded["w"], loaded["m"], path)
    if not _is_state_dict(loaded):
        raise ArtifactError(f"{path}: expected a state dict of tensors, got {type(loaded).__name__} with other content")
    return {name: _plain(name, value, path) for name, value in loaded.items() if name != "jepa_sigreg.directions"}


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _decompressed(data: bytes, path: Path) -> bytes:
    too_large = f"unpacks to more than {_MAX_FILE_BYTES:,} bytes, far more than a model of the reference"
    if data[:4] == zstandard.MAGIC_NUMBER.to_bytes(4, "little"):
        try:
            if zstandard.frame_content_size(data) > _MAX_FILE_BYTES:  # believed, it would be allocated
                raise ArtifactError(f"{path}: {too_large}")
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=_MAX_FILE_BYTES)
        except zstandard.ZstdError as problem:
            raise ArtifactError(f"{path}: damaged zstd data: {problem}") from None
    if data[:1] == b"\x78":  # the reference falls back to zlib without saying so (spec section 7, item 10)
        decompressor = zlib.decompressobj()
        try:
            unpacked = decompressor.decompress(data, _MAX_FILE_BYTES)
        except zlib.error as problem:
            raise ArtifactError(f"{path}: damaged zlib data: {problem}") from None
        if not decompressor.eof:
            whole = too_large if len(unpacked) == _MAX_FILE_BYTES else "zlib data that end too early"
            raise ArtifactError(f"{path}: {whole}")
        return unpacked
    return data


def _restricted_load(data: bytes, path: Path) -> Any:
    _require_whole_zip(data, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and TorchScript: the refusal says enough
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises many kinds; all mean the same to the user
        # Torch's own text recommends loading the file with code and all, so only what it names is taken from it.
        foreign = re.search(r"GLOBAL (\S+)", str(problem))
        named = f": it asks for {foreign[1]}" if foreign else ""
        raise ArtifactError(
            f"{path}: not a file of tensors and plain data{named}",
            hint="nothing in it was executed; expected the reference's final_model.pt or final_model.int6.ptz",
        ) from None


def _require_whole_zip(data: bytes, path: Path) -> None:
    """Raise an ArtifactError for a zip of which a part is damaged: torch reads it without looking at its checksums."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
        EOFError,
        ValueError,
        OSError,
    ) as problem:
        raise ArtifactError(f"{path}: damaged: {problem}", hint="copy it again") from None
    if damaged is not None:
        raise ArtifactError(f"{path}: damaged: the checksum of {damaged} differs", hint="copy it again")


def _plain(name: str, value: Tensor, path: Path, *, integers: bool = False) -> Tensor:
    """Return `value` in float32. Raises: ArtifactError if it is no ordinary tensor of floats, or of int8 codes."""
    right = value.dtype == torch.int8 if integers else value.dtype.is_floating_point
    if value.layout != torch.strided or value.device.type != "cpu" or not right:
        expected = "int8 codes" if integers else "ordinary floats"
        raise ArtifactError(f"{path}: {name}: expected {expected}, got {value.dtype}, {value.layout} on {value.device}")
    return value.float()


def _dequantized(weights: dict[str, Tensor], kinds: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Return float32 tensors from the reference's pair (values, kinds): a matrix is codes `.q` times row scales `.scale`."""
    state = {}
    for name, kind in kinds.items():
        if (
            isinstance(kind, dict)
            and kind.get("type") in ("int6", "int8")
            and name + ".q" in weights
            and name + ".scale" in weights
        ):
            codes = _plain(name + ".q", weights[name + ".q"], path, integers=True)
            scales = _plain(name + ".scale", weights[name + ".scale"], path)
            if not bool((scales >= 0).all()):
                raise ArtifactError(f"{path}: {name}: expected scales of 0 or more, got {float(scales.min()):g}")
            if scales.ndim and (codes.ndim == 0 or scales.shape != codes.shape[:1]):
                raise ArtifactError(
                    f"{path}: {name}: expected a scale a row, got {tuple(scales.shape)} for {tuple(codes.shape)}"
                )
            state[name] = codes * (scales.view(-1, *[1] * (codes.ndim - 1)) if scales.ndim else scales)
        elif isinstance(kind, str) and kind.startswith("passthrough") and name in weights:
            state[name] = _plain(name, weights[name], path)
        else:
            raise ArtifactError(f"{path}: tensor {name} is stored in an unknown way ({kind!r})")
    return state


def config_of_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the reference configuration that the shapes imply; what shapes cannot tell is as in the submitted run.

    The number of XSA blocks, rotary dimensions and chunk size leave no trace in the shapes.
    """
    try:
        dim = state_dict["tok_emb.weight"].size(1)
        bigram = state_dict.get("bigram.embed.weight")
        bigram_rows, bigram_dim = (0, 32) if bigram is None else (bigram.size(0), bigram.size(1))
        latent = state_dict.get("jepa_predictor.start_token")
        hidden = 256 if latent is None else state_dict["jepa_projector.fc1.weight"].size(0)
        query_gain = state_dict["blocks.0.attn.q_gain"]
        layers = 1 + max(
            int(match.group(1)) for match in (re.match(r"blocks\.(\d+)\.", name) for name in state_dict) if match
        )
        kv_dim = state_dict["blocks.0.attn.c_k.weight"].size(0)
        mlp_dim = state_dict["blocks.0.mlp.fc.weight"].size(0)
    except KeyError as missing:
        raise ArtifactError(f"the state dict has no tensor {missing}", hint="is this a PR #832 state dict?") from None
    except IndexError:
        raise ArtifactError("a matrix of the state dict is no matrix", hint="is this a PR #832 state dict?") from None
    heads = query_gain.numel()
    return {
        "num_layers": layers,
        "model_dim": dim,
        "num_heads": heads,
        "num_kv_heads": kv_dim * heads // max(dim, 1),
        "mlp_mult": mlp_dim / max(dim, 1),
        "bigram_vocab_size": bigram_rows,
        "bigram_dim": bigram_dim,
        "jepa_chunk_size": 0 if latent is None else 8,
        "jepa_latent_dim": 0 if latent is None else latent.numel(),
        "jepa_proj_hidden": hidden,
    }


def convert(
    path: Path | str, out: Path | str, *, settings: Mapping[str, Any] | None = None, force: bool = False
) -> ContainerInfo:
    """Write the model in the reference's file `path` as an artifact at `out`; return the artifact's sizes.

    `settings` overrides what `config_of_state_dict` assumes. Codes of a quantised file are dequantised and quantised
    again by preset `pr832`'s rule, which gives the same codes.
    Raises: ArtifactError, ConfigError; nothing is left half written.
    """
    state_dict = load_state_dict_file(path)
    config = config_of_state_dict(state_dict)
    overrides = dict(settings or {})
    if not config["jepa_chunk_size"] and overrides.get("jepa_chunk_size"):
        raise ConfigError(f"{path} has no JEPA: jepa_chunk_size has no effect", hint="leave out --jepa-chunk-size")
    model = build({**config, **overrides}, state_dict)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return write_artifact(Path(out), weights, model.config, metadata={"imported_from": Path(path).name}, force=force)
