"""The checker that the jaxtyping hook puts on every function of bytejepa under pytest: shapes, dtypes and plain types."""

import functools
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

CALLS_PER_TEST = 500
"""Checks made in one test: a few passes of a small model. A loop of hundreds of steps has the same shapes again and would take
twice its time."""

_of_types = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float here, as for mypy
_calls = 0


def begin_test() -> None:
    """Make the next CALLS_PER_TEST checks."""
    global _calls
    _calls = 0
    jaxtyping.config.update("jaxtyping_disable", False)


def check(declaration: Callable[..., Any]) -> Callable[..., Any]:
    """Return `declaration` (a signature without a body, which jaxtyping makes) with its arguments checked when called."""
    checked = _of_types(declaration)

    @functools.wraps(declaration)
    def counted(*args: Any, **kwargs: Any) -> Any:
        global _calls
        _calls += 1
        if _calls >= CALLS_PER_TEST:
            jaxtyping.config.update("jaxtyping_disable", True)
        return checked(*args, **kwargs)

    return counted
