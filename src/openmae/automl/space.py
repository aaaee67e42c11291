"""The space of a search: from the schema's flags, what the user narrows, and what cannot act in this spec."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openmae.errors import SpecError
from openmae.spec.architectures import ARCHITECTURES
from openmae.spec.describe import choices, fields, traits, unused_by, why_illegal
from openmae.spec.load import ALIASES, find_refusals
from openmae.spec.notices import inert_keys
from openmae.spec.option import Search, meets
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

_SEARCHED = ("model.", "dataset.augmentation.", "dataset.batch_size", "train.")
_SIGNS = ("<=", ">=", "<", ">")
_SHARES_OF_BUDGET = "train.num_epochs"


@dataclass(frozen=True)
class Parameter:
    """An option that is searched.

    Attributes:
        key: dotted.
        low, high: bounds, both included; None where there are choices.
        choices: the values to choose from; empty for a number between bounds.
        weights: how often a random draw takes each choice; empty: all alike.
        log: searched by orders of magnitude.
        step: between values; None: none.
        integer: takes whole numbers.
        own: the spec's value; None: unset.
        needs: the searched option, and the values of it with which this one acts; None: it always acts.
    """

    key: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    weights: tuple[float, ...] = ()
    log: bool = False
    step: float | None = None
    integer: bool = False
    own: Any = None
    needs: tuple[str, tuple[str, ...]] | None = None

    @property
    def distribution(self) -> BaseDistribution:
        """As Optuna takes it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        low, high = self.bounds
        if self.integer:
            return IntDistribution(int(low), int(high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(low, high, log=self.log, step=self.step)

    @property
    def bounds(self) -> tuple[float, float]:
        """Of a number: low and high."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def acts(self, drawn: Mapping[str, Any]) -> bool:
        """Whether it acts beside the values drawn so far."""
        if self.needs is None:
            return True
        key, wanted = self.needs
        return key in drawn and meets(drawn[key], wanted)

    @property
    def range_words(self) -> str:
        """``2e-05 to 0.005, log`` or ``cosine, MultiStep``."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        step = f", in steps of {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}{step}"


@dataclass(frozen=True)
class Space:
    """What is searched, and what was left out.

    Attributes:
        parameters: those that others depend on come first.
        left_out: default options that cannot act here -> why.
    """

    parameters: tuple[Parameter, ...]
    left_out: Mapping[str, str]

    @property
    def own(self) -> dict[str, Any]:
        """The spec's own values: the first recommendation."""
        drawn: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.own is not None and parameter.acts(drawn):
                drawn[parameter.key] = parameter.own
        return drawn

    @property
    def conditional(self) -> bool:
        """Whether the values of one option decide whether another one acts."""
        return any(parameter.needs for parameter in self.parameters)

    @property
    def log_keys(self) -> frozenset[str]:
        """The options searched by orders of magnitude."""
        return frozenset(parameter.key for parameter in self.parameters if parameter.log)

    def draw(self, trial: Trial) -> dict[str, Any]:
        """The values that a trial gets, in order, so that what cannot act is not drawn."""
        drawn: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.acts(drawn):
                drawn[parameter.key] = trial._suggest(parameter.key, parameter.distribution)
        return drawn


def make_space(spec: ExperimentSpec) -> Space:
    """The space that ``automl.parameters`` and ``automl.ranges`` name, else that of the flagged options.

    Args:
        spec: of a training, resolved.

    Raises:
        SpecError: an option is unknown, never searched or does not act here, or a range is impossible; all at once.
    """
    named = [_full(key) for key in spec.automl.parameters]
    ranges = {_full(key): value for key, value in spec.automl.ranges.items()}
    wanted = named or [key for key in fields() if traits(key).automl is True]
    unused = [key for key in ranges if key not in wanted]
    problems = [
        f"automl.ranges.{key}: {_unknown(key) or 'it is not among automl.parameters. Add it there, or remove it.'}"
        for key in unused
    ]
    found: dict[str, Parameter] = {}
    left_out: dict[str, str] = {}
    for key in dict.fromkeys(wanted):
        reason = _unknown(key) or _never(key) or _inert(spec, key, wanted)
        if reason and named:
            problems.append(f"automl.parameters: {key}: {reason}")
        elif reason:
            left_out[key] = reason
        else:
            parameter = _parameter(spec, key, ranges.get(key), wanted)
            if isinstance(parameter, Parameter):
                found[key] = parameter
            elif named or key in ranges:
                problems.append(parameter)
            else:
                left_out[key] = parameter
    problems += _crossing(found, spec)
    problems += [] if problems else _refused(spec, found)
    if problems:
        raise SpecError("\n".join(dict.fromkeys(problems)), "`mae spec keys` lists all options and their bounds.")
    if not found:
        raise SpecError(
            "automl.parameters: nothing is left to search: "
            + "; ".join(f"{key}: {why}" for key, why in left_out.items()),
            "Name options that act in this stage.",
        )
    return Space(tuple(_ordered(found)), left_out)


def _full(key: str) -> str:
    return ALIASES.get(key, key)


def _unknown(key: str) -> str:
    if key in fields():
        return ""
    near = [name for name in fields() if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = near or difflib.get_close_matches(key, list(fields()), n=2)
    return "there is no such option." + (f" Did you mean {' or '.join(near[:2])}?" if near else "")


def _never(key: str) -> str:
    if key == _SHARES_OF_BUDGET:
        return "it is the budget of a recommendation, not a value to search. Set automl.max_epochs."
    if not key.startswith(_SEARCHED) or traits(key).automl is False:
        return "it is never searched: it says what is trained and where, not how well. Set it in the spec."
    return ""


def _inert(spec: ExperimentSpec, key: str, wanted: list[str]) -> str:
    if key in unused_by(spec.train.stage):
        return f"it does not act in the {spec.train.stage} stage."
    if key == "train.optim.lr" and spec.train.optim.base_lr is not None:
        return "train.optim.base_lr replaces it. Search train.optim.base_lr, with a range of your own."
    other, values = traits(key).condition
    if other in wanted:
        return ""
    if other and not meets(value_of(spec, other), values):
        return f"it does not act without {traits(key).needs}."
    if key == "train.optim.base_lr" and spec.is_set("train.optim.lr"):
        return "train.optim.lr is set, and both set the learning rate. Remove that one."
    return "another option of the spec replaces it, or turns it off." if key in inert_keys(spec) else ""


def _parameter(spec: ExperimentSpec, key: str, given: tuple[Any, ...] | None, wanted: list[str]) -> Parameter | str:
    """The option as it is searched, or what is wrong."""
    own: Any = value_of(spec, key)
    search = traits(key).search or Search()
    needs = traits(key).condition if traits(key).condition[0] in wanted else None
    known = choices(fields()[key]) or (("True", "False") if fields()[key].annotation is bool else ())
    if given is not None and (problem := why_illegal(key, given)):
        return f"automl.ranges.{key}: {problem}"
    numbers = given is not None and len(given) == 2 and all(_is_number(value) for value in given)
    if known or (given is not None and not numbers):
        return _choice(key, given, known, search, own, needs)
    if given is None and search.low is None:
        return f"automl.ranges.{key}: it has no range of its own. Give [low, high], or the choices."
    integer = _takes_integers(key)
    low, high = given if given is not None else (search.low, search.high)
    if given is None:
        if _is_number(own):  # the spec's own value is the first to be tried
            low, high = min(low, own), max(high, own)
        low, high = _bounded(spec, key, low, high, integer, wanted)
        own = min(max(own, low), high) if _is_number(own) else None
    step = search.step
    if step:
        low, high, step = _on_grid(step, low, high, own)
    if low >= high:
        steps = f" in steps of {step:g}" if step else ""
        what = f"[{low:g}, {high:g}]{steps} leaves nothing to search"
        return f"automl.ranges.{key}: {what}. The first number must be the lower one, and the epochs leave it room."
    log = search.log and low > 0
    own = own if _is_number(own) and low <= own <= high and not (step and (own - low) % step) else None
    return Parameter(key, low, high, log=log, step=step, integer=integer, own=own, needs=needs)


def _choice(
    key: str, given: tuple[Any, ...] | None, known: tuple[str, ...], search: Search, own: Any, needs: Any
) -> Parameter | str:
    if given is None and key == "model.arch":
        return f"automl.ranges.{key}: which architectures? Give a list, such as [vit_tiny_patch16, vit_small_patch16]."
    boolean = known == ("True", "False")
    values: tuple[Any, ...] = given or ((True, False) if boolean else known)
    if len(set(map(str, values))) < len(values):
        return f"automl.ranges.{key}: names a choice twice: {', '.join(map(str, values))}."
    weights = tuple(search.weights.get(str(value), 1.0) for value in values) if search.weights else ()
    return Parameter(key, choices=values, weights=weights, own=own if own in values else None, needs=needs)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _takes_integers(key: str) -> bool:
    annotation = fields()[key].annotation
    return annotation is int or annotation == (int | None)


def _bounded(
    spec: ExperimentSpec, key: str, low: float, high: float, integer: bool, wanted: list[str]
) -> tuple[float, float]:
    """The range, cut by the option that bounds this one, where that one is not searched itself."""
    for sign, other in _conditions(key):
        if other in wanted:
            continue
        limit: Any = budget(spec) if other == _SHARES_OF_BUDGET else value_of(spec, other)
        if not _is_number(limit):
            continue
        room = 1 if integer and sign in ("<", ">") else 0
        low, high = (low, min(high, limit - room)) if sign[0] == "<" else (max(low, limit + room), high)
    if key == "model.mask_ratio":
        units = _fewest_units(spec, wanted)
        low, high = max(low, 1 / units), min(high, (units - 1) / units)
    return low, high


def _fewest_units(spec: ExperimentSpec, wanted: list[str]) -> int:
    """Mask units of an image, of the architecture that has fewest."""
    height, width = spec.dataset.augmentation.size
    given = spec.automl.ranges.get("model.arch", ()) if "model.arch" in wanted else ()
    names = [name for name in given if name in ARCHITECTURES] or [spec.model.arch]
    sides = [spec.model.patch_size or ARCHITECTURES[name].mask_unit for name in names]
    return min(max(1, (height // side) * (width // side)) for side in sides)


def _on_grid(step: float, low: float, high: float, own: Any) -> tuple[float, float, float]:
    """Bounds on multiples of a step, or of half of it where they or the spec's own value are none: half is a head."""
    if any(_is_number(value) and value % step for value in (low, high, own)):
        step /= 2
    return math.ceil(low / step) * step, high // step * step, step


def _conditions(key: str) -> Iterator[tuple[str, str]]:
    cond = traits(key).cond
    if cond:
        sign = next(sign for sign in _SIGNS if cond.startswith(sign))
        yield sign, cond.removeprefix(sign).strip()


def _crossing(found: Mapping[str, Parameter], spec: ExperimentSpec) -> Iterator[str]:
    """Ranges of two options of which one bounds the other, that would meet in some draws."""
    for key, parameter in found.items():
        for sign, other in _conditions(key):
            bound = found.get(other)
            fits = bound is None or (
                (parameter.high or 0) <= (bound.low or 0)
                if sign[0] == "<"
                else (parameter.low or 0) >= (bound.high or 0)
            )
            if bound is not None and not fits:
                yield (
                    f"automl.ranges: {key} ({parameter.range_words}) must stay {sign} {other} ({bound.range_words}) in "
                    "every draw. Give both ranges that do not overlap, or search one of them."
                )
            if other == _SHARES_OF_BUDGET and parameter.high is not None and parameter.high >= budget(spec):
                yield (
                    f"automl.ranges.{key}: must stay below the {budget(spec)} epochs of a training, got "
                    f"{parameter.range_words}. Lower it, or raise automl.max_epochs."
                )
            elif bound is None and other != _SHARES_OF_BUDGET and not _keeps(parameter, sign, value_of(spec, other)):
                yield (
                    f"automl.ranges.{key}: must stay {sign} {other}, which is {value_of(spec, other)}, got "
                    f"{parameter.range_words}. Narrow it, or change {other}."
                )


def _refused(spec: ExperimentSpec, found: Mapping[str, Parameter]) -> Iterator[str]:
    """What the spec's rules say against draws: with each architecture, the ends of all ranges, and each choice."""
    arch, ordered = found.get("model.arch"), [item for item in _ordered(found) if item.key != "model.arch"]
    low, high = ({item.key: (item.choices or item.bounds)[end] for item in ordered} for end in (0, -1))
    samples = [low, high, *({**low, item.key: value} for item in ordered for value in item.choices)]
    for name in arch.choices if arch else (spec.model.arch,):
        who = f"automl.ranges.model.arch: {name}" if arch else "automl.ranges: a draw"
        for values in samples:
            drawn: dict[str, Any] = {"model.arch": name}
            for item in ordered:
                if item.acts(drawn):
                    drawn[item.key] = values[item.key]
            yield from (f"{who} would be refused: {problem}" for problem in find_refusals(spec, drawn))


def _keeps(parameter: Parameter, sign: str, limit: Any) -> bool:
    """Whether all values lie on the right side of another option's."""
    if parameter.choices or not _is_number(limit):
        return True
    low, high = parameter.bounds
    return bool(high <= limit if sign[0] == "<" else low >= limit)


def budget(spec: ExperimentSpec) -> int:
    """Epochs of a full training."""
    return spec.automl.max_epochs or spec.train.num_epochs


def _ordered(found: Mapping[str, Parameter]) -> Iterator[Parameter]:
    """What others need comes before them."""
    done: set[str] = set()
    waiting = list(found.values())
    while waiting:
        ready = [item for item in waiting if item.needs is None or item.needs[0] in done]
        for item in ready:
            done.add(item.key)
            yield item
        waiting = [item for item in waiting if item not in ready]
