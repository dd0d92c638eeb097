"""`bytejepa prepare`: sources to shards, or `--verify` a folder of shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bytejepa.cli.options import refuse_ignored
from bytejepa.config_fields import PositiveInt
from bytejepa.errors import ConfigError, DataError

PROBLEMS_SHOWN = 3
"""Of those that `--verify` finds, in its one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn sources into byte260 shards: `bytejepa prepare SOURCE... --out DIR`, or check some: `--verify DIR`."""

    sources: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SOURCE...")] = ()
    """Files, or folders of files: text, JSONL (.gz, .xz, .zst too), Parquet, or sp1024 shards."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the shards."""
    kind: Literal["text", "jsonl", "parquet", "sp1024"] | None = None
    """What the sources are; guessed from their names when left out."""
    tokenizer: Path | None = None
    """SentencePiece model of sp1024 shards."""
    val_documents: PositiveInt | None = None
    """First documents that become the validation split; sp1024 shards keep their own split when left out."""
    val_share: float | None = None
    """Share of each text file, at its end, that becomes the validation split: for files that are one document each."""
    shard_bytes: int = 100_000_000
    """Ids in a shard."""
    workers: PositiveInt | None = None
    """Worker processes; default: one a CPU."""
    document_separator: str | None = None
    r"""Text between two documents of a text file, `\n` for the end of a line; without it a file is one document."""
    verify: Path | None = None
    """Check this folder against its manifest instead."""
    force: bool = False
    """Start over in a folder that holds another preparation."""
    json: bool = False
    """Print the result as one JSON object."""

    def run_command(self) -> int:
        """Prepare or verify, and print what there is."""
        if self.verify is not None:
            if self.sources:
                raise ConfigError("--verify checks one folder of shards, SOURCE... are not read", hint="leave them out")
            others = (
                field.name for field in dataclasses.fields(self) if field.name not in ("sources", "verify", "json")
            )
            refuse_ignored(self, "with --verify", *others)
            return self._verify(self.verify)
        if not self.sources or self.out is None:
            raise ConfigError("prepare needs SOURCE... and --out DIR", hint="or --verify DIR to check a folder")
        from bytejepa.cli.terminal import print_json, print_table, progress_bar
        from bytejepa.data.prepare import prepare

        with progress_bar("prepare", total=1) as (bar, task):
            result = prepare(
                self.sources,
                self.out,
                kind=self.kind,
                tokenizer=self.tokenizer,
                val_documents=self.val_documents,
                val_share=self.val_share,
                shard_bytes=self.shard_bytes,
                workers=self.workers,
                document_separator=self._separator(),
                force=self.force,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        if self.json:
            print_json(result)
            return 0
        rows = [
            [
                split,
                f"{record.num_documents:,}",
                f"{record.num_text_bytes:,}",
                f"{record.num_ids:,}",
                str(len(record.files)),
            ]
            for split, record in result.manifest.splits.items()
        ]
        state = "" if result.is_new else " (was finished already)"
        print_table(f"{self.out}{state}", ["split", "documents", "bytes", "ids", "shards"], rows)
        return 0

    def _separator(self) -> str | None:
        r"""Return the separator with `\n`, `\r` and `\t`, which a shell leaves as they are, in characters."""
        separator = self.document_separator
        if separator is None:
            return None
        for escaped, character in ((r"\n", "\n"), (r"\r", "\r"), (r"\t", "\t")):
            separator = separator.replace(escaped, character)
        return separator

    def _verify(self, folder: Path) -> int:
        from bytejepa.cli.terminal import note, print_json, print_table
        from bytejepa.data.manifest import verify

        result = verify(folder)
        if not result.has_manifest and result.is_good:
            note(f"{folder} has no manifest: only the format and the ids are checked")
        if self.json:
            print_json(result)
        else:
            rows = [
                ["files", str(result.num_files)],
                ["ids", f"{result.num_ids:,}"],
                ["problems", str(len(result.problems))],
            ]
            print_table(str(folder), ["", ""], rows)
        if not result.is_good:
            shown, more = result.problems[:PROBLEMS_SHOWN], len(result.problems) - PROBLEMS_SHOWN
            raise DataError(
                "; ".join(shown) + (f"; and {more} more (--json has them all)" if more > 0 else ""),
                hint="prepare the folder again or copy the files anew",
            )
        return 0
