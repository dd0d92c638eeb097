"""The matrices of a model as codes: which scale each row gets, how its weights are rounded, in which order units stand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bytejepa.artifact.calibration import Calibration
from bytejepa.config import ArtifactConfig
from bytejepa.errors import ArtifactError
from bytejepa.model.gptq import ErrorSpread, gptq_rows
from bytejepa.model.quantization import (
    QuantizedMatrix,
    code_limit,
    is_block_matrix,
    quantize_at,
    quantize_rows,
    round_scales,
    row_rule,
    row_scales,
    stored_bits,
)

LEAST_SENSITIVITY = 0.1
"""Of a row, relative to its matrix's mean: gradients of few bytes know no better, and rare rows may matter one day."""

COARSEST_SCALE = 2.0**15
"""Of a row that hardly costs anything: a number that float16 holds in whatever binary digits scales keep."""


def quantize_matrices(
    matrices: Mapping[str, Tensor], config: ArtifactConfig, calibration: Calibration | None
) -> dict[str, QuantizedMatrix]:
    """Return every matrix as codes and scales on the CPU; computed where the weights are.

    Raises: ArtifactError naming a matrix whose weights are not finite or too large.
    """
    quantized = {}
    scales = sensitive_scales(matrices, config, calibration) if config.clip == "sensitivity" and calibration else {}
    for name, weight in matrices.items():
        bits = stored_bits(name, weight, config)
        assert bits is not None
        spread = calibration.spreads.get(name) if calibration and config.rounding == "gptq" else None
        try:
            # checks the weights, and is the answer where nothing else is asked for
            nearest = quantize_rows(weight, bits=bits, clip=row_rule(name, config).clip)
            chosen = scales.get(name)
            if spread is not None:
                at = row_scales(weight, bits=bits, clip=row_rule(name, config).clip) if chosen is None else chosen
                nearest = gptq_rows(weight, spread, at, bits=bits)
            elif chosen is not None:
                nearest = quantize_at(weight, chosen, bits=bits)
        except ArtifactError as problem:
            raise ArtifactError(f"tensor {name!r}: {problem.message}", hint=problem.hint) from problem
        quantized[name] = QuantizedMatrix(codes=nearest.codes.cpu(), scales=nearest.scales.cpu(), bits=bits)
    return quantized


def sensitive_scales(
    matrices: Mapping[str, Tensor], config: ArtifactConfig, calibration: Calibration
) -> dict[str, Tensor]:
    """Return row scales inverse to the root of how much an error in the row costs, by name; (rows,), float16 numbers.

    At a given size the loss is least where every weight's rounding error costs the same: a uniform step costs
    step^2 / 12 times the row's mean squared gradient, and one bit of entropy halves the step, for all rows alike.
    GPTQ lowers the cost of a whole matrix by its spread's gain. On average over the blocks' matrices, scales are those of
    `clip_standard_deviations`. Rows whose largest weight would be clipped get a scale that it just fits.
    Source: reverse water-filling, Cover and Thomas, section 10.3.3; the Fisher information as curvature, LeCun et al. 1990.
    """
    costs = {}
    for name, weight in matrices.items():
        sensitivity = calibration.sensitivity[name].to(weight.device)
        mean = sensitivity.mean()
        spread = calibration.spreads.get(name) if config.rounding == "gptq" else None
        cost = sensitivity.clamp_min(LEAST_SENSITIVITY * mean) * (spread.gain if spread else 1.0)
        cost = cost.clamp_min(torch.finfo(cost.dtype).tiny)  # a mean of a few denormal numbers may have no tenth
        costs[name] = cost if float(mean) > 0 else torch.ones_like(cost)  # no gradient at all: nothing is known
    reference = [name for name in matrices if is_block_matrix(name)] or list(matrices)
    log_ratio, count = 0.0, 0
    for name in reference:
        bits = stored_bits(name, matrices[name], config)
        assert bits is not None
        usual = row_scales(matrices[name], bits=bits, clip=row_rule(name, config).clip)
        alive = usual > 0
        log_ratio += float((usual[alive].log() + costs[name][alive].log() / 2).sum()) * matrices[name].shape[1]
        count += int(alive.sum()) * matrices[name].shape[1]
    level = torch.tensor(log_ratio / max(1, count)).exp()
    scales = {}
    for name, weight in matrices.items():
        bits = stored_bits(name, weight, config)
        assert bits is not None
        largest = weight.abs().amax(1) / code_limit(bits)
        scale = (level.to(weight.device) * costs[name].rsqrt()).clamp_max(COARSEST_SCALE).maximum(largest)
        scales[name] = torch.where(largest > 0, round_scales(scale, config.scale_digits), torch.zeros_like(scale))
    return scales


def order_hidden_units(
    weights: Mapping[str, Tensor], calibration: Calibration | None, *, by_sensitivity: bool
) -> tuple[dict[str, Tensor], Calibration | None]:
    """Return weights and calibration with the hidden units of every MLP sorted by what gives their rows a scale, the
    sensitivity or else the root mean square: the same function.

    A pair PREFIX.up, PREFIX.down of matrices has hidden units that can stand in any order, because what lies between
    treats all alike. Rows that are alike then follow each other, and their scales compress.
    """
    ordered = dict(weights)
    spreads = dict(calibration.spreads) if calibration else {}
    sensitivity = dict(calibration.sensitivity) if calibration else {}
    for up_name, down_name in hidden_pairs(weights):
        up, down = weights[up_name], weights[down_name]
        size = sensitivity[up_name] if by_sensitivity and up_name in sensitivity else up.square().mean(1).cpu()
        order = torch.argsort(size, descending=True, stable=True).to(up.device)
        ordered[up_name], ordered[down_name] = up[order], down[:, order]
        if up_name in sensitivity:
            sensitivity[up_name] = sensitivity[up_name][order.cpu()]
        if down_name in spreads:
            spread, place = spreads[down_name], torch.argsort(order)  # the new place of each old column
            spreads[down_name] = ErrorSpread(order=place[spread.order], factor=spread.factor, gain=spread.gain)
    return ordered, Calibration(spreads=spreads, sensitivity=sensitivity) if calibration else None


def hidden_pairs(weights: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return the names of every PREFIX.up and PREFIX.down of matrices that share hidden units."""
    pairs = []
    for up_name in weights:
        down_name = up_name.removesuffix("up.weight") + "down.weight"
        if up_name.split(".")[-2:] != ["up", "weight"] or down_name not in weights:
            continue
        up, down = weights[up_name], weights[down_name]
        if up.ndim == 2 and down.ndim == 2 and len(up) == down.shape[1]:
            pairs.append((up_name, down_name))
    return pairs
