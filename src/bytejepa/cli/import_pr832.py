"""`bytejepa import-pr832`: the reference's own model file becomes an artifact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPr832:
    """Read the reference's `final_model.pt` or `final_model.int6.ptz` (no code in it is run) and write an artifact."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The reference's file."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The artifact to write."""
    xsa_last_n: int = 4
    """Blocks with XSA; the file does not say."""
    rope_dims: int = 16
    """Rotating dimensions of a head; the file does not say."""
    jepa_chunk_size: int = 8
    """Bytes in a chunk; the file does not say."""
    force: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print the result as one JSON object."""

    def run_command(self) -> int:
        """Convert and print what was written."""
        from bytejepa.cli.terminal import print_json, print_table
        from bytejepa.interop import pr832

        info = pr832.convert(
            self.model,
            self.output,
            settings={
                "xsa_last_n": self.xsa_last_n,
                "rope_dims": self.rope_dims,
                "jepa_chunk_size": self.jepa_chunk_size,
            },
            force=self.force,
        )
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
