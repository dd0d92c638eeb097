"""The script of a submission: the package's own code that trains, packs and scores, in one file, readable or packed."""

from __future__ import annotations

import base64
import dataclasses
import lzma
from collections.abc import Mapping

from bytejepa.config import RunConfig
from bytejepa.submission.bundle import Place, bundle

PERMITTED = ("torch", "numpy", "zstandard")
"""Packages that a script may import when it is loaded; brotli is imported where it is used, by runs that use it."""

_PROGRAM = ("bytejepa.submission.program", "main")


def readable_script(config: RunConfig) -> str:
    """Return the source of a script that repeats a run of `config`: its settings are the script's defaults."""
    sections = [_place(part) for part in (config, *_sections(config).values())]
    made = bundle(_PROGRAM, permitted=PERMITTED, also=sections)
    introduction = (
        '"""Train a byte-level language model, pack it, read it back and score it in bits per byte.\n\n'
        "    torchrun --standalone --nproc_per_node=8 train_gpt.py\n\n"
        "Made by `bytejepa submission` out of the package's modules, which follow in the order of their imports. Settings\n"
        "are those of CONFIG at the end; environment variables change them (SETTINGS lists them). DATA_PATH names the\n"
        'folder of shards, RUN_ID the log.\n"""\n\n'
        "from __future__ import annotations\n\n"
    )
    main = made.names[_PROGRAM]
    ending = (
        f"\n\nCONFIG = {_config_source(config, made.names)}\n\n\n"
        f'if __name__ == "__main__":\n    sys.exit({main}(CONFIG, Path(__file__)))\n'
    )
    return introduction + made.imports + "\n\n" + made.body + ending


def packed_script(source: str) -> str:
    """Return a script that runs `source` out of LZMA and base85: a few lines of its own, the rest data."""
    packed = base64.b85encode(lzma.compress(source.encode(), preset=9 | lzma.PRESET_EXTREME)).decode("ascii")
    return (
        "# train_gpt_readable.py, packed: LZMA, then base85\n"
        "import base64, lzma\n"
        f'exec(compile(lzma.decompress(base64.b85decode("{packed}")), __file__, "exec"))\n'
    )


def _sections(config: RunConfig) -> dict[str, object]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _place(section: object) -> Place:
    """Return where the class of a section is defined."""
    return type(section).__module__, type(section).__name__


def _config_source(config: RunConfig, names: Mapping[Place, str]) -> str:
    """Return the expression that makes `config`, one setting a line."""
    lines = [f"{names[_place(config)]}("]
    for name, section in _sections(config).items():
        lines.append(f"    {name}={names[_place(section)]}(")
        lines += [
            f"        {setting.name}={getattr(section, setting.name)!r},"
            for setting in dataclasses.fields(section)  # type: ignore[arg-type]
        ]
        lines.append("    ),")
    return "\n".join([*lines, ")"])
