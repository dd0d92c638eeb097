"""Writes tests/golden/codec.json and codec_file_mixed.bjc from tests/golden/codec.bjm.

Only on purpose, when the format takes a new version.

    python tests/codec/make_golden.py

It uses the PyTorch path; the test compares both paths with what it wrote.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from codec.golden import golden_mixed_file, measured
from codec.models import GOLDEN, golden_model


def main() -> None:
    from bytejepa.codec.torch_model import TorchCoder

    found = measured(TorchCoder(golden_model(), 64, 32))
    (GOLDEN / "codec.json").write_text(json.dumps(found, indent=1) + "\n")
    (GOLDEN / "codec_file_mixed.bjc").write_bytes(golden_mixed_file())


if __name__ == "__main__":
    main()
