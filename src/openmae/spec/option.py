"""What an option is made of: its declaration, the types with rules of their own, the base of a section."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from openmae.errors import SpecError
from openmae.spec.architectures import ARCHITECTURES, get_architecture


@dataclass(frozen=True)
class Search:
    """Where AutoML looks for the value of an option: inside what is legal, where good values lie.

    Attributes:
        low, high: bounds, both included; of an option with choices, None.
        log: draw by orders of magnitude.
        step: between values; None: any value, or any integer.
        weights: of choices, as text; how often a random draw takes each.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)


def option(
    default: Any,
    help: str,
    *,
    automl: bool | None = None,
    search: Search | None = None,
    needs: str | None = None,
    cond: str | None = None,
    popular: bool = False,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> Any:
    """Declare one option.

    Args:
        default: the value when the spec does not name the key; ``None`` when the stage, the
            architecture or the data decides.
        help: one line, shown by ``mae spec keys`` and in templates.
        automl: True: searched by default; False: never searched; None: searched when asked for.
        search: where AutoML looks; None: the user has to say, or, of an option with choices, at all of them.
        needs: ``key=value`` (several values: ``key=a|b``) or ``key>0`` without which the option does not act.
        cond: a sign and the key of another option, which bounds this one: ``< train.num_epochs``.
        popular: stands uncommented in templates.
        gt, ge, lt, le: bounds, as in pydantic.
    """
    extra: dict[str, Any] = {"automl": automl, "popular": popular, "search": search, "needs": needs, "cond": cond}
    return Field(default, description=help, json_schema_extra=extra, gt=gt, ge=ge, lt=lt, le=le)


def broken(rule: str) -> PydanticCustomError:
    """The error of a value that breaks a rule."""
    return PydanticCustomError("rule", "{rule}", {"rule": rule})


def _known_arch(name: str) -> str:
    try:
        return get_architecture(name).name
    except SpecError as error:
        message = f"{error.problem.removeprefix('model.arch: ')} {error.fix}"
        raise PydanticCustomError("said", "{message}", {"message": message}) from None


def _side_or_sides(value: Any) -> Any:
    sides = value if isinstance(value, list | tuple) else (value,)
    sides = [int(s) if isinstance(s, str) and s.isdecimal() else s for s in sides]
    if not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides) or len(sides) not in (
        1,
        2,
    ):
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
        raise broken("must be epochs in rising order, 1 or more")
    return epochs


def _distinct(ids: tuple[int, ...]) -> tuple[int, ...]:
    if not ids or min(ids) < 0 or len(set(ids)) != len(ids):
        raise broken("must name at least one GPU, each once, counted from 0")
    return ids


def _positive(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if values and min(values) <= 0:
        raise broken("must hold numbers > 0")
    return values


def _timm_policy(name: str) -> str:
    if name and name.split("-")[0] not in ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a"):
        raise broken("must be a timm policy such as rand-m9-mstd0.5-inc1, or empty for none")
    return name


ArchName = Annotated[str, AfterValidator(_known_arch), Field(json_schema_extra={"enum": list(ARCHITECTURES)})]
InputSize = Annotated[int | tuple[int, int], BeforeValidator(_side_or_sides)]
SharePair = Annotated[tuple[float, float], BeforeValidator(_number_or_pair)]
EngineType = Annotated[Literal["fp32", "fp16", "bf16", "int8", "fp32,fp16"], BeforeValidator(_lower)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
BatchOrAuto = Annotated[int, AfterValidator(_batch_or_auto)]
Milestones = Annotated[tuple[int, ...], AfterValidator(_rising)]
GpuIds = Annotated[tuple[int, ...], AfterValidator(_distinct)]
Deviations = Annotated[tuple[float, ...] | None, AfterValidator(_positive)]
AutoAugment = Annotated[str, AfterValidator(_timm_policy)]
EXPAND_USER = AfterValidator(os.path.expanduser)
LocalPath = Annotated[str, EXPAND_USER]
Secret = Annotated[str, Field(repr=False)]
KEY_IN_ENVIRONMENT, KEY_IN_FILE = "env:", "file:"  # what tells where a secret is, instead of the secret
SECRET_MARK = "***"  # stands for a secret that is not written down


def is_secret(text: str) -> bool:
    """Whether a ``Secret`` is the secret itself, and does not tell where it is."""
    return bool(text) and not text.startswith((KEY_IN_ENVIRONMENT, KEY_IN_FILE))


def _admits(annotation: Any, kind: type) -> bool:
    if get_origin(annotation) is Literal:
        return any(type(choice) is kind for choice in get_args(annotation))
    return annotation is kind or any(_admits(part, kind) for part in get_args(annotation))


def _choice_as_declared(value: str, annotation: Any) -> str:
    """``value``, or the choice of a ``Literal`` that differs from it in case only."""
    if get_origin(annotation) is Literal:
        return next((c for c in get_args(annotation) if isinstance(c, str) and c.lower() == value.lower()), value)
    for part in get_args(annotation):
        value = _choice_as_declared(value, part)
    return value


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_surprising_casts(cls, value: Any, info: Any) -> Any:
        """Keep ``true`` from meaning 1; let a path or a run named by an integer be text, and a choice have any case."""
        annotation = cls.model_fields[info.field_name].annotation
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
