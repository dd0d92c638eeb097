"""`prepare`: the same shards whatever the workers, and a clear error for everything else."""

from __future__ import annotations

import gzip
import io
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytejepa.data import plan, sources, workers
from bytejepa.data.corpus import embedded_documents
from bytejepa.data.manifest import load_manifest, verify
from bytejepa.data.prepare import PrepareResult, prepare
from bytejepa.data.shards import ShardWriter, find_shards, open_shard, write_shard
from bytejepa.errors import ConfigError, DataError
from prepared_folders import TEXTS, documents_of, files_of, write_jsonl


def test_the_first_documents_are_validation_and_every_document_has_a_bos(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    result = prepare([source], tmp_path / "out", val_documents=7, shard_bytes=2000, workers=1)
    out = tmp_path / "out"
    assert result.is_new
    assert documents_of(out, "val") == [text.encode() for text in TEXTS[:7]]
    assert documents_of(out, "train") == [text.encode() for text in TEXTS[7:]]
    assert verify(out).is_good
    assert (result.manifest.splits["val"].num_documents, result.manifest.splits["train"].num_documents) == (7, 193)
    assert all(len(open_shard(path)) <= 2000 for path in find_shards(out, "train"))
    assert len(find_shards(out, "train")) > 10
    assert load_manifest(out) == result.manifest
    assert not (out / ".prepare").exists()


def make_sources(folder: Path) -> dict[str, dict[str, Any]]:
    """Return one call of each kind, over files of uneven sizes."""
    (folder / "text" / "deep").mkdir(parents=True)
    for number, name in enumerate(["b.txt", "a.md", "deep/c.txt"]):
        (folder / "text" / name).write_bytes(bytes(range(256)) * (30 * number + 1))
    (folder / "text" / "d.txt.gz").write_bytes(gzip.compress(b"packed " * 999))
    (folder / "text" / ".hidden").write_bytes(b"never")
    (folder / "cut.txt").write_bytes(b"<>".join(text.encode() for text in TEXTS))
    write_jsonl(folder / "a.jsonl", TEXTS[:150])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "b", TEXTS[150:]).read_bytes()))
    return {
        "text": {"sources": [folder / "text"], "val_documents": 1},
        "separator": {"sources": [folder / "cut.txt"], "val_documents": 9, "document_separator": "<>"},
        "jsonl": {"sources": [folder / "a.jsonl", folder / "b.jsonl.gz"], "val_documents": 9},
    }


@pytest.mark.parametrize("name", ["text", "separator", "jsonl"])
def test_documents_do_not_depend_on_the_shard_size(tmp_path: Path, name: str) -> None:
    call = make_sources(tmp_path)[name]
    expected: dict[str, list[bytes]] = {}
    for shard_bytes in (100_000_000, 5000, 701):
        out = tmp_path / f"out{shard_bytes}"
        prepare(out=out, shard_bytes=shard_bytes, workers=1, **call)
        found = {split: documents_of(out, split) for split in ("val", "train")}
        expected = expected or found
        assert found == expected
    if name == "text":
        folder = tmp_path / "text"
        assert expected["val"] == [(folder / "a.md").read_bytes()]
        rest = [(folder / "b.txt").read_bytes(), b"packed " * 999, (folder / "deep" / "c.txt").read_bytes()]
        assert sorted(expected["train"]) == sorted(rest)
    else:
        assert expected["val"] + expected["train"] == [text.encode() for text in TEXTS]


@pytest.mark.parametrize("name", ["text", "jsonl"])
def test_the_output_is_the_same_for_any_number_of_workers(tmp_path: Path, name: str) -> None:
    call = make_sources(tmp_path)[name]
    for num_workers in (1, 3):
        result = prepare(out=tmp_path / f"out{num_workers}", shard_bytes=4000, workers=num_workers, **call)
        assert result.num_workers == num_workers
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out3")


def test_jobs_in_any_order_give_the_same_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare([source], tmp_path / "out", val_documents=3, shard_bytes=999, workers=1)
    forwards = workers.do_jobs
    monkeypatch.setattr("bytejepa.data.prepare.do_jobs", lambda tasks, *rest: forwards(tasks[::-1], *rest))
    prepare([source], tmp_path / "backwards", val_documents=3, shard_bytes=999, workers=1)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "backwards")


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    seen: list[tuple[int, int]] = []
    prepare([source], tmp_path / "out", val_documents=3, shard_bytes=999, workers=2, progress=lambda *n: seen.append(n))
    done = [number for number, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {done[-1]}
    assert done[-1] >= source.stat().st_size


def test_parquet_row_groups_become_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=30)
    prepare([tmp_path / "a.parquet"], tmp_path / "out", val_documents=40, shard_bytes=3000, workers=1)
    assert documents_of(tmp_path / "out", "val") == [text.encode() for text in TEXTS[:40]]
    assert documents_of(tmp_path / "out", "train") == [text.encode() for text in TEXTS[40:]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(embedded_documents()[0].data.decode().split(". ")),
        model_writer=written,
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("model") / "tiny.model"
    path.write_bytes(written.getvalue())
    return path


def write_token_shards(folder: Path, model: Path, split: str, texts: list[str], size: int) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = np.array([t for text in texts for t in (processor.bos_id(), *processor.encode(text))], dtype=np.uint16)
    folder.mkdir(exist_ok=True)
    for index, begin in enumerate(range(0, len(tokens), size)):
        write_shard(folder / f"fineweb_{split}_{index:06d}.bin", tokens[begin : begin + size])


@pytest.mark.parametrize("size", [7, 100, 3001])
def test_token_shards_keep_their_split_and_their_documents(tmp_path: Path, model: Path, size: int) -> None:
    texts = [f"{number} café 日本 one two three " * (number % 9 + 1) + "end" for number in range(40)]
    write_token_shards(tmp_path / "in", model, "val", texts[:5], size)
    write_token_shards(tmp_path / "in", model, "train", texts[5:], size)
    prepare([tmp_path / "in"], tmp_path / "out", tokenizer=model, shard_bytes=2000, workers=1)
    assert documents_of(tmp_path / "out", "val") == [text.encode() for text in texts[:5]]
    assert documents_of(tmp_path / "out", "train") == [text.encode() for text in texts[5:]]


def test_a_gap_in_the_numbers_of_token_shards_ends_a_document(tmp_path: Path, model: Path) -> None:
    texts = ["a long document that runs over the border", "another one"]
    for split in ("val", "train"):
        write_token_shards(tmp_path / "in", model, split, texts, 10)
    (tmp_path / "in" / "fineweb_train_000001.bin").unlink()
    prepare([tmp_path / "in"], tmp_path / "out", tokenizer=model, workers=1)
    found = documents_of(tmp_path / "out", "train")
    assert len(found) == 3
    assert texts[0].startswith(found[0].decode())
    assert texts[0].endswith(found[1].decode())


def test_the_first_documents_of_token_shards_can_be_validation(tmp_path: Path, model: Path) -> None:
    texts = [f"{number} one two three" for number in range(30)]
    write_token_shards(tmp_path / "in", model, "x", texts, 50)
    prepare([tmp_path / "in"], tmp_path / "out", tokenizer=model, val_documents=11, shard_bytes=200, workers=1)
    assert documents_of(tmp_path / "out", "val") == [text.encode() for text in texts[:11]]
    assert documents_of(tmp_path / "out", "train") == [text.encode() for text in texts[11:]]


def test_byte_shards_are_not_taken_for_token_shards(tmp_path: Path, model: Path) -> None:
    for split in ("val", "train"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", np.full(100_000, 259, dtype=np.uint16))
    with pytest.raises(DataError, match="holds byte260 ids already"):
        prepare([tmp_path / "fineweb_val_000000.bin"], tmp_path / "out", tokenizer=model, val_documents=1)


def attempt(tmp_path: Path, sources_: list[Path], **settings: Any) -> PrepareResult:
    return prepare(sources_, tmp_path / "out", **{"val_documents": 1, "workers": 1, **settings})


def test_what_cannot_be_prepared_is_one_clear_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    text, empty = tmp_path / "a.txt", tmp_path / "empty.txt"
    text.write_text("x")
    empty.touch()
    (tmp_path / "folder").mkdir()
    cases: list[tuple[str, list[Path], dict[str, Any]]] = [
        ("does not exist", [tmp_path / "none.txt"], {}),
        ("no source files in .*folder", [tmp_path / "folder"], {}),
        ("given twice", [source, source], {}),
        ("is jsonl, .* is text", [source, text], {}),
        ("training split would be empty: the sources hold 3 documents, 3 are wanted", [source], {"val_documents": 3}),
        ("training split would be empty: the sources hold 3 documents", [source], {"val_documents": 50_000}),
        ("--val-documents is 0", [source], {"val_documents": 0}),
        ("nothing says which documents are validation", [source], {"val_documents": None}),
        ("--shard-bytes is 3", [source], {"shard_bytes": 3}),
        ("--workers is 0", [source], {"workers": 0}),
        ("no kind 'csv'", [source], {"kind": "csv"}),
        ("--document-separator is for plain text", [source], {"document_separator": "x"}),
        ("--document-separator is empty", [text], {"document_separator": ""}),
        ("--tokenizer is for shards of tokens", [source], {"tokenizer": "a.model"}),
        ("no --tokenizer given", [source], {"kind": "sp1024"}),
        ("lies inside the source", [tmp_path], {"kind": "jsonl"}),
        ("the train split would hold no text", [text, empty], {"kind": "text", "shard_bytes": 16}),
    ]
    for expected, given, settings in cases:
        of_settings = expected.startswith(("--", "no --", "no kind"))  # its own exit code: impossible settings
        with pytest.raises(ConfigError if of_settings else DataError, match=expected):
            attempt(tmp_path, given, **settings)
        assert not (tmp_path / "out").exists(), expected


def test_a_bad_line_in_a_worker_is_the_same_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    lines = source.read_bytes().splitlines(keepends=True)
    lines[150] = b"oops\n"
    source.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:151: .*the same command goes on from here"):
        prepare([source], tmp_path / "out", val_documents=5, shard_bytes=1000, workers=2)


def test_a_worker_that_is_killed_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(workers, "_send", lambda *_: os.kill(_child(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"stopped from outside \(exit code -9\)"):
        prepare([source], tmp_path / "out", val_documents=5, shard_bytes=1000, workers=2)


def _child() -> int:
    import multiprocessing

    return int(multiprocessing.active_children()[0].pid or 0)


def test_force_throws_nothing_away_for_a_call_that_cannot_be(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare([source], tmp_path / "out", val_documents=7, workers=1)
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match="--val-documents"):
        prepare([source], tmp_path / "out", val_documents=len(TEXTS), workers=1, force=True)
    assert files_of(tmp_path / "out") == before
    assert prepare([source], tmp_path / "out", val_documents=9, workers=1, force=True).is_new


def test_force_leaves_a_folder_whose_manifest_is_another_programs(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    manifest = tmp_path / "run" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text('{"fingerprint": "a run has one", "data": {}}')
    with pytest.raises(DataError, match="--force does not replace it"):
        prepare([source], manifest.parent, val_documents=5, workers=1, force=True)
    assert "a run has one" in manifest.read_text()
    manifest.write_text('{"format": "bytejepa-da')  # damaged, and it may have been of shards
    assert prepare([source], manifest.parent, val_documents=5, workers=1, force=True).is_new


def test_force_does_not_remove_its_own_sources(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    prepare([write_jsonl(tmp_path / "a.jsonl", TEXTS)], shards, val_documents=5, workers=1)
    before = files_of(shards)
    link = tmp_path / "linked.txt"
    link.symlink_to(shards / "fineweb_train_000000.bin")
    for named in (sorted(shards.glob("*.bin")), [link, tmp_path / "a.jsonl"]):
        with pytest.raises(DataError, match="--force would remove the source"):
            prepare(named, shards, kind="text", val_documents=1, workers=1, force=True)
    assert files_of(shards) == before


def test_the_hint_fits_what_was_given(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one\ntwo\n")
    for separator, hint in ((None, "whose end --val-share 0.1 makes"), ("\0", "has to occur in the text")):
        with pytest.raises(DataError, match=rf"the sources hold 1 document, 5 are wanted.*{hint}"):
            prepare([text], tmp_path / "out", val_documents=5, document_separator=separator, workers=1)


def test_a_corrected_source_is_begun_anew_and_the_hint_says_so(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = source.read_text()
    source.write_text(whole.replace('{"text": "document 150', '{"txt": "document 150'))
    call = {"val_documents": 5, "shard_bytes": 1000, "workers": 1}
    with pytest.raises(DataError, match="or with --force begins anew once a source was changed"):
        prepare([source], tmp_path / "out", **call)
    source.write_text(whole)
    with pytest.raises(
        DataError, match=r"unfinished preparation of something else: source .* \(start anew with --force\)"
    ):
        prepare([source], tmp_path / "out", **call)
    assert prepare([source], tmp_path / "out", **call, force=True).is_new


def test_two_processes_do_not_prepare_the_same_folder(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def second(*_: int) -> None:
        for force in (False, True):
            with pytest.raises(DataError, match="another process is preparing"):
                prepare([source], tmp_path / "out", val_documents=5, workers=1, force=force)

    prepare([source], tmp_path / "out", val_documents=5, workers=1, progress=second)


@pytest.mark.parametrize("separator", [b"\n", b"\n\n", b"aba", b"<>"])
def test_a_file_is_only_cut_where_the_separators_do_not_depend_on_what_was_before(
    tmp_path: Path, separator: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in ranges, a file has the documents that it has read at once."""
    monkeypatch.setattr(plan, "_SEARCH_BYTES", 8)
    random = np.random.default_rng(0)
    path = tmp_path / "a.txt"
    for _ in range(60):
        data = bytes(random.choice(list(b"ab<>\n"), size=60).tolist())
        path.write_bytes(data)
        cuts = {plan._cut_after(str(path), len(data), target, separator) for target in range(1, 60, 7)}
        parts = [data[begin:end] for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True)]
        whole = [part for part in data.split(separator) if part]
        assert [piece for part in parts for piece in part.split(separator) if piece] == whole


def test_a_giant_document_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block is larger than a few MB, however large the file."""
    (tmp_path / "a.txt").write_bytes(b"v")
    (tmp_path / "b.txt").write_bytes(bytes(100_000))
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 1000)
    sizes: list[int] = []
    write = ShardWriter.write
    monkeypatch.setattr(ShardWriter, "write", lambda self, ids: (sizes.append(len(ids)), write(self, ids)))
    prepare([tmp_path], tmp_path.parent / f"{tmp_path.name}-out", val_documents=1, workers=1, shard_bytes=30_000)
    assert max(sizes) <= 1001


def test_verify_names_every_problem(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    prepare([source], out, val_documents=5, shard_bytes=3000, workers=1)
    assert verify(out).problems == ()
    changed = bytearray((out / "fineweb_train_000000.bin").read_bytes())
    changed[-2:] = b"\x50\x00" if changed[-2:] != b"\x50\x00" else b"\x51\x00"
    (out / "fineweb_train_000000.bin").write_bytes(changed)
    (out / "fineweb_train_000001.bin").write_bytes(changed[:-2])
    (out / "fineweb_train_000002.bin").unlink()
    write_shard(out / "fineweb_train_000099.bin", np.array([1, 300], dtype=np.uint16))
    result = verify(out)
    assert result.has_manifest
    assert not result.is_good
    assert not [text for text in result.problems if text.endswith(")")], "what to do is said once, by the command"
    problems = "\n".join(result.problems)
    assert "fineweb_train_000000.bin has sha256" in problems
    assert "fineweb_train_000001.bin is truncated" in problems
    assert "fineweb_train_000002.bin is missing" in problems
    assert "fineweb_train_000099.bin is not in the manifest" in problems
    assert "fineweb_train_000099.bin holds id 300 at position 1" in problems


def test_verify_of_a_bare_folder_says_that_it_is_bare(tmp_path: Path) -> None:
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([1, 70], dtype=np.uint16))
    result = verify(tmp_path)
    assert (result.has_manifest, result.is_good, result.num_ids) == (False, True, 2)
    with pytest.raises(DataError, match="no shards in"):
        verify(tmp_path.parent)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b'{"format": "bytejepa-data", "format_version": 1}'])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_manifest(tmp_path)
