"""State that a network keeps from the data it is called with, found on the syntax tree of its class. Torch-free.

Classes of networks are not entered by the interpreter. What is looked for here is narrow: an attribute that `forward`
changes from its arguments and reads for what it returns, so that one call knows of another. Branches that hold only in
training do not count, nor does what depends on shapes alone, such as a table of rotary angles.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator

from bytejepa.review.findings import Evidence, Finding, Status, Weight
from bytejepa.review.program import Module
from bytejepa.review.rules import Facts
from bytejepa.review.values import Function

_TARGET = re.compile(r"(?:^|_)(?:tgt|target|targets|tgts|label|labels|y)(?:_|$)")
_SIZE = re.compile(
    r"(?:^|_)(?:len|length|seqlen|size|dim|device|dtype|shape|offset|step|layer|idx|index)(?:_|$)|^[TBLDNH]$"
)
_SIZE_TYPES = {"int", "float", "bool", "str", "torch.device", "torch.dtype", "torch.Size", "int | None", "bool | None"}
_SHAPES = {
    "shape",
    "size",
    "device",
    "dtype",
    "numel",
    "dim",
    "ndim",
    "new_zeros",
    "zeros_like",
    "empty_like",
    "new_empty",
}
_CHANGING = {
    "add_", "sub_", "copy_", "lerp_", "index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_", "append", "appendleft",
    "extend", "update", "setdefault", "put_",
}  # fmt: skip
_FIGURE = re.compile(r"loss|metric|stat|step|time|seen_tokens")
"""Attributes that are figures about the run, which no prediction is made of."""
MAX_DEPTH = 4


@dataclasses.dataclass(slots=True)
class _State:
    """An attribute that is changed from arguments: what of, and whether it is read for the result before or after."""

    module: Module
    line: int
    sources: set[str]
    is_read_before: bool = False
    is_read_after: bool = False


class _Walk:
    """Walks a `forward` method, its branches as if all were taken, and the methods of its class that it calls."""

    def __init__(self, module: Module, definition: ast.ClassDef) -> None:
        self.module = module
        self.methods = {part.name: part for part in definition.body if isinstance(part, ast.FunctionDef)}
        self.states: dict[str, _State] = {}

    def run(self, method: ast.FunctionDef, known: dict[str, set[str]], depth: int = 0) -> set[str]:
        """Walk a method whose arguments are made of `known`; return what its result is made of."""
        names = {name: set(sources) for name, sources in known.items()}
        result: set[str] = set()
        if depth < MAX_DEPTH:
            for statement in method.body:
                self._statement(statement, names, result, depth)
        return result

    def _statement(self, node: ast.stmt, names: dict[str, set[str]], result: set[str], depth: int) -> None:
        match node:
            case ast.If(test=test, body=body, orelse=orelse):
                training = ast.unparse(test)
                skipped = body if re.search(r"(?<!not )\bself\.training\b", training) else []
                skipped = orelse if "not self.training" in training else skipped
                for part in (*body, *orelse):
                    if part not in skipped:
                        self._statement(part, names, result, depth)
            case ast.For(target=target, iter=iterable, body=body):
                self._bind(target, self._of(iterable, names, depth), names, depth)
                for part in body:
                    self._statement(part, names, result, depth)
            case ast.With(body=body) | ast.While(body=body) | ast.Try(body=body):
                for part in body:
                    self._statement(part, names, result, depth)
            case ast.Return(value=value):
                result |= self._of(value, names, depth)
            case ast.Assign(targets=targets, value=value):
                sources = self._of(value, names, depth)
                for target in targets:
                    self._bind(target, sources, names, depth)
                    if isinstance(target, ast.Name) and (attribute := _own_attribute(_root(value))) is not None:
                        names[target.id].add(f"={attribute}")  # another name for it, or for a part of it
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self._bind(target, self._of(value, names, depth), names, depth)
            case ast.AugAssign(target=target, value=value):
                self._bind(
                    target, self._of(value, names, depth) | self._of(target, names, depth, reading=False), names, depth
                )
            case ast.Expr(value=value):
                self._of(value, names, depth)

    def _bind(self, target: ast.expr, sources: set[str], names: dict[str, set[str]], depth: int) -> None:
        match target:
            case ast.Name(id=name):
                names[name] = set(sources)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._bind(part, sources, names, depth)
            case ast.Starred(value=value):
                self._bind(value, sources, names, depth)
            case ast.Subscript(value=owner, slice=index):
                self._change(owner, sources | self._of(index, names, depth), names, target)
            case ast.Attribute():
                self._change(target, sources, names, target)

    def _change(self, owner: ast.expr, sources: set[str], names: dict[str, set[str]], node: ast.AST) -> None:
        """Note that what `owner` names was changed from `sources`."""
        owner = _root(owner)
        attribute = _own_attribute(owner)
        if attribute is None and isinstance(owner, ast.Name):
            held = names.setdefault(owner.id, set())
            attribute = next((source[1:] for source in held if source.startswith("=")), None)
            held |= sources
        made_of = sources & {"targets", "inputs"}
        if attribute is None or not made_of or _FIGURE.search(attribute):
            return
        state = self.states.setdefault(attribute, _State(self.module, getattr(node, "lineno", 0), set()))
        state.sources |= made_of

    def _of(self, node: ast.AST | None, names: dict[str, set[str]], depth: int, *, reading: bool = True) -> set[str]:
        """Return what a value is made of: arguments by kind, and `.name` of the attributes that are read for it."""
        match node:
            case None | ast.Constant() | ast.Lambda():
                return set()
            case ast.Name(id=name):
                return {source for source in names.get(name, ()) if not source.startswith("=")}
            case ast.Attribute(attr=name) if name in _SHAPES:
                return set()
            case ast.Attribute() if (attribute := _own_attribute(node)) is not None:
                return self._read(attribute) if reading else set()
            case ast.Call():
                return self._call(node, names, depth)
        return set().union(*(self._of(child, names, depth) for child in ast.iter_child_nodes(node)))

    def _read(self, attribute: str) -> set[str]:
        return {f".{attribute}", f".{attribute} after"} if attribute in self.states else {f".{attribute}"}

    def _call(self, node: ast.Call, names: dict[str, set[str]], depth: int) -> set[str]:
        arguments = [*node.args, *(item.value for item in node.keywords)]
        values = [self._of(argument, names, depth) for argument in arguments]
        given: set[str] = set().union(*values)
        called = node.func
        if (isinstance(called, ast.Attribute) and called.attr in _SHAPES | {"len"}) or ast.unparse(called) in (
            "len",
            "range",
        ):
            return set()
        if (method := _own_attribute(called)) is not None and method in self.methods:
            return self.run(self.methods[method], _arguments(self.methods[method], node, values), depth + 1)
        if isinstance(called, ast.Attribute) and called.attr in _CHANGING:
            self._change(called.value, given, names, node)
        if ast.unparse(called) in ("np.add.at", "numpy.add.at") and node.args:
            self._change(node.args[0], given, names, node)
        return given | self._of(called, names, depth)


def _root(node: ast.expr) -> ast.expr:
    """Return what an item, a slice or `.data` is of."""
    while isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr == "data"):
        node = node.value
    return node


def _own_attribute(node: ast.AST) -> str | None:
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own and isinstance(node, ast.Attribute) else None


def _arguments(method: ast.FunctionDef, call: ast.Call, values: list[set[str]]) -> dict[str, set[str]]:
    names = [argument.arg for argument in method.args.args[1:]]
    names = names[: len(call.args)] + [item.arg or "" for item in call.keywords]
    return dict(zip(names, values, strict=False))


def _parameters(method: ast.FunctionDef) -> dict[str, set[str]]:
    """Return the arguments that hold data, not sizes: "targets" or "inputs", by their names and annotations."""
    found = {}
    for argument in (*method.args.args[1:], *method.args.kwonlyargs):
        annotation = ast.unparse(argument.annotation) if argument.annotation is not None else ""
        if annotation not in _SIZE_TYPES and not _SIZE.search(argument.arg):
            found[argument.arg] = {"targets" if _TARGET.search(argument.arg) else "inputs"}
    return found


def _networks(facts: Facts) -> Iterator[tuple[Module, ast.ClassDef]]:
    for module in (facts.interpreter.program.main, *facts.interpreter.program.helpers.values()):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                bases = tuple(ast.unparse(base) for base in node.bases)
                if Function(node, None, node.name, bases=bases).is_network:  # type: ignore[arg-type]
                    yield module, node


def _states(facts: Facts) -> Iterator[tuple[str, _State]]:
    """Return the attributes that networks keep from one call to the next, with how they are read for the result."""
    for module, definition in _networks(facts):
        for name in ("forward", "forward_logits", "__call__"):
            walk = _Walk(module, definition)
            if name not in walk.methods:
                continue
            result = walk.run(walk.methods[name], _parameters(walk.methods[name]))
            for attribute, state in walk.states.items():
                state.is_read_after = f".{attribute} after" in result
                state.is_read_before = f".{attribute}" in result and not state.is_read_after
                if state.is_read_after or state.is_read_before:
                    yield attribute, state


def _is_reset(facts: Facts, attribute: str) -> bool:
    """Return whether anything outside of `forward` empties or replaces the attribute, and is called."""
    pattern = re.compile(rf"\.{attribute}(?:\.data)?(?:\[:\])?(?:\.(?:zero_|clear|fill_|reset)\(|\s*=[^=])")
    modules = (facts.interpreter.program.main, *facts.interpreter.program.helpers.values())
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith(("forward", "__")):
                called = re.search(rf"\b{node.name}\(", module.source.replace(f"def {node.name}(", ""))
                if pattern.search(ast.unparse(node)) and (called or node.name == "main"):
                    return True
    return False


def state_findings(facts: Facts) -> list[Finding]:
    """Judge state inside networks: filled from targets before it is read, or kept from one evaluation to the next."""
    check = "source.network_state"
    found = list(_states(facts))
    leaks = [(name, state) for name, state in found if state.is_read_after and "targets" in state.sources]
    if leaks:
        summary = f"the network puts its targets into `{leaks[0][0]}` before it reads it for the same prediction"
        return [Finding(check=check, status=Status.FAIL, summary=summary, evidence=_evidence(leaks))]
    unclear = [(name, state) for name, state in found if state.is_read_after]
    kept = [(name, state) for name, state in found if not _is_reset(facts, name)]
    if unclear or kept:
        name = (unclear or kept)[0][0]
        summary = (
            f"the network reads `{name}` after it took the call's own inputs in: may a prediction know a later one?"
            if unclear
            else f"the network keeps `{name}` from call to call, and nothing empties it between two evaluations"
        )
        return [
            Finding(
                check=check,
                status=Status.UNKNOWN,
                weight=Weight.RULING,
                summary=summary,
                evidence=_evidence(unclear or kept),
            )
        ]
    summary = "no network keeps state from what it is called with"
    if found:
        summary = f"the network keeps `{found[0][0]}` of what was scored before, and starts each evaluation without it"
    return [Finding(check=check, status=Status.PASS, summary=summary, evidence=_evidence(found))]


def _evidence(found: list[tuple[str, _State]]) -> tuple[Evidence, ...]:
    return tuple(
        Evidence(file=state.module.file, line=state.line, text=state.module.line(state.line)) for _, state in found[:6]
    )
