"""Compiled code is that of the sources as they are, also of those that a function's own file only imports."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bytejepa

PROGRAM = """
import numpy as np
from bytejepa.codec.attention import drop_own_values
heads = np.array([[9, 4]], dtype=np.int16)
drop_own_values(heads, np.array([[[7, 5]]], dtype=np.int16))
print(heads.tolist())
"""


def printed(sources: Path, program: str = PROGRAM, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(sources), **variables}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.integration
def test_a_change_of_one_kernel_reaches_those_that_call_it(tmp_path: Path) -> None:
    package = tmp_path / "bytejepa"
    shutil.copytree(
        Path(bytejepa.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.bjm", "*.md")
    )
    as_it_is = printed(tmp_path)
    assert as_it_is == "[[1, -2]]\n"
    kernels = package / "codec" / "kernels.py"
    source = kernels.read_text(encoding="utf-8")
    rounding = "return (value + (np.int64(1) << (shift - 1))) >> shift"
    assert source.count(rounding) == 1
    kernels.write_text(source.replace(rounding, "return value >> shift"), encoding="utf-8")
    assert printed(tmp_path) != as_it_is


@pytest.mark.integration
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_code_that_was_kept_and_is_cut_short_is_made_anew(tmp_path: Path, suffix: str) -> None:
    sources, variables = Path(bytejepa.__file__).parents[1], {"NUMBA_CACHE_DIR": str(tmp_path)}
    as_it_is = printed(sources, **variables)
    kept = {path: path.stat().st_size for path in tmp_path.rglob(f"*.{suffix}")}
    for path in kept:
        os.truncate(path, 0)
    assert printed(sources, **variables) == as_it_is
    assert kept
    assert all(path.stat().st_size > size / 2 for path, size in kept.items())


ON_A_FULL_DISK = """
import errno
from numba.core.caching import IndexDataCacheFile
def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
IndexDataCacheFile._open_for_write = no_space
"""


@pytest.mark.integration
def test_a_full_disk_keeps_no_code_and_stops_nothing(tmp_path: Path) -> None:
    sources = Path(bytejepa.__file__).parents[1]
    assert printed(sources, program=ON_A_FULL_DISK + PROGRAM, NUMBA_CACHE_DIR=str(tmp_path)) == "[[1, -2]]\n"


WITHOUT_A_HOME = """
import os, pathlib
def no_home():
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = no_home
os.access = lambda *_: False
"""


@pytest.mark.integration
def test_without_a_home_no_code_is_kept() -> None:
    sources = Path(bytejepa.__file__).parents[1]
    assert printed(sources, program=WITHOUT_A_HOME + PROGRAM, NUMBA_CACHE_DIR="", XDG_CACHE_HOME="") == "[[1, -2]]\n"
