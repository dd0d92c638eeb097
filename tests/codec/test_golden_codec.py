"""The format's own numbers: a change here breaks every file that exists."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bytejepa.codec import coder, container
from bytejepa.codec.compress import decompress
from bytejepa.codec.torch_model import TorchCoder
from codec.golden import MIXED_TEXT, TEXT, golden_mixed_file, measured
from codec.models import GOLDEN, cpu_coder, golden_model

EXPECTED = json.loads((GOLDEN / "codec.json").read_text())


def test_the_compiled_path_gives_the_golden_numbers() -> None:
    assert measured(cpu_coder()) == EXPECTED


def test_the_torch_path_gives_the_golden_numbers() -> None:
    assert measured(TorchCoder(golden_model(), 64, 32)) == EXPECTED


@pytest.mark.slow
def test_code_for_the_plainest_processor_gives_the_golden_numbers(tmp_path: Path) -> None:
    """Without AVX, in a process of its own: the compiled code is another, its integers are not."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    test = f"{__file__}::test_the_compiled_path_gives_the_golden_numbers"
    done = subprocess.run([sys.executable, "-m", "pytest", test], env=environment, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout


def test_golden_words_of_the_coder() -> None:
    # computed by hand: [1/4, 1/2) begins at 0x40, [0, 1/2) at nothing, and two times the last 2^-24 at 2^48 - 1
    half, quarter = 1 << 23, 1 << 22
    assert coder.encode(np.array([quarter]), np.array([quarter])) == b"\x40"
    assert coder.encode(np.array([0]), np.array([half])) == b""
    assert coder.encode(np.array([half]), np.array([half])) == b"\x80"
    assert coder.encode(np.array([], np.int64), np.array([], np.int64)) == b""
    almost = (1 << 24) - 1
    assert coder.encode(np.array([almost, almost]), np.array([1, 1])) == b"\xff" * 6


@pytest.mark.parametrize(("name", "text"), [("codec_file.bjc", TEXT), ("codec_file_mixed.bjc", MIXED_TEXT)])
def test_files_of_every_version_still_decode(name: str, text: bytes) -> None:
    assert decompress(golden_model(), (GOLDEN / name).read_bytes()) == text


def test_the_newest_version_is_still_written_so() -> None:
    blob = golden_mixed_file()
    assert blob == (GOLDEN / "codec_file_mixed.bjc").read_bytes()
    parsed = container.parse(blob)
    assert isinstance(parsed, container.Blocks)
    assert [block is not None and block.is_zstd for block in parsed.blocks] == [False, False]
    assert parsed.segment_bytes == 150
