"""Source text as a syntax tree, within bounds that all who read the tree may rely on. Torch-free."""

from __future__ import annotations

import ast

MAX_NESTING = 200
"""Nodes inside each other; recursion over a tree of this depth stays far from the interpreter's own limit."""
MAX_NUMBER_BITS = 4096
"""Larger whole numbers are no settings: Python refuses to print them, and powers of them fill the memory."""


def parse(source: str) -> ast.Module:
    """Return the syntax tree of `source`. Raises: SyntaxError, or ValueError for what is beyond the bounds."""
    try:
        tree = ast.parse(source)
    except (RecursionError, MemoryError) as problem:
        raise ValueError("nested too deeply for the parser") from problem
    level: list[ast.AST] = [tree]
    for _ in range(MAX_NESTING):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        for node in level:
            if isinstance(node, ast.Constant) and is_huge(node.value):
                raise ValueError(f"a whole number of more than {MAX_NUMBER_BITS} bits on line {node.lineno}")
    if level:
        raise ValueError(f"nested more than {MAX_NESTING} levels deep")
    return tree


def is_huge(value: object) -> bool:
    """Return whether `value` is a whole number beyond MAX_NUMBER_BITS."""
    return isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS
