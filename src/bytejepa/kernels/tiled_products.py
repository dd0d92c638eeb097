"""Small float32 matrix products in LLVM IR, for numba functions: the arithmetic under `tiled_attention`.

Libraries reach two thirds of a core's speed on products of 64 rows; numba's own vectoriser keeps no sums in registers.
A tile of up to 4 rows and 64 columns is summed in up to 16 vectors of 16 numbers, which LLVM divides among whatever
registers the processor has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from bytejepa.kernels.compilation import compiled

LANES = 16
TILE_ROWS = 4


def _vectors_across() -> tuple[int, ...]:
    """Return of how many vectors a row of a tile may be: the sums of the widest tile fill half of the registers."""
    try:
        has_wide_registers = binding.get_host_cpu_features().get("avx512f", False)
    except RuntimeError:  # LLVM knows no features of this kind of processor
        has_wide_registers = False
    return (1, 2, 4) if has_wide_registers else (1,)


_BLOCKS = _vectors_across()
_SHAPES = [(rows, blocks) for rows in (1, TILE_ROWS) for blocks in _BLOCKS]
"""Of tiles for which there is code; compiling takes half a second each. None of them changes a number."""
_WIDEST, _NARROWER = _BLOCKS[-1], min(2, _BLOCKS[-1])
_I32, _I64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR, INTEGERS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)


def in_ir(function: Callable[..., Any]) -> Any:
    """Return numba's intrinsic of `function`, whose parameters but the first are those of the calls; as such it is called
    with one parameter fewer than type checkers see."""
    return intrinsic(function)


def whole(value: int) -> Any:
    """Return a 64-bit constant."""
    return ir.Constant(_I64, value)


def at(builder: Any, base: Any, items: Any, kind: Any = VECTOR) -> Any:
    """Return the address `base` + 4 `items` as a pointer to `kind`."""
    return builder.inttoptr(builder.add(base, builder.mul(items, whole(4))), kind.as_pointer())


def everywhere(builder: Any, value: Any) -> Any:
    """Return a vector of one number."""
    first = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(VECTOR, ir.Undefined), ir.Constant(INTEGERS, [0] * LANES))


def call(builder: Any, name: str, *arguments: Any) -> Any:
    """Return what LLVM's elementwise function `name` gives for vectors."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * len(arguments))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), arguments)


def _emit_tile(builder: Any, num_rows: int, num_blocks: int, arguments: Any) -> None:
    """Write the code of one shape of tile."""
    a, a_row, a_step, b, b_row, depth, out, out_row, factor, adds = arguments
    sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(num_blocks)] for _ in range(num_rows)]
    for place in itertools.chain.from_iterable(sums):
        builder.store(ir.Constant(VECTOR, [0.0] * LANES), place)
    with cgutils.for_range(builder, depth, intp=_I64) as loop:
        row_of_b = builder.mul(b_row, loop.index)
        columns = [
            builder.load(at(builder, b, builder.add(row_of_b, whole(LANES * block))), align=4)
            for block in range(num_blocks)
        ]
        for row in range(num_rows):
            item = builder.add(builder.mul(a_row, whole(row)), builder.mul(a_step, loop.index))
            value = everywhere(builder, builder.load(at(builder, a, item, _FLOAT), align=4))
            for place, column in zip(sums[row], columns, strict=True):
                builder.store(call(builder, "fma", value, column, builder.load(place)), place)
    scale = everywhere(builder, factor)
    places = [
        (at(builder, out, builder.add(builder.mul(out_row, whole(row)), whole(LANES * block))), sums[row][block])
        for row in range(num_rows)
        for block in range(num_blocks)
    ]
    with builder.if_else(adds) as (then, otherwise):
        with then:
            for place, total in places:
                there = builder.load(place, align=4)
                builder.store(call(builder, "fma", builder.load(total), scale, there), place, align=4)
        with otherwise:
            for place, total in places:
                builder.store(builder.fmul(builder.load(total), scale), place, align=4)


@in_ir
def _tile(
    _typing: Any, _rows: Any, _blocks: Any, _a: Any, _a_row: Any, _a_step: Any, _b: Any, _b_row: Any, _depth: Any,
    _out: Any, _out_row: Any, _factor: Any, _adds: Any,
) -> Any:  # fmt: skip
    """The tile of `_rows` and `_blocks`: out = factor * a @ b, plus what is there if it `adds`; see `multiply`."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows, blocks, *others = arguments
        after = builder.append_basic_block("after_tile")
        choice = builder.switch(builder.add(builder.mul(rows, whole(8)), blocks), after)
        for row, block in _SHAPES:
            here = builder.append_basic_block(f"tile_{row}_{block}")
            choice.add_case(whole(8 * row + block), here)
            builder.position_at_end(here)
            _emit_tile(builder, row, block, others)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 10, types.float32, types.boolean), codegen


@compiled
def multiply(
    a: int, a_row: int, a_step: int, b: int, b_row: int, depth: int, out: int, out_row: int, rows: int, columns: int,
    factor: float, adds: bool,
) -> None:  # fmt: skip
    """Fill `out` (rows, columns) with factor * a @ b, or add it there; addresses, strides in numbers, columns % 16 == 0.

    a[i, k] is at i a_row + k a_step, b[k, j] at k b_row + j, out[i, j] at i out_row + j.
    """
    column = 0
    while column < columns:
        left = (columns - column) // LANES
        blocks = _WIDEST if left >= _WIDEST else min(_NARROWER, left)
        row = 0
        while row < rows:
            count = TILE_ROWS if rows - row >= TILE_ROWS else 1
            _tile(
                count, blocks, a + 4 * row * a_row, a_row, a_step, b + 4 * column, b_row, depth,
                out + 4 * (row * out_row + column), out_row, factor, adds,
            )  # fmt: skip
            row += count
        column += blocks * LANES
