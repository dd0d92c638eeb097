"""A block's weights in the form the engine wants them: cast, fused and scaled once instead of at every byte."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from bytejepa.model.block import Block
from bytejepa.model.transformer import ByteLM


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockWeights:
    """One block, in the dtype of the computation. `heads` is H + 2G: query, key and value heads in this order."""

    window: int | None
    """Positions the block can look back, its own included: bytes, or chunks for a chunk block; None: no bound."""
    mix: Float[Tensor, "2 D"] | None
    """Shares of the residual and of the first layer's input; None: the residual alone."""
    skip: Float[Tensor, " D"] | None
    """Weight of the popped output of the first half; None: nothing is popped."""
    skip_gate: Float[Tensor, " D"] | None
    """Share of the residual against the weighted skip; None: the skip is added."""
    qkv: Float[Tensor, "heads_E D"]
    """Query, key and value maps, the depth scale of the norm multiplied in."""
    head_gain: Float[Tensor, "H_plus_G 1"]
    """Gain of each normalised head: query gain, 1 for keys."""
    output: Float[Tensor, "D D"]
    attention_scale: Float[Tensor, " D"]
    up: Float[Tensor, "M D"]
    """First map of the MLP, the depth scale of the norm multiplied in."""
    down: Float[Tensor, "D M"]
    mlp_scale: Float[Tensor, " D"]
    num_heads: int
    num_kv_heads: int
    gate: Float[Tensor, "H gate_dims"] | None
    """Map from the first dimensions of the input to the gates of the heads; None: no gates."""
    value_embedding: Float[Tensor, "V G E"] | None
    """What each id adds to the values; None: nothing."""
    is_parallel: bool
    """Whether the MLP reads what attention reads."""
    drop_own_value: bool
    """Whether heads drop the component along their own value vector (XSA)."""


@torch.no_grad()
def block_weights(model: ByteLM) -> tuple[BlockWeights, ...]:
    """Return the weights of every block of `model` in the order of passes, a recurrent block's twice; copied: later
    changes of the model do not reach them."""
    dtype = model.compute_dtype
    windows = model.config.model.window_of_place
    gathered = []
    for place, layer in enumerate(model.config.model.layer_order):
        block = model.blocks[layer]
        assert isinstance(block, Block)
        attention = block.attention
        qkv = torch.cat((attention.query.weight, attention.key.weight, attention.value.weight))
        key_gain = attention.query_gain.new_ones(attention.num_kv_heads)
        popped = place - model.num_encoder_layers
        has_skip = model.skip_weights is not None and 0 <= popped < model.num_encoder_layers
        gathered.append(
            BlockWeights(
                window=windows[place],
                mix=None if block.residual_mix is None else block.residual_mix.to(dtype, copy=True),
                skip=model.skip_weights[popped].to(dtype, copy=True)
                if has_skip and model.skip_weights is not None
                else None,
                skip_gate=torch.sigmoid(model.skip_gates[popped]).to(dtype)
                if has_skip and model.skip_gates is not None
                else None,
                qkv=(qkv.float() * block.norm_scale).to(dtype),
                head_gain=torch.cat((attention.query_gain, key_gain))[:, None].to(dtype),
                output=attention.output.weight.to(dtype, copy=True),
                attention_scale=block.attention_scale.to(dtype, copy=True),
                up=(block.mlp.up.weight.float() * block.norm_scale).to(dtype),
                down=block.mlp.down.weight.to(dtype, copy=True),
                mlp_scale=block.mlp_scale.to(dtype, copy=True),
                num_heads=attention.num_heads,
                num_kv_heads=attention.num_kv_heads,
                gate=None if attention.gate is None else attention.gate.weight.to(dtype, copy=True),
                value_embedding=None
                if attention.value_embedding is None
                else attention.value_embedding.weight.to(dtype, copy=True).unflatten(1, (attention.num_kv_heads, -1)),
                is_parallel=block.is_parallel,
                drop_own_value=attention.drop_own_value,
            )
        )
    return tuple(gathered)
