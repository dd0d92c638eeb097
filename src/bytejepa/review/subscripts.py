"""Indexing and slicing, as the abstract interpreter sees them: which ids are read, from where on, and how many. Torch-free."""

from __future__ import annotations

import ast

from bytejepa.review.expressions import Expressions, within
from bytejepa.review.values import (
    AHEAD,
    BEHIND,
    FORWARD,
    HASHED,
    PREDICTED,
    PREFIX,
    RANDOM,
    ROWS,
    SAMPLED,
    SUBSET,
    SUFFIX,
    TABLE,
    TARGET,
    UNKNOWN,
    VALIDATION,
    Value,
    combine,
)

SMALLEST_SUBSET = 65_536
"""A constant upper bound from here on is a deliberate part of the split, not a warm-up batch."""
LARGEST_SUBSET = 36_000_000
"""The split has 40.5 million tokens at 8,192 words; a bound near that number is the split's own length."""


class Subscripts(Expressions):
    """Evaluates subscripts."""

    def _subscript(self, node: ast.Subscript) -> Value:
        owner = self.evaluate(node.value)
        if owner.kind == "member":
            owner = combine(owner)
        if isinstance(node.slice, ast.Slice):
            return self._sliced(owner, node.slice, node)
        index = self.evaluate(node.slice)
        if owner.kind == "module" and owner.payload == "os.environ":
            name = index.constant
            return Value(constant=self.settings.get(name, UNKNOWN) if isinstance(name, str) else UNKNOWN)
        if index.is_known and f"[{index.constant}]" in owner.attributes:
            return owner.attributes[f"[{index.constant}]"]
        if (
            owner.kind == "sequence"
            and isinstance(owner.payload, list)
            and index.is_known
            and isinstance(index.constant, int)
        ) and -len(owner.payload) <= index.constant < len(owner.payload):
            return owner.payload[index.constant]
        if owner.kind == "sequence" and not (isinstance(node.slice, ast.Tuple)):
            item = self.element(owner)
            if item.kind != "data" or item.origin:
                return within(item, index.loops)
        result = combine(owner, index)
        result.loops = owner.loops | index.loops
        if VALIDATION in index.labels:
            result.labels -= {PREDICTED}
        if isinstance(node.slice, ast.Tuple):
            self._region(node.slice, result)
        if owner.origin and VALIDATION in index.labels:
            result.sites = index.sites  # what was asked for, not what was put in
        self._read(node, owner, index, result)
        if owner.kind == "data" and owner.payload == TABLE and owner.origin:
            result.origin, result.payload = owner.origin, TABLE
        elif owner.kind == "data" and owner.payload == ROWS and VALIDATION not in index.labels | owner.labels:
            result.origin = owner.origin if not isinstance(node.slice, ast.Tuple) else 0
        return result

    def _region(self, index: ast.Tuple, result: Value) -> None:
        """Label losses of which only the positions before some bound are taken."""
        for part in index.elts:
            if isinstance(part, ast.Slice) and part.upper is not None and self._is_start(part.lower):
                result.labels |= {PREFIX}
                result.bound_text = ast.unparse(part.upper)

    @staticmethod
    def _is_start(lower: ast.expr | None) -> bool:
        return lower is None or (isinstance(lower, ast.Constant) and lower.value == 0)

    def _read(self, node: ast.Subscript, owner: Value, index: Value, result: Value) -> None:
        """Note a read of ids by position, or of a table by ids."""
        if VALIDATION in owner.labels and FORWARD not in owner.labels and VALIDATION not in index.labels:
            result.sites |= {self.place(node.slice, "site")}
            if RANDOM in index.labels:
                result.labels |= {SAMPLED}
            if isinstance(node.slice, ast.BinOp) and isinstance(node.slice.op, ast.Add):
                step = self.evaluate(node.slice.right)
                if step.is_known and step.constant == 1:
                    result.labels |= {TARGET}
        if (
            VALIDATION in index.labels
            and (index.sites or HASHED in index.labels or TARGET in index.labels)
            and owner.origin
        ):
            self.emit("lookup", node, index, other=owner)

    def _slice(self, node: ast.Slice) -> Value:
        bounds = combine(self.evaluate(node.lower), self.evaluate(node.upper))
        return Value(loops=bounds.loops, labels=bounds.labels & {AHEAD, BEHIND})

    def _sliced(self, owner: Value, bounds: ast.Slice, node: ast.Subscript) -> Value:
        lower, upper = self.evaluate(bounds.lower), self.evaluate(bounds.upper)
        result = combine(owner)  # bounds say which part it is, not where its content came from
        result.loops = owner.loops | lower.loops | upper.loops
        if owner.is_known and lower.is_known and upper.is_known and isinstance(owner.constant, str | bytes | tuple):
            try:
                result.constant = owner.constant[lower.constant : upper.constant]
            except TypeError:
                result.constant = UNKNOWN
        if owner.kind == "sequence":
            result.kind, result.payload, result.origin = "sequence", self.element(owner), owner.origin
        if FORWARD in owner.labels or VALIDATION not in owner.labels:
            if bounds.upper is not None and self._is_start(bounds.lower) and FORWARD in owner.labels:
                result.labels |= {PREFIX}
                result.bound_text = ast.unparse(bounds.upper)
                if self._is_part(owner, upper, bounds) and VALIDATION in owner.labels:
                    self.emit("part", node, owner)  # of all the losses only the first are used
            elif bounds.lower is not None and bounds.upper is None and FORWARD in owner.labels:
                result.labels |= {SUFFIX}
                result.bound_text = ast.unparse(bounds.lower)
            return result
        result.sites |= {self.place(node.slice, "site")}
        if RANDOM in lower.labels | upper.labels:
            result.labels |= {SAMPLED}
        if AHEAD in lower.labels:
            result.labels |= {AHEAD}
        if BEHIND in lower.labels:
            result.labels |= {BEHIND}
        if self._starts_one_later(bounds.lower):
            result.labels |= {TARGET}
        is_cut = self._is_start(bounds.lower) and isinstance(upper.constant, int) and upper.constant >= SMALLEST_SUBSET
        if (is_cut and owner.kind == "data" and not owner.loops & set(self.loops)) or self._is_part(
            owner, lower if lower.loops else upper, bounds
        ):
            result.labels |= {SUBSET}
        return result

    def _is_part(self, owner: Value, bound: Value, bounds: ast.Slice) -> bool:
        """Return whether a slice, or the turns of a loop over slices i * n, end long before the split does."""
        if not (bound.loops or self._is_start(bounds.lower)) or owner.kind != "data" or owner.loops & set(self.loops):
            return False
        end = bound.constant if type(bound.constant) is int else bound.at_most
        return end is not None and SMALLEST_SUBSET <= end <= LARGEST_SUBSET

    @staticmethod
    def _starts_one_later(lower: ast.expr | None) -> bool:
        if isinstance(lower, ast.BinOp) and isinstance(lower.op, ast.Add):
            return any(isinstance(side, ast.Constant) and side.value == 1 for side in (lower.left, lower.right))
        return isinstance(lower, ast.Constant) and lower.value == 1

    def note_lookup(self, owner: Value, index: Value, node: ast.AST) -> None:
        """Note a read of a table by ids."""
        if VALIDATION in index.labels and FORWARD not in owner.labels and owner.origin and not owner.models:
            self.emit("lookup", node, index, other=owner)

    def update_table(self, table: Value, key: Value, node: ast.AST) -> None:
        """Note that counts were filled from ids."""
        if (
            VALIDATION in key.labels
            and FORWARD not in key.labels
            and table.origin
            and (key.sites or HASHED in key.labels)
        ):
            self.emit("fill", node, key, other=table)
