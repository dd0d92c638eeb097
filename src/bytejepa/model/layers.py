"""Building blocks of the backbone (spec section 2).

Shape letters, used in the whole project: B batch, T bytes of context, D model width, H query heads, G key/value heads,
E head width, M MLP width, V vocabulary (260), P bytes in a chunk, C chunks, Z latent width, S SIGReg directions,
K SIGReg knots, N scored bytes, L codec lanes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytejepa.data.vocabulary import BOS
from bytejepa.model import fused, fused_heads, fused_mlp


def rms_norm(x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    """Return `x` with unit root mean square along its last axis; no weight, torch's default epsilon for the dtype."""
    return fused.rms_norm(x) if fused.is_profitable(x) else F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """A linear map without bias that computes in the dtype of its input, whatever its weight is kept in."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return x @ weight^T."""
        return F.linear(x, self.weight.to(x.dtype))


def add_projected(
    residual: Float[Tensor, "B T D"],
    x: Float[Tensor, "B T in"],
    weight: Float[Tensor, "D in"],
    scale: Float[Tensor, D],
) -> Float[Tensor, "B T D"]:
    """Return residual + scale * (x @ weight^T): the scale is folded into the weight, which is far smaller than the
    activations. In eager mode on a CPU the residual is what the product accumulates onto; otherwise that would copy the
    residual first, while a compiler adds it on the way into the norm that follows."""
    weight = folded(weight, scale, x.dtype)
    if x.is_cuda or torch.compiler.is_compiling():
        return residual + F.linear(x, weight)
    return torch.addmm(residual.flatten(0, 1), x.flatten(0, 1), weight.T).view_as(residual)


def folded(weight: Float[Tensor, "D in"], scale: Float[Tensor, D], dtype: torch.dtype) -> Float[Tensor, "D in"]:
    """Return the weight of scale * (x @ weight^T) in `dtype`."""
    return (weight * scale[:, None]).to(dtype)


SMEAR_GATE_DIMS = 12
"""Leading dimensions of an embedding from which its smear is gated, as in modded-nanogpt."""


class SmearGate(nn.Module):
    """y_t = (1 - g) x_t + g x_{t-1} with g = sigmoid(gate) per dimension and x_{-1} = 0.

    With `reads_input` g = sigmoid(gate + w . x_t), where w reads the first 12 dimensions.
    """

    def __init__(self, model_dim: int, *, reads_input: bool = False) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(model_dim))
        self.input_weight = nn.Parameter(torch.zeros(min(SMEAR_GATE_DIMS, model_dim))) if reads_input else None

    def forward(
        self, x: Float[Tensor, "B T D"], document_start: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return the smeared embeddings; where `document_start` is true nothing comes from the predecessor."""
        opening = self.gate.to(x.dtype)
        if self.input_weight is not None:
            opening = opening + (x[..., : self.input_weight.size(0)] @ self.input_weight.to(x.dtype))[..., None]
        gate = torch.sigmoid(opening)
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        if document_start is not None:
            previous = previous.masked_fill(document_start[..., None], 0)
        return torch.lerp(x, previous, gate.expand_as(x))


class MLP(nn.Module):
    """proj(leaky_relu(fc(x), 0.5)^2)."""

    def __init__(self, model_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.up = Linear(model_dim, mlp_dim)
        self.down = Linear(mlp_dim, model_dim)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        residual: Float[Tensor, "B T D"],
        *,
        normalizes: bool,
        norm_scale: float,
        scale: Float[Tensor, D],
    ) -> Float[Tensor, "B T D"]:
        """Return residual + scale * mlp(norm_scale * x'), x' the RMS norm of `x` if it `normalizes`."""
        up = (self.up.weight * norm_scale).to(x.dtype)
        if fused_mlp.is_profitable(x, self.up.out_features):
            return residual + fused_mlp.mlp(x, up, folded(self.down.weight, scale, x.dtype), normalizes=normalizes)
        hidden = F.linear(rms_norm(x) if normalizes else x, up)
        return add_projected(residual, leaky_relu_squared(hidden), self.down.weight, scale)


def leaky_relu_squared(x: Tensor) -> Tensor:
    """Return leaky_relu(x, slope 0.5) squared, elementwise."""
    return fused.leaky_relu_squared(x) if fused.is_profitable(x) else F.leaky_relu(x, 0.5).square()


def document_starts(ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return where a document begins: at every BOS."""
    return ids == BOS


def softcap(x: Tensor, bound: float) -> Tensor:
    """Return bound * tanh(x / bound) in float32."""
    return bound * torch.tanh(x.float() / bound)


def softcapped_cross_entropy(logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], bound: float) -> Tensor:
    """Return the mean cross-entropy in nats of softcap(logits) against `targets`, a float32 scalar."""
    if fused.is_profitable(logits):
        return fused.softcapped_cross_entropy(logits, targets, bound)
    return F.cross_entropy(softcap(logits, bound), targets)


class RotaryTables(nn.Module):
    """Cosines and sines of the rotary position code, as buffers up to the longest context seen in training.

    Frequencies are base^(-2m/R) for the R rotating dimensions; for a context T beyond `length_bytes` the base becomes
    base * (T / length_bytes)^(R / (R - 2)) (spec section 2).
    """

    cosines: Tensor
    sines: Tensor

    def __init__(self, rotary_dims: int, base: float, length_bytes: int) -> None:
        super().__init__()
        self.rotary_dims = rotary_dims
        self.base = base
        self.length_bytes = length_bytes
        cosines, sines = self.compute(length_bytes)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

    def compute(self, length: int) -> tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]]:
        """Return the tables for a context of exactly `length` ids."""
        base = self.base
        if length > self.length_bytes and self.rotary_dims > 2:
            base *= (length / self.length_bytes) ** (self.rotary_dims / (self.rotary_dims - 2))
        exponents = torch.arange(0, self.rotary_dims, 2, dtype=torch.float32, device="cpu") / self.rotary_dims
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), 1.0 / base**exponents)
        return angles.cos(), angles.sin()

    def forward(self, length: int) -> tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]]:
        """Return (cosines, sines) for a context of `length` ids, each (T, rotary_dims / 2) float32."""
        if length <= self.length_bytes:
            return self.cosines[:length], self.sines[:length]
        cosines, sines = self.compute(length)
        return cosines.to(self.cosines.device), sines.to(self.sines.device)


def normalize_and_rotate(
    heads: Float[Tensor, "B T heads E"],
    cosines: Float[Tensor, "T half"],
    sines: Float[Tensor, "T half"],
    gain: Float[Tensor, heads],
) -> Float[Tensor, "B T heads E"]:
    """Return gain * rotate(rms_norm(heads)), the gain one number a head."""
    if fused.is_profitable(heads):
        return fused.normalize_and_rotate(heads, cosines, sines, gain)
    if fused_heads.is_half_on_gpu(heads):
        return fused_heads.normalize_and_rotate_in_float32(heads, cosines, sines, gain)
    return rotate(rms_norm(heads), cosines, sines) * gain.to(heads.dtype)[:, None]


def rotate(
    x: Float[Tensor, "B T heads E"], cosines: Float[Tensor, "T half"], sines: Float[Tensor, "T half"]
) -> Float[Tensor, "B T heads E"]:
    """Return `x` with its leading dimensions rotated: (a, b) -> (a cos + b sin, -a sin + b cos), a and b the halves."""
    half = cosines.size(-1)
    cos, sin = cosines.to(x.dtype)[:, None, :], sines.to(x.dtype)[:, None, :]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)
