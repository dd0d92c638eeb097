"""`bytejepa compress` and `bytejepa decompress`: any file, losslessly, with a model; both are filters too (`-`)."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bytejepa.errors import CodecError, ConfigError, DataError, file_errors_as

if TYPE_CHECKING:
    from bytejepa.codec.compress import Damage, Settings

SUFFIX = ".bjc"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Common:
    file: tyro.conf.Positional[Path]
    """Any file; `-`: standard input, and the result goes to standard output."""
    model: Path | None = None
    """An artifact (.bjm) or a run folder; default: the model that comes with bytejepa."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write; `-`: standard output."""
    force: bool = False
    """Replace an existing file."""
    threads: int | None = None
    """Threads; default: one a processor. The result does not depend on it."""
    device: str = "cpu"
    """cpu or cuda. The result does not depend on it."""
    json: bool = False
    """Print sizes and speed as one JSON object: on standard output, or standard error where the result goes there."""

    def _read(self) -> bytes:
        if str(self.file) == "-":
            return sys.stdin.buffer.read()
        with file_errors_as(DataError, "read", self.file):
            return self.file.read_bytes()

    def _target(self, default: Path | None) -> Path | None:
        """Return where to write, None for standard output. Raises: ConfigError if it exists."""
        target = self.output or (Path("-") if str(self.file) == "-" else default)
        if target is None or str(target) == "-":
            return None
        if target.exists() and not self.force:
            raise ConfigError(f"{target} exists", hint="use --force to replace it")
        return target

    def _write(self, target: Path | None, content: bytes) -> None:
        from bytejepa.files import write_atomically

        if target is None:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
            return
        with file_errors_as(CodecError, "write", target):
            write_atomically(target, content)

    @contextlib.contextmanager
    def _settings(self, what: str, total: int, lanes: int | None = None) -> Iterator[Settings]:
        from bytejepa.cli.terminal import progress_bar
        from bytejepa.codec.compress import Settings

        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads: expected 1 or more, got {self.threads}")
        with progress_bar(what, total=total) as (bar, task):
            yield Settings(
                threads=self.threads,
                lanes=lanes,
                device=self.device,
                on_progress=lambda done: bar.advance(task, done),
            )

    def _report(self, seconds: float, compressed_bytes: int, content_bytes: int, *, stdout_is_free: bool) -> None:
        import json

        from bytejepa.bits import format_bytes
        from bytejepa.cli.terminal import note, print_json

        record = {
            "content_bytes": content_bytes,
            "compressed_bytes": compressed_bytes,
            "bpb": 8 * compressed_bytes / content_bytes if content_bytes else None,
            "seconds": seconds,
            "bytes_per_s": content_bytes / seconds,
        }
        if self.json and stdout_is_free:
            print_json(record)
        elif self.json:
            note(json.dumps(record))
        elif sys.stderr.isatty():
            sizes = f"{format_bytes(content_bytes)}, compressed {format_bytes(compressed_bytes)}"
            note(f"{sizes} ({record['bpb'] or 0:.4f} bits a byte), {format_bytes(content_bytes / seconds)}/s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress(_Common):
    """Compress any file: `bytejepa compress FILE` writes FILE.bjc."""

    window: int | None = None
    """Context of a prediction, in ids; default: the model's, at most 1,024. Stored in the file."""
    hop: int | None = None
    """Ids by which a full context moves on; default: three quarters of the window. Stored in the file."""
    block_bytes: int = 32_768
    """Content that decodes by itself: smaller blocks give more lanes, larger ones compress better."""

    def run_command(self) -> int:
        """Compress."""
        import time

        from bytejepa.codec.compress import compress

        target = self._target(Path(f"{self.file}{SUFFIX}"))
        data = self._read()
        began = time.perf_counter()
        with self._settings("compress", len(data)) as settings:
            blob = compress(
                self.model, data, block_bytes=self.block_bytes, window=self.window, hop=self.hop, settings=settings
            )
        self._write(target, blob)
        seconds = time.perf_counter() - began
        self._report(seconds, len(blob), len(data), stdout_is_free=target is not None)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decompress(_Common):
    """Restore a compressed file: `bytejepa decompress FILE.bjc` writes FILE."""

    test: bool = False
    """Decode and check everything, write nothing."""
    keep_going: bool = False
    """Write what can be restored, with zeros in place of damaged blocks; the exit code is 6 all the same."""
    lanes: int | None = None
    """Blocks that a thread decodes together; default: 8, and 1,024 on a GPU."""

    def run_command(self) -> int:
        """Decompress."""
        import time

        from bytejepa.cli.terminal import note
        from bytejepa.codec.compress import decompress, restore

        if self.lanes is not None and self.lanes < 1:
            raise ConfigError(f"--lanes: expected 1 or more, got {self.lanes}")
        target = None if self.test else self._target(self._default_output())
        blob = self._read()
        began = time.perf_counter()
        damaged: list[Damage] = []
        with self._settings("decompress", len(blob), self.lanes) as settings:
            if self.keep_going:
                content, damaged = restore(self.model, blob, settings=settings)
            else:
                content = decompress(self.model, blob, settings=settings)
        if not self.test:
            self._write(target, content)
        seconds = time.perf_counter() - began
        self._report(seconds, len(blob), len(content), stdout_is_free=self.test or target is not None)
        for block in damaged:
            note(f"{self.file}: bytes {block.begin} to {block.begin + block.num_bytes}: {block.reason}")
        if damaged:
            raise CodecError(f"{self.file}: {len(damaged)} damaged, everything else was restored")
        return 0

    def _default_output(self) -> Path | None:
        if str(self.file) == "-" or self.output is not None:
            return None
        if self.file.suffix != SUFFIX:
            raise ConfigError(f"{self.file} does not end in {SUFFIX}", hint="name the output with -o")
        return self.file.with_suffix("")
