"""What quantisation and packing cost and save on a finished run: loss over the average, size, entropy bound, seconds.

    python benchmarks/benchmark_packing.py RUN --fit 16000000 14000000
    python benchmarks/benchmark_packing.py RUN --bits 3.6 3.0 --score-bytes 65536 --json

Rows: `reference`, the rules of PR #832 (one global step, zstd); `int6`, `default`'s settings; then, for every size, the finest
steps that fit with rounding to nearest at equal steps in root mean squares, and with `presets.compact`. The loss is that of
the reloaded artifact less that of the unquantised average, on the same leading ids of the validation split in windows that
do not overlap. Columns compare the packed codes with zstd level 22 of one code a byte and with the codes' entropy given
their rows' frequency tables; and the joint stream, tables included, with the entropy of the codes that it holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from bytejepa.artifact.codecs import CODECS
from bytejepa.artifact.container import read_container
from bytejepa.artifact.joint_codes import row_histograms, tables_of_matrices
from bytejepa.artifact.load import build, read_run
from bytejepa.artifact.packing import pack
from bytejepa.artifact.write import calibration_sequences, write_artifact
from bytejepa.config import RunConfig, replace
from bytejepa.data.loader import IdStream, validation_ids
from bytejepa.errors import ArtifactError
from bytejepa.model.quantization import QuantizedMatrix
from bytejepa.presets import compact
from bytejepa.scoring.evaluate import Scorer, score_ids

PLAIN_STEPS = {"clip": "standard_deviations", "rounding": "nearest", "hidden_order": "as_trained"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way of packing the run."""

    settings: str
    file_bytes: int
    bits_per_parameter: float
    loss_bpb: float
    codes_bytes: int
    """Of the matrices' codes, tables included."""
    zstd_bytes: int
    entropy_bytes: int
    """Of the codes given which rows share a table; the tables themselves are not counted."""
    joint_bytes: int
    """Of the joint stream, its tables included; 0 if there is none."""
    joint_entropy_bytes: int
    """Of the codes in the joint stream, as entropy_bytes."""
    joint_row_entropy_bytes: int
    """The same given every row's own histogram: less than any code can reach, for the histograms would have to be told."""
    seconds: float
    """To calibrate, quantise, search, pack and write."""


def variants(config: RunConfig, sizes: list[int]) -> dict[str, RunConfig]:
    """Return what to compare, by name."""
    base = replace(
        config, artifact={"fit": False, "hidden_order": "as_trained", "rounding": "nearest", "codecs": ("zstd",)}
    )
    plain = {"matrix_bits": 6, "other_bits": 8}
    result = {
        "reference": replace(base, artifact={**plain, "scales": "reference_floor", "clip": "max"}),
        "int6": replace(base, artifact={**plain, "clip": "mean_squared_error", "codecs": ("zstd", "brotli")}),
    }
    for size in sizes:
        fitted = replace(compact(config), artifact={"fit": True, "limit_bytes": size})
        same_step = {"other_clip_standard_deviations": fitted.artifact.clip_standard_deviations}
        result[f"equal steps, {size:,}"] = replace(fitted, artifact={**PLAIN_STEPS, **same_step})
        result[f"compact, {size:,}"] = fitted
    return result


def measure(
    name: str,
    config: RunConfig,
    weights: dict[str, torch.Tensor],
    data: Path,
    ids: np.ndarray[Any, Any],
    exact_bpb: float,
) -> Row:
    """Return what packing `weights` as `config` says comes to."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.bjm"
        sequences = calibration_sequences(IdStream.open(data, "train"), config, data)
        write_artifact(path, weights, config, sequences=sequences)
        seconds = time.perf_counter() - begin
        container = read_container(path)
    quantized = {name: value for name, value in container.stored.items() if isinstance(value, QuantizedMatrix)}
    packed = pack(quantized, codecs=(*config.artifact.codecs, "raw"))
    matrices = [value.codes.numpy() for value in quantized.values()]
    joint = [quantized[record.name].codes.numpy() for record in packed.records if record.is_joint]
    alone = sum(record.streams[0].num_bytes for record in packed.records)
    num_parameters = sum(value.numel() for value in container.tensors.values())
    return Row(
        settings=name,
        file_bytes=container.info.file_bytes,
        bits_per_parameter=8 * container.info.file_bytes / num_parameters,
        loss_bpb=score(config, container.tensors, ids) - exact_bpb,
        codes_bytes=alone + (packed.joint.num_bytes if packed.joint else 0),
        zstd_bytes=sum(len(CODECS["zstd"].compress(codes.tobytes())) for codes in matrices),
        entropy_bytes=entropy_bytes(matrices)[0],
        joint_bytes=packed.joint.num_bytes if packed.joint else 0,
        joint_entropy_bytes=entropy_bytes(joint)[0],
        joint_row_entropy_bytes=entropy_bytes(joint)[1],
        seconds=seconds,
    )


def entropy_bytes(matrices: list[npt.NDArray[np.int8]]) -> tuple[int, int]:
    """Return the entropy of all codes given which rows share a table, and given every row's own histogram."""
    if not matrices:
        return 0, 0
    lowest = min(int(codes.min()) for codes in matrices)
    width = max(int(codes.max()) for codes in matrices) - lowest + 1
    histograms = row_histograms(matrices, lowest, width)
    tables = tables_of_matrices(matrices)
    counts = np.zeros((len(tables.frequencies), width), np.int64)
    np.add.at(counts, tables.table_of_row, histograms)
    return bits_of(counts) // 8, bits_of(histograms) // 8


def bits_of(histograms: npt.NDArray[Any]) -> int:
    """Return the bits that symbols of these histograms, one a row, take at least, each with the frequencies of its own."""
    totals = histograms.sum(1, keepdims=True)
    shares = histograms / np.maximum(1, totals)
    return int(-(histograms * np.log2(np.where(histograms > 0, shares, 1.0))).sum())


def score(config: RunConfig, weights: dict[str, torch.Tensor], ids: np.ndarray[Any, Any]) -> float:
    """Return the bpb of `ids` in windows that do not overlap."""
    window = min(config.evaluation.window_bytes, len(ids) - 1)
    scorer = Scorer(build(config, weights, source="the run"))
    return score_ids(scorer, ids, window=window, stride=window, batch_ids=config.evaluation.batch_bytes).bpb


def main() -> None:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, help="its shards, if they moved")
    parser.add_argument("--fit", type=int, nargs="*", default=[], help="file sizes, code not counted")
    parser.add_argument("--bits", type=float, nargs="*", default=[], help="file sizes in bits a parameter")
    parser.add_argument("--score-bytes", type=int, default=65_536)
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    trained = read_run(words.run)
    config, weights = trained.config, trained.average
    data = trained.folder.data_path(words.data)
    ids = validation_ids(data, words.score_bytes)
    exact_bpb = score(config, weights, ids)
    count = sum(value.numel() for value in weights.values())
    sizes = [*words.fit, *(int(bits * count / 8) for bits in words.bits)]
    rows = []
    for name, variant in variants(config, sizes).items():
        try:
            rows.append(measure(name, variant, weights, data, ids, exact_bpb))
        except ArtifactError as problem:
            Console(stderr=True).print(f"{name}: {problem.message}")
    if words.json:
        record = {"num_parameters": count, "average_bpb": exact_bpb, "scored_ids": len(ids)}
        print(json.dumps(record | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
        return
    table = Table(title=f"{count:,} parameters, average {exact_bpb:.4f} bpb on {len(ids) - 1:,} targets")
    for heading in ("settings", "bytes", "bits/parameter", "loss, bpb", "codes", "zstd -22", "entropy", "seconds"):
        table.add_column(heading, justify="left" if heading == "settings" else "right")
    for row in rows:
        table.add_row(
            row.settings, f"{row.file_bytes:,}", f"{row.bits_per_parameter:.3f}", f"{row.loss_bpb:+.4f}", f"{row.codes_bytes:,}",
            f"{row.zstd_bytes:,}", f"{row.entropy_bytes:,}", f"{row.seconds:.0f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
