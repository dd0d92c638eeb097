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


def printed(sources: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(sources)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
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
