"""The golden files' inputs, rebuilt from their rule: weights, SIGReg directions and byte ids (golden/README.md)."""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY = 260
NUM_DIRECTIONS = 256


def golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The numbers of one golden file and its arrays (empty where there is no .npz)."""
    numbers = json.loads((GOLDEN / f"{name}.json").read_text())
    arrays: dict[str, np.ndarray] = {}
    if (GOLDEN / f"{name}.npz").exists():
        with np.load(GOLDEN / f"{name}.npz") as stored:
            arrays = {key: stored[key] for key in stored.files}
    return numbers, arrays


def wave(name: str, n: int) -> np.ndarray:
    """n float64 numbers, uniform in +-sqrt(3) (unit variance), a function of the name alone."""
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return (2 * generator.random(n) - 1) * math.sqrt(3)


def reference_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a golden configuration, by the reference's names; linears are (out, in)."""
    D, H, G = config["model_dim"], config["num_heads"], config["num_kv_heads"]
    E, M = D // H, int(config["mlp_mult"] * D)
    shapes: dict[str, tuple[int, ...]] = {
        "skip_weights": (config["num_layers"] // 2, D),
        "tok_emb.weight": (VOCABULARY, D),
        "bigram.scale": (),
        "bigram.embed.weight": (config["bigram_vocab_size"], config["bigram_dim"]),
        "bigram.proj.weight": (D, config["bigram_dim"]),
        "smear.gate": (D,),
    }
    for i in range(config["num_layers"]):
        shapes |= {
            f"blocks.{i}.attn_scale": (D,),
            f"blocks.{i}.mlp_scale": (D,),
            f"blocks.{i}.resid_mix": (2, D),
            f"blocks.{i}.attn.q_gain": (H,),
            f"blocks.{i}.attn.c_q.weight": (D, D),
            f"blocks.{i}.attn.c_k.weight": (G * E, D),
            f"blocks.{i}.attn.c_v.weight": (G * E, D),
            f"blocks.{i}.attn.proj.weight": (D, D),
            f"blocks.{i}.mlp.fc.weight": (M, D),
            f"blocks.{i}.mlp.proj.weight": (D, M),
        }
    if config["jepa_chunk_size"]:  # the golden files write "no JEPA" as 0
        Z, hidden = config["jepa_latent_dim"], config["jepa_proj_hidden"]
        shapes |= {
            "jepa_projector.fc1.weight": (hidden, D),
            "jepa_projector.fc2.weight": (Z, hidden),
            "jepa_predictor.start_token": (Z,),
            "jepa_predictor.fc1.weight": (Z, Z),
            "jepa_predictor.fc2.weight": (Z, Z),
            "jepa_injection.weight": (D, Z),
        }
    return shapes


def _fill(name: str, shape: tuple[int, ...]) -> Tensor:
    w = wave(name, math.prod(shape)).reshape(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("attn_scale", "mlp_scale", "skip_weights"):
        value = 1 + 0.1 * w
    elif leaf == "resid_mix":
        value = 0.1 * w
        value[0] += 1
    elif leaf == "q_gain":
        value = 1.5 + 0.1 * w
    elif leaf in ("gate", "start_token"):
        value = 0.5 * w
    elif leaf == "scale":
        value = np.array(0.7)
    elif name == "tok_emb.weight":
        value = 0.08 * w
    elif name == "bigram.embed.weight":
        value = 0.1 * w
    else:
        value = 1.4 * w / math.sqrt(shape[1])
    return torch.tensor(value, dtype=torch.float32)


def reference_state_dict(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Float32 weights of a golden configuration, filled by the weight rule; fresh tensors at every call."""
    return {name: _fill(name, shape) for name, shape in reference_shapes(config).items()}


def sigreg_directions(
    latent_dim: int, num_directions: int = NUM_DIRECTIONS, *, name: str = "sigreg_directions"
) -> Tensor:
    """The golden files' SIGReg directions: (Z, S) float32, columns of unit length."""
    directions = torch.tensor(wave(name, latent_dim * num_directions), dtype=torch.float32)
    directions = directions.reshape(latent_dim, num_directions)
    return directions / directions.norm(dim=0, keepdim=True)


def lcg_ids(salt: int, batch: int, seq_len: int) -> Tensor:
    """The ids (B, T+1), int64, of one salt: bytes from a linear congruential generator, BOS at the very first place."""
    x = salt
    ids = []
    for _ in range(batch * (seq_len + 1)):
        x = (1103515245 * x + 12345) % 2**31
        ids.append(4 + (x >> 16) % 256)
    ids[0] = 1
    return torch.tensor(ids, dtype=torch.int64).reshape(batch, seq_len + 1)
