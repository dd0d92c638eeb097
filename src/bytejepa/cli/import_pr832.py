"""`bytejepa import-pr832`: the reference's own model file becomes an artifact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from bytejepa.config_fields import Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPr832:
    """Read the reference's `final_model.pt` or `final_model.int6.ptz` (no code in it is run) and write an artifact."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The reference's file."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The artifact to write."""
    xsa_last_n: Annotated[int, Range(0, 256)] = 4
    """Blocks with XSA; the file does not say."""
    rope_dims: Annotated[int, Range(0, 16_384)] = 16
    """Rotating dimensions of a head, an even number, 0: all of them; the file does not say."""
    jepa_chunk_size: Annotated[int, Range(1, 2048)] | None = None
    """Bytes in a chunk, default: 8; the file does not say. For files with JEPA only."""
    force: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print the result as one JSON object."""

    def run_command(self) -> int:
        """Convert and print what was written."""
        from bytejepa.cli.terminal import print_json, print_table
        from bytejepa.interop import pr832

        settings = {"xsa_last_n": self.xsa_last_n, "rope_dims": self.rope_dims}
        if self.jepa_chunk_size is not None:
            settings["jepa_chunk_size"] = self.jepa_chunk_size
        info = pr832.convert(self.model, self.output, settings=settings, force=self.force)
        if self.json:
            print_json({"path": str(self.output), "sha256": info.sha256, "file_bytes": info.file_bytes})
        else:
            rows = [
                ["bytes", f"{info.file_bytes:,}"],
                ["tensors", str(len(info.tensor_bytes))],
                ["sha256", info.sha256],
            ]
            print_table(str(self.output), ["", ""], rows)
        return 0
