"""Where a verb computes: what its `--device` may say, and one line when memory does not suffice."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from bytejepa.errors import BytejepaError, ConfigError


def chosen_device(name: str) -> str:
    """Return "cpu" or "cuda" for cpu, cuda or auto: a GPU if there is one. Raises: ConfigError for any other or no GPU."""
    import torch

    if name not in ("cpu", "cuda", "auto"):
        raise ConfigError(f"--device: expected cpu, cuda or auto, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device here", hint="use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def memory_errors_with(advice: str) -> Iterator[None]:
    """Turn a lack of memory, the processor's or a GPU's, into a BytejepaError with `advice` on how to need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        place = _too_small(problem)
        if place is None:
            raise
        raise BytejepaError(f"{place} is too small for this", hint=advice) from problem


def _too_small(problem: Exception) -> str | None:
    """Return which memory did not suffice, None if `problem` is another."""
    torch = sys.modules.get("torch")  # where it has not been imported, the problem is not its own
    if torch is not None and isinstance(problem, torch.OutOfMemoryError):
        return "the GPU's memory"
    # PyTorch's own allocator for CPUs has no exception of its own
    is_lack = isinstance(problem, MemoryError) or any(words in str(problem) for words in _SAID_OF_MEMORY)
    return "the memory" if is_lack else None


_SAID_OF_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")
"""What PyTorch says of tensors on the CPU for which there is not enough, or could not be in any computer."""
