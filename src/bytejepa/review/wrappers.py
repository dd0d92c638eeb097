"""Sources inside code wrappers (`exec(lzma.decompress(base64.b85decode("...")))` and their kin), without running them.

Only literal data goes through the standard library's decoders, and only up to MAX_UNPACKED_BYTES: nothing of the script
is ever executed. What cannot be decoded like this stays closed, and the review says so. Torch-free.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import codecs
import dataclasses
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from bytejepa.review.syntax import parse

MAX_UNPACKED_BYTES = 8_000_000
"""Half the budget of a whole submission; more than that is a bomb, not code."""
MAX_DEPTH = 8
MAX_COMPUTED = 500_000
"""Expressions computed for one value: twice the same name in each of thirty sums would be a billion."""


class Closed(Exception):  # noqa: N818 - says that the wrapper stays closed
    """The value cannot be computed from literals with the decoders known here."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unpacked:
    """What a script really runs."""

    source: str
    """The innermost source that could be read; the script itself if it is not wrapped."""
    tree: ast.Module
    """Its syntax tree."""
    layers: tuple[str, ...]
    """The decoders peeled off, outermost first; empty for a plain script."""
    closed: tuple[str, ...]
    """Why an inner layer could not be read; empty if everything lies open."""


def _lzma(data: bytes, **options: Any) -> bytes:
    allowed = {"format": options.get("format", lzma.FORMAT_AUTO), "filters": options.get("filters")}
    return lzma.LZMADecompressor(**allowed).decompress(data, max_length=MAX_UNPACKED_BYTES)


def _zlib(data: bytes, wbits: int = zlib.MAX_WBITS, **_: Any) -> bytes:
    return zlib.decompressobj(wbits).decompress(data, MAX_UNPACKED_BYTES)


def _bz2(data: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, max_length=MAX_UNPACKED_BYTES)


def _gzip(data: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        return file.read(MAX_UNPACKED_BYTES)


def _zstd(data: bytes) -> bytes:
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(data) as reader:
        return reader.read(MAX_UNPACKED_BYTES)


def _brotli(data: bytes) -> bytes:
    import brotli

    decompressor, unpacked = brotli.Decompressor(), bytearray()
    while not decompressor.is_finished() and len(unpacked) < MAX_UNPACKED_BYTES:
        piece = decompressor.process(data, output_buffer_limit=MAX_UNPACKED_BYTES - len(unpacked))
        if not piece and not decompressor.is_finished():
            raise Closed("the packed data ends too early")
        unpacked += piece
        data = b""
    return bytes(unpacked[:MAX_UNPACKED_BYTES])  # the limit of a piece is rounded up to a buffer


def _codecs(data: Any, encoding: str = "utf-8", errors: str = "strict") -> Any:
    name = encoding.lower().removesuffix("_codec")
    if name in ("zip", "zlib", "bz2"):  # these alone make more of what they are given
        return (_bz2 if name == "bz2" else _zlib)(data)
    return codecs.decode(data, encoding, errors)


DECODERS: Mapping[str, Callable[..., Any]] = {
    "lzma.decompress": _lzma,
    "zlib.decompress": _zlib,
    "bz2.decompress": _bz2,
    "gzip.decompress": _gzip,
    "zstandard.decompress": _zstd,
    "brotli.decompress": _brotli,
    "base64.b85decode": base64.b85decode,
    "base64.a85decode": base64.a85decode,
    "base64.b64decode": base64.b64decode,
    "base64.standard_b64decode": base64.b64decode,
    "base64.urlsafe_b64decode": base64.urlsafe_b64decode,
    "base64.b32decode": base64.b32decode,
    "base64.b16decode": base64.b16decode,
    "base64.decodebytes": base64.decodebytes,
    "binascii.a2b_base64": binascii.a2b_base64,
    "binascii.unhexlify": binascii.unhexlify,
    "bytes.fromhex": bytes.fromhex,
    "codecs.decode": _codecs,
}
CONSTANTS: Mapping[str, Any] = {
    f"lzma.{name}": getattr(lzma, name)
    for name in dir(lzma)
    if name.startswith(("FORMAT_", "FILTER_", "CHECK_", "PRESET_", "MODE_", "MF_"))
} | {"zlib.MAX_WBITS": zlib.MAX_WBITS}
_METHODS = {"decode", "encode", "replace", "strip", "join", "translate", "rstrip", "lstrip"}


class _Literals:
    """Computes values from literals, decoders and names bound to such values before."""

    def __init__(self, tree: ast.Module) -> None:
        self.computed = 0
        self.modules: dict[str, str] = {}
        self.names: dict[str, ast.expr] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for item in node.names:
                    self.modules[item.asname or item.name.partition(".")[0]] = item.name
            elif isinstance(node, ast.ImportFrom) and node.module:
                for item in node.names:
                    self.modules[item.asname or item.name] = f"{node.module}.{item.name}"
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target = statement.targets[0]
                if isinstance(target, ast.Name):
                    self.names[target.id] = statement.value

    def dotted(self, node: ast.expr, followed: frozenset[str] = frozenset()) -> str:
        """Return the full name that an expression denotes, "" if it denotes none: names in `followed` lead back here."""
        if isinstance(node, ast.Name):
            bound = self.names.get(node.id)
            if node.id in self.modules:
                return self.modules[node.id]
            if not isinstance(bound, ast.Name | ast.Attribute | ast.Call):
                return node.id
            return "" if node.id in followed else self.dotted(bound, followed | {node.id})
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value, followed)
            return f"{base}.{node.attr}" if base else ""
        if not isinstance(node, ast.Call) or not node.args:
            return ""
        function, last = self.dotted(node.func, followed), node.args[-1]
        name = last.value if isinstance(last, ast.Constant) and isinstance(last.value, str) else ""
        if function in ("__import__", "importlib.import_module") and len(node.args) == 1:
            return name
        if function == "getattr" and len(node.args) == 2:
            base = self.dotted(node.args[0], followed)
            return f"{base}.{name}" if base and name else ""
        return ""

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """Return the value of an expression. Raises: Closed if literals and decoders do not give it."""
        self.computed += 1
        if depth > 50 or self.computed > MAX_COMPUTED:
            raise Closed("nested too deeply" if depth > 50 else "too much to compute")
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in self.names:
                return self.value(self.names[name], depth + 1)
            case ast.Attribute() if (dotted := self.dotted(node)) in CONSTANTS:
                return CONSTANTS[dotted]
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self.value(item, depth + 1) for item in items]
            case ast.Dict(keys=keys, values=values) if all(keys):
                pairs = zip(keys, values, strict=True)
                return {self.value(k, depth + 1): self.value(v, depth + 1) for k, v in pairs if k is not None}
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._sum(self.value(left, depth + 1), self.value(right, depth + 1))
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return int(self.value(left, depth + 1)) | int(self.value(right, depth + 1))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand, depth + 1)
            case ast.Subscript(value=value, slice=ast.Slice(lower=lower, upper=upper, step=step)):
                bounds = (None if part is None else self.value(part, depth + 1) for part in (lower, upper, step))
                return self.value(value, depth + 1)[slice(*bounds)]
            case ast.Call():
                return self._call(node, depth)
        raise Closed(f"{type(node).__name__} on line {node.lineno} is not a literal")

    @staticmethod
    def _sum(left: Any, right: Any) -> Any:
        for kind in (str, bytes, list, int):
            if isinstance(left, kind) and isinstance(right, kind):
                if kind is not int and len(left) + len(right) > MAX_UNPACKED_BYTES:  # type: ignore[arg-type]
                    raise Closed("more text than a submission can be")
                return left + right  # type: ignore[operator]
        raise Closed("a sum of different types")

    def _call(self, node: ast.Call, depth: int) -> Any:
        name = self.dotted(node.func)
        arguments = [self.value(argument, depth + 1) for argument in node.args] if name in DECODERS else []
        options = (
            {item.arg: self.value(item.value, depth + 1) for item in node.keywords if item.arg} if arguments else {}
        )
        if name in DECODERS:
            return DECODERS[name](*arguments, **options)
        if isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
            owner = self.value(node.func.value, depth + 1)
            arguments = [self.value(argument, depth + 1) for argument in node.args]
            if isinstance(owner, str | bytes):
                return getattr(owner, node.func.attr)(*arguments)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "decompress":
            maker = self.dotted(node.func.value.func) if isinstance(node.func.value, ast.Call) else ""
            if maker.startswith("zstandard."):
                return _zstd(self.value(node.args[0], depth + 1))
        if name == "compile" and node.args:
            return self.value(node.args[0], depth + 1)
        if name in ("bytes", "bytearray", "str") and node.args:
            inner = self.value(node.args[0], depth + 1)
            if name != "str" and isinstance(inner, list | bytes):
                return bytes(inner)
            return inner.decode("utf-8") if isinstance(inner, bytes) else str(inner)
        raise Closed(f"{name or 'a call'} on line {node.lineno} cannot be followed without running it")


def literal_value(tree: ast.Module, node: ast.expr) -> Any:
    """Return the value of `node`, an expression of `tree`, from literals and decoders. Raises: Closed otherwise."""
    try:
        return _Literals(tree).value(node)
    except Closed:
        raise
    except Exception as problem:  # decoders raise what they like on damaged data
        raise Closed(f"the packed data does not decode: {type(problem).__name__}") from problem


def _layers_of(tree: ast.Module, node: ast.expr) -> tuple[str, ...]:
    literals = _Literals(tree)
    reached: list[str] = []
    pending: list[ast.AST] = [node]
    seen: set[str] = set()
    while pending:
        current = pending.pop(0)
        for part in ast.walk(current):
            if isinstance(part, ast.Call) and (name := literals.dotted(part.func)) in DECODERS and name not in reached:
                reached.append(name)
            if isinstance(part, ast.Name) and part.id in literals.names and part.id not in seen:
                seen.add(part.id)
                pending.append(literals.names[part.id])
    return tuple(reached) or ("exec",)


def executed(tree: ast.Module) -> list[ast.expr]:
    """Return the argument of every `exec` or `eval` among the statements of a module's own level."""
    literals = _Literals(tree)
    found = []
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(statement):
            if (
                isinstance(node, ast.Call)
                and node.args
                and literals.dotted(node.func).removeprefix("builtins.") in ("exec", "eval")
            ):
                found.append(node.args[0])
    return found


def unpack(source: str) -> Unpacked:
    """Return the innermost source of a script and how it was packed.

    A script counts as wrapped if it defines nothing itself and executes packed text; an `exec` inside a script with
    functions of its own is followed by the interpreter, where it stands.
    Raises: SyntaxError if the outermost script is not Python, ValueError if it is too large or too deep to follow.
    """
    try:
        return _peeled(source)
    except RecursionError as problem:  # names that lead to names that lead to names
        raise ValueError("names lead too far to follow") from problem


def _peeled(source: str) -> Unpacked:
    layers: list[str] = []
    tree = parse(source)
    for _ in range(MAX_DEPTH):
        defines = any(isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for s in tree.body)
        packed = [] if defines else executed(tree)
        if not packed:
            return Unpacked(source=source, tree=tree, layers=tuple(layers), closed=())
        try:
            inner = literal_value(tree, packed[0])
            if isinstance(inner, bytes | bytearray):
                inner = bytes(inner).decode("utf-8")
            if not isinstance(inner, str):
                raise Closed("what is executed is not text")
            inner_tree = parse(inner)
        except (Closed, SyntaxError, ValueError) as problem:
            why = str(problem) or type(problem).__name__
            return Unpacked(source=source, tree=tree, layers=tuple(layers), closed=(why,))
        layers.extend(_layers_of(tree, packed[0]))
        source, tree = inner, inner_tree
    return Unpacked(source=source, tree=tree, layers=tuple(layers), closed=(f"more than {MAX_DEPTH} layers",))
