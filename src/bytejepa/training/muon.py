"""Muon: momentum, orthogonalised (spec section 4), with all matrices of one shape in one batched product.

    m <- mu m + g;   u = NS5(g + mu m);   w <- (1 - lr wd) w - lr sqrt(max(1, rows / cols)) u

With `normalizes_rows` the rows of g + mu m get unit length first (MuonEq-R). With `square_decay` b, u's rows (its columns, of
a wide matrix: what an orthogonal matrix of that shape leaves uneven) are divided by the root of a running mean of their
squares, and u keeps its norm (NorMuon; Li et al. 2025, arXiv 2510.05491, with the side chosen as in modded-nanogpt):

    s <- b s + (1 - b) mean(u^2);   u <- u / sqrt(s) * |u| / |u / sqrt(s)|

With `cautious_decay` weights that the update moves away from zero do not decay (Chen et al. 2025, arXiv 2510.12402).

Matrices of one shape go through the Newton-Schulz iteration as one batch. With several ranks each takes its share of
every batch and the updates are gathered, the gathering of one batch running while the next is computed.
Source: Jordan et al., "Muon" (2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bytejepa.training.distributed import Gathering, Ranks

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration, chosen by its authors for the largest slope at zero; singular values end in about [0.7, 1.2]."""


Coefficients = tuple[float, float, float]
"""a, b, c of one iteration x <- a x + b (x x^T) x + c (x x^T)^2 x."""

POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""The best polynomial of degree 5 for what the iterations before it left of singular values in [0.001, 1]; the last one
repeats. Source: Amsel et al., "The Polar Express" (2025)."""
POLAR_EXPRESS_SAFETY = 1.01
"""Singular values are taken for this factor larger than they are, against rounding errors in bfloat16: in the norm that the
first iteration divides by, and by every set but the last (same source)."""


def newton_schulz_iteration(kind: Literal["quintic", "polar_express"], steps: int) -> tuple[Coefficients, ...]:
    """Return the coefficients of each of `steps` iterations."""
    if kind == "quintic":
        return (QUINTIC,) * steps
    s = POLAR_EXPRESS_SAFETY
    # the first set does the norm's share too, so that `orthogonalize` divides by the norm alone
    factors = [s * s, *[s] * (len(POLAR_EXPRESS) - 2)]
    safe = tuple((a / f, b / f**3, c / f**5) for f, (a, b, c) in zip(factors, POLAR_EXPRESS, strict=False))
    return (safe + POLAR_EXPRESS[-1:] * steps)[:steps]


def orthogonalize(
    matrices: Float[Tensor, "*n rows columns"], iteration: tuple[Coefficients, ...] = (QUINTIC,) * 5
) -> Float[Tensor, "*n rows columns"]:
    """Return each matrix with its singular values driven to about 1: Newton-Schulz iterations on g / |g|_F.

    bfloat16 on CUDA, float32 elsewhere. The Gram matrix is that of the shorter side, as in the iteration of the wide
    orientation; nothing is transposed in memory for it.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.size(-2) > x.size(-1)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    iterate = _without_copies if x.is_cuda else _in_place
    for coefficients in iteration:
        x = iterate(x, x.mT @ x if tall else x @ x.mT, tall, *coefficients)
    return x


def _in_place(x: Tensor, gram: Tensor, tall: bool, a: float, b: float, c: float) -> Tensor:
    """Return a x + (b G + c G^2) x, of a tall x its mirror image; the scaled sums are folded into the products."""
    add_product = torch.baddbmm if x.ndim == 3 else torch.addmm
    polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
    return add_product(x, x, polynomial, beta=a) if tall else add_product(x, polynomial, x, beta=a)


def _without_copies(x: Tensor, gram: Tensor, tall: bool, a: float, b: float, c: float) -> Tensor:
    """Return the same as (a + b G + c G^2) x. On CUDA what a product is added to is copied first, by a kernel of its own; the
    polynomial a compiler fuses."""
    polynomial = b * gram + c * (gram @ gram)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    return x @ polynomial if tall else polynomial @ x


def even_out(
    update: Float[Tensor, "n rows columns"], square: Float[Tensor, "n _ _"], decay: float
) -> Float[Tensor, "n rows columns"]:
    """Return each matrix with its rows or columns, whichever `square` has a number for, divided by the root of `square`, the
    running mean of their squares, which is moved on; norms stay. It begins at zero: a common factor of it changes nothing."""
    square.lerp_(update.square().mean(dim=-1 if square.size(-1) == 1 else -2, keepdim=True), 1 - decay)
    evened = update * square.clamp_min(1e-20).rsqrt()
    norm, evened_norm = (torch.linalg.matrix_norm(x, keepdim=True) for x in (update, evened))
    return evened * (norm / evened_norm.clamp_min(1e-7))


@dataclasses.dataclass
class _Batch:
    """Matrices that share a shape, and this rank's slice of their state."""

    parameters: list[Tensor]
    update_scale: float
    """sqrt(max(1, rows / columns))."""
    first: int
    count: int
    momentum: Tensor
    """(count, rows, columns): the slice first .. first + count of this rank."""
    square: Tensor | None
    """(count, rows, 1), of a wide matrix (count, 1, columns): the running mean square of its updates."""

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this rank's matrices, by kind."""
        return {"momentum": self.momentum} | ({} if self.square is None else {"square": self.square})


def _update(
    gradient: Tensor,
    momentum: Tensor,
    square: Tensor | None,
    scale: float,
    mu: Tensor,
    clip: Tensor,
    iteration: tuple[Coefficients, ...],
    normalizes_rows: bool,
    square_decay: float,
) -> Tensor:
    """Return the update of a batch, whose `momentum` and `square` are moved on; `mu` and `clip` are 0-dimensional tensors so
    that nothing recompiles."""
    gradient = gradient.float() * clip
    momentum.mul_(mu).add_(gradient)
    direction = gradient + mu * momentum
    if normalizes_rows:
        direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True).clamp_min(1e-7)
    update = orthogonalize(direction, iteration).to(gradient.dtype)
    if square is not None:
        update = even_out(update, square, square_decay)
    return update * scale


class Muon:
    """The optimiser of the 2-D block matrices and of the projections of the bigram and n-gram tables."""

    def __init__(
        self,
        named_parameters: list[tuple[str, Tensor]],
        *,
        learning_rate: float,
        weight_decay: float,
        iteration: tuple[Coefficients, ...] = (QUINTIC,) * 5,
        normalizes_rows: bool = False,
        square_decay: float | None = None,
        cautious_decay: bool = False,
        ranks: Ranks,
        compile_update: bool = False,
    ) -> None:
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.iteration = iteration
        self.normalizes_rows = normalizes_rows
        self.square_decay = square_decay
        self.cautious_decay = cautious_decay
        self.ranks = ranks
        self.names = {id(parameter): name for name, parameter in named_parameters}
        self.update: Callable[..., Tensor] = torch.compile(_update, dynamic=False) if compile_update else _update
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for _, parameter in named_parameters:
            by_shape.setdefault((parameter.size(0), parameter.size(1)), []).append(parameter)
        # the largest batch first: its gathering overlaps with the arithmetic of the others
        shapes = sorted(by_shape, key=lambda shape: -(min(shape) ** 2) * max(shape) * len(by_shape[shape]))
        self.batches = [self._batch(by_shape[shape]) for shape in shapes]

    def _batch(self, parameters: list[Tensor]) -> _Batch:
        first, count = self.ranks.share(len(parameters))
        rows, columns = parameters[0].shape
        device = parameters[0].device
        sides = (count, rows, 1) if rows >= columns else (count, 1, columns)
        return _Batch(
            parameters=parameters,
            update_scale=max(1.0, rows / columns) ** 0.5,
            first=first,
            count=count,
            momentum=torch.zeros((count, rows, columns), device=device),
            square=None if self.square_decay is None else torch.zeros(sides, device=device),
        )

    @property
    def parameters(self) -> list[Tensor]:
        """Return every matrix this optimiser updates."""
        return [parameter for batch in self.batches for parameter in batch.parameters]

    @torch.no_grad()
    def start(self, *, momentum: float, clip: Tensor) -> list[Gathering]:
        """Compute this rank's share of every batch of updates from the matrices' `.grad`, already averaged over ranks and
        multiplied by `clip`, each on its way to the others while the next is computed."""
        mu = torch.tensor(momentum, device="cpu").to(clip.device, non_blocking=True)
        return [
            self.ranks.all_gather_shares(self._update_of_share(batch, mu, clip), len(batch.parameters))
            for batch in self.batches
        ]

    @torch.no_grad()
    def finish(self, gathering: list[Gathering], *, learning_rate_scale: float) -> None:
        """Update the matrices in place by what `start` began to gather."""
        lr = self.learning_rate * learning_rate_scale
        for batch, gathered in zip(self.batches, gathering, strict=True):
            updates = list(gathered.wait().unbind())
            if self.cautious_decay:
                decays = torch._foreach_mul(batch.parameters, updates)
                torch._foreach_sign_(decays)
                torch._foreach_add_(decays, 1.0)
                # by now 0 where the update makes the weight larger, 2 where smaller, 1 where either is zero
                torch._foreach_clamp_max_(decays, 1.0)
                torch._foreach_addcmul_(batch.parameters, batch.parameters, decays, -lr * self.weight_decay)
            else:
                torch._foreach_mul_(batch.parameters, 1 - lr * self.weight_decay)
            torch._foreach_add_(batch.parameters, updates, alpha=-lr)

    def _update_of_share(self, batch: _Batch, mu: Tensor, clip: Tensor) -> Tensor:
        if batch.count == 0:
            return batch.momentum
        gradients = [parameter.grad for parameter in batch.parameters[batch.first : batch.first + batch.count]]
        present = [gradient for gradient in gradients if gradient is not None]
        assert len(present) == batch.count
        return self.update(
            torch.stack(present),
            batch.momentum,
            batch.square,
            batch.update_scale,
            mu,
            clip,
            self.iteration,
            self.normalizes_rows,
            self.square_decay or 0.0,
        )

    def state(self) -> dict[str, Tensor]:
        """Return `momentum.NAME` of every matrix and, where it is kept, `square.NAME`, gathered from all ranks (a collective
        call)."""
        state = {}
        for batch in self.batches:
            for kind, mine in batch.state.items():
                gathered = self.ranks.all_gather_shares(mine, len(batch.parameters)).wait().unbind()
                for parameter, value in zip(batch.parameters, gathered, strict=True):
                    state[f"{kind}.{self.names[id(parameter)]}"] = value
        return state

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of everything that `state` returns, without asking other ranks."""
        return {
            f"{kind}.{self.names[id(parameter)]}": tuple(mine.shape[1:])
            for batch in self.batches
            for kind, mine in batch.state.items()
            for parameter in batch.parameters
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take this rank's share of what `state` returned, on any number of ranks."""
        for batch in self.batches:
            for slot in range(batch.count):
                name = self.names[id(batch.parameters[batch.first + slot])]
                for kind, mine in batch.state.items():
                    mine[slot].copy_(state[f"{kind}.{name}"])
