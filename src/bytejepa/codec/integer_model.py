"""A model as integers: what the codec computes with, derived exactly from the codes and scales that an artifact stores.

Every matrix keeps its int8 codes; the scale of a row, and whatever else multiplies the row's result, becomes an integer
multiplier and a shift. All of it is computed with integers, or with binary64 operations that IEEE 754 rounds correctly
(+, *, /, sqrt, rint), so every machine derives the same integers. `docs/codec.md` gives the formulas.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bytejepa.artifact.packing import StoredTensor
from bytejepa.codec import fixed_point as fp
from bytejepa.codec.fixed_point import IntArray
from bytejepa.config import RunConfig
from bytejepa.data.vocabulary import BYTE_OFFSET
from bytejepa.errors import CodecError
from bytejepa.model.quantization import QuantizedMatrix

FloatArray = npt.NDArray[np.float64]
MULTIPLIER_BITS = 31
"""Multipliers stay below 2^31, so that their product with an int32 sum fits into 62 bits."""
INT32_MAX = (1 << 31) - 1
LOG2_E = 1.4426950408889634
"""The binary64 number nearest to log2(e)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IntegerMatrix:
    """y = round(codes @ a * multiplier / 2^shift), row by row.

    `dynamic` inputs a are stored as int16 with a common exponent e of the vector; the shift is then `shift` - e.
    """

    codes: npt.NDArray[np.int8]
    """(rows, columns)."""
    multiplier: IntArray
    """(rows,), |.| < 2^31."""
    shift: int
    input_bits: int
    """Bits of a dynamic input's magnitude, 15 or fewer, such that no sum leaves int32."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IntegerLayer:
    """One block."""

    mix: IntArray | None
    """(2, D), 16 fraction bits; None: the residual as it is."""
    skip: IntArray | None
    """(D,), 16 fraction bits: weight of the popped output; None: nothing is popped."""
    heads: IntegerMatrix
    """Query and key maps, to 16 fraction bits."""
    value: IntegerMatrix
    """Value map, to `value_bits` fraction bits."""
    value_bits: int
    query_sign: IntArray
    """(H,), 1 or -1: the sign of the query gain."""
    score_multiplier: IntArray
    """(H,): |gain| log2(e) / sqrt(E), to 12 fraction bits after `score_shift`."""
    score_shift: int
    output: IntegerMatrix
    up: IntegerMatrix
    down: IntegerMatrix
    drop_own_value: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IntegerLatents:
    """JEPA's side path."""

    chunk_bytes: int
    projector_up: IntegerMatrix
    projector_down: IntegerMatrix
    predictor_up: IntegerMatrix
    predictor_down: IntegerMatrix
    injection: IntegerMatrix
    start: IntArray
    """(Z,), 16 fraction bits."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IntegerModel:
    """Everything the codec's forward pass reads. Widths as in `bytejepa.model.layers`."""

    sha256: bytes
    """Of the stored tensors and of the settings that decide the function: the model's identity in a compressed file."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dims: int
    rotary_base: float
    longest_window: int
    default_window: int
    num_encoder_layers: int
    embedding: IntArray
    """(260, D): of every id, with `embedding_bits` fraction bits."""
    embedding_bits: int
    bigram: IntArray | None
    """(rows, D): projected rows of the hashed table, in the embedding's unit; None: no table."""
    smear: IntArray | None
    """(D,), 15 fraction bits; None: no smearing."""
    layers: tuple[IntegerLayer, ...]
    latents: IntegerLatents | None
    head: IntegerMatrix
    """Rows of the 256 bytes; to logits / softcap with 16 fraction bits."""
    softcap: int
    """See `fixed_point.softcap_constant`."""

    @property
    def width(self) -> int:
        """Width D of the residual."""
        return self.embedding.shape[1]


def integer_model(stored: Mapping[str, StoredTensor], config: RunConfig) -> IntegerModel:
    """Return the integer form of a model from its stored tensors.

    Raises: CodecError for a structure that the codec does not implement, or weights its formats cannot hold.
    """
    _refuse_unsupported(config)
    model = config.model
    tensors = _Tensors(stored)
    embedding, bigram, bits = _embeddings(tensors, config)
    return IntegerModel(
        sha256=model_sha256(stored, config),
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rotary_dims=model.rotary_dims or model.head_dim,
        rotary_base=model.rotary_base,
        longest_window=min(model.rotary_length_bytes, fp.MAX_WINDOW),
        default_window=min(config.evaluation.window_bytes, model.rotary_length_bytes, fp.MAX_WINDOW),
        num_encoder_layers=model.num_layers // 2,
        embedding=embedding,
        embedding_bits=bits,
        bigram=bigram,
        smear=fp.sigmoids(tensors.vector("smear.gate")) if model.smear else None,
        layers=tuple(_layer(tensors, config, layer) for layer in range(model.num_layers)),
        latents=_latents(tensors, config) if config.jepa.enabled and config.jepa.inject else None,
        head=_head(tensors, config),
        softcap=fp.softcap_constant(model.logit_softcap),
    )


def model_sha256(stored: Mapping[str, StoredTensor], config: RunConfig) -> bytes:
    """Return the identity of a model: SHA-256 over its deciding settings and its stored numbers.

    How an artifact compressed them, and what it says about their origin, makes no difference.
    """
    digest = hashlib.sha256(json.dumps(_deciding_settings(config), sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(stored):
        tensor = stored[name]
        if isinstance(tensor, QuantizedMatrix):
            parts = {"codes": tensor.codes.numpy(), "scales": tensor.scales.numpy().astype("<f2")}
        else:
            array = tensor.numpy()
            parts = {str(array.dtype): array.astype(array.dtype.newbyteorder("<"))}
        for kind, array in parts.items():
            digest.update(f"\n{name} {kind} {','.join(map(str, array.shape))}\n".encode())
            digest.update(array.tobytes())
    return digest.digest()


IMPLEMENTED = (
    "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_ratio", "rotary_dims", "rotary_base",
    "rotary_length_bytes", "logit_softcap", "xsa_last_layers", "depth_scaled_norm", "residual_mix", "skip_connections",
    "smear", "bigram_rows", "bigram_dim",
)  # fmt: skip
"""Settings of the model that decide the function and that the codec follows, whatever their value."""
WITHOUT_EFFECT = (
    "query_gain", "bigram_projection_init", "output_projection_init", "embedding_std", "multi_token_heads",
    "ngram_rows", "ngram_dim", "chunk_stride_bytes",
)  # fmt: skip
"""Settings that decide how a model began or was trained. Every other one must be as in the preset `default`."""


def _deciding_settings(config: RunConfig) -> dict[str, Any]:
    inject = config.jepa.enabled and config.jepa.inject
    return {name: getattr(config.model, name) for name in IMPLEMENTED} | {
        "chunk_bytes": config.jepa.chunk_bytes if inject else None
    }


def _refuse_unsupported(config: RunConfig) -> None:
    model, jepa = config.model, config.jepa
    neutral = RunConfig().model
    problems = {
        f"model.{field.name} {getattr(model, field.name)}": getattr(model, field.name) != getattr(neutral, field.name)
        for field in dataclasses.fields(model)
        if field.name not in (*IMPLEMENTED, *WITHOUT_EFFECT)
    }
    problems |= {
        f"jepa.context {jepa.context}": jepa.enabled and jepa.inject and jepa.context != "pooled",
        f"model.model_dim {model.model_dim}, more than {fp.MAX_WIDTH}": model.model_dim > fp.MAX_WIDTH,
        f"a head width of {model.head_dim}, more than 256": model.head_dim > 256,
        f"jepa.latent_dim or hidden_dim over {fp.MAX_WIDTH}": jepa.enabled
        and max(jepa.latent_dim, jepa.hidden_dim) > fp.MAX_WIDTH,
    }
    for problem, present in problems.items():
        if present:
            raise CodecError(f"the codec does not implement {problem}", hint="docs/codec.md lists what it does")


class _Tensors:
    """Stored tensors as exact numbers."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored

    def matrix(self, *names: str) -> tuple[npt.NDArray[np.int8], FloatArray]:
        """Return int8 codes and binary64 row scales of matrices one above the other."""
        parts = [self._matrix(name) for name in names]
        return np.concatenate([codes for codes, _ in parts]), np.concatenate([scales for _, scales in parts])

    def _matrix(self, name: str) -> tuple[npt.NDArray[np.int8], FloatArray]:
        tensor = self.stored[name]
        if isinstance(tensor, QuantizedMatrix):
            return tensor.codes.numpy(), tensor.scales.numpy().astype(np.float64)
        # a matrix kept as floats gets codes of its own: one division and one rounding a weight, both correct
        weight = tensor.numpy().astype(np.float64)
        scales = np.abs(weight).max(axis=1) / 127.0
        divisor = np.where(scales > 0, scales, np.inf)
        return np.rint(weight / divisor[:, None]).astype(np.int8), scales

    def vector(self, name: str) -> FloatArray:
        """Return a small tensor that is kept as floats, of any shape."""
        tensor = self.stored[name]
        if isinstance(tensor, Tensor):
            return tensor.numpy().astype(np.float64)
        return tensor.codes.numpy().astype(np.float64) * tensor.scales.numpy().astype(np.float64)[:, None]


def _scaled(values: FloatArray, fraction_bits: int) -> IntArray:
    return np.rint(np.ldexp(values, fraction_bits)).astype(np.int64)


def _integer_matrix(
    codes: npt.NDArray[np.int8], factors: FloatArray, name: str, *, gain_bits: int, largest_exponent: int = 0
) -> IntegerMatrix:
    """Return codes with the row factors as multipliers; `gain_bits`: fraction bits out minus fraction bits in."""
    largest = float(np.abs(factors).max())
    exponent = math.frexp(largest)[1] if largest > 0 else 0  # largest < 2^exponent
    scale_bits = min(MULTIPLIER_BITS - exponent, 62 + gain_bits)
    multiplier = _scaled(factors, scale_bits)
    if int(np.abs(multiplier).max()) > INT32_MAX:  # a factor that rounded up to 2^31
        scale_bits -= 1
        multiplier = _scaled(factors, scale_bits)
    shift = scale_bits - gain_bits
    row_sum = int(np.abs(codes.astype(np.int64)).sum(axis=1).max())
    input_bits = min(15, (INT32_MAX // max(1, row_sum)).bit_length() - 1)
    if shift - largest_exponent < 1 or input_bits < 8:
        raise CodecError(f"the codec cannot use this model: the weights of {name} are too large for its formats")
    return IntegerMatrix(codes=codes, multiplier=multiplier, shift=shift, input_bits=input_bits)


def _embeddings(tensors: _Tensors, config: RunConfig) -> tuple[IntArray, IntArray | None, int]:
    """Return the embeddings, the projected bigram table, and their fraction bits."""
    codes, scales = tensors.matrix("token_embedding.weight")
    token = codes.astype(np.float64) * scales[:, None]  # exact: 8 bits times 11
    bigram = None
    largest = float(np.abs(token).max())
    if config.model.bigram_rows:
        rows, row_scales = tensors.matrix("bigram.embedding.weight")
        projection, projection_scales = tensors.matrix("bigram.projection.weight")
        dots = rows.astype(np.float64) @ projection.astype(np.float64).T  # whole numbers below 2^53: exact in any order
        scale = float(tensors.vector("bigram.scale"))
        bigram = dots * (row_scales[:, None] * projection_scales[None, :]) * scale
        largest += float(np.abs(bigram).max())
    bits = min(24, 26 - math.frexp(largest)[1]) if largest > 0 else 24
    if bits < 12:
        raise CodecError(
            "the codec cannot use this model: the weights of token_embedding are too large for its formats"
        )
    return _scaled(token, bits), None if bigram is None else _scaled(bigram, bits), bits


def _layer(tensors: _Tensors, config: RunConfig, layer: int) -> IntegerLayer:
    model = config.model
    block = f"blocks.{layer}"
    norm_scale = 1.0 / np.sqrt(np.float64(layer + 1)) if model.depth_scaled_norm else np.float64(1.0)
    D, E = model.model_dim, model.head_dim
    heads, head_scales = tensors.matrix(f"{block}.attention.query.weight", f"{block}.attention.key.weight")
    value, value_scales = tensors.matrix(f"{block}.attention.value.weight")
    value_bits = _value_bits(value, value_scales * norm_scale, D)
    gain = tensors.vector(f"{block}.attention.query_gain")
    # a score has 2 * 10 fraction bits, what 2^-x is taken of has 12
    score_factors = np.abs(gain) / np.sqrt(np.float64(E)) * LOG2_E
    score = _integer_matrix(
        np.ones((len(gain), 1), np.int8),
        score_factors,
        f"{block}.attention.query_gain",
        gain_bits=fp.SOFTMAX_BITS - 2 * fp.NORMED_BITS,
    )
    output, output_scales = tensors.matrix(f"{block}.attention.output.weight")
    up, up_scales = tensors.matrix(f"{block}.mlp.up.weight")
    down, down_scales = tensors.matrix(f"{block}.mlp.down.weight")
    popped = layer - model.num_layers // 2
    has_skip = model.skip_connections and 0 <= popped < model.num_layers // 2
    return IntegerLayer(
        mix=_scaled(tensors.vector(f"{block}.residual_mix"), fp.MIX_BITS) if model.residual_mix else None,
        skip=_scaled(tensors.vector("skip_weights")[popped], fp.MIX_BITS) if has_skip else None,
        heads=_integer_matrix(heads, head_scales * norm_scale, block, gain_bits=fp.PRENORM_BITS - fp.NORMED_BITS),
        value=_integer_matrix(value, value_scales * norm_scale, block, gain_bits=value_bits - fp.NORMED_BITS),
        value_bits=value_bits,
        query_sign=np.where(gain < 0, -1, 1).astype(np.int64),
        score_multiplier=score.multiplier,
        score_shift=score.shift,
        output=_static(
            output,
            output_scales * tensors.vector(f"{block}.attention_scale"),
            f"{block}.attention.output",
            gain_bits=fp.RESIDUAL_BITS - value_bits,
        ),
        up=_integer_matrix(up, up_scales * norm_scale, block, gain_bits=fp.HIDDEN_BITS - fp.NORMED_BITS),
        down=_integer_matrix(
            down,
            down_scales * tensors.vector(f"{block}.mlp_scale"),
            f"{block}.mlp.down",
            gain_bits=fp.RESIDUAL_BITS - 2 * fp.HIDDEN_BITS,
            largest_exponent=33,
        ),
        drop_own_value=layer >= model.num_layers - model.xsa_last_layers,
    )


def _static(codes: npt.NDArray[np.int8], factors: FloatArray, name: str, *, gain_bits: int) -> IntegerMatrix:
    """Return a matrix whose inputs are any int16 vectors. Raises: CodecError if a sum could leave int32."""
    matrix = _integer_matrix(codes, factors, name, gain_bits=gain_bits)
    if matrix.input_bits < 15:
        raise CodecError(f"the codec cannot use this model: the codes of {name} are too large for its formats")
    return matrix


def _value_bits(codes: npt.NDArray[np.int8], factors: FloatArray, width: int) -> int:
    """Return the most fraction bits, 14 at most, with which no value can leave int16.

    A normalised vector has length sqrt(width), so a value is at most that times the length of its row.
    """
    squares = (codes.astype(np.int64) ** 2).sum(axis=1).astype(np.float64)
    bound = float((np.sqrt(squares) * np.abs(factors)).max()) * float(np.sqrt(np.float64(width)))
    return max(0, min(14, 14 - math.frexp(bound)[1] + 1)) if bound > 0 else 14


def _latents(tensors: _Tensors, config: RunConfig) -> IntegerLatents:
    P = config.jepa.chunk_bytes
    normed, wide = fp.NORMED_BITS, fp.PRENORM_BITS

    def matrix(name: str, *, gain_bits: int, divisor: int = 1, largest_exponent: int = 0) -> IntegerMatrix:
        codes, scales = tensors.matrix(f"jepa.{name}.weight")
        return _integer_matrix(
            codes, scales / np.float64(divisor), name, gain_bits=gain_bits, largest_exponent=largest_exponent
        )

    return IntegerLatents(
        chunk_bytes=P,
        projector_up=matrix("projector.up", gain_bits=wide - fp.RESIDUAL_BITS, divisor=P, largest_exponent=28),
        projector_down=matrix("projector.down", gain_bits=wide - normed),
        predictor_up=matrix("predictor.up", gain_bits=0, largest_exponent=20),
        predictor_down=matrix("predictor.down", gain_bits=wide - normed),
        injection=matrix("injection", gain_bits=fp.RESIDUAL_BITS - wide, largest_exponent=20),
        start=np.clip(_scaled(tensors.vector("jepa.start"), wide), -fp.PRENORM_LIMIT, fp.PRENORM_LIMIT),
    )


def _head(tensors: _Tensors, config: RunConfig) -> IntegerMatrix:
    codes, scales = tensors.matrix("token_embedding.weight")
    factors = scales[BYTE_OFFSET:] / np.float64(config.model.logit_softcap)
    return _integer_matrix(codes[BYTE_OFFSET:], factors, "token_embedding", gain_bits=fp.LOGIT_BITS - fp.NORMED_BITS)
