"""`bytejepa review`: a submission, run or artifact against the rules and against its own figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from bytejepa.cli.options import refuse_ignored
from bytejepa.cli.output import check_output
from bytejepa.errors import ConfigError, DataError, ReviewFailed, file_errors_as


@dataclasses.dataclass(frozen=True, kw_only=True)
class Review:
    """Check a submission, run or artifact: `bytejepa review TARGET`. Exit code 10 unless it LOOKS CLEAN."""

    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """A submission folder (README.md, submission.json, train_gpt.py, logs), a run folder, or an artifact (.bjm)."""
    run: bool = False
    """Also run the submission's script on the CPU, in a subprocess without network and with bounds. Off: nothing runs."""
    json: bool = False
    """Print the review as one JSON object."""
    markdown: bool = False
    """Print the review as a comment in the community's form."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write what would be printed to this file instead."""
    force: bool = False
    """Overwrite the output if it exists."""

    def run_command(self) -> int:
        """Review the target and print the outcome. Raises: ReviewFailed unless the verdict is LOOKS CLEAN."""
        from bytejepa.cli.terminal import json_text
        from bytejepa.review.report_forms import as_markdown
        from bytejepa.review.reviewer import review

        if self.json and self.markdown:
            raise ConfigError("--json and --markdown exclude each other")
        if self.output is None:
            refuse_ignored(self, "without -o", "force")
        else:
            check_output(self.output, DataError, force=self.force)
        outcome = review(self.target, run=self.run)
        if self.json:
            self._deliver(json_text(outcome, indent=1))
        elif self.markdown:
            self._deliver(as_markdown(outcome))
        else:
            self._deliver_table(outcome)
        if not outcome.is_clean:
            raise ReviewFailed(f"{outcome.target}: {outcome.verdict.word.value}: {outcome.verdict.reason}")
        return 0

    def _deliver(self, text: str) -> None:
        if self.output is None:
            import sys

            sys.stdout.write(text.rstrip("\n") + "\n")
            return
        from bytejepa.files import write_atomically

        with file_errors_as(DataError, "write", self.output):
            write_atomically(self.output, (text.rstrip("\n") + "\n").encode())

    def _deliver_table(self, outcome: object) -> None:
        import io

        from rich.console import Console

        from bytejepa.review.findings import Review as Outcome
        from bytejepa.review.report_forms import print_terminal

        assert isinstance(outcome, Outcome)
        if self.output is None:
            print_terminal(outcome)
            return
        text = io.StringIO()
        print_terminal(outcome, Console(file=text, width=120, highlight=False))
        self._deliver(text.getvalue())
