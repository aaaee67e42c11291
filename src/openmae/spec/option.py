"""Options of the spec: their declaration and traits, types with rules, and the base class of all sections."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from openmae.errors import SpecError
from openmae.spec.architectures import ARCHITECTURES, get_architecture

Stage = Literal["pretrain", "finetune"]
PRETRAIN: tuple[Stage, ...] = ("pretrain",)
FINETUNE: tuple[Stage, ...] = ("finetune",)
# Traits that several options share:
EXECUTION: dict[str, Any] = {"automl": False, "on_resume": "allow", "in_search": False}  # where and how long it runs
TAO_NAME: dict[str, Any] = {"compat": True, "on_resume": "allow"}


@dataclass(frozen=True)
class Search:
    """The range in which AutoML looks for the value of an option: inside the legal values, where good values are.

    Attributes:
        low: smallest value; None for an option with choices.
        high: largest value; None for an option with choices.
        log: sample on a logarithmic scale.
        step: distance between values; None: any value, or any integer.
        weights: probability of each choice in a random draw, by the choice as text.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Traits:
    """The behaviour of an option.

    Attributes:
        stages: the stages of training that use it.
        needs: a condition without which it has no effect: ``key=value``, ``key>0``, or ``key``, which must be set.
        no_effect: why it never has an effect; such an option is accepted because TAO's specs have it.
        compat: another name that TAO's specs have for an option, or an option without effect: not in templates.
        on_resume: a resumed run with another value is refused, continues with a warning, or continues.
        in_search: a search with another value is another search.
        changes_loss: losses of two pretraining runs with different values cannot be compared.
        automl: True: searched by default. False: never searched. None: searched on request.
        search: the range to search; None: the user has to give one, or it has choices, which are all tried.
        cond: a sign and the key of another option, which is a bound of this one: ``< train.num_epochs``.
        popular: active in templates.
        recipe: ``train.recipe`` chooses the value of a training run if it is unset (``spec/recipe.py``).
        tao: what TAO does with the option.
    """

    stages: tuple[Stage, ...] = ("pretrain", "finetune")
    needs: str = ""
    no_effect: str = ""
    compat: bool = False
    on_resume: Literal["refuse", "warn", "allow"] = "warn"
    in_search: bool = True
    changes_loss: bool = False
    automl: bool | None = None
    search: Search | None = None
    cond: str = ""
    popular: bool = False
    recipe: bool = False
    tao: Literal["applies", "lacks", "ignores", "ignores in pretraining"] = "applies"

    @property
    def in_tao(self) -> bool:
        """True if TAO has the option."""
        return self.tao != "lacks"

    @property
    def ignored_by_tao(self) -> tuple[Stage, ...]:
        """The stages in which OpenMAE uses the option and TAO ignores it."""
        return {"ignores": self.stages, "ignores in pretraining": PRETRAIN}.get(self.tao, ())

    @property
    def bound(self) -> tuple[str, str]:
        """The sign and the other key of ``cond``; both are empty if there is none."""
        sign, _, key = self.cond.partition(" ")
        return sign, key

    @property
    def condition(self) -> tuple[str, str]:
        """The key that ``needs`` names, and what its value must be: a value, ``>0``, or empty for any true value."""
        if self.needs.endswith(">0"):
            return self.needs.removesuffix(">0"), ">0"
        key, _, wanted = self.needs.partition("=")
        return key, wanted


def meets(value: Any, wanted: str) -> bool:
    """Return whether a value satisfies ``Traits.condition``."""
    if wanted == ">0":
        return (value or 0) > 0
    return str(value).lower() == wanted.lower() if wanted else bool(value)


def option(
    default: Any,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    **traits: Any,
) -> Any:
    """Declare an option.

    Args:
        default: the value if the spec does not set the key. None for a type without None: ``load_spec`` derives it from
            other options (``spec/resolved.py``).
        help: one line, shown by ``mae spec keys`` and in templates.
        gt: exclusive lower bound.
        ge: lower bound.
        lt: exclusive upper bound.
        le: upper bound.
        traits: attributes of ``Traits``.
    """
    declared = Traits(**traits)
    notes = ["finetune"] if declared.stages == FINETUNE else []
    notes += [] if declared.in_tao else ["not in TAO"]
    notes += ["recipe"] if declared.recipe else []
    help += f" ({', '.join(notes)})" if notes else ""
    return Field(default, description=help, json_schema_extra={"traits": declared}, gt=gt, ge=ge, lt=lt, le=le)  # type: ignore[dict-item]


class TypeWords(str):
    """The description of a type of an option."""

    __slots__ = ()


class FileUse(Enum):
    """The use of the file or folder that an option names."""

    READ = "read"  # a local path or a URL
    WRITTEN = "written"  # a local path or an object store
    LOCAL = "local"  # a local path


def broken(rule: str) -> PydanticCustomError:
    """Return the error for a value that breaks a rule."""
    return PydanticCustomError("rule", "{rule}", {"rule": rule})


def _known_arch(name: str) -> str:
    try:
        return get_architecture(name).name
    except SpecError as error:
        message = f"{error.problem.removeprefix('model.arch: ')} {error.fix}"
        raise PydanticCustomError("message", "{message}", {"message": message}) from None


def _side_or_sides(value: Any) -> Any:
    sides = value if isinstance(value, list | tuple) else (value,)
    sides = [int(s) if isinstance(s, str) and s.isdecimal() else s for s in sides]
    if len(sides) not in (1, 2) or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides):
        raise broken("must be a number of pixels, or [height, width]")
    return tuple(sides) if len(sides) == 2 else sides[0]


def _number_or_pair(value: Any) -> Any:
    shares = value if isinstance(value, list | tuple) else (value, value)
    numbers = all(isinstance(s, int | float) and not isinstance(s, bool) for s in shares)
    if len(shares) != 2 or not numbers or not 0 <= shares[0] <= shares[1] <= 1:
        raise broken("must be [min, max] with 0 <= min <= max <= 1, or one number for both")
    return tuple(map(float, shares))


def _texts(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in values)


def _lower(value: Any) -> Any:
    return value.lower().replace(" ", "") if isinstance(value, str) else value


def _batch_or_auto(value: int) -> int:
    if value == 0 or value < -1:
        raise broken("must be -1 (automatic) or at least 1")
    return value


def _rising(epochs: tuple[int, ...]) -> tuple[int, ...]:
    if any(e < 1 for e in epochs) or list(epochs) != sorted(set(epochs)):
        raise broken("must be epochs in ascending order, 1 or more")
    return epochs


def _distinct(ids: tuple[int, ...]) -> tuple[int, ...]:
    if not ids or min(ids) < 0 or len(set(ids)) != len(ids):
        raise broken("must name at least one GPU, each once, counted from 0")
    return ids


def _positive(values: tuple[float, ...]) -> tuple[float, ...]:
    if values and min(values) <= 0:
        raise broken("must contain numbers > 0")
    return values


def _timm_policy(name: str) -> str:
    if name and name.split("-")[0] not in ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a"):
        raise broken("must be a timm policy such as rand-m9-mstd0.5-inc1, or empty for none")
    return name


ArchName = Annotated[str, AfterValidator(_known_arch), Field(json_schema_extra={"enum": list(ARCHITECTURES)})]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
InputSize = Annotated[int | tuple[int, int], BeforeValidator(_side_or_sides), TypeWords("integer or [height, width]")]
SharePair = Annotated[tuple[float, float], BeforeValidator(_number_or_pair), TypeWords("number or [min, max]")]
EngineType = Annotated[Literal["fp32", "fp16", "bf16", "int8", "fp32,fp16"], BeforeValidator(_lower)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
BatchOrAuto = Annotated[int, AfterValidator(_batch_or_auto)]
Milestones = Annotated[tuple[int, ...], AfterValidator(_rising)]
GpuIds = Annotated[tuple[int, ...], AfterValidator(_distinct)]
Deviations = Annotated[tuple[float, ...], AfterValidator(_positive)]
AutoAugment = Annotated[str, AfterValidator(_timm_policy)]
_EXPAND_USER = AfterValidator(os.path.expanduser)
InputPath = Annotated[str, _EXPAND_USER, FileUse.READ]
OutputPath = Annotated[str, _EXPAND_USER, FileUse.WRITTEN]
LocalFile = Annotated[str, _EXPAND_USER, FileUse.LOCAL]
Secret = Annotated[str, Field(repr=False)]
KEY_IN_ENVIRONMENT, KEY_IN_FILE = "env:", "file:"  # prefixes of a reference to a secret
SECRET_MARK = "***"  # written instead of a secret


def is_secret(text: str) -> bool:
    """Return whether a ``Secret`` is the secret itself, not a reference to it."""
    return bool(text) and not text.startswith((KEY_IN_ENVIRONMENT, KEY_IN_FILE))


def _admits(annotation: Any, kind: type) -> bool:
    if get_origin(annotation) is Literal:
        return any(type(choice) is kind for choice in get_args(annotation))
    return annotation is kind or any(_admits(part, kind) for part in get_args(annotation))


def _choice_as_declared(value: str, annotation: Any) -> str:
    """Return the choice of a ``Literal`` that equals ``value`` up to case; if there is none, ``value``."""
    if get_origin(annotation) is Literal:
        return next((c for c in get_args(annotation) if isinstance(c, str) and c.lower() == value.lower()), value)
    for part in get_args(annotation):
        value = _choice_as_declared(value, part)
    return value


class Section(BaseModel):
    """Base of all sections: immutable, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_surprising_casts(cls, value: Any, info: Any) -> Any:
        """Refuse ``true`` as 1; accept paths and integers as text, and choices in any case."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and "off" in get_args(annotation):
            value = "on" if value else "off"  # as YAML reads them
        if isinstance(value, str):
            value = _choice_as_declared(value, annotation)
        if _admits(annotation, str):
            if isinstance(value, os.PathLike):
                return os.fspath(value)
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
        items = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(item, bool) for item in items) and not _admits(annotation, bool):
            raise PydanticCustomError("bool_type", "must not be true or false")
        return value
