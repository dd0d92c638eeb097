"""The kernel under every product of the fast path: a tile of int16 rows times packed int8 or int16 columns, summed in int32.

Numba's own vectoriser widens the products to 64 bits, so the tile is written in LLVM IR: multiply 16 pairs of 16-bit
numbers and add the pairs. LLVM turns that into one instruction where there is one (vpdpwssd, vpmaddwd, smlal) and into
several elsewhere; int32 sums that do not overflow are the same on all of them.

Packed columns: for a matrix of N outputs and K inputs, an array (N / 16, K / 2, 16, 2), that is, blocks of 16 outputs,
in them pairs of inputs, padded with zeros to N % 32 == 0 and K % 2 == 0.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from bytejepa.kernels.compilation import compiled

LANES = 16
TILE_BLOCKS = 2
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_PAIRS, _SUMS = ir.VectorType(_I32, 2 * LANES), ir.VectorType(_I32, LANES)


def pack(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a matrix (N, K) as packed columns."""
    outputs, inputs = matrix.shape
    padded = np.zeros((-(-outputs // 32) * 32, inputs + inputs % 2), dtype=matrix.dtype)
    padded[:outputs, :inputs] = matrix
    return np.ascontiguousarray(padded.reshape(len(padded) // LANES, LANES, -1, 2).transpose(0, 2, 1, 3))


def _constant(value: int) -> Any:
    return ir.Constant(_I64, value)


def _at(builder: Any, base: Any, row_stride: Any, row: int, offset: Any, item_bytes: int, kind: Any) -> Any:
    """Return base + (row * row_stride + offset) * item_bytes as a pointer to `kind`."""
    items = builder.add(builder.mul(row_stride, _constant(row)), offset)
    return builder.inttoptr(builder.add(base, builder.mul(items, _constant(item_bytes))), kind.as_pointer())


def _pair_sums(builder: Any, product: Any) -> Any:
    undefined = ir.Constant(_PAIRS, ir.Undefined)
    index = ir.VectorType(_I32, LANES)
    even, odd = (
        builder.shuffle_vector(product, undefined, ir.Constant(index, list(range(first, 2 * LANES, 2))))
        for first in (0, 1)
    )
    return builder.add(even, odd)


def _tile(num_rows: int, column_bits: int) -> Any:
    """Return the intrinsic tile(a, a_stride, b, b_stride, pairs, out, out_stride): addresses, strides in items."""
    columns = ir.VectorType(ir.IntType(column_bits), 2 * LANES)
    pair = ir.VectorType(_I16, 2)

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        a, a_stride, b, b_stride, pairs, out, out_stride = arguments
        sums = [[cgutils.alloca_once(builder, _SUMS) for _ in range(TILE_BLOCKS)] for _ in range(num_rows)]
        for place in itertools.chain.from_iterable(sums):
            builder.store(ir.Constant(_SUMS, [0] * LANES), place)
        with cgutils.for_range(builder, pairs, intp=_I64) as loop:
            rows = []
            for row in range(num_rows):
                offset = builder.mul(loop.index, _constant(2))
                two = builder.load(_at(builder, a, a_stride, row, offset, 2, pair), align=2)
                index = ir.Constant(ir.VectorType(_I32, 2 * LANES), [0, 1] * LANES)
                wide = builder.shuffle_vector(two, ir.Constant(pair, ir.Undefined), index)
                rows.append(builder.sext(wide, _PAIRS))
            for block in range(TILE_BLOCKS):
                offset = builder.mul(loop.index, _constant(2 * LANES))
                place = _at(builder, b, b_stride, block, offset, column_bits // 8, columns)
                column = builder.sext(builder.load(place, align=1), _PAIRS)
                for row in range(num_rows):
                    added = _pair_sums(builder, builder.mul(rows[row], column))
                    builder.store(builder.add(builder.load(sums[row][block]), added), sums[row][block])
        for row in range(num_rows):
            for block in range(TILE_BLOCKS):
                place = _at(builder, out, out_stride, row, _constant(LANES * block), 4, _SUMS)
                builder.store(builder.load(sums[row][block]), place, align=4)
        return _context.get_dummy_value()

    def tile(  # numba reads the names and the number of its parameters
        _typing: Any, _a: Any, _a_stride: Any, _b: Any, _b_stride: Any, _pairs: Any, _out: Any, _out_stride: Any
    ) -> Any:
        return types.void(*[types.intp] * 7), codegen

    return intrinsic(tile)


_ONE_BY_8, _TWO_BY_8, _THREE_BY_8, _FOUR_BY_8 = (_tile(rows, 8) for rows in (1, 2, 3, 4))
_ONE_BY_16, _TWO_BY_16, _THREE_BY_16, _FOUR_BY_16 = (_tile(rows, 16) for rows in (1, 2, 3, 4))


@compiled
def multiply(a: Any, packed: Any, out: Any) -> None:
    """Fill `out` (R, N) int32 with a @ matrix^T for `a` (R, K) int16 and a packed int8 matrix; N, K padded."""
    num_rows, inputs = a.shape
    stride, outputs = inputs * 16, out.shape[1]
    a_at, b_at, out_at = a.ctypes.data, packed.ctypes.data, out.ctypes.data
    for block in range(0, packed.shape[0], 2):
        b = b_at + block * stride
        row = 0
        while row < num_rows:
            a_row, out_row = a_at + 2 * row * inputs, out_at + 4 * (row * outputs + 16 * block)
            left = num_rows - row
            if left >= 4:
                _FOUR_BY_8(a_row, inputs, b, stride, inputs // 2, out_row, outputs)
            elif left == 3:
                _THREE_BY_8(a_row, inputs, b, stride, inputs // 2, out_row, outputs)
            elif left == 2:
                _TWO_BY_8(a_row, inputs, b, stride, inputs // 2, out_row, outputs)
            else:
                _ONE_BY_8(a_row, inputs, b, stride, inputs // 2, out_row, outputs)
            row += min(4, left)


@compiled
def multiply_wide(
    a_at: int, a_stride: int, num_rows: int, b_at: int, b_stride: int, blocks: int, pairs: int, out_at: int,
    out_stride: int,
) -> None:  # fmt: skip
    """The same for up to 4 rows and int16 columns, by addresses: `blocks` of 16 outputs, an even number of them."""
    for block in range(0, blocks, 2):
        b, out = b_at + 2 * block * b_stride, out_at + 64 * block
        if num_rows == 4:
            _FOUR_BY_16(a_at, a_stride, b, b_stride, pairs, out, out_stride)
        elif num_rows == 3:
            _THREE_BY_16(a_at, a_stride, b, b_stride, pairs, out, out_stride)
        elif num_rows == 2:
            _TWO_BY_16(a_at, a_stride, b, b_stride, pairs, out, out_stride)
        else:
            _ONE_BY_16(a_at, a_stride, b, b_stride, pairs, out, out_stride)
