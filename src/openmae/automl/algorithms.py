"""The algorithms: Optuna's samplers and pruners, how far a recommendation is trained at a time, and populations."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from openmae.automl.space import Parameter, Space
from openmae.errors import SpecError
from openmae.spec.describe import traits
from openmae.spec.sections.automl import AutomlSpec

STOPS_EARLY = ("asha", "hyperband", "bohb")
_RUNGS = 3  # lengths of training
_JUDGED = 3  # epochs, where there are enough, before which none is judged: the warmup says little (docs/benchmarks.md)
_GAUSSIAN = 50  # recommendations up to which a Gaussian process is fitted: it learns more from few, and costs more
_QUANTILE = 0.25  # of a population that gives up its weights, and of that which hands them on
_PERTURB = (0.8, 1.25)
_RESAMPLE = 0.25  # chance that a population's option is drawn anew instead

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Algorithm:
    """What a search does, besides asking.

    Attributes:
        settings: of the spec.
        space: what is searched.
        epochs: of a full training.
    """

    settings: AutomlSpec
    space: Space
    epochs: int

    def check(self) -> None:
        """Refuse what the algorithm cannot search.

        Raises:
            SpecError: weights are to be handed on between models of different shapes, or there is no second generation
                to take them; a grid's points would differ in what does not act.
        """
        shapes = [item.key for item in self.space.parameters if traits(item.key).shapes_model]
        if self.name == "pbt" and shapes:
            raise SpecError(
                f"automl.algorithm: pbt hands weights on, so that it cannot search {', '.join(shapes)}.",
                "Use another algorithm, or set them in the spec.",
            )
        if self.name == "pbt" and self.generations < 2:
            size = self.settings.population_size
            raise SpecError(
                f"automl.algorithm: pbt needs two generations of {size} (automl.population_size), but there are "
                f"{self.settings.max_recommendations} recommendations and {self.epochs} epochs.",
                f"Raise automl.max_recommendations to {2 * size} or more, and train for 2 epochs or more.",
            )
        if self.name == "grid" and self.space.conditional:
            key, needs = next((item.key, item.needs[0]) for item in self.space.parameters if item.needs)
            raise SpecError(
                f"automl.algorithm: grid would train some points twice, since {key} acts with some values of {needs} "
                "only.",
                f"Use another algorithm, or set {key} or {needs} in the spec.",
            )

    @property
    def name(self) -> str:
        """As the spec has it."""
        return self.settings.algorithm

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs after which a training is judged, the last of them its end."""
        if self.name not in STOPS_EARLY:
            return (self.epochs,)
        factor = self.settings.reduction_factor
        below = [self.first_rung * factor**i for i in range(_RUNGS)]
        return (
            *(epochs for epochs in below if epochs * factor <= self.epochs * 1.5 and epochs < self.epochs),
            self.epochs,
        )

    @property
    def first_rung(self) -> int:
        """Epochs of the shortest training."""
        factor = self.settings.reduction_factor
        return max(1, min(_JUDGED, self.epochs // factor), self.epochs // factor ** (_RUNGS - 1))

    @property
    def generations(self) -> int:
        """Into how many pieces a population's training is cut; 1 for all but pbt."""
        if self.name != "pbt":
            return 1
        return max(1, min(self.settings.max_recommendations // self.settings.population_size, self.epochs))

    @property
    def recommendations(self) -> int:
        """How many trainings are recommended: what was asked for, as far as there is so much to try."""
        asked = self.settings.max_recommendations
        if self.name == "grid":
            return min(asked, 1 + int(np.prod([len(values) for values in self.grid.values()])))  # the spec's own values
        if self.generations > 1:
            return self.generations * self.settings.population_size
        return asked

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The points of a grid that fits the number of recommendations beside the spec's own values.

        Each number has as many points as there is room; where there is none, the spec's own value, or the middle.
        """
        numbers = [item for item in self.space.parameters if not item.choices]
        chosen = int(np.prod([len(item.choices) for item in self.space.parameters if item.choices] or [1]))
        points = {item.key: 1 for item in numbers}
        for _ in range(100):  # one more point in turn, while it still fits
            for item in numbers:
                grown = {**points, item.key: points[item.key] + 1}
                full = item.integer and item.bounds[1] - item.bounds[0] + 1 <= points[item.key]
                if not full and chosen * int(np.prod(list(grown.values()))) < self.settings.max_recommendations:
                    points = grown
        return {item.key: list(item.choices) or _spread(item, points[item.key]) for item in self.space.parameters}

    def sampler(self, number: int) -> BaseSampler:
        """What draws recommendation ``number``: seeded by it, so that a search that resumes does not repeat itself."""
        seed = int(np.random.SeedSequence([self.settings.seed, number]).generate_state(1)[0] >> 1)
        drawing = WeightedSampler(self.space, seed)
        startup = max(4, min(10, self.recommendations // 3))
        if self.name == "bayesian" and self.recommendations <= _GAUSSIAN and not self.space.conditional:
            return GPSampler(seed=seed, independent_sampler=drawing, n_startup_trials=startup)
        if self.name in ("bayesian", "bohb"):
            if number < startup:  # its own first draws would not know the weights of choices
                return drawing
            return TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=startup)
        if self.name == "cmaes":
            return CmaEsSampler(seed=seed, independent_sampler=drawing, warn_independent_sampling=False)
        if self.name == "grid":
            return _Grid(self.grid, self.settings.seed, drawing)
        return drawing

    def pruner(self) -> BasePruner:
        """What says after a rung whether a training goes on."""
        factor = self.settings.reduction_factor
        if self.name == "asha":
            return SuccessiveHalvingPruner(min_resource=self.first_rung, reduction_factor=factor)
        if self.name in ("hyperband", "bohb"):
            return HyperbandPruner(self.first_rung, self.epochs, factor)
        return NopPruner()


class WeightedSampler(RandomSampler):
    """Independent draws, in which a choice comes as often as its weight says."""

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(seed=seed)
        self._weights = {item.key: item.weights for item in space.parameters if item.weights}
        self._generator = np.random.default_rng(seed)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See ``BaseSampler``."""
        weights = self._weights.get(param_name)
        if not weights or not isinstance(param_distribution, CategoricalDistribution):
            return super().sample_independent(study, trial, param_name, param_distribution)
        shares = np.array(weights) / sum(weights)
        return param_distribution.choices[int(self._generator.choice(len(shares), p=shares))]


class _Grid(GridSampler):
    """A grid's points; what the spec's own values leave open is drawn."""

    def __init__(self, grid: Mapping[str, list[Any]], seed: int, drawing: BaseSampler) -> None:
        super().__init__(grid, seed=seed)
        self._drawing = drawing

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See ``BaseSampler``."""
        if "grid_id" in trial.system_attrs:
            return super().sample_independent(study, trial, param_name, param_distribution)
        return self._drawing.sample_independent(study, trial, param_name, param_distribution)


@dataclass(frozen=True)
class Member:
    """A training of a population: its place in it, its value (None: it failed), and what it was given."""

    slot: int
    value: float | None
    params: Mapping[str, Any]


def next_member(
    algorithm: Algorithm, members: Sequence[Member], slot: int, number: int, *, maximize: bool
) -> tuple[int, dict[str, Any]]:
    """Whose weights the training of a slot goes on with, and its values (Jaderberg et al. 2017, truncation selection).

    The worst quarter takes the weights of one of the best quarter, with its values changed by 0.8 or 1.25, or drawn
    anew; all others go on as they were.

    Args:
        algorithm: the search.
        members: the generation before, whole.
        slot: of the training.
        number: of the recommendation; addresses what is random.
        maximize: whether larger values are better.

    Returns:
        The slot whose weights it takes, and its values.
    """
    generator = np.random.default_rng([algorithm.settings.seed, number])
    sign = 1 if maximize else -1
    ranked = sorted(members, key=lambda m: (m.value is not None, sign * (m.value or 0.0), -m.slot), reverse=True)
    count = max(1, round(len(ranked) * _QUANTILE))
    place = next(index for index, member in enumerate(ranked) if member.slot == slot)
    if place < len(ranked) - count and ranked[place].value is not None:
        return slot, dict(ranked[place].params)
    source = ranked[int(generator.integers(count))]
    params = {
        item.key: _explore(item, source.params[item.key], generator)
        for item in algorithm.space.parameters
        if item.key in source.params
    }
    return source.slot, params


def _explore(item: Parameter, value: Any, generator: np.random.Generator) -> Any:
    if item.choices:
        return item.choices[int(generator.integers(len(item.choices)))] if generator.random() < _RESAMPLE else value
    low, high = item.bounds
    if generator.random() < _RESAMPLE:
        value = np.exp(generator.uniform(np.log(low), np.log(high))) if item.log else generator.uniform(low, high)
    else:
        value = value * _PERTURB[int(generator.integers(2))]
    return _fitted(item, value)


def _fitted(item: Parameter, value: float) -> float | int:
    low, high = item.bounds
    if item.step:
        value = low + round((value - low) / item.step) * item.step
    value = min(max(value, low), high)
    return round(value) if item.integer else float(value)


def _spread(item: Parameter, count: int) -> list[Any]:
    if count == 1:
        low, high = item.bounds
        return [
            item.own if item.own is not None else _fitted(item, (low * high) ** 0.5 if item.log else (low + high) / 2)
        ]
    points = (np.geomspace if item.log else np.linspace)(*item.bounds, count)
    return sorted({_fitted(item, float(point)) for point in points})
