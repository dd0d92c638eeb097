"""How fast `prepare` is, and how much memory it takes, on sources made from the embedded corpus.

    python benchmarks/benchmark_prepare.py --megabytes 200 --kinds text jsonl parquet
    python benchmarks/benchmark_prepare.py --kinds sp1024 --tokenizer fineweb_1024_bpe.model --json

Documents are pieces of 3 kB of the addresses, the mean of FineWeb. `text` is a single file that is one document beside a
small one for validation; the kinds with a suffix (`jsonl.zst`) are compressed. Speed is text per second and worker
process: bytes of text in the shards, through the whole of `prepare`, digests and fsync included. Memory is the largest
sum of the resident sizes of this process and its children, seen every 20 ms; the interpreter and what `prepare` imports
are part of it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from bytejepa.benchmark.processes import PeakOfProcesses
from bytejepa.data.corpus import embedded_documents
from bytejepa.data.prepare import prepare
from bytejepa.data.shards import ShardWriter

DOCUMENT_BYTES = 3000
KINDS = ("text", "jsonl", "parquet", "sp1024", "jsonl.gz", "jsonl.xz", "jsonl.zst", "text.gz", "text.zst")


def pieces(num_bytes: int) -> Iterator[str]:
    """Yield documents of about `DOCUMENT_BYTES`, `num_bytes` in all."""
    texts = [document.data.decode("utf-8") for document in embedded_documents()]
    cut = [text[begin : begin + DOCUMENT_BYTES] for text in texts for begin in range(0, len(text), DOCUMENT_BYTES)]
    written = 0
    while True:
        for piece in cut:
            yield piece
            written += len(piece)
            if written >= num_bytes:
                return


def _opener(name: str) -> Callable[[Path], Any]:
    """Return what opens a file for writing, compressing as its suffix says, at the compressors' fast levels."""
    if name.endswith(".gz"):
        return lambda path: gzip.open(path, "wb", compresslevel=1)
    if name.endswith(".xz"):
        return lambda path: lzma.open(path, "wb", preset=0)
    if name.endswith(".zst"):
        return lambda path: zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=3))
    return lambda path: path.open("wb")


def make_source(folder: Path, kind: str, num_bytes: int, tokenizer: Path | None) -> dict[str, Any]:
    """Return the arguments of `prepare` for sources of `kind` that hold `num_bytes` of text, written into `folder`."""
    base = kind.partition(".")[0]
    if base == "text":
        (folder / "a.txt").write_text("validation")
        with _opener(kind)(folder / f"b.{kind.replace('text', 'txt')}") as file:
            for piece in pieces(num_bytes):
                file.write(piece.encode("utf-8") + b"\n\n")
    elif base == "jsonl":
        with _opener(kind)(folder / f"a.{kind}") as file:
            for number, piece in enumerate(pieces(num_bytes)):
                record = {"id": f"document-{number}", "text": piece}
                file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
    elif base == "parquet":
        _write_parquet(folder / "a.parquet", num_bytes)
    else:
        if tokenizer is None:
            raise SystemExit("the kind sp1024 needs --tokenizer, a SentencePiece model")
        _write_tokens(folder, num_bytes, tokenizer)
        return {"sources": [folder], "tokenizer": tokenizer}
    return {"sources": [folder], "val_documents": 1}


def _write_parquet(path: Path, num_bytes: int) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(path, schema, compression="snappy") as writer:
        rows: list[str] = []
        for piece in pieces(num_bytes):
            rows.append(piece)
            if len(rows) == 5000:
                writer.write_table(pyarrow.table({"text": rows}, schema=schema))
                rows = []
        writer.write_table(pyarrow.table({"text": rows}, schema=schema))


def _write_tokens(folder: Path, num_bytes: int, tokenizer: Path) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    bos = processor.bos_id()
    # One round through the corpus is tokenised and then repeated: the encoder is slower than what is measured.
    documents = [[bos, *processor.encode(piece)] for piece in pieces(3_000_000)]
    once = np.array([token for document in documents for token in document], dtype=np.uint16)
    for split, rounds in (("val", 1), ("train", max(1, num_bytes // 3_000_000))):
        with ShardWriter(folder / f"fineweb_{split}_000000.bin") as writer:
            for _ in range(rounds):
                writer.write(once)
            writer.finish()


def measure(call: dict[str, Any]) -> dict[str, Any]:
    """Return what one call of `prepare` took: sizes in bytes, time in s, speed in MB of text per second and worker."""
    source_bytes = sum(path.stat().st_size for path in call["sources"][0].iterdir())
    with PeakOfProcesses() as memory:
        begin_s = time.perf_counter()
        begin_cpu = os.times()
        result = prepare(**call)
        wall_s = time.perf_counter() - begin_s
        end_cpu = os.times()
    text_bytes = sum(split.num_text_bytes for split in result.manifest.splits.values())
    cpu_s = sum(end_cpu[index] - begin_cpu[index] for index in range(4))
    return {
        "source_bytes": source_bytes,
        "text_bytes": text_bytes,
        "num_workers": result.num_workers,
        "wall_s": round(wall_s, 3),
        "cpu_s": round(cpu_s, 3),
        "megabytes_per_s_and_worker": round(text_bytes / 1e6 / wall_s / result.num_workers, 1),
        "megabytes_per_cpu_s": round(text_bytes / 1e6 / cpu_s, 1),
        "peak_memory_bytes": memory.peak_bytes,
    }


def main() -> int:
    """Return the exit code, after printing a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="text to prepare, in MB (default 100)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["text", "jsonl", "parquet"])
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default 1)")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model, for sp1024")
    parser.add_argument("--folder", type=Path, help="where the temporary files go (default: the system's place)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = []
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            source = Path(folder) / "source"
            source.mkdir()
            call = make_source(source, kind, arguments.megabytes * 10**6, arguments.tokenizer)
            call = {**call, "out": Path(folder) / "out", "workers": arguments.workers}
            # A process of its own: what making the source took must not count as memory of `prepare`.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rows.append({"kind": kind, **pool.submit(measure, call).result()})
    if arguments.json:
        print(json.dumps({"rows": rows}, indent=2))
        return 0
    print(
        f"{'kind':10s} {'text MB':>8s} {'workers':>7s} {'wall s':>7s} {'MB/s each':>9s} {'MB/CPU s':>8s} {'peak MB':>7s}"
    )
    for row in rows:
        print(
            f"{row['kind']:10s} {row['text_bytes'] / 1e6:8.1f} {row['num_workers']:7d} {row['wall_s']:7.2f} "
            f"{row['megabytes_per_s_and_worker']:9.1f} {row['megabytes_per_cpu_s']:8.1f} "
            f"{row['peak_memory_bytes'] / 1e6:7.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
