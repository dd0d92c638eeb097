"""One file out of a package: the definitions that a program needs, with their comments, in an order that runs.

Beginning with the entry function, every function, class and constant of the package that it refers to is taken over as
it stands in its module (`module_source` reads what refers to what). Modules follow each other as they import each other;
imports of the package itself vanish, a name that would mean two things, or be hidden by a local variable where it is
used, is qualified. Third-party packages that are not permitted may occur in annotations only, which nothing evaluates.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection

from bytejepa.errors import ConfigError
from bytejepa.submission.module_source import Definition, Import, ModuleSource, read_module

Place = tuple[str, str]
"""(module, name) of a definition."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """The body of a script."""

    imports: str
    """Import statements, those that only annotations need under TYPE_CHECKING."""
    body: str
    """The definitions, a headline before each module's."""
    names: dict[Place, str]
    """What each definition is called in the script."""


def bundle(entry: Place, *, permitted: Collection[str], also: Collection[Place] = ()) -> Bundle:
    """Return what `entry`, and the definitions `also`, need of the package.

    `permitted`: third-party packages that may be imported; imports inside functions stay as they are.
    Raises: ConfigError naming a module that needs another package, or cannot be taken apart.
    """
    modules: dict[str, ModuleSource] = {}
    chosen = _closure([entry, *also], modules)
    order = _module_order(entry[0], [*also], modules)
    kept = [
        (modules[name], definition)
        for name in order
        for definition in modules[name].definitions
        if any((name, bound) in chosen for bound in definition.names)
    ]
    needed, annotated = _imports(kept, frozenset(permitted) | sys.stdlib_module_names)
    names = _final_names(kept, taken={item.bound for item in needed | annotated})
    return Bundle(imports=_import_block(needed, annotated), body=_body(kept, names), names=names)


def _closure(pending: list[Place], modules: dict[str, ModuleSource]) -> set[Place]:
    """Return every definition that is reached from `pending`, whole statements at a time; fill `modules`."""
    chosen: set[Place] = set()
    while pending:
        module_name, name = pending.pop()
        if (module_name, name) in chosen:
            continue
        if module_name not in modules:
            modules[module_name] = read_module(module_name)
        module = modules[module_name]
        forwarded = module.package_imports.get(name)
        definition = next((d for d in module.definitions if name in d.names), None)
        if definition is None:
            if forwarded is None or forwarded[1] is None:
                raise ConfigError(f"{module_name} has no definition of {name}")
            pending.append((forwarded[0], forwarded[1]))
            continue
        chosen |= {(module_name, bound) for bound in definition.names}
        pending.extend(reference.target for reference in definition.references)
    return chosen


def _module_order(entry: str, also: list[Place], modules: dict[str, ModuleSource]) -> list[str]:
    """Return the modules, each after those whose names it needs when it is loaded."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        for imported in modules[name].imported_at_load:
            if imported in modules:
                visit(imported)
        if name not in order:
            order.append(name)

    for name in [*(place[0] for place in also), entry, *sorted(modules)]:
        if name in modules:
            visit(name)
    return order


def _imports(
    kept: list[tuple[ModuleSource, Definition]], permitted: Collection[str]
) -> tuple[set[Import], set[Import]]:
    """Return the imports that running needs, and those of other packages that annotations name."""
    needed: set[Import] = set()
    annotated: set[Import] = set()
    for module, definition in kept:
        for name in definition.outside:
            for item in module.outside_imports[name]:
                if item.root not in permitted:
                    raise ConfigError(
                        f"{module.name} needs the package {item.root} for {', '.join(definition.names)}",
                        hint="a submission's script may use torch, NumPy and its compressors only",
                    )
                needed.add(item)
        for name in definition.outside_annotations:
            for item in module.outside_imports[name]:
                (needed if item.root in permitted else annotated).add(item)
    meanings: dict[str, Import] = {}
    for item in needed | annotated:
        if meanings.setdefault(item.bound, item) != item and not item.is_plain:
            raise ConfigError(f"the name {item.bound} is imported from {item.module} and {meanings[item.bound].module}")
    return needed, annotated


def _final_names(kept: list[tuple[ModuleSource, Definition]], taken: set[str]) -> dict[Place, str]:
    """Return a name for each definition that no other has and no local variable hides where it is used."""
    hidden: dict[Place, set[str]] = {}
    for _, definition in kept:
        for reference in definition.references:
            hidden.setdefault(reference.target, set()).update(reference.hidden_by)
    names: dict[Place, str] = {}
    used = set(taken)
    for module, definition in kept:
        for name in definition.names:
            place, final = (module.name, name), name
            qualifier = module.name.rpartition(".")[2]
            while final in used or final in hidden.get(place, ()):
                final = f"{final}_of_{qualifier}"
            used.add(final)
            names[place] = final
    return names


def _import_block(needed: set[Import], annotated: set[Import]) -> str:
    lines = _import_lines(needed | {Import("typing", "TYPE_CHECKING", "TYPE_CHECKING")})
    if annotated:
        lines.extend(("", "if TYPE_CHECKING:", *(f"    {line}" for line in _import_lines(annotated))))
    return "\n".join(lines) + "\n"


def _import_lines(imports: set[Import]) -> list[str]:
    """Return import statements, one a module."""
    plain = sorted(item.statement for item in imports if item.attribute is None)
    members: dict[str, list[str]] = {}
    for item in sorted(imports, key=lambda i: (i.module, i.attribute or "")):
        if item.attribute is not None:
            alias = f" as {item.bound}" if item.bound != item.attribute else ""
            members.setdefault(item.module, []).append(item.attribute + alias)
    return [*plain, *(f"from {module} import {', '.join(names)}" for module, names in members.items())]


def _body(kept: list[tuple[ModuleSource, Definition]], names: dict[Place, str]) -> str:
    parts: list[str] = []
    current = ""
    for module, definition in kept:
        if module.name != current:
            current = module.name
            path = current.replace(".", "/") + ".py"
            remarks = [f"# {line}".rstrip() for line in module.docstring.splitlines()]
            parts.append("\n".join([f"# {'-' * 20} {path} {'-' * max(0, 96 - len(path))}", *remarks]))
        parts.append(module.text_of(definition, names))
    return "\n\n\n".join(parts) + "\n"
