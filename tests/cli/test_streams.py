"""The command as a process: streams that are closed, that nobody reads or of another encoding, and Ctrl-C while modules load."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

COMMAND = f"{sys.executable} -m bytejepa"


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line], env={**os.environ, **variables},
        capture_output=True, text=True, errors="surrogateescape", check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("verb", ["config tiny", "config tiny --explain", "config tiny --json", "train --help"])
def test_a_reader_that_leaves_is_no_failure(verb: str) -> None:
    done = shell(f"(sleep 0.1; {COMMAND} {verb}; echo $? >&2) | true")
    assert done.stderr == "0\n"


def test_notes_that_nobody_reads_do_not_cost_the_result(minimal_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"short")
    # a pipe whose reading end is closed
    program = (
        "import os, subprocess, sys\nread, write = os.pipe()\nos.close(read)\n"
        "sys.exit(subprocess.run(sys.argv[1:], stderr=write).returncode)"
    )
    words = f"eval {minimal_artifact} --data {tmp_path / 'text'} --window 4096 --stride 4096"
    done = shell(f"{sys.executable} -c '{program}' {COMMAND} {words}")
    assert done.returncode == 0
    assert "non-overlapping" in done.stdout


@pytest.mark.parametrize("verb", ["config tiny --json", "train --help"])
def test_a_closed_standard_output(verb: str) -> None:
    done = shell(f"{COMMAND} {verb} >&-")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"bytejepa {verb.split()[0]}: cannot go on: Bad file descriptor\n"


def test_a_closed_standard_input() -> None:
    done = shell(f"{COMMAND} compress - <&-")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "bytejepa compress: cannot go on: Bad file descriptor\n"


def test_an_error_with_a_closed_stderr_is_not_taken_for_a_result() -> None:
    done = shell(f"{COMMAND} config tinny 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_the_encoding_does_not_have(tmp_path: Path, encoding: str) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")  # noqa: PTH118 - a name that is no text
    (tmp_path / "text").write_bytes(b"some words that are no more than that\n" * 20)
    prepared = f"{COMMAND} prepare {tmp_path / 'text'} --val-share 0.1 --out {os.fsdecode(folder)}"
    done = shell(prepared, PYTHONIOENCODING=f"{encoding}:strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert "caf\\udce9" in done.stdout


INTERRUPTED = """
import sys, types
from bytejepa import cli
sys.argv = ["bytejepa", "config", "tiny"]
class Module:
    def find_spec(self, name, path=None, target=None):
        if name == "bytejepa.cli.config":
            try:
                import os, signal
                os.kill(os.getpid(), signal.SIGINT)
                sum(range(1000))
            except KeyboardInterrupt:
                raise ImportError("a module that takes Ctrl-C for something that is missing") from None
sys.meta_path.insert(0, Module())
cli.run()
"""


def test_an_interruption_while_modules_load_is_none_of_theirs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "bytejepa config: interrupted\n")
