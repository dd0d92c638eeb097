"""What happens to the rows of attention between its products, in LLVM IR, for numba functions: vectors of 16 numbers."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from bytejepa.kernels.tiled_products import INTEGERS, LANES, VECTOR, at, call, everywhere, in_ir, whole

_EXP_LEAST = -87.3
_LOG2_E = 1.44269504088896341
_LN_2_HIGH, _LN_2_LOW = 0.693359375, -2.12194440e-4
_EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Of (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2, from the Cephes library (Moshier, 1989): two units in the last place."""


def _constant(value: float) -> Any:
    return ir.Constant(VECTOR, [value] * LANES)


def _exp(builder: Any, x: Any) -> Any:
    """Return exp of a vector, at least exp(-87.3); NaN stays NaN."""
    least = _constant(_EXP_LEAST)
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    power = call(builder, "rint", builder.fmul(x, _constant(_LOG2_E)))
    rest = call(builder, "fma", power, _constant(-_LN_2_HIGH), x)
    rest = call(builder, "fma", power, _constant(-_LN_2_LOW), rest)
    value = _constant(_EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        value = call(builder, "fma", value, rest, _constant(coefficient))
    value = call(builder, "fma", value, builder.fmul(rest, rest), builder.fadd(rest, _constant(1.0)))
    exponent = builder.add(builder.fptosi(power, INTEGERS), ir.Constant(INTEGERS, [127] * LANES))
    return builder.fmul(value, builder.bitcast(builder.shl(exponent, ir.Constant(INTEGERS, [23] * LANES)), VECTOR))


def _added_up(builder: Any, vector: Any) -> Any:
    """Return the sum of a vector's numbers, halves first."""
    for width in (8, 4, 2, 1):
        order = ir.Constant(INTEGERS, [(lane + width) % LANES for lane in range(LANES)])
        vector = builder.fadd(vector, builder.shuffle_vector(vector, ir.Constant(VECTOR, ir.Undefined), order))
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


@in_ir
def largest(_typing: Any, _row: Any, _vectors: Any) -> Any:
    """The largest number of a row of vectors."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        row, vectors = arguments
        largest = cgutils.alloca_once_value(builder, _constant(-math.inf))
        with cgutils.for_range(builder, vectors, intp=ir.IntType(64)) as loop:
            values = builder.load(at(builder, row, builder.mul(loop.index, whole(LANES))), align=4)
            before = builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", values, before), values, before), largest)
        vector = builder.load(largest)
        for width in (8, 4, 2, 1):
            order = ir.Constant(INTEGERS, [(lane + width) % LANES for lane in range(LANES)])
            turned = builder.shuffle_vector(vector, ir.Constant(VECTOR, ir.Undefined), order)
            vector = builder.select(builder.fcmp_ordered(">", vector, turned), vector, turned)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.intp, types.intp), codegen


@in_ir
def exponentials(_typing: Any, _row: Any, _vectors: Any, _factor: Any, _least: Any) -> Any:
    """Replace the numbers x of a row by exp(factor * x - least) and return their sum."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        row, vectors, factor, least = arguments
        total = cgutils.alloca_once_value(builder, _constant(0.0))
        factors, shift = everywhere(builder, factor), builder.fneg(everywhere(builder, least))
        with cgutils.for_range(builder, vectors, intp=ir.IntType(64)) as loop:
            place = at(builder, row, builder.mul(loop.index, whole(LANES)))
            value = _exp(builder, call(builder, "fma", builder.load(place, align=4), factors, shift))
            builder.store(value, place, align=4)
            builder.store(builder.fadd(builder.load(total), value), total)
        return _added_up(builder, builder.load(total))

    return types.float32(types.intp, types.intp, types.float32, types.float32), codegen


@in_ir
def slopes(_typing: Any, _s: Any, _dp: Any, _vectors: Any, _factor: Any, _log_sum: Any, _along: Any) -> Any:
    """Replace a row s by p = exp(factor * s - log_sum), and dp by p * (dp - along) * factor."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        scores, gradients, vectors, factor, log_sum, along = arguments
        factors, shift = everywhere(builder, factor), builder.fneg(everywhere(builder, log_sum))
        mean = everywhere(builder, along)
        with cgutils.for_range(builder, vectors, intp=ir.IntType(64)) as loop:
            item = builder.mul(loop.index, whole(LANES))
            place, other = at(builder, scores, item), at(builder, gradients, item)
            value = _exp(builder, call(builder, "fma", builder.load(place, align=4), factors, shift))
            builder.store(value, place, align=4)
            slope = builder.fmul(builder.fsub(builder.load(other, align=4), mean), builder.fmul(value, factors))
            builder.store(slope, other, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3, *[types.float32] * 3), codegen


@in_ir
def dot(_typing: Any, _a: Any, _b: Any, _vectors: Any) -> Any:
    """The scalar product of two rows of vectors."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        a, b, vectors = arguments
        total = cgutils.alloca_once_value(builder, _constant(0.0))
        with cgutils.for_range(builder, vectors, intp=ir.IntType(64)) as loop:
            item = builder.mul(loop.index, whole(LANES))
            left, right = (builder.load(at(builder, row, item), align=4) for row in (a, b))
            builder.store(call(builder, "fma", left, right, builder.load(total)), total)
        return _added_up(builder, builder.load(total))

    return types.float32(*[types.intp] * 3), codegen


@in_ir
def multiply_row(_typing: Any, _row: Any, _vectors: Any, _factor: Any) -> Any:
    """Multiply a row of vectors by one number."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        row, vectors, factor = arguments
        factors = everywhere(builder, factor)
        with cgutils.for_range(builder, vectors, intp=ir.IntType(64)) as loop:
            place = at(builder, row, builder.mul(loop.index, whole(LANES)))
            builder.store(builder.fmul(builder.load(place, align=4), factors), place, align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), codegen


@in_ir
def next_number(_typing: Any, _counter: Any) -> Any:
    """Return a 64-bit counter and raise it by one, at once for all threads."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, whole(1), "monotonic")

    return types.intp(types.intp), codegen


@in_ir
def pointer_to(_typing: Any, _address: Any) -> Any:
    """Return an address as a pointer."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), codegen
