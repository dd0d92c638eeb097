"""Options of the verbs that use a model: what they cannot mean is refused in one line, before any work."""

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bytejepa.cli.device import chosen_device, memory_errors_with
from codec.models import GOLDEN_MODEL

Words = tuple[object, ...]


@pytest.fixture
def verbs(tmp_path: Path, command: Callable) -> dict[str, Words]:
    """The words of each verb, with input that it can work on."""
    file = tmp_path / "notes.txt"
    file.write_bytes(b"My fellow Americans")
    packed = tmp_path / "packed.bjc"
    assert command("compress", file, "--model", GOLDEN_MODEL, "-o", packed).code == 0
    return {
        "compress": ("compress", file, "--model", GOLDEN_MODEL, "-o", tmp_path / "out"),
        "decompress": ("decompress", packed, "--model", GOLDEN_MODEL, "-o", tmp_path / "out"),
        "generate": ("generate", GOLDEN_MODEL, "-n", 4, "-o", tmp_path / "out"),
        "surprise": ("surprise", GOLDEN_MODEL, file, "--format", "csv", "-o", tmp_path / "out"),
    }


@pytest.mark.parametrize(
    ("verb", "option", "expected"),
    [
        ("compress", "--threads=0", "threads: expected 1 to 1024, got 0"),
        ("compress", "--hop=1", "hop: expected 8 to 128 ids for a window of 128, got 1"),
        ("decompress", "--threads=-1", "threads: expected 1 to 1024, got -1"),
        ("decompress", "--lanes=0", "lanes: expected 1 or more, got 0"),
        ("generate", "--threads=-1", "--threads: expected 1 to 1024, got -1"),
        ("generate", "--threads=0", "--threads: expected 1 to 1024, got 0"),
        ("generate", "--num-samples=0", "--num-samples: expected 1 to 65536, got 0"),
        ("generate", "--window=0", "engine window: expected 1 to"),
        ("generate", "--hop=0", "engine hop: expected 1 to"),
        ("generate", "--temperature=inf", "temperature: expected 0, or 0.001 to 1000, got inf"),
        ("generate", "--temperature=1e-320", "temperature: expected 0, or 0.001 to 1000"),
        ("generate", "--temperature=nan", "temperature: expected 0, or 0.001 to 1000, got nan"),
        ("generate", "--repetition-penalty=inf", "repetition_penalty: expected 0 to 1000, got inf"),
        ("surprise", "--max-bytes=-5", "--max-bytes: expected 1 or more, got -5"),
        ("surprise", "--window=0", "the window must be 1 or more, got 0"),
        ("surprise", "--stride=0", "stride must be from 1 to the window"),
        *((verb, "--device=foo", "--device: expected cpu, cuda or auto, got 'foo'") for verb in
          ("compress", "decompress", "generate", "surprise")),
    ],
)  # fmt: skip
def test_values_out_of_range(refuses: Callable, verbs: dict[str, Words], verb: str, option: str, expected: str) -> None:
    assert expected in refuses(2, *verbs[verb], option)


def test_evaluation_knows_its_devices_too(refuses: Callable, tmp_path: Path) -> None:
    assert "Expected one of ('auto', 'cpu', 'cuda')" in refuses(
        2, "eval", GOLDEN_MODEL, "--data", tmp_path, "--device", "gpu"
    )


@pytest.mark.parametrize("verb", ["compress", "decompress", "generate", "surprise"])
def test_a_gpu_that_is_not_there(
    refuses: Callable, monkeypatch: pytest.MonkeyPatch, verbs: dict[str, Words], verb: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto") == chosen_device("cpu") == "cpu"
    assert "no CUDA device here (use --device cpu)" in refuses(2, *verbs[verb], "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("auto") == chosen_device("cuda") == "cuda"
    assert chosen_device("cpu") == "cpu"


def test_outputs_that_cannot_be_are_refused_before_the_work(
    refuses: Callable, monkeypatch: pytest.MonkeyPatch, verbs: dict[str, Words], tmp_path: Path
) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    for work in ("codec.compress.compress", "codec.compress.restore", "load"):
        monkeypatch.setattr(f"bytejepa.{work}", too_late)
    (tmp_path / "out").write_bytes(b"old")
    codes = {"compress": 6, "decompress": 6, "generate": 3, "surprise": 3}
    for verb, words in verbs.items():
        assert "out exists (use --force" in refuses(2, *words)
        missing = tmp_path / "missing" / "x"
        assert f"cannot write {missing}: No such file" in refuses(codes[verb], *words[:-1], missing)
        assert f"cannot write {tmp_path}: Is a directory" in refuses(codes[verb], *words[:-1], tmp_path, "--force")
    assert (tmp_path / "out").read_bytes() == b"old"


def test_a_fifo_is_written_into_and_needs_no_force(command: Callable, verbs: dict[str, Words], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    for words in verbs.values():
        read: list[bytes] = []
        reader = threading.Thread(target=lambda read=read: read.append((tmp_path / "out").read_bytes()), daemon=True)
        reader.start()
        assert command(*words).code == 0
        reader.join()
        assert read[0]
        assert (tmp_path / "out").is_fifo()


def test_a_private_file_stays_private(command: Callable, verbs: dict[str, Words], tmp_path: Path) -> None:
    for source, words in (("notes.txt", verbs["compress"]), ("packed.bjc", verbs["decompress"])):
        for mode in (0o600, 0o640):
            (tmp_path / source).chmod(mode)
            assert command(*words, "--force").code == 0
            assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


@pytest.mark.parametrize(
    ("problem", "place"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "the GPU's memory"),
        (MemoryError(), "the memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), "the memory"),
    ],
)
def test_without_memory_enough(
    refuses: Callable, monkeypatch: pytest.MonkeyPatch, verbs: dict[str, Words], problem: Exception, place: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise problem

    for work in ("codec.compress.compress", "codec.compress.restore", "load"):
        monkeypatch.setattr(f"bytejepa.{work}", fail)
    advice = {"compress": "--window", "decompress": "--lanes", "generate": "--num-samples", "surprise": "--max-bytes"}
    for verb, words in verbs.items():
        said = refuses(1, *words)
        assert f"{place} is too small for this (" in said
        assert advice[verb] in said
    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    if isinstance(problem, MemoryError):
        assert "the memory is too small for this" in refuses(1, *verbs["compress"])
    with pytest.raises(RuntimeError, match="else"), memory_errors_with("no advice"):
        raise RuntimeError("something else")


def test_an_empty_file_has_no_bits_a_byte(command: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for words in ((), ("-o", tmp_path / "page.html")):
        done = command("surprise", GOLDEN_MODEL, tmp_path / "empty", *words)
        assert done.code == 0
        assert "0 bytes" in done.out + done.err
        assert "nan" not in done.out + done.err
