"""A model as integers: what the codec computes with, derived exactly from the codes and scales that an artifact stores.

Every matrix keeps its int8 codes; the scale of a row, and whatever else multiplies the row's result, becomes an integer
multiplier and a shift. `docs/codec.md` gives the formulas.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bytejepa.artifact.packing import StoredTensor
from bytejepa.codec import fixed_point as fp
from bytejepa.codec.fixed_point import IntArray
from bytejepa.codec.integer_tensors import (
    FloatArray,
    IntegerMatrix,
    StoredNumbers,
    bounded,
    integer_matrix,
    scaled,
    static_matrix,
    value_bits,
)
from bytejepa.config import RunConfig
from bytejepa.config_model import JepaConfig, ModelConfig
from bytejepa.data.vocabulary import BYTE_OFFSET
from bytejepa.errors import CodecError
from bytejepa.model.quantization import QuantizedMatrix

LOG2_E = 1.4426950408889634
"""The binary64 number nearest to log2(e)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IntegerEmbedding:
    """What makes the blocks' first input out of ids."""

    token: IntArray
    """(260, D): of every id, with `bits` fraction bits, as the other tables."""
    bits: int
    pairs: IntArray | None
    """(rows, D): projected rows of the table of byte pairs; None: no table."""
    pairs_are_exact: bool
    runs: IntArray | None
    """(orders * rows, D): projected rows of the tables of longer runs, one after another; None: no tables."""
    run_orders: tuple[int, ...]
    smear: IntArray | None
    """(D,): the constant gate with 15 fraction bits, or what is added to one that reads its input with 10; None: no smearing."""
    smear_input: IntArray | None
    """(dimensions read,), 16 fraction bits: the weights of a gate that reads its input; None: it is constant."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IntegerLayer:
    """One block."""

    mix: IntArray | None
    """(2, D), 16 fraction bits; None: the residual as it is."""
    heads: IntegerMatrix
    """Query and key maps, to 16 fraction bits."""
    value: IntegerMatrix
    """Value map, to `value_bits` fraction bits."""
    value_bits: int
    value_embedding: IntArray | None
    """(260, G * E), `value_bits` fraction bits, added to the values; None: nothing is."""
    query_sign: IntArray
    """(H,), 1 or -1: the sign of the query gain."""
    score_multiplier: IntArray
    """(H,): |gain| log2(e) / sqrt(E), to 12 fraction bits after `score_shift`."""
    score_shift: int
    gate: IntegerMatrix | None
    """(H, dimensions read), to 10 fraction bits: what twice the sigmoid is taken of that multiplies a head; None: no gates."""
    output: IntegerMatrix
    up: IntegerMatrix
    down: IntegerMatrix
    drop_own_value: bool
    is_parallel: bool
    """Whether the MLP reads what attention reads."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IntegerLatents:
    """JEPA's side path."""

    chunk_bytes: int
    reads_residual: bool
    """Whether a chunk's latent is predicted from the last residual of the chunk before, normalised, not from its latent."""
    projector: tuple[IntegerMatrix, IntegerMatrix] | None
    """Up and down; None where the residual is read."""
    predictor: tuple[IntegerMatrix, IntegerMatrix]
    injection: IntegerMatrix
    start: IntArray
    """What the predictor reads for the first chunk: (Z,) with 16 fraction bits, or (D,) with 10 where it reads residuals."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IntegerModel:
    """Everything the codec's forward pass reads. Widths as in `bytejepa.model.layers`.

    A place is one passage of a block: a recurrent block has two.
    """

    sha256: bytes
    """Of the stored tensors and of the settings that decide the function: the model's identity in a compressed file."""
    width: int
    """Width D of the residual."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dims: int
    rotary_base: float
    longest_window: int
    default_window: int
    embedding: IntegerEmbedding
    layers: tuple[IntegerLayer, ...]
    layer_of_place: tuple[int, ...]
    window_of_place: tuple[int | None, ...]
    """Positions that a place can look back, its own included; None: no bound."""
    skips: IntArray | None
    """(pops, D), 16 fraction bits: weights of the popped outputs in the order of the pops; None: nothing is popped."""
    skip_gates: IntArray | None
    """(pops, D), 15 fraction bits; None: what is popped is added."""
    chunk_places: range
    """Places passed once a chunk of `chunk_stride` bytes."""
    chunk_stride: int
    chunk_scale: IntArray | None
    """(D,), 16 fraction bits: of what they change; None: there are none."""
    latents: IntegerLatents | None
    head: IntegerMatrix
    """Rows of the 256 bytes; to logits / softcap with 16 fraction bits."""
    softcap: int
    """See `fixed_point.softcap_constant`."""

    @property
    def num_pushing(self) -> int:
        """How many places, the first ones, have their output popped by a later one; 0 without skips."""
        return 0 if self.skips is None else len(self.layer_of_place) // 2

    def popped_place(self, place: int) -> int | None:
        """Return the place whose output `place` pops, None if it pops none."""
        popped = 2 * self.num_pushing - 1 - place
        return popped if 0 <= popped < self.num_pushing else None


def integer_model(stored: Mapping[str, StoredTensor], config: RunConfig) -> IntegerModel:
    """Return the integer form of a model from its stored tensors.

    Raises: CodecError for widths or weights that the codec's formats cannot hold.
    """
    _refuse_too_wide(config)
    model = config.model
    numbers = StoredNumbers(stored)
    gates = numbers.vector("skip_gates") if model.skip_gates else None
    return IntegerModel(
        sha256=model_sha256(stored, config),
        width=model.model_dim,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rotary_dims=model.rotary_dims or model.head_dim,
        rotary_base=model.rotary_base,
        longest_window=min(model.rotary_length_bytes, fp.MAX_WINDOW),
        default_window=min(config.evaluation.window_bytes, model.rotary_length_bytes, fp.MAX_WINDOW),
        embedding=_embedding(numbers, model),
        layers=tuple(_layer(numbers, model, layer) for layer in range(model.num_layers)),
        layer_of_place=model.layer_order,
        window_of_place=model.window_of_place,
        skips=bounded(numbers.vector("skip_weights"), fp.MIX_BITS, "skip_weights") if model.skip_connections else None,
        skip_gates=None if gates is None else fp.sigmoids(gates.reshape(-1)).reshape(gates.shape),
        chunk_places=model.chunk_places,
        chunk_stride=model.chunk_stride_bytes,
        chunk_scale=bounded(numbers.vector("chunk_scale"), fp.MIX_BITS, "chunk_scale") if model.chunk_blocks else None,
        latents=_latents(numbers, config.jepa) if config.jepa.enabled and config.jepa.inject else None,
        head=_head(numbers, model),
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


ALWAYS_DECIDING = (
    "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_ratio", "rotary_dims", "rotary_base",
    "rotary_length_bytes", "logit_softcap", "xsa_last_layers", "depth_scaled_norm", "residual_mix", "skip_connections",
    "smear", "bigram_rows", "bigram_dim",
)  # fmt: skip
"""Settings that are in every model's identity."""
DECIDING_WHERE_OTHER: dict[str, Any] = {
    "attention_gate_dims": None, "attention_windows": None, "bigram_table": "hash", "chunk_blocks": None,
    "ngram_orders": None, "parallel_last_layers": 0, "recurrent_layers": None, "skip_gates": False,
    "smear_gate": "constant", "value_embedding_last_layers": 0,
}  # fmt: skip
"""Settings that are in the identity of the models in which they are not so: the codec once refused others, and files of
those that it took are still to be read."""
WITHOUT_EFFECT = (
    "query_gain", "bigram_projection_init", "output_projection_init", "embedding_std", "multi_token_heads",
    "ngram_rows", "ngram_dim", "document_masking",
)  # fmt: skip
"""Settings that decide how a model began or was trained, that the tensors' shapes tell, or that change nothing where the
only BOS is a block's first id. `chunk_stride_bytes` goes with `chunk_blocks`."""


def _deciding_settings(config: RunConfig) -> dict[str, Any]:
    model, jepa = config.model, config.jepa
    inject = jepa.enabled and jepa.inject
    found = {name: getattr(model, name) for name in ALWAYS_DECIDING}
    found["chunk_bytes"] = jepa.chunk_bytes if inject else None
    found |= {
        name: getattr(model, name) for name, usual in DECIDING_WHERE_OTHER.items() if getattr(model, name) != usual
    }
    if model.chunk_blocks:
        found["chunk_stride_bytes"] = model.chunk_stride_bytes
    if inject and jepa.context != "pooled":
        found["context"] = jepa.context
    return found


def _refuse_too_wide(config: RunConfig) -> None:
    model, jepa = config.model, config.jepa
    problems = {
        f"model.model_dim {model.model_dim}, more than {fp.MAX_WIDTH}": model.model_dim > fp.MAX_WIDTH,
        f"a head width of {model.head_dim}, more than 256": model.head_dim > 256,
        f"jepa.latent_dim or hidden_dim over {fp.MAX_WIDTH}": jepa.enabled
        and max(jepa.latent_dim, jepa.hidden_dim) > fp.MAX_WIDTH,
    }
    for problem, present in problems.items():
        if present:
            raise CodecError(f"the codec does not implement {problem}", hint="docs/codec.md lists what it does")


def _embedding(numbers: StoredNumbers, model: ModelConfig) -> IntegerEmbedding:
    codes, scales = numbers.matrix("token_embedding.weight")
    token = codes.astype(np.float64) * scales[:, None]  # exact: 8 bits times 11
    largest = float(np.abs(token).max())
    pairs = _projected(numbers, "bigram", 1) if model.bigram_rows else []
    runs = _projected(numbers, "ngrams", len(model.ngram_orders)) if model.ngram_orders else []
    for rows in (*pairs, *runs):
        largest += float(np.abs(rows).max())
    bits = min(24, 26 - math.frexp(largest)[1]) if largest > 0 else 24
    if bits < 12:
        raise CodecError(
            "the codec cannot use this model: the weights of token_embedding are too large for its formats"
        )
    smear, smear_input = _smear(numbers, model)
    return IntegerEmbedding(
        token=scaled(token, bits),
        bits=bits,
        pairs=scaled(pairs[0], bits) if pairs else None,
        pairs_are_exact=model.bigram_table == "exact",
        runs=np.concatenate([scaled(rows, bits) for rows in runs]) if runs else None,
        run_orders=model.ngram_orders or (),
        smear=smear,
        smear_input=smear_input,
    )


def _projected(numbers: StoredNumbers, table: str, num_parts: int) -> list[FloatArray]:
    """Return the rows of a table's parts, each times its columns of the projection and the table's scale, (rows, D) each."""
    rows, row_scales = numbers.matrix(f"{table}.embedding.weight")
    projection, projection_scales = numbers.matrix(f"{table}.projection.weight")
    scale = float(numbers.vector(f"{table}.scale"))
    count, dim = len(rows) // num_parts, rows.shape[1]
    found = []
    for part in range(num_parts):
        of_part = slice(part * count, (part + 1) * count)
        columns = projection[:, part * dim : (part + 1) * dim].astype(np.float64)
        dots = rows[of_part].astype(np.float64) @ columns.T  # whole numbers below 2^53: exact in any order
        found.append(dots * (row_scales[of_part, None] * projection_scales[None, :]) * scale)
    return found


def _smear(numbers: StoredNumbers, model: ModelConfig) -> tuple[IntArray | None, IntArray | None]:
    if not model.smear:
        return None, None
    gate = numbers.vector("smear.gate")
    if model.smear_gate == "constant":
        return fp.sigmoids(gate), None
    weight = numbers.vector("smear.input_weight")
    return bounded(gate, fp.NORMED_BITS, "smear"), bounded(weight, fp.MIX_BITS, "smear")


def _layer(numbers: StoredNumbers, model: ModelConfig, layer: int) -> IntegerLayer:
    block, from_the_end = f"blocks.{layer}", model.num_layers - layer
    norm_scale = 1.0 / np.sqrt(np.float64(layer + 1)) if model.depth_scaled_norm else np.float64(1.0)
    heads, head_scales = numbers.matrix(f"{block}.attention.query.weight", f"{block}.attention.key.weight")
    value, value_scales = numbers.matrix(f"{block}.attention.value.weight")
    embedding, gate = None, None
    if from_the_end <= model.value_embedding_last_layers:
        embedding = numbers.vector(f"{block}.attention.value_embedding.weight")
    if model.attention_gate_dims is not None:
        codes, factors = numbers.matrix(f"{block}.attention.gate.weight")
        gate = integer_matrix(codes, factors, f"{block}.attention.gate", gain_bits=0)
    of_values = value_bits(
        value,
        value_scales * norm_scale,
        model.model_dim,
        added=0.0 if embedding is None else float(np.abs(embedding).max()),
        doubled=gate is not None,
    )
    gain = numbers.vector(f"{block}.attention.query_gain")
    # a score has 2 * 10 fraction bits, what 2^-x is taken of has 12
    score = integer_matrix(
        np.ones((len(gain), 1), np.int8),
        np.abs(gain) / np.sqrt(np.float64(model.head_dim)) * LOG2_E,
        f"{block}.attention.query_gain",
        gain_bits=fp.SOFTMAX_BITS - 2 * fp.NORMED_BITS,
    )
    output, output_scales = numbers.matrix(f"{block}.attention.output.weight")
    up, up_scales = numbers.matrix(f"{block}.mlp.up.weight")
    down, down_scales = numbers.matrix(f"{block}.mlp.down.weight")
    return IntegerLayer(
        mix=bounded(numbers.vector(f"{block}.residual_mix"), fp.MIX_BITS, block) if model.residual_mix else None,
        heads=integer_matrix(heads, head_scales * norm_scale, block, gain_bits=fp.PRENORM_BITS - fp.NORMED_BITS),
        value=integer_matrix(value, value_scales * norm_scale, block, gain_bits=of_values - fp.NORMED_BITS),
        value_bits=of_values,
        value_embedding=None if embedding is None else scaled(embedding, of_values),
        query_sign=np.where(gain < 0, -1, 1).astype(np.int64),
        score_multiplier=score.multiplier,
        score_shift=score.shift,
        gate=gate,
        output=static_matrix(
            output,
            output_scales * numbers.vector(f"{block}.attention_scale"),
            f"{block}.attention.output",
            gain_bits=fp.RESIDUAL_BITS - of_values,
        ),
        up=integer_matrix(up, up_scales * norm_scale, block, gain_bits=fp.HIDDEN_BITS - fp.NORMED_BITS),
        down=integer_matrix(
            down,
            down_scales * numbers.vector(f"{block}.mlp_scale"),
            f"{block}.mlp.down",
            gain_bits=fp.RESIDUAL_BITS - 2 * fp.HIDDEN_BITS,
            largest_exponent=33,
        ),
        drop_own_value=from_the_end <= model.xsa_last_layers,
        is_parallel=from_the_end <= model.parallel_last_layers,
    )


def _latents(numbers: StoredNumbers, jepa: JepaConfig) -> IntegerLatents:
    normed, wide = fp.NORMED_BITS, fp.PRENORM_BITS
    reads_residual = jepa.context == "causal"

    def matrix(name: str, *, gain_bits: int, divisor: int = 1, largest_exponent: int = 0) -> IntegerMatrix:
        codes, scales = numbers.matrix(f"jepa.{name}.weight")
        return integer_matrix(
            codes, scales / np.float64(divisor), name, gain_bits=gain_bits, largest_exponent=largest_exponent
        )

    up_gain = wide - fp.RESIDUAL_BITS
    projector = None
    if not reads_residual:
        projector = (
            matrix("projector.up", gain_bits=up_gain, divisor=jepa.chunk_bytes, largest_exponent=28),
            matrix("projector.down", gain_bits=wide - normed),
        )
    context_bits, limit = (normed, fp.INT16_MAX) if reads_residual else (wide, fp.PRENORM_LIMIT)
    return IntegerLatents(
        chunk_bytes=jepa.chunk_bytes,
        reads_residual=reads_residual,
        projector=projector,
        predictor=(
            matrix("predictor.up", gain_bits=wide - context_bits, largest_exponent=20),
            matrix("predictor.down", gain_bits=wide - normed),
        ),
        injection=matrix("injection", gain_bits=fp.RESIDUAL_BITS - wide, largest_exponent=20),
        start=np.clip(scaled(numbers.vector("jepa.start"), context_bits), -limit, limit),
    )


def _head(numbers: StoredNumbers, model: ModelConfig) -> IntegerMatrix:
    codes, scales = numbers.matrix("token_embedding.weight")
    factors = scales[BYTE_OFFSET:] / np.float64(model.logit_softcap)
    return integer_matrix(codes[BYTE_OFFSET:], factors, "token_embedding", gain_bits=fp.LOGIT_BITS - fp.NORMED_BITS)
