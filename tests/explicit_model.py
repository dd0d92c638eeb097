"""The model once more, written for reading: float64, one text at a time, loops and an explicit softmax, every option.

An oracle for the batched, fused and pruned code of `bytejepa.model`: it shares none of it, only names and shapes.
"""

import math

import torch
from torch import Tensor

from bytejepa.config import ModelConfig, RunConfig
from bytejepa.model.transformer import ByteLM

BOS = 1
EPSILON = torch.finfo(torch.float32).eps


def explicit_weights(model: ByteLM) -> dict[str, Tensor]:
    """The model's parameters as float64 leaves, by name."""
    return {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}


def explicit_logits(config: RunConfig, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits of the next id, (B, T, 260) float64."""
    return torch.stack([_text_logits(config, weights, row.tolist()) for row in ids])


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def _text_logits(config: RunConfig, w: dict[str, Tensor], ids: list[int]) -> Tensor:
    m, T = config.model, len(ids)
    starts = [m.document_masking and value == BOS for value in ids]
    x = w["token_embedding.weight"][ids]
    if m.bigram_rows is not None:
        last = m.bigram_rows - 1
        rows = [last if t == 0 or starts[t] else _pair_row(m, ids[t - 1], ids[t]) for t in range(T)]
        x = x + w["bigram.scale"] * w["bigram.embedding.weight"][rows] @ w["bigram.projection.weight"].T
    if m.ngram_orders:
        rows_of_orders = [
            [_ngram_row(m, ids, starts, t, n) + place * m.ngram_rows for place, n in enumerate(m.ngram_orders)]
            for t in range(T)
        ]
        rows_side_by_side = w["ngrams.embedding.weight"][torch.tensor(rows_of_orders)].flatten(1)
        x = x + w["ngrams.scale"] * rows_side_by_side @ w["ngrams.projection.weight"].T
    x0 = rms(x)
    if m.smear:
        opening = w["smear.gate"].expand(T, -1)
        stops = starts
        if m.smear_gate == "input":
            opening = opening + (x0[:, :12] * w["smear.input_weight"]).sum(1, keepdim=True)
            stops = [value == BOS for value in ids]
        gate = torch.sigmoid(opening)
        before = [torch.zeros_like(x0[0]) if t == 0 or stops[t] else x0[t - 1] for t in range(T)]
        x0 = (1 - gate) * x0 + gate * torch.stack(before)
    x, stack = x0, []
    order = list(range(m.num_layers))
    if m.recurrent_layers:
        first, last = m.recurrent_layers
        order = order[: last + 1] + order[first : last + 1] + order[last + 1 :]
    place = 0
    positions = list(range(T))
    while place < len(order):
        if m.chunk_blocks and order[place] == m.chunk_blocks[0]:
            ends = positions[m.chunk_stride_bytes - 1 :: m.chunk_stride_bytes]
            before = after = x[ends]
            while m.chunk_blocks[0] <= order[place] <= m.chunk_blocks[1]:
                if ends:
                    after = _passed(config, w, order, place, after, x0, ids, starts, stack, ends)
                place += 1
            x = _with_changes(w["chunk_scale"], x, after - before, ends, starts)
        else:
            x = _passed(config, w, order, place, x, x0, ids, starts, stack, positions)
            place += 1
    if config.jepa.enabled and config.jepa.inject:
        x = _injected(config, w, x, starts)
    return m.logit_softcap * torch.tanh(rms(x) @ w["token_embedding.weight"].T / m.logit_softcap)


def _passed(
    config: RunConfig,
    w: dict[str, Tensor],
    order: list[int],
    place: int,
    x: Tensor,
    x0: Tensor,
    ids: list[int],
    starts: list[bool],
    stack: list[Tensor],
    positions: list[int],
) -> Tensor:
    """The residual at `positions` after the block at `place`, which pops a skip or pushes one."""
    m, encoders = config.model, len(order) // 2
    if place >= encoders and stack and m.skip_connections:
        skip = w["skip_weights"][place - encoders] * stack.pop()
        if m.skip_gates:
            kept = torch.sigmoid(w["skip_gates"][place - encoders])
            x = kept * x + (1 - kept) * skip
        else:
            x = x + skip
    x = _block(config, w, order[place], x, x0, ids, starts, positions)
    if place < encoders:
        stack.append(x)
    return x


def _with_changes(scale: Tensor, x: Tensor, changes: Tensor, ends: list[int], starts: list[bool]) -> Tensor:
    """Every position takes the change of the last chunk that has ended, if that was in its document."""
    out = list(x)
    for t in range(x.size(0)):
        ended = [c for c, end in enumerate(ends) if end <= t]
        if ended and not any(starts[ends[ended[-1]] + 1 : t + 1]):
            out[t] = x[t] + scale * changes[ended[-1]]
    return torch.stack(out)


def _pair_row(m: ModelConfig, previous: int, current: int) -> int:
    if m.bigram_table == "exact":
        return (previous - 4) * 256 + current - 4 if min(previous, current) >= 4 else 65_536
    return ((36313 * current) ^ (27191 * previous)) % (m.bigram_rows - 1)


def _ngram_row(m: ModelConfig, ids: list[int], starts: list[bool], t: int, n: int) -> int:
    run = ids[t - n + 1 : t + 1] if t >= n - 1 else []
    if not run or any(starts[t - n + 2 : t + 1]):
        return m.ngram_rows - 1
    number = 0
    for value in reversed(run):
        number = (number * 1_327_217_885 + value) % 2**31
    return (number * 1_327_217_885 % 2**31) * (m.ngram_rows - 1) // 2**31


def _block(
    config: RunConfig,
    w: dict[str, Tensor],
    layer: int,
    x: Tensor,
    x0: Tensor,
    ids: list[int],
    starts: list[bool],
    positions: list[int],
) -> Tensor:
    m, name = config.model, f"blocks.{layer}"
    scale = 1 / math.sqrt(layer + 1) if m.depth_scaled_norm else 1.0
    if m.residual_mix:
        x = w[f"{name}.residual_mix"][0] * x + w[f"{name}.residual_mix"][1] * x0[positions]
    before = rms(x)
    x = x + w[f"{name}.attention_scale"] * _attention(config, w, layer, scale * before, before, ids, starts, positions)
    mlp_input = before if layer >= m.num_layers - m.parallel_last_layers else rms(x)
    up = scale * mlp_input @ w[f"{name}.mlp.up.weight"].T
    hidden = torch.where(up > 0, up, 0.5 * up) ** 2
    return x + w[f"{name}.mlp_scale"] * (hidden @ w[f"{name}.mlp.down.weight"].T)


def _attention(
    config: RunConfig,
    w: dict[str, Tensor],
    layer: int,
    x: Tensor,
    unscaled: Tensor,
    ids: list[int],
    starts: list[bool],
    positions: list[int],
) -> Tensor:
    m, name, T, N = config.model, f"blocks.{layer}.attention", len(ids), len(positions)
    E, per_group = m.head_dim, m.num_heads // m.num_kv_heads
    window = m.window_of_layer[layer] or T
    if m.chunk_blocks and m.chunk_blocks[0] <= layer <= m.chunk_blocks[1]:
        window = max(1, window // m.chunk_stride_bytes)
    document = [sum(starts[: t + 1]) for t in positions]
    visible = torch.tensor(
        [[j <= i and i - j < window and document[j] == document[i] for j in range(N)] for i in range(N)]
    )
    heads = []
    for h in range(m.num_heads):
        g = h // per_group
        q = (
            _rotated(config, rms(x @ w[f"{name}.query.weight"][h * E : (h + 1) * E].T), positions, T)
            * w[f"{name}.query_gain"][h]
        )
        k = _rotated(config, rms(x @ w[f"{name}.key.weight"][g * E : (g + 1) * E].T), positions, T)
        v = x @ w[f"{name}.value.weight"][g * E : (g + 1) * E].T
        if layer >= m.num_layers - m.value_embedding_last_layers:
            v = v + w[f"{name}.value_embedding.weight"][[ids[t] for t in positions]][:, g * E : (g + 1) * E]
        share = torch.exp(q @ k.T / math.sqrt(E)) * visible
        y = share @ v / share.sum(1, keepdim=True)
        if m.attention_gate_dims:
            opening = unscaled[:, : m.attention_gate_dims] @ w[f"{name}.gate.weight"][h]
            y = y * 2 * torch.sigmoid(opening)[:, None]
        if layer >= m.num_layers - m.xsa_last_layers:
            own = v / v.norm(dim=1, keepdim=True)
            y = y - (y * own).sum(1, keepdim=True) * own
        heads.append(y)
    return torch.cat(heads, dim=1) @ w[f"{name}.output.weight"].T


def _rotated(config: RunConfig, x: Tensor, positions: list[int], T: int) -> Tensor:
    m = config.model
    R = m.rotary_dims or m.head_dim
    base = m.rotary_base
    if m.rotary_length_bytes < T and R > 2:
        base *= (T / m.rotary_length_bytes) ** (R / (R - 2))
    out = x.clone()
    for pair in range(R // 2):
        angle = torch.tensor(positions, dtype=torch.float64) * base ** (-2 * pair / R)
        a, b = x[:, pair], x[:, R // 2 + pair]
        out[:, pair] = a * angle.cos() + b * angle.sin()
        out[:, R // 2 + pair] = b * angle.cos() - a * angle.sin()
    return out


def _injected(config: RunConfig, w: dict[str, Tensor], x: Tensor, starts: list[bool]) -> Tensor:
    P, detached = config.jepa.chunk_bytes, config.jepa.gradient == "detached"

    def path(z: Tensor, part: str) -> Tensor:
        hidden = rms(z @ w[f"jepa.{part}.up.weight"].T)
        return (hidden * torch.sigmoid(hidden)) @ w[f"jepa.{part}.down.weight"].T

    read = x.detach() if detached else x
    out = list(x)
    latent: Tensor = w["jepa.start"]
    for begin in range(0, x.size(0) // P * P, P):
        fresh = begin  # where the text that goes on after this chunk begins in it
        for t in range(begin, begin + P):
            if starts[t]:
                latent, fresh = w["jepa.start"], t
            predicted = path(latent, "predictor")
            out[t] = x[t] + (predicted.detach() if detached else predicted) @ w["jepa.injection.weight"].T
        if config.jepa.context == "causal":
            latent = rms(read[begin + P - 1])
        else:
            latent = path(read[fresh : begin + P].mean(0), "projector")
    return torch.stack(out)
