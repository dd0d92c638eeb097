"""The MLP's products with its activation, for GPUs of compute capability 9.x (Triton).

Between `up` and `down` of the MLP lies the widest tensor of the network. A compiler that calls a library for its products
writes it, reads it, writes its activation, and as much again in the backward pass. Here the activation is taken while the
product is still in registers.

A persistent kernel: its programs walk over the tiles, and loads of the next tile begin while the last one is written.
Source of the idea: modded-nanogpt's fused linear and squared ReLU (2025); written anew.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Ending = Literal["activate", "slope"]


class Tiles(NamedTuple):
    """How the work is divided."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    parts: int
    """In how many parts of its columns a tile is finished, 1 or 2: fewer registers, smaller messages."""
    programs: int = 1
    """On each multiprocessor."""


ACTIVATE_TILES = Tiles(128, 256, 64, 4, 8, 2)
SLOPE_TILES = Tiles(128, 256, 64, 3, 8, 2)
"""The fastest of those tried (benchmarks/benchmark_mlp_kernels.py); a fourth stage of the second does not fit."""


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    part, row_scale, given_desc, result_desc, row, column, ENDING: tl.constexpr
):
    """Write one part of a tile."""
    if ENDING == "activate":  # `given` is written as well: what the activation was taken of
        hidden = (part * row_scale[:, None]).to(given_desc.dtype)
        given_desc.store([row, column], hidden)
        rounded = hidden.to(tl.float32)
        result = rounded * tl.where(rounded > 0, rounded, 0.25 * rounded)
    else:
        given = given_desc.load([row, column]).to(tl.float32)
        result = part * row_scale[:, None] * tl.where(given > 0, 2.0 * given, 0.5 * given)
    result_desc.store([row, column], result.to(result_desc.dtype))


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    a_desc,
    b_desc,
    row_scale_ptr,
    given_desc,
    result_desc,
    num_rows,
    num_columns,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_STEP: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    ENDING: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
):
    """a (rows, depth) times b^T, b (columns, depth), or for a slope times b, (depth, columns), and then `_finish`."""
    tiles_across = tl.cdiv(num_columns, COLUMNS)
    num_tiles = tl.cdiv(num_rows, ROWS) * tiles_across
    for tile in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS, flatten=True):
        row, column = tile // tiles_across * ROWS, tile % tiles_across * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in range(DEPTH // DEPTH_STEP):
            a = a_desc.load([row, step * DEPTH_STEP])
            if ENDING == "slope":
                total = tl.dot(a, b_desc.load([step * DEPTH_STEP, column]), total)
            else:
                total = tl.dot(a, b_desc.load([column, step * DEPTH_STEP]).T, total)
        rows = row + tl.arange(0, ROWS)
        row_scale = tl.full((ROWS,), 1.0, tl.float32)
        if HAS_ROW_SCALE:
            row_scale = tl.load(row_scale_ptr + rows, mask=rows < num_rows, other=0.0)
        if PARTS == 2:
            halves = tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            _finish(left, row_scale, given_desc, result_desc, row, column, ENDING)
            _finish(right, row_scale, given_desc, result_desc, row, column + COLUMNS // 2, ENDING)
        else:
            _finish(total, row_scale, given_desc, result_desc, row, column, ENDING)


def up_and_activate(
    x: Tensor, weight: Tensor, row_scale: Tensor | None, tiles: Tiles = ACTIVATE_TILES
) -> tuple[Tensor, Tensor]:
    """Return hidden = row_scale * (x @ weight^T) and leaky_relu(hidden, 0.5)^2; x (N, D), weight (M, D), bfloat16."""
    hidden = torch.empty((x.size(0), weight.size(0)), device=x.device, dtype=x.dtype)
    activated = torch.empty_like(hidden)
    _launch("activate", x, weight, row_scale, hidden, activated, tiles)
    return hidden, activated


def gradient_of_hidden(
    gradient: Tensor, weight: Tensor, hidden: Tensor, row_scale: Tensor | None, tiles: Tiles = SLOPE_TILES
) -> Tensor:
    """Return row_scale * (gradient @ weight) times the activation's slope at `hidden`; gradient (N, D), weight (D, M)."""
    result = torch.empty_like(hidden)
    _launch("slope", gradient, weight, row_scale, hidden, result, tiles)
    return result


def _launch(
    ending: Ending, a: Tensor, b: Tensor, row_scale: Tensor | None, given: Tensor, result: Tensor, tiles: Tiles
) -> None:
    num_programs = tiles.programs * torch.cuda.get_device_properties(a.device).multi_processor_count
    finished = [tiles.rows, tiles.columns // tiles.parts]
    kernel: Any = _product
    kernel[(num_programs,)](
        TensorDescriptor.from_tensor(a, [tiles.rows, tiles.depth]),
        TensorDescriptor.from_tensor(b, [tiles.depth, tiles.columns][:: 1 if ending == "slope" else -1]),
        a if row_scale is None else row_scale,  # not read without
        TensorDescriptor.from_tensor(given, finished),
        TensorDescriptor.from_tensor(result, finished),
        a.size(0),
        result.size(1),
        DEPTH=a.size(1),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH_STEP=tiles.depth,
        PARTS=tiles.parts,
        NUM_PROGRAMS=num_programs,
        ENDING=ending,
        HAS_ROW_SCALE=row_scale is not None,
        num_stages=tiles.stages,
        num_warps=tiles.warps,
    )
