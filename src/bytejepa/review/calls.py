"""Calls, as the abstract interpreter follows them: into functions and classes of the script, and methods of its values."""

# ruff: noqa: ARG002 - the handlers of one table share one signature
from __future__ import annotations

import ast
import re
from typing import Any

from bytejepa.review.free_tensors import ADDING_METHODS, MIXING_METHODS
from bytejepa.review.library import Library
from bytejepa.review.library_names import REDUCTIONS, TEXT_METHODS
from bytejepa.review.machine import MAX_CALL_DEPTH
from bytejepa.review.operations import call_on_text
from bytejepa.review.values import (
    CHOSEN,
    FORWARD,
    FRESH,
    HASHED,
    MATCHED,
    PREDICTED,
    RANDOM,
    STORED,
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
)

SELF_METHODS = {
    "to", "cuda", "cpu", "eval", "train", "float", "half", "bfloat16", "double", "requires_grad_", "zero_", "share_memory_", "module",
}  # fmt: skip
TAKING_METHODS = {
    "append",
    "extend",
    "add",
    "add_",
    "copy_",
    "fill_",
    "index_copy_",
    "index_add_",
    "scatter_",
    "scatter_add_",
    "appendleft",
    "insert",
    "put_",
    "masked_scatter_",
    "sub_",
    "mul_",
    "index_put_",
    "setdefault",
    "update",
    "addmm_",
    "bitwise_xor_",
}
UPDATING_METHODS = {"add_", "sub_", "copy_", "addcdiv_", "addcmul_", "lerp_"}
FILLING_METHODS = {"scatter_add_", "index_add_", "scatter_", "index_put_", "put_", "scatter_reduce_"}
MAX_ITEMS = 16
"""Items of a list that are kept apart; more of them add nothing new."""
_STATEFUL_READ = re.compile(r"^(?:next|get|sample|fetch|read)(?:_?batch|_?tokens|_?chunk|_?bytes)?$|^next")


class Calls(Library):
    """Evaluates calls."""

    def _call(self, node: ast.Call) -> Value:
        callee = self.evaluate(node.func)
        arguments: list[Value] = []
        for argument in node.args:
            value = self.evaluate(argument.value if isinstance(argument, ast.Starred) else argument)
            if isinstance(argument, ast.Starred) and isinstance(value.payload, list):
                arguments.extend(value.payload)
            else:
                arguments.append(value)
        options = {item.arg or f"**{i}": self.evaluate(item.value) for i, item in enumerate(node.keywords)}
        return self.call_value(callee, arguments, options, node)

    def call_value(self, callee: Value, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        """Return what is known of the result of calling any value."""
        match callee.kind:
            case "function":
                return self.invoke(callee.payload, arguments, options, node)
            case "bound":
                owner, method = callee.payload
                return self.invoke(method, arguments, options, node, owner)
            case "partial":
                function, first, named = callee.payload
                return self.call_value(function, [*first, *arguments], named | options, node)
            case "class":
                return self.instantiate(callee.payload, arguments, options, node)
            case "gradient":
                return self._gradient_call(callee, [*arguments, *options.values()], node)
            case "module":
                return self.call_library(callee.payload, arguments, options, node)
            case "member":
                owner, name = callee.payload
                return self._method(owner, name, arguments, options, node)
            case "instance":
                return self._network_call(callee, arguments, options, node)
        if callee.models:
            return self._network_call(callee, arguments, options, node)
        result = combine(callee, *arguments, *options.values())
        return result

    def _gradient_call(self, callee: Value, everything: list[Value], node: ast.AST) -> Value:
        """Call what returns a loss and its gradients: to have them is taken for the step."""
        result = combine(*everything)
        if not {VALIDATION, TRAINING} & result.labels:
            return result
        trained = Value(models=callee.models or result.models)
        result = self.forward(node, result, "gradient")
        self.emit("gradient", node, result)
        self.emit("step", node, result, other=trained)
        return result

    def _network_call(self, callee: Value, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        definition = callee.payload if isinstance(callee.payload, Function) else None
        if definition is not None and not definition.is_network:
            method = self.method(definition, "__call__")
            if method is not None:
                return self.invoke(method, arguments, options, node, callee)
        result = combine(*arguments, *options.values())
        result.models |= callee.models
        result.kind = "data"
        if VALIDATION in result.labels or TRAINING in result.labels:
            # values that went into the network come out as predictions: no ids, no hashes, no region of a mask
            result.labels -= frozenset((HASHED, TARGET, STORED, MATCHED))
            result.sites = frozenset()
            return self.predicted(result, [*arguments, *options.values()], node)
        return result

    def _method(
        self, owner: Value, name: str, arguments: list[Value], options: dict[str, Value], node: ast.AST
    ) -> Value:
        everything = [*arguments, *options.values()]
        special = getattr(self, f"_method_{name}", None)
        if special is not None:
            answer = special(owner, arguments, options, node)
            if answer is not None:
                return answer
        if owner.kind == "instance" and name.startswith("forward"):
            return self._network_call(owner, arguments, options, node)
        if name in SELF_METHODS:
            if (
                name == "requires_grad_"
                and owner.kind == "data"
                and not owner.models
                and VALIDATION not in owner.labels
            ):
                owner.labels |= {FRESH}
            if owner.kind != "data" or not owner.is_known:
                return owner if owner.kind != "data" else self._copy(owner)
        if owner.is_known and isinstance(owner.constant, str) and name in TEXT_METHODS:
            return self._text(owner, name, arguments)
        if name in UPDATING_METHODS and self.note_update(owner, combine(*everything), node):
            return owner
        if name in FILLING_METHODS and self.note_counted_update(owner, combine(*everything), node):
            return owner
        if name in TAKING_METHODS | ADDING_METHODS:
            replaces = name not in ADDING_METHODS and not (name == "index_put_" and "accumulate" in options)
            self.note_tensor_update(owner, combine(*everything), node, replaces=replaces)
            if name in MIXING_METHODS and PREDICTED in owner.labels and self.mix_in_place(owner, everything, node):
                return owner
            return self._take(owner, name, everything, node)
        if owner.kind in ("instance", "member") and owner.models and VALIDATION in combine(*everything).labels:
            return self._network_call(owner, arguments, options, node)
        result = combine(owner, *everything)
        if owner.kind == "optimizer":
            return Value(models=owner.models)
        if name in REDUCTIONS:
            result.labels -= {PREDICTED}
        if name in ("argmin", "argmax", "min"):
            result.labels |= self.note_selection([owner], {}, node)
        if name in MIXING_METHODS:
            result = self.note_mixture(owner, combine(*everything), result, node)
        if name in ("integers", "randint", "randrange"):  # of a generator
            result.labels |= {RANDOM}
        if name in ("item", "detach", "clone", "numpy", "tolist") and owner.origin:
            result.origin = 0
        if _STATEFUL_READ.search(name) and name not in ("get",):
            result.loops |= frozenset(self.loops[-1:])
        if name in ("get", "gather", "take", "index_select", "__getitem__") and arguments:
            self.note_lookup(owner, combine(*arguments[-1:] if name != "get" else arguments[:1]), node)
            stored = owner.attributes.get(f"[{arguments[0].constant}]") if arguments[0].is_known else None
            result = stored or result
        if name.startswith(("read_bytes", "read_text")):
            self.emit("read", node, owner, str(owner.constant) if owner.is_known else "")
            result.labels |= {STORED} if not {VALIDATION, TRAINING} & result.labels else set()
        if name.startswith(("write_bytes", "write_text")):
            self.emit("write", node, owner, str(owner.constant) if owner.is_known else "")
        return result

    @staticmethod
    def _copy(owner: Value) -> Value:
        result = combine(owner)
        result.constant, result.origin, result.payload = owner.constant, owner.origin, owner.payload
        result.kind = owner.kind
        return result

    @staticmethod
    def _text(owner: Value, name: str, arguments: list[Value]) -> Value:
        result = combine(owner, *arguments)
        if all(argument.is_known for argument in arguments):
            result.constant = call_on_text(owner.constant, name, [argument.constant for argument in arguments])
        return result

    def _take(self, owner: Value, name: str, everything: list[Value], node: ast.AST) -> Value:
        if name in FILLING_METHODS:
            key = everything[1] if len(everything) > 1 else Value()
            self.update_table(owner, key, node)
        incoming = combine(*everything)
        if owner.kind == "sequence" and name in ("append", "add", "extend", "insert", "appendleft"):
            item = everything[-1] if everything else Value()
            item = item if name != "extend" else self.element(item)
            if isinstance(owner.payload, list):
                if len(owner.payload) < MAX_ITEMS:
                    owner.payload.append(item)
            elif isinstance(owner.payload, Value) and owner.payload.kind == "data":
                absorb(owner.payload, item)
            else:
                owner.payload = item
            owner.constant = UNKNOWN
        self.accumulate(node, incoming)
        takes_items = owner.kind == "sequence" or name in ("append", "extend", "insert", "appendleft")
        if (not owner.models or takes_items) and owner.kind != "optimizer":  # weights take no data in
            absorb(owner, incoming)
        return owner

    def _method_backward(self, owner: Value, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        if self.stepped:  # gradients of before the last step are gone
            self.pending, self.stepped = Value(), False
        self.pending = combine(self.pending, owner)
        self.emit("gradient", node, owner)
        return Value()

    def _method_zero_grad(self, owner: Value, *_: Any) -> Value:
        self.pending = Value()
        return Value()

    def _method_step(
        self, owner: Value, arguments: list[Value], options: dict[str, Value], node: ast.AST
    ) -> Value | None:
        if owner.kind == "scheduler":
            return Value()
        optimizer = owner if owner.kind == "optimizer" else next((a for a in arguments if a.kind == "optimizer"), None)
        if optimizer is None and (owner.kind == "data" or arguments):
            optimizer = combine(owner)
            optimizer.labels &= frozenset((FRESH,))
        if optimizer is None:
            return None
        self.emit("step", node, self.pending, other=optimizer)
        self.stepped = True
        return Value()

    def _method_numel(self, *_: Any) -> Value:
        return Value()

    _method_size = _method_dim = _method_nelement = _method_element_size = _method_numel

    def _method_parameters(
        self, owner: Value, arguments: list[Value], options: dict[str, Value], node: ast.AST
    ) -> Value:
        self.emit("weights", node, Value(models=owner.models))
        return Value(models=owner.models, labels=owner.labels & frozenset((FRESH,)))

    _method_named_parameters = _method_parameters

    def _method_state_dict(
        self, owner: Value, arguments: list[Value], options: dict[str, Value], node: ast.AST
    ) -> Value:
        self.emit("weights", node, Value(models=owner.models))
        return Value()

    def _method_items(self, owner: Value, *_: Any) -> Value | None:
        """Return the pairs of a dictionary whose keys are known: functions among its values stay callable."""
        stored = {key: value for key, value in owner.attributes.items() if key.startswith("[")}
        if not stored:
            return None
        pairs = [Value(kind="sequence", payload=[constant(key[1:-1]), value]) for key, value in stored.items()]
        if owner.labels or owner.models:  # more came in under keys that are not known
            pairs.append(Value(kind="sequence", payload=[Value(), combine(owner)]))
        return Value(kind="sequence", payload=pairs, loops=owner.loops)

    def _method_load_state_dict(
        self, owner: Value, arguments: list[Value], options: dict[str, Value], node: ast.AST
    ) -> Value:
        chosen = combine(*arguments).labels & {CHOSEN}
        self.emit("restore", node, Value(models=owner.models, labels=chosen))
        return Value()

    def _method_register_forward_hook(self, owner: Value, *_: Any) -> Value:
        self.hooks += 1
        return Value(kind="hook")

    _method_register_forward_pre_hook = _method_register_forward_hook

    def _method_remove(self, owner: Value, *_: Any) -> Value | None:
        if owner.kind == "hook":
            self.hooks = 0
        return Value()

    def _method_compress(self, owner: Value, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        self.emit("pack", node, combine(*arguments))
        return Value(labels=frozenset(("artifact",)))

    def _method_decompress(
        self, owner: Value, arguments: list[Value], options: dict[str, Value], node: ast.AST
    ) -> Value:
        self.emit("unpack", node, combine(*arguments))
        return combine(*arguments)

    def _method_add_argument(
        self, owner: Value, arguments: list[Value], options: dict[str, Value], node: ast.AST
    ) -> Value | None:
        if owner.kind != "parser" or not arguments:
            return None
        flag = next(
            (str(a.constant) for a in arguments if str(a.constant).startswith("--")), str(arguments[0].constant)
        )
        name = options["dest"].constant if "dest" in options else flag.lstrip("-").replace("-", "_")
        action = options["action"].constant if "action" in options else ""
        default = options.get("default", constant({"store_true": False, "store_false": True}.get(action)))
        owner.payload[str(name)] = default
        return Value()

    def _method_parse_args(self, owner: Value, *_: Any) -> Value | None:
        if owner.kind != "parser":
            return None
        return Value(kind="instance", attributes=dict(owner.payload))

    def _method_parse_known_args(self, owner: Value, *_: Any) -> Value | None:
        parsed = self._method_parse_args(owner)
        return None if parsed is None else Value(kind="sequence", payload=[parsed, Value()])

    def invoke(
        self,
        function: Function,
        arguments: list[Value],
        options: dict[str, Value],
        node: ast.AST,
        owner: Value | None = None,
    ) -> Value:
        """Return what is known of the result of calling a function of the script."""
        busy = sum(frame.definition is function.node for frame in self.frames)
        if len(self.frames) >= MAX_CALL_DEPTH or busy:
            return combine(*arguments, *options.values())
        assert not isinstance(function.node, ast.ClassDef)
        scope = Scope({}, function.scope, function.scope.file)
        before, hooks, chosen = self.calls, self.hooks, self.chosen_arguments
        self.chosen_arguments = chosen or any(CHOSEN in value.labels for value in (*arguments, *options.values()))
        self.calls = (*self.calls, id(node))
        enabled = self.gradient and not function.no_grad
        with self.gradients(enabled):
            result = self.run_body(function, scope, ([owner] if owner is not None else []) + arguments, options)
        self.calls, self.hooks, self.chosen_arguments = before, min(hooks, self.hooks), chosen
        return result

    def run_body(self, function: Function, scope: Scope, arguments: list[Value], options: dict[str, Value]) -> Value:
        """Walk the body of a function whose arguments are bound in `scope`."""
        raise NotImplementedError

    def instantiate(
        self, function: Function, arguments: list[Value], options: dict[str, Value], node: ast.AST
    ) -> Value:
        """Return what is known of a new instance of a class of the script."""
        if function.is_optimizer:
            return self.new_optimizer([*arguments, *options.values()])
        instance = Value(kind="instance", payload=function, origin=self.place(node))
        if function.is_network:
            instance.models = frozenset((self.place(node, "model"),))
            return instance
        instance.attributes.update(self.class_attributes(function))
        maker = self.method(function, "__init__")
        if maker is not None:
            self.invoke(maker, arguments, options, node, instance)
        else:
            for name, value in zip(list(instance.attributes), arguments, strict=False):
                instance.attributes[name] = value
            instance.attributes.update({name: value for name, value in options.items() if not name.startswith("**")})
        if {FORWARD} & instance.labels:
            instance.labels -= {FORWARD}
        return instance

    def class_attributes(self, function: Function) -> dict[str, Value]:
        """Return the class's own attributes: settings with their defaults."""
        raise NotImplementedError
