"""Settings that are chosen by their loss on validation data: a loop over candidates of which the best is kept. Torch-free.

A loss is one of several candidates' if the same data is scored again in each turn of some loop. Where such losses are
compared a "choice" is noted, and what is kept because of it is labelled, so that `choice_rules` sees where it goes.
"""

from __future__ import annotations

import ast
import dataclasses

from bytejepa.review.free_tensors import FreeTensors
from bytejepa.review.values import CHOSEN, FORWARD, PREFIX, VALIDATION, Value, combine

TWO_EVALUATIONS = "two evaluations"
"""Detail of a choice between evaluations that are written out one after the other."""
CALLABLE = ("function", "bound", "partial")


class Choices(FreeTensors):
    """Notes choices by validation loss."""

    def note_comparison(self, node: ast.Compare, values: list[Value]) -> frozenset[str]:
        """Note a choice where the losses of a loop's turns are compared; return the label of what is kept for it."""
        ordered = any(isinstance(operation, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for operation in node.ops)
        losses = [value for value in values if self._is_of_candidates(value, inside=True)] if ordered else []
        if losses:
            return self._choose(losses[0], node)
        if ordered and len(values) == 2 and self._are_two_evaluations(*values):
            return self._choose(combine(*values), node, TWO_EVALUATIONS)
        return frozenset()

    def note_selection(self, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> frozenset[str]:
        """Note a choice by `min`, `argmin` and the like; return the label of what comes out of it."""
        key = options.get("key", Value())
        if key.kind in CALLABLE and arguments:
            return self.note_trials(key, self.element(arguments[0]), node)
        measured = combine(*arguments, key)
        return (
            self._choose(measured, node) if self._is_of_candidates(measured, inside=len(arguments) > 1) else frozenset()
        )

    def note_trials(self, function: Value, candidate: Value, node: ast.AST) -> frozenset[str]:
        """Note a choice by something that calls a function with one candidate after the other."""
        with self.looping(self.place(node, "trials")):
            measured = self.call_value(function, [combine(candidate)], {}, node)  # type: ignore[arg-type]
            if measured.kind == "sequence" and isinstance(measured.payload, list):
                measured = combine(measured, *measured.payload)
            chooses = self._is_of_candidates(measured, inside=True)
        return self._choose(measured, node) if chooses else frozenset()

    def keep_chosen(self, body: list[ast.stmt], before: dict[str, Value]) -> None:
        """Label what a branch bound that a choice decides on."""
        names = self.frame.scope.names
        for part in (part for statement in body for part in ast.walk(statement)):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and part.id in names:
                value = names[part.id]
                if value is not before.get(part.id):
                    names[part.id] = dataclasses.replace(value, labels=value.labels | {CHOSEN})

    def _are_two_evaluations(self, one: Value, other: Value) -> bool:
        """Return whether these are losses of two evaluations that have ended."""
        passes = [{number for number in value.forwards if number in self.passes} for value in (one, other)]
        data = [self.passes[number][1] for number in passes[0] | passes[1]]
        ended = all(loops and not loops & {*self.loops, *self.comprehensions} for loops in data)
        losses = all(value.has(VALIDATION, FORWARD) and PREFIX not in value.labels for value in (one, other))
        return losses and ended and all(passes) and not passes[0] & passes[1]

    def _choose(self, measured: Value, node: ast.AST, detail: str = "") -> frozenset[str]:
        self.emit("choice", node, measured, detail)
        return frozenset((CHOSEN,))

    def _is_of_candidates(self, loss: Value, *, inside: bool) -> bool:
        """Return whether a loss is one of several of the same data: of the loops around here, or of ended ones."""
        if not loss.has(VALIDATION, FORWARD) or PREFIX in loss.labels:
            return False
        around = {*self.loops, *self.comprehensions}
        return any(
            (loop in around) == inside and loop not in data and -loop not in data
            for loops, data in (self.passes[number] for number in loss.forwards if number in self.passes)
            for loop in loops
        )

    def _listcomp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Value:
        before = self.comprehensions
        self.comprehensions = (*before, self.place(node.generators[0].target, "loop"))
        try:
            return super()._listcomp(node)
        finally:
            self.comprehensions = before

    _setcomp = _generatorexp = _listcomp
