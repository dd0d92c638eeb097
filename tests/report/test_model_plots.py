"""The groups that a report makes of a model's parameters, with every option of the model on, and the bars of their sizes."""

from types import SimpleNamespace

import matplotlib as mpl
import pytest
from matplotlib.transforms import Bbox

from bytejepa.report.drawing import NARROW, WIDE, Layout
from bytejepa.report.model_plots import artifact_parts, modules, size_plot
from small_models import small_model

OPTIONS = {
    "model": {
        "num_layers": 4, "skip_gates": True, "attention_gate_dims": 8, "value_embedding_last_layers": 1,
        "ngram_orders": (3,), "ngram_rows": 16, "chunk_blocks": (1, 2), "multi_token_heads": 1,
    },
    "jepa": {"horizons": 2, "next_bytes_weight": 0.1},
}  # fmt: skip


def tensors() -> list[SimpleNamespace]:
    """One figure of every parameter: its bytes, as many as it has elements."""
    named = small_model(**OPTIONS).named_parameters()
    return [SimpleNamespace(name=name, artifact_bytes=parameter.numel()) for name, parameter in named]


def test_modules_stand_in_the_networks_order() -> None:
    outside = [name for name in modules(tensors()) if not name.startswith("blocks.")]
    before = ["token_embedding", "bigram", "ngrams", "smear"]
    after = ["skip_weights", "skip_gates", "chunk_scale"]
    latents = ["start", "projector", "predictor", "further_predictors", "byte_head", "injection"]
    assert outside == [*before, *after, *(f"jepa.{name}" for name in latents), "multi_token_heads.0"]
    names = list(modules(tensors()))
    places = [place for place, name in enumerate(names) if name.startswith("blocks.")]
    assert places == list(range(len(before), len(names) - len(outside) + len(before)))


def test_all_matrices_of_attention_are_counted_as_attention() -> None:
    figures = tensors()
    parts = artifact_parts(SimpleNamespace(tensors=figures, joint_bytes=0, weights_bytes=0))  # type: ignore[arg-type]
    matrices = ("query.weight", "key.weight", "value.weight", "output.weight", "gate.weight")
    of_attention = (t for t in figures if ".attention." in t.name and t.name.endswith(matrices))
    assert parts["attention"] == sum(t.artifact_bytes for t in of_attention)


def weighing(weights_bytes: int, limit_bytes: int) -> SimpleNamespace:
    return SimpleNamespace(
        tensors=[], joint_bytes=0, weights_bytes=weights_bytes, code_bytes=1000, limit_bytes=limit_bytes,
        total_bytes=weights_bytes + 1000,
    )  # fmt: skip


@pytest.mark.parametrize("layout", [WIDE, NARROW], ids=lambda layout: layout.name)
@pytest.mark.parametrize("other_limit", [16_000_000, 4_000_000], ids=["one budget", "two budgets"])
def test_no_label_of_a_size_lies_on_the_line_of_a_budget(layout: Layout, other_limit: int) -> None:
    sizes = [
        (15_990_000, 16_000_000), (15_500_000, 16_000_000), (11_000_000, 16_000_000), (9_000_000, 16_000_000),
        (3_500_000, other_limit),
    ]  # fmt: skip
    plot = size_plot({str(n): weighing(*of) for n, of in enumerate(sizes)})  # type: ignore[arg-type,misc]
    with mpl.rc_context({"font.size": 9.5}):
        figure = plot.draw(layout)
        figure.draw_without_rendering()
    (axes,) = figure.axes
    lines = [line.get_window_extent() for line in axes.get_lines()]
    for several in axes.collections:
        ends = [several.get_transform().transform(segment) for segment in several.get_segments()]
        lines += [Bbox([points.min(axis=0), points.max(axis=0)]) for points in ends]
    assert len(lines) == (1 if other_limit == 16_000_000 else len(sizes))
    labels = [text.get_window_extent() for text in axes.texts]
    assert len(labels) >= len(sizes)
    for label in labels:
        assert not any(
            line.x0 - 1 < label.x1 and label.x0 < line.x1 + 1 and label.y0 < line.y1 and line.y0 < label.y1
            for line in lines
        )
        assert label.x1 <= figure.bbox.x1
