"""The groups that a report makes of a model's parameters, with every option of the model on."""

from types import SimpleNamespace

from bytejepa.report.model_plots import artifact_parts, modules
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
