"""Causal attention with grouped queries: one function, several kernels (spec section 2).

`choose_backend` picks the fastest kernel that the machine and the settings allow, or refuses with the reason.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bytejepa.config import AttentionBackend
from bytejepa.errors import ConfigError
from bytejepa.model import blocked_attention, fused, fused_heads
from bytejepa.model.layers import Linear, add_projected, normalize_and_rotate

Mask = Any
"""None, a bool tensor, for `flex` a BlockMask, for `flash3` and `flash4` the number of ids that a query sees, for `blocked`
the first of them."""

Kernel = Literal["flash4", "flash3", "cudnn", "blocked", "flash", "flex", "efficient", "math"]


HALF_PRECISION_ONLY: frozenset[Kernel] = frozenset({"flash4", "flash3", "cudnn", "flash"})
"""Of the kernels of a GPU."""

FASTER_WITHOUT_GROUPS: frozenset[Kernel] = frozenset({"flash3"})
"""Kernels whose backward pass sums over groups in float32 buffers, which takes longer than to repeat keys and values for them."""

_available: dict[str, dict[Kernel, str | None]] = {}


def available_backends(device_type: str) -> dict[Kernel, str | None]:
    """Return for each kernel None if this machine has it, or else the reason why not.

    Kept in a dictionary, into which torch.compile can look; functools.cache it would trace through, with a warning.
    """
    if device_type not in _available:
        _available[device_type] = _find_backends(device_type)
    return _available[device_type]


def _find_backends(device_type: str) -> dict[Kernel, str | None]:
    cuda = device_type == "cuda" and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    no_cuda = None if cuda else "needs a CUDA device"

    def needs(module: str, minimum: int, *, most: int | None = None) -> str | None:
        if no_cuda or capability[0] < minimum or (most is not None and capability[0] > most):
            wanted = f"{minimum}.0" if most is None else f"{minimum}.x"
            return no_cuda or f"needs compute capability {wanted}, this GPU has {capability[0]}.{capability[1]}"
        return None if importlib.util.find_spec(module) else f"the module {module} is not installed"

    return {
        "flash4": needs("flash_attn.cute", 9)
        if importlib.util.find_spec("flash_attn")
        else no_cuda or "the module flash_attn.cute is not installed",
        "flash3": needs("flash_attn_interface", 9, most=9),  # its kernels are made for Hopper alone
        "cudnn": no_cuda
        or (
            None
            if capability[0] >= 9 and torch.backends.cudnn.is_available()
            else "needs cuDNN and compute capability 9.0"
        ),
        "blocked": _why_not_blocked(device_type),
        "flash": None,
        "flex": no_cuda,
        "efficient": no_cuda,
        "math": None,
    }


def _why_not_blocked(device_type: str) -> str | None:
    if device_type != "cpu":
        return "it is for CPUs"
    return None if blocked_attention.is_installed() else "its kernels are not there"


def choose_backend(
    requested: AttentionBackend,
    device_type: str,
    *,
    windows: bool = False,
    documents: bool = False,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    head_width: int = blocked_attention.HEAD_WIDTHS,
) -> Kernel:
    """Return the kernel to use on `device_type`.

    `windows`, `documents`: whether such borders apply somewhere; `dtype`: of queries, keys and values; `compiled`: under
    torch.compile, without which FlexAttention writes all scores; `head_width`: E.
    Raises: ConfigError if `requested` is impossible here, with the reason.
    """
    available, on_gpu = available_backends(device_type), device_type == "cuda"
    masked = windows or documents
    refused: dict[Kernel, str] = {}
    for name, why in available.items():
        if why is not None:
            refused[name] = why
        elif on_gpu and dtype not in (torch.bfloat16, torch.float16) and name in HALF_PRECISION_ONLY:
            refused[name] = f"it computes in half precision only, this is {str(dtype).removeprefix('torch.')}"
        elif unfit := _why_not_so_wide(name, head_width, dtype, on_gpu=on_gpu):
            refused[name] = f"its heads are {head_width} wide, {unfit}"
        elif masked and not _takes_masks(name, documents=documents, on_gpu=on_gpu):
            refused[name] = "it cannot mask windows or documents here"
    possible = [name for name in available if name not in refused]
    if requested != "auto":
        if requested in refused:
            hint = f"possible: {', '.join(possible)}"
            raise ConfigError(
                f"training.attention {requested} is impossible on {device_type}: {refused[requested]}", hint=hint
            )
        return requested
    sparse: tuple[Kernel, ...] = ("flex", "efficient") if masked and compiled else ("efficient", "flex")
    order: tuple[Kernel, ...] = ("flash3", "flash4", "cudnn", "blocked", "flash", *sparse, "math")
    return next(name for name in order if name in possible)


def _why_not_so_wide(name: Kernel, head_width: int, dtype: torch.dtype, *, on_gpu: bool) -> str | None:
    """Return what is wrong with heads of this width, None if nothing is. Source: the checks of PyTorch's `sdp_utils.cpp`, of
    `flex_attention` and of FlashAttention's interfaces."""
    if name == "blocked":
        step = blocked_attention.HEAD_WIDTHS
        return f"no multiple of {step}" if head_width % step else None
    if not on_gpu:
        return None
    most = {"flash4": 128, "flash3": 256, "cudnn": 128, "flash": 256}.get(name, head_width)
    steps: dict[Kernel, int] = {"flash4": 8, "flash3": 8, "cudnn": 8, "efficient": 4 if dtype == torch.float32 else 8}
    step = steps.get(name, 1)
    if head_width > most:
        return f"more than {most}"
    if head_width % step:
        return f"no multiple of {step}"
    return "less than 16" if name == "flex" and head_width < 16 else None


def _takes_masks(name: Kernel, *, documents: bool, on_gpu: bool) -> bool:
    if name in ("flash3", "flash4"):
        return not documents
    return name in ("flex", "efficient", "math") or (name in ("blocked", "flash") and not on_gpu)


def attention_mask(
    length: int, window: int | None, document_ids: Int[Tensor, "B T"] | None, device: torch.device
) -> Tensor | None:
    """Return which keys each query may see, bool (1 or B, 1, T, T), or None if plain causality is the only bound."""
    if (window is None or window >= length) and document_ids is None:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    mask = (distance >= 0)[None, None]
    if window is not None:
        mask = mask & (distance < window)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return mask


def causal_attention(
    q: Float[Tensor, "B T H E"],
    k: Float[Tensor, "B T G E"],
    v: Float[Tensor, "B T G E"],
    *,
    backend: Kernel,
    mask: Mask = None,
) -> Float[Tensor, "B T H E"]:
    """Return softmax(q k^T / sqrt(E)) v over the keys at or before each query that `mask` allows.

    `mask` is what `attention_mask` returned, for `flex` a BlockMask, for `flash3` and `flash4` the window or None, for
    `blocked` what `first_keys` did; the kernels without masks take None only.
    """
    if backend in ("flash3", "flash4"):
        return _flash_on_hopper(q, k, v, backend, mask)
    if backend == "blocked":
        if blocked_attention.takes(q, k, v):
            return blocked_attention.causal_attention(q, k, v, mask)
        backend, mask = "flash", None if mask is None else blocked_attention.as_mask(mask)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, E)
    if backend == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        assert mask is not None, "flex attention is causal through its mask only"
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)
    grouped = q.size(1) != k.size(1)
    if grouped and (q.device.type == "cpu" or backend == "efficient"):
        # the CPU flash kernel and the memory-efficient one have no grouped queries
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
        grouped = False
    kernels = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    with sdpa_kernel(kernels[backend]):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def _flash_on_hopper(q: Tensor, k: Tensor, v: Tensor, backend: Kernel, window: int | None) -> Tensor:
    # their windows count the keys before the query; without one, the two packages write "no bound" differently
    bounds = {} if window is None else {"window_size": (window - 1, 0)}
    if backend == "flash3":
        from flash_attn_interface import flash_attn_func as flash
    else:
        from flash_attn.cute import flash_attn_func as flash
    out = flash(q, k, v, causal=True, **bounds)
    return out[0] if isinstance(out, tuple) else out


def masked_attention(
    q: Float[Tensor, "B N H E"], k: Float[Tensor, "B T G E"], v: Float[Tensor, "B T G E"], mask: Tensor
) -> Float[Tensor, "B N H E"]:
    """Return attention of any queries under an explicit bool mask (1 or B, 1, N, T), by whichever SDPA kernel takes it."""
    repeats = q.size(2) // k.size(2)
    k, v = (x.transpose(1, 2).repeat_interleave(repeats, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def drop_along(y: Float[Tensor, "B T H E"], v: Float[Tensor, "B T G E"]) -> Float[Tensor, "B T H E"]:
    """Return each head without its component along its group's value vector at its own position (XSA)."""
    if fused.is_profitable(y):
        return fused.drop_along(y, v)
    groups = y.unflatten(2, (v.size(2), -1))  # (B, T, G, H/G, E)
    direction = F.normalize(v, dim=-1)[:, :, :, None]
    return (groups - (groups * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys, partial rotary code and query gain.

    Optional: XSA (`drop_own_value`), a gate on each head's output that reads the first `gate_dims` dimensions of the
    input, and an embedding of the current id, one of `num_value_embeddings`, added to the values.
    """

    def __init__(
        self,
        model_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        query_gain: float,
        drop_own_value: bool,
        gate_dims: int | None = None,
        num_value_embeddings: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = model_dim // num_heads
        self.drop_own_value = drop_own_value
        kv_dim = num_kv_heads * self.head_dim
        self.query = Linear(model_dim, model_dim)
        self.key = Linear(model_dim, kv_dim)
        self.value = Linear(model_dim, kv_dim)
        self.output = Linear(model_dim, model_dim)
        self.query_gain = nn.Parameter(torch.full((num_heads,), query_gain))
        self.gate = None if gate_dims is None else Linear(gate_dims, num_heads)
        self.value_embedding = None if num_value_embeddings is None else nn.Embedding(num_value_embeddings, kv_dim)

    def project(
        self,
        x: Float[Tensor, "B T D"],
        ids: Int[Tensor, "B T"],
        cosines: Float[Tensor, "T half"],
        sines: Float[Tensor, "T half"],
        *,
        norm_scale: float = 1.0,
        repeats: int = 1,
    ) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B T _ E"], Float[Tensor, "B T _ E"]]:
        """Return queries (gain included), keys and values of norm_scale * x, queries and keys normalised and rotated.

        Each of the G keys and values comes `repeats` times, where `_repeats` said so.
        """
        H, G, E = self.num_heads, self.num_kv_heads, self.head_dim
        # one product for the three maps; queries and keys go through norm and rotation together
        weight = torch.cat((self.query.weight, self.key.weight, self.value.weight))
        heads = F.linear(x, (weight * norm_scale).to(x.dtype)).unflatten(-1, (H + 2 * G, E))
        gain = torch.cat((self.query_gain, self.query_gain.new_ones(G)))
        if fused_heads.is_half_on_gpu(heads):
            q, k, v = fused_heads.queries_keys_values(heads, cosines, sines, gain, H, repeats=repeats)
        else:
            qk, v = heads.split((H + G, G), dim=2)
            q, k = normalize_and_rotate(qk, cosines, sines, gain).split((H, G), dim=2)
        return q, k, self._with_embedding(v, ids)

    def _repeats(self, x: Tensor, backend: Kernel) -> int:
        """Return how often a key should be handed to the kernel."""
        possible = fused_heads.is_half_on_gpu(x) and torch.is_grad_enabled() and self.value_embedding is None
        return self.num_heads // self.num_kv_heads if possible and backend in FASTER_WITHOUT_GROUPS else 1

    def _with_embedding(self, v: Tensor, ids: Tensor) -> Tensor:
        if self.value_embedding is None:
            return v
        return v + F.embedding(ids, self.value_embedding.weight).to(v.dtype).view_as(v)

    def project_tail(
        self,
        x: Float[Tensor, "B T D"],
        ids: Int[Tensor, "B T"],
        cosines: Float[Tensor, "T half"],
        sines: Float[Tensor, "T half"],
        *,
        first_query: int,
        norm_scale: float,
    ) -> tuple[Float[Tensor, "B N H E"], Float[Tensor, "B T G E"], Float[Tensor, "B T G E"]]:
        """Return what `project` does, with queries of the positions from `first_query` on only."""
        H, G, E = self.num_heads, self.num_kv_heads, self.head_dim
        tail = F.linear(x[:, first_query:], (self.query.weight * norm_scale).to(x.dtype)).unflatten(-1, (H, E))
        q = normalize_and_rotate(tail, cosines[first_query:], sines[first_query:], self.query_gain)
        weight = torch.cat((self.key.weight, self.value.weight))
        k, v = F.linear(x, (weight * norm_scale).to(x.dtype)).unflatten(-1, (2 * G, E)).split((G, G), dim=2)
        k = normalize_and_rotate(k, cosines, sines, self.query_gain.new_ones(G))
        return q, k, self._with_embedding(v, ids)

    def gated(self, y: Float[Tensor, "B T H E"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H E"]:
        """Return the heads, each times twice the sigmoid of its gate, which reads the attention's input `x`."""
        if self.gate is None:
            return y
        return y * (2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features])))[..., None]

    def merge(
        self,
        y: Float[Tensor, "B T H E"],
        v: Float[Tensor, "B T G E"],
        residual: Float[Tensor, "B T D"],
        scale: Float[Tensor, D],
    ) -> Float[Tensor, "B T D"]:
        """Return residual + scale * (output projection of the heads), after XSA where this block has it."""
        if self.drop_own_value:
            y = drop_along(y, v)
        return add_projected(residual, y.flatten(2), self.output.weight, scale)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        ids: Int[Tensor, "B T"],
        cosines: Float[Tensor, "T half"],
        sines: Float[Tensor, "T half"],
        residual: Float[Tensor, "B T D"],
        *,
        norm_scale: float,
        scale: Float[Tensor, D],
        backend: Kernel,
        mask: Mask = None,
    ) -> Float[Tensor, "B T D"]:
        """Return residual + scale * attention(norm_scale * x)."""
        repeats = self._repeats(x, backend)
        q, k, v = self.project(x, ids, cosines, sines, norm_scale=norm_scale, repeats=repeats)
        y = self.gated(causal_attention(q, k, v, backend=backend, mask=mask), x)
        return self.merge(y, v[:, :, ::repeats], residual, scale)
