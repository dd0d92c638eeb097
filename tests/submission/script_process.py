"""A submission's script as a process of its own, forked from one that has imported torch: seconds saved with each."""

import contextlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import forked

MISSING = frozenset(
    ("bytejepa", "jaxtyping", "safetensors", "cattrs", "tyro", "rich", "filelock", "psutil", "scipy", "matplotlib", "jinja2", "brotli")
)  # fmt: skip
"""What a machine of the challenge does not have."""


class OnlyWhatIsPermitted:
    """Finds none of MISSING."""

    def find_spec(self, name, *_):
        if name.partition(".")[0] in MISSING:
            raise ImportError(f"{name} is not there")


def run(script: Path, place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end in the folder `place`."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, **forked.ENVIRONMENT, **variables}
    output = place / "output"
    output.mkdir()
    with forked._as_in_environment(forked.ENVIRONMENT):  # the server's, if this starts it
        process = forked._CONTEXT.Process(target=_be, args=(str(script), str(place), environment, str(output)))
        process.start()
    with contextlib.closing(process):
        process.join(240)
        if process.is_alive():
            process.kill()
            process.join()
        code, out, err = process.exitcode, *((output / name).read_text() for name in ("stdout", "stderr"))
    assert code is not None
    return subprocess.CompletedProcess([str(script)], code, out, err)


def _be(script: str, place: str, environment: dict[str, str], output: str) -> None:
    """Be the script, in the forked process."""
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(Path(output) / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    for name in [name for name in sys.modules if name.partition(".")[0] in MISSING]:
        del sys.modules[name]
    sys.meta_path.insert(0, OnlyWhatIsPermitted())
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")
