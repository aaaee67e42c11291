"""The search space: the options to search and their ranges, from the schema, the spec and ``automl.ranges``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openmae.errors import SpecError
from openmae.spec.architectures import ARCHITECTURES
from openmae.spec.describe import bounds, choices, fields, similar_keys, traits, why_illegal
from openmae.spec.load import ALIASES, find_refusals
from openmae.spec.notices import why_unused
from openmae.spec.option import Search, meets
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of

if TYPE_CHECKING:
    from optuna import Trial

_SECTIONS = ("model.", "dataset.augmentation.", "dataset.batch_size", "train.")
_EPOCHS = "train.num_epochs"
_AROUND = 8.0  # a logarithmic range reaches from this fraction to this multiple of a value that a recipe has chosen


@dataclass(frozen=True)
class Parameter:
    """An option to search.

    Attributes:
        key: dotted key.
        low, high: inclusive bounds of a number.
        choices: values to choose from; empty for a number.
        weights: relative probability of each choice in a random draw; empty if all are equal.
        log: whether to search on a logarithmic scale.
        step: distance between values; None for a continuous number, or 1 for integers.
        integer: whether values are integers.
        own: value in the spec; None if it is unset or not in the range.
        needs: another searched option, and its value for which this one has an effect; None if it always has.
    """

    key: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()
    weights: tuple[float, ...] = ()
    log: bool = False
    step: float | None = None
    integer: bool = False
    own: Any = None
    needs: tuple[str, str] | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of a number."""
        return self.low, self.high

    @property
    def range_words(self) -> str:
        """Range in words, such as ``2e-05 to 0.005, log`` or ``cosine, MultiStep``."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        step = f", in steps of {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}{step}"

    def has_effect(self, params: Mapping[str, Any]) -> bool:
        """Return whether the option has an effect with the values drawn so far."""
        return self.needs is None or (self.needs[0] in params and meets(params[self.needs[0]], self.needs[1]))

    def suggest(self, trial: Trial) -> Any:
        """Let Optuna choose a value."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.integer:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return trial.suggest_int(self.key, low, high, log=self.log, step=step)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True)
class Space:
    """The options to search.

    Attributes:
        parameters: the options, each after the one that it depends on.
        left_out: options searched by default that cannot be searched with this spec, with the reason.
    """

    parameters: tuple[Parameter, ...]
    left_out: Mapping[str, str]

    @property
    def own(self) -> dict[str, Any]:
        """The values in the spec, which trial 0 uses; it draws those that are unset or not in their range."""
        params: dict[str, Any] = {}
        for item in self.parameters:
            if item.own is not None and item.has_effect(params):
                params[item.key] = item.own
        return params

    def is_own(self, params: Mapping[str, Any]) -> bool:
        """Return whether trial 0, which has these parameters, drew none of them."""
        return params.keys() == self.own.keys()

    @property
    def conditional(self) -> bool:
        """True if an option has an effect only with some values of another one."""
        return any(item.needs for item in self.parameters)

    @property
    def log_keys(self) -> frozenset[str]:
        """Keys of the options searched on a logarithmic scale."""
        return frozenset(item.key for item in self.parameters if item.log)

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Let Optuna choose the values of a trial, except for options that have no effect in it."""
        params: dict[str, Any] = {}
        for item in self.parameters:
            if item.has_effect(params):
                params[item.key] = item.suggest(trial)
        return params


def make_space(spec: ExperimentSpec) -> Space:
    """Return the search space of a resolved spec: the options in ``automl.parameters``, or those searched by default.

    Raises:
        SpecError: an option is unknown, cannot be searched or has no effect, or a range is invalid. The message reports
            all mistakes.
    """
    named = [ALIASES.get(key, key) for key in spec.automl.parameters]
    ranges = {ALIASES.get(key, key): value for key, value in spec.automl.ranges.items()}
    wanted = named or [key for key in fields() if traits(key).automl is True]
    problems = [
        f"automl.ranges.{key}: {_unknown(key) or 'it is not in automl.parameters. Add it there, or remove it.'}"
        for key in ranges
        if key not in wanted
    ]
    found: dict[str, Parameter] = {}
    left_out: dict[str, str] = {}
    for key in dict.fromkeys(wanted):
        given = bool(named)
        outcome: Parameter | str = _unknown(key) or _not_searchable(key) or _without_effect(spec, key, wanted)
        if outcome and given:
            outcome = f"automl.parameters: {key}: {outcome}"
        elif not outcome:
            outcome = _parameter(spec, key, ranges.get(key), wanted)
            given = given or key in ranges
        if isinstance(outcome, Parameter):
            found[key] = outcome
        elif given:
            problems.append(outcome)
        else:
            left_out[key] = outcome
    problems += [] if problems else _rejected(spec, found)
    if problems:
        raise SpecError("\n".join(dict.fromkeys(problems)), "`mae spec keys` lists all options and their bounds.")
    if not found:
        why = "; ".join(f"{key}: {why}" for key, why in left_out.items())
        raise SpecError(
            f"automl.parameters: nothing is left to search: {why}", "Name options that have an effect in this stage."
        )
    return Space(tuple(_ordered(found)), left_out)


def _unknown(key: str) -> str:
    if key in fields():
        return ""
    near = similar_keys(key)
    return "there is no such option." + (f" Did you mean {' or '.join(near)}?" if near else "")


def _not_searchable(key: str) -> str:
    if key == _EPOCHS:
        return "it is the length of a trial and cannot be searched. Set automl.max_epochs."
    if not key.startswith(_SECTIONS) or traits(key).automl is False:
        return "it cannot be searched: it sets what is trained and where, not how well. Set it in the spec."
    return ""


def _without_effect(spec: ExperimentSpec, key: str, wanted: list[str]) -> str:
    """Return why an option has no effect in a spec; empty if it has one."""
    if key == "train.optim.lr" and spec.train.optim.base_lr is not None:
        return (
            "train.optim.base_lr replaces it. Search train.optim.base_lr instead, and set its range in automl.ranges."
        )
    if key == "train.optim.base_lr" and spec.is_set("train.optim.lr"):
        return "train.optim.lr is set, and both set the learning rate. Remove train.optim.lr."
    declared = traits(key)
    if spec.train.stage in declared.stages and declared.condition[0] in wanted:
        return ""
    if why := why_unused(spec, key):
        return f"it has no effect {why}."
    return "it is TAO's name of another option. Search that one." if declared.compat else ""


def _parameter(spec: ExperimentSpec, key: str, given: tuple[Any, ...] | None, wanted: list[str]) -> Parameter | str:
    """Return the parameter of a key, with the user's range if one is given, or a message if the range is invalid."""
    field, own = fields()[key], value_of(spec, key)
    low: Any
    high: Any
    search = traits(key).search or Search()
    needs = traits(key).condition if traits(key).condition[0] in wanted else None
    known: tuple[Any, ...] = (True, False) if field.annotation is bool else choices(field)
    if given is not None and (problem := why_illegal(key, given)):
        return f"automl.ranges.{key}: {problem}"
    if known or (given is not None and not (len(given) == 2 and all(map(_is_number, given)))):
        if given is None and key == "model.arch":
            return f"automl.ranges.{key}: list the architectures, such as [vit_tiny_patch16, vit_small_patch16]."
        values = given or known
        if len(set(map(str, values))) < len(values):
            return f"automl.ranges.{key}: lists a choice twice: {', '.join(map(str, values))}."
        weights = tuple(search.weights.get(str(value), 1.0) for value in values) if search.weights else ()
        return Parameter(key, choices=values, weights=weights, own=own if own in values else None, needs=needs)
    if given is None and search.low is None:
        return f"automl.ranges.{key}: it has no default range. Give [low, high] or a list of choices."
    integer = field.annotation is int or field.annotation == (int | None)
    low, high = given or (search.low, search.high)
    if given is None:
        if key in spec.chosen and search.log and own:  # around the value of the recipe
            low, high = _legal(key, own / _AROUND), _legal(key, own * _AROUND)
        if _is_number(own):  # trial 0 uses the value in the spec
            low, high = min(low, own), max(high, own)
        low, high = _capped(spec, key, low, high, integer, wanted)
        own = min(max(own, low), high) if _is_number(own) else None
    step = search.step
    if step:
        low, high, step = _on_steps(step, low, high, own)
    if low >= high:
        steps = f" in steps of {step:g}" if step else ""
        return (
            f"automl.ranges.{key}: [{low:g}, {high:g}]{steps} leaves nothing to search. Give the lower number first; "
            "other options, such as the epochs, narrow the range too."
        )
    if traits(key).bound[1] == _EPOCHS and high >= spec.trial_epochs:
        return (
            f"automl.ranges.{key}: must stay below the {spec.trial_epochs} epochs of a trial, got {low:g} to {high:g}. "
            "Lower it, or raise automl.max_epochs."
        )
    fits = _is_number(own) and low <= own <= high and not (step and (own - low) % step)
    return Parameter(
        key, low, high, log=search.log and low > 0, step=step, integer=integer, own=own if fits else None, needs=needs
    )


def _legal(key: str, value: float) -> float:
    """Return the value, or the largest legal value of the option if that is smaller."""
    return min(value, bounds(fields()[key]).get("le", value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _capped(
    spec: ExperimentSpec, key: str, low: float, high: float, integer: bool, wanted: list[str]
) -> tuple[float, float]:
    """Limit a default range by the option that bounds it, unless that one is also searched."""
    sign, other = traits(key).bound
    limit: Any = spec.trial_epochs if other == _EPOCHS else other and value_of(spec, other)
    if other not in wanted and _is_number(limit):
        margin = 1 if integer and sign in ("<", ">") else 0
        low, high = (low, min(high, limit - margin)) if sign[0] == "<" else (max(low, limit + margin), high)
    if key == "model.mask_ratio":
        units = _fewest_units(spec, wanted)
        low, high = max(low, 1 / units), min(high, (units - 1) / units)
    return low, high


def _fewest_units(spec: ExperimentSpec, wanted: list[str]) -> int:
    """Return the smallest number of mask units per image of all architectures to search."""
    height, width = spec.dataset.augmentation.size
    given = spec.automl.ranges.get("model.arch", ()) if "model.arch" in wanted else ()
    names = [name for name in given if name in ARCHITECTURES] or [spec.model.arch]
    sides = [spec.model.patch_size or ARCHITECTURES[name].mask_unit for name in names]
    return min(max(1, (height // side) * (width // side)) for side in sides)


def _on_steps(step: float, low: float, high: float, own: Any) -> tuple[float, float, float]:
    """Round bounds to multiples of a step, which is halved if a bound or the value in the spec is not a multiple.

    Halving once is enough: the only option with a step is the decoder width, whose heads are half a step wide.
    """
    if any(_is_number(value) and value % step for value in (low, high, own)):
        step /= 2
    return math.ceil(low / step) * step, high // step * step, step


def _rejected(spec: ExperimentSpec, found: Mapping[str, Parameter]) -> Iterator[str]:
    """Yield an error for each trial, at the ends of the ranges or with one of the choices, that would be rejected."""
    arch, items = found.get("model.arch"), [item for item in _ordered(found) if item.key != "model.arch"]
    low, high = ({item.key: (item.choices or item.bounds)[end] for item in items} for end in (0, -1))
    samples = [low, high, *({**low, item.key: value} for item in items for value in item.choices)]
    for item in items:
        if traits(item.key).bound[1] in found:  # the extreme cases for the order of the two options
            samples += [{**low, item.key: high[item.key]}, {**high, item.key: low[item.key]}]
    for name in arch.choices if arch else (spec.model.arch,):
        subject = f"automl.ranges.model.arch: {name}" if arch else "automl.ranges: a trial"
        for values in samples:
            params: dict[str, Any] = {"model.arch": name}
            for item in items:
                if item.has_effect(params):
                    params[item.key] = values[item.key]
            yield from (f"{subject} would be rejected: {problem}" for problem in find_refusals(spec, params))


def _ordered(found: Mapping[str, Parameter]) -> Iterator[Parameter]:
    """Yield each parameter after the one that it needs."""
    done: set[str] = set()
    waiting = list(found.values())
    while waiting:
        ready = [item for item in waiting if item.needs is None or item.needs[0] in done]
        yield from ready
        done |= {item.key for item in ready}
        waiting = [item for item in waiting if item.key not in done]
