"""Tensors that are no model's, but change its predictions: a bias or a table of logits that evaluation keeps. Torch-free.

An in-place change by validation data is an "update", a place where predictions meet such a tensor a "use". Of the result
of a use, the predictions say which data it is of: what the tensor has learned from before is no part of it.
"""

from __future__ import annotations

import ast
import dataclasses

from bytejepa.review.subscripts import Subscripts
from bytejepa.review.values import PREDICTED, TARGET, TRAINING, VALIDATION, Value, combine

ADDING_METHODS = {
    "add_", "sub_", "mul_", "lerp_", "addcmul_", "addcdiv_", "addmm_", "index_add_", "scatter_add_", "scatter_reduce_",
}  # fmt: skip
"""Methods that change a tensor by something; others replace what it held."""
MIXING_METHODS = {"add", "sub", "add_", "sub_", "lerp", "lerp_", "logaddexp"}
MIXING_FUNCTIONS = {
    "torch.add", "torch.sub", "torch.lerp", "torch.logaddexp", "numpy.add", "numpy.logaddexp", "torch.nn.functional.linear",
    "torch.addmm",
}  # fmt: skip


class FreeTensors(Subscripts):
    """Notes what happens to tensors that are no model's."""

    def note_tensor_update(self, tensor: Value, change: Value, node: ast.AST, *, replaces: bool = False) -> bool:
        """Note that validation data changed a tensor in place.

        `replaces`: it is given a new content, which counts only if the old one went into it: a buffer that is filled for
        every batch learns nothing.
        """
        if tensor.origin not in self.free_tensors or tensor.kind != "data" or VALIDATION not in change.labels:
            return False
        if replaces and tensor.origin not in change.tables:
            return False
        self.learned |= {tensor.origin}
        self.emit(
            "update", node, combine(change), "without a gradient", other=Value(tables=frozenset((tensor.origin,)))
        )
        return True

    def note_rebinding(self, before: Value | None, value: Value, node: ast.Assign) -> None:
        """Note that a name got a tensor computed from the one it had: `bias = 0.9 * bias + counts`."""
        if before is None or before.origin == value.origin or value.kind != "data":
            return
        if not any(isinstance(part, ast.BinOp) for part in ast.walk(node.value)):
            return
        if self.note_tensor_update(before, value, node, replaces=True):
            value.origin = before.origin

    def note_use(self, predictions: Value, others: Value, result: Value, node: ast.AST) -> Value:
        """Note that `result` was computed from predictions and from a tensor that validation data has changed."""
        learned = others.roots & self.learned
        if PREDICTED not in predictions.labels or VALIDATION not in predictions.labels or not learned:
            return result
        if predictions.roots & self.learned & learned:  # the tensor itself, and what it learns
            return result
        place = self.place(node, "use")
        result.forwards = predictions.forwards | {-place}
        result.loops = predictions.loops
        self.emit("use", node, predictions, other=Value(tables=learned))
        self.events[-1].node = place
        return result

    def note_mixture(self, one: Value, other: Value, result: Value, node: ast.AST) -> Value:
        """Note a use whichever of the two are the predictions."""
        if PREDICTED in one.labels and not one.roots & self.learned:
            return self.note_use(one, other, result, node)
        return self.note_use(other, one, result, node)

    def mix_in_place(self, owner: Value, everything: list[Value], node: ast.AST) -> bool:
        """Add a tensor that validation data has changed to predictions in place; return whether it is one."""
        before = owner.forwards
        owner.forwards = self.note_use(owner, combine(*everything), combine(owner), node).forwards
        return owner.forwards != before

    def predicted(self, result: Value, everything: list[Value], node: ast.AST) -> Value:
        """Return what comes out of a network: predictions, or a loss where targets were handed in."""
        data = [
            value for value in everything if {VALIDATION, TRAINING} & value.labels and not value.roots & self.learned
        ]
        if data:  # another temperature does not make it other data
            result.loops = frozenset[int]().union(*(value.loops for value in data))
        if not any(TARGET in value.labels for value in data):
            result.labels |= {PREDICTED}
        predictions = self.forward(node, result, "model")
        own = dataclasses.replace(predictions, tables=combine(*data).tables)
        return self.note_use(own, combine(*everything), predictions, node)
