"""The configuration of a run: frozen dataclasses in which every field carries its unit and its range.

`RunConfig` is the sum of its sections; the presets in `bytejepa.presets` are functions that derive one from another.
What the network is stands in `config_model`, ranges and their check in `config_fields`. `None` means off. Checks happen on
construction, so a configuration that exists is possible. This module imports neither torch nor numpy:
`bytejepa --help` and `bytejepa config` answer at once.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from bytejepa.config_fields import Decay, Fraction, NonNegative, NonNegativeInt, PositiveInt, Range, Section
from bytejepa.config_model import JepaConfig, ModelConfig
from bytejepa.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
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
        Section.__post_init__(self)
        stages = self.stages
        growth = self.sequence_growth
        if growth and growth[0][0] == 0 and growth[-1][1] != self.sequence_bytes:
            raise ConfigError(
                f"data.sequence_bytes {self.sequence_bytes} is not the last length of data.sequence_growth, {growth[-1][1]}",
                hint="set both, or data.sequence_growth None",
            )
        for (begin, length), (name, _) in zip(stages, self.named_lengths, strict=True):
            if not 0 <= begin < 1 or length < 2:
                raise ConfigError(
                    f"data.sequence_growth: expected (progress in [0, 1), ids >= 2), got ({begin:g}, {length})"
                )
            if self.batch_bytes % length:
                raise ConfigError(f"data.batch_bytes {self.batch_bytes} is not a multiple of {name} {length}")
            if self.order == "sequential" and (self.batch_bytes // length) % self.num_streams:
                raise ConfigError(
                    f"data.num_streams {self.num_streams} does not divide the {self.batch_bytes // length} sequences of a step"
                )
            if self.micro_batch_bytes is not None and self.micro_batch_bytes % length:
                raise ConfigError(
                    f"data.micro_batch_bytes {self.micro_batch_bytes} is not a multiple of {name} {length}"
                )
        if sorted(stages) != list(stages) or len({begin for begin, _ in stages}) != len(stages):
            raise ConfigError("data.sequence_growth: the progress of each stage must be larger than the one before")

    @property
    def stages(self) -> tuple[tuple[float, int], ...]:
        """(progress from which it holds, sequence_bytes) of every stage; the first begins at 0."""
        growth = self.sequence_growth or ()
        return growth if growth and growth[0][0] == 0 else ((0.0, self.sequence_bytes), *growth)

    @property
    def named_lengths(self) -> tuple[tuple[str, int], ...]:
        """(name of the setting that says so, ids of a sequence) of every stage."""
        stages = self.stages
        first_grown = len(stages) - len(self.sequence_growth or ())
        names = ["data.sequence_bytes"] * first_grown + ["data.sequence_growth"] * (len(stages) - first_grown)
        return tuple((name, length) for name, (_, length) in zip(names, stages, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Section):
    """Muon on the matrices, AdamW on the rest (docs/training.md)."""

    matrix_lr: NonNegative = 0.025
    """Muon's learning rate, in units of spectral norm an update."""
    embedding_lr: NonNegative = 0.035
    """AdamW's learning rate of the token, bigram, n-gram and value embeddings and of the extra heads."""
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
    muon_beta2: Decay | None = None
    """Decay of a running mean square of each neuron's updates, by whose root it is divided once orthogonalised (NorMuon); None:
    not divided."""
    muon_cautious_weight_decay: bool = False
    """Weights that the update moves away from zero do not decay."""
    adam_beta1: Decay = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Decay = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: Annotated[float, Range(1e-20)] = 1e-8
    """AdamW's epsilon; zero would divide nothing by nothing in rows that have had no gradient."""
    gradient_clip: Annotated[float, Range(1e-6)] | None = 0.3
    """Largest global gradient norm; None: no clipping."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.muon_cautious_weight_decay and not self.muon_weight_decay:
            raise ConfigError(
                "optimizer.muon_cautious_weight_decay: nothing decays",
                hint="set optimizer.muon_weight_decay above 0, or optimizer.muon_cautious_weight_decay to False",
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Section):
    """When training ends and how the learning rate gets there. Whichever bound comes first ends it."""

    steps: PositiveInt | None = 9000
    """Optimiser steps; None: no bound."""
    max_bytes: PositiveInt | None = None
    """Ids read over all ranks; None: no bound."""
    max_wallclock_s: Annotated[float, Range(0.001)] | None = None
    """Seconds of training, without compilation, warm-up, validation and checkpoints; None: no bound."""
    warmdown: Literal["progress", "mean_step_time"] = "progress"
    """`progress`: linear to warmdown_to, reached exactly where training ends; `mean_step_time`: the reference's rule, linear
    once the remaining wallclock is under warmdown_steps mean step times."""
    warmdown_fraction: Fraction = 0.4
    """For `progress`: last share of the run over which the learning rate falls to warmdown_to."""
    warmdown_to: Fraction = 0.0
    """For `progress`: learning-rate scale at which the run ends (the reference's ended at 0.167)."""
    warmdown_steps: PositiveInt = 3000
    """For `mean_step_time`: length of the fall."""
    warmup_fraction: Fraction = 0.0
    """First share of the run over which the learning rate rises linearly from zero."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.steps is None and self.max_bytes is None and self.max_wallclock_s is None:
            raise ConfigError(
                "schedule: nothing ends the run",
                hint="set one of schedule.steps, schedule.max_bytes, schedule.max_wallclock_s",
            )
        if self.warmdown == "mean_step_time":
            if self.steps is None:
                raise ConfigError("schedule.warmdown mean_step_time needs schedule.steps")
            if self.warmup_fraction:
                raise ConfigError(
                    f"schedule.warmup_fraction {self.warmup_fraction:g} is for schedule.warmdown progress, not mean_step_time"
                )
        elif self.warmup_fraction + self.warmdown_fraction > 1:
            raise ConfigError(
                f"schedule.warmup_fraction {self.warmup_fraction:g} and schedule.warmdown_fraction {self.warmdown_fraction:g} "
                "are more than 1 together",
                hint="the learning rate would never reach its peak",
            )
        elif self.warmdown_to and not self.warmdown_fraction:
            raise ConfigError(
                f"schedule.warmdown_to {self.warmdown_to:g} is never reached with schedule.warmdown_fraction 0",
                hint="without a fall the rate ends where it is; leave schedule.warmdown_to at 0",
            )


AttentionBackend = Literal["auto", "flash4", "flash3", "cudnn", "blocked", "flash", "flex", "efficient", "math"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(Section):
    """How the run is carried out."""

    seed: NonNegativeInt = 1337
    """Seed of initialisation, data order and SIGReg directions."""
    ema_decay: Decay | None = 0.997
    """Decay of the exponential moving average of all weights; None: export the last weights."""
    ema_warmup: bool = True
    """Begin with a smaller decay, (1 + step) / (10 + step), so that a short run's average forgets the initial weights."""
    swa_start: Decay | None = None
    """Progress from which an equal-weight average (SWA) is kept instead of the EMA; None: off."""
    swa_every_steps: PositiveInt = 50
    """Steps between two weights that enter the SWA average."""
    qat_start: Fraction | None = None
    """Progress from which the matrices of the blocks are trained rounded to the nearest code at the scales that the artifact
    will have (0: from the start); None: off. Not with artifact.clip sensitivity or artifact.fit, whose scales only the
    finished weights decide."""
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
    """Steps between validations; None: only at the end, where the data has a validation split."""
    validation_bytes: Annotated[int, Range(2)] | None = None
    """Leading ids of the validation split used while training, the first of which is not scored; None: all."""
    log_every_steps: PositiveInt = 10
    """Steps between lines in metrics.jsonl."""
    checkpoint_every_s: NonNegative | None = 300.0
    """Seconds between checkpoints; None: only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""

    @property
    def keeps_average(self) -> bool:
        """Whether an average of the weights is kept and exported; otherwise it is the last weights."""
        return self.ema_decay is not None or self.swa_start is not None

    def compiles_on(self, device_type: str) -> bool:
        """Return whether training on a device of this type ("cpu", "cuda") is compiled."""
        return self.compile == "on" or (self.compile == "auto" and device_type == "cuda")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig(Section):
    """How a score is taken."""

    window_bytes: Annotated[int, Range(2, 1 << 20)] = 4096
    """Context of a scoring window, in ids."""
    stride_bytes: PositiveInt = 512
    """Ids scored a window in sliding evaluation; a multiple of jepa.chunk_bytes."""
    batch_bytes: PositiveInt = 65_536
    """Ids a forward pass while scoring."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.stride_bytes > self.window_bytes:
            raise ConfigError(
                f"evaluation.stride_bytes {self.stride_bytes} is more than evaluation.window_bytes {self.window_bytes}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactConfig(Section):
    """How weights become a file (docs/artifact.md)."""

    matrix_bits: Annotated[int, Range(2, 8)] = 6
    """Bits of a weight of the attention and MLP matrices."""
    other_bits: Annotated[int, Range(2, 8)] = 8
    """Bits of a weight of the embeddings and JEPA matrices."""
    scales: Literal["per_row", "reference_floor"] = "per_row"
    """`per_row`: each row its own step; `reference_floor`: never under 1/31 (int6) or 1/127 (int8)."""
    clip: Literal["max", "mean_squared_error", "standard_deviations", "sensitivity"] = "mean_squared_error"
    """What a row's range covers: its largest weight; the range with the least squared error; a multiple of its root mean
    square (SDClip); or a range inverse to how much the row matters, its root mean square gradient, times that of its inputs."""
    clip_standard_deviations: Annotated[float, Range(0.1, 10_000)] = 12.85
    """For the clip `standard_deviations`, and on average for `sensitivity`: range of a block's matrix in root mean squares.
    Larger is coarser and smaller on disk; `bytejepa export --fit` finds it."""
    other_clip_standard_deviations: Annotated[float, Range(0.1, 10_000)] = 20.0
    """For `standard_deviations`: the same of the embeddings and JEPA matrices."""
    scale_digits: Annotated[int, Range(1, 10)] = 10
    """For these two: binary digits of a row's scale that are kept."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """Each weight to the nearest code, or column by column with the error spread over later columns (GPTQ)."""
    gptq_damping: Annotated[float, Range(1e-6, 1)] = 0.01
    """For `gptq`: what is added to the inputs' second moments, relative to their mean."""
    calibration_bytes: PositiveInt = 32_768
    """Ids of training text on which `gptq` and `sensitivity` observe the model."""
    hidden_order: Literal["as_trained", "by_scale"] = "as_trained"
    """Order of hidden units, which changes nothing but the sum's rounding: by scale, rows that are alike stand together."""
    small_tensor_elements: NonNegativeInt = 4096
    """Tensors of at most this many elements are stored as float16 (reference: 65,536)."""
    codecs: tuple[Literal["rans", "zstd", "brotli"], ...] = ("zstd", "brotli")
    """Compressors tried on each stream; the smallest result is kept. `rans` codes the codes of all matrices together."""
    fit: bool = False
    """Search the clip with which code and weights just fit into limit_bytes; for the clips of standard deviations and
    sensitivity."""
    limit_bytes: PositiveInt = 16_000_000
    """Budget for code plus compressed weights, in decimal bytes."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        chosen = (self.matrix_bits, self.other_bits, self.clip, self.rounding)
        if self.scales == "reference_floor" and chosen != (6, 8, "max", "nearest"):
            raise ConfigError(
                f"artifact.scales reference_floor is the reference's rule: expected matrix_bits 6, other_bits 8, clip max, "
                f"rounding nearest, got {', '.join(map(str, chosen))}",
                hint="use artifact.scales per_row",
            )
        if self.fit and self.clip not in ("standard_deviations", "sensitivity"):
            raise ConfigError(
                f"artifact.fit has nothing to search with artifact.clip {self.clip}",
                hint="use standard_deviations or sensitivity",
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
        self._check_chunk_stride()
        self._check_multi_token_heads()
        if self.jepa.enabled:
            self._check_jepa_chunks()

    def _check_chunk_stride(self) -> None:
        if self.model.chunk_blocks is None:
            return
        stride = self.model.chunk_stride_bytes
        for name, length in (*self.data.named_lengths, ("evaluation.window_bytes", self.evaluation.window_bytes)):
            if length < stride:
                raise ConfigError(
                    f"{name} {length} is less than model.chunk_stride_bytes {stride}",
                    hint="no chunk would ever be whole, and model.chunk_blocks never run",
                )

    def _check_multi_token_heads(self) -> None:
        for name, length in self.data.named_lengths:
            if self.model.multi_token_heads >= length:
                raise ConfigError(
                    f"model.multi_token_heads {self.model.multi_token_heads} looks past the end of a sequence of {length} bytes, "
                    f"from {name}",
                    hint="the last head would never be trained; use longer sequences or fewer heads",
                )

    def _check_jepa_chunks(self) -> None:
        for name, value in (
            ("evaluation.stride_bytes", self.evaluation.stride_bytes),
            ("evaluation.window_bytes", self.evaluation.window_bytes),
        ):
            if value % self.jepa.chunk_bytes:
                raise ConfigError(
                    f"{name} {value} is not a multiple of jepa.chunk_bytes {self.jepa.chunk_bytes}",
                    hint="chunks of overlapping windows must coincide",
                )
        for name, length in self.data.named_lengths:
            if length < self.jepa.chunk_bytes:
                raise ConfigError(f"{name} {length} is less than jepa.chunk_bytes {self.jepa.chunk_bytes}")
            chunks = length // self.jepa.chunk_bytes
            if self.jepa.losses and self.jepa.horizons > 1 and chunks <= self.jepa.horizons:
                raise ConfigError(
                    f"jepa.horizons {self.jepa.horizons} looks past the {chunks} chunks of a sequence of {length} bytes",
                    hint="the predictors beyond would never be trained; use longer sequences or fewer horizons",
                )
            sequences = (self.data.micro_batch_bytes or self.data.batch_bytes) // length
            if (
                self.jepa.losses
                and self.jepa.sigreg_standardize
                and chunks * (self.jepa.sigreg_group_sequences or sequences) < 2
            ):
                raise ConfigError(
                    "jepa.sigreg_standardize needs two latents a sample, and a sample is one sequence of one chunk",
                    hint="use longer sequences or a larger jepa.sigreg_group_sequences",
                )
            if self.jepa.losses and sequences % (self.jepa.sigreg_group_sequences or 1):
                raise ConfigError(
                    f"jepa.sigreg_group_sequences {self.jepa.sigreg_group_sequences} does not divide the {sequences} sequences "
                    f"of {length} bytes in a micro-batch",
                    hint="set it to a divisor, or to None for one sample of all of them",
                )


def replace(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """Return `config` with settings replaced section by section: `replace(c, model={"num_layers": 6})`."""
    changed = {name: dataclasses.replace(getattr(config, name), **settings) for name, settings in sections.items()}
    return dataclasses.replace(config, **changed)
