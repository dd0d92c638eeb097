"""Initial weights, as a function of the configuration and the seed (spec section 2, "Init").

| parameter | value |
|---|---|
| matrices with both sides at least 64 | orthogonal, gain 1 |
| smaller matrices of the blocks | torch's default for linear layers |
| projections that end a branch | zero, or orthogonal with gain 1/sqrt(2 num_layers) |
| token embedding | normal, standard deviation `embedding_std` |
| bigram and n-gram tables | zero |
| bigram projection | zero (then the pair never learns), or orthogonal |
| n-gram projection | orthogonal |
| JEPA linears | torch's default |
| JEPA start token | 0.02 normal |
| JEPA injection, extra heads, the latents' byte head | zero |
| SIGReg directions | normal, each of unit length |
| value embeddings, gates | zero |
| vectors and scalars | set where they are declared |
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from bytejepa.config_model import ModelConfig
from bytejepa.model.transformer import ByteLM

ORTHOGONAL_FROM = 64
ZERO_AT_START = ("bigram.embedding", "ngrams.embedding", "jepa.injection", "jepa.byte_head", "multi_token_heads")


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """Return a CPU generator that is a function of (seed, purpose, step): no hidden state, nothing to save."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def is_vector(name: str, parameter: Tensor) -> bool:
    """Return whether the parameter called `name` is a scalar, a vector or a stack of vectors, not a matrix."""
    return parameter.ndim < 2 or name.endswith(("residual_mix", "skip_weights", "skip_gates"))


@torch.no_grad()
def initialize(model: ByteLM, seed: int) -> ByteLM:
    """Fill the weights of `model` in place, the same on every device, and return it."""
    config = model.config.model
    for name, parameter in model.named_parameters():
        if is_vector(name, parameter):
            continue
        parameter.copy_(_initial_matrix(name, parameter, config, generator(seed, f"initialize {name}")))
    if model.jepa is not None:
        start = torch.randn(model.jepa.start.shape, generator=generator(seed, "initialize start token"))
        model.jepa.start.copy_(0.02 * start)
    fill_sigreg_directions(model, seed)
    return model


@torch.no_grad()
def fill_sigreg_directions(model: ByteLM, seed: int) -> None:
    """Fill the fixed directions of SIGReg, which are a function of the seed and therefore in no file."""
    if model.jepa is not None:
        directions = torch.randn(model.jepa.directions.shape, generator=generator(seed, "sigreg directions"))
        model.jepa.directions.copy_(directions / directions.norm(dim=0))


def _initial_matrix(name: str, parameter: Tensor, config: ModelConfig, random: torch.Generator) -> Tensor:
    value = torch.empty(parameter.shape)
    if name == "token_embedding.weight":
        return value.normal_(0, config.embedding_std, generator=random)
    if name.startswith(ZERO_AT_START) or name.endswith(("attention.gate.weight", "value_embedding.weight")):
        return value.zero_()
    if name == "bigram.projection.weight":
        return (
            value.zero_() if config.bigram_projection_init == "zero" else nn.init.orthogonal_(value, generator=random)
        )
    if name == "ngrams.projection.weight":
        return nn.init.orthogonal_(value, generator=random)
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        gain = 0.0 if config.output_projection_init == "zero" else 1 / math.sqrt(2 * config.num_layers)
        return nn.init.orthogonal_(value, gain=gain, generator=random)
    if not name.startswith("jepa.") and min(value.shape) >= ORTHOGONAL_FROM:
        return nn.init.orthogonal_(value, generator=random)
    bound = 1 / math.sqrt(value.size(1))  # what nn.Linear draws: kaiming uniform with a = sqrt(5)
    return value.uniform_(-bound, bound, generator=random)
