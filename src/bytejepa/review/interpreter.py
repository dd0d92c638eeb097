"""An abstract interpreter for training scripts: walks what the main script reaches, in the order in which it runs.

It never executes anything. Conditions on known settings (constants, defaults of environment variables, the values of the
run command and of the logs) are decided, so that a branch that is switched off is not walked; undecided ones are walked
both ways. Functions of the script and of the modules beside it are entered where they are called. Loops are walked
twice, so that what one iteration leaves behind reaches the next. The outcome is a list of events (`values.Event`), which
`rules` judges. Torch-free.
"""

# ruff: noqa: ARG002 - the handlers of one table share one signature
from __future__ import annotations

import ast
import contextlib
from typing import Any

from bytejepa.review.binding import Binding
from bytejepa.review.machine import MAX_STATEMENTS, Frame, OutOfSteps
from bytejepa.review.operations import operate
from bytejepa.review.program import Module, Program
from bytejepa.review.syntax import parse
from bytejepa.review.values import (
    CHOSEN,
    FORWARD,
    GRADIENT,
    HASHED,
    MATCHED,
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

MAX_TWICE_DEPTH = 3
"""Loops nested deeper than this are walked once, which bounds the work."""


class Interpreter(Binding):
    """Walks a program."""

    def walk(self) -> None:
        """Walk the main script from its first statement. Raises: OutOfSteps if it is too large."""
        self._run_module(self.program.main, "__main__")

    def _run_module(self, module: Module, name: str) -> Scope:
        scope = Scope({"__name__": constant(name), "__file__": constant(module.path)}, None, module.file)
        self.modules[name] = scope
        self.frames.append(Frame(scope, module, "<module>"))
        self.execute(module.tree.body)
        self.frames.pop()
        return scope

    def load_module(self, name: str) -> Scope | None:
        """Return the names of a helper module of the folder after running it, None if there is none."""
        if name not in self.modules and name in self.program.helpers:
            self._run_module(self.program.helpers[name], name)
        elif name not in self.modules:
            self.unseen_modules.add(name.partition(".")[0])
        return self.modules.get(name)

    def execute_source(self, source: str, node: ast.AST) -> None:
        """Walk source text that the script executes, in the current scope."""
        try:
            tree = parse(source)
        except (SyntaxError, ValueError):
            self.emit("closed", node, Value(), "what is executed is not Python")
            return
        self._kept = [*getattr(self, "_kept", []), tree]  # node identities must stay unique
        self.execute(tree.body)

    def execute(self, body: list[ast.stmt]) -> str:
        """Walk statements; return why they end early: return, break, continue, raise, or "" if they do not."""
        for statement in body:
            self.statements += 1
            if self.statements > MAX_STATEMENTS:
                raise OutOfSteps
            self.executed.add(id(statement))
            method = getattr(self, f"_do_{type(statement).__name__.lower()}", None)
            flow = method(statement) if method is not None else ""
            if flow:
                return flow
        return ""

    def _do_expr(self, node: ast.Expr) -> None:
        self.evaluate(node.value)

    def _do_assign(self, node: ast.Assign) -> None:
        value = self.evaluate(node.value)
        for target in node.targets:
            self.note_rebinding(self._bound(target), value, node)
            self.assign(target, value)

    def _bound(self, target: ast.expr) -> Value | None:
        """Return what a name or an attribute stands for before it is bound anew."""
        if isinstance(target, ast.Name):
            return self.frame.scope.find(target.id)
        return self.evaluate(target.value).attributes.get(target.attr) if isinstance(target, ast.Attribute) else None

    def _do_annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.evaluate(node.value))

    def _do_augassign(self, node: ast.AugAssign) -> None:
        value = self.evaluate(node.value)
        if isinstance(node.op, ast.Add):
            self.accumulate(node, value)
        if isinstance(node.op, ast.Mult) and MATCHED in value.labels:
            self.note_masking(node, self.evaluate(node.target), value)
        if isinstance(node.target, ast.Subscript):
            owner = self._written(node.target.value)
            index = self.evaluate(node.target.slice) if not isinstance(node.target.slice, ast.Slice) else Value()
            if self.note_counted_update(owner, combine(index, value), node):
                return
            self.update_table(owner, index, node)
            self.note_tensor_update(owner, combine(index, value), node)
            absorb(owner, value)
            return
        moved = (
            node.target.value if isinstance(node.target, ast.Attribute) and node.target.attr == "data" else node.target
        )
        if isinstance(node.op, ast.Add | ast.Sub) and GRADIENT in value.labels:
            weights = self.evaluate(ast.Name(id=moved.id) if isinstance(moved, ast.Name) else moved)
            if self.note_update(weights, value, node):
                return
        before = self.evaluate(ast.Name(id=node.target.id) if isinstance(node.target, ast.Name) else node.target)
        if self.note_counted_update(before, value, node):
            return
        result = operate(node.op, before, value)
        if not self.note_tensor_update(before, value, node):
            result = self.note_use(before, value, result, node)
        if isinstance(node.target, ast.Attribute) and self.loops:
            # a reader that moves on: what it gives next depends on the turn of the loop that asks
            later = combine(result)
            later.loops |= frozenset(self.loops[-1:])
            later.origin = before.origin if before.origin in self.learned else 0
            self.assign(node.target, later)
        elif before.is_known or before.kind == "module":
            self.assign(node.target, result)
        else:  # a tensor changes in place, and whoever passed it in sees it
            if isinstance(node.op, ast.Add) and HASHED in value.labels:  # a histogram of hashes
                self.update_table(before, value, node)
            absorb(before, result)
            if -self.place(node, "use") in result.forwards:
                before.forwards = result.forwards
            before.loops |= result.loops

    def _written(self, node: ast.expr) -> Value:
        """Return the table that an item is written to: the way there is no look-up for a prediction."""
        begin = len(self.events)
        owner = self.evaluate(node)
        self.events[begin:] = [event for event in self.events[begin:] if event.kind != "lookup"]
        return owner

    def _do_functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        function = Function(node, self.frame.scope, node.name, self.turns_gradients_off(node))
        self.frame.scope.bind(node.name, Value(kind="function", payload=function))

    _do_asyncfunctiondef = _do_functiondef

    def _do_classdef(self, node: ast.ClassDef) -> None:
        bases = []
        for base in node.bases:
            value = self.evaluate(base)
            bases.append(str(value.payload) if value.kind == "module" else ast.unparse(base))
        function = Function(node, self.frame.scope, node.name, bases=tuple(bases))
        value = Value(kind="class", payload=function)
        self.frame.scope.bind(node.name, value)
        value.attributes.update(self.class_attributes(function))

    def class_attributes(self, function: Function) -> dict[str, Value]:
        """Return the class's own attributes: settings with their defaults, or as the logs say they were."""
        assert isinstance(function.node, ast.ClassDef)
        scope = Scope({}, function.scope, function.scope.file)
        outer, self.frame.scope = self.frame.scope, scope
        for statement in function.node.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.If | ast.AugAssign):
                self.execute([statement])
        self.frame.scope = outer
        for name, value in scope.names.items():
            if value.kind == "data" and name in self.logged and not value.labels:
                scope.names[name] = constant(self.logged[name])
        return scope.names

    def _do_if(self, node: ast.If) -> str:
        test = self.evaluate(node.test)
        if test.is_known:
            return self.execute(node.body if test.constant else node.orelse)
        before = dict(self.frame.scope.names)
        with self.branch(node, 0):
            first = self.execute(node.body)
        if CHOSEN in test.labels:
            self.decided.add(id(node))
            self.keep_chosen(node.body, before)
        after_first = self.frame.scope.names
        self.frame.scope.names = dict(before)
        with self.branch(node, 1):
            second = self.execute(node.orelse)
        if second and not first:
            self.frame.scope.names = after_first
        elif not first:
            names = self.frame.scope.names
            for name in after_first.keys() | names.keys():
                one, other = after_first.get(name), names.get(name)
                self.frame.scope.names[name] = one if one is other and one is not None else merge(one, other)
        return first if first and second else ""

    def _do_for(self, node: ast.For | ast.AsyncFor) -> str:
        iterable = self.evaluate(node.iter)
        if iterable.kind == "range" and iterable.payload == 0:
            return self.execute(node.orelse)
        if iterable.is_known and isinstance(iterable.constant, tuple | str) and len(iterable.constant) == 0:
            return ""
        if iterable.kind == "range" and iterable.payload == iterable.at_most == 1:  # one turn is no loop
            self.assign(node.target, constant(0))
            flow = self.execute(node.body)
            return flow if flow in ("return", "raise") else ""
        place = self.place(node, "loop")

        def start() -> None:
            item = self.element(iterable)
            self._vary(item, place)
            if item.kind == "data":
                item.at_most = iterable.at_most
            self.assign(node.target, item)

        return self._loop(node.body, place, start)

    _do_asyncfor = _do_for

    def _vary(self, item: Value, place: int) -> None:
        parts = item.payload if item.kind == "sequence" and isinstance(item.payload, list) else []
        for part in parts:
            self._vary(part, place)
        item.constant = UNKNOWN
        if item.kind in ("data", "sequence"):
            item.loops |= {place}

    def _do_while(self, node: ast.While) -> str:
        test = self.evaluate(node.test)
        if test.is_known and not test.constant:
            return ""
        place = self.place(node, "loop")
        counted = {
            n.target.id for n in ast.walk(node) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)
        }
        counted |= {
            t.id for n in ast.walk(node) if isinstance(n, ast.Assign) for t in n.targets
            if isinstance(t, ast.Name) and any(isinstance(p, ast.Name) and p.id == t.id for p in ast.walk(n.value))
        }  # fmt: skip

        def start() -> None:
            for name in counted:
                value = self.frame.scope.find(name)
                if value is not None and value.kind == "data" and FORWARD not in value.labels:
                    moving = combine(value)
                    moving.loops |= {place}
                    self.frame.scope.bind(name, moving)

        endless = test.is_known and bool(test.constant)
        flow = self._loop(node.body, place, start)
        return flow if endless and flow == "return" else ""

    def _loop(self, body: list[ast.stmt], place: int, start: Any) -> str:
        """Walk a loop's body twice; the events of the second pass count, since they know what the first left behind."""
        begin = len(self.events)
        rounds = 2 if len(self.loops) < MAX_TWICE_DEPTH else 1
        flow = ""
        with self.looping(place):
            for turn in range(rounds):
                if turn:
                    del self.events[begin:]
                    self._carry(body, place)
                start()
                flow = self.execute(body)
        return flow if flow in ("return", "raise") else ""

    def _carry(self, body: list[ast.stmt], place: int) -> None:
        """Mark what the last iteration assigned: it depends on the loop's previous turn, not on this one."""
        assigned = {
            part.id for statement in body for part in ast.walk(statement)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        }  # fmt: skip
        for name in assigned:
            value = self.frame.scope.names.get(name)
            if value is not None and value.kind == "data" and place in value.loops and VALIDATION in value.labels:
                carried = combine(value)
                carried.loops = (value.loops - {place}) | {-place}
                carried.origin = value.origin
                self.frame.scope.names[name] = carried

    def _do_try(self, node: ast.Try) -> str:
        flow = self.execute(node.body)
        for number, handler in enumerate(node.handlers):
            before = dict(self.frame.scope.names)
            with self.branch(handler, number + 1):
                self.execute(handler.body)
            for name, value in before.items():
                self.frame.scope.names[name] = value
        if not flow:
            flow = self.execute(node.orelse)
        return self.execute(node.finalbody) or flow

    _do_trystar = _do_try

    def _do_with(self, node: ast.With | ast.AsyncWith) -> str:
        with contextlib.ExitStack() as stack:
            for item in node.items:
                value = self.evaluate(item.context_expr)
                text = ast.unparse(item.context_expr)
                name = value.payload if value.kind == "module" else ""
                if "no_grad" in text or "inference_mode" in text or str(name).endswith(("no_grad", "inference_mode")):
                    stack.enter_context(self.gradients(False))
                elif "enable_grad" in text:
                    stack.enter_context(self.gradients(True))
                elif "set_grad_enabled" in text and isinstance(item.context_expr, ast.Call) and item.context_expr.args:
                    flag = self.evaluate(item.context_expr.args[0])
                    stack.enter_context(self.gradients(bool(flag.constant) if flag.is_known else True))
                if item.optional_vars is not None:
                    self.assign(item.optional_vars, value)
            return self.execute(node.body)

    _do_asyncwith = _do_with

    def _do_return(self, node: ast.Return) -> str:
        value = self.evaluate(node.value)
        self.frame.returned.append(value)
        return "return"

    def _do_raise(self, node: ast.Raise) -> str:
        return "raise"

    def _do_break(self, node: ast.Break) -> str:
        return "break"

    def _do_continue(self, node: ast.Continue) -> str:
        return "continue"

    def _do_global(self, node: ast.Global | ast.Nonlocal) -> None:
        self.frame.scope.shared.update(node.names)

    _do_nonlocal = _do_global

    def _do_delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.frame.scope.names.pop(target.id, None)

    def _do_match(self, node: ast.Match) -> str:
        self.evaluate(node.subject)
        for number, case in enumerate(node.cases):
            with self.branch(node, number):
                self.execute(case.body)
        return ""


def interpret(program: Program, settings: dict[str, str], logged: dict[str, Any]) -> tuple[Interpreter, str]:
    """Return the interpreter after its walk, and "" or why the walk is not complete."""
    interpreter = Interpreter(program, settings, logged)
    try:
        interpreter.walk()
    except OutOfSteps:
        return interpreter, f"more than {MAX_STATEMENTS} statements to follow"
    except RecursionError:
        return interpreter, "expressions nested too deeply to follow"
    return interpreter, ""
