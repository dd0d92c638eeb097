"""The configuration of a run: frozen dataclasses in which every field carries its unit and its range.

`RunConfig` is the sum of its sections; the presets in `bytejepa.presets` are functions that derive one from another.
`None` means off. Checks happen on construction, so a configuration that exists is possible. This module imports neither
torch nor numpy: `bytejepa --help` and `bytejepa config` answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Annotated, Any, Literal

from bytejepa.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Inclusive bounds of a number, kept in a field's annotation so that check, help and docs cannot disagree."""

    low: float
    high: float = float("inf")

    def __str__(self) -> str:
        low, high = _in_full(self.low), _in_full(self.high)
        return f"{low} or more" if self.high == float("inf") else f"{low} to {high}"


def _in_full(value: float) -> str:
    """Return a number with all the digits of its whole part, which `g` would round."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


EXACT_BIGRAM_ROWS = 256 * 256 + 1
"""Rows of the exact table of byte pairs: one a pair, and one for what is not a pair of bytes."""

PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


class _Section:
    """Checks every annotated range on construction."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, bounds in _ranges(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if value is not None and not (bounds.low <= value <= bounds.high and math.isfinite(value)):
                section = type(self).__name__.removesuffix("Config").lower()
                raise ConfigError(f"{section}.{name}: expected {bounds}, got {_in_full(value)}")


@functools.cache
def _ranges(section: Any) -> dict[str, Range]:
    ranges = {}
    for name, annotation in typing.get_type_hints(section, include_extras=True).items():
        parts = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
        for part in (annotation, *parts):
            for extra in getattr(part, "__metadata__", ()):
                if isinstance(extra, Range):
                    ranges[name] = extra
    return ranges


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(_Section):
    """The backbone (spec section 2)."""

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
    """`zero`, with a table that starts at zero too, never gets a gradient (spec section 7, item 1)."""
    ngram_orders: tuple[int, ...] | None = None
    """Lengths n of the runs of last ids that have hashed tables besides the pairs' (NgramHash), 3 to 16 and rising;
    None: none."""
    ngram_rows: Annotated[int, Range(2, 1 << 22)] = 16_384
    """Rows of each order's table."""
    ngram_dim: PositiveInt = 32
    """Width of a row of these tables; the rows of all orders are projected to model_dim together."""
    output_projection_init: Literal["zero", "scaled"] = "scaled"
    """Projections that end a branch: zero, or orthogonal with gain 1/sqrt(2 num_layers) (item 5)."""
    embedding_std: NonNegative = 0.005
    """Standard deviation of the token embedding's normal initialisation."""
    attention_windows: tuple[int, ...] | None = None
    """Bytes each block can look back, its own included: one number a block, or one for all; 0: no bound; None: all unbounded."""
    document_masking: bool = False
    """Attention, smear, bigram and JEPA do not look across a BOS."""
    multi_token_heads: Annotated[int, Range(0, 8)] = 0
    """Extra heads trained to predict bytes further ahead; dropped from the artifact."""

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
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

    @property
    def layer_order(self) -> tuple[int, ...]:
        """The blocks in the order in which they are passed; a recurrent one is there twice."""
        layers = tuple(range(self.num_layers))
        if self.recurrent_layers is None:
            return layers
        first, last = self.recurrent_layers
        return layers[: last + 1] + layers[first:]

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
class JepaConfig(_Section):
    """The latent side path and its two losses (spec section 3)."""

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
    reference; `backbone`: both gradients flow, so the latent losses shape the backbone (spec section 7, item 2)."""
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
    and cannot object to a collapse (spec section 7, item 12)."""
    sigreg_group_sequences: PositiveInt | None = None
    """Sequences whose latents form one SIGReg sample: fixed, the loss does not depend on ranks or micro-batches;
    None: all of a micro-batch."""

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        if self.lambda_zero_until > self.lambda_ramp_until:
            raise ConfigError(
                f"jepa.lambda_zero_until {self.lambda_zero_until:g} is after jepa.lambda_ramp_until {self.lambda_ramp_until:g}"
            )
        if not self.losses and (self.context == "causal" or self.horizons > 1):
            raise ConfigError(
                f"jepa.context {self.context} and jepa.horizons {self.horizons} need jepa.losses",
                hint="without them nothing trains the projector or the predictors of later chunks",
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(_Section):
    """What one step reads."""

    sequence_bytes: Annotated[int, Range(2, 1 << 20)] = 4096
    """Context T of a training sequence, in ids."""
    batch_bytes: PositiveInt = 393_216
    """Ids a step over all ranks; a multiple of sequence_bytes."""
    micro_batch_bytes: PositiveInt | None = None
    """Ids a forward pass on one rank (gradient accumulation makes up the rest); None: the rank's whole share."""
    order: Literal["sequential", "shuffled"] = "shuffled"
    """`sequential`: shards in order, as the reference; `shuffled`: every sequence of an epoch once, in an order that is
    a function of the seed, with a new phase each epoch."""
    num_streams: PositiveInt = 1
    """For `sequential`: readers among which a step's ids are divided (the reference: one a GPU, 8)."""
    sequence_growth: tuple[tuple[float, int], ...] | None = None
    """Pairs (progress, ids) that replace sequence_bytes from that progress on; beginning at 0 they end at sequence_bytes;
    None: fixed."""
    character_substitution: Fraction = 0.0
    """Share of training sequences in which one byte value is replaced throughout by a random Unicode character, which
    prepares a corpus of few symbols for others."""

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        stages = self.stages
        growth = self.sequence_growth
        if growth and growth[0][0] == 0 and growth[-1][1] != self.sequence_bytes:
            raise ConfigError(
                f"data.sequence_bytes {self.sequence_bytes} is not the last length of data.sequence_growth, {growth[-1][1]}",
                hint="set both, or data.sequence_growth None",
            )
        for begin, length in stages:
            if not 0 <= begin < 1 or length < 2:
                raise ConfigError(
                    f"data.sequence_growth: expected (progress in [0, 1), ids >= 2), got ({begin:g}, {length})"
                )
            if self.batch_bytes % length:
                raise ConfigError(
                    f"data.batch_bytes {self.batch_bytes} is not a multiple of data.sequence_bytes {length}"
                )
            if self.order == "sequential" and (self.batch_bytes // length) % self.num_streams:
                raise ConfigError(
                    f"data.num_streams {self.num_streams} does not divide the {self.batch_bytes // length} sequences of a step"
                )
            if self.micro_batch_bytes is not None and self.micro_batch_bytes % length:
                raise ConfigError(
                    f"data.micro_batch_bytes {self.micro_batch_bytes} is not a multiple of the sequence length {length}"
                )
        if sorted(stages) != list(stages) or len({begin for begin, _ in stages}) != len(stages):
            raise ConfigError("data.sequence_growth: the progress of each stage must be larger than the one before")

    @property
    def stages(self) -> tuple[tuple[float, int], ...]:
        """(progress from which it holds, sequence_bytes) of every stage; the first begins at 0."""
        growth = self.sequence_growth or ()
        return growth if growth and growth[0][0] == 0 else ((0.0, self.sequence_bytes), *growth)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(_Section):
    """Muon on the matrices, AdamW on the rest (spec section 4)."""

    matrix_lr: NonNegative = 0.025
    """Muon's learning rate, in units of spectral norm an update."""
    embedding_lr: NonNegative = 0.035
    """AdamW's learning rate of the token and bigram embeddings."""
    scalar_lr: NonNegative = 0.025
    """AdamW's learning rate of vectors and scalars."""
    jepa_lr: NonNegative = 0.001
    """AdamW's learning rate of the JEPA module, without weight decay."""
    muon_weight_decay: NonNegative = 0.04
    """Decoupled decay of Muon's matrices, times the learning rate."""
    adam_weight_decay: NonNegative = 0.04
    """Decoupled decay of the embeddings, vectors and scalars."""
    muon_momentum: Fraction = 0.99
    """Nesterov momentum after its warm-up."""
    muon_momentum_start: Fraction = 0.92
    """Nesterov momentum at step 0."""
    muon_momentum_warmup_steps: NonNegativeInt = 1500
    """Steps over which the momentum rises linearly."""
    newton_schulz_steps: Annotated[int, Range(1, 20)] = 5
    """Iterations of the orthogonalisation."""
    newton_schulz_coefficients: Literal["quintic", "polar_express"] = "quintic"
    """`quintic`: Muon's own, the same in every iteration; `polar_express`: one set an iteration, closer to orthogonal."""
    muon_row_normalization: bool = False
    """Give every row of an update unit length before it is orthogonalised (MuonEq-R)."""
    adam_beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Fraction = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: NonNegative = 1e-8
    """AdamW's epsilon."""
    gradient_clip: Annotated[float, Range(1e-6)] | None = 0.3
    """Largest global gradient norm; None: no clipping."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(_Section):
    """When training ends and how the learning rate gets there. Whichever bound comes first ends it."""

    steps: PositiveInt | None = 9000
    """Optimiser steps; None: no bound."""
    max_bytes: PositiveInt | None = None
    """Ids read over all ranks; None: no bound."""
    max_wallclock_s: Annotated[float, Range(0.001)] | None = None
    """Seconds of training, without compilation, warm-up, validation and checkpoints; None: no bound."""
    warmdown: Literal["progress", "mean_step_time"] = "progress"
    """`progress`: linear to warmdown_to, reached exactly where training ends; `mean_step_time`: the reference's rule, linear
    once the remaining wallclock is under warmdown_steps mean step times (spec section 7, item 4)."""
    warmdown_fraction: Fraction = 0.4
    """For `progress`: last share of the run over which the learning rate falls to warmdown_to."""
    warmdown_to: Fraction = 0.0
    """For `progress`: learning-rate scale at which the run ends (the reference's ended at 0.167: spec section 7, item 4)."""
    warmdown_steps: PositiveInt = 3000
    """For `mean_step_time`: length of the fall."""
    warmup_fraction: Fraction = 0.0
    """First share of the run over which the learning rate rises linearly from zero."""

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        if self.steps is None and self.max_bytes is None and self.max_wallclock_s is None:
            raise ConfigError(
                "schedule: nothing ends the run",
                hint="set one of schedule.steps, schedule.max_bytes, schedule.max_wallclock_s",
            )
        if self.warmdown == "mean_step_time" and self.steps is None:
            raise ConfigError("schedule.warmdown mean_step_time needs schedule.steps")


AttentionBackend = Literal["auto", "flash4", "flash3", "cudnn", "blocked", "flash", "flex", "math"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(_Section):
    """How the run is carried out."""

    seed: NonNegativeInt = 1337
    """Seed of initialisation, data order and SIGReg directions."""
    ema_decay: Fraction | None = 0.997
    """Decay of the exponential moving average of all weights; None: export the last weights."""
    ema_warmup: bool = True
    """Begin with a smaller decay, (1 + step) / (10 + step), so that a short run's average forgets the initial weights."""
    swa_start: Fraction | None = None
    """Progress from which an equal-weight average (SWA) is kept instead of the EMA; None: off."""
    swa_every_steps: PositiveInt = 50
    """Steps between two weights that enter the SWA average."""
    qat_start: Fraction | None = None
    """Progress from which the matrices are trained through their quantiser (0: from the start); None: off."""
    multi_token_weight: NonNegative = 0.1
    """Weight of each extra head's loss (model.multi_token_heads)."""
    warmup_steps: NonNegativeInt = 20
    """Steps taken to compile and warm up, and undone: model, optimiser and data position are as if they had not been."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: CUDA where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 on a CPU."""
    bfloat16_embeddings: bool = False
    """Keep embeddings and JEPA matrices themselves in bfloat16 on CUDA, as the reference does."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on CUDA only."""
    attention: AttentionBackend = "auto"
    """Attention kernel; auto: the fastest that this machine and the settings allow."""
    validate_every_steps: PositiveInt | None = 1000
    """Steps between validations; None: only at the end."""
    validation_bytes: PositiveInt | None = None
    """Leading ids of the validation split used while training; None: all."""
    log_every_steps: PositiveInt = 10
    """Steps between lines in metrics.jsonl."""
    checkpoint_every_s: NonNegative | None = 300.0
    """Seconds between checkpoints; None: only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig(_Section):
    """How a score is taken."""

    window_bytes: Annotated[int, Range(2, 1 << 20)] = 4096
    """Context of a scoring window, in ids."""
    stride_bytes: PositiveInt = 512
    """Ids scored a window in sliding evaluation; a multiple of jepa.chunk_bytes."""
    batch_bytes: PositiveInt = 65_536
    """Ids a forward pass while scoring."""

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        if self.stride_bytes > self.window_bytes:
            raise ConfigError(
                f"evaluation.stride_bytes {self.stride_bytes} is more than evaluation.window_bytes {self.window_bytes}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactConfig(_Section):
    """How weights become a file (spec section 5)."""

    matrix_bits: Annotated[int, Range(2, 8)] = 6
    """Bits of a weight of the attention and MLP matrices."""
    other_bits: Annotated[int, Range(2, 8)] = 8
    """Bits of a weight of the embeddings and JEPA matrices."""
    scales: Literal["per_row", "reference_floor"] = "per_row"
    """`per_row`: each row its own step; `reference_floor`: never under 1/31 (int6) or 1/127 (int8), item 6."""
    clip: Literal["max", "mean_squared_error"] = "mean_squared_error"
    """What a row's range covers: its largest weight, or the range with the least squared error."""
    small_tensor_elements: NonNegativeInt = 4096
    """Tensors of at most this many elements are stored as float16 (reference: 65,536)."""
    codecs: tuple[Literal["zstd", "brotli"], ...] = ("zstd", "brotli")
    """Compressors tried on each stream; the smallest result is kept."""
    limit_bytes: PositiveInt = 16_000_000
    """Budget for code plus compressed weights, in decimal bytes."""

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        if self.scales == "reference_floor" and (self.matrix_bits, self.other_bits, self.clip) != (6, 8, "max"):
            raise ConfigError(
                f"artifact.scales reference_floor is the reference's rule: expected matrix_bits 6, other_bits 8, clip max, "
                f"got {self.matrix_bits}, {self.other_bits}, {self.clip}",
                hint="use artifact.scales per_row",
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run. Stored with every run, checkpoint and artifact."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    jepa: JepaConfig = dataclasses.field(default_factory=JepaConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    artifact: ArtifactConfig = dataclasses.field(default_factory=ArtifactConfig)

    def __post_init__(self) -> None:
        if not self.jepa.enabled:
            return
        for name, value in (
            ("evaluation.stride_bytes", self.evaluation.stride_bytes),
            ("evaluation.window_bytes", self.evaluation.window_bytes),
        ):
            if value % self.jepa.chunk_bytes:
                raise ConfigError(
                    f"{name} {value} is not a multiple of jepa.chunk_bytes {self.jepa.chunk_bytes}",
                    hint="chunks of overlapping windows must coincide",
                )
        for _, length in self.data.stages:
            if length < self.jepa.chunk_bytes:
                raise ConfigError(f"data.sequence_bytes {length} is less than jepa.chunk_bytes {self.jepa.chunk_bytes}")
            sequences = (self.data.micro_batch_bytes or self.data.batch_bytes) // length
            if self.jepa.losses and sequences % (self.jepa.sigreg_group_sequences or 1):
                raise ConfigError(
                    f"jepa.sigreg_group_sequences {self.jepa.sigreg_group_sequences} does not divide the {sequences} sequences "
                    f"of {length} bytes in a micro-batch"
                )


def replace(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """Return `config` with settings replaced section by section: `replace(c, model={"num_layers": 6})`."""
    changed = {name: dataclasses.replace(getattr(config, name), **settings) for name, settings in sections.items()}
    return dataclasses.replace(config, **changed)
