"""Whether two studies ran the same code: the digest of the sources that decide a run's figures."""

import ast
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bytejepa
from bytejepa.study.environment import DECIDING_SOURCES, code_sha256, environment_here
from bytejepa.training.runlog import describe_machine

SOURCES = Path(bytejepa.__file__).parent
DECIDES_NOTHING = {"errors.py", "files.py", "processors.py", "progress.py", "compressors.py", "__init__.py"}
"""What training and packing import besides."""


COMPUTES_NOTHING = {"cattrs", "jaxtyping", "safetensors", "psutil", "pyarrow", "sentencepiece"}
"""Packages that check, store and describe, or read text before there are shards."""
OF_A_GPU = {"triton", "flash_attn", "flash_attn_interface"}
"""Not installed everywhere."""


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "bytejepa"
    shutil.copytree(SOURCES, root, ignore=shutil.ignore_patterns("__pycache__", "*.xz", "shipped"))
    monkeypatch.setattr(bytejepa, "__file__", str(root / "__init__.py"))
    return root


@pytest.mark.parametrize("name", ["bits.py", "kernels/tiled_attention.py", "model/layers.py", "artifact/packing.py"])
def test_a_changed_byte_or_name_is_other_code(copied: Path, name: str) -> None:
    before, path = code_sha256(), copied / name
    text = path.read_bytes()
    path.write_bytes(text + b"\n")
    changed = code_sha256()
    path.write_bytes(text)
    assert code_sha256() == before != changed
    path.rename(path.with_name("renamed_" + path.name))
    assert (code_sha256() != before) == (path.parent != copied or name == "bits.py")


def test_how_a_report_looks_is_no_other_code(copied: Path) -> None:
    before = code_sha256()
    (copied / "report" / "page.py").write_text("")
    assert code_sha256() == before


def test_all_that_training_and_packing_import_is_among_the_sources() -> None:
    program = (
        "import sys, torch\n"
        "import bytejepa.training.runs, bytejepa.artifact.export, bytejepa.scoring.evaluate\n"
        "from bytejepa.model import blocked_attention\n"
        "x = torch.randn(1, 64, 2, 32, requires_grad=True)\n"
        "blocked_attention.causal_attention(x, x, x, None).sum().backward()\n"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('bytejepa.')), sep='\\n')"
    )
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    imported = {Path(line).relative_to(SOURCES).as_posix() for line in ran.stdout.split()}
    deciding = {path.relative_to(SOURCES).as_posix() for pattern in DECIDING_SOURCES for path in SOURCES.glob(pattern)}
    assert "kernels/tiled_attention.py" in imported
    left = imported - deciding
    assert {name for name in left if name.rpartition("/")[2] not in DECIDES_NOTHING} == set()


def test_the_versions_of_all_packages_that_compute_are_recorded() -> None:
    imported: set[str] = set()
    for path in (path for pattern in DECIDING_SOURCES for path in SOURCES.glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    computing = imported - sys.stdlib_module_names - COMPUTES_NOTHING - OF_A_GPU
    assert set(environment_here()["versions"]) == computing


def test_a_machine_without_one_of_the_packages_is_described_too(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, version = describe_machine()["versions"], importlib.metadata.version

    def without_numba(name: str) -> str:
        if name == "numba":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_numba)
    assert describe_machine()["versions"] == {name: v for name, v in whole.items() if name != "numba"}
    assert "numba" in whole
