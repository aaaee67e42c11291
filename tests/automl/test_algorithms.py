"""Search algorithms: rungs, grids, populations, seeds; each of them runs a study with simulated jobs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import CmaEsSampler, GPSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from tests.helpers.simulation import loss, make_spec, make_worker, open_study

from openmae.automl.algorithms import Algorithm, WeightedSampler, next_member
from openmae.automl.space import Parameter, Space, make_space
from openmae.errors import SpecError
from openmae.spec.sections.automl import AutomlSpec

LR, MOMENTUM, SCHEDULER, GAMMA = (f"train.optim.{name}" for name in ("lr", "momentum", "lr_scheduler", "gamma"))
TWO = Space((Parameter(LR, 1e-4, 1e-2, log=True, own=1e-3), Parameter(MOMENTUM, 0.8, 0.98, own=0.9)), {})


def _algorithm(name: str, space: Space = TWO, epochs: int = 9, **settings: Any) -> Algorithm:
    return Algorithm(AutomlSpec(algorithm=name, **settings), space, epochs)


@pytest.mark.parametrize("name", ["asha", "hyperband", "bohb"])
@pytest.mark.parametrize(
    ("epochs", "factor", "rungs"),
    [
        (9, 3, (3, 9)),
        (10, 3, (3, 10)),
        (27, 3, (3, 9, 27)),
        (40, 3, (4, 12, 40)),
        (100, 3, (11, 33, 100)),
        (16, 4, (3, 16)),
        (8, 2, (3, 6, 8)),
        (3, 3, (1, 3)),
        (2, 3, (1, 2)),
        (1, 3, (1,)),
    ],
)
def test_rungs(name: str, epochs: int, factor: int, rungs: tuple[int, ...]) -> None:
    algorithm = _algorithm(name, epochs=epochs, reduction_factor=factor)
    assert algorithm.rungs == rungs
    assert algorithm.pruner() is not None


@pytest.mark.parametrize("name", ["bayesian", "random", "grid", "pbt", "cmaes"])
def test_algorithms_without_early_stopping_have_one_rung(name: str) -> None:
    assert _algorithm(name).rungs == (9,)


def test_grid_fits_its_budget() -> None:
    for count in range(2, 60):
        algorithm = _algorithm("grid", max_recommendations=count)
        points = [len(values) for values in algorithm.grid.values()]
        assert algorithm.trials == 1 + points[0] * points[1] <= count
        assert min(points) > 1 or count < 7, "one option has all the points"
    assert _algorithm("grid", max_recommendations=20).grid == {
        LR: pytest.approx([1e-4, 4.64e-4, 2.154e-3, 1e-2], rel=0.01),
        MOMENTUM: pytest.approx([0.8, 0.86, 0.92, 0.98]),
    }


def test_small_grid_keeps_the_spec_value_of_options_without_room() -> None:
    grid = _algorithm("grid", max_recommendations=4).grid
    assert grid == {LR: pytest.approx([1e-4, 1e-3, 1e-2]), MOMENTUM: [0.9]}


def test_grid_of_integers_has_no_duplicate_points() -> None:
    space = Space((Parameter("train.optim.warmup_epochs", 0, 3, integer=True, own=1),), {})
    algorithm = _algorithm("grid", space, max_recommendations=50)
    assert algorithm.grid == {"train.optim.warmup_epochs": [0, 1, 2, 3]}
    assert algorithm.trials == 5


def test_grid_tries_all_choices(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, algorithm="grid", parameters=[LR, SCHEDULER], max_recommendations=5)
    worker, _ = make_worker(spec)
    worker.run()
    tried = [(trial.params[LR], trial.params[SCHEDULER]) for trial in worker.study.trials()]
    assert len(tried) == 5
    assert set(tried[1:]) == {(rate, kind) for rate in (2e-5, 5e-3) for kind in ("cosine", "MultiStep")}


def test_spaces_that_an_algorithm_cannot_search_are_rejected() -> None:
    depth, ratio = Parameter("model.decoder_depth", 1, 8, integer=True), Parameter("model.mask_ratio", 0.5, 0.8)
    with pytest.raises(SpecError) as caught:
        _algorithm("pbt", Space((depth, ratio), {})).check()
    assert caught.value.problem == (
        "automl.algorithm: pbt copies weights between trials, so it cannot search model.decoder_depth, "
        "model.mask_ratio."
    )
    with pytest.raises(SpecError) as caught:
        _algorithm("pbt", max_recommendations=9).check()
    assert caught.value.problem == (
        "automl.algorithm: pbt needs two generations of 5 (automl.population_size), but there are 9 trials "
        "and 9 epochs."
    )
    assert caught.value.fix == "Set automl.max_recommendations to 10 or more, and train for 2 epochs or more."
    conditional = Space(
        (
            Parameter(SCHEDULER, choices=("cosine", "MultiStep")),
            Parameter(GAMMA, 0.1, 0.5, needs=(SCHEDULER, "MultiStep")),
        ),
        {},
    )
    with pytest.raises(SpecError) as caught:
        _algorithm("grid", conditional).check()
    assert caught.value.problem == (
        "automl.algorithm: grid would train some points twice, since "
        f"{GAMMA} has an effect only with some values of {SCHEDULER}."
    )
    for name in ("bayesian", "random", "asha", "bohb", "cmaes"):
        _algorithm(name, conditional).check()


@pytest.mark.parametrize(
    ("count", "size", "epochs", "generations", "trials"),
    [(20, 5, 9, 4, 20), (12, 5, 9, 2, 10), (20, 5, 2, 2, 10), (100, 5, 9, 9, 45)],
)
def test_generations(count: int, size: int, epochs: int, generations: int, trials: int) -> None:
    algorithm = _algorithm("pbt", epochs=epochs, max_recommendations=count, population_size=size)
    assert (algorithm.generations, algorithm.trials) == (generations, trials)


def _member(value: float | None) -> FrozenTrial:
    """Return a trial of a population; None: it failed."""
    return create_trial(
        state=TrialState.FAIL if value is None else TrialState.COMPLETE,
        value=value,
        params={LR: 1e-3, MOMENTUM: 0.9},
        distributions={LR: FloatDistribution(1e-4, 1e-2, log=True), MOMENTUM: FloatDistribution(0.8, 0.98)},
    )


def test_population_exploits_and_explores() -> None:
    algorithm = _algorithm("pbt", population_size=8, max_recommendations=16)
    members = [_member(float(slot)) for slot in range(8)]
    for slot in range(8):
        source, params = next_member(algorithm, members, 8 + slot, maximize=True)
        if slot >= 2:
            assert (source, params) == (slot, members[slot].params), "a good member must continue unchanged"
        else:
            assert source in (6, 7), "the worst quarter takes the weights of the best quarter"
            assert params != members[slot].params
        falling = next_member(algorithm, members, 8 + slot, maximize=False)
        assert (falling[0] == slot) == (slot < 6)
    seen: Counter[str] = Counter()
    for number in range(300):
        _, params = next_member(algorithm, members, 8 * number, maximize=True)
        assert 1e-4 <= params[LR] <= 1e-2
        assert 0.8 <= params[MOMENTUM] <= 0.98
        factor = round(params[LR] / 1e-3, 6)
        seen[str(factor) if factor in (0.8, 1.25) else "anew"] += 1
    assert 70 < seen["0.8"] < 155
    assert 70 < seen["1.25"] < 155
    assert 45 < seen["anew"] < 110


def test_failed_member_continues_with_the_weights_of_another() -> None:
    algorithm = _algorithm("pbt", population_size=4, max_recommendations=8)
    members = [_member(value) for value in (0.1, None, None, 0.4)]
    assert [next_member(algorithm, members, 4 + slot, maximize=True)[0] for slot in range(4)] == [0, 3, 3, 3]


def test_population_rule_is_seeded_by_trial_number() -> None:
    algorithm = _algorithm("pbt", population_size=4, max_recommendations=8)
    members = [_member(float(slot)) for slot in range(4)]
    again = [next_member(algorithm, members, 4, maximize=True) for _ in range(2)]
    assert again[0] == again[1]
    others = {next_member(algorithm, members, 4 * number, maximize=True)[1][LR] for number in range(40)}
    assert len(others) > 5


def test_choices_are_drawn_by_weight() -> None:
    space = Space((Parameter(SCHEDULER, choices=("cosine", "MultiStep"), weights=(0.7, 0.3)),), {})
    for name in ("random", "bayesian", "asha", "bohb", "cmaes"):
        counts: Counter[str] = Counter()
        study = optuna.create_study()
        for number in range(200):
            study.sampler = _algorithm(name, space, seed=number).sampler(1)
            counts[space.suggest(study.ask())[SCHEDULER]] += 1
        assert 115 <= counts["cosine"] <= 165, f"{name}: {counts}"


def test_sampler_depends_on_budget_and_space() -> None:
    assert isinstance(_algorithm("bayesian", max_recommendations=20).sampler(15), GPSampler)
    assert isinstance(_algorithm("bayesian", max_recommendations=51).sampler(15), TPESampler)
    conditional = Space((*TWO.parameters, Parameter(GAMMA, 0.1, 0.5, needs=(LR, "1"))), {})
    assert isinstance(_algorithm("bayesian", conditional, max_recommendations=20).sampler(15), TPESampler)
    assert isinstance(_algorithm("bohb", max_recommendations=20).sampler(15), TPESampler)
    assert isinstance(_algorithm("cmaes").sampler(15), CmaEsSampler)
    assert isinstance(_algorithm("random").sampler(15), WeightedSampler)


ALGORITHMS = ("bayesian", "random", "grid", "hyperband", "asha", "bohb", "pbt", "cmaes")
MIXED = [LR, MOMENTUM, "train.optim.warmup_epochs", "train.cudnn.deterministic"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_runs_a_study(name: str, tmp_path: Path) -> None:
    """The space has numbers, integers and choices."""
    spec = make_spec(tmp_path, algorithm=name, parameters=MIXED, max_recommendations=9, population_size=4)
    worker, _ = make_worker(spec)
    worker.run()
    trials = worker.study.trials()
    assert len(trials) == worker.jobs.algorithm.trials
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    own = {LR: 2e-4, MOMENTUM: 0.9, MIXED[2]: 1, MIXED[3]: True}
    assert trials[0].params == own
    if name != "pbt":  # three quarters of a population continue unchanged
        assert len({tuple(trial.params.values()) for trial in trials}) >= len(trials) - 1


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in ("grid", "pbt")])
def test_every_algorithm_handles_conditional_options(name: str, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, algorithm=name, parameters=[LR, SCHEDULER, GAMMA], max_recommendations=8)
    worker, _ = make_worker(spec)
    worker.run()
    for trial in worker.study.trials():
        assert (GAMMA in trial.params) == (trial.params[SCHEDULER] == "MultiStep")


def _values(folder: Path, name: str, seed: int, *, interrupted: bool = False) -> list[dict[str, Any]]:
    """Return the parameters of all trials; an interrupted search opens its study again before each trial."""
    settings = {"algorithm": name, "max_recommendations": 6, "population_size": 3, "seed": seed}
    study = open_study(make_spec(folder, **settings))
    found: list[dict[str, Any]] = []
    while (held := study.next()) is not None:
        found.append(dict(held.params))
        value = loss(held.params, 9)
        assert study.report(held, value, 9)
        assert study.end(held, TrialState.COMPLETE, value)
        if interrupted:
            study = open_study(make_spec(folder, **settings))
    return found


@pytest.mark.parametrize("name", ALGORITHMS)
def test_equal_seeds_draw_equal_values_even_if_interrupted(name: str, tmp_path: Path) -> None:
    complete = _values(tmp_path / "complete", name, 1)
    assert _values(tmp_path / "interrupted", name, 1, interrupted=True) == complete
    if name in ("random", "bayesian"):
        assert _values(tmp_path / "other", name, 2)[1:] != complete[1:]
    if name != "pbt":
        assert len({tuple(params.values()) for params in complete}) >= len(complete) - 1, "values are repeated"


@pytest.mark.slow(reason="simulates many searches")
def test_bayesian_beats_random(tmp_path: Path) -> None:
    def best(name: str) -> float:
        spec = make_spec(tmp_path / name, algorithm=name, max_recommendations=18)
        worker, _ = make_worker(spec)
        worker.run()
        trial = worker.study.best()
        assert trial is not None
        assert trial.value is not None
        return trial.value - 1 / 9

    assert best("bayesian") < min(best("random"), 1e-6)


def test_epochs_of_a_trial(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, max_epochs=4)
    assert spec.trial_epochs == 4
    assert make_spec(tmp_path).trial_epochs == 9
    assert len(make_space(spec).parameters) == 2
