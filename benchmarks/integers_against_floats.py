"""Bits per byte of the codec's integers beside those of the float artifact, the same windows, on the embedded corpus.

    python benchmarks/integers_against_floats.py [--model MODEL] [--num-bytes 40000] [--window 512] [--hop 256]

Scored: the first bytes of the validation addresses. The integers' bits are those of their frequencies, without a container.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from bytejepa import load, score
from bytejepa.bits import bits_per_byte
from bytejepa.codec.coder import TOTAL_BITS
from bytejepa.codec.compress import codec_model
from bytejepa.codec.cpu import CpuCoder
from bytejepa.codec.shipped import shipped_model_path
from bytejepa.data.corpus import embedded_text


def main() -> None:
    """Score and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shipped_model_path())
    parser.add_argument("--num-bytes", type=int, default=40_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--hop", type=int, default=256)
    options = parser.parse_args()
    text = embedded_text("val")[: options.num_bytes]
    _, frequencies = CpuCoder(codec_model(options.model), options.window, options.hop).block_intervals(text)
    integers_bpb = bits_per_byte(float(-np.log(frequencies / 2.0**TOTAL_BITS).sum()), len(text))
    floats_bpb = score(load(options.model), text, window=options.window, stride=options.hop).bpb
    found = {"num_bytes": len(text), "window": options.window, "hop": options.hop}
    print(json.dumps({"model": options.model.name, **found, "integers_bpb": integers_bpb, "floats_bpb": floats_bpb}))


if __name__ == "__main__":
    main()
