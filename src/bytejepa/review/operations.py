"""Operators on what is known of values, and which split a path or name stands for. Torch-free."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

from bytejepa.review.syntax import is_huge
from bytejepa.review.values import AHEAD, BEHIND, FORWARD, HASHED, PREFIX, TRAINING, UNKNOWN, VALIDATION, Value, combine

OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.BitXor: operator.xor, ast.LShift: operator.lshift, ast.RShift: operator.rshift, ast.Pow: operator.pow,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: lambda a, b: a is b if None in (a, b) else a == b,
    ast.IsNot: lambda a, b: a is not b if None in (a, b) else a != b,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
MAX_CONSTANT_LENGTH = 1_000_000
"""Longer text, bytes and tuples are not kept: a few sums with themselves would fill the memory."""
MAX_REPEATED = 100_000_000
"""Characters of an argument that stands at every character of a text, as `replace` can put it."""
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})")
"""A conversion whose width is thousands of characters, or given as an argument."""
_WIDE_FIELD = re.compile(r"\{[^{}]*(?:\{|:[^{}]*\d{4})")
"""The same of `str.format`."""
_VALIDATION_PATH = re.compile(r"(?:^|[^a-z])val(?:id|idation)?(?:[^a-z]|$)")
_TRAINING_PATH = re.compile(r"(?:^|[^a-z])train(?:ing)?(?:[^a-z]|$)")


def path_labels(text: str) -> frozenset[str]:
    """Return which split a file pattern or split name stands for."""
    lowered = text.lower()
    looks_like_path = any(mark in text for mark in ("*", "/", ".bin", ".npy", ".pt", ".jsonl")) and "\n" not in text
    if lowered in ("val", "valid", "validation") or (looks_like_path and _VALIDATION_PATH.search(lowered)):
        return frozenset((VALIDATION,))
    if lowered == "train" or (looks_like_path and _TRAINING_PATH.search(lowered) and "train_gpt" not in lowered):
        return frozenset((TRAINING,))
    return frozenset()


def compute(operation: type[ast.AST], left: Any, right: Any) -> Any:
    """Return the constant result of an operator, UNKNOWN where there is none or it would be huge."""
    if operation in (ast.Pow, ast.LShift) and not (isinstance(right, int | float) and abs(right) <= 64):
        return UNKNOWN
    if is_huge(left) or is_huge(right):
        return UNKNOWN
    if operation is ast.Mod and isinstance(left, str | bytes) and _WIDE_FORMAT.search(str(left)):
        return UNKNOWN
    if operation is ast.Mult and any(isinstance(part, str | bytes | list | tuple) for part in (left, right)):
        return UNKNOWN
    try:
        return bounded(OPERATORS[operation](left, right))
    except Exception:  # whatever the script's own operands provoke
        return UNKNOWN


def bounded(value: Any) -> Any:
    """Return a constant that was computed, UNKNOWN if it is too large to go on with."""
    is_long = isinstance(value, str | bytes | tuple) and len(value) > MAX_CONSTANT_LENGTH
    return UNKNOWN if is_long or is_huge(value) else value


def call_on_text(text: str, method: str, arguments: list[Any]) -> Any:
    """Return the constant result of a method of a text, UNKNOWN where there is none or it would be huge."""
    longest = max((len(argument) for argument in arguments if isinstance(argument, str | tuple)), default=0)
    if len(text) * longest > MAX_REPEATED or (method == "format" and _WIDE_FIELD.search(text)):
        return UNKNOWN
    try:
        answer = getattr(text, method)(*arguments)
    except Exception:  # whatever the script's own arguments provoke
        return UNKNOWN
    return bounded(tuple(answer) if isinstance(answer, list) else answer)


def operate(operation: ast.operator, left: Value, right: Value) -> Value:
    """Return what is known of `left operation right`."""
    result = combine(left, right)
    if left.is_known and right.is_known:
        result.constant = compute(type(operation), left.constant, right.constant)
        if isinstance(result.constant, str):
            result.labels |= path_labels(result.constant)
    elif isinstance(operation, ast.Div | ast.Add) and (left.is_known or right.is_known):
        text = next(str(part.constant) for part in (left, right) if part.is_known)
        result.labels |= path_labels(text) if len(text) < 400 else frozenset()
    if isinstance(operation, ast.Sub):
        result.labels -= {AHEAD, BEHIND}  # a difference of bounds is a length, not a place
    if isinstance(operation, ast.Mult):
        result.at_most = next(
            (a.at_most * b.constant for a, b in ((left, right), (right, left))
             if a.at_most is not None and type(b.constant) is int and b.constant > 0), None,
        )  # fmt: skip
    has_ids = VALIDATION in result.labels and FORWARD not in result.labels
    if isinstance(operation, ast.BitXor | ast.Mod) and has_ids and result.sites:
        result.labels |= {HASHED}
    predictions = [part for part in (left, right) if FORWARD in part.labels]
    same_prefix = all(part.has(PREFIX) for part in predictions) and len({p.bound_text for p in predictions}) == 1
    if PREFIX in result.labels and not same_prefix and not isinstance(operation, ast.Mult | ast.Div):
        result.labels -= {PREFIX}  # with a loss of other positions in the sum it is no prefix any more
    return result
