"""Search algorithms: Optuna's samplers and pruners, rungs of early stopping, and population-based training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
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
_RUNGS = 3
_FIRST_RUNG = 3  # epochs, if there are enough; earlier values mostly reflect the warmup (docs/benchmarks.md)
_GP_TRIALS = 50  # a Gaussian process learns more from few trials, but its cost grows with their number
_QUANTILE = 0.25  # share of a population that is replaced (the worst), and share that replaces it (the best)
_PERTURB = (0.8, 1.25)
_RESAMPLE = 0.25  # probability that pbt draws an option again instead of perturbing it

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Algorithm:
    """The algorithm of a search, with the number and the length of its trials; a full training run has ``epochs``."""

    settings: AutomlSpec
    space: Space
    epochs: int

    def check(self) -> None:
        """Raise ``SpecError`` if the algorithm cannot search this space or does not fit its budget."""
        fixed = [item.key for item in self.space.parameters if traits(item.key).on_resume == "refuse"]
        if self.name == "pbt" and fixed:
            raise SpecError(
                f"automl.algorithm: pbt copies weights between trials, so it cannot search {', '.join(fixed)}.",
                "Use another algorithm, or set them in the spec.",
            )
        if self.name == "pbt" and self.generations < 2:
            size = self.settings.population_size
            raise SpecError(
                f"automl.algorithm: pbt needs two generations of {size} (automl.population_size), but there are "
                f"{self.settings.max_recommendations} trials and {self.epochs} epochs.",
                f"Set automl.max_recommendations to {2 * size} or more, and train for 2 epochs or more.",
            )
        if self.name == "grid" and self.space.conditional:
            key, other = next((item.key, item.needs[0]) for item in self.space.parameters if item.needs)
            raise SpecError(
                f"automl.algorithm: grid would train some points twice, since {key} has an effect only with some "
                f"values of {other}.",
                f"Use another algorithm, or set {key} or {other} in the spec.",
            )

    @property
    def name(self) -> str:
        """Name of the algorithm in the spec."""
        return self.settings.algorithm

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which a trial is compared with others; the last one is the end of the trial."""
        if self.name not in STOPS_EARLY:
            return (self.epochs,)
        factor = self.settings.reduction_factor
        rungs = [self.first_rung * factor**i for i in range(_RUNGS)]
        return (*(rung for rung in rungs if rung * factor <= self.epochs * 1.5 and rung < self.epochs), self.epochs)

    @property
    def first_rung(self) -> int:
        """Epochs of the shortest trial."""
        factor = self.settings.reduction_factor
        return max(1, min(_FIRST_RUNG, self.epochs // factor), self.epochs // factor ** (_RUNGS - 1))

    @property
    def generations(self) -> int:
        """Number of generations of a population; 1 for all algorithms except pbt."""
        if self.name != "pbt":
            return 1
        return max(1, min(self.settings.max_recommendations // self.settings.population_size, self.epochs))

    @property
    def trials(self) -> int:
        """Number of trials: as requested, or fewer if the grid is smaller or pbt has fewer in its generations."""
        requested = self.settings.max_recommendations
        if self.name == "grid":
            return min(requested, 1 + math.prod(map(len, self.grid.values())))  # 1: the values of the spec
        if self.generations > 1:
            return self.generations * self.settings.population_size
        return requested

    @property
    def grid(self) -> dict[str, list[Any]]:
        """Values by key: all choices, and as many values of each number as the number of trials allows."""
        numbers = [item for item in self.space.parameters if not item.choices]
        choices = math.prod(len(item.choices) for item in self.space.parameters if item.choices)
        counts = {item.key: 1 for item in numbers}
        for _ in range(100):
            for item in numbers:  # add a value to each number, one at a time, while the grid still fits
                finer = {**counts, item.key: counts[item.key] + 1}
                full = item.integer and item.bounds[1] - item.bounds[0] + 1 <= counts[item.key]
                if not full and choices * math.prod(finer.values()) < self.settings.max_recommendations:
                    counts = finer
        return {item.key: list(item.choices) or _spaced(item, counts[item.key]) for item in self.space.parameters}

    def sampler(self, number: int) -> BaseSampler:
        """Return the sampler of one trial.

        Its seed follows from the number of the trial, so that a resumed search draws the same values.
        """
        seed = int(np.random.SeedSequence([self.settings.seed, number]).generate_state(1)[0] >> 1)
        random = WeightedSampler(self.space, seed)
        startup = max(4, min(10, self.trials // 3))
        if self.name == "bayesian" and self.trials <= _GP_TRIALS and not self.space.conditional:
            return GPSampler(seed=seed, independent_sampler=random, n_startup_trials=startup)
        if self.name in ("bayesian", "bohb") and number >= startup:  # TPE's startup trials ignore the weights
            return TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=startup)
        if self.name == "cmaes":
            return CmaEsSampler(seed=seed, independent_sampler=random, warn_independent_sampling=False)
        if self.name == "grid" and number > 0:  # trial 0 has the values of the spec, and no point of the grid
            return GridSampler(self.grid, seed=self.settings.seed)
        return random

    def pruner(self) -> BasePruner:
        """Return the pruner, which decides after each rung whether a trial continues."""
        factor = self.settings.reduction_factor
        if self.name == "asha":
            return SuccessiveHalvingPruner(min_resource=self.first_rung, reduction_factor=factor)
        if self.name in ("hyperband", "bohb"):
            return HyperbandPruner(self.first_rung, self.epochs, factor)
        return NopPruner()


class WeightedSampler(RandomSampler):
    """A random sampler that draws choices with the probabilities that the schema gives them."""

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(seed=seed)
        self._weights = {item.key: item.weights for item in space.parameters if item.weights}
        self._generator = np.random.default_rng(seed)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one value."""
        weights = self._weights.get(param_name)
        if not weights or not isinstance(param_distribution, CategoricalDistribution):
            return super().sample_independent(study, trial, param_name, param_distribution)
        probabilities = np.array(weights) / sum(weights)
        return param_distribution.choices[int(self._generator.choice(len(probabilities), p=probabilities))]


def next_member(
    algorithm: Algorithm, previous: Sequence[FrozenTrial], number: int, *, maximize: bool
) -> tuple[int, dict[str, Any]]:
    """Choose weights and parameters for a trial of the next generation (truncation selection, arXiv:1711.09846).

    A trial continues the one in its place of the ``previous`` generation. If that one failed or is in the worst
    quarter, it takes over the weights and parameters of one of the best quarter; each number is then multiplied by 0.8
    or 1.25 or drawn again, and each choice is kept or drawn again. ``number``, that of the trial, seeds the choices.

    Returns:
        The place of the trial whose weights to continue with, and the parameters.
    """
    generator = np.random.default_rng([algorithm.settings.seed, number])
    place, sign = number % len(previous), 1 if maximize else -1
    results = [trial.value for trial in previous]
    ranked = sorted(range(len(previous)), key=lambda i: (results[i] is None, -sign * (results[i] or 0.0)))
    count = max(1, round(len(ranked) * _QUANTILE))
    if ranked.index(place) < len(ranked) - count and results[place] is not None:
        return place, previous[place].params
    source = ranked[int(generator.integers(count))]
    params = previous[source].params
    explored = {
        item.key: _explore(item, params[item.key], generator)
        for item in algorithm.space.parameters
        if item.key in params
    }
    return source, explored


def _explore(item: Parameter, value: Any, generator: np.random.Generator) -> Any:
    if item.choices:
        return item.choices[int(generator.integers(len(item.choices)))] if generator.random() < _RESAMPLE else value
    low, high = item.bounds
    if generator.random() < _RESAMPLE:
        value = np.exp(generator.uniform(np.log(low), np.log(high))) if item.log else generator.uniform(low, high)
    else:
        value = value * _PERTURB[int(generator.integers(2))]
    return _legal(item, value)


def _legal(item: Parameter, value: float) -> float | int:
    """Return the nearest value within the bounds and steps of a parameter."""
    low, high = item.bounds
    if item.step:
        value = low + round((value - low) / item.step) * item.step
    value = min(max(value, low), high)
    return round(value) if item.integer else float(value)


def _spaced(item: Parameter, count: int) -> list[Any]:
    """Return evenly spaced values of a number; a single one is the value in the spec, or the middle of the range."""
    low, high = item.bounds
    if count == 1:
        middle = (low * high) ** 0.5 if item.log else (low + high) / 2
        return [_legal(item, middle) if item.own is None else item.own]
    values = (np.geomspace if item.log else np.linspace)(low, high, count)
    return sorted({_legal(item, float(value)) for value in values})
