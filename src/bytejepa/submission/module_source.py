"""What a module of the package defines, and what each definition refers to: names resolved as Python's scopes do."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from bytejepa.errors import ConfigError

PACKAGE = "bytejepa"

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp


@dataclasses.dataclass(frozen=True, slots=True)
class Import:
    """An import of something outside the package."""

    module: str
    attribute: str | None
    """None: the module itself."""
    bound: str
    """The name it binds."""

    @property
    def root(self) -> str:
        """The package that has to be installed."""
        return self.module.partition(".")[0]

    @property
    def is_plain(self) -> bool:
        """Whether it is `import a.b`, which several statements may repeat."""
        return self.attribute is None and self.bound == self.root

    @property
    def statement(self) -> str:
        """The statement that imports a module."""
        return f"import {self.module}" + ("" if self.is_plain else f" as {self.bound}")


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """A place where a definition names another one of the package."""

    target: tuple[str, str]
    begin: int
    end: int
    """Offsets in the module's bytes of what names it, `module.name` included."""
    hidden_by: frozenset[str]
    """Local names there."""


@dataclasses.dataclass(slots=True)
class Definition:
    """One statement of a module's own level: a function, a class or constants."""

    names: tuple[str, ...]
    begin: int
    end: int
    """Offsets, comments above and docstring below included."""
    references: list[Reference] = dataclasses.field(default_factory=list)
    own_names: list[tuple[int, int, str]] = dataclasses.field(default_factory=list)
    """Where its own names stand: (begin, end, name)."""
    cuts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """Imports of the package inside functions."""
    outside: set[str] = dataclasses.field(default_factory=set)
    """Names of imports that running needs."""
    outside_annotations: set[str] = dataclasses.field(default_factory=set)


class ModuleSource:
    """A module as text and as definitions."""

    def __init__(self, name: str, source: bytes) -> None:
        self.name, self.source = name, source
        self.tree = ast.parse(source)
        self.docstring = ast.get_docstring(self.tree) or ""
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self.package_imports: dict[str, tuple[str, str | None]] = {}
        """Name -> (module, name there; None: the module itself), for imports of the package."""
        self.outside_imports: dict[str, set[Import]] = {}
        self.imported_at_load: list[str] = []
        """Modules of the package that are imported before this one runs."""
        self.definitions: list[Definition] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and _is_package(node.module):
                self._note_package_import(node, at_load=node in self.tree.body)
        for statement in self.tree.body:
            self._note_statement(statement)
        known = {bound for definition in self.definitions for bound in definition.names}
        for definition, statement in zip(self.definitions, self._defining(), strict=True):
            _References(self, definition, known).visit(statement)

    def offset(self, line: int, column: int) -> int:
        """Return the offset in bytes of a position as the syntax tree gives it."""
        return self._lines[line - 1] + column

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """Return begin and end of a node, in bytes."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def text_of(self, definition: Definition, names: dict[tuple[str, str], str]) -> str:
        """Return a definition as it stands in the module, under its new names, without imports of the package."""
        edits = [(r.begin, r.end, names[r.target]) for r in definition.references]
        edits += [(begin, end, names[self.name, name]) for begin, end, name in definition.own_names]
        edits += [(begin, end, "") for begin, end in definition.cuts]
        text, position = b"", definition.begin
        for begin, end, replacement in sorted(set(edits)):
            text += self.source[position:begin] + replacement.encode()
            position = end
        return (text + self.source[position : definition.end]).decode().strip("\n")

    def _defining(self) -> list[ast.stmt]:
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AsyncFunctionDef)
        return [statement for statement in self.tree.body if isinstance(statement, kinds)]

    def _note_package_import(self, node: ast.ImportFrom, *, at_load: bool) -> None:
        assert node.module is not None
        for item in node.names:
            submodule = f"{node.module}.{item.name}"
            is_module = _source_path(submodule) is not None
            self.package_imports[item.asname or item.name] = (
                (submodule, None) if is_module else (node.module, item.name)
            )
            if at_load:
                self.imported_at_load.append(submodule if is_module else node.module)

    def _note_statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Import() | ast.ImportFrom():
                self._note_outside(statement)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for inner in statement.body:
                    self._note_outside(inner)
            case ast.Expr(value=ast.Constant(value=str())):
                if self.definitions:  # the docstring of a constant; the module's own stands before all of them
                    self.definitions[-1].end = self.span(statement)[1]
            case _ if statement in self._defining():
                self.definitions.append(self._definition(statement))
            case _:
                raise ConfigError(f"{self.name}, line {statement.lineno}: a statement that a script cannot take over")

    def _note_outside(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Import):
            found = [
                Import(item.name, None, item.asname or item.name.partition(".")[0])
                for item in statement.names
                if not _is_package(item.name)
            ]
        elif isinstance(statement, ast.ImportFrom) and statement.module and not _is_package(statement.module):
            found = [Import(statement.module, item.name, item.asname or item.name) for item in statement.names]
        else:
            found = []
        for item in found:
            if item.module != "__future__":
                self.outside_imports.setdefault(item.bound, set()).add(item)

    def _definition(self, statement: ast.stmt) -> Definition:
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
        lines = self.source.splitlines()
        while first > 1 and lines[first - 2].startswith(b"#"):
            first -= 1
        assert statement.end_lineno is not None
        definition = Definition(names=(), begin=self.offset(first, 0), end=self._lines[statement.end_lineno])
        if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            definition.names = (statement.name,)
            keyword = {"ClassDef": b"class ", "FunctionDef": b"def ", "AsyncFunctionDef": b"async def "}
            begin = self.span(statement)[0] + len(keyword[type(statement).__name__])
            definition.own_names = [(begin, begin + len(statement.name.encode()), statement.name)]
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            bound = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            definition.names = tuple(part.id for part in bound)
            definition.own_names = [(*self.span(part), part.id) for part in bound]
        return definition


class _References(ast.NodeVisitor):
    """Walks one definition and notes what it refers to outside of itself."""

    def __init__(self, module: ModuleSource, definition: Definition, known: set[str]) -> None:
        self.module, self.definition, self.known = module, definition, known
        self.scopes: list[tuple[set[str], bool]] = []
        """(names bound, whether it is a class body, which functions inside do not see)."""
        self.in_annotation = False

    def visit_Name(self, node: ast.Name) -> None:
        """Note a name that no enclosing scope binds."""
        begin, end = self.module.span(node)
        if self._is_local(node.id) or (begin, end, node.id) in self.definition.own_names:
            return
        if node.id in self.known:
            self._refer((self.module.name, node.id), node)
        elif node.id in self.module.package_imports:
            module, name = self.module.package_imports[node.id]
            if name is None:
                raise ConfigError(
                    f"{self.module.name}, line {node.lineno}: the module {module} is used other than by its names"
                )
            self._refer(_home(module, name), node)
        elif node.id in self.module.outside_imports:
            found = self.definition.outside_annotations if self.in_annotation else self.definition.outside
            found.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Note `module.name` of a module of the package."""
        if isinstance(node.value, ast.Name) and not self._is_local(node.value.id):
            module, name = self.module.package_imports.get(node.value.id, ("", ""))
            if module and name is None:
                self._refer(_home(module, node.attr), node)
                return
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Visit what is evaluated outside the function, its annotations, and its body in a scope of its own."""
        for part in (*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)):
            self.visit(part)
        for argument in _arguments(node.args):
            self._annotation(argument.annotation)
        self._annotation(node.returns)
        self._inside(_bound_in(node), node.body)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - named by ast.NodeVisitor

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Visit defaults outside and the body inside."""
        for part in (*node.args.defaults, *(d for d in node.args.kw_defaults if d)):
            self.visit(part)
        self._inside(_bound_in(node), [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Visit bases outside and the body in a scope that methods do not see."""
        for part in (*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)):
            self.visit(part)
        self._inside(_bound_in(node), node.body, is_class=True)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Visit the annotation as such."""
        self._annotation(node.annotation)
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Cut an import of the package inside a function: what it names stands in the same file."""
        if _is_package(node.module):
            assert node.end_lineno is not None
            lines = self.module.offset(node.lineno, 0), self.module.offset(node.end_lineno + 1, 0)
            self.definition.cuts.append(lines)

    def _comprehension(self, node: _Comprehension) -> None:
        bound = {p.id for g in node.generators for p in ast.walk(g.target) if isinstance(p, ast.Name)}
        self.visit(node.generators[0].iter)  # evaluated outside
        inner: list[ast.AST] = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        inner += [g.iter for g in node.generators[1:]] + [test for g in node.generators for test in g.ifs]
        self._inside(bound, inner)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension  # noqa: N815

    def _inside(
        self, bound: set[str], body: list[ast.AST] | list[ast.stmt] | list[ast.expr], *, is_class: bool = False
    ) -> None:
        self.scopes.append((bound, is_class))
        for part in body:
            self.visit(part)
        self.scopes.pop()

    def _annotation(self, node: ast.expr | None) -> None:
        if node is not None:
            self.in_annotation = True
            self.visit(node)
            self.in_annotation = False

    def _visible(self) -> Iterator[set[str]]:
        for depth, (bound, is_class) in enumerate(self.scopes):
            if not is_class or depth == len(self.scopes) - 1:
                yield bound

    def _is_local(self, name: str) -> bool:
        return any(name in bound for bound in self._visible())

    def _refer(self, target: tuple[str, str], node: ast.expr) -> None:
        begin, end = self.module.span(node)
        written = self.module.source[begin:end].decode()
        assert written == ast.unparse(node), f"{self.module.name}, line {node.lineno}: {written!r} is not at its place"
        hidden = frozenset(name for bound in self._visible() for name in bound)
        self.definition.references.append(Reference(target, begin, end, hidden))


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    extra = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *extra]


def _bound_in(scope: _Function | ast.ClassDef) -> set[str]:
    """Return the names that a function or class body binds, those of scopes inside it left out."""
    bound = set() if isinstance(scope, ast.ClassDef) else {argument.arg for argument in _arguments(scope.args)}
    pending: list[ast.AST] = [scope.body] if isinstance(scope, ast.Lambda) else list(scope.body)
    while pending:
        node = pending.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound.add(node.name)
                continue
            case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                bound |= {p.target.id for p in ast.walk(node) if isinstance(p, ast.NamedExpr)}
                continue
            case ast.Import():
                bound |= {item.asname or item.name.partition(".")[0] for item in node.names}
            case ast.ImportFrom() if not _is_package(node.module):
                bound |= {item.asname or item.name for item in node.names}
            case ast.Name(ctx=ast.Store() | ast.Del()):
                bound.add(node.id)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                bound.add(name)
            case ast.Global():
                raise ConfigError(f"line {node.lineno}: a script cannot take over a global statement")
        pending.extend(ast.iter_child_nodes(node))
    return bound


def _is_package(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == PACKAGE


def _source_path(module: str) -> Path | None:
    """Return the file of a module of the package, without importing it."""
    package = importlib.util.find_spec(PACKAGE)
    assert package is not None
    assert package.origin is not None
    place = Path(package.origin).parent.joinpath(*module.split(".")[1:])
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _home(module: str, name: str) -> tuple[str, str]:
    """Return (module, name) of a definition, followed through modules that only pass it on."""
    source = read_module(module)
    if name in source.package_imports and not any(name in definition.names for definition in source.definitions):
        there, inner = source.package_imports[name]
        if inner is not None:
            return _home(there, inner)
    return module, name


@functools.cache
def read_module(name: str) -> ModuleSource:
    """Return a module of the package as source. Raises: ConfigError if there is none of that name."""
    path = _source_path(name)
    if path is None:
        raise ConfigError(f"the package has no module {name}")
    return ModuleSource(name, path.read_bytes())
