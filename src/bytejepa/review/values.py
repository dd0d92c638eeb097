"""What the abstract interpreter knows of a value, and what it writes down while it walks a script. Torch-free.

A value carries labels of origin (validation ids, training ids), the loops on whose variables it depends, the models it
belongs to, and the forward passes it came from; a constant where it is known. Values that are tensors or containers in
the script are shared objects here too, so that changes in place are seen through every name.
"""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

VALIDATION = "validation"
"""Came from the validation split."""
TRAINING = "training"
"""Came from the training split."""
TARGET = "target"
"""Ids shifted by one: what is to be predicted."""
HASHED = "hashed"
"""Went through an exclusive or, or a product with a remainder: a hash of ids."""
FORWARD = "forward"
"""Came out of a model's forward pass, or is a loss."""
FRESH = "fresh"
"""A new tensor with a gradient, not a weight of a model."""
PREFIX = "prefix"
"""Only the positions before those that are scored."""
SUFFIX = "suffix"
"""Only the positions from some bound on."""
RANDOM = "random"
"""A random number that can be a place in the data."""
SAMPLED = "sampled"
"""Ids read at a random place."""
SUBSET = "subset"
"""Only the first part of the validation split."""
AHEAD = "ahead"
"""Bounds of the next chunk, computed from the loop variable plus one."""
BEHIND = "behind"
"""Bounds of the chunk before."""
GRADIENT = "gradient"
"""The gradient of a weight, or computed from one."""
ARTIFACT = "artifact"
"""The packed model as written by the script itself."""
STORED = "stored"
"""Read from a file that is no split of the data: the artifact, or what was shipped with it."""
MATCHED = "matched"
"""Whether something stored equals what is to be predicted."""

PREDICTED = "predicted"
"""Predictions over all symbols, before a target is picked out of them."""
CHOSEN = "chosen"
"""Picked among candidates by their loss on validation data."""

TABLE = "table"
"""Payload of a dictionary that is filled as it goes: what lies under a key of it may be a table again."""

ROWS = "rows"
"""Payload of a new array: a row of it, by a number that is no id, is a part of the same table."""

DATA_LABELS = frozenset(
    (
        STORED,
        MATCHED,
        VALIDATION,
        TRAINING,
        TARGET,
        HASHED,
        FORWARD,
        FRESH,
        PREFIX,
        SUFFIX,
        RANDOM,
        SAMPLED,
        SUBSET,
        AHEAD,
        BEHIND,
        GRADIENT,
        PREDICTED,
        CHOSEN,
    )
)


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Any = _Unknown()
"""The constant of a value that is not known before the script runs."""


@dataclasses.dataclass(slots=True, eq=False)
class Value:
    """What is known of one value."""

    constant: Any = dataclasses.field(default_factory=lambda: UNKNOWN)
    labels: frozenset[str] = frozenset()
    kind: str = "data"
    """data, module, function, class, instance, bound, partial, gradient, optimizer, scheduler, sequence or parser."""
    payload: Any = None
    """By kind: dotted name, definition with its scope, (owner, name), list of values."""
    loops: frozenset[int] = frozenset()
    """Loops on whose variable the content depends."""
    models: frozenset[int] = frozenset()
    """Places where the models it belongs to were made."""
    forwards: frozenset[int] = frozenset()
    """Forward passes and losses that went into it; negative: places where a free tensor changed predictions."""
    tables: frozenset[int] = frozenset()
    """Origins of the containers and tensors that went into it."""
    sites: frozenset[int] = frozenset()
    """Places where validation ids were read by an index, for telling a context from a context with its target."""
    attributes: dict[str, Value] = dataclasses.field(default_factory=dict)
    origin: int = 0
    """Place where a container or tensor was made; 0: none."""
    bound_text: str = ""
    """Of a slice from the start: the text of its end."""
    at_most: int | None = None
    """Of a whole number that is not known: what it cannot exceed."""

    @property
    def roots(self) -> frozenset[int]:
        """Origins of the containers and tensors that it is or was computed from."""
        return self.tables | {self.origin} if self.origin else self.tables

    @property
    def is_known(self) -> bool:
        """Whether its constant is known."""
        return self.constant is not UNKNOWN

    def has(self, *labels: str) -> bool:
        """Return whether it carries all of `labels`."""
        return all(label in self.labels for label in labels)


def constant(value: Any) -> Value:
    """Return a value whose constant is known."""
    return Value(constant=value)


def absorb(target: Value, *sources: Value) -> None:
    """Add what is known of `sources` to `target` in place: what happens to a tensor or container that takes them in."""
    for source in sources:
        target.labels |= source.labels & DATA_LABELS
        target.loops |= source.loops
        target.models |= source.models
        target.forwards |= source.forwards
        target.sites |= source.sites
        target.tables |= source.roots
        target.bound_text = target.bound_text or source.bound_text


def combine(*sources: Value, with_models: bool = True) -> Value:
    """Return a new value computed from `sources`, its constant unknown.

    Where a loss is among them, dependence on loops comes from it alone: a weight that falls with the epoch does not make
    the data of two epochs different.
    """
    result = Value()
    data = [source for source in sources if source.has(VALIDATION, FORWARD)] or list(sources)
    for source in sources:
        result.labels |= source.labels & DATA_LABELS
        result.forwards |= source.forwards
        result.sites |= source.sites
        result.tables |= source.roots
        result.bound_text = result.bound_text or source.bound_text
        if with_models:
            result.models |= source.models
    for source in data:
        result.loops |= source.loops
    return result


def merge(first: Value | None, second: Value | None) -> Value:
    """Return what is known after two branches of which either may have run."""
    if first is None or second is None:
        return first or second or Value()
    if first is second:
        return first
    same = type(first.constant) is type(second.constant) and first.constant == second.constant
    items = [_items(first), _items(second)]
    known = first.is_known and same
    if items[0] is not None and items[1] is not None and len(items[0]) == len(items[1]) and not known:
        pairs = [merge(one, other) for one, other in zip(*items, strict=True)]
        result = combine(first, second, *pairs)
        result.kind, result.payload, result.origin = "sequence", pairs, first.origin or second.origin
        return result
    if first.kind == second.kind == "data" or first.payload is not second.payload:
        result = combine(first, second)
        result.loops = first.loops | second.loops
        richer = first if first.kind != "data" else second
        result.kind, result.payload, result.attributes = richer.kind, richer.payload, richer.attributes
        result.origin = first.origin or second.origin
    else:
        result = first
        absorb(result, second)
    result.constant = first.constant if same else UNKNOWN
    return result


def _items(value: Value) -> list[Value] | None:
    """Return the items of a list or tuple whose items are known one by one, None of anything else."""
    return value.payload if value.kind == "sequence" and isinstance(value.payload, list) else None


@dataclasses.dataclass(slots=True, eq=False)
class Scope:
    """Names of a module, a class body or a call, and where to look next."""

    names: dict[str, Value]
    parent: Scope | None = None
    file: str = ""
    shared: set[str] = dataclasses.field(default_factory=set)
    """Names declared global or nonlocal."""

    def find(self, name: str) -> Value | None:
        """Return the value bound to a name here or further out."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None

    def bind(self, name: str, value: Value) -> None:
        """Bind a name here, or where a global or nonlocal declaration points."""
        if name in self.shared and self.parent is not None:
            scope: Scope = self.parent
            while name not in scope.names and scope.parent is not None:
                scope = scope.parent
            scope.names[name] = value
        else:
            self.names[name] = value


@dataclasses.dataclass(frozen=True, slots=True)
class Function:
    """A function or class of the script with the scope it was defined in."""

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef
    scope: Scope
    name: str
    no_grad: bool = False
    bases: tuple[str, ...] = ()

    @property
    def is_network(self) -> bool:
        """Whether it is a class of neural modules, which are not looked into: their calls are forward passes."""
        return isinstance(self.node, ast.ClassDef) and (
            any(base.endswith("Module") for base in self.bases)
            or any(isinstance(part, ast.FunctionDef) and part.name == "forward" for part in self.node.body)
        )

    @property
    def is_optimizer(self) -> bool:
        """Whether it is a class of optimisers."""
        return any(base.endswith("Optimizer") or base.startswith("torch.optim.") for base in self.bases)


@dataclasses.dataclass(slots=True, eq=False)
class Event:
    """Something that bears on the rules, at the place and under the conditions where the script does it."""

    kind: str
    node: int
    file: str
    line: int
    order: int
    loops: tuple[int, ...]
    """Loops around it, outermost first, calls included."""
    branches: tuple[tuple[int, int], ...]
    """Conditions around it that are not known: (place, branch)."""
    stack: tuple[str, ...]
    """Names of the functions around it, outermost first."""
    value: Value
    detail: str = ""
    gradient: bool = True
    hooked: bool = False
    other: Value | None = None


def exclusive(first: Event, second: Event) -> bool:
    """Return whether two events lie in different branches of one condition, so that a run has one of them only."""
    chosen = dict(first.branches)
    return any(place in chosen and chosen[place] != branch for place, branch in second.branches)
