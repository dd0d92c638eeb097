# ruff: noqa: E501
"""Submission folders for the tests: README, submission.json, script and a log for every seed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from bytejepa.review import Review, Status, review
from review.scripts import script

BOS_RATIO = 151_130_891 / 151_080_891


@dataclasses.dataclass
class Folder:
    """What goes into one folder; None leaves a file out."""

    source: str = dataclasses.field(default_factory=script)
    bpbs: tuple[float, ...] = (1.19012345, 1.19034567, 1.19098765)
    seeds: tuple[int, ...] = (2025, 42, 7)
    total_bytes: int = 14_369_791
    train_ms: int = 598_123
    eval_ms: int = 54_321
    ratio: float = BOS_RATIO
    environment: str = ""
    readme: str | None = "default"
    claims: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    raw_claims: str | None = None
    settings: tuple[str, ...] = ("vocab_size:260 num_layers:13 model_dim:512 train_seq_len:4096",) * 3
    extra_log: str = ""
    compressor: str = "lzma"
    helpers: dict[str, str] = dataclasses.field(default_factory=dict)
    with_logs: bool = True

    def log(self, index: int) -> str:
        """Return the log of one seed."""
        bpb, steps = self.bpbs[index], 9000
        loss = bpb / self.ratio * math.log(2)
        return "\n".join(
            (
                f"seed:{self.seeds[index]}",
                self.settings[index % len(self.settings)],
                "model_params:24625001",
                self.extra_log,
                f"step:0/{steps} val_loss:5.5452 val_bpb:{5.5452 / math.log(2) * self.ratio:.4f} train_time:0ms step_avg:0.01ms",
                f"step:200/{steps} train_loss:1.5300 train_time:12620ms step_avg:63.10ms",
                f"step:{steps}/{steps} val_loss:{loss + 0.02:.4f} val_bpb:{(loss + 0.02) / math.log(2) * self.ratio:.4f} train_time:{self.train_ms}ms step_avg:63.10ms",
                "peak memory allocated: 10804 MiB reserved: 11000 MiB",
                "Serialized model: 98000000 bytes",
                f"Serialized model int6+{self.compressor}: {self.total_bytes - 9000 - index} bytes",
                f"Total submission size int6+{self.compressor}: {self.total_bytes - index} bytes",
                f"final_int6_sliding_window val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:512 eval_time:{self.eval_ms}ms",
                f"final_int6_sliding_window_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}",
                "",
            )
        )

    def write(self, path: Path) -> Path:
        """Write the folder and return its path."""
        path.mkdir(parents=True, exist_ok=True)
        if self.source is not None:
            (path / "train_gpt.py").write_text(self.source)
        text = (
            "# Byte model\n\nFineWeb byte260, mean of 3 seeds.\n\n```bash\n"
            + self.environment
            + " torchrun --standalone --nproc_per_node=8 train_gpt.py\n```\n"
        )
        if self.readme is not None:
            (path / "README.md").write_text(text if self.readme == "default" else self.readme)
        if self.raw_claims is not None:
            (path / "submission.json").write_text(self.raw_claims)
        elif self.claims is not None:
            best = min(self.bpbs)
            base = {
                "author": "somebody", "github_id": "somebody", "name": "Byte model", "blurb": "FineWeb bytes", "date": "2026-04-01",
                "val_bpb": best, "val_loss": best / self.ratio * math.log(2), "bytes_total": self.total_bytes,
            }  # fmt: skip
            (path / "submission.json").write_text(json.dumps(base | self.claims))
        for name, source in self.helpers.items():
            (path / name).write_text(source)
        if self.with_logs:
            for index, seed in enumerate(self.seeds):
                (path / f"train_seed{seed}.log").write_text(self.log(index))
        return path


def outcome(folder: Folder, tmp_path: Path) -> Review:
    """Return the review of a submission folder with this content."""
    return review(folder.write(tmp_path / "submission"))


def status_of(found: Review, check: str) -> Status:
    """Return the status of a check that must have been made."""
    finding = found.finding(check)
    assert finding is not None, check
    return finding.status
