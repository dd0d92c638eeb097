"""A plan of two variants, small enough to run in a test, and what plan files look like."""

from typing import Any

from bytejepa.study.plan import Plan, plan_from_dict

MODEL = {
    "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rotary_dims": 8, "bigram_rows": 64, "bigram_dim": 8,
}  # fmt: skip


def small_values(**changes: Any) -> dict[str, Any]:
    """What a plan file of a small study holds, with `changes` on top."""
    return {
        "name": "small",
        "question": "Does the path help?",
        "base": "ablation",
        "baseline": "without",
        "seeds": [1, 2],
        "budget": {"steps": 4},
        "evaluation": {"window_bytes": 64, "stride_bytes": 32, "validation_bytes": 600},
        "overrides": {
            "model": MODEL,
            "jepa": {"latent_dim": 16, "hidden_dim": 16, "sigreg_directions": 8},
            "data": {"sequence_bytes": 64, "batch_bytes": 256},
            "training.validate_every_steps": "None",
            "training.validation_bytes": 300,
            "training.log_every_steps": 1,
            "training.checkpoint_every_s": 0.0,
        },
        "variants": [
            {"name": "without", "tests": "The control.", "overrides": {"jepa.enabled": False}},
            {"name": "with", "tests": "The path.", "overrides": {"jepa": {"gradient": "detached"}}},
        ],
        **changes,
    }


def small_plan(**changes: Any) -> Plan:
    """The plan of `small_values`."""
    return plan_from_dict(small_values(**changes))
