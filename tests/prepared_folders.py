"""What the tests of `prepare` begin from and look at: a source of documents, and the content of a prepared folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bytejepa.data.shards import find_shards, open_shard
from bytejepa.data.vocabulary import BOS, bytes_from_ids


def documents_of(out: Path, split: str) -> list[bytes]:
    ids = np.concatenate([open_shard(path) for path in find_shards(out, split)])  # type: ignore[arg-type]
    assert ids[0] == BOS
    return [bytes_from_ids(part) for part in np.split(ids, np.flatnonzero(ids == BOS))[1:]]


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


TEXTS = [f"document {number} " + "word " * (number % 50) for number in range(200)]
