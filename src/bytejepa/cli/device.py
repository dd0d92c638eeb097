"""Where a verb computes: what its `--device` may say, and one line when memory does not suffice."""

from __future__ import annotations

import contextlib
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
    import torch

    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise BytejepaError("the GPU's memory is too small for this", hint=advice) from problem
    except (MemoryError, RuntimeError) as problem:
        # PyTorch's own allocator for CPUs has no exception of its own
        if not isinstance(problem, MemoryError) and "can't allocate memory" not in str(problem):
            raise
        raise BytejepaError("the memory is too small for this", hint=advice) from problem
