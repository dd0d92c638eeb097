"""Small models with weights that use every part: what most tests of the model begin from."""

from typing import Any

import torch
from torch import Tensor

from bytejepa.config import RunConfig, replace
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM
from bytejepa.presets import tiny

BOS = 1


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """`tiny` with 3 blocks of width 32 and chunks of 4 bytes, then `sections` on top."""
    changes: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 3, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "rotary_dims": 4, "xsa_last_layers": 1,
            "bigram_rows": 64, "bigram_dim": 8,
        },
        "jepa": {"chunk_bytes": 4, "latent_dim": 16, "hidden_dim": 16, "sigreg_directions": 8},
    }  # fmt: skip
    for section, settings in sections.items():
        changes[section] = {**changes.get(section, {}), **settings}
    return replace(tiny(), **changes)


def random_model(config: RunConfig, *, seed: int = 0, strength: float = 0.2) -> ByteLM:
    """A model whose every parameter is off its initial value, so that zeros and ones hide nothing."""
    model = initialize(ByteLM(config), seed)
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(strength * torch.randn(parameter.shape, generator=random))
    return model.eval()


def small_model(*, seed: int = 0, **sections: dict[str, Any]) -> ByteLM:
    """`random_model` of `small_config`."""
    return random_model(small_config(**sections), seed=seed)


def random_ids(batch: int, length: int, *, seed: int = 0, documents: bool = False) -> Tensor:
    """Ids (B, T), int64: bytes after a BOS; with `documents` about every sixth id is a BOS."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 260, (batch, length), generator=random)
    if documents:
        ids[torch.rand(ids.shape, generator=random) < 1 / 6] = BOS
    ids[:, 0] = BOS
    return ids


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two dictionaries hold the same names with bit-identical values."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
