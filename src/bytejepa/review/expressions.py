"""Expressions, as the abstract interpreter evaluates them: constants where they are known, origins everywhere. Torch-free."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from typing import Any

from bytejepa.review.machine import Machine
from bytejepa.review.operations import MAX_CONSTANT_LENGTH, compute, operate, path_labels
from bytejepa.review.values import (
    AHEAD,
    BEHIND,
    CHOSEN,
    FORWARD,
    GRADIENT,
    HASHED,
    MATCHED,
    STORED,
    SUBSET,
    TABLE,
    TARGET,
    TRAINING,
    UNKNOWN,
    VALIDATION,
    Function,
    Scope,
    Value,
    absorb,
    combine,
    constant,
    merge,
)

MAX_LEAVES = 10_000
"""Constants in a tuple of tuples that is known as a whole: two of the last one in each of thirty are a billion."""
_TARGET_NAME = re.compile(r"(?:^|_)(?:tgt|target|targets|tgts|label|labels|y|yb|next)(?:_|$)")
_VALIDATION_NAME = re.compile(r"^(?:val|valid|validation)_(?:tokens?|ids|data|bytes|stream|np|toks)(?:_.*)?$")


def within(item: Value, loops: frozenset[int]) -> Value:
    """Return an item of a container that was indexed by loop variables: a view, so that what it holds stays shared."""
    if item.kind not in ("data", "sequence") or (item.kind == "data" and item.origin) or loops <= item.loops:
        return item
    return dataclasses.replace(item, loops=item.loops | loops)


def _leaves(items: tuple[Any, ...]) -> int:
    """Return how many constants stand in a tuple of tuples; the count ends soon after MAX_LEAVES."""
    count, pending = 0, [items]
    while pending and count <= MAX_LEAVES:
        part = pending.pop()
        count += len(part)
        pending.extend(item for item in part if isinstance(item, tuple))
    return count


class Expressions(Machine):
    """Evaluates expressions; calls are evaluated by the subclass."""

    def evaluate(self, node: ast.expr | None) -> Value:
        """Return what is known of an expression."""
        if node is None:
            return constant(None)
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is not None:
            return method(node)
        return combine(*(self.evaluate(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)))

    def _constant(self, node: ast.Constant) -> Value:
        value = constant(node.value)
        if isinstance(node.value, str) and len(node.value) < 400:
            value.labels = path_labels(node.value)
        return value

    def _name(self, node: ast.Name) -> Value:
        found = self.frame.scope.find(node.id)
        if found is None:
            found = Value(kind="module", payload=f"builtins.{node.id}")
        if _VALIDATION_NAME.match(node.id) and found.kind == "data" and not found.labels and not found.is_known:
            found.labels |= {VALIDATION}
        if (
            found.kind == "data"
            and VALIDATION in found.labels
            and TARGET not in found.labels
            and _TARGET_NAME.search(node.id)
        ):
            found.labels |= {TARGET}
        return found

    def _joinedstr(self, node: ast.JoinedStr) -> Value:
        parts = [self.evaluate(p.value if isinstance(p, ast.FormattedValue) else p) for p in node.values]
        if all(part.is_known for part in parts):
            text = "".join(str(part.constant) for part in parts)[:MAX_CONSTANT_LENGTH]
            return Value(constant=text, labels=path_labels(text) if len(text) < 400 else frozenset())
        text = "".join(str(part.constant) if part.is_known else "?" for part in parts)
        result = combine(*(part for part in parts if part.kind == "data"))
        result.labels = (result.labels - {FORWARD}) | (path_labels(text) if len(text) < 400 else frozenset())
        result.forwards = frozenset()
        return result

    def _boolop(self, node: ast.BoolOp) -> Value:
        parts = []
        for child in node.values:
            value = self.evaluate(child)
            decided = value.is_known and bool(value.constant) is isinstance(node.op, ast.Or)
            if decided:
                return constant(value.constant)
            parts.append(value)
        if all(part.is_known for part in parts):
            return constant(parts[-1].constant)
        return combine(*parts)

    def _unaryop(self, node: ast.UnaryOp) -> Value:
        operand = self.evaluate(node.operand)
        result = combine(operand)
        if operand.is_known:
            try:
                match node.op:
                    case ast.Not():
                        result.constant = not operand.constant
                    case ast.USub():
                        result.constant = -operand.constant
                    case ast.Invert():
                        result.constant = ~operand.constant
            except TypeError:
                pass
        return result

    def _compare(self, node: ast.Compare) -> Value:
        values = [self.evaluate(part) for part in (node.left, *node.comparators)]
        result = combine(*values)
        result.labels -= {FORWARD}
        shipped = [v for v in values if STORED in v.labels]
        others = [v for v in values if not any(v is s for s in shipped)]
        if shipped and isinstance(node.ops[0], ast.Eq | ast.NotEq) and any(self._is_ids(v) for v in others):
            result.labels |= {MATCHED}
        outcome: Any = True
        for operation, left, right in zip(node.ops, values, values[1:], strict=False):
            part = (
                compute(type(operation), left.constant, right.constant) if left.is_known and right.is_known else UNKNOWN
            )
            if isinstance(operation, ast.Is | ast.IsNot) and part is UNKNOWN:
                part = self._identity(operation, left, right)
            if part is False:
                return constant(False)
            outcome = part if outcome is True else outcome
        result.constant = outcome if isinstance(outcome, bool) else UNKNOWN
        result.labels |= self.note_comparison(node, values)
        return result

    @staticmethod
    def _is_ids(value: Value) -> bool:
        return VALIDATION in value.labels and FORWARD not in value.labels

    @staticmethod
    def _identity(operation: ast.cmpop, left: Value, right: Value) -> Any:
        """Return whether something is None, where its kind tells."""
        for one, other in ((left, right), (right, left)):
            if other.is_known and other.constant is None and one.kind not in ("data",):
                return isinstance(operation, ast.IsNot)
        return UNKNOWN

    def _binop(self, node: ast.BinOp) -> Value:
        left, right = self.evaluate(node.left), self.evaluate(node.right)
        result = operate(node.op, left, right)
        if isinstance(node.op, ast.Div) and right.is_known and isinstance(right.constant, float):
            self.note_conversion(node, left, abs(right.constant - math.log(2)) < 1e-6)
        if isinstance(node.op, ast.Mult):
            for one, other in ((left, right), (right, left)):
                is_rate = (
                    one.is_known and isinstance(one.constant, float) and abs(one.constant - 1 / math.log(2)) < 1e-3
                )
                self.note_conversion(node, other, is_rate)
            self._note_chunk(node, result)
            self.note_masking(node, left, right)
        if isinstance(node.op, ast.Div) and left.has(VALIDATION, HASHED) and right.has(VALIDATION, HASHED):
            self.emit("ratio", node, left, other=right)
        return self.note_mixture(left, right, result, node) if isinstance(node.op, ast.Add | ast.Sub) else result

    def note_masking(self, node: ast.AST, left: Value, right: Value) -> None:
        """Note that losses were weighed by whether something shipped equals the targets."""
        if any(one.has(FORWARD) and other.has(MATCHED) for one, other in ((left, right), (right, left))):
            self.emit("masked", node, left, other=right)

    def note_conversion(self, node: ast.AST, loss: Value, converts: bool) -> None:
        """Note that a loss was converted from nats to bits."""
        if converts and loss.has(VALIDATION, FORWARD):
            self.converted |= loss.forwards
            self.emit("bits", node, loss)

    def _note_chunk(self, node: ast.BinOp, result: Value) -> None:
        """Label bounds like (i + 1) * size with i a loop variable."""
        for side in (node.left, node.right):
            if not (isinstance(side, ast.BinOp) and isinstance(side.op, ast.Add | ast.Sub)):
                continue
            variable, step = self.evaluate(side.left), self.evaluate(side.right)
            if isinstance(side.op, ast.Add) and variable.is_known:
                variable, step = step, variable
            if (
                variable.loops
                and not variable.is_known
                and step.is_known
                and isinstance(step.constant, int)
                and step.constant > 0
            ):
                result.labels |= {AHEAD if isinstance(side.op, ast.Add) else BEHIND}

    def _ifexp(self, node: ast.IfExp) -> Value:
        test = self.evaluate(node.test)
        if test.is_known:
            return self.evaluate(node.body if test.constant else node.orelse)
        result = combine(test, with_models=False) if CHOSEN in test.labels else None
        return merge(result, merge(self.evaluate(node.body), self.evaluate(node.orelse)))

    def _tuple(self, node: ast.Tuple | ast.List | ast.Set) -> Value:
        parts = [self.evaluate(item.value if isinstance(item, ast.Starred) else item) for item in node.elts]
        result = combine(*parts)
        result.kind, result.payload, result.origin = "sequence", parts, self.place(node)
        if any(isinstance(item, ast.Starred) for item in node.elts):
            result.payload = None
        elif all(part.is_known for part in parts) and (
            parts or isinstance(node, ast.Tuple)
        ):  # [] is there to be filled
            items = tuple(part.constant for part in parts)
            result.constant = items if _leaves(items) <= MAX_LEAVES else UNKNOWN
        return result

    _list = _set = _tuple

    def _dict(self, node: ast.Dict) -> Value:
        keys = [self.evaluate(key) if key is not None else Value() for key in node.keys]
        parts = [self.evaluate(value) for value in node.values]
        result = combine(*parts)
        result.origin = self.place(node)
        if not parts:  # filled as it goes
            result.payload = TABLE
            self.born[result.origin] = self.loops
        for key, part in zip(keys, parts, strict=True):
            if key.is_known and isinstance(key.constant, str):
                result.attributes[f"[{key.constant}]"] = part
        return result

    def _lambda(self, node: ast.Lambda) -> Value:
        return Value(kind="function", payload=Function(node, self.frame.scope, "lambda", no_grad=False))

    def _listcomp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Value:
        outer = self.frame.scope
        self.frame.scope = Scope({}, outer, outer.file)
        for generator in node.generators:
            item = self.element(self.evaluate(generator.iter))
            item.loops |= {self.place(generator.target, "loop")}
            self.assign(generator.target, item)
            for test in generator.ifs:
                self.evaluate(test)
        element = self.evaluate(node.elt)
        self.frame.scope = outer
        result = combine(element)
        result.kind, result.payload, result.origin = "sequence", element, self.place(node)
        return result

    _setcomp = _generatorexp = _listcomp

    def _dictcomp(self, node: ast.DictComp) -> Value:
        pair = ast.ListComp(elt=node.value, generators=node.generators, lineno=node.lineno, col_offset=0)
        return self._listcomp(self.kept_nodes.setdefault(id(node), pair))

    def _namedexpr(self, node: ast.NamedExpr) -> Value:
        value = self.evaluate(node.value)
        self.assign(node.target, value)
        return value

    def _await(self, node: ast.Await) -> Value:
        return self.evaluate(node.value)

    def _yield(self, node: ast.Yield) -> Value:
        if node.value is not None:
            item = Value(kind="sequence", payload=self.evaluate(node.value))
            absorb(item, item.payload)
            self.frame.returned.append(item)
        return Value()

    def _yieldfrom(self, node: ast.YieldFrom) -> Value:
        self.frame.returned.append(self.evaluate(node.value))
        return Value()

    @staticmethod
    def element(container: Value) -> Value:
        """Return what is known of an item of a container."""
        if container.kind == "sequence" and isinstance(container.payload, Value):
            return within(container.payload, container.loops)
        if container.kind == "sequence" and container.payload:
            result: Value | None = None
            for part in container.payload:
                result = merge(result, part)
            if result is not None and (result.kind != "data" or result.origin):
                return within(result, container.loops)
            return combine(container, *container.payload)
        return combine(container)

    def _attribute(self, node: ast.Attribute) -> Value:
        return self.attribute(self.evaluate(node.value), node.attr, node)

    def attribute(self, owner: Value, name: str, node: ast.AST) -> Value:
        """Return what is known of an attribute."""
        if owner.kind == "module":
            scope = self.modules.get(owner.payload)
            if scope is not None and name in scope.names:
                return scope.names[name]
            dotted = f"{owner.payload}.{name}"
            if dotted == "math.e":
                return constant(math.e)
            if dotted.endswith("environ"):
                return Value(kind="module", payload="os.environ")
            return Value(kind="module", payload=dotted)
        if name in owner.attributes:
            return owner.attributes[name]
        if owner.kind == "class" and isinstance(owner.payload, Function):
            method = self.method(owner.payload, name)
            return Value(kind="function", payload=method) if method else combine(owner)
        if owner.kind == "instance" and isinstance(owner.payload, Function):
            if not owner.payload.is_network or not name.startswith("forward"):
                method = self.method(owner.payload, name)
                if method is not None:
                    is_property = any(
                        isinstance(d, ast.Name) and d.id == "property"
                        for d in getattr(method.node, "decorator_list", [])
                    )
                    bound = Value(kind="bound", payload=(owner, method), models=owner.models)
                    return self.invoke(method, [], {}, node, owner) if is_property else bound
            if owner.payload.is_network:
                return Value(kind="member", payload=(owner, name), models=owner.models)
            return combine(owner)
        if name in ("shape", "dtype", "device", "ndim") and owner.kind in ("data", "member"):
            return Value()
        labels = owner.labels & DATA | (frozenset((GRADIENT,)) if name == "grad" else frozenset())
        return Value(kind="member", payload=(owner, name), labels=labels, models=owner.models, loops=owner.loops,
                     forwards=owner.forwards, sites=owner.sites)  # fmt: skip

    def method(self, definition: Function, name: str) -> Function | None:
        """Return a method of a class of the script, its bases in the script included."""
        assert isinstance(definition.node, ast.ClassDef)
        for part in definition.node.body:
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and part.name == name:
                return Function(part, definition.scope, f"{definition.name}.{name}", self.turns_gradients_off(part))
        for base in definition.bases:
            found = definition.scope.find(base)
            if found is not None and found.kind == "class" and found.payload is not definition:
                method = self.method(found.payload, name)
                if method is not None:
                    return method
        return None

    @staticmethod
    def turns_gradients_off(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Return whether a decorator switches gradients off."""
        return any("no_grad" in (text := ast.unparse(d)) or "inference_mode" in text for d in node.decorator_list)

    def assign(self, target: ast.expr, value: Value) -> None:
        """Bind a value to a name, an item, an attribute or several of them."""
        raise NotImplementedError


DATA = frozenset((CHOSEN, VALIDATION, TRAINING, TARGET, HASHED, FORWARD, SUBSET, STORED, MATCHED, GRADIENT))
