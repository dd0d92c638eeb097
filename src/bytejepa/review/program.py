"""The sources of a submission as syntax trees: the main script, unpacked, and the helper modules beside it. Torch-free."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

from bytejepa.review.wrappers import Unpacked, unpack

MAX_SOURCE_BYTES = 16_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """One source file."""

    file: str
    """Path inside the folder; `packed:PATH` if what stands here came out of a wrapper."""
    path: str
    source: str
    tree: ast.Module
    unpacked: Unpacked

    def line(self, number: int) -> str:
        """Return one line of the source, stripped and cut to a readable length."""
        lines = self.source.splitlines()
        text = lines[number - 1].strip() if 0 < number <= len(lines) else ""
        return text if len(text) <= 160 else text[:157] + "..."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """The main script and what it may import from its own folder."""

    main: Module
    helpers: dict[str, Module]
    """By module name."""
    broken: dict[str, str]
    """Files that are not Python: path -> what the parser says."""

    def module_of(self, file: str) -> Module | None:
        """Return the module that a file of an event belongs to."""
        return next((module for module in (self.main, *self.helpers.values()) if module.file == file), None)


def read_module(path: Path, root: Path) -> Module:
    """Return a source file, unpacked. Raises: SyntaxError, and OSError or ValueError for what is no text."""
    if path.stat().st_size > MAX_SOURCE_BYTES:
        raise ValueError(f"more than {MAX_SOURCE_BYTES} bytes of source")
    source = path.read_text(encoding="utf-8")
    name = path.relative_to(root).as_posix()
    unpacked = unpack(source)
    return Module(
        file=f"packed:{name}" if unpacked.layers else name,
        path=name,
        source=unpacked.source,
        tree=unpacked.tree,
        unpacked=unpacked,
    )


def read_program(main: Path, root: Path) -> Program:
    """Return the main script with every other Python file of the folder as a possible helper.

    Raises: SyntaxError if the main script is not Python; broken helpers are listed instead.
    """
    helpers: dict[str, Module] = {}
    broken: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        if path == main or not path.is_file() or path.is_symlink():
            continue
        try:
            module = read_module(path, root)
        except (SyntaxError, ValueError, OSError) as problem:
            broken[path.relative_to(root).as_posix()] = str(problem)
            continue
        dotted = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        helpers[dotted] = module
    return Program(main=read_module(main, root), helpers=helpers, broken=broken)
