"""A block: attention and MLP around a residual."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytejepa.config import RunConfig
from bytejepa.data.vocabulary import VOCABULARY_SIZE
from bytejepa.model import fused
from bytejepa.model.attention import Attention, Kernel, Mask
from bytejepa.model.layers import MLP, rms_norm


class Block(nn.Module):
    """Attention and MLP around a residual that can take the first layer's input back in.

    The MLP reads the residual after attention, or (parallel residuals) the one before, as attention does.
    """

    def __init__(self, config: RunConfig, layer: int) -> None:
        super().__init__()
        model = config.model
        from_the_end = model.num_layers - layer
        self.attention = Attention(
            model.model_dim,
            model.num_heads,
            model.num_kv_heads,
            query_gain=model.query_gain,
            drop_own_value=from_the_end <= model.xsa_last_layers,
            gate_dims=model.attention_gate_dims,
            num_value_embeddings=VOCABULARY_SIZE if from_the_end <= model.value_embedding_last_layers else None,
        )
        self.mlp = MLP(model.model_dim, model.mlp_dim)
        self.attention_scale = nn.Parameter(torch.ones(model.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(model.model_dim))
        mix = torch.stack((torch.ones(model.model_dim), torch.zeros(model.model_dim)))
        self.residual_mix = nn.Parameter(mix) if model.residual_mix else None
        self.norm_scale = (layer + 1) ** -0.5 if model.depth_scaled_norm else 1.0
        self.is_parallel = from_the_end <= model.parallel_last_layers

    def mix(self, x: Tensor, x0: Tensor) -> Tensor:
        """Return the block's input with a learned share of the first layer's input."""
        if self.residual_mix is None:
            return x
        mix = self.residual_mix.to(x.dtype)
        return fused.mix_residual(x, x0, mix) if fused.is_profitable(x) else torch.addcmul(mix[0] * x, mix[1], x0)

    def transform(self, attention_input: Tensor, x: Tensor) -> Tensor:
        """Return the residual `x` after attention plus the MLP's output."""
        mlp_input = attention_input if self.is_parallel else x
        return self.mlp(mlp_input, x, normalizes=not self.is_parallel, norm_scale=self.norm_scale, scale=self.mlp_scale)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        x0: Float[Tensor, "B T D"],
        ids: Int[Tensor, "B T"],
        cosines: Tensor,
        sines: Tensor,
        *,
        backend: Kernel,
        mask: Mask,
    ) -> Float[Tensor, "B T D"]:
        """Return the residual after this block."""
        x = self.mix(x, x0)
        normalized = rms_norm(x)
        x = self.attention(
            normalized,
            ids,
            cosines,
            sines,
            x,
            norm_scale=self.norm_scale,
            scale=self.attention_scale,
            backend=backend,
            mask=mask,
        )
        return self.transform(normalized, x)
