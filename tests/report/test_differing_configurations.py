"""Reports of configurations that were read, validated or packed in different ways: each figure says whose it is."""

from __future__ import annotations

import numpy as np
import pytest

from bytejepa.data.vocabulary import BOS, ids_from_bytes
from bytejepa.report.drawing import NARROW, WIDE, Plot, style_of
from bytejepa.report.loss_plots import loss_plots, missing_losses
from bytejepa.report.measurements import GradientBatch, PricedText, RunMeasurements, StageScore
from bytejepa.report.model_plots import size_plot


def measured(*documents: bytes, window: int = 4, is_whole_split: bool = True, limit: int = 1000) -> RunMeasurements:
    """What a run measures on documents, each after a BOS; target number i costs i bits."""
    ids = np.concatenate([np.append(np.array([BOS], dtype=np.uint16), ids_from_bytes(d)) for d in documents])
    bits = np.arange(len(ids) - 1, dtype=np.float64)
    return RunMeasurements(
        step=2,
        scores={stage: StageScore(bpb=2.0, num_bytes=len(bits)) for stage in ("raw", "average", "artifact")},
        priced=PricedText(ids=ids, bits=bits, window=window, is_whole_split=is_whole_split),
        tensors=(),
        gradient_batch=GradientBatch(num_sequences=1, sequence_bytes=4, jepa_lambda=0.0),
        weights_bytes=300,
        joint_bytes=0,
        code_bytes=100,
        limit_bytes=limit,
        device="cpu",
    )


def plots_of(**runs: RunMeasurements) -> dict[str, Plot]:
    return {plot.name: plot for plot in loss_plots({label: [run] for label, run in runs.items()})}


@pytest.mark.parametrize("layout", [WIDE, NARROW])
def test_classes_of_texts_that_hold_others(layout) -> None:
    plot = plots_of(a=measured(b"aB\n1"), b=measured(b"aa!!aaaa"))["loss_by_byte_class"]
    rows = {(row[0], row[1]): row[2:] for row in plot.table.rows}
    assert rows["a", "line breaks and tabs"] == (1, 1 / 4, 2.0, 2 / 6)
    assert rows["b", "punctuation"] == (2, 2 / 8, 2.5, 5 / 28)
    assert ("b", "line breaks and tabs") not in rows
    for label in "ab":
        assert sum(values[1] for (whose, _), values in rows.items() if whose == label) == pytest.approx(1)
    axes = plot.draw(layout).axes[0]
    labels = [tick.get_text().replace("\n", " ") for tick in axes.get_yticklabels()]
    assert labels == ["lower-case letters (58.3 %)", "upper-case letters (8.3 %)", "digits (8.3 %)",
                      "line breaks and tabs (8.3 %)", "punctuation (16.7 %)"]  # fmt: skip
    assert "share of all targets of all configurations together" in plot.caption
    drawn = [line.get_xdata().tolist() for line in axes.get_lines()]
    assert drawn == [[0, 1, 3, 2], [23 / 6, 2.5]]


def test_classes_of_one_text_have_one_share() -> None:
    plot = plots_of(a=measured(b"aB"), b=measured(b"aB"))["loss_by_byte_class"]
    assert "share of all targets. " in plot.caption
    assert "Most bits go to upper-case letters: 100%. " in plot.caption


def test_captions_give_the_figures_of_each() -> None:
    plots = plots_of(a=measured(b"abcdefgh", b"ijk"), b=measured(b"abcdefgh", window=2, is_whole_split=False))
    for plot in plots.values():
        assert (
            "on the whole validation split: 12 targets in non-overlapping windows of 4 ids (a); "
            "the beginning of the validation split: 8 targets in non-overlapping windows of 2 ids (b)."
        ) in plot.caption
    assert "over 3 windows (a); 4 windows (b)" in plots["loss_by_position"].caption


def test_what_one_configuration_lacks_is_not_drawn_of_it_alone() -> None:
    runs = {"a": measured(b"abc", window=8, is_whole_split=False), "b": measured(b"abcd", window=4)}
    plots = plots_of(**runs)
    assert {row[0] for row in plots["loss_by_position"].table.rows} == {"b"}
    assert {row[0] for row in plots["loss_by_document_length"].table.rows} == {"b"}
    for name in ("loss_by_position", "loss_by_document_length"):
        for layout in (WIDE, NARROW):
            colours = {line.get_color() for line in plots[name].draw(layout).axes[0].get_lines()}
            assert colours == {style_of(1)["color"]}
    said = missing_losses({label: [run] for label, run in runs.items()})
    assert "No loss by position of a: 3 targets are less than a window." in said
    assert "No loss by document length of a: among the 3 targets scored is no whole document." in said


def test_each_budget_is_drawn_and_shared_out() -> None:
    plot = size_plot({"a": measured(b"abc"), "b": measured(b"abc", limit=500)})
    assert "the budget (red line) of 1,000 bytes (a); 500 bytes (b)," in plot.caption
    assert "= 400 bytes, 40.0%; b: 300 weights + 100 code = 400 bytes, 80.0%." in plot.caption
    assert {(row[0], row[3]) for row in plot.table.rows} == {("a", 1000), ("b", 500)}
    for layout in (WIDE, NARROW):
        axes = plot.draw(layout).axes[0]
        lines = [path.vertices[0, 0] for lines in axes.collections for path in lines.get_paths()]
        assert lines == [0.001, 0.0005]
        between = "\n" if layout.is_narrow else ", "
        assert [text.get_text() for text in axes.texts] == [f"0.00 MB{between}40.0%", f"0.00 MB{between}80.0%"]
    assert "budget 0.001 MB" in [
        text.get_text() for text in size_plot({"a": measured(b"abc")}).draw(WIDE).axes[0].texts
    ]


def test_texts_that_differ_are_said_to() -> None:
    for plot in plots_of(a=measured(b"abcd"), b=measured(b"abce")).values():
        assert plot.caption.endswith("of 4 ids. The configurations were not priced on the same text.")
    for plot in plots_of(a=measured(b"abcd"), b=measured(b"abcdefgh")).values():
        assert "not priced on the same text" not in plot.caption
