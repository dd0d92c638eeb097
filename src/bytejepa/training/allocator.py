"""Keep freed memory in the process while training on a CPU.

glibc gives large blocks back to the system as soon as they are freed, so every step of eager training asks for its
activations anew and the kernel clears them page by page: some 5,000 page faults a step of `tiny`, a tenth of its time.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt(3)."""

SETTINGS = ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 64 << 20))
"""32 MiB is the largest threshold that glibc accepts; larger blocks still come and go."""


def keep_freed_memory() -> bool:
    """Tell the C library to keep what is freed for the next step; return whether it took the advice (glibc does)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False  # macOS, Windows and musl have their own ways
    return all(mallopt(parameter, value) == 1 for parameter, value in SETTINGS)
