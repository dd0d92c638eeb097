"""State that the parts of the abstract interpreter share: scopes, loops around the current place, recorded events."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from bytejepa.review.program import Module, Program
from bytejepa.review.values import CHOSEN, FORWARD, VALIDATION, Event, Function, Scope, Value

MAX_STATEMENTS = 250_000
"""Statements walked before the interpreter gives up; a real script of 2,500 lines takes about a tenth."""
MAX_CALL_DEPTH = 24


class OutOfSteps(Exception):  # noqa: N818 - a bound, not an error
    """The script is too large to follow within MAX_STATEMENTS."""


@dataclasses.dataclass(slots=True)
class Frame:
    """One call."""

    scope: Scope
    module: Module
    name: str
    returned: list[Value] = dataclasses.field(default_factory=list)
    definition: ast.AST | None = None


class Machine:
    """The state; the subclasses evaluate expressions, calls and statements."""

    def __init__(self, program: Program, settings: dict[str, str], attributes: dict[str, Any]) -> None:
        self.program = program
        self.settings = settings
        """Environment variables known from the run command."""
        self.logged = attributes
        """Hyperparameters known from the logs, by attribute name."""
        self.frames: list[Frame] = []
        self.events: list[Event] = []
        self.loops: tuple[int, ...] = ()
        self.comprehensions: tuple[int, ...] = ()
        """Loops of comprehensions around the current place, which are no loops of an event."""
        self.branches: tuple[tuple[int, int], ...] = ()
        self.calls: tuple[int, ...] = ()
        self.gradient = True
        self.hooks = 0
        self.pending = Value()
        """What the gradients that wait for a step were computed from."""
        self.stepped = False
        self.modules: dict[str, Scope] = {}
        self.places: dict[tuple[Any, ...], int] = {}
        self.executed: set[int] = set()
        """Nodes of statements that were reached."""
        self.scored: set[int] = set()
        """Forward passes whose loss went into a score."""
        self.converted: set[int] = set()
        """Forward passes whose loss was converted to bits."""
        self.passes: dict[int, tuple[tuple[int, ...], frozenset[int]]] = {}
        """By forward pass or loss: the loops around it, and those on whose variable its data depends."""
        self.free_tensors: set[int] = set()
        """Places where a tensor that is no model's was made."""
        self.learned: set[int] = set()
        """Those of them that validation data has changed."""
        self.born: dict[int, tuple[int, ...]] = {}
        """Loops around the place where a table was made: with each turn of them it is empty again."""
        self.unseen_modules: set[str] = set()
        """Modules that the script imports and the folder does not have, libraries among them."""
        self.library_models: frozenset[int] = frozenset()
        """Models that are single modules of a library, such as a linear probe."""
        self.decided: set[int] = set()
        """Conditions that compare the losses of candidates on validation data."""
        self.kept_nodes: dict[int, ast.ListComp] = {}
        """By dictionary comprehension: what stands for it; kept, because places are numbered by a node's identity."""
        self.chosen_arguments = False
        """Whether what was chosen by validation loss went into a call around here."""
        self.statements = 0

    @property
    def frame(self) -> Frame:
        """The innermost call."""
        return self.frames[-1]

    def place(self, node: ast.AST, what: str = "") -> int:
        """Return a number for a node reached through the current chain of calls; the same each time."""
        key = (id(node), self.calls, what)
        return self.places.setdefault(key, len(self.places) + 1)

    def emit(self, kind: str, node: ast.AST, value: Value, detail: str = "", other: Value | None = None) -> Event:
        """Record an event at `node`."""
        event = Event(
            kind=kind,
            node=self.place(node, kind),
            file=self.frame.module.file,
            line=getattr(node, "lineno", 0),
            order=len(self.events),
            loops=self.loops,
            branches=self.branches,
            stack=tuple(frame.name for frame in self.frames),
            value=dataclasses.replace(value),
            detail=detail,
            gradient=self.gradient,
            hooked=self.hooks > 0,
            other=None if other is None else dataclasses.replace(other),
        )
        self.events.append(event)
        return event

    def forward(self, node: ast.AST, value: Value, detail: str) -> Value:
        """Mark `value` as the result of a forward pass or loss computed at `node`."""
        number = self.place(node, "forward")
        value.labels |= {FORWARD, CHOSEN} if self.chosen_arguments else {FORWARD}
        value.forwards |= {number}
        self.emit("forward", node, value, detail)
        self.events[-1].node = number
        self.passes[number] = ((*self.loops, *self.comprehensions), value.loops)
        return value

    def accumulate(self, node: ast.AST, value: Value) -> None:
        """Note that a loss was summed up: without gradients that is scoring, whatever comes of it."""
        if value.has(VALIDATION, FORWARD) and not self.gradient:
            self.scored |= value.forwards
            self.emit("score", node, value)

    @contextlib.contextmanager
    def looping(self, place: int) -> Iterator[None]:
        """Be inside a loop for a while."""
        before = self.loops
        self.loops = (*before, place)
        try:
            yield
        finally:
            self.loops = before

    @contextlib.contextmanager
    def branch(self, node: ast.AST, number: int) -> Iterator[None]:
        """Be inside one branch of an undecided condition for a while."""
        before = self.branches
        self.branches = (*before, (id(node), number))
        try:
            yield
        finally:
            self.branches = before

    @contextlib.contextmanager
    def gradients(self, enabled: bool) -> Iterator[None]:
        """Have gradients on or off for a while."""
        before = self.gradient
        self.gradient = enabled
        try:
            yield
        finally:
            self.gradient = before

    def evaluate(self, node: ast.expr | None) -> Value:
        """Return what is known of an expression."""
        raise NotImplementedError

    def invoke(
        self,
        function: Function,
        arguments: list[Value],
        options: dict[str, Value],
        node: ast.AST,
        owner: Value | None = None,
    ) -> Value:
        """Return what is known of the result of calling a function of the script."""
        raise NotImplementedError

    def instantiate(
        self, function: Function, arguments: list[Value], options: dict[str, Value], node: ast.AST
    ) -> Value:
        """Return what is known of a new instance of a class of the script."""
        raise NotImplementedError

    def call_value(
        self, callee: Value, arguments: list[Value], options: dict[str, Value], node: ast.Call | ast.expr
    ) -> Value:
        """Return what is known of the result of calling any value."""
        raise NotImplementedError

    def note_comparison(self, node: ast.Compare, values: list[Value]) -> frozenset[str]:
        """Note that the losses of candidates may have been compared; return the label of what is kept for it."""
        raise NotImplementedError

    def note_mixture(self, one: Value, other: Value, result: Value, node: ast.AST) -> Value:
        """Note that predictions may have met a tensor that validation data has changed."""
        raise NotImplementedError

    def load_module(self, name: str) -> Scope | None:
        """Return the names of a helper module of the folder after running it, None if there is none."""
        raise NotImplementedError

    def execute_source(self, source: str, node: ast.AST) -> None:
        """Walk source text that the script executes, in the current scope."""
        raise NotImplementedError
