"""Per-row symmetric quantisation of weight matrices: weights to int codes and float16 scales, and back.

A row is stored as `codes * scale`: one int8 code a weight, one float16 scale a row. With `limit = 2**(bits - 1) - 1` a
row's scale is `clip / limit`, where `clip` says how far from zero the largest code reaches (`ClipRule`). Codes are then
`round(weight / scale)`, ties to even, within [-limit, limit].

Two sets of rules live here. The project's own has real per-row scales without a floor, and an all-zero row has scale 0.
The reference's (`reference_int6`, `reference_int8`; spec section 5) has floors that turn the scale into one global step
for nearly every row (spec section 7, item 6); they exist to reproduce its files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float16, Float32, Int8
from torch import Tensor

from bytejepa.config import ArtifactConfig
from bytejepa.errors import ArtifactError
from bytejepa.model.initialization import is_vector

FLOAT16_MAX = 65504.0
SMALLEST_NORMAL_FLOAT16 = 2.0**-14
SMALLEST_FLOAT16 = 2.0**-24
FLOAT16_DIGITS = 10
REFERENCE_QUANTILE = 0.9999984
"""The reference clips int8 rows at their 99.99984 % quantile (spec section 5)."""
CLIP_RATIOS = tuple(1.0 - 0.04 * step for step in range(21))
"""Candidates of `mean_squared_error`, as parts of the row's maximum; the best for ternary Gaussian rows is near 0.4."""
QUANTILE_MAX_COLUMNS = 1 << 24  # more, torch.quantile refuses
QUANTILE_CHUNK_ELEMENTS = 1 << 20  # it counts all elements of a call, and sorts a copy of them

ClipKind = Literal["max", "quantile", "mean_squared_error", "standard_deviations"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRule:
    """How far from zero a row's largest code reaches; compared and hashed by value.

    Raises: ArtifactError for an unknown kind or a number out of range.
    """

    kind: ClipKind = "max"
    """`max`: the row's max |weight|; `quantile`: a quantile of |weight|; `mean_squared_error`: of 21 fractions of the
    maximum the one with the least squared error; `standard_deviations`: a multiple of the row's root mean square."""
    quantile: float = REFERENCE_QUANTILE
    """Used by `quantile`; in (0, 1], interpolated linearly between weights."""
    standard_deviations: float = 12.85
    """Used by `standard_deviations`; > 0. Larger is coarser and smaller on disk: a Gaussian row costs about
    log2(4.13 * 31 / k) bits a weight at 6 bits."""
    scale_digits: int = FLOAT16_DIGITS
    """Binary digits after the leading one that a scale keeps, 1 to 10. Fewer make the scales themselves smaller on disk."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ClipKind):
            raise ArtifactError(
                f"unknown clip rule {self.kind!r}", hint=f"choose one of {', '.join(get_args(ClipKind))}"
            )
        if not 0.0 < self.quantile <= 1.0:
            raise ArtifactError(f"clip quantile must be in (0, 1], got {self.quantile}")
        if not 0.0 < self.standard_deviations < float("inf"):
            raise ArtifactError(f"clip in standard deviations must be positive, got {self.standard_deviations}")
        if not 1 <= self.scale_digits <= FLOAT16_DIGITS:
            raise ArtifactError(f"scales keep 1 to {FLOAT16_DIGITS} binary digits, got {self.scale_digits}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRule:
    """What gives a row its scale."""

    clip: ClipRule
    scale_floor: float | None = None


CLIP_MAX = ClipRule()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedMatrix:
    """A matrix as int codes and one float16 scale a row; weights are `codes * scales[:, None]`.

    Raises: ArtifactError if shapes or dtypes disagree, a code does not fit `bits`, a scale is negative or not finite.
    """

    codes: Int8[Tensor, "rows columns"]
    scales: Float16[Tensor, " rows"]
    bits: int

    def __post_init__(self) -> None:
        _require_bits(self.bits)
        if self.codes.ndim != 2 or self.codes.dtype != torch.int8:
            raise ArtifactError(f"codes must be an int8 matrix, got {self.codes.dtype} of {tuple(self.codes.shape)}")
        if self.scales.shape != self.codes.shape[:1] or self.scales.dtype != torch.float16:
            raise ArtifactError(
                f"scales must be {self.codes.shape[0]} float16 values, one a row,"
                f" got {self.scales.dtype} of {tuple(self.scales.shape)}"
            )
        # Foreign files may use the code -2**(bits-1) that quantize_rows leaves free: the reference clips to [-32, 31].
        lowest, highest = -(2 ** (self.bits - 1)), code_limit(self.bits)
        if self.codes.numel() and not lowest <= int(self.codes.min()) <= int(self.codes.max()) <= highest:
            raise ArtifactError(
                f"codes of {self.bits} bits lie in [{lowest}, {highest}],"
                f" got [{int(self.codes.min())}, {int(self.codes.max())}]"
            )
        if not bool((torch.isfinite(self.scales) & (self.scales >= 0)).all()):
            raise ArtifactError("scales must be finite and not negative")


def code_limit(bits: int) -> int:
    """Return the largest code of `bits` bits: 31 for 6, 127 for 8."""
    return 2 ** (bits - 1) - 1


def quantize_rows(
    weight: Float[Tensor, "rows columns"],
    *,
    bits: int,
    clip: ClipRule = CLIP_MAX,
    scale_floor: float | None = None,
    divide_by_stored_scale: bool = True,
) -> QuantizedMatrix:
    """Return `weight` as codes of `bits` bits (2 to 8) and one float16 scale a row, on the weight's device.

    With the clip `max`, every weight comes back within half of its row's stored scale. A scale below float16's normal
    range is rounded up to a multiple of 2**-24, so that no code is clipped by the rounding; weights below 2**-25 become
    zero even where they are a row's largest. An all-zero row has scale 0 unless `scale_floor` raises it.
    `divide_by_stored_scale=False` makes codes with the scale before its rounding to float16, as the reference's int8.

    Raises: ArtifactError for bits out of range, a tensor that is no floating matrix, weights that are not finite, a
    scale above float16's range.
    Source: spec section 5 for the rule and floors, section 7 item 6 for why the floors are off here.
    """
    _require_bits(bits)
    matrix = _finite_float32(weight)
    if matrix.ndim != 2:
        raise ArtifactError(
            f"only matrices have rows to quantise, got shape {tuple(weight.shape)}", hint="store the tensor as float16"
        )
    exact = _exact_scales(matrix, bits, clip, scale_floor)
    stored = _round_scales_to_float16(exact, clip.scale_digits)
    if matrix.shape[0] and float(stored.max()) > FLOAT16_MAX:
        row = int(stored.argmax())
        raise ArtifactError(
            f"row {row} needs the scale {float(exact[row]):.6g}, above float16's largest number {FLOAT16_MAX:.0f}",
            hint="weights this large mean that training diverged; or store the tensor as float32",
        )
    codes = _codes(matrix, stored if divide_by_stored_scale else exact, bits)
    return QuantizedMatrix(codes=codes.to(torch.int8), scales=stored.squeeze(1).to(torch.float16), bits=bits)


def row_scales(
    weight: Float[Tensor, "rows columns"], *, bits: int, clip: ClipRule = CLIP_MAX, scale_floor: float | None = None
) -> Float32[Tensor, " rows"]:
    """Return the scales that `quantize_rows` stores, in float32: each is exactly a float16 number (or overflows it).

    No check of the values and no branch on them, so it traces. For quantisers that choose the codes themselves.
    """
    exact = _exact_scales(weight.detach().float(), bits, clip, scale_floor)
    return _round_scales_to_float16(exact, clip.scale_digits).squeeze(1)


def round_scales(scales: Float32[Tensor, " rows"], digits: int = FLOAT16_DIGITS) -> Float32[Tensor, " rows"]:
    """Return scales >= 0 rounded to float16 numbers of `digits` binary digits after the leading one."""
    return _round_scales_to_float16(scales, digits)


def quantize_at(
    weight: Float[Tensor, "rows columns"], scales: Float32[Tensor, " rows"], *, bits: int
) -> QuantizedMatrix:
    """Return `weight` rounded to the nearest codes at row scales that are float16 numbers already (`round_scales`).

    Raises: ArtifactError for bits out of range or weights that are not finite.
    """
    _require_bits(bits)
    codes = _codes(_finite_float32(weight), scales.unsqueeze(1), bits)
    return QuantizedMatrix(codes=codes.to(torch.int8), scales=scales.to(torch.float16), bits=bits)


def dequantize(quantized: QuantizedMatrix) -> Float32[Tensor, "rows columns"]:
    """Return the float32 weights that `quantized` stands for."""
    return quantized.codes.float() * quantized.scales.float().unsqueeze(1)


def fake_quantize_rows(
    weight: Float[Tensor, "rows columns"], bits: int, *, clip: ClipRule = CLIP_MAX, scale_floor: float | None = None
) -> Float[Tensor, "rows columns"]:
    """Return the weights that `dequantize(quantize_rows(...))` gives for the same arguments, in the weight's dtype.

    The gradient passes straight through, to clipped weights too. Equal to the last bit in eager mode and for float32
    weights; a compiled GPU kernel may divide or sum less exactly and move weights on a rounding boundary by one code.
    Traces under torch.compile: nothing branches on a tensor's values, so values are not checked either. (PyTorch 2.11's
    own quantile does, but no configuration trains with that clip.)
    Source: the straight-through estimator of Bengio, Leonard and Courville 2013 (arXiv 1308.3432), section 3.
    """
    _require_bits(bits)
    matrix = weight.detach().float()
    scales = _round_scales_to_float16(_exact_scales(matrix, bits, clip, scale_floor), clip.scale_digits)
    stored = (_codes(matrix, scales, bits) * scales).to(weight.dtype)
    # The bracket is exactly zero: it carries the gradient, and no rounding error as `weight + (stored - weight)` would.
    return stored + (weight - weight.detach())


def stored_bits(name: str, tensor: Tensor, config: ArtifactConfig) -> int | None:
    """Return the bits of a parameter's codes in an artifact; None for what is stored as float16: small tensors and
    (stacked) vectors."""
    if is_vector(name, tensor) or tensor.ndim > 2 or tensor.numel() <= config.small_tensor_elements:
        return None
    return config.matrix_bits if is_block_matrix(name) else config.other_bits


def is_block_matrix(name: str) -> bool:
    """Return whether a quantised parameter is one of the attention and MLP matrices."""
    return name.startswith("blocks.") and not name.endswith("embedding.weight")


def row_rule(name: str, config: ArtifactConfig) -> RowRule:
    """Return how the rows of parameter `name` get their scales, as far as their weights alone decide it.

    The clip `sensitivity` also looks at gradients; what its rows get here is the scale they would have if all rows
    mattered equally.
    """
    if config.scales == "reference_floor":
        return RowRule(clip=CLIP_MAX, scale_floor=1.0 / code_limit(config.matrix_bits))
    clip = config.clip
    deviations = config.clip_standard_deviations if is_block_matrix(name) else config.other_clip_standard_deviations
    kind: ClipKind = "standard_deviations" if clip == "sensitivity" else clip
    return RowRule(clip=ClipRule(kind=kind, standard_deviations=deviations, scale_digits=config.scale_digits))


def reference_int6(weight: Float[Tensor, "rows columns"]) -> QuantizedMatrix:
    """Return the reference's int6 rows: scale = max|row| / 31, at least 1/31, codes made with the float16 scale.

    Its range [-32, 31] is never used in full: |weight / scale| stays below 31.5.
    Source: spec section 5; golden numbers.
    """
    return quantize_rows(weight, bits=6, scale_floor=1.0 / 31.0)


def reference_int8(weight: Float[Tensor, "rows columns"]) -> QuantizedMatrix:
    """Return the reference's int8 rows: clip at a quantile, scale = clip / 127, at least 1/127.

    Unlike int6, the codes come from the scale before its rounding: ten golden codes differ otherwise.
    Source: spec section 5; golden numbers.
    """
    rule = ClipRule(kind="quantile", quantile=REFERENCE_QUANTILE)
    return quantize_rows(weight, bits=8, clip=rule, scale_floor=1.0 / 127.0, divide_by_stored_scale=False)


def to_float16(tensor: Float[Tensor, "*shape"]) -> Float16[Tensor, "*shape"]:
    """Return `tensor` as float16, the storage of everything that is not a large matrix.

    Numbers below 2**-25 become zero, an absolute error no larger than that.

    Raises: ArtifactError if a value is not finite or rounds beyond float16's range, rather than storing an infinity.
    """
    stored = _finite_float32(tensor).to(torch.float16)
    if not bool(torch.isfinite(stored).all()):
        largest = float(tensor.detach().abs().max())
        raise ArtifactError(
            f"the value {largest:.6g} is above float16's largest number {FLOAT16_MAX:.0f}", hint="store it as float32"
        )
    return stored


def _require_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ArtifactError(f"rows are quantised to 2 to 8 bits, got {bits}")


def _finite_float32(tensor: Tensor) -> Tensor:
    """Return a detached float32 view or copy, or raise if the tensor is not floating or holds something not finite."""
    if not tensor.is_floating_point():
        raise ArtifactError(f"only floating tensors are stored, got {tensor.dtype}")
    single = tensor.detach().float()
    bad = int((~torch.isfinite(single)).sum())
    if bad:
        raise ArtifactError(f"{bad} of {single.numel()} values are not finite", hint="do not export a diverged model")
    return single


def _exact_scales(matrix: Tensor, bits: int, clip: ClipRule, scale_floor: float | None) -> Tensor:
    """Return the float32 scales before their rounding to float16, (rows, 1)."""
    scales = _clips(matrix, bits, clip) / code_limit(bits)
    return scales if scale_floor is None else scales.clamp_min(scale_floor)


def _clips(matrix: Tensor, bits: int, clip: ClipRule) -> Tensor:
    """Return every row's clip, (rows, 1), in the weight's unit."""
    if matrix.shape[1] == 0 or matrix.shape[0] == 0:
        return matrix.new_zeros((matrix.shape[0], 1))
    if clip.kind == "quantile":
        if matrix.shape[1] > QUANTILE_MAX_COLUMNS:
            raise ArtifactError(f"the quantile of {matrix.shape[1]} columns is too much", hint="use another clip rule")
        chunk_rows = max(1, QUANTILE_CHUNK_ELEMENTS // matrix.shape[1])
        pieces = [matrix[start : start + chunk_rows].abs() for start in range(0, matrix.shape[0], chunk_rows)]
        return torch.cat([torch.quantile(piece, clip.quantile, dim=1, keepdim=True) for piece in pieces])
    if clip.kind == "standard_deviations":
        # About zero, not about the mean: zero is where the codes are centred, and a constant row must not vanish.
        return clip.standard_deviations * matrix.square().mean(dim=1, keepdim=True).sqrt()
    largest = matrix.abs().amax(dim=1, keepdim=True)
    if clip.kind == "max":
        return largest
    return _least_squares_clips(matrix, largest, bits)


def _least_squares_clips(matrix: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Return for every row the candidate clip whose stored form has the least squared error; ties go to the largest."""
    best = largest
    least = torch.full_like(largest, float("inf"))
    for ratio in CLIP_RATIOS:
        candidate = largest * ratio
        scales = _round_scales_to_float16(candidate / code_limit(bits), FLOAT16_DIGITS)
        error = (_codes(matrix, scales, bits) * scales - matrix).square().sum(dim=1, keepdim=True)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def _round_scales_to_float16(scales: Tensor, digits: int) -> Tensor:
    """Return float32 scales >= 0 rounded to float16 numbers: to nearest, but upwards in the subnormal range.

    Upwards, because a subnormal has few digits: 1.4 * 2**-24 rounded to 2**-24 would clip 29 % of the row's range.
    By arithmetic instead of a cast there and back, because torch.compile removes such a pair of casts.
    """
    pattern = scales.view(torch.int32)
    dropped = 23 - digits  # of the float32 fraction; to nearest, ties to even
    half = (1 << (dropped - 1)) - 1
    to_nearest = ((pattern + half + ((pattern >> dropped) & 1)) & -(1 << dropped)).view(torch.float32)
    upwards = torch.ceil(scales * (1.0 / SMALLEST_FLOAT16)) * SMALLEST_FLOAT16
    return torch.where(scales < SMALLEST_NORMAL_FLOAT16, upwards, to_nearest)


def _codes(matrix: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return float32 whole numbers within the code's range; a row of scale zero has the code zero everywhere."""
    limit = code_limit(bits)
    divisor = torch.where(scales > 0, scales, torch.full_like(scales, torch.inf))
    return torch.round(matrix / divisor).clamp(-limit, limit)
