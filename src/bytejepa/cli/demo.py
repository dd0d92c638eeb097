"""`bytejepa demo`: the main job, end to end on the embedded corpus."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from bytejepa.cli.parsing import ConfigField, PresetField
from bytejepa.config_fields import NonNegativeInt

if TYPE_CHECKING:
    from bytejepa.demo import DemoResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Embedded corpus, shards, training, artifact, sliding score, learning curve, a sample of text: five to six minutes."""

    DEFAULT_PRESET: ClassVar[str] = "golf-tiny"

    config: ConfigField
    preset: PresetField = "golf-tiny"
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo")
    """Folder for everything that is made."""
    sample_bytes: NonNegativeInt = 400
    """Length of the sample of generated text."""
    force: bool = False
    """Replace an earlier demo in the same folder."""
    json: bool = False
    """Print the figures as one JSON object."""

    def run_command(self) -> int:
        """Run the demo and print what was measured."""
        from bytejepa.cli.terminal import print_json, progress_bar
        from bytejepa.cli.train import train_observer
        from bytejepa.demo import demo

        with progress_bar("train", total=1.0) as (bar, task):
            result = demo(
                self.config,
                self.out,
                name=self.preset,
                sample_bytes=self.sample_bytes,
                force=self.force,
                on_train=train_observer(bar, task),
                on_stage=lambda stage, done, total: bar.update(
                    task, description=stage, completed=done, total=total, status=""
                ),
            )
        if self.json:
            print_json({**result.as_record(), "sample": result.sample})
        else:
            print_result(result)
        return 0


def print_result(result: DemoResult) -> None:
    """Print the demo's figures as tables, and the sample."""
    from bytejepa.cli import export
    from bytejepa.cli.eval import comparison
    from bytejepa.cli.terminal import print_table

    export.print_result(result.exported)
    print_table(
        f"validation addresses ({result.score.num_bytes:,} bytes), artifact, window {result.score.window}, "
        f"stride {result.score.stride}: {result.score.bpb:.4f} bpb; mixed with counts of this text, as compress codes it: "
        f"{result.mixed_score.bpb:.4f} bpb; compressors: the same with blank lines between them, {result.text_bytes:,} bytes",
        *comparison(result.compressed_bytes, result.text_bytes, result.score.bpb),
    )
    rate = result.training.num_bytes / result.training.elapsed_s / 1e3
    print(f"{result.training.steps} steps at {rate:.1f} kB/s; {result.total_s:.0f} s in all; curve: {result.plot}")
    print(f"\n{result.sample}")
