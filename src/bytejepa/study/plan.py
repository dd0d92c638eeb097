"""Plans of ablation studies, as data: a base preset, variants of it, seeds, a budget, what is scored. Torch-free.

A plan is a TOML or JSON file, or the name of a built-in one (`plans/*.toml`). docs/ablations.md has the format.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from bytejepa.config import RunConfig
from bytejepa.config_fields import Fraction, PositiveInt, Range, Section
from bytejepa.config_json import from_dict, structured, to_dict
from bytejepa.errors import ConfigError, file_errors_as, nearest_hint
from bytejepa.presets import preset
from bytejepa.training.schedule import learning_rate_scale

BUILT_IN = Path(__file__).parent / "plans"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LEARNING_RATE_TOLERANCE = 0.005
"""How far a run's final learning-rate scale may lie from what its plan states."""

Noise = Literal["own", "pooled"]
Overrides = dict[str, dict[str, Any]]
"""Settings by section and name: {"model": {"num_layers": 4}}."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget(Section):
    """What ends every run of a study: exactly one of these."""

    steps: PositiveInt | None = None
    """Optimiser steps."""
    bytes: PositiveInt | None = None
    """Ids read over all ranks."""
    seconds: Annotated[float, Range(0.001)] | None = None
    """Seconds of training."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        given = [name for name in ("steps", "bytes", "seconds") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"budget: expected one of steps, bytes, seconds, got {', '.join(given) or 'none'}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Section):
    """How every artifact of a study is scored: sliding windows over the beginning of the validation split."""

    window_bytes: Annotated[int, Range(2)]
    """Context of a window, in ids."""
    stride_bytes: Annotated[int, Range(2)]
    """Ids scored a window."""
    validation_bytes: Annotated[int, Range(2)]
    """Leading ids of the validation split that are scored."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant(Section):
    """One arm of a study."""

    name: str
    """Letters, digits, dots, dashes and underscores: it becomes part of a folder's name."""
    tests: str
    """A sentence: what this arm tests."""
    overrides: Overrides = dataclasses.field(default_factory=dict)
    """On top of the plan's."""
    learning_rate_ends_at: Fraction | None = None
    """Final learning-rate scale, where the schedule is what the variant tests; None: the plan's."""
    base: str | None = None
    """Preset from which it derives; None: the plan's."""
    reads_otherwise: bool = False
    """It tests how the data is read: order, streams and growth of sequences may differ from the baseline's."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Section):
    """A whole study before it runs; a plan that exists is possible: every variant's configuration was built once."""

    name: str
    question: str
    """What the study is to answer."""
    base: str
    """Preset from which every variant derives."""
    baseline: str
    """Name of the variant with which all others are compared."""
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    budget: Budget
    evaluation: Evaluation
    overrides: Overrides = dataclasses.field(default_factory=dict)
    """For every variant, on top of the base and the budget."""
    data: str | None = None
    """Folder of shards; None: the embedded corpus."""
    learning_rate_ends_at: Fraction = 0.0
    """Learning-rate scale at which every run ends; a variant that ends elsewhere has to say so."""
    noise: Noise = "own"
    """Whose scatter over seeds the intervals rest on: each variant's own, or that of all variants taken together."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        for text in (self.question, *(variant.tests for variant in self.variants)):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ConfigError(
                    f"plan {self.name}: {text!r} holds half of a character, which cannot be printed"
                ) from None
        for name in (self.name, *(variant.name for variant in self.variants)):
            if not NAME.fullmatch(name):
                raise ConfigError(f"plan {self.name}: {name!r} is no name: letters, digits, dots, dashes, underscores")
        names = [variant.name for variant in self.variants]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"plan {self.name}: expected two or more variants of different names, got {names}")
        if self.baseline not in names:
            raise ConfigError(
                f"plan {self.name}: the baseline {self.baseline!r} is no variant",
                hint=nearest_hint(self.baseline, names),
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"plan {self.name}: expected one or more different seeds, got {list(self.seeds)}")
        if min(self.seeds) < 0:
            raise ConfigError(f"plan {self.name}: seeds: expected whole numbers of 0 or more, got {list(self.seeds)}")
        self._check_overrides()
        self._check_variants_are_comparable()

    def variant(self, name: str) -> Variant:
        """Return the variant called `name`, which must exist."""
        return next(variant for variant in self.variants if variant.name == name)

    def config(self, variant: Variant, seed: int) -> RunConfig:
        """Return the configuration of one run: base, budget and evaluation, the plan's overrides, the variant's, the seed.

        Raises: ConfigError for an unknown or impossible setting, with the nearest name.
        """
        where = f"plan {self.name}, variant {variant.name}"
        values = to_dict(preset(variant.base or self.base))
        for overrides in (self._budget_overrides(), self.overrides, variant.overrides):
            for section, settings in overrides.items():
                if not isinstance(settings, dict):
                    raise ConfigError(f"{where}: expected section.setting = value, got {section} = {settings!r}")
                known = values.setdefault(section, {})  # an unknown section is refused by from_dict
                known.update({name: _without_none(section, name, value) for name, value in settings.items()})
        values["training"]["seed"] = seed
        return from_dict(values, where=where)

    def _budget_overrides(self) -> Overrides:
        budget, evaluation = self.budget, self.evaluation
        return {
            "schedule": {"steps": budget.steps, "max_bytes": budget.bytes, "max_wallclock_s": budget.seconds},
            "evaluation": {"window_bytes": evaluation.window_bytes, "stride_bytes": evaluation.stride_bytes},
        }

    def expected_learning_rate_end(self, variant: Variant) -> float:
        """Return the learning-rate scale at which the runs of `variant` have to end."""
        own = variant.learning_rate_ends_at
        return self.learning_rate_ends_at if own is None else own

    def _check_overrides(self) -> None:
        """Refuse overrides that would say otherwise than the plan's own budget, evaluation and seeds."""
        everywhere = [(f"plan {self.name}", self.overrides)]
        everywhere += [(f"plan {self.name}, variant {variant.name}", variant.overrides) for variant in self.variants]
        for where, overrides in everywhere:
            for (section, name), entry in _STATED_BY_THE_PLAN.items():
                if name in overrides.get(section, {}):
                    raise ConfigError(
                        f"{where}: {section}.{name} cannot be overridden", hint=f"the plan's {entry} states it"
                    )

    def _check_variants_are_comparable(self) -> None:
        """Refuse variants that read other bytes, compute in another way, or end at another learning rate."""
        configs = {variant.name: self.config(variant, self.seeds[0]) for variant in self.variants}
        baseline = configs[self.baseline]
        for variant in self.variants:
            config = configs[variant.name]
            where = f"plan {self.name}, variant {variant.name}"
            for section, name in (pair for pair in _KEPT_EQUAL if not (variant.reads_otherwise and pair in _READING)):
                ours, theirs = (getattr(getattr(c, section), name) for c in (config, baseline))
                if ours != theirs:
                    raise ConfigError(
                        f"{where}: {section}.{name} is {ours}, the baseline's is {theirs}: "
                        "all runs of a study read the same bytes, in the same order, on the same terms",
                        hint="state reads_otherwise = true if that is what it tests"
                        if (section, name) in _READING
                        else None,
                    )
            if config.schedule.warmdown == "progress":
                ends_at = learning_rate_scale(config.schedule, progress=1.0, step=0, elapsed_s=0.0)
                self.check_learning_rate_end(variant, ends_at)

    def check_learning_rate_end(self, variant: Variant, ends_at: float) -> None:
        """Refuse a run of `variant` that ends at another learning-rate scale than stated. Raises: ConfigError."""
        expected = self.expected_learning_rate_end(variant)
        if abs(ends_at - expected) > LEARNING_RATE_TOLERANCE:
            raise ConfigError(
                f"plan {self.name}, variant {variant.name}: ends at learning-rate scale {ends_at:g}, expected {expected:g}",
                hint="change its schedule, or state learning_rate_ends_at if that is what it tests",
            )


_STATED_BY_THE_PLAN = {
    **{("schedule", name): "budget" for name in ("steps", "max_bytes", "max_wallclock_s")},
    **{("evaluation", name): "evaluation" for name in ("window_bytes", "stride_bytes")},
    ("training", "seed"): "seeds",
}
"""(section, setting): the plan's entry that decides it."""
_KEPT_EQUAL = (
    *(("data", name) for name in ("sequence_bytes", "batch_bytes", "order", "num_streams", "sequence_growth")),
    *(("training", name) for name in ("device", "precision", "compile", "attention")),
)
"""(section, setting) of what all variants of a plan share."""
_READING = (("data", "order"), ("data", "num_streams"), ("data", "sequence_growth"))
"""Of these, what a variant that says so may change: every step still reads batch_bytes."""


def built_in_plans() -> list[str]:
    """Return the names of the built-in plans, sorted."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def load_plan(name_or_path: str) -> Plan:
    """Return the built-in plan of that name, or the plan in a file (.toml or .json).

    Raises: ConfigError for what is neither, cannot be read, or is no possible plan; with the nearest name.
    """
    if name_or_path in built_in_plans():
        path = BUILT_IN / f"{name_or_path}.toml"
    else:
        path = Path(name_or_path)
        if path.suffix not in (".toml", ".json"):
            raise ConfigError(
                f"unknown plan {name_or_path!r}: neither built in nor a .toml or .json file",
                hint=nearest_hint(name_or_path, built_in_plans()),
            )
    with file_errors_as(ConfigError, "read the plan", path):
        content = path.read_bytes()
    try:
        values = tomllib.loads(content.decode()) if path.suffix == ".toml" else json.loads(content)
    except ValueError as problem:  # of either parser, and of the decoding
        raise ConfigError(f"{path}: not {path.suffix[1:].upper()}: {problem}") from None
    return plan_from_dict(values, where=str(path))


def plan_from_dict(values: Any, *, where: str = "plan") -> Plan:
    """Return the plan that `values` (as in a plan file or in study.json) describe.

    Raises: ConfigError that names what is missing, unknown (with the nearest name) or of the wrong kind.
    """
    fields = _known_fields(values, Plan, where)
    if not isinstance(fields["variants"], list | tuple):
        raise ConfigError(f"{where}: variants: expected a list, got {fields['variants']!r}")
    parts: dict[str, Any] = {
        "variants": tuple(
            Variant(**_typed_fields(value, Variant, f"{where}, variant {number}"))
            for number, value in enumerate(fields.pop("variants"), 1)
        ),
        "budget": Budget(**_typed_fields(fields.pop("budget"), Budget, f"{where}, budget")),
        "evaluation": Evaluation(**_typed_fields(fields.pop("evaluation"), Evaluation, f"{where}, evaluation")),
    }
    return Plan(**_typed(fields, Plan, where), **parts)


def override(plan: Plan, *, steps: int | None = None, seeds: tuple[int, ...] | None = None) -> Plan:
    """Return `plan` with a budget of `steps`, or other seeds. Raises: ConfigError for an impossible one."""
    return dataclasses.replace(
        plan,
        budget=plan.budget if steps is None else Budget(steps=steps),
        seeds=plan.seeds if seeds is None else seeds,
    )


def _typed_fields(values: Any, kind: type, where: str) -> dict[str, Any]:
    return _typed(_known_fields(values, kind, where), kind, where)


def _typed(fields: dict[str, Any], kind: type, where: str) -> dict[str, Any]:
    """Return the values of some fields of `kind` as it declares them. Raises: ConfigError for one of another type."""
    types_of = typing.get_type_hints(kind)
    if "overrides" in fields:
        fields["overrides"] = _nested(fields["overrides"], where)
    for name, value in fields.items():
        if typing.get_origin(types_of[name]) is tuple and not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: {name}: expected a list, got {value!r}")
    return {name: structured(value, types_of[name], where=f"{where}: {name}") for name, value in fields.items()}


def _known_fields(values: Any, kind: type, where: str) -> dict[str, Any]:
    """Return a copy of `values`, the names of whose keys are fields of `kind`, none missing that is needed."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a table of names and values, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown entry {key!r}", hint=nearest_hint(str(key), list(fields)))
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise ConfigError(f"{where}: {name} is missing")
    return dict(values)


def _nested(overrides: Any, where: str) -> Overrides:
    """Return overrides by section, whether written as tables or as "section.setting"."""
    if not isinstance(overrides, dict):
        raise ConfigError(f"{where}: overrides: expected a table, got {overrides!r}")
    nested: Overrides = {}
    for key, value in overrides.items():
        section, dot, setting = key.partition(".")
        if not dot and not isinstance(value, dict):
            raise ConfigError(f"{where}: expected section.setting = value, got {key} = {value!r}")
        nested.setdefault(section, {}).update({setting: value} if dot else value)
    return nested


def _without_none(section: str, name: str, value: Any) -> Any:
    """Return None for the word "None" where the setting can be off: TOML has no word for it."""
    if value != "None":
        return value
    annotation = typing.get_type_hints(typing.get_type_hints(RunConfig).get(section, object)).get(name)
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return None if is_union and type(None) in typing.get_args(annotation) else value
