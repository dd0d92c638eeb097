"""In what precision a model computes where it is."""

from __future__ import annotations

from typing import Literal

import torch

from bytejepa.model.transformer import ByteLM

Precision = Literal["auto", "float32"]


def compute_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """Return the precision of activations and products for `training.precision`: bfloat16 on CUDA unless it says float32,
    float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" and precision != "float32" else torch.float32


def on_device(model: ByteLM, device: torch.device | str, *, precision: Precision = "auto") -> ByteLM:
    """Return `model`, moved to `device` and computing there as its `training.precision` says, or in float32 if asked to."""
    model.compute_dtype = compute_dtype(model.config.training.precision if precision == "auto" else precision, device)
    return model.to(device)
