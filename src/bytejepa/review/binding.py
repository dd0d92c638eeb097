"""Binding of names: assignments, imports, arguments of calls, and the bodies they are bound for. Torch-free."""

from __future__ import annotations

import ast

from bytejepa.review.calls import Calls
from bytejepa.review.expressions import within
from bytejepa.review.machine import Frame
from bytejepa.review.values import VALIDATION, Function, Scope, Value, absorb, combine, constant, merge


class Binding(Calls):
    """Binds names and walks the bodies of functions; the statements are the subclass's."""

    def execute(self, body: list[ast.stmt]) -> str:
        """Walk statements; return why they end early."""
        raise NotImplementedError

    def _do_import(self, node: ast.Import) -> None:
        for item in node.names:
            self.load_module(item.name)
            name = item.name if item.asname else item.name.partition(".")[0]
            self.frame.scope.bind(item.asname or name, Value(kind="module", payload=name))

    def _do_importfrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        scope = self.load_module(module)
        for item in node.names:
            if scope is not None and item.name == "*":
                self.frame.scope.names.update({k: v for k, v in scope.names.items() if not k.startswith("_")})
            elif scope is not None and item.name in scope.names:
                self.frame.scope.bind(item.asname or item.name, scope.names[item.name])
            else:
                dotted = f"{module}.{item.name}" if module else item.name
                self.load_module(dotted)
                self.frame.scope.bind(item.asname or item.name, Value(kind="module", payload=dotted))

    def assign(self, target: ast.expr, value: Value) -> None:
        """Bind a value to a name, an item, an attribute or several of them."""
        match target:
            case ast.Name(id=name):
                self.frame.scope.bind(name, value)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                parts = value.payload if value.kind == "sequence" and isinstance(value.payload, list) else None
                for number, item in enumerate(items):
                    known = parts is not None and len(parts) == len(items)
                    part = parts[number] if known and parts is not None else self.element(value)
                    self.assign(item.value if isinstance(item, ast.Starred) else item, within(part, value.loops))
            case ast.Attribute(value=owner_node, attr=name):
                owner = self.evaluate(owner_node)
                if name == "data" and self.note_update(owner, value, target):
                    return
                if owner.kind == "class":
                    self.emit("switch", target, value, f"{ast.unparse(target)} = {value.constant!r}")
                if owner.kind in ("instance", "class", "data"):
                    before = owner.attributes.get(name)
                    undecided = bool(self.branches) and before is not None and before.kind == value.kind == "data"
                    owner.attributes[name] = merge(before, value) if undecided else value
            case ast.Subscript(value=owner_node):
                owner = self.evaluate(owner_node)
                index = Value() if isinstance(target.slice, ast.Slice) else self.evaluate(target.slice)
                if owner.kind != "module":
                    self._store(owner, index, value, target)

    def _store(self, owner: Value, index: Value, value: Value, target: ast.Subscript) -> None:
        if index.is_known and isinstance(index.constant, str):
            owner.attributes[f"[{index.constant}]"] = value
            return
        if self.note_counted_update(owner, combine(index, value), target):
            return
        self.note_tensor_update(owner, combine(index, value), target, replaces=True)
        if VALIDATION in index.labels and VALIDATION not in owner.labels:
            self.update_table(owner, index, target)
        self.note_masking(target, owner, index)
        if isinstance(target.slice, ast.Tuple) and value.is_known and value.constant in (1, 1.0, True):
            self._region(target.slice, owner)  # a mask that is one up to some bound
        absorb(owner, value)
        if VALIDATION not in value.labels:
            owner.loops |= index.loops
        if not owner.is_known and owner.kind == "sequence":
            owner.payload = value

    def run_body(self, function: Function, scope: Scope, arguments: list[Value], options: dict[str, Value]) -> Value:
        """Walk the body of a function; return what is known of its result."""
        node = function.node
        assert not isinstance(node, ast.ClassDef)
        module = self.program.module_of(function.scope.file) or self.frame.module
        frame = Frame(scope, module, function.name, definition=node)
        self._bind_arguments(node.args, scope, function.scope, arguments, options)
        self.frames.append(frame)
        try:
            if isinstance(node, ast.Lambda):
                return self.evaluate(node.body)
            flow = self.execute(node.body)
        finally:
            self.frames.pop()
        result: Value | None = None
        for value in frame.returned:
            result = value if result is None else merge(result, value)
        if result is not None and not flow and len(frame.returned) == 1:
            result = merge(result, Value()) if result.is_known else result
        return result if result is not None else constant(None)

    def _bind_arguments(
        self, declared: ast.arguments, scope: Scope, outer: Scope, arguments: list[Value], options: dict[str, Value]
    ) -> None:
        positional = [*declared.posonlyargs, *declared.args]
        kept, self.frame.scope = self.frame.scope, outer
        defaults = dict(zip((a.arg for a in positional[::-1]), declared.defaults[::-1], strict=False))
        defaults |= {a.arg: d for a, d in zip(declared.kwonlyargs, declared.kw_defaults, strict=True) if d is not None}
        named = {name: value for name, value in options.items() if not name.startswith("**")}
        for number, argument in enumerate([*positional, *declared.kwonlyargs]):
            if number < min(len(arguments), len(positional)):
                scope.names[argument.arg] = arguments[number]
            elif argument.arg in named:
                scope.names[argument.arg] = named[argument.arg]
            elif argument.arg in defaults:
                scope.names[argument.arg] = self.evaluate(defaults[argument.arg])
            else:
                scope.names[argument.arg] = Value()
        self.frame.scope = kept
        if declared.vararg is not None:
            rest = arguments[len(positional) :]
            packed = combine(*rest)
            packed.kind, packed.payload = "sequence", rest
            scope.names[declared.vararg.arg] = packed
        if declared.kwarg is not None:
            known = {a.arg for a in [*positional, *declared.kwonlyargs]}
            rest_named = {f"[{name}]": value for name, value in named.items() if name not in known}
            packed = combine(*rest_named.values())
            packed.attributes = rest_named
            scope.names[declared.kwarg.arg] = packed
