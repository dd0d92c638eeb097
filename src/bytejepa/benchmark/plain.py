"""The reference system written the plain way: optimisers and training step around `plain_model`'s modules.

The baseline that the fast path is timed against, and its oracle in tests: one loop iteration a tensor, nothing compiled
or fused, no code shared with `bytejepa.training`. Sections (s.) are those of the reference's specification. Shapes:
B batch, T bytes of context; R rows and C columns of a matrix. Losses are in nats a byte.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytejepa.benchmark.plain_model import PlainConfig, PlainJepa, PlainModel, sigreg

__all__ = [
    "PlainConfig", "PlainJepa", "PlainModel", "PlainMuon", "PlainRecipe", "PlainStep", "build_plain_optimizers",
    "newton_schulz", "plain_train_step", "sigreg", "start_ema", "update_ema",
]  # fmt: skip

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # s. 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainRecipe:
    """Hyper-parameters of the optimisers (s. 4)."""

    matrix_lr: float = 0.025
    embedding_lr: float = 0.035
    scalar_lr: float = 0.025
    jepa_lr: float = 0.001
    weight_decay: float = 0.04
    """Decoupled; all groups but JEPA's."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    newton_schulz_steps: int = 5
    clip_norm: float = 0.3
    """Global gradient norm."""
    sigreg_weight: float = 0.02
    """Weight of SIGReg beside the prediction loss (s. 3)."""
    ema_decay: float = 0.997
    """A step."""


def newton_schulz(g: Float[Tensor, "R C"], steps: int) -> Float[Tensor, "R C"]:
    """A matrix near the orthogonal factor of g, by the quintic iteration of s. 4; float32 on a CPU, else bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = g.float() if g.device.type == "cpu" else g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(g.dtype)


class PlainMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, one matrix at a time (s. 4)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, steps: int) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.99, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient; `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p.grad)
                m = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                u = newton_schulz(p.grad + group["momentum"] * m, group["steps"])
                u *= math.sqrt(max(1, p.size(0) / p.size(1)))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(u, alpha=-group["lr"])


def build_plain_optimizers(model: PlainModel, recipe: PlainRecipe | None = None) -> list[torch.optim.Optimizer]:
    """Muon, then AdamW for embeddings, for vectors and for JEPA (where there is one), by the groups of s. 4."""
    recipe = recipe or PlainRecipe()
    matrices, embeddings, vectors, jepa = [], [], [], []
    for name, p in model.named_parameters():
        if name.startswith("jepa_"):
            jepa.append(p)
        elif name in ("tok_emb.weight", "bigram.embed.weight"):
            embeddings.append(p)
        elif name.endswith(".weight"):
            matrices.append(p)
        else:
            vectors.append(p)
    optimizers: list[torch.optim.Optimizer] = [
        PlainMuon(matrices, recipe.matrix_lr, recipe.weight_decay, recipe.newton_schulz_steps)
    ]
    for params, lr, decay in (
        (embeddings, recipe.embedding_lr, recipe.weight_decay),
        (vectors, recipe.scalar_lr, recipe.weight_decay),
        (jepa, recipe.jepa_lr, 0.0),
    ):
        if params:
            optimizers.append(torch.optim.AdamW(params, lr=lr, betas=recipe.betas, eps=recipe.eps, weight_decay=decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def start_ema(model: PlainModel) -> dict[str, Tensor]:
    """A float32 copy of every weight: the moving average before the first step (s. 4)."""
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: PlainModel, decay: float) -> None:
    """Moves every average towards its weight, in place (s. 4)."""
    for name, p in model.named_parameters():
        ema[name].mul_(decay).add_(p.float(), alpha=1 - decay)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainStep:
    """What one training step saw before its update: scalars, left on the device."""

    ce: Tensor
    """Nats a byte."""
    prediction: Tensor
    sigreg: Tensor
    grad_norm: Tensor
    """Global, before clipping."""


def plain_train_step(
    model: PlainModel,
    optimizers: Sequence[torch.optim.Optimizer],
    ema: dict[str, Tensor],
    inputs: Int[Tensor, "B T"],
    targets: Int[Tensor, "B T"],
    lr_scale: float,
    momentum: float,
    jepa_lambda: float,
    recipe: PlainRecipe | None = None,
) -> PlainStep:
    """Losses and gradient norm of one step of s. 4: forward, backward, clip, all optimisers, moving average."""
    recipe = recipe or PlainRecipe()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_scale * group["peak_lr"]
            if isinstance(optimizer, PlainMuon):
                group["momentum"] = momentum
        optimizer.zero_grad()
    ce, prediction, regulariser = model.losses(inputs, targets)
    loss = ce + jepa_lambda * (prediction + recipe.sigreg_weight * regulariser)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
    update_ema(ema, model, recipe.ema_decay)
    return PlainStep(ce=ce.detach(), prediction=prediction.detach(), sigreg=regulariser.detach(), grad_norm=grad_norm)
