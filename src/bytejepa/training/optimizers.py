"""Which parameter is trained by what (spec section 4).

| parameters | optimiser | learning rate | weight decay |
|---|---|---|---|
| matrices of the blocks, bigram and n-gram projections | Muon | matrix_lr | muon_weight_decay |
| token, bigram, n-gram and value embeddings, extra heads | AdamW | embedding_lr | adam_weight_decay |
| vectors, scalars, mixes, gains, skip weights, gates | AdamW | scalar_lr | adam_weight_decay |
| JEPA module | AdamW | jepa_lr | 0 |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bytejepa.config import OptimizerConfig
from bytejepa.model.initialization import is_vector
from bytejepa.training.distributed import Ranks
from bytejepa.training.gradient_buckets import GradientBuckets, backward_order
from bytejepa.training.muon import Muon, newton_schulz_iteration

Role = Literal["matrix", "embedding", "scalar", "jepa"]


def role_of(name: str, parameter: Tensor) -> Role:
    """Return which row of the table above the parameter called `name` belongs to."""
    if name.startswith("jepa."):
        return "jepa"
    if name.endswith("embedding.weight") or name.startswith("multi_token_heads"):
        return "embedding"
    if is_vector(name, parameter) or name.endswith("gate.weight"):
        return "scalar"
    return "matrix"


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all `gradients` together, float32.

    As torch.nn.utils.get_total_norm does, but those of a dtype apart: numbers of two dtypes are not stacked in one kernel but
    copied one by one, and the norm of a bfloat16 gradient is not rounded to bfloat16.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    norms = [norm for group in by_dtype.values() for norm in torch._foreach_norm(group, 2, dtype=torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms))


class Optimizers:
    """Muon and AdamW, stepped together."""

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, ranks: Ranks, *, compile_update: bool = False
    ) -> None:
        self.config = config
        self.ranks = ranks
        by_role: dict[Role, list[tuple[str, Tensor]]] = {"matrix": [], "embedding": [], "scalar": [], "jepa": []}
        for name, parameter in model.named_parameters():
            by_role[role_of(name, parameter)].append((name, parameter))
        self.parameters = [parameter for group in by_role.values() for _, parameter in group]
        self.gradient_buckets = GradientBuckets(backward_order(model), ranks)
        self.muon = Muon(
            by_role["matrix"],
            learning_rate=config.matrix_lr,
            weight_decay=config.muon_weight_decay,
            iteration=newton_schulz_iteration(config.newton_schulz_coefficients, config.newton_schulz_steps),
            normalizes_rows=config.muon_row_normalization,
            square_decay=config.muon_beta2,
            cautious_decay=config.muon_cautious_weight_decay,
            ranks=ranks,
            compile_update=compile_update,
        )
        rates: list[tuple[Role, float, float]] = [
            ("embedding", config.embedding_lr, config.adam_weight_decay),
            ("scalar", config.scalar_lr, config.adam_weight_decay),
            ("jepa", config.jepa_lr, 0.0),
        ]
        self.adam_names = [name for role, _, _ in rates for name, _ in by_role[role]]
        groups = [
            {
                "params": [parameter for _, parameter in by_role[role]],
                "lr": rate,
                "weight_decay": decay,
                "base_lr": rate,
            }
            for role, rate, decay in rates
            if by_role[role]
        ]
        self.adam = torch.optim.AdamW(
            groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True
        )
        self.adam_parameters = [parameter for group in self.adam.param_groups for parameter in group["params"]]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, *, learning_rate_scale: float, momentum: float) -> Tensor:
        """Average the gradients over ranks, clip them, update every parameter; return the gradient norm before clipping,
        a 0-dimensional tensor that has not been waited for."""
        self.gradient_buckets.finish()
        for parameter in self.parameters:
            if parameter.grad is None:
                # a part left out of this step's loss still decays, and its step counter moves on, as in the reference
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = total_norm(gradients)
        if self.config.gradient_clip is None:
            clip = torch.ones_like(norm)
        else:
            clip = (self.config.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([parameter.grad for parameter in self.adam_parameters], clip)
        gathering = self.muon.start(momentum=momentum, clip=clip)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_scale
        self.adam.step()  # while Muon's last updates are on their way
        self.muon.finish(gathering, learning_rate_scale=learning_rate_scale)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Return every optimiser tensor by name: `muon.{momentum,square}.NAME`, `adam.{mean,square,step}.NAME` (a collective
        call)."""
        state = {f"muon.{name}": value for name, value in self.muon.state().items()}
        for name, parameter in zip(self.adam_names, self.adam_parameters, strict=True):
            kept = self.adam.state.get(parameter)
            if kept:
                state[f"adam.mean.{name}"] = kept["exp_avg"]
                state[f"adam.square.{name}"] = kept["exp_avg_sq"]
                state[f"adam.step.{name}"] = kept["step"]
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned, on any number of ranks."""
        prefix = "muon."
        self.muon.load_state({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
        self.adam.state.clear()
        for name, parameter in zip(self.adam_names, self.adam_parameters, strict=True):
            if f"adam.mean.{name}" not in state:
                continue
            self.adam.state[parameter] = {
                "exp_avg": state[f"adam.mean.{name}"].to(parameter).clone(),
                "exp_avg_sq": state[f"adam.square.{name}"].to(parameter).clone(),
                "step": state[f"adam.step.{name}"].to(parameter.device, torch.float32).clone(),
            }
