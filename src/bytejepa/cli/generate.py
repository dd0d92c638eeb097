"""`bytejepa generate`: text from a model, as it comes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, ClassVar

import tyro

from bytejepa.cli.options import NumThreads, refuse_ignored
from bytejepa.cli.output import check_output
from bytejepa.config_fields import Range
from bytejepa.errors import ConfigError, DataError, file_errors_as

if TYPE_CHECKING:
    from bytejepa.inference.engine import Engine
    from bytejepa.inference.sampling import Sampling


SHARED_FROM = 1 << 18
"""Products of a step's largest square matrix and all lanes from which a second thread saves more than waiting for it
costs; on a busy machine one thread is faster by far below it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Write text with a model: `bytejepa generate MODEL --prompt "Once upon a time"`."""

    STREAMS: ClassVar[tuple[str, ...]] = ("prompt",)

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """An artifact (.bjm) or a run folder (its averaged weights)."""
    prompt: str = ""
    """What the text begins with; `-`: read it from standard input."""
    prompt_file: Path | None = None
    """Read the prompt from this file instead: any bytes."""
    num_bytes: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 512
    """Bytes to write after the prompt."""
    num_samples: Annotated[int, Range(1, 65_536)] = 1
    """Continuations to make at once; one is shown as it comes, several when they are done."""
    seed: int = 0
    """The same seed gives the same text."""
    temperature: float = 0.8
    """Divides the logits; 0: always the most likely byte; 1: the model's own distribution."""
    top_k: int | None = None
    """Keep only this many of the most likely bytes; default: all."""
    top_p: float | None = None
    """Keep the fewest most likely bytes whose probabilities sum to at least this; default: all."""
    min_p: float | None = None
    """Drop bytes less likely than this share of the most likely one; default: none."""
    repetition_penalty: float = 0.0
    """Nats taken from a byte for every byte by which it makes a repeat longer than allowed; 0: off."""
    repetition_allowed_bytes: int = 16
    """Length of a repeat that costs nothing."""
    repetition_window_bytes: int = 2048
    """How far back repeats are looked for, in bytes."""
    any_bytes: bool = False
    """Draw any byte, also where the text stops being valid UTF-8."""
    echo: bool = False
    """Write the prompt before each continuation."""
    window: int | None = None
    """Longest context, in ids; default: as the model was evaluated."""
    hop: int | None = None
    """Ids that leave a full context at once; default: half the window."""
    device: str = "auto"
    """cpu, cuda or auto."""
    threads: NumThreads | None = None
    """CPU threads; default: 1 for models whose steps are too small to share, otherwise as torch chooses."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write to this file instead of standard output; it has the text and nothing else."""
    force: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print one JSON object with all samples."""

    def run_command(self) -> int:
        """Generate, and print the text as it comes."""
        if self.output is None:
            refuse_ignored(self, "without -o", "force")
            if self.json:
                refuse_ignored(self, "with --json, which holds the prompt", "echo")
        if not self.repetition_penalty:
            names = ("repetition_allowed_bytes", "repetition_window_bytes")
            refuse_ignored(self, "without --repetition-penalty", *names)
        import time

        from bytejepa.cli.device import chosen_device, memory_errors_with
        from bytejepa.cli.terminal import note, print_json
        from bytejepa.files import write_atomically

        if self.output is not None:
            check_output(self.output, DataError, force=self.force)
        device, sampling, prompt = chosen_device(self.device), self._sampling(), self._prompt()
        streams = self.num_samples == 1 and not self.json and self.output is None
        out = sys.stdout.buffer
        with memory_errors_with("use a smaller --num-bytes, --num-samples or --window"):
            engine = self._engine(device)
            if streams and self.echo:
                _write(out, prompt)
            began = time.perf_counter()
            texts = self._texts(engine, prompt, sampling, out if streams else None)
        seconds = time.perf_counter() - began
        rate = self.num_samples * self.num_bytes / seconds if seconds else 0.0
        written = [(prompt if self.echo else b"") + bytes(text) for text in texts]
        if self.output is not None:
            with file_errors_as(DataError, "write", self.output):
                write_atomically(self.output, _joined(written))
        if self.json:
            print_json(self._record(prompt, texts, rate))
        elif streams:
            _write(out, b"\n")
        elif self.output is None:
            _write(out, _joined(written))
        note(f"{self.num_samples * self.num_bytes:,} bytes at {rate:,.0f} bytes/s")
        return 0

    def _texts(self, engine: Engine, prompt: bytes, sampling: Sampling, out: BinaryIO | None) -> list[bytearray]:
        """Return the continuations; `out` gets the first one as it comes."""
        from bytejepa.inference.generate import generate_samples

        texts = [bytearray() for _ in range(self.num_samples)]
        for pieces in generate_samples(
            engine,
            prompt,
            num_samples=self.num_samples,
            num_bytes=self.num_bytes,
            seed=self.seed,
            sampling=sampling,
        ):
            for text, piece in zip(texts, pieces, strict=True):
                text += piece
            if out is not None:
                _write(out, pieces[0])
        return texts

    def _sampling(self) -> Sampling:
        from bytejepa.inference.sampling import Sampling

        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            repetition_allowed_bytes=self.repetition_allowed_bytes,
            repetition_window_bytes=self.repetition_window_bytes,
            valid_utf8=not self.any_bytes,
        )

    def _prompt(self) -> bytes:
        if self.prompt_file is not None:
            if self.prompt:
                raise ConfigError("--prompt and --prompt-file exclude each other")
            with file_errors_as(DataError, "read", self.prompt_file):
                return self.prompt_file.read_bytes()
        # surrogateescape: a command line may hold bytes that are not text
        return sys.stdin.buffer.read() if self.prompt == "-" else self.prompt.encode(errors="surrogateescape")

    def _engine(self, device: str) -> Engine:
        import torch

        from bytejepa import load
        from bytejepa.inference.generate import generation_engine

        model = load(self.model, device=device)
        elements = self.num_samples * model.config.model.model_dim**2
        if self.threads is not None or elements < SHARED_FROM:
            torch.set_num_threads(1 if self.threads is None else self.threads)
        return generation_engine(model, window=self.window, hop=self.hop)

    def _record(self, prompt: bytes, texts: list[bytearray], rate: float) -> dict[str, object]:
        samples = [
            {"sample": number, "text": text.decode(errors="replace"), "hex": text.hex()}
            for number, text in enumerate(texts)
        ]
        return {
            "model": str(self.model),
            "prompt": prompt.decode(errors="replace"),
            "seed": self.seed,
            "num_bytes": self.num_bytes,
            "bytes_per_s": rate,
            "samples": samples,
        }


def _joined(texts: list[bytes]) -> bytes:
    """Return one text as it is, several under headings."""
    if len(texts) == 1:
        return texts[0]
    return b"".join(b"=== sample %d ===\n%s\n" % (number, text) for number, text in enumerate(texts))


def _write(out: BinaryIO, data: bytes) -> None:
    out.write(data)
    out.flush()
