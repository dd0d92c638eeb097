import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from bytejepa.artifact.write import write_artifact
from bytejepa.codec.zstd_frame import compress_frame
from bytejepa.data.corpus import embedded_text
from codec.models import GOLDEN_MODEL
from small_models import small_model

DATA = embedded_text("val")[:600]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_bytes(DATA + bytes(range(156)))
    return path


def test_a_file_goes_and_comes_back(command: Callable, file: Path) -> None:
    done = command("compress", file, "--model", GOLDEN_MODEL, "--json")
    assert done.code == 0, done
    record = json.loads(done.out)
    packed = file.with_name("notes.txt.bjc")
    assert record["compressed_bytes"] == packed.stat().st_size
    assert record["content_bytes"] == 756
    original = file.read_bytes()
    file.unlink()
    assert command("decompress", packed, "--model", GOLDEN_MODEL, "--test").code == 0
    assert not file.exists()
    assert command("decompress", packed, "--model", GOLDEN_MODEL).code == 0
    assert file.read_bytes() == original


def test_the_bar_is_full_at_the_end_of_the_work(command: Callable, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    totals, done = [], []

    @contextlib.contextmanager
    def noted(_: str, *, total: float) -> Iterator[tuple[SimpleNamespace, int]]:
        totals.append(total)
        done.append(0)
        yield SimpleNamespace(advance=lambda _, num_bytes: done.__setitem__(-1, done[-1] + num_bytes)), 0

    monkeypatch.setattr("bytejepa.cli.terminal.progress_bar", noted)
    command("compress", file, "--model", GOLDEN_MODEL)
    command("decompress", f"{file}.bjc", "--model", GOLDEN_MODEL, "--test")
    file.write_bytes(compress_frame(bytes(1000)))
    command("decompress", file, "--test")
    assert totals == done == [756, 756, 1000]


def test_it_works_out_of_the_box(command: Callable, file: Path) -> None:
    file.write_bytes(DATA)
    assert command("compress", file).code == 0
    packed = file.with_name("notes.txt.bjc")
    assert packed.stat().st_size < 0.6 * len(zstandard.ZstdCompressor(level=19).compress(DATA))
    assert command("decompress", packed, "--force").code == 0
    assert file.read_bytes() == DATA


@pytest.mark.integration
def test_both_are_filters(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bytejepa"]
    options = ["-", "--model", str(GOLDEN_MODEL)]
    packed = subprocess.run([*words, "compress", *options], input=DATA, capture_output=True, check=True)
    back = subprocess.run([*words, "decompress", *options], input=packed.stdout, capture_output=True, check=True)
    assert back.stdout == DATA
    assert packed.stderr == back.stderr == b""


def test_a_wrong_model_is_refused_before_a_byte(
    refuses: Callable, command: Callable, file: Path, tmp_path: Path
) -> None:
    packed, other, target = file.with_name("notes.txt.bjc"), artifact(tmp_path / "other.bjm"), file.with_name("out.bin")
    assert command("compress", file, "--model", GOLDEN_MODEL).code == 0
    for options in (["-o", "-"], ["--test"], ["-o", target], ["-o", target, "--keep-going"]):
        assert "made with the model" in refuses(6, "decompress", packed, "--model", other, *options)
    assert not target.exists()


def test_a_zstd_frame_restores_with_any_model(command: Callable, refuses: Callable, file: Path, tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(2000)
    file.write_bytes(noise)
    packed, other, target = file.with_name("notes.txt.bjc"), artifact(tmp_path / "other.bjm"), file.with_name("out.bin")
    record = json.loads(command("compress", file, "--model", GOLDEN_MODEL, "--json").out)
    frame = packed.read_bytes()
    assert (record["content_bytes"], record["compressed_bytes"], len(frame)) == (2000, 2014, 2014)
    assert zstandard.ZstdDecompressor().decompress(frame) == noise
    for options in (["--test"], ["-o", target], ["-o", target, "--keep-going", "--force"]):
        done = command("decompress", packed, "--model", other, "--json", *options)
        assert (done.code, json.loads(done.out)["content_bytes"]) == (0, 2000)
        assert target.exists() != (options == ["--test"])
    assert target.read_bytes() == noise
    words = [sys.executable, "-m", "bytejepa", "decompress", "-", "--model", str(tmp_path / "missing")]
    assert subprocess.run(words, input=frame, capture_output=True, check=True).stdout == noise
    packed.write_bytes(frame[:-1])
    target.unlink()
    for options in (["--test"], ["-o", target], ["-o", target, "--keep-going"]):
        assert "cut short after 2013 bytes" in refuses(6, "decompress", packed, *options)
    assert not target.exists()


def test_a_file_of_the_program_zstd_is_restored_or_refused(command: Callable, refuses: Callable, file: Path) -> None:
    theirs, target = file.with_name("notes.zst"), file.with_name("out.bin")
    theirs.write_bytes(zstandard.ZstdCompressor(level=3, write_checksum=True).compress(DATA))
    assert "does not end in .bjc" in refuses(2, "decompress", theirs)
    assert command("decompress", theirs, "-o", target).code == 0
    assert target.read_bytes() == DATA
    theirs.write_bytes(zstandard.ZstdCompressor(level=19).compress(DATA))
    assert "needs content size and checksum" in refuses(6, "decompress", theirs, "-o", target, "--force")
    assert target.read_bytes() == DATA


def test_a_model_that_the_codec_cannot_use_is_refused(refuses: Callable, file: Path, tmp_path: Path) -> None:
    other = artifact(tmp_path / "other.bjm", model_dim=1032, num_layers=1, mlp_ratio=0.125)
    assert "does not implement model.model_dim 1032, more than 1024" in refuses(6, "compress", file, "--model", other)
    assert not file.with_name("notes.txt.bjc").exists()


def artifact(path: Path, **settings: object) -> Path:
    model = small_model(model=settings)
    write_artifact(path, dict(model.named_parameters()), model.config)
    return path


def test_existing_files_are_kept(refuses: Callable, command: Callable, file: Path) -> None:
    packed = file.with_name("notes.txt.bjc")
    packed.write_bytes(b"old")
    assert "exists" in refuses(2, "compress", file, "--model", GOLDEN_MODEL)
    assert packed.read_bytes() == b"old"
    assert command("compress", file, "--model", GOLDEN_MODEL, "--force").code == 0


def test_damage_and_bad_input_get_one_line(refuses: Callable, command: Callable, file: Path) -> None:
    packed = file.with_name("notes.txt.bjc")
    assert command("compress", file, "--model", GOLDEN_MODEL, "--block-bytes", 300).code == 0
    blob = bytearray(packed.read_bytes())
    blob[-1] ^= 1
    packed.write_bytes(blob)
    target = file.with_name("out.bin")
    assert "bytes 600 to 756" in refuses(6, "decompress", packed, "--model", GOLDEN_MODEL, "-o", target)
    assert not target.exists()
    kept = command("decompress", packed, "--model", GOLDEN_MODEL, "-o", target, "--keep-going")
    assert kept.code == 6
    assert "bytes 600 to 756" in kept.err
    assert target.read_bytes() == DATA + bytes(156)
    refuses(6, "decompress", file, "--model", GOLDEN_MODEL, "-o", file.with_name("x"))
    refuses(2, "decompress", file, "--model", GOLDEN_MODEL)
    refuses(3, "compress", file.with_name("missing"), "--model", GOLDEN_MODEL)
    refuses(5, "compress", file, "--model", file, "-o", file.with_name("y"))
    refuses(2, "compress", file, "--model", GOLDEN_MODEL, "--window", 99999, "-o", file.with_name("z"))
