"""The reference's model written the plain way: eager PyTorch modules, one a thing (the training step is in `plain`).

It shares no code with `bytejepa.model`, so that it can be its oracle. Nothing is compiled, fused or batched beyond what
a competent PyTorch user writes first, and nothing is made slow on purpose. Sections (s.) are those of the reference's
specification; parameters carry the reference's own state-dict names.

Shapes: B batch, T bytes of context, D model width, H query heads, G key/value heads, E head width, M MLP width,
V vocabulary, P bytes in a chunk, C = floor(T/P) chunks, Z latent width, N = B C latents, S SIGReg directions,
K SIGReg knots.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytejepa.errors import ConfigError

ROTARY_BASE = 10_000.0  # s. 2
ROTARY_CONTEXT = 4096  # bytes; beyond it the base grows (s. 2)
SOFT_CAP = 30.0  # nats; bound on the absolute value of a logit (s. 2)
ORTHOGONAL_LIMIT = 64  # a matrix with a smaller side is not initialised orthogonally (s. 2)
SIGREG_DIRECTIONS, SIGREG_KNOTS = 256, (0.2, 3.0, 17)  # S; first, last and number of the knots t (s. 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainJepa:
    """Sizes of the JEPA module (s. 3)."""

    chunk_size: int = 8
    """P, bytes."""
    latent_dim: int = 256
    """Z."""
    hidden_dim: int = 256
    """Width of the projector's hidden layer; the predictor's is Z."""
    num_directions: int = SIGREG_DIRECTIONS
    """S, directions of SIGReg."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainConfig:
    """Sizes of the whole model; the defaults are the submitted run's (s. 2 and 8)."""

    vocab_size: int = 260
    """V: 256 bytes and four specials."""
    num_layers: int = 13
    """Blocks; the first half (rounded down) pushes skips, the rest pops them."""
    model_dim: int = 512
    """D."""
    num_heads: int = 8
    """H; divides D."""
    num_kv_heads: int = 4
    """G; divides H."""
    mlp_ratio: float = 2.0
    """M / D."""
    bigram_rows: int = 4096
    """N, rows of the bigram table; the last one belongs to the first position."""
    bigram_dim: int = 32
    """Width of the bigram table."""
    xsa_last_layers: int = 4
    """How many of the last blocks remove the component along their own value vector."""
    rotary_dims: int = 16
    """Leading dimensions of each head that are rotated; even, at most E."""
    jepa: PlainJepa | None = PlainJepa()
    """None: no JEPA module, no injection."""

    def __post_init__(self) -> None:
        if self.model_dim % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"D={self.model_dim}, H={self.num_heads}, G={self.num_kv_heads}: H divides D, G divides H"
            )
        if self.rotary_dims % 2 or self.rotary_dims > self.model_dim // self.num_heads:
            raise ConfigError(f"rotary_dims={self.rotary_dims}: even and at most E={self.model_dim // self.num_heads}")


def rms(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x over its root mean square along the last axis: no weight, torch's default eps for the dtype (s. 2)."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(seq_len: int, dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's rotary angles, each (T, dims/2) (s. 2)."""
    base = ROTARY_BASE
    if seq_len > ROTARY_CONTEXT:
        base *= (seq_len / ROTARY_CONTEXT) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Float[Tensor, "B H T E"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B H T E"]:
    """x with its leading rotary dimensions turned as half-split pairs, the others untouched (s. 2)."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class SmearGate(nn.Module):
    """Mixes each position with the one before it (s. 2)."""

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(model_dim))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """(1 - g) x_t + g x_{t-1} with g = sigmoid(gate) and x_{-1} = 0."""
        g = torch.sigmoid(self.gate)
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        return (1 - g) * x + g * before


class BigramHash(nn.Module):
    """An embedding of the last two ids through a hashed table (s. 2)."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.05))
        self.embed = nn.Embedding(config.bigram_rows, config.bigram_dim)
        self.proj = nn.Linear(config.bigram_dim, config.model_dim, bias=False)

    def rows(self, ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The table row of each position; the first position, which has no id before it, gets the last row."""
        last = self.embed.num_embeddings - 1
        hashed = ((36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])) % last
        return torch.cat((torch.full_like(ids[:, :1], last), hashed), dim=1)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """What is added to the byte embedding."""
        return self.proj(self.embed(self.rows(ids))) * self.scale


class Attention(nn.Module):
    """Causal attention with grouped queries, query and key norm, partial rotary and, in the last blocks, XSA (s. 2)."""

    def __init__(self, config: PlainConfig, *, exclude_self: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.exclude_self = config.num_heads, config.num_kv_heads, exclude_self
        D, E = config.model_dim, config.model_dim // config.num_heads
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), 1.5))
        self.c_q = nn.Linear(D, D, bias=False)
        self.c_k = nn.Linear(D, config.num_kv_heads * E, bias=False)
        self.c_v = nn.Linear(D, config.num_kv_heads * E, bias=False)
        self.proj = nn.Linear(D, D, bias=False)

    def forward(self, x: Float[Tensor, "B T D"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T D"]:
        """Attention's output after its projection; `cos` and `sin` are `rotary_tables`'."""
        B, T, D = x.shape
        q = self.c_q(x).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, H, T, E)
        k = self.c_k(x).view(B, T, self.num_kv_heads, -1).transpose(1, 2)  # (B, G, T, E)
        v = self.c_v(x).view(B, T, self.num_kv_heads, -1).transpose(1, 2)
        q = rotate(rms(q), cos, sin) * self.q_gain[:, None, None]
        k = rotate(rms(k), cos, sin)
        group = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, T, E)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.exclude_self:
            own = F.normalize(v, dim=-1)
            y = y - (y * own).sum(dim=-1, keepdim=True) * own
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """The block's MLP: leaky ReLU with slope 0.5, squared (s. 2)."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        M = int(config.mlp_ratio * config.model_dim)
        self.fc = nn.Linear(config.model_dim, M, bias=False)
        self.proj = nn.Linear(M, config.model_dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """proj(leaky_relu(fc(x))^2)."""
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    """One transformer block (s. 2)."""

    def __init__(self, config: PlainConfig, index: int) -> None:
        super().__init__()
        D = config.model_dim
        self.norm_scale = 1 / math.sqrt(index + 1)  # s_i, "LN scale"
        self.attn_scale = nn.Parameter(torch.ones(D))
        self.mlp_scale = nn.Parameter(torch.ones(D))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(D), torch.zeros(D))))
        self.attn = Attention(config, exclude_self=index >= config.num_layers - config.xsa_last_layers)
        self.mlp = MLP(config)

    def forward(
        self, x: Float[Tensor, "B T D"], x0: Float[Tensor, "B T D"], cos: Tensor, sin: Tensor
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after the block; `x0` is the stream before the first block."""
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        x = x + self.attn_scale * self.attn(self.norm_scale * rms(x), cos, sin)
        return x + self.mlp_scale * self.mlp(self.norm_scale * rms(x))


class JepaProjector(nn.Module):
    """Chunk means to latents (s. 3)."""

    def __init__(self, config: PlainConfig, jepa: PlainJepa) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.model_dim, jepa.hidden_dim, bias=False)
        self.fc2 = nn.Linear(jepa.hidden_dim, jepa.latent_dim, bias=False)

    def forward(self, h: Float[Tensor, "B C D"]) -> Float[Tensor, "B C Z"]:
        """z = W2 silu(rms(W1 h))."""
        return self.fc2(F.silu(rms(self.fc1(h))))


class JepaPredictor(nn.Module):
    """Each chunk's latent from the latent of the chunk before it (s. 3)."""

    def __init__(self, jepa: PlainJepa) -> None:
        super().__init__()
        self.start_token = nn.Parameter(torch.zeros(jepa.latent_dim))
        self.fc1 = nn.Linear(jepa.latent_dim, jepa.latent_dim, bias=False)
        self.fc2 = nn.Linear(jepa.latent_dim, jepa.latent_dim, bias=False)

    def forward(self, z: Float[Tensor, "B C Z"]) -> Float[Tensor, "B C Z"]:
        """p_c = V2 silu(rms(V1 z_{c-1})), where z_{-1} is the learned start token."""
        start = self.start_token.to(z.dtype).expand(z.size(0), 1, -1)
        before = torch.cat((start, z), dim=1)[:, : z.size(1)]
        return self.fc2(F.silu(rms(self.fc1(before))))


def sigreg(z: Float[Tensor, "N Z"], directions: Float[Tensor, "Z S"]) -> Float[Tensor, ""]:
    """Distance of the standardised latents from a normal law, by characteristic functions along directions (s. 3)."""
    z = z - z.mean(dim=0)
    z = z / z.std(dim=0).clamp_min(1e-6)
    t = torch.linspace(*SIGREG_KNOTS, device=z.device)
    angle = (z @ directions)[..., None] * t  # (N, S, K)
    real = angle.cos().mean(dim=0) - torch.exp(-t.square() / 2)  # (S, K)
    imaginary = angle.sin().mean(dim=0)
    return (real.square() + imaginary.square()).mean()


class PlainModel(nn.Module):
    """The byte-level transformer with its JEPA module (s. 2 and 3), its weights a function of the seed."""

    sigreg_directions: Tensor

    def __init__(self, config: PlainConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        D, encoders = config.model_dim, config.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(encoders, D))
        self.tok_emb = nn.Embedding(config.vocab_size, D)
        self.bigram = BigramHash(config)
        self.smear = SmearGate(D)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        if config.jepa is not None:
            self.jepa_projector = JepaProjector(config, config.jepa)
            self.jepa_predictor = JepaPredictor(config.jepa)
            self.jepa_injection = nn.Linear(config.jepa.latent_dim, D, bias=False)
            # Fixed by the seed, so not part of the state dict.
            directions = torch.empty(config.jepa.latent_dim, config.jepa.num_directions)
            self.register_buffer("sigreg_directions", directions, persistent=False)
        if not self.tok_emb.weight.is_meta:
            initialise(self, seed)

    def hidden(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The last block's output, before injection and final norm (s. 2)."""
        cos, sin = rotary_tables(ids.size(1), self.config.rotary_dims, ids.device)
        x0 = self.smear(rms(self.tok_emb(ids) + self.bigram(ids)))
        x, stack = x0, []
        encoders = self.config.num_layers // 2
        for block in self.blocks[:encoders]:
            x = block(x, x0, cos, sin)
            stack.append(x)
        for j, block in enumerate(self.blocks[encoders:]):
            if stack:
                x = x + self.skip_weights[j] * stack.pop()
            x = block(x, x0, cos, sin)
        return x

    def latents(self, x: Float[Tensor, "B T D"], chunk_size: int) -> tuple[Tensor, Tensor]:
        """Latents z and their predictions p, both (B, C, Z), of the whole chunks of the last block's output (s. 3)."""
        B, T, D = x.shape
        C = T // chunk_size
        h = x.detach()[:, : C * chunk_size].view(B, C, chunk_size, D).mean(dim=2)  # (B, C, D)
        z = self.jepa_projector(h)
        return z, self.jepa_predictor(z)

    def inject(self, x: Float[Tensor, "B T D"], p: Float[Tensor, "B C Z"], chunk_size: int) -> Float[Tensor, "B T D"]:
        """x plus each chunk's injected prediction; a ragged tail gets nothing (s. 3)."""
        added = self.jepa_injection(p.detach()).repeat_interleave(chunk_size, dim=1)
        return x + F.pad(added, (0, 0, 0, x.size(1) - added.size(1)))

    def head(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Soft-capped logits through the tied embedding (s. 2)."""
        return SOFT_CAP * torch.tanh(F.linear(rms(x), self.tok_emb.weight).float() / SOFT_CAP)

    def logits(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the id after each position."""
        x = self.hidden(ids)
        if self.config.jepa is not None:
            _, p = self.latents(x, self.config.jepa.chunk_size)
            x = self.inject(x, p, self.config.jepa.chunk_size)
        return self.head(x)

    def losses(self, inputs: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy (nats a byte), JEPA prediction loss and SIGReg, unweighted scalars; T is at least P.

        Without JEPA the last two are zero.
        """
        x = self.hidden(inputs)
        prediction = regulariser = torch.zeros((), device=x.device)
        if self.config.jepa is not None:
            z, p = self.latents(x, self.config.jepa.chunk_size)
            x = self.inject(x, p, self.config.jepa.chunk_size)
            prediction = F.mse_loss(p.float(), z.detach().float())
            regulariser = sigreg(z.float().flatten(0, 1), self.sigreg_directions)
        ce = F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())
        return ce, prediction, regulariser


@torch.no_grad()
def initialise(model: PlainModel, seed: int) -> None:
    """Fills every weight that does not start as a constant, and SIGReg's directions, from the seed (s. 2)."""
    generator = torch.Generator(device=model.tok_emb.weight.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name in ("bigram.embed.weight", "bigram.proj.weight", "jepa_injection.weight"):
            nn.init.zeros_(parameter)
        elif name == "tok_emb.weight":
            nn.init.normal_(parameter, std=0.005, generator=generator)
        elif name == "jepa_predictor.start_token":
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif name.startswith("blocks.") and name.endswith("proj.weight"):
            nn.init.zeros_(parameter)
        elif name.startswith("blocks.") and name.endswith(".weight") and min(parameter.shape) >= ORTHOGONAL_LIMIT:
            nn.init.orthogonal_(parameter, generator=generator)
        elif name.endswith(".weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)  # nn.Linear's own default
    if model.config.jepa is not None:
        directions = model.sigreg_directions.normal_(generator=generator)
        directions /= directions.norm(dim=0, keepdim=True)
