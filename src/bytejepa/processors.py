"""How many processors there are to use."""

from __future__ import annotations

import os


def num_usable_processors() -> int:
    """Return the number of processors that this process may run on; where the system does not say, of all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
