"""The most memory that was in use: a GPU's tensors, or on a CPU all that the process holds."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import psutil
import torch


def restart_peak(device: torch.device) -> None:
    """Forget the peak so far: `peak_bytes` then tells the largest amount from now on (on Linux, and on GPUs)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(
        OSError
    ):  # not Linux, or a container that forbids it: the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """Return the largest number of bytes in use: of tensors on a GPU, on a CPU the process's resident set, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    high_water = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii")) if status.is_file() else None
    if high_water:
        return 1024 * int(high_water.group(1))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
