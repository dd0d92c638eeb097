"""What stands at an output is replaced whole, written into, or left alone; and nobody may read more than before."""

import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bytejepa.files import atomic_file, require_writable, write_atomically


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_permissions_that_the_umask_leaves(umask: None, tmp_path: Path) -> None:
    write_atomically(tmp_path / "new", b"text")
    assert mode_of(tmp_path / "new") == 0o640
    with atomic_file(tmp_path / "told", mode=0o604) as file:
        assert all(mode_of(path) == 0o600 for path in tmp_path.glob(".*"))  # while it is written
        file.write(b"text")
    assert mode_of(tmp_path / "told") == 0o604


def test_a_replaced_file_keeps_its_permissions(umask: None, tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")
    path.chmod(0o604)
    write_atomically(path, b"new")
    assert (path.read_bytes(), mode_of(path)) == (b"new", 0o604)


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "file", tmp_path / "link"
    link.symlink_to(target)
    for content in (b"first", b"second"):  # to nothing, to a file
        write_atomically(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "link"]


def test_a_fifo_is_written_into(tmp_path: Path) -> None:
    fifo, link, read = tmp_path / "fifo", tmp_path / "link", []
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for path in (fifo, link):
        reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
        reader.start()
        write_atomically(path, b"text")
        reader.join()
        assert fifo.is_fifo()
    assert read == [b"text", b"text"]
    assert link.is_symlink()


def test_what_cannot_be_written_is_known_before_and_left_alone(tmp_path: Path) -> None:
    loop, name = tmp_path / "loop", tmp_path / "socket"
    loop.symlink_to(loop)
    (tmp_path / "file").write_bytes(b"old")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(name))
        for path in (tmp_path, loop, name, tmp_path / "missing" / "x", tmp_path / "file" / "x"):
            for attempt in (require_writable, lambda path: write_atomically(path, b"new")):
                with pytest.raises(OSError, match=str(tmp_path)):
                    attempt(path)
        assert name.is_socket()
    assert loop.is_symlink()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 3
    require_writable(tmp_path / "new")


@pytest.mark.parametrize(("flag", "reason"), [(os.ST_RDONLY, errno.EROFS), (0, errno.EACCES)])
def test_a_disk_that_is_only_read_is_no_matter_of_permissions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: int, reason: int
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_flag=flag))
    with pytest.raises(OSError, match=os.strerror(reason)):
        require_writable(tmp_path / "new")
