"""What library functions do to the values that the abstract interpreter follows: PyTorch, NumPy, the standard library."""

# ruff: noqa: ARG002 - the handlers of one table share one signature
from __future__ import annotations

import ast
import math
from typing import Any

from bytejepa.review.choices import CALLABLE, Choices
from bytejepa.review.expressions import DATA
from bytejepa.review.free_tensors import MIXING_FUNCTIONS
from bytejepa.review.library_names import (
    COMPRESSORS,
    CONTAINERS,
    DECOMPRESSORS,
    DIFFERENTIATORS,
    DISTRIBUTIONS,
    FRESH_TENSORS,
    LAUNCHER_VARIABLES,
    LOSSES,
    NATIVE,
    NETWORK,
    PLACES,
    PLAIN,
    PROCESSES,
    READERS,
    REDUCTIONS,
    SAME,
)
from bytejepa.review.operations import bounded
from bytejepa.review.values import (
    ARTIFACT,
    FORWARD,
    FRESH,
    GRADIENT,
    HASHED,
    PREDICTED,
    RANDOM,
    ROWS,
    STORED,
    TABLE,
    TRAINING,
    UNKNOWN,
    VALIDATION,
    Value,
    combine,
    constant,
)


class Library(Choices):
    """Calls of functions that are not the script's own."""

    def call_library(self, name: str, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        """Return what is known of the result of calling `name`, a dotted name."""
        name = self._full_name(name)
        short = name.removeprefix("builtins.")
        everything = [*arguments, *options.values()]
        if short in PLAIN and name.startswith("builtins."):
            result = self._plain(short, arguments, options)
            result.labels |= self.note_selection(arguments, options, node) if short in ("min", "max") else set()
            return result
        if name in ("os.environ.get", "os.getenv", "os.environ.setdefault", "os.environ.pop"):
            return self._environment(arguments)
        special = getattr(self, f"_library_{short.replace('.', '_')}", None)
        if special is not None:
            return special(arguments, options, node)
        if name.startswith(NETWORK) or name.rstrip(".") + "." in NETWORK:
            self.emit("network", node, combine(*everything), name)
            return combine(*everything)
        if name in NATIVE:
            return Value(kind="module", payload="native")
        if name.startswith("native."):
            self.emit("native", node, combine(*everything), name)
            return Value()
        if name.startswith(PROCESSES):
            self.emit("process", node, combine(*everything), f"{name}: {self._command(arguments)}")
            return Value()
        if READERS.match(name):
            return self._reader(name, arguments, node)
        return self._torch(name, arguments, options, node)

    def _full_name(self, name: str) -> str:
        return {"np": "numpy"}.get(name, name)

    def _torch(self, name: str, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        everything = [*arguments, *options.values()]
        if name.startswith("torch.optim.lr_scheduler"):
            return Value(kind="scheduler")
        if name.startswith("torch.optim.") or name.endswith(("Optimizer", "AdamW", ".Adam", ".SGD")):
            return self.new_optimizer(everything)
        if SAME.match(name) and arguments:
            if name == "torch.compile":
                self.emit("compile", node, arguments[0])
            return arguments[0]
        if name == "torch.compile":
            return Value(kind="module", payload="torch.compile")
        if COMPRESSORS.match(name) or name == "torch.save":
            self.emit("pack", node, combine(*everything), name)
            result = combine(*everything, with_models=False)
            result.labels |= {ARTIFACT}
            return result
        if DECOMPRESSORS.match(name):
            self.emit("unpack", node, combine(*everything), name)
            result = combine(*everything)
            result.labels |= {STORED}
            return result
        if DIFFERENTIATORS.match(name):
            return Value(kind="gradient", models=combine(*everything).models)
        if name == "torch.autograd.grad":
            self.emit("gradient", node, combine(*arguments[:1]), name)
            self.emit("step", node, combine(*arguments[:1]), name, other=combine(*arguments[1:2]))
            return combine(*everything)
        if name.startswith("torch._foreach_") and len(arguments) > 1:
            self.note_update(arguments[0], combine(*arguments[1:]), node)
        if LOSSES.search(name):
            return self._loss(name, arguments, options, node)
        if name in ("torch.where", "numpy.where") and len(arguments) == 3:
            self.note_masking(node, combine(*arguments[1:]), arguments[0])
        if name in ("torch.minimum", "numpy.minimum", "torch.min", "numpy.min"):
            self.note_minimum(arguments, node)
        return self._array(name, arguments, options, node)

    def _array(self, name: str, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        result = combine(*arguments, *options.values())
        if name in ("numpy.add.at", "numpy.put") and arguments:
            self.update_table(arguments[0], combine(*arguments[1:2]), node)
            self.note_tensor_update(arguments[0], combine(*arguments[1:]), node, replaces=name == "numpy.put")
        if name in MIXING_FUNCTIONS and len(arguments) > 1:
            result = self.note_mixture(arguments[0], combine(*arguments[1:]), result, node)
        if name.rpartition(".")[2] in REDUCTIONS:
            result.labels -= {PREDICTED}
        if name.startswith("scipy.optimize.") and arguments and arguments[0].kind in CALLABLE:
            result.labels |= self.note_trials(arguments[0], Value(), node)
        if name.endswith((".argmin", ".argmax")):
            result.labels |= self.note_selection(arguments, options, node)
        if name in ("torch.randperm", "numpy.random.permutation", "random.sample", "random.shuffle"):
            result.loops = frozenset()
        if name in (
            "torch.gather",
            "torch.take",
            "torch.index_select",
            "torch.bincount",
            "numpy.bincount",
            "numpy.take",
        ):
            owner, index = arguments[0] if arguments else Value(), arguments[-1] if arguments else Value()
            self.note_lookup(owner, index, node)
        if name.endswith(("bitwise_xor", "remainder", ".mod", "fmod")) and VALIDATION in result.labels and result.sites:
            result.labels |= {HASHED}
        gradient = options.get("requires_grad")
        if PLACES.match(name):
            result.labels |= {RANDOM}
        if FRESH_TENSORS.match(name) and (
            (gradient is not None and gradient.constant is True) or name.endswith("Parameter")
        ):
            result = Value(labels=frozenset((FRESH,)), origin=self.place(node))
            self.free_tensors |= {result.origin}
        elif CONTAINERS.match(name):
            result.origin = self.place(node)
            self.born[result.origin] = self.loops
            self.free_tensors |= {result.origin} if name.startswith(("numpy.", "torch.")) else set()
            result.models = frozenset()  # its size and device may be a model's, its content is not
            result.payload = TABLE if name.startswith(("collections.", "builtins.dict")) else ROWS
        elif name.startswith("torch.nn.") and not name.startswith(
            ("torch.nn.functional", "torch.nn.utils", "torch.nn.init")
        ):
            result = Value(kind="instance", payload=None, models=frozenset((self.place(node, "model"),)))
            self.library_models |= result.models
        elif "log" not in name and name.rpartition(".")[2] in ("to", "device"):
            result = Value()
        if name in ("builtins.Exception", "builtins.print") or name.startswith(("logging.", "time.", "torch.cuda.")):
            return Value()
        return result

    def _loss(self, name: str, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        result = combine(*arguments, *options.values())
        if not name.endswith(DISTRIBUTIONS):
            result.labels -= {PREDICTED}
        return self.forward(node, result, name) if VALIDATION in result.labels or result.forwards else result

    def new_optimizer(self, parameters: list[Value]) -> Value:
        """Return an optimiser of what was passed: a model's weights or fresh tensors."""
        result = combine(*parameters)
        result.kind = "optimizer"
        result.labels &= frozenset((FRESH,))
        result.forwards = frozenset()
        return result

    def note_update(self, weights: Value, change: Value, node: ast.AST) -> bool:
        """Note that weights were moved along their gradient by hand: a step without an optimiser."""
        if weights.kind == "member" and weights.payload[1] == "data":
            weights = weights.payload[0]
        is_trained = bool(weights.models) or FRESH in weights.labels
        if self.note_counted_update(weights, change, node):
            return True
        if GRADIENT not in change.labels or GRADIENT in weights.labels or not is_trained:
            return False
        trained = Value(models=weights.models, labels=weights.labels & frozenset((FRESH,)))
        self.emit("step", node, self.pending, "by hand", other=trained)
        self.stepped = True
        return True

    def note_counted_update(self, weights: Value, change: Value, node: ast.AST) -> bool:
        """Note that weights were moved by what validation ids or predictions say, without any gradient."""
        is_weight = weights.kind in ("member", "data") and weights.models and not weights.origin
        if not is_weight or weights.labels & DATA or VALIDATION not in change.labels or GRADIENT in change.labels:
            return False
        learned = combine(change)
        learned.labels |= {FORWARD}
        self.emit("step", node, learned, "without a gradient", other=Value(models=weights.models))
        return True

    def note_minimum(self, arguments: list[Value], node: ast.AST) -> None:
        """Note that the better of two losses was taken after the fact."""
        scored = [a for a in arguments if a.has(VALIDATION, FORWARD)]
        if len(scored) >= 2 and scored[0].forwards != scored[1].forwards:
            self.emit("minimum", node, scored[0], other=scored[1])

    @staticmethod
    def _plain(name: str, arguments: list[Value], options: dict[str, Value]) -> Value:
        result = combine(*arguments)
        result.labels -= {PREDICTED}
        if arguments and not options and all(argument.is_known for argument in arguments):
            try:
                result.constant = bounded(PLAIN[name](*(argument.constant for argument in arguments)))
            except Exception:  # the script's own mistake
                result.constant = UNKNOWN
        elif name == "bool" and not arguments:
            result.constant = False
        if name == "min":
            result.at_most = min((v for a in arguments if type(v := a.constant) is int), default=None)
        elif name == "int" and arguments:
            result.at_most = arguments[0].at_most
        if name in ("len", "bool"):
            result.labels, result.forwards = frozenset(), frozenset()
        return result

    def _environment(self, arguments: list[Value]) -> Value:
        name = arguments[0].constant if arguments else UNKNOWN
        if not isinstance(name, str):
            return Value()
        if name in LAUNCHER_VARIABLES:  # torchrun sets them: what the script falls back on says nothing
            return Value()
        if name in self.settings:
            return Value(
                constant=self.settings[name], labels=arguments[1].labels if len(arguments) > 1 else frozenset()
            )
        return combine_constant(arguments[1]) if len(arguments) > 1 else constant(None)

    @staticmethod
    def _command(arguments: list[Value]) -> str:
        if not arguments:
            return ""
        known = arguments[0].constant
        if arguments[0].is_known:
            return " ".join(map(str, known)) if isinstance(known, tuple) else str(known)
        parts = arguments[0].payload if isinstance(arguments[0].payload, list) else []
        return " ".join(str(part.constant) if part.is_known else "?" for part in parts)

    def _reader(self, name: str, arguments: list[Value], node: ast.AST) -> Value:
        result = combine(*arguments[:1])
        mode = arguments[1].constant if len(arguments) > 1 else "r"
        if isinstance(mode, str) and mode.strip("tb")[:1] in ("w", "a", "x"):
            path = arguments[0].constant if arguments and arguments[0].is_known else None
            self.emit("write", node, result, path if isinstance(path, str) else "")
            return Value(kind="file")
        path = arguments[0].constant if arguments and arguments[0].is_known else ""
        self.emit("read", node, result, path if isinstance(path, str) else "")
        result.labels |= frozenset() if not arguments else arguments[0].labels
        if not {VALIDATION, TRAINING} & result.labels:
            result.labels |= {STORED}
        return result

    def _library_math_log(self, arguments: list[Value], *_: Any) -> Value:
        result = combine(*arguments)
        known = arguments[0].constant if len(arguments) == 1 else UNKNOWN
        if isinstance(known, int | float) and known > 0:
            result.constant = math.log(known)
        return result

    _library_numpy_log = _library_math_log

    def _library_isinstance(self, *_: Any) -> Value:
        return Value()

    _library_print = _library_hasattr = _library_callable = _library_isinstance

    def _library_getattr(self, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        if len(arguments) >= 2 and isinstance(arguments[1].constant, str):
            owner, name = arguments[0], arguments[1].constant
            if len(arguments) == 3 and owner.kind == "instance" and name not in owner.attributes and owner.attributes:
                return arguments[2]
            return self.attribute(owner, name, node)
        return combine(*arguments)

    def _library_setattr(self, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        if len(arguments) == 3 and isinstance(arguments[1].constant, str):
            if arguments[0].kind == "class":
                self.emit("switch", node, arguments[2], f"class.{arguments[1].constant} = {arguments[2].constant!r}")
            arguments[0].attributes[arguments[1].constant] = arguments[2]
        return Value()

    def _library_vars(self, arguments: list[Value], *_: Any) -> Value:
        return arguments[0] if arguments else Value()

    def _library_enumerate(self, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        item = self.element(arguments[0]) if arguments else Value()
        pair = Value(kind="sequence", payload=[Value(), item])
        return Value(kind="sequence", payload=pair, labels=item.labels, loops=item.loops)

    def _library_zip(self, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        items = [self.element(argument) for argument in arguments]
        return Value(kind="sequence", payload=Value(kind="sequence", payload=items))

    def _library_range(self, arguments: list[Value], *_: Any) -> Value:
        known = [a.constant for a in arguments if a.is_known]
        result = combine(*arguments, with_models=False)
        result.labels, result.forwards, result.sites = frozenset(), frozenset(), frozenset()
        from_zero = len(arguments) == 1 or (len(arguments) == 2 and arguments[0].constant == 0)
        if from_zero:
            end = arguments[-1]
            result.at_most = end.constant if type(end.constant) is int else end.at_most
        if len(known) == len(arguments) and all(isinstance(k, int) for k in known) and known:
            try:
                result.payload = len(range(*known))
                result.kind = "range"
            except (ValueError, TypeError, OverflowError):
                pass
        return result

    def _library_sorted(self, arguments: list[Value], *_: Any) -> Value:
        return arguments[0] if arguments else Value()

    _library_reversed = _library_list = _library_iter = _library_set = _library_sorted

    def _library_next(self, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        result = combine(self.element(arguments[0])) if arguments else Value()
        result.loops |= frozenset(self.loops[-1:])
        return result

    def _library_map(self, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        if not arguments:
            return Value()
        items = [self.element(argument) for argument in arguments[1:]]
        return Value(kind="sequence", payload=self.call_value(arguments[0], items, {}, node))  # type: ignore[arg-type]

    def _library_functools_partial(self, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        return Value(kind="partial", payload=(arguments[0], arguments[1:], options)) if arguments else Value()

    def _library_copy_deepcopy(self, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        if not arguments:
            return Value()
        result = combine(*arguments, with_models=False)
        source = arguments[0]
        if source.models:
            result.kind, result.payload = source.kind, source.payload
            result.models = frozenset((self.place(node, "model"),))
        return result

    def _library_importlib_import_module(self, arguments: list[Value], *_: Any) -> Value:
        name = arguments[0].constant if arguments else UNKNOWN
        return Value(kind="module", payload=name) if isinstance(name, str) else Value()

    _library___import__ = _library_importlib_import_module

    def _library_exec(self, arguments: list[Value], options: dict[str, Value], node: ast.AST) -> Value:
        from bytejepa.review.wrappers import Closed, literal_value

        source = arguments[0].constant if arguments else UNKNOWN
        if not isinstance(source, str | bytes) and isinstance(node, ast.Call) and node.args:
            try:
                source = literal_value(self.frame.module.tree, node.args[0])
            except Closed as problem:
                self.emit("closed", node, Value(), str(problem))
                return Value()
        text = source.decode("utf-8", "replace") if isinstance(source, bytes) else source
        if isinstance(text, str):
            self.execute_source(text, node)
        else:
            self.emit("closed", node, Value(), "what is executed is not known before it runs")
        return Value()

    _library_eval = _library_exec

    def _library_argparse_ArgumentParser(self, *_: Any) -> Value:  # noqa: N802 - the library's own name
        return Value(kind="parser", payload={})


def combine_constant(value: Value) -> Value:
    """Return a copy of a value, constant and labels."""
    result = combine(value)
    result.constant = value.constant
    return result
