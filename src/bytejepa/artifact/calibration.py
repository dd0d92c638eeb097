"""What quantisation has to know of a model: the second moments of every matrix's inputs, and how much each row matters.

Both come from running the model over training text. The moments are taken where a weight is multiplied, whatever scales
are folded into it on the way there, so that a change of the model needs no change here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bytejepa.errors import ArtifactError
from bytejepa.model import fused_mlp
from bytejepa.model.gptq import ErrorSpread, error_spread
from bytejepa.model.transformer import ByteLM

_SAME_ROWS = {
    torch.Tensor.to, torch.Tensor.float, torch.Tensor.contiguous, torch.Tensor.bfloat16, torch.Tensor.type_as,
}  # fmt: skip
_PRODUCTS_WITH_SCALE = {torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.mul}
_TRANSPOSES = {torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.t, torch.t}  # type: ignore[attr-defined]
_MATRIX_PRODUCTS = {
    torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """What was learned of a model from text; by parameter name."""

    spreads: dict[str, ErrorSpread]
    """Of every matrix that multiplies something."""
    sensitivity: dict[str, Tensor]
    """Of every matrix: the mean squared gradient of each row's weights, in nats^2 a byte; (rows,), float32, CPU."""


@dataclass(frozen=True, slots=True)
class _Weights:
    """Parameters, stacked by rows, that a tensor holds, up to a scale of each row."""

    names: tuple[str, ...]
    transposed: bool = False


class InputMoments(TorchFunctionMode):
    """Within it, X^T X of the inputs X of every product with a matrix of `model` is summed up.

    It follows weights through what leaves their columns alone: change of type, scale of rows, stacking, transposition.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.moments: dict[tuple[str, ...], Tensor] = {}
        """By the names of the parameters that share an input, (columns, columns) float32."""
        self._parameters = {id(p): _Weights((name,)) for name, p in model.named_parameters() if p.ndim == 2}
        self._derived: dict[int, tuple[Tensor, _Weights]] = {}

    def begin_pass(self) -> None:
        """Forget the tensors of the pass before."""
        self._derived.clear()

    def by_name(self) -> dict[str, Tensor]:
        """Return the moments by parameter name; parameters that share their only input share the tensor."""
        result: dict[str, Tensor] = {}
        for names, moment in self.moments.items():
            for name in names:
                result[name] = result[name] + moment if name in result else moment
        return result

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self._observe(args[0], self._find(args[1]), transposed=False)
        elif func is torch.addmm:
            self._observe(args[1], self._find(args[2]), transposed=True)
        elif func in _MATRIX_PRODUCTS:
            self._observe(args[0], self._find(args[1]), transposed=True)
        elif isinstance(result, Tensor) and (weights := self._followed(func, args)):
            self._derived[id(result)] = (result, weights)  # kept alive, so that the id stays its own
        return result

    def _find(self, tensor: object) -> _Weights | None:
        derived = self._derived.get(id(tensor))
        return derived[1] if derived else self._parameters.get(id(tensor))

    def _followed(self, func: Callable[..., Any], args: Sequence[Any]) -> _Weights | None:
        """Return which weights the result of `func` holds, None if none or if its columns are not theirs any more."""
        if func is torch.cat:
            parts = [self._find(part) for part in args[0]]
            names = tuple(name for part in parts if part and not part.transposed for name in part.names)
            whole = len(args) == 1 and all(part and not part.transposed for part in parts)
            return _Weights(names) if whole else None
        weights = self._find(args[0]) if args else None
        if func in _TRANSPOSES:
            return weights and _Weights(weights.names, not weights.transposed)
        if func in _PRODUCTS_WITH_SCALE:
            weights, scale = (weights, args[1]) if weights else (self._find(args[1]), args[0])
            scales_rows = not isinstance(scale, Tensor) or scale.numel() == 1 or scale.shape[1:] == (1,)
            return weights if weights and not weights.transposed and scales_rows else None
        return weights if func in _SAME_ROWS else None

    def _observe(self, inputs: Tensor, weights: _Weights | None, *, transposed: bool) -> None:
        if weights is None or weights.transposed != transposed:
            return
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        moment = rows.T @ rows
        known = self.moments.get(weights.names)
        self.moments[weights.names] = moment if known is None else known.add_(moment)


def calibrate(
    model: ByteLM,
    ids: Tensor,
    *,
    damping: float = 0.01,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Return what `ids`, (sequences, T) on the model's device, tell of `model`.

    The gradients are those of bytes drawn from the model's own predictions: their mean square is the Fisher information,
    which approximates the curvature of the loss and needs no targets.
    Raises: ArtifactError if predictions or gradients are not finite.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    moments = InputMoments(model)
    squares = {name: torch.zeros(len(parameter), device=ids.device) for name, parameter in parameters.items()}
    random = torch.Generator(device=ids.device).manual_seed(seed)
    for number, sequence in enumerate(ids):
        model.zero_grad()
        moments.begin_pass()
        with moments, fused_mlp.plain_formulas():
            logits = model.logits(sequence[None])[0]
        _require_finite(logits, "the model's predictions")
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random).squeeze(1)
        F.cross_entropy(logits, drawn, reduction="sum").backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                squares[name] += parameter.grad.float().square().mean(1)
        if on_progress is not None:
            on_progress(number + 1, len(ids))
    for name, value in squares.items():
        _require_finite(value, f"the gradients of tensor {name!r}")
    model.zero_grad()
    moments.begin_pass()
    made: dict[int, ErrorSpread] = {}
    spreads = {}
    for name, moment in moments.by_name().items():
        if id(moment) not in made:
            made[id(moment)] = error_spread(moment, damping=damping)
        spreads[name] = made[id(moment)]
    return Calibration(
        spreads=spreads, sensitivity={name: (value / ids.numel()).cpu() for name, value in squares.items()}
    )


def _require_finite(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ArtifactError(f"{what} are not finite", hint="do not export a diverged model")
