"""Weights that a run begins with instead of random ones: those of an earlier model."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from bytejepa.config import RunConfig
from bytejepa.config_json import to_dict
from bytejepa.errors import ConfigError
from bytejepa.model.transformer import ByteLM, prediction_weights


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """A model to begin with, and where it came from."""

    source: str
    """The artifact or run folder, for messages and the manifest."""
    config: RunConfig
    """Of that model."""
    weights: dict[str, Tensor]
    """By name, as of `ByteLM.named_parameters`."""

    def described(self) -> dict[str, Any]:
        """Return what the manifest of a run that begins here says of it: path and configuration, and a digest of names, shapes
        and float32 values, which is the same for one model in any file."""
        digest = hashlib.sha256()
        for name, value in sorted(self.weights.items()):
            digest.update(f"{name}:{tuple(value.shape)}:".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return {"path": self.source, "weights_sha256": digest.hexdigest(), "configuration": to_dict(self.config)}

    @torch.no_grad()
    def load_into(self, model: ByteLM) -> None:
        """Let `model` hold these weights. What no prediction needs (extra heads, a latent module that injects nothing) begins
        anew where these lack it, and is left out where `model` does.

        Raises: ConfigError naming the first tensor that does not fit.
        """
        own = dict(model.named_parameters())
        needed = prediction_weights(own, model.config)
        left_over = prediction_weights({n: v for n, v in self.weights.items() if n not in own}, model.config)
        for name in (*own, *left_over):
            expected, got = (
                tuple(tensors[name].shape) if name in tensors else "nothing" for tensors in (own, self.weights)
            )
            if expected != got and not (got == "nothing" and name not in needed):
                raise ConfigError(
                    f"{self.source}: tensor {name}: this configuration expects {_shape(expected)}, the model has {_shape(got)}",
                    hint=self._settings_that_differ(model.config),
                )
        for name, parameter in own.items():
            if name in self.weights:
                parameter.copy_(self.weights[name])

    def _settings_that_differ(self, config: RunConfig) -> str:
        """Return which settings of `model` and `jepa` are otherwise in `config`, and what they are in this model."""
        theirs, ours = to_dict(self.config), to_dict(config)
        different = ", ".join(
            f"{section}.{name} {value}"
            for section in ("model", "jepa")
            for name, value in theirs[section].items()
            if value != ours[section][name]
        )
        return f"that model has {different}" if different else ""


def _shape(shape: tuple[int, ...] | str) -> str:
    return shape if isinstance(shape, str) else f"shape {shape}"
