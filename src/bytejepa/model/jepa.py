"""The latent side path: chunks of the last residual are summarised, predicted one chunk ahead, and injected (spec section 3).

A chunk's latent z_c is a projection of the mean residual over its P positions; p_c predicts it from z_{c-1}, so what is
injected into chunk c depends on earlier chunks only. The injection is part of the model and of the artifact; the losses
are asked for by training.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytejepa.config_model import JepaConfig
from bytejepa.data.vocabulary import VOCABULARY_SIZE
from bytejepa.model.layers import Linear, rms_norm


class LatentMLP(nn.Module):
    """fc2(silu(rms(fc1(x)))): the shape of both projector and predictor."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.up = Linear(in_dim, hidden_dim)
        self.down = Linear(hidden_dim, out_dim)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the transformed vectors."""
        return self.down(F.silu(rms_norm(self.up(x))))


class Latents(NamedTuple):
    """What the side path computed for one batch."""

    target: Tensor
    """z, (B, C, Z)."""
    predicted: Tensor
    """p, (B, C, Z): p_c is a function of the chunks before c."""
    context: Tensor
    """What each chunk gives to the prediction of later ones: its z, or (`context` causal) its last residual, (B, C, D)."""


class Jepa(nn.Module):
    """Projector, predictor and injection."""

    directions: Tensor

    def __init__(self, model_dim: int, config: JepaConfig) -> None:
        super().__init__()
        self.config = config
        self.projector = LatentMLP(model_dim, config.hidden_dim, config.latent_dim)
        Z = config.latent_dim
        context_dim = model_dim if config.context == "causal" else Z
        self.predictor = LatentMLP(context_dim, Z, Z)
        self.further_predictors = nn.ModuleList(LatentMLP(context_dim, Z, Z) for _ in range(config.horizons - 1))
        self.byte_head = Linear(Z, config.chunk_bytes * VOCABULARY_SIZE) if config.next_bytes_weight else None
        self.start = nn.Parameter(torch.zeros(context_dim))
        self.injection = Linear(config.latent_dim, model_dim)
        directions = torch.zeros(config.latent_dim, config.sigreg_directions)
        self.register_buffer("directions", directions, persistent=False)

    def latents(self, x: Float[Tensor, "B T D"], document_start: Bool[Tensor, "B T"] | None = None) -> Latents:
        """Return target and predicted latents of the whole chunks of `x`.

        With `document_start`, a chunk's mean covers only its positions in the document that goes on after it.
        """
        P = self.config.chunk_bytes
        num_chunks = x.size(1) // P
        if self.config.gradient == "detached":
            x = x.detach()
        chunks = x[:, : num_chunks * P].unflatten(1, (num_chunks, P))  # (B, C, P, D)
        if document_start is None:
            mean = chunks.mean(2)
        else:
            starts = document_start[:, : num_chunks * P].unflatten(1, (num_chunks, P))
            # a position counts if no document starts after it within its chunk
            later_starts = starts.flip(-1).cumsum(-1).flip(-1) - starts.to(torch.int64)
            weight = (later_starts == 0).to(x.dtype)[..., None]
            mean = (chunks * weight).sum(2) / weight.sum(2)
        target = self.projector(mean)
        context = self.context_of(target, chunks[:, :, -1])
        start = self.start.to(target.dtype).expand(x.size(0), 1, -1)
        previous = torch.cat((start, context), dim=1)[:, :num_chunks]  # none where there is no whole chunk
        if document_start is not None:
            previous = previous.where(~self._starts_at_border(starts)[..., None], self.start.to(target.dtype))
        return Latents(target, self.predictor(previous), context)

    def context_of(self, latent: Float[Tensor, "*n Z"], last: Float[Tensor, "*n D"]) -> Tensor:
        """Return what a chunk gives to predictions: of its `latent` and its `last` residual the one that is configured."""
        return rms_norm(last) if self.config.context == "causal" else latent

    @staticmethod
    def _starts_at_border(starts: Bool[Tensor, "B C P"]) -> Bool[Tensor, "B C"]:
        """Return which chunks begin with a document: nothing before them may be used."""
        return starts[:, :, 0]

    def inject(
        self,
        x: Float[Tensor, "B T D"],
        predicted: Float[Tensor, "B C Z"],
        document_start: Bool[Tensor, "B T"] | None = None,
        *,
        first_position: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """Return `x` plus the injection; positions of a ragged tail, and the `first_position` first, are as they were.

        With `document_start`, positions of a document that began inside their chunk get the start token's prediction.
        """
        P = self.config.chunk_bytes
        if self.config.gradient == "detached":
            predicted = predicted.detach()
        added = self.injection(predicted)  # (B, C, D)
        length = added.size(1) * P
        per_position = added.repeat_interleave(P, dim=1)
        if document_start is not None:
            at_start = self.injection(self.predictor(self.start.to(predicted.dtype)))
            starts = document_start[:, first_position : first_position + length].unflatten(1, (-1, P))
            fresh = (starts.cumsum(-1) > 0).flatten(1)
            per_position = torch.where(fresh[..., None], at_start, per_position)
        return x + F.pad(per_position, (0, 0, first_position, x.size(1) - first_position - length))

    def prediction_loss(self, latents: Latents, document_start: Bool[Tensor, "B T"] | None = None) -> Tensor:
        """Return mean (p - stopgrad(z))^2, a float32 scalar, averaged over the horizons.

        With `document_start`, a chunk in or before which a document starts on the way counts as zero. The mean is over all
        chunks nevertheless: divided by the number of those that count, it would depend on how a batch is divided over ranks.
        """
        target = latents.target.detach().float()
        num_chunks = target.size(1)
        predicted = {1: latents.predicted}
        for ahead, predictor in enumerate(self.further_predictors[: max(0, num_chunks - 2)], start=2):
            predicted[ahead] = predictor(latents.context[:, :-ahead])
        pairs = {ahead: (p.float(), target[:, num_chunks - p.size(1) :]) for ahead, p in predicted.items()}
        if document_start is None:
            return torch.stack([F.mse_loss(*pair) for pair in pairs.values()]).mean()
        starts = document_start[:, : num_chunks * self.config.chunk_bytes].unflatten(1, (num_chunks, -1))
        documents = starts.any(-1).cumsum(1)
        # a chunk that begins with a document is predicted from the start token, and counts
        counts = {1: ~starts[:, :, 1:].any(-1)}
        counts |= {ahead: documents[:, ahead:] == documents[:, :-ahead] for ahead in pairs if ahead > 1}
        errors = [((p - z).square().mean(-1) * counts[ahead]).mean() for ahead, (p, z) in pairs.items()]
        return torch.stack(errors).mean()

    def next_bytes_loss(
        self,
        predicted: Float[Tensor, "B C Z"],
        inputs: Int[Tensor, "B T"],
        document_start: Bool[Tensor, "B T"] | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy in nats of the ids of every chunk, each given the chunk's predicted latent.

        With `document_start`, ids from a document's start within their chunk on count as zero, for the reason given above.
        """
        if self.byte_head is None or not predicted.size(1):
            return predicted.new_zeros((), dtype=torch.float32)
        logits = self.byte_head(predicted).unflatten(-1, (self.config.chunk_bytes, -1)).float()
        num_ids = logits.size(1) * logits.size(2)
        losses = F.cross_entropy(logits.flatten(0, 2), inputs[:, :num_ids].flatten().long(), reduction="none")
        if document_start is not None:
            starts = document_start[:, :num_ids].unflatten(1, logits.shape[1:3])
            losses = losses * (F.pad(starts[:, :, 1:].cumsum(-1), (1, 0)) == 0).flatten()
        return losses.mean()

    def sigreg(self, target: Float[Tensor, "B C Z"]) -> Tensor:
        """Return SIGReg of the latents, averaged over groups of `sigreg_group_sequences` sequences.

        Groups have a fixed size, so that the value does not depend on how a batch is divided over ranks and
        micro-batches; a batch that is no multiple of the group is one sample.
        """
        group = self.config.sigreg_group_sequences
        if group is None or target.size(0) % group:
            group = target.size(0)
        samples = target.float().unflatten(0, (-1, group)).flatten(1, 2)  # (groups, N, Z)
        return sigreg(
            samples, self.directions.float(), knots=self.config.sigreg_knots, standardize=self.config.sigreg_standardize
        ).mean()


def sigreg(
    samples: Float[Tensor, "*groups N Z"],
    directions: Float[Tensor, "Z S"],
    *,
    knots: int = 17,
    standardize: bool = True,
) -> Float[Tensor, "*groups"]:
    """Return how far the distribution of `samples` is from an isotropic standard normal, along fixed directions.

    The empirical characteristic function of every projection is compared with exp(-t^2 / 2) at `knots` frequencies in
    [0.2, 3]. With `standardize` (the reference) each dimension is centred and divided by its standard deviation first:
    the value is then blind to mean and scale, and a collapse goes unseen. Without, both are part of what is compared.
    Source: LeJEPA (SIGReg, Epps-Pulley); spec section 3.
    """
    if standardize:
        samples = samples - samples.mean(-2, keepdim=True)
        samples = samples / samples.std(-2, keepdim=True).clamp_min(1e-6)
    projected = samples @ directions  # (groups, N, S)
    t = torch.linspace(0.2, 3.0, knots, dtype=samples.dtype, device=samples.device)
    angle = projected[..., None] * t  # (groups, N, S, K)
    real = _mean_over_samples(angle.cos()) - torch.exp(-t.square() / 2)
    imaginary = _mean_over_samples(angle.sin())
    return (real.square() + imaginary.square()).mean((-2, -1))


def _mean_over_samples(x: Float[Tensor, "*groups N S K"]) -> Float[Tensor, "*groups S K"]:
    """Return the mean along N, in two steps where N divides: thousands of samples for few thousand means, taken at once, leave
    most of a GPU idle."""
    first = math.gcd(x.size(-3), 64)
    return x.unflatten(-3, (first, -1)).mean(-3).mean(-3)


def explained_variance(latents: Latents) -> Tensor:
    """Return the share of latent variance that the predictor explains, 1 - MSE / var(z); at most 1, negative if it
    predicts worse than the mean would (spec section 7, item 12)."""
    target = latents.target.float().flatten(0, 1)
    residual = (latents.predicted.float().flatten(0, 1) - target).square().mean()
    return 1 - residual / target.var(0, unbiased=False).mean().clamp_min(1e-12)


def latent_std(target: Float[Tensor, "B C Z"]) -> Tensor:
    """Return the root of the mean variance of the latents' dimensions: 1 for a standard normal, 0 if all latents are one.

    Explained variance and effective rank are blind to scale; this is what falls in a collapse (spec section 7, item 12).
    """
    return target.float().flatten(0, 1).var(0, unbiased=False).mean().sqrt()


def effective_rank(target: Float[Tensor, "B C Z"]) -> Tensor:
    """Return exp(entropy of the normalised eigenvalues of the latents' covariance): 1 (collapsed) to Z (isotropic).

    Source: Roy and Vetterli, "The effective rank" (2007), on the covariance's spectrum.
    """
    samples = target.float().flatten(0, 1)
    # a diverging run must get as far as saying so: the decomposition refuses what is not finite
    samples = torch.nan_to_num(samples - samples.mean(0))
    spectrum = torch.linalg.svdvals(samples).square()
    share = spectrum / spectrum.sum().clamp_min(1e-12)
    return torch.exp(torch.special.entr(share).sum())
