"""`bytejepa compress` and `bytejepa decompress`: any file, losslessly, with a model; both are filters too (`-`)."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from bytejepa.cli.options import NumThreads, refuse_ignored
from bytejepa.cli.output import check_output
from bytejepa.errors import CodecError, ConfigError, DataError, file_errors_as

if TYPE_CHECKING:
    from bytejepa.codec.workers import Settings

SUFFIX = ".bjc"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Common:
    STREAMS: ClassVar[tuple[str, ...]] = ("file", "output")

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """Any file; `-`: standard input, and the result goes to standard output."""
    model: Path | None = None
    """An artifact (.bjm) or a run folder; default: the model that comes with bytejepa."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write; `-`: standard output."""
    force: bool = False
    """Replace an existing file."""
    threads: NumThreads | None = None
    """Threads; default: one a processor. The result does not depend on it."""
    device: str = "cpu"
    """cpu, cuda or auto. The result does not depend on it."""
    json: bool = False
    """Print sizes and speed as one JSON object: on standard output, or standard error where the result goes there."""

    def _read(self) -> bytes:
        if str(self.file) == "-":
            return sys.stdin.buffer.read()
        with file_errors_as(DataError, "read", self.file):
            return self.file.read_bytes()

    def _target(self, default: Path | None) -> Path | None:
        """Return where to write, None for standard output. Raises: as `check_output`."""
        target = self.output or (Path("-") if str(self.file) == "-" else default)
        if target is None or str(target) == "-":
            return None
        check_output(target, CodecError, force=self.force)
        return target

    def _write(self, target: Path | None, pieces: Iterable[bytes]) -> None:
        """Write `pieces`, one after the other; a file that comes from a file gets its permissions."""
        from bytejepa.files import atomic_file, permissions

        if target is None:
            sys.stdout.buffer.writelines(pieces)
            sys.stdout.buffer.flush()
            return
        with file_errors_as(CodecError, "write", target):
            mode = permissions(self.file) if str(self.file) != "-" and self.file.is_file() else None
            with atomic_file(target, mode=mode) as file:
                file.writelines(pieces)

    def _checked_settings(self, lanes: int | None = None) -> Settings:
        from bytejepa.cli.device import chosen_device
        from bytejepa.codec.workers import Settings

        return Settings(threads=self.threads, lanes=lanes, device=chosen_device(self.device))

    @contextlib.contextmanager
    def _progress(self, settings: Settings, what: str, total: int, *, advice: str) -> Iterator[Settings]:
        """Yield settings that move a bar; without memory enough, say so with `advice`."""
        from bytejepa.cli.device import memory_errors_with
        from bytejepa.cli.terminal import progress_bar

        with memory_errors_with(advice), progress_bar(what, total=total) as (bar, task):
            yield dataclasses.replace(settings, on_progress=lambda done: bar.advance(task, done))

    def _report(self, elapsed_s: float, compressed_bytes: int, content_bytes: int, *, stdout_is_free: bool) -> None:
        from bytejepa.bits import bits_per_byte_of_size, format_bytes
        from bytejepa.cli.terminal import json_text, note, print_json

        record = {
            "content_bytes": content_bytes,
            "compressed_bytes": compressed_bytes,
            "bpb": bits_per_byte_of_size(compressed_bytes, content_bytes),
            "elapsed_s": elapsed_s,
            "bytes_per_s": content_bytes / elapsed_s,
        }
        if self.json and stdout_is_free:
            print_json(record)
        elif self.json:
            note(json_text(record))
        elif sys.stderr.isatty():
            sizes = f"{format_bytes(content_bytes)}, compressed {format_bytes(compressed_bytes)}"
            note(f"{sizes} ({record['bpb']:.4f} bits a byte), {format_bytes(content_bytes / elapsed_s)}/s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress(_Common):
    """Compress any file: `bytejepa compress FILE` writes FILE.bjc."""

    window: int | None = None
    """Context of a prediction, in ids; default: the model's, at most 1,024. Stored in the file."""
    hop: int | None = None
    """Ids by which a full context moves on; default: three quarters of the window. Stored in the file."""
    mixing: bool = True
    """Mix the model's predictions with counts of what a block has shown so far; without, the model alone decides."""
    block_bytes: int | None = None
    """Content that decodes by itself, so that damage costs no more; default: 4,194,304, without mixing 32,768."""
    segment_bytes: int | None = None
    """Least content of a block's up to 16 segments: small ones decode faster, large ones are smaller; default: 16,384. Stored."""

    def run_command(self) -> int:
        """Compress."""
        import time

        if not self.mixing:
            refuse_ignored(self, "with --no-mixing, which has no segments", "segment_bytes")
        from bytejepa.codec.compress import SEGMENT_BYTES, compress

        settings = self._checked_settings()
        target = self._target(Path(f"{self.file}{SUFFIX}"))
        data = self._read()
        began = time.perf_counter()
        advice = "use a smaller --window and fewer --threads, or compress parts of it"
        with self._progress(settings, "compress", len(data), advice=advice) as settings:
            blob = compress(
                self.model,
                data,
                mixing=self.mixing,
                block_bytes=self.block_bytes,
                segment_bytes=SEGMENT_BYTES if self.segment_bytes is None else self.segment_bytes,
                window=self.window,
                hop=self.hop,
                settings=settings,
            )
        self._write(target, [blob])
        elapsed_s = time.perf_counter() - began
        self._report(elapsed_s, len(blob), len(data), stdout_is_free=target is not None)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decompress(_Common):
    """Restore a compressed file: `bytejepa decompress FILE.bjc` writes FILE."""

    test: bool = False
    """Decode and check everything, write nothing."""
    keep_going: bool = False
    """Write what can be restored, with zeros in place of damaged blocks; the exit code is 6 all the same."""
    lanes: int | None = None
    """Lanes that a thread decodes together, a whole block at least; default: 8, and 1,024 on a GPU."""

    def run_command(self) -> int:
        """Decompress."""
        import time

        if self.test:
            refuse_ignored(self, "with --test, which writes nothing", "output", "force")
        from bytejepa.cli.terminal import note
        from bytejepa.codec.compress import content_bytes, restore

        settings = self._checked_settings(self.lanes)
        target = None if self.test else self._target(self._default_output())
        blob = self._read()
        began = time.perf_counter()
        total = content_bytes(blob)
        with self._progress(settings, "decompress", total, advice="use fewer --lanes and --threads") as settings:
            restored = restore(self.model, blob, settings=settings, keep_going=self.keep_going)
        if not self.test:
            self._write(target, restored.pieces())
        elapsed_s = time.perf_counter() - began
        self._report(elapsed_s, len(blob), restored.num_bytes, stdout_is_free=self.test or target is not None)
        damaged = restored.damaged
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
