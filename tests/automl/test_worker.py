"""The worker with simulated jobs: which trials continue, what is kept, and what ends a search."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from optuna.trial import TrialState
from tests.helpers.simulation import BrokenError, Jobs, loss, make_spec, make_worker, newest

from openmae.automl import study as study_module
from openmae.automl import worker as module
from openmae.automl.worker import Worker
from openmae.errors import RunError, SpecError
from openmae.storage import layout


def _folder(tmp_path: Path, name: str) -> Path:
    return tmp_path / "automl" / "trials" / name


def _models(tmp_path: Path) -> list[str]:
    return sorted({path.parent.name for path in (tmp_path / "automl" / "trials").rglob("*.pth")})


def _states(worker: Worker) -> Counter[str]:
    return Counter(trial.state.name for trial in worker.study.trials())


def test_every_trial_runs_once_and_the_best_checkpoint_stays(tmp_path: Path) -> None:
    worker, jobs = make_worker(make_spec(tmp_path, algorithm="random"))
    worker.run()
    assert _states(worker) == {"COMPLETE": 6}
    assert sorted(jobs.trained) == sorted((f"{n:03d}", epoch) for n in range(6) for epoch in range(1, 10))
    values = {trial.number: trial.value for trial in worker.study.trials()}
    best = min(values, key=lambda number: values[number] or 0.0)
    assert _models(tmp_path) == [f"{best:03d}"], "what cannot win takes room, or the best is gone"
    kept = _folder(tmp_path, f"{best:03d}")
    assert (kept / "model_best.pth").is_file()
    assert all((_folder(tmp_path, f"{n:03d}") / "status.json").is_file() for n in range(6)), "the record of a loser"
    trial = worker.study.best()
    assert trial is not None
    assert trial.value == pytest.approx(loss(trial.params, 9))
    assert (trial.user_attrs["epochs"], trial.user_attrs["folder"]) == (9, f"{best:03d}")


def test_keep_all(tmp_path: Path) -> None:
    worker, _ = make_worker(make_spec(tmp_path, algorithm="random", max_recommendations=3, keep_all=True))
    worker.run()
    assert _models(tmp_path) == ["000", "001", "002"]


def test_overrides_of_a_job(tmp_path: Path) -> None:
    worker, jobs = make_worker(make_spec(tmp_path, algorithm="random", max_recommendations=2))
    worker.run()
    name, overrides = jobs.started[1]
    assert name == "001 to epoch 9"
    params = worker.study.trials()[1].params
    assert overrides == {
        **params,
        "train.num_epochs": 9,
        "train.results_dir": str(_folder(tmp_path, "001")),
        "wandb.group": "automl",
        "wandb.name": "trial 1",
    }


def test_number_of_gpus_is_passed_to_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job inherits no variables of a launcher, so the search hands the number on."""
    worker, jobs = make_worker(make_spec(tmp_path, algorithm="random", max_recommendations=1))
    create, given = jobs.create_job, []
    monkeypatch.setattr(
        jobs, "create_job", lambda *args, **more: given.append(more["gpu_count"]) or create(*args, **more)
    )
    monkeypatch.setenv("NUM_GPU_PER_NODE", "2")
    worker.run()
    assert given == [2]


def test_asha_stops_by_its_rule_and_trains_no_epoch_twice(tmp_path: Path) -> None:
    worker, jobs = make_worker(make_spec(tmp_path, algorithm="asha", max_recommendations=9))
    assert worker.jobs.algorithm.rungs == (3, 9)
    worker.run()
    assert len(jobs.trained) == len(set(jobs.trained)), "an epoch was trained again"
    rungs: dict[int, list[float]] = {3: []}
    for trial in worker.study.trials():  # in sequence, so the rule can be computed here
        expected = TrialState.COMPLETE
        for rung, values in rungs.items():
            value = loss(trial.params, rung)
            values.append(value)
            if value > sorted(values)[max(len(values) // 3 - 1, 0)]:
                expected = TrialState.PRUNED
                assert trial.user_attrs["epochs"] == rung
                break
        assert trial.state == expected, trial
    assert 0 < _states(worker)["PRUNED"] < 9
    best = worker.study.best()
    assert best is not None
    told = {
        path.parent.name: path.read_text()
        for path in (tmp_path / "automl" / "trials").glob(f"*/{layout.CHECKPOINTS_DELETED}")
    }
    assert set(told) == {trial.user_attrs["folder"] for trial in worker.study.trials()} - {best.user_attrs["folder"]}
    for trial in worker.study.trials():
        if trial.state == TrialState.PRUNED:
            why = f"Trial {trial.number} of the search was pruned after epoch 3 of 9, as others were better, so its"
            assert told[trial.user_attrs["folder"]].startswith(why)
    assert _models(tmp_path) == [best.user_attrs["folder"]]
    stops = [overrides.get("train.stop_after_epoch") for name, overrides in jobs.started if name.startswith("000")]
    assert stops == [3, None]
    assert {overrides["train.num_epochs"] for _, overrides in jobs.started} == {9}, "the schedule is of the whole"


def test_asha_trains_fewer_epochs(tmp_path: Path) -> None:
    worker, jobs = make_worker(make_spec(tmp_path, algorithm="asha", max_recommendations=12))
    worker.run()
    assert len(jobs.trained) <= 0.7 * 12 * 9, f"{len(jobs.trained)} epochs"


@pytest.mark.parametrize("algorithm", ["hyperband", "bohb"])
def test_hyperband_and_bohb_stop_early(tmp_path: Path, algorithm: str) -> None:
    worker, jobs = make_worker(make_spec(tmp_path, algorithm=algorithm, max_recommendations=12))
    worker.run()
    states = _states(worker)
    assert states["PRUNED"] + states["COMPLETE"] == 12
    assert states["PRUNED"] > 0
    assert states["COMPLETE"] > 0
    assert len(jobs.trained) == len(set(jobs.trained))


def test_population_inherits_checkpoints(tmp_path: Path) -> None:
    worker, jobs = make_worker(make_spec(tmp_path, algorithm="pbt", max_recommendations=12, population_size=4))
    worker.run()
    trials = worker.study.trials()
    assert _states(worker) == {"COMPLETE": 12}
    for trial in trials:
        generation, folder = trial.number // 4, trial.user_attrs["folder"]
        assert [epoch for name, epoch in jobs.trained if name == folder] == [
            3 * generation + 1,
            3 * generation + 2,
            3 * generation + 3,
        ]
        state = newest(_folder(tmp_path, folder))
        if generation == 0:
            continue
        source = trials[int(trial.user_attrs["sources"][0])]
        before = trials[4 * (generation - 1) : 4 * generation]
        worst = max(before, key=lambda one: one.value or 0.0)
        best = min(before, key=lambda one: one.value or 0.0)
        own = before[trial.number % 4]
        assert source is (best if own is worst else own)
        if own is not worst:
            assert trial.params == own.params
        if state is not None:
            assert state["path"][-4:] == [source.user_attrs["folder"], *[folder] * 3]
    assert set(_models(tmp_path)) >= {"008", "009", "010", "011"}
    assert "000" not in _models(tmp_path), "the first generation cannot hand anything on any more"


def test_hanging_trial_fails_after_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(overrides: Mapping[str, Any], epoch: int) -> float:
        if overrides["train.results_dir"].endswith("001"):
            raise BrokenError("hang")
        return loss(overrides, epoch)

    monkeypatch.setattr(module, "_POLL", 0.01)
    worker, jobs = make_worker(make_spec(tmp_path, algorithm="random", max_recommendations=3, timeout=3), learn)
    worker.run()
    assert _states(worker) == {"COMPLETE": 2, "FAIL": 1}
    failed = worker.study.trials()[1]
    assert failed.user_attrs["cause"] == "timeout: it did not finish within 3 seconds (automl.timeout)"
    assert len(jobs.canceled) == 1
    assert failed.user_attrs["seconds"] >= 3


def test_equal_failures_end_the_search(tmp_path: Path) -> None:
    def learn(overrides: Mapping[str, Any], epoch: int) -> float:
        raise BrokenError(f"DataError: image {len(overrides['train.results_dir']) + epoch} is broken\nmore")

    spec = make_spec(tmp_path, algorithm="random")
    worker, jobs = make_worker(spec, learn)
    with pytest.raises(RunError) as caught:
        worker.run()
    problem = caught.value.problem
    assert problem.startswith("3 trials in a row failed for the same reason: data: DataError: image ")
    assert problem.endswith("is broken")
    assert f"{tmp_path}/automl/jobs" in caught.value.fix
    assert len(jobs.started) == 3
    again, _ = make_worker(spec)
    again.run()
    assert _states(again) == {"FAIL": 3, "COMPLETE": 3}, "the same command must continue with the trials that are left"


def test_divergence_does_not_end_a_search_with_a_success(tmp_path: Path) -> None:
    def learn(overrides: Mapping[str, Any], epoch: int) -> float:
        if not overrides["train.results_dir"].endswith("000"):
            raise BrokenError("RunError: The loss or its gradients were not finite 10 steps in a row\nmore")
        return loss(overrides, epoch)

    worker, _ = make_worker(make_spec(tmp_path, algorithm="random"), learn)
    worker.run()
    assert _states(worker) == {"COMPLETE": 1, "FAIL": 5}
    cause = worker.study.trials()[5].user_attrs["cause"]
    assert "not finite" in cause


def test_different_failures_do_not_end_the_search(tmp_path: Path) -> None:
    causes = iter(("lightning", "flood", "lightning", "flood", "hail", "lightning"))

    def learn(overrides: Mapping[str, Any], epoch: int) -> float:
        raise BrokenError(next(causes))

    worker, _ = make_worker(make_spec(tmp_path, algorithm="random"), learn)
    worker.run()
    assert _states(worker) == {"FAIL": 6}
    assert worker.study.best() is None
    assert _models(tmp_path) == []


def test_success_resets_the_count_of_failures(tmp_path: Path) -> None:
    def learn(overrides: Mapping[str, Any], epoch: int) -> float:
        if int(overrides["train.results_dir"][-1]) % 2:
            raise BrokenError("always the same")
        return loss(overrides, epoch)

    worker, _ = make_worker(make_spec(tmp_path, algorithm="random", max_recommendations=8), learn)
    worker.run()
    assert _states(worker) == {"FAIL": 4, "COMPLETE": 4}


@pytest.mark.parametrize("broken_from", [1, 9])
def test_trial_without_a_finite_value_fails(tmp_path: Path, broken_from: int) -> None:
    """Also where the earlier epochs had one: the weights are lost."""

    def learn(overrides: Mapping[str, Any], epoch: int) -> float | None:
        own = overrides["train.results_dir"].endswith("000")
        return None if own and epoch >= broken_from else loss(overrides, epoch)

    last_epoch_counts = {"dataset": {"val_data_sources": "val"}, "train": {"optim": {"monitor_name": "val_loss"}}}
    settings = {"algorithm": "random", "max_recommendations": 2, "metric": "train_loss"}
    spec = make_spec(tmp_path, **settings, **last_epoch_counts)
    worker, _ = make_worker(spec, learn)
    worker.run()
    own, other = worker.study.trials()
    assert own.state == TrialState.FAIL
    assert own.user_attrs["cause"] == "spec: it reported no finite train_loss"
    best = worker.study.best()
    assert best is not None
    assert best.number == other.number == 1
    assert _models(tmp_path) == ["001"]


def test_trial_whose_job_cannot_start_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, jobs = make_worker(make_spec(tmp_path, algorithm="random", max_recommendations=2))

    def refuse(*_: Any, **__: Any) -> None:
        raise SpecError("train.optim.lr: must not be 13.", "Take 12.")

    monkeypatch.setattr(jobs, "create_job", refuse)
    worker.run()
    assert [trial.user_attrs["cause"] for trial in worker.study.trials()] == [
        "spec: train.optim.lr: must not be 13."
    ] * 2


def test_trial_whose_job_is_canceled_fails(tmp_path: Path) -> None:
    worker, jobs = make_worker(make_spec(tmp_path, algorithm="random", max_recommendations=1))
    worker.turn()
    jobs.cancel_job(worker.running[0].job.id)
    worker.run()
    assert worker.study.trials()[0].user_attrs["cause"] == "canceled: its job was canceled, but not by the search"


def test_preempted_trial_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    worker, jobs = make_worker(make_spec(tmp_path, algorithm="random", max_recommendations=1), stride=1)
    while len(jobs.trained) < 3:
        worker.turn()
    job = jobs.cancel_job(worker.running[0].job.id)
    jobs.jobs[job.id] = replace(job, exit_code=75)
    worker.run()
    assert _states(worker) == {"COMPLETE": 1}
    assert [epoch for _, epoch in jobs.trained] == list(range(1, 10)), "an epoch was lost or trained again"


def _interrupted(tmp_path: Path, after: int, **settings: Any) -> Jobs:
    """Ctrl-C after some epochs."""
    worker, jobs = make_worker(make_spec(tmp_path, **settings), stride=1)

    def interrupt(running: Any) -> None:
        if len(jobs.trained) >= after:
            raise KeyboardInterrupt

    worker.changed = interrupt
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    assert all(job.finished for job in jobs.jobs.values()), "a job was left running"
    assert worker.study.mine() == []
    return jobs


@pytest.mark.parametrize("algorithm", ["random", "asha", "pbt"])
@pytest.mark.parametrize("after", [1, 14])
def test_interrupted_search_ends_with_the_same_values(tmp_path: Path, algorithm: str, after: int) -> None:
    """An interruption does not change the values, states and results of a search."""
    settings = {"algorithm": algorithm, "max_recommendations": 6, "population_size": 3, "max_concurrent": 2}
    first = _interrupted(tmp_path / "cut", after, **settings)
    worker, second = make_worker(make_spec(tmp_path / "cut", **settings))
    worker.run()
    whole, jobs = make_worker(make_spec(tmp_path / "whole", **settings))
    whole.run()
    assert sorted(first.trained + second.trained) == sorted(jobs.trained), "epochs were lost or trained again"
    told = [(trial.params, trial.value, trial.state, trial.intermediate_values) for trial in worker.study.trials()]
    assert told == [(t.params, t.value, t.state, t.intermediate_values) for t in whole.study.trials()]
    assert len(worker.study.trials()) == 6


def test_interrupt_during_start_leaves_no_job_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, jobs = make_worker(make_spec(tmp_path))
    create = jobs.create_job

    def interrupted(*arguments: Any, **more: Any) -> None:
        create(*arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "create_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    assert [job.status for job in jobs.list_jobs()] == ["CANCELED"]
    again, _ = make_worker(make_spec(tmp_path))
    assert again.study.next() is not None
    assert len(again.study.trials()) == 1


def test_running_job_is_adopted(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, algorithm="random", max_recommendations=1)
    worker, jobs = make_worker(spec, stride=1)
    worker.turn()
    worker.turn()
    worker.study.release(0)  # as if it had died: its job runs on
    heir, _ = make_worker(spec)
    heir.jobs.client = jobs  # type: ignore[assignment]
    heir.run()
    assert len(jobs.started) == 1
    assert _states(heir) == {"COMPLETE": 1}


def test_several_trials_at_once(tmp_path: Path) -> None:
    worker, _ = make_worker(make_spec(tmp_path, algorithm="random", max_concurrent=3))
    seen: list[int] = []
    worker.changed = lambda running: seen.append(len(running))
    worker.run()
    assert max(seen) == 3
    assert _states(worker) == {"COMPLETE": 6}


def test_trial_taken_over_by_another_machine_is_stopped_here_and_continued_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tmp_path, algorithm="asha", max_recommendations=1)
    monkeypatch.setattr(module, "BEAT", -1.0)
    with monkeypatch.context() as patched:
        patched.setattr(socket, "gethostname", lambda: "far-away")
        there, old = make_worker(spec, stride=1)
    while old.trained[-1:] != [("000", 5)]:
        there.turn()
    with monkeypatch.context() as patched:
        patched.setattr(study_module, "LOST", -1.0)
        here, new = make_worker(spec)
        while not here.running:
            here.turn()
    there.turn()
    assert there.running == []
    assert [job.status for job in old.jobs.values()][-1] == "CANCELED", "both train the same"
    here.run()
    (trial,) = here.study.trials()
    folder = trial.user_attrs["folder"]
    assert folder.startswith("000-")
    assert new.trained == [(folder, epoch) for epoch in range(6, 10)], "what was trained was trained again"
    assert trial.intermediate_values.keys() == {3, 9}
    lines = (_folder(tmp_path, folder) / "status.json").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 9, "the epochs before are not known there"
    there.run()
    assert len(here.study.trials()) == 1


def test_trial_taken_over_after_its_last_epoch_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tmp_path, algorithm="random", max_recommendations=1)
    with monkeypatch.context() as patched:
        patched.setattr(socket, "gethostname", lambda: "far-away")
        there, old = make_worker(spec, stride=1)
    while len(old.trained) < 9:
        there.turn()
    monkeypatch.setattr(study_module, "LOST", -1.0)
    here, new = make_worker(spec)
    here.run()
    assert new.trained == []
    assert _states(here) == {"COMPLETE": 1}
    assert _models(tmp_path) == [here.study.trials()[0].user_attrs["folder"]], "the checkpoints exist twice"


def test_full_disk_pauses_the_search(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, algorithm="random", max_recommendations=20)
    worker, jobs = make_worker(spec, stride=1)
    worker.turn()
    engine = worker.study.study._storage._backend.engine  # type: ignore[attr-defined]
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar() + 1
    sqlalchemy.event.listen(engine, "connect", lambda c, _: c.execute(f"PRAGMA max_page_count = {pages}"))
    engine.dispose()
    with pytest.raises(RunError) as caught:
        worker.run()
    assert caught.value.problem == "The study cannot be read or written: database or disk is full."
    assert (
        caught.value.fix
        == "Free space if the disk is full, or check the database; the same command continues the search."
    )
    assert all(job.finished for job in jobs.list_jobs()), "a job was left running"
    heir, _ = make_worker(make_spec(tmp_path, algorithm="random", max_recommendations=20))
    held = heir.study.unfinished()
    for trial in held:  # its holder is this very process, which is not dead
        worker.study.release(trial.number)
    heir.run()
    assert _states(heir) == {"COMPLETE": 20}


def test_seconds_of_all_jobs_count(tmp_path: Path) -> None:
    worker, _ = make_worker(make_spec(tmp_path, algorithm="asha", max_recommendations=1), pause=0.02)
    worker.run()
    (trial,) = worker.study.summaries()
    assert 9 * 0.02 <= trial.seconds < 5
    assert trial.epochs == 9


def test_search_settings_are_not_passed_to_jobs(tmp_path: Path) -> None:
    worker, _ = make_worker(make_spec(tmp_path, seed=5))
    typed = worker.jobs.specs
    assert not [key for key in typed if key.startswith("automl.")]
    assert typed["results_dir"] == str(tmp_path / "automl")
    assert json.dumps(typed["model.arch"]) == '"vit_tiny_patch16"'


def test_jobs_get_environment_variables_instead_of_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAE_DATA", "hush-hush")
    spec = make_spec(tmp_path).standing_for({"dataset.train_data_sources": "${oc.env:MAE_DATA}"})
    worker, _ = make_worker(spec)
    assert worker.jobs.specs["dataset.train_data_sources"] == "${oc.env:MAE_DATA}"
    assert worker.jobs.environment["MAE_DATA"] == "hush-hush"
