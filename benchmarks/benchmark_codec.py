"""Bits per byte of the codec beside zstd -19, xz -9e, brotli -11, bzip2 and PPMd, on texts of your own.

    python benchmarks/benchmark_codec.py TEXT [TEXT.xz ...] [--model MODEL] [--markdown]

Files that end in .xz are unpacked first. Every file is decompressed again and compared. Default model: the one that comes with
bytejepa. The bytes of the model are stated and counted in no figure.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bytejepa.benchmark.codec import compare
from bytejepa.codec.shipped import shipped_model_path
from bytejepa.codec.workers import Settings


def read(path: Path, most: int | None) -> bytes:
    """Return the first `most` bytes of a text."""
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data)[:most]


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--max-bytes", type=int, help="leading bytes of each text; the same for all compressors")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="a table for a page")
    options = parser.parse_args()
    model = options.model or shipped_model_path()
    texts = {path.name.removesuffix(".xz"): read(path, options.max_bytes) for path in options.texts}
    rows = compare(model, texts, settings=Settings(threads=options.threads))
    if options.json:
        print(json.dumps({"model": model.name, "model_bytes": model.stat().st_size, "texts": rows}, indent=1))
        return
    names = list(rows[0]["bpb"])
    cells = [[row["text"], f"{row['num_bytes']:,}", *(f"{row['bpb'][name]:.3f}" for name in names)] for row in rows]
    if options.markdown:
        print("| " + " | ".join(["text", "bytes", *names]) + " |")
        print("|" + "---|" * (len(names) + 2))
        for line in cells:
            print("| " + " | ".join(line) + " |")
        return
    table = Table(title=f"bits per byte; model {model.name}, {model.stat().st_size:,} bytes, not counted")
    for column in ("text", "bytes", *names, "encode B/s", "decode B/s"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for line, row in zip(cells, rows, strict=True):
        table.add_row(*line, f"{row['encode_bytes_per_s']:,.0f}", f"{row['decode_bytes_per_s']:,.0f}")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
