"""What a verb's `-o` may name."""

from __future__ import annotations

from pathlib import Path

from bytejepa.errors import BytejepaError, ConfigError, file_errors_as
from bytejepa.files import is_stream, require_writable


def check_output(path: Path, error: type[BytejepaError], *, force: bool) -> None:
    """Refuse, before the work that makes it, an output that could not be written or that would replace a file.

    A FIFO or a character device is written to and needs no `force`. Raises: ConfigError if a file exists and `force` is
    off; `error` for a folder in its place or one that is missing or not to be written to.
    """
    with file_errors_as(error, "write", path):
        require_writable(path)
        if path.exists() and not is_stream(path) and not force:
            raise ConfigError(f"{path} exists", hint="use --force to replace it")
