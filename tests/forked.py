"""Commands as processes of their own, forked from one that has imported what they need: two seconds saved with each.

That one (multiprocessing's fork server) has run nothing: forks of pytest's own process would inherit its threads.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

IMPORTED = (
    "torch", "torch.distributed.run", "scipy.stats", "bytejepa.cli", "bytejepa.data.prepare", "bytejepa.training.runs",
    "bytejepa.kernels.tiled_attention", "bytejepa.artifact.export", "bytejepa.inference.generate",
    "bytejepa.codec.compress", "bytejepa.study.runner", "bytejepa.submission.folder", "bytejepa.review.reviewer",
)  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


_CONTEXT = _server()


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that has been started."""

    words: Sequence[str]
    process: BaseProcess
    output: Path
    """Folder of what it writes to stdout and stderr."""

    def ended(self, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for it, and return how it ended. Raises: TimeoutExpired, with the process killed."""
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(list(self.words), timeout_s)
        code = self.process.exitcode
        assert code is not None
        out, err = ((self.output / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(list(self.words), code, out, err)


BYTEJEPA = "import sys; from bytejepa.cli import main; sys.exit(main(sys.argv[1:]))"
TORCHRUN = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
"""The processes that it starts import all for themselves."""


@contextlib.contextmanager
def started(
    words: Sequence[str], *, place: Path | None = None, program: str = BYTEJEPA, given: str = "", **variables: str
) -> Iterator[Command]:
    """Start `program` with `words`, by default `bytejepa WORDS...`, in the folder `place`.

    `given` is what it reads from stdin; `variables` are of its environment, besides the usual ones.
    """
    with tempfile.TemporaryDirectory(prefix="bytejepa-test-") as folder:
        environment = {**os.environ, **ENVIRONMENT, **variables}
        process = _CONTEXT.Process(
            target=_be, args=(program, list(words), given, str(place or Path.cwd()), environment, folder)
        )
        with _as_in_environment(ENVIRONMENT):  # the server's, if this starts it
            process.start()
        try:
            yield Command(words, process, Path(folder))
        finally:
            process.kill()
            process.join()


def run(
    words: Sequence[str], *, place: Path | None = None, program: str = BYTEJEPA, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `program` with `words`, by default `bytejepa WORDS...`, to its end."""
    with started(words, place=place, program=program, **variables) as command:
        return command.ended()


def run_on_ranks(world_size: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `bytejepa WORDS...` on ranks of this machine, as torchrun would, and return how rank 0 ended: all ended alike."""
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with contextlib.ExitStack() as stack:
        commands = [
            stack.enter_context(started(words, **shared, RANK=str(rank), LOCAL_RANK=str(rank)))
            for rank in range(world_size)
        ]
        ended = [command.ended() for command in commands]
    assert len({done.returncode for done in ended}) == 1, [done.stderr for done in ended]
    return ended[0]


def free_port() -> str:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextlib.contextmanager
def _as_in_environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _be(program: str, words: list[str], given: str, place: str, environment: dict[str, str], output: str) -> None:
    """Be the command: what `python -c PROGRAM WORDS...` does, in the forked process."""
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(Path(output) / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdin = io.StringIO(given)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    sys.argv = ["-c", *words]
    exec(program, {"__name__": "__main__"})
