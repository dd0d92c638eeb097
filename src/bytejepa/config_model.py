"""What the network is: the backbone and the latent side path (spec sections 2 and 3)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from bytejepa.config_fields import Fraction, NonNegative, NonNegativeInt, PositiveInt, Range, Section
from bytejepa.errors import ConfigError

EXACT_BIGRAM_ROWS = 256 * 256 + 1
"""Rows of the exact table of byte pairs: one a pair, and one for what is not a pair of bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Section):
    """The backbone."""

    num_layers: Annotated[int, Range(1, 256)] = 13
    """Transformer blocks."""
    model_dim: Annotated[int, Range(8, 16384)] = 512
    """Width D of the residual stream."""
    num_heads: PositiveInt = 8
    """Query heads H; head width is model_dim / num_heads, an even number."""
    num_kv_heads: PositiveInt = 4
    """Key/value heads G; divides num_heads."""
    mlp_ratio: Annotated[float, Range(0.125, 16)] = 2.0
    """Width of the MLP's hidden layer, in model widths."""
    rotary_dims: PositiveInt | None = 16
    """Leading dimensions of each head that rotate with the position; even; None: all of them."""
    rotary_base: Annotated[float, Range(1)] = 10_000.0
    """Base of the rotary frequencies."""
    rotary_length_bytes: PositiveInt = 4096
    """Context up to which rotary_base holds; beyond it the base grows (NTK scaling)."""
    query_gain: NonNegative = 1.5
    """Initial value of the learned gain of each query head."""
    logit_softcap: Annotated[float, Range(1)] = 30.0
    """Bound c of the logits: c tanh(logits / c)."""
    xsa_last_layers: NonNegativeInt = 4
    """Last blocks whose heads drop the component along their own value vector (XSA)."""
    depth_scaled_norm: bool = True
    """Scale the normalised input of block i by 1/sqrt(i+1) (LN scale)."""
    residual_mix: bool = True
    """Mix the first layer's input back into every block with learned weights."""
    skip_connections: bool = True
    """Learned U-Net skips from the first half of the blocks to the second."""
    skip_gates: bool = False
    """Interpolate between skip and residual by a learned sigmoid gate a dimension instead of adding the skip."""
    parallel_last_layers: NonNegativeInt = 0
    """Last blocks whose MLP reads the normalised input that their attention reads (parallel residuals)."""
    recurrent_layers: tuple[int, int] | None = None
    """First and last block, counted from 0, of a run of blocks that is passed twice (depth recurrence); None: no such run."""
    attention_gate_dims: PositiveInt | None = None
    """Leading dimensions of a block's normalised input from which each head's output is gated; None: no gates."""
    value_embedding_last_layers: NonNegativeInt = 0
    """Last blocks whose values have a learned embedding of the current id added."""
    smear: bool = True
    """Mix each embedding with its predecessor's through a learned gate (SmearGate)."""
    smear_gate: Literal["constant", "input"] = "constant"
    """`constant`: one gate a dimension; `input`: it also moves with the current embedding, and takes nothing across a
    BOS even without document masking."""
    bigram_rows: Annotated[int, Range(2, 1 << 20)] | None = 4096
    """Rows of the hashed table of byte pairs (BigramHash); None: no table."""
    bigram_table: Literal["hash", "exact"] = "hash"
    """`hash`: pairs share rows; `exact`: each of the 65,536 pairs has its own, and bigram_rows is 65,537."""
    bigram_dim: PositiveInt = 32
    """Width of a row of the bigram table, before its projection to model_dim."""
    bigram_projection_init: Literal["zero", "orthogonal"] = "orthogonal"
    """`zero`, with a table that starts at zero too, never gets a gradient."""
    ngram_orders: tuple[int, ...] | None = None
    """Lengths n of the runs of last ids that have hashed tables besides the pairs' (NgramHash), 3 to 16 and rising;
    None: none."""
    ngram_rows: Annotated[int, Range(2, 1 << 22)] = 16_384
    """Rows of each order's table."""
    ngram_dim: PositiveInt = 32
    """Width of a row of these tables; the rows of all orders are projected to model_dim together."""
    output_projection_init: Literal["zero", "scaled"] = "scaled"
    """Projections that end a branch: zero, or orthogonal with gain 1/sqrt(2 num_layers)."""
    embedding_std: Annotated[float, Range(1e-6)] = 0.005
    """Standard deviation of the token embedding's normal initialisation."""
    attention_windows: tuple[int, ...] | None = None
    """Bytes each block can look back, its own included: one number a block, or one for all; 0: no bound; None: all unbounded."""
    document_masking: bool = False
    """Attention, smear, bigrams, n-grams, chunk blocks and JEPA, its losses too, do not look across a BOS."""
    chunk_blocks: tuple[int, int] | None = None
    """First and last block, counted from 0, of a run of blocks that run once a chunk instead of at every byte
    (docs/techniques.md); None: no such run. Their attention_windows reach over window // chunk_stride_bytes chunks."""
    chunk_stride_bytes: Annotated[int, Range(2, 256)] = 4
    """Bytes a chunk of chunk_blocks; nothing to do with jepa.chunk_bytes."""
    multi_token_heads: Annotated[int, Range(0, 8)] = 0
    """Extra heads trained to predict bytes further ahead; dropped from the artifact."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.model_dim % self.num_heads or (self.model_dim // self.num_heads) % 2:
            raise ConfigError(
                f"model.model_dim {self.model_dim} must be an even multiple of model.num_heads {self.num_heads}",
                hint=f"got a head width of {self.model_dim / self.num_heads:g}",
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads {self.num_kv_heads} does not divide model.num_heads {self.num_heads}"
            )
        if self.rotary_dims is not None and (self.rotary_dims % 2 or self.rotary_dims > self.head_dim):
            raise ConfigError(
                f"model.rotary_dims: expected an even number up to the head width {self.head_dim}, got {self.rotary_dims}"
            )
        if self.xsa_last_layers > self.num_layers:
            raise ConfigError(
                f"model.xsa_last_layers {self.xsa_last_layers} is more than model.num_layers {self.num_layers}"
            )
        self._check_tables()
        self._check_techniques()
        self._check_chunk_blocks()
        windows = self.attention_windows
        if windows is not None and (len(windows) not in (1, self.num_layers) or min(windows) < 0):
            raise ConfigError(
                f"model.attention_windows: expected 1 or {self.num_layers} numbers of 0 or more, got {' '.join(map(str, windows))}"
            )

    def _check_tables(self) -> None:
        if self.bigram_table == "exact" and self.bigram_rows != EXACT_BIGRAM_ROWS:
            raise ConfigError(
                f"model.bigram_table exact: expected model.bigram_rows {EXACT_BIGRAM_ROWS}, got {self.bigram_rows}"
            )
        orders = self.ngram_orders
        if orders is not None and (
            not orders or not 3 <= min(orders) <= max(orders) <= 16 or sorted(set(orders)) != list(orders)
        ):
            raise ConfigError(
                f"model.ngram_orders: expected rising numbers from 3 to 16, got {' '.join(map(str, orders)) or 'none'}",
                hint="pairs are model.bigram_rows and model.bigram_table",
            )

    def _check_techniques(self) -> None:
        for name in ("parallel_last_layers", "value_embedding_last_layers"):
            if getattr(self, name) > self.num_layers:
                raise ConfigError(f"model.{name} {getattr(self, name)} is more than model.num_layers {self.num_layers}")
        if self.skip_gates and not self.skip_connections:
            raise ConfigError("model.skip_gates needs model.skip_connections")
        if self.smear_gate == "input" and not self.smear:
            raise ConfigError("model.smear_gate input needs model.smear")
        if self.attention_gate_dims is not None and self.attention_gate_dims > self.model_dim:
            raise ConfigError(
                f"model.attention_gate_dims {self.attention_gate_dims} is more than model.model_dim {self.model_dim}"
            )
        if self.recurrent_layers is not None:
            first, last = self.recurrent_layers
            if not 0 <= first <= last < self.num_layers:
                raise ConfigError(
                    f"model.recurrent_layers: expected two rising numbers from 0 to {self.num_layers - 1}, got {first} {last}"
                )

    def _check_chunk_blocks(self) -> None:
        if self.chunk_blocks is None:
            return
        first, last = self.chunk_blocks
        if not 0 <= first <= last < self.num_layers - 1:
            raise ConfigError(
                f"model.chunk_blocks: expected two rising numbers under {self.num_layers - 1}, got {first} {last}",
                hint="the last block always runs at every byte",
            )
        places = [place for place, layer in enumerate(self.layer_order) if first <= layer <= last]
        if places != list(self.chunk_places):
            raise ConfigError(
                f"model.chunk_blocks {first} {last} would not run one after the other with "
                f"model.recurrent_layers {' '.join(map(str, self.recurrent_layers or ()))}",
                hint="the recurrent blocks must lie among the chunk blocks, or apart from them",
            )
        # skips join the places p and 2 half - 1 - p; those of chunk blocks must join chunk blocks
        excess = places[0] + places[-1] - (2 * (len(self.layer_order) // 2) - 1)
        total = first + last - excess
        if self.skip_connections and total > 2 * (self.num_layers - 2):
            raise ConfigError(
                f"model.chunk_blocks: expected none with model.num_layers {self.num_layers}, where every skip connection would "
                f"join a chunk block and one that runs at every byte, got {first} {last}",
                hint="take more layers, or set model.skip_connections false",
            )
        if self.skip_connections and excess:
            raise ConfigError(
                f"model.chunk_blocks: expected first + last = {total}, so that no skip connection joins a "
                f"chunk block and one that runs at every byte, got {first} {last}",
                hint="or set model.skip_connections false",
            )

    @property
    def layer_order(self) -> tuple[int, ...]:
        """The blocks in the order in which they are passed; a recurrent one is there twice."""
        layers = tuple(range(self.num_layers))
        if self.recurrent_layers is None:
            return layers
        first, last = self.recurrent_layers
        return layers[: last + 1] + layers[first:]

    @property
    def chunk_places(self) -> range:
        """The places in layer_order that are passed once a chunk; empty without chunk_blocks."""
        if self.chunk_blocks is None:
            return range(0)
        order, (first, last) = self.layer_order, self.chunk_blocks
        return range(order.index(first), len(order) - order[::-1].index(last))

    @property
    def stride_of_place(self) -> tuple[int, ...]:
        """Bytes between two positions at which each place in layer_order is passed."""
        return tuple(
            self.chunk_stride_bytes if place in self.chunk_places else 1 for place in range(len(self.layer_order))
        )

    @property
    def window_of_place(self) -> tuple[int | None, ...]:
        """Positions that each place in layer_order can look back, in bytes or, where it is passed once a chunk, in chunks,
        its own included; None: no bound."""
        windows = (self.window_of_layer[layer] for layer in self.layer_order)
        return tuple(
            window and max(1, window // stride) for window, stride in zip(windows, self.stride_of_place, strict=True)
        )

    @property
    def smear_stops_at_bos(self) -> bool:
        """Whether the smear takes nothing across a BOS."""
        return self.document_masking or self.smear_gate == "input"

    @property
    def head_dim(self) -> int:
        """Width E of one head."""
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Width M of the MLP's hidden layer."""
        return int(self.mlp_ratio * self.model_dim)

    @property
    def window_of_layer(self) -> tuple[int | None, ...]:
        """Bytes each block can look back, one entry a block; None: no bound."""
        windows = self.attention_windows or (0,)
        return tuple(w or None for w in (windows * self.num_layers if len(windows) == 1 else windows))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JepaConfig(Section):
    """The latent side path and its two losses."""

    enabled: bool = True
    """Whether the module exists at all; the other settings only matter if so."""
    chunk_bytes: PositiveInt = 8
    """Bytes P pooled into one latent."""
    latent_dim: PositiveInt = 256
    """Width Z of a latent."""
    hidden_dim: PositiveInt = 256
    """Hidden width of the projector; the predictor's is latent_dim."""
    inject: bool = True
    """Add the predicted latent, projected, to the last residual."""
    losses: bool = True
    """Train with the prediction loss and SIGReg; off: the path learns from the byte loss alone."""
    context: Literal["pooled", "causal"] = "pooled"
    """What a chunk's latent is predicted from: `pooled`: the latent of the chunk before; `causal`: the residual at its
    last position, which has seen all that came before."""
    horizons: Annotated[int, Range(1, 8)] = 1
    """Chunks ahead of which latents are predicted; only the next one's is injected, the other predictors are in no
    artifact."""
    next_bytes_weight: NonNegative = 0.0
    """Weight of the loss of predicting a chunk's bytes, all at once, from its predicted latent; 0: not predicted. The
    head is in no artifact."""
    gradient: Literal["detached", "backbone"] = "backbone"
    """`detached`: the path reads a detached residual and its latent is detached before injection, as in the
    reference; `backbone`: both gradients flow, so the latent losses shape the backbone."""
    lambda_max: NonNegative = 0.001
    """Largest weight of the latent losses in the sum."""
    lambda_zero_until: Fraction = 0.3
    """Progress until which lambda is zero."""
    lambda_ramp_until: Fraction = 0.8
    """Progress at which lambda has risen linearly to lambda_max."""
    lambda_after: Literal["zero", "hold"] = "zero"
    """What lambda is after the ramp: zero (reference), or held at lambda_max."""
    sigreg_weight: NonNegative = 0.02
    """Weight of SIGReg relative to the prediction loss."""
    sigreg_directions: PositiveInt = 256
    """Directions S on which SIGReg projects."""
    sigreg_knots: Annotated[int, Range(2, 1024)] = 17
    """Frequencies K at which SIGReg compares characteristic functions."""
    sigreg_standardize: bool = False
    """Centre and scale every latent dimension first, as the reference does: SIGReg is then blind to mean and scale
    and cannot object to a collapse."""
    sigreg_group_sequences: PositiveInt | None = None
    """Sequences whose latents form one SIGReg sample: fixed, the loss does not depend on ranks or micro-batches;
    None: all of a micro-batch."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.lambda_zero_until > self.lambda_ramp_until:
            raise ConfigError(
                f"jepa.lambda_zero_until {self.lambda_zero_until:g} is after jepa.lambda_ramp_until {self.lambda_ramp_until:g}"
            )
        if not self.losses and (self.context == "causal" or self.horizons > 1):
            raise ConfigError(
                f"jepa.context {self.context} and jepa.horizons {self.horizons} need jepa.losses",
                hint="without them nothing trains the projector or the predictors of later chunks",
            )
        if self.enabled and not (self.losses or self.inject or self.next_bytes_weight):
            raise ConfigError(
                "jepa.inject, jepa.losses and jepa.next_bytes_weight are all off: the module would do nothing",
                hint="switch it off as a whole: jepa.enabled false",
            )
        if (
            self.losses
            and self.lambda_max
            and self.lambda_after == "zero"
            and not self.lambda_zero_until < self.lambda_ramp_until
        ):
            raise ConfigError(
                f"jepa.lambda_ramp_until {self.lambda_ramp_until:g} is not after jepa.lambda_zero_until, and jepa.lambda_after "
                "is zero: the latent losses would never have a weight",
                hint="for a run without them: jepa.losses false",
            )
