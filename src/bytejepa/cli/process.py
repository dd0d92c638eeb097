"""What the process of a command needs before its verb runs: three streams that names fit into, and a Ctrl-C that is not lost."""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType


def open_streams() -> None:
    """Open those of stdin, stdout and stderr that were closed, and let stdout write what its encoding does not have.

    What a closed stdout or stdin is used for fails as on a device that fails, with one line; a closed stderr is silent.
    """
    # of the wrong direction, so that the system refuses them
    for name, flags, mode in (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))
    # names of files may hold any bytes: as on stderr, which Python opens so
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def interrupt_imports() -> None:
    """Let Ctrl-C end the process at once while modules are imported.

    Some of them take KeyboardInterrupt for a missing module or drop it: the command would go on, or end in a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started the command ignores it
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    outer = frame
    while outer is not None:
        if outer.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{' '.join(['bytejepa', *sys.argv[1:2]])}: interrupted\n".encode(errors="replace"))
            os._exit(130)
        outer = outer.f_back
    signal.default_int_handler(number, frame)
