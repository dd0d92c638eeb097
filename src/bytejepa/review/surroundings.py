"""Judges what surrounds the scoring: network, processes and files, compressors, class switches, window plans. Torch-free."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from bytejepa.review.findings import Evidence, Finding, Status, Weight
from bytejepa.review.operations import OPERATORS, compute
from bytejepa.review.program import Module
from bytejepa.review.rules import Facts
from bytejepa.review.values import TRAINING, UNKNOWN, VALIDATION, Event, Function

_DOWNLOADS = re.compile(r"\b(?:curl|wget|pip3?|apt(?:-get)?|git clone|huggingface-cli|aws|gsutil|scp|rsync|ssh)\b")
_HARMLESS = re.compile(r"\b(?:nvidia-smi|git|lscpu|nproc|free|uname|rocm-smi|df|cat|which|hostname)\b")
_DATA_FILE = re.compile(
    r"\.(?:pt|pth|bin|npy|npz|pkl|pickle|safetensors|json|jsonl|db|sqlite|parquet|zst|xz|gz|br|ptz|txt)$"
)
_STRONG = {"zstandard", "zstd", "brotli", "pyzstd", "lzma"}


def network_findings(facts: Facts, files: set[str]) -> list[Finding]:
    """Judge network, processes and files that evaluation reads."""
    fetches = [e for e in facts.of("network") if not e.detail.startswith("wandb")]
    fetches += [e for e in facts.of("process") if _DOWNLOADS.search(e.detail)]
    other = [e for e in facts.of("process") if not _DOWNLOADS.search(e.detail) and not _HARMLESS.search(e.detail)]
    written = {e.detail for e in facts.of("write")}
    reads = [
        e
        for e in facts.of("read")
        if _DATA_FILE.search(e.detail)
        and e.detail not in written
        and not {VALIDATION, TRAINING} & e.value.labels
        and "token" not in e.detail.lower()
        and e.detail.rpartition("/")[2] not in files
        and not _is_saved(facts, e.detail)
    ]
    at_evaluation = [e for e in (*fetches, *reads) if _during_evaluation(facts, e)]
    if at_evaluation:
        kind = "a file that the artifact does not contain" if at_evaluation[0].kind == "read" else "the network"
        return [
            Finding(
                check="source.outside_access",
                status=Status.FAIL,
                summary=f"evaluation reaches for {kind}",
                evidence=facts.evidence(at_evaluation),
            )
        ]
    noticed = [*fetches, *reads, *other]
    if noticed:
        return [
            Finding(
                check="source.outside_access",
                status=Status.UNKNOWN,
                weight=Weight.NOTE,
                summary="the script uses the network, other programs or other files before evaluation",
                evidence=facts.evidence(noticed),
            )
        ]
    return [
        Finding(
            check="source.outside_access", status=Status.PASS, summary="no network and no foreign file at evaluation"
        )
    ]


def native_findings(facts: Facts) -> list[Finding]:
    """Judge compiled code that validation data is handed to: what it does with a target nobody can read here."""
    check = "source.native_code"
    handed = [e for e in facts.of("native") if e.value.has(VALIDATION)]
    if handed:
        return [
            Finding(
                check=check,
                status=Status.UNKNOWN,
                weight=Weight.RULING,
                summary="validation data is handed to compiled code, which is not read here: may a prediction know its target?",
                evidence=facts.evidence(handed),
            )
        ]
    return [Finding(check=check, status=Status.PASS, summary="no validation data in code that is not Python")]


def _is_saved(facts: Facts, path: str) -> bool:
    return any(path and path in (line.text or "") for event in facts.packs for line in facts.evidence([event]))


def _during_evaluation(facts: Facts, event: Event) -> bool:
    scoring = {name for score in facts.scores for name in score.stack[1:] if name not in ("main",)}
    if scoring & set(event.stack):
        return True
    packed = max((e.order for e in facts.packs), default=None)
    return packed is not None and event.order > packed


def compressor_findings(facts: Facts, logs_name_compressor: str) -> list[Finding]:
    """Judge a compressor that is silently replaced by a weaker one when it is not installed."""
    check = "source.compressor_fallback"
    for module in (facts.interpreter.program.main, *facts.interpreter.program.helpers.values()):
        for node in _reached(facts, module, ast.Try):
            assert isinstance(node, ast.Try)
            name = next((n for n in _imports(node.body) if n in _STRONG), None)
            if name is None or not _falls_back(node, module):
                continue
            evidence = (Evidence(file=module.file, line=node.lineno, text=module.line(node.lineno + 1)),)
            if logs_name_compressor:
                return [
                    Finding(
                        check=check,
                        status=Status.FAIL,
                        weight=Weight.NOTE,
                        evidence=evidence,
                        summary=f"without {name} the script silently uses another compressor; the logs show {logs_name_compressor}",
                    )
                ]
            return [
                Finding(
                    check=check,
                    status=Status.FAIL,
                    weight=Weight.AUTHOR,
                    evidence=evidence,
                    summary=f"without {name} the script silently uses a weaker compressor, and no log shows which one ran",
                )
            ]
    return [Finding(check=check, status=Status.PASS, summary="no silent change of the compressor")]


def _reached(facts: Facts, module: Module, kind: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(module.tree) if isinstance(node, kind) and id(node) in facts.interpreter.executed)


def _imports(body: list[ast.stmt]) -> list[str]:
    names: list[str] = []
    for node in body:
        if isinstance(node, ast.Import):
            names.extend(item.name.partition(".")[0] for item in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module.partition(".")[0])
    return names


def _bound_by(node: ast.Try) -> set[str]:
    """Return the names that the statement imports or sets."""
    parts = list(ast.walk(node))
    names = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    names |= {item.asname for part in parts if isinstance(part, ast.Import) for item in part.names if item.asname}
    return names | set(_imports(node.body))


def _is_silent(node: ast.Try, module: Module) -> bool:
    """Return whether something that the statement binds is read elsewhere, and none of it by a test that raises."""
    bound, inside = _bound_by(node), {id(part) for part in ast.walk(node)}
    names = [part for part in ast.walk(module.tree) if isinstance(part, ast.Name) and id(part) not in inside]
    tests = [part for part in ast.walk(module.tree) if isinstance(part, ast.If) and isinstance(part.body[0], ast.Raise)]
    refused = {part.id for one in tests for part in ast.walk(one.test) if isinstance(part, ast.Name)}
    return not bound & refused and any(part.id in bound for part in names)


def _falls_back(node: ast.Try, module: Module) -> bool:
    if not _is_silent(node, module):
        return False
    for handler in node.handlers:
        if any(isinstance(part, ast.Raise) for part in ast.walk(handler)):
            continue
        caught = ast.unparse(handler.type) if handler.type is not None else "Exception"
        if any(word in caught for word in ("ImportError", "ModuleNotFoundError", "Exception")):
            weaker = {"zlib", "lzma", "gzip", "bz2"} - set(_imports(node.body))
            return any(re.search(rf"\b{name}\b", module.source) for name in weaker)
    return False


def switch_findings(facts: Facts) -> list[Finding]:
    """Judge class attributes that are switched while the script runs although a compiled graph has read them already."""
    check = "source.compiled_switch"
    found = []
    for event in facts.of("switch"):
        attribute = event.detail.partition(" = ")[0].rpartition(".")[2]
        compiled = any(e.order < event.order and e.value.models for e in facts.of("compile"))
        if len(event.stack) > 1 and compiled and _read_in_network(facts, attribute):
            found.append(event)
    if found:
        return [
            Finding(
                check=check,
                status=Status.FAIL,
                weight=Weight.NOTE,
                evidence=facts.evidence(found),
                summary="a class attribute is switched at run time, which a compiled graph may never see: is the feature on at all?",
            )
        ]
    return [Finding(check=check, status=Status.PASS, summary="no class attribute switched under torch.compile")]


def _read_in_network(facts: Facts, attribute: str) -> bool:
    for module in (facts.interpreter.program.main, *facts.interpreter.program.helpers.values()):
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ClassDef):
                continue
            function = Function(node, None, node.name, bases=tuple(ast.unparse(b) for b in node.bases))  # type: ignore[arg-type]
            reads = (p for p in ast.walk(node) if isinstance(p, ast.Attribute) and isinstance(p.ctx, ast.Load))
            if function.is_network and any(part.attr == attribute for part in reads):
                return True
    return False


def _small_value(node: ast.expr, names: dict[str, int]) -> Any:
    """Return the value of simple integer arithmetic over `names`. Raises: KeyError or ValueError for anything else."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.Attribute(attr=name):
            return names[name]
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in OPERATORS:
            return _known(compute(type(operation), _small_value(left, names), _small_value(right, names)))
        case ast.Compare(left=left, ops=[operation], comparators=[right]):
            return _known(compute(type(operation), _small_value(left, names), _small_value(right, names)))
        case ast.BoolOp(op=operation, values=parts):
            values = [_small_value(part, names) for part in parts]
            return all(values) if isinstance(operation, ast.And) else any(values)
        case ast.Call(func=ast.Name(id=name), args=arguments) if name in ("min", "max"):
            return (min if name == "min" else max)(_small_value(argument, names) for argument in arguments)
    raise ValueError(type(node).__name__)


def _known(value: Any) -> Any:
    if value is UNKNOWN:
        raise ValueError("no number, or a huge one")
    return value


def repeated_targets(plan: ast.ListComp, *, total: int = 4096, window: int = 512, stride: int = 64) -> int | None:
    """Return how many targets a plan of window starts scores more than once, by trying it out on a small text.

    A window scores all its targets if it is the first and its last `stride` ones otherwise, the challenge's usual form.
    None if the plan is of another form; one of slices, as [a[s : s + n] for s in range(0, len(a), n)], cuts into parts.
    """
    generator = plan.generators[0]
    if isinstance(plan.elt, ast.Subscript) or not (
        isinstance(generator.target, ast.Name)
        and isinstance(generator.iter, ast.Call)
        and len(generator.iter.args) == 3
    ):
        return None
    end, step = generator.iter.args[1:]
    if ast.unparse(generator.iter.func) != "range" or not isinstance(step, ast.Name | ast.Attribute):
        return None
    names = {part.id for part in ast.walk(plan) if isinstance(part, ast.Name)} | {
        p.attr for p in ast.walk(plan) if isinstance(p, ast.Attribute)
    }
    known = dict.fromkeys(names, window)
    known |= {
        part.id if isinstance(part, ast.Name) else part.attr: value
        for part, value in ((end, total), (step, stride))
        if isinstance(part, ast.Name | ast.Attribute)
    }
    counts = [0] * (total + 1)
    for start in range(0, total, stride):
        known[generator.target.id] = start
        try:
            keep = all(_small_value(test, known) for test in generator.ifs)
        except (KeyError, ValueError, ArithmeticError, TypeError):
            return None
        if keep:
            length = min(start + window, total) - start
            for target in range(start if start == 0 else start + max(length - stride, 0), start + length):
                counts[target] += 1
    return sum(count > 1 for count in counts)


def tail_findings(facts: Facts) -> list[Finding]:
    """Judge whether every target is scored once: the plan of sliding windows, tried out.

    What the known form of plan can score again is less than a window: too little of a split of 151 million bytes to move
    the score by as much as the seeds differ. So it is a note.
    """
    check = "source.scored_once"
    for module in (facts.interpreter.program.main, *facts.interpreter.program.helpers.values()):
        for function in _reached(facts, module, ast.stmt):
            if not isinstance(function, ast.Assign) or not isinstance(function.value, ast.ListComp):
                continue
            if not repeated_targets(function.value):
                continue
            evidence = (Evidence(file=module.file, line=function.lineno, text=module.line(function.lineno)),)
            summary = "windows at the end score the same targets again, less than a window of them"
            return [
                Finding(
                    check=check,
                    status=Status.FAIL,
                    weight=Weight.NOTE,
                    summary=summary,
                    evidence=evidence,
                )
            ]
    return [Finding(check=check, status=Status.PASS, summary="no plan of windows that scores targets again")]
