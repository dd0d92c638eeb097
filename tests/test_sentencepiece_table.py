"""Text out of tokens: document by document the bytes that SentencePiece's own decoder gives, however tokens are cut."""

from __future__ import annotations

import io
import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from bytejepa.data.blocks import Segment
from bytejepa.data.corpus import embedded_documents
from bytejepa.data.sentencepiece_table import TextConverter, load_table, token_blocks, valid_utf8_bytes
from bytejepa.data.shards import write_shard
from bytejepa.errors import DataError
from prepared_folders import documents_from_blocks

sentencepiece = pytest.importorskip("sentencepiece")

MODELS = {
    "as the challenge": {},
    "keeps extra white space": {"remove_extra_whitespaces": False},
    "no dummy prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "own symbols": {"user_defined_symbols": ["\u2581", "\u2581\u2581x", "a\u2581"]},
    "no bytes": {"byte_fallback": False},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    lines = [line for document in embedded_documents()[:3] for line in document.data.decode().split(". ")]
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for name, changes in MODELS.items():
        written = io.BytesIO()
        settings: dict[str, object] = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=written, **{**settings, **changes}
        )
        paths[name] = folder / f"{name}.model"
        paths[name].write_bytes(written.getvalue())
    return paths


def converted(model: Path, ids: np.ndarray, cuts: list[int]) -> list[bytes]:
    """Return the documents of a stream of tokens that is cut at some places."""
    converter = TextConverter(load_table(model))
    text, starts = b"", []
    for part in np.split(ids, sorted(cuts)):
        data, begins = converter.convert(part)
        starts += [len(text) + begin for begin in begins.tolist()]
        text += data.tobytes()
    text += converter.flush()[0].tobytes()
    return [text[begin:end] for begin, end in itertools.pairwise([*starts, len(text)])]


@pytest.mark.parametrize("name", MODELS)
def test_any_tokens_decode_as_sentencepiece_does(models: dict[str, Path], name: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(models[name]))
    bos = processor.bos_id()
    every = [index for index in range(processor.get_piece_size()) if index != bos]
    pieces = {index: processor.id_to_piece(index) for index in every}
    groups = [
        every,
        [index for index in every if processor.is_byte(index) and int(pieces[index][3:5], 16) >= 0x80],
        [index for index in every if pieces[index].startswith("\u2581")],
        [index for index in every if processor.is_control(index) or processor.is_unknown(index)]
        + [index for index in every if pieces[index] == "\u2581"] * 2,
    ]
    choose = random.Random(0)
    for _ in range(400):
        documents = [
            [choose.choice(choose.choice([group for group in groups if group])) for _ in range(choose.randrange(10))]
            for _ in range(choose.randrange(1, 5))
        ]
        ids = np.array([token for document in documents for token in (bos, *document)], dtype=np.uint16)
        cuts = [choose.randrange(len(ids)) for _ in range(choose.randrange(4))]
        assert converted(models[name], ids, cuts) == [processor.decode(document).encode() for document in documents]


def test_real_text_comes_back(models: dict[str, Path]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(models["as the challenge"]))
    texts = [document.data.decode() for document in embedded_documents()[:2]] + ["日本語 café 😀, один", "", "   x"]
    documents = [processor.encode(text) for text in texts]
    ids = np.array([token for document in documents for token in (processor.bos_id(), *document)], dtype=np.uint16)
    expected = [processor.decode(document).encode() for document in documents]
    assert expected[2] == texts[2].encode()
    assert converted(models["as the challenge"], ids, list(range(0, len(ids), 1000))) == expected


def test_a_document_runs_over_the_border_of_two_shards(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["as the challenge"]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = ["first 日本", "second 😀 end"]
    ids = np.array([t for text in texts for t in (processor.bos_id(), *processor.encode(text))], dtype=np.uint16)
    for cut in range(1, len(ids)):
        write_shard(tmp_path / "a.bin", ids[:cut])
        write_shard(tmp_path / "b.bin", ids[cut:])
        segments = [Segment(path=str(tmp_path / "a.bin")), Segment(path=str(tmp_path / "b.bin"), continues=True)]
        assert list(documents_from_blocks(token_blocks(segments, str(model)))) == [text.encode() for text in texts]


def test_a_shard_without_its_beginning_begins_with_a_document(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["as the challenge"]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    end, text = processor.encode("the end"), processor.encode("a text")
    write_shard(tmp_path / "a.bin", np.array([*end, processor.bos_id(), *text], dtype=np.uint16))
    blocks = list(token_blocks([Segment(path=str(tmp_path / "a.bin"))], str(model)))
    assert sum(len(block.starts) for block in blocks) == 2
    assert list(documents_from_blocks(blocks)) == [b"the end", b"a text"]


def test_a_token_that_the_model_lacks_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.array([1, 5, 400, 7], dtype=np.uint16))
    with pytest.raises(DataError, match=r"a\.bin holds token 400 at position 2: .* has 400 pieces"):
        list(token_blocks([Segment(path=str(tmp_path / "a.bin"))], str(models["as the challenge"])))


def test_what_is_no_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no.model").write_bytes(b"no model at all")
    with pytest.raises(DataError, match="is no SentencePiece model"):
        load_table(tmp_path / "no.model")
    with pytest.raises(DataError, match="does not exist"):
        load_table(tmp_path / "none.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"pip install 'bytejepa\[sp1024\]'"):
        load_table(tmp_path / "no.model")


def test_valid_utf8_is_what_python_takes_for_it() -> None:
    choose = random.Random(1)
    edges = [0, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xEC, 0xED, 0xEF]
    edges += [0xF0, 0xF3, 0xF4, 0xF5, 0xFF]
    for _ in range(3000):
        data = bytes(choose.choice(edges) for _ in range(choose.randrange(1, 9)))
        expected: list[bool] = []
        while len(expected) < len(data):
            rest = data[len(expected) :]
            length = next((size for size in range(1, 5) if _is_character(rest[:size])), 0)
            expected += [length > 0] * max(length, 1)
        assert valid_utf8_bytes(np.frombuffer(data, dtype=np.uint8)).tolist() == expected, data


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False
