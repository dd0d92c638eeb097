"""GPTQ: rounding a matrix column by column, each column's error made up for by the columns still to come.

For a weight W whose inputs have the second moments H = X^T X, the error that counts is tr((W-Q) H (W-Q)^T). Rounding in
the order of the inputs' strength, every rounding error is spread over the later columns as H^-1 says.
Source: Frantar et al. 2022 (arXiv 2210.17323), with its Cholesky form, blocks of 128 columns and activation order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import QuantizedMatrix, code_limit

BLOCK_COLUMNS = 128


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ErrorSpread:
    """How the rounding error of each column goes to later ones; made once from a moment matrix, used at any step size."""

    order: Int64[Tensor, " columns"]
    """Columns, strongest input first."""
    factor: Float[Tensor, "columns columns"]
    """Upper triangular U with U^T U = H^-1, rows and columns in that order."""
    gain: float
    """Error that counts, relative to plain rounding at the same step size: the mean variance of an input given the later ones,
    over the mean variance of an input; at most 1."""


def error_spread(moments: Float[Tensor, "columns columns"], *, damping: float = 0.01) -> ErrorSpread:
    """Return the spread for inputs of second moments `moments`; `damping` times their mean is added to the diagonal.

    Raises: ArtifactError if the moments are not finite, or if they need more damping.
    """
    if not bool(torch.isfinite(moments).all()):
        raise ArtifactError("the inputs of a matrix are not finite", hint="do not export a diverged model")
    strength = moments.diagonal()
    mean = float(strength.double().mean())
    if mean == 0.0:  # inputs that are always zero
        moments, mean = torch.eye(len(moments), device=moments.device), 1.0
        strength = moments.diagonal()
    order = torch.argsort(strength, descending=True, stable=True)
    damped = moments[order][:, order].double() + damping * mean * torch.eye(
        len(moments), dtype=torch.float64, device=moments.device
    )
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, but not in its __all__
        raise ArtifactError(
            f"the moments of a matrix's inputs cannot be inverted with a damping of {damping:g}",
            hint="use a larger artifact.gptq_damping (default 0.01), or more artifact.calibration_bytes",
        ) from None
    remaining = factor.diagonal().square().reciprocal().mean() / damped.diagonal().mean()
    return ErrorSpread(order=order, factor=factor.float(), gain=float(remaining))


def gptq_rows(
    weight: Float[Tensor, "rows columns"], spread: ErrorSpread, scales: Float[Tensor, " rows"], *, bits: int
) -> QuantizedMatrix:
    """Return `weight` as codes of `bits` bits at the given row scales, on the weight's device.

    `scales` must be float16 numbers (`row_scales` gives such); a row of scale zero has the code zero everywhere.
    Raises: ArtifactError for shapes that do not fit each other.
    """
    rows, columns = weight.shape
    if len(spread.order) != columns or len(scales) != rows:
        raise ArtifactError(
            f"a matrix of {rows} x {columns} needs {rows} scales and moments of {columns} inputs,"
            f" got {len(scales)} and {len(spread.order)}"
        )
    limit = code_limit(bits)
    divisor = torch.where(scales > 0, scales, torch.full_like(scales, torch.inf))
    left = weight.detach().float().T[spread.order].contiguous()  # (columns, rows): a column is contiguous
    codes = torch.empty_like(left)
    for begin in range(0, columns, BLOCK_COLUMNS):
        end = min(begin + BLOCK_COLUMNS, columns)
        block, factor = left[begin:end], spread.factor[begin:end]
        errors = torch.empty_like(block)
        pivots = factor[:, begin:end].diagonal().tolist()
        for column, pivot in enumerate(pivots):
            code = torch.round(block[column] / divisor).clamp_(-limit, limit)
            errors[column] = (block[column] - code * scales) / pivot
            codes[begin + column] = code
            block[column + 1 :].addr_(factor[column, begin + column + 1 : end], errors[column], alpha=-1)
        left[end:].addmm_(factor[:, end:].T, errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[spread.order] = codes
    return QuantizedMatrix(codes=unordered.T.to(torch.int8).contiguous(), scales=scales.to(torch.float16), bits=bits)
