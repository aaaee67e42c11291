"""The study: shared by processes, trials taken over from killed workers, other searches rejected."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from tests.helpers.simulation import make_spec, open_study

from openmae.automl import study as module
from openmae.automl.database import read_storage
from openmae.automl.study import HeldTrial, Study, resume_trial
from openmae.errors import SpecError

HOLDER = """
import sys, time
from pathlib import Path
sys.path.append({here!r})
from tests.helpers.simulation import make_spec, open_study
study = open_study(make_spec(Path({folder!r})))
one = study.next()
assert study.report(one, 0.5, 1)
print(one.number, flush=True)
time.sleep(600)
"""
TAKER = """
import sys
from pathlib import Path
from optuna.trial import TrialState
sys.path.append({here!r})
from tests.helpers.simulation import make_spec, open_study
study = open_study(make_spec(Path({folder!r}), algorithm="random", max_recommendations=24))
while (one := study.next()) is not None:
    print(one.number, one.trial.number, one.params["train.optim.lr"], flush=True)
    assert study.report(one, 1.0, 9)
    assert study.end(one, TrialState.COMPLETE, 1.0)
"""


def _process(code: str, folder: Path) -> subprocess.Popen[str]:
    text = code.format(here=str(Path(__file__).parents[2]), folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        assert process.stderr is not None
        raise AssertionError(process.stderr.read())
    return line.strip()


def _next(study: Study) -> HeldTrial:
    one = study.next()
    assert one is not None, "nothing was recommended"
    return one


def _finish(study: Study, one: HeldTrial, value: float = 1.0) -> None:
    assert study.report(one, value, 9)
    assert study.end(one, TrialState.COMPLETE, value)


def test_trial_0_has_the_values_of_the_spec(tmp_path: Path) -> None:
    study = open_study(make_spec(tmp_path))
    one = _next(study)
    assert (one.number, one.folder, one.sources) == (0, "000", ())
    assert one.params == {"train.optim.lr": 2e-4, "train.optim.momentum": 0.9}


def test_two_studies_never_create_a_trial_twice_or_too_many(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, max_recommendations=7)
    first, second = open_study(spec), open_study(spec)
    taken = [_next(study) for study in (first, second, first, second, first, second, first)]
    assert [one.number for one in taken] == list(range(7))
    assert len({one.params["train.optim.lr"] for one in taken}) == 7, "two have the same values"
    assert first.next() is None
    assert second.next() is None
    assert len(first.trials()) == len(second.trials()) == 7


def test_processes_share_a_file_and_its_budget(tmp_path: Path) -> None:
    processes = [_process(TAKER, tmp_path) for _ in range(2)]
    lines: list[list[str]] = []
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        lines += [line.split() for line in out.splitlines()]
    assert sorted(int(line[0]) for line in lines) == list(range(24))
    assert len({line[2] for line in lines}) == 24, "two have the same values"
    study = open_study(make_spec(tmp_path, algorithm="random", max_recommendations=24))
    assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE] * 24


def test_trial_of_a_killed_worker_is_continued_once(tmp_path: Path) -> None:
    process = _process(HOLDER, tmp_path)
    assert _line(process) == "0"
    study, other = open_study(make_spec(tmp_path)), open_study(make_spec(tmp_path))
    assert _next(study).number == 1, "what a living process holds was taken from it"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    one = _next(study)
    assert (one.number, one.folder, one.sources) == (0, "000", ())
    assert one.params == {"train.optim.lr": 2e-4, "train.optim.momentum": 0.9}
    assert one.trial.user_attrs["epochs"] == 1, "what it had reported is forgotten"
    assert _next(other).number == 2, "it was taken twice"
    assert len(study.trials()) == 3
    assert [trial.number for trial in study.summaries()] == [0, 1, 2]


def test_trial_is_continued_after_a_kill_between_creation_and_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(make_spec(tmp_path, algorithm="grid"))
    _finish(study, _next(study))
    with monkeypatch.context() as patched:
        patched.setattr(type(study.space), "suggest", _killed)
        with pytest.raises(KeyboardInterrupt):
            study.next()
    study.release(1)
    one = _next(study)
    assert (one.number, len(one.params)) == (1, 2)
    assert len(study.trials()) == 2


def _killed(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_trial_is_continued_after_a_kill_between_queue_and_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(make_spec(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(study.study, "ask", _killed)
        with pytest.raises(KeyboardInterrupt):
            study.next()
    assert (len(study.trials()), len(study.unfinished())) == (0, 1)
    assert _next(open_study(make_spec(tmp_path))).number == 0
    assert len(study.trials()) == 1


def test_released_trial_is_continued_at_once(tmp_path: Path) -> None:
    study, other = open_study(make_spec(tmp_path)), open_study(make_spec(tmp_path))
    one = _next(study)
    assert study.report(one, 0.25, 3)
    study.release(one.number)
    again = _next(other)
    assert (again.number, again.params, again.folder) == (0, one.params, "000")
    assert study.mine() == []
    assert [trial.number for trial in other.mine()] == [0]


def test_worker_on_another_machine_is_lost_without_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(socket, "gethostname", lambda: "far-away")
        patched.setattr(module.time, "time", lambda: 1e9)  # its clock is years behind, which must not matter
        there = open_study(spec)
        one = _next(there)
    here = open_study(spec)
    assert _next(here).number == 1
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + module.LOST - 1)
    assert _next(here).number == 2, "it was taken too early"
    assert there.beat(one)
    now += module.LOST + 1
    assert _next(here).number == 3, "a heartbeat was ignored"
    now += module.LOST + 1
    taken = _next(here)
    assert taken.number == 0
    assert taken.folder.startswith("000-"), "its processes may still write to the old folder"
    assert taken.sources == ("000",)
    assert taken.params == one.params

    assert not there.beat(one), "the first worker does not see that it lost it"
    assert not there.report(one, 0.1, 5)
    assert not there.note(one, "seconds", 3.0)
    assert not there.end(one, TrialState.COMPLETE, 0.1)
    there.release(0)
    assert [trial.number for trial in here.mine()] == [0, 1, 2, 3], "it was let go by the one that had lost it"
    _finish(here, taken, 0.7)
    assert here.trials()[0].value == 0.7
    assert len(here.trials()) == 4


def test_second_takeover_finds_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(tmp_path)
    folders = []
    for name in ("one", "two", "three"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        monkeypatch.setattr(module, "LOST", -1.0)
        study = open_study(spec)
        if name != "one":
            study._is_lost(study.trials()[0])  # a first look
        folders.append(_next(study))
    assert folders[2].sources == (folders[1].folder, "000")


def test_other_settings_are_another_search(tmp_path: Path) -> None:
    _next(open_study(make_spec(tmp_path)))
    changed = make_spec(tmp_path, seed=7, algorithm="random", train={"optim": {"layer_decay": 0.6, "beta2": 0.9}})
    with pytest.raises(SpecError) as caught:
        open_study(changed)
    assert caught.value.problem == (
        f"automl: {tmp_path}/automl holds another search: automl.algorithm was bayesian and is random; automl.seed was "
        "1234 and is 7; train.optim.beta2 was 0.95 and is 0.9; train.optim.layer_decay was unset and is 0.6."
    )
    assert "another results_dir" in caught.value.fix


def test_option_newer_than_the_search_had_its_default(tmp_path: Path) -> None:
    study = open_study(make_spec(tmp_path)).study
    _next(open_study(make_spec(tmp_path)))
    facts = dict(study.user_attrs["facts"])
    assert facts.pop("model.decoder_targets") == 1
    study.set_user_attr("facts", facts)
    open_study(make_spec(tmp_path))
    study.set_user_attr("facts", facts)
    with pytest.raises(SpecError, match=r"model\.decoder_targets was unset and is 0\.5\."):
        open_study(make_spec(tmp_path, model={"decoder_targets": 0.5}))


@pytest.mark.parametrize(("stage", "metric"), [("finetune", "ACC_all"), ("pretrain", "val_loss")])
def test_older_searches_recorded_another_monitored_metric(tmp_path: Path, stage: str, metric: str) -> None:
    """They recorded train_loss if the option was unset."""
    spec = make_spec(tmp_path, train={"stage": stage}, dataset={"val_data_sources": "val"})
    study = open_study(spec).study
    _next(open_study(spec))
    facts = dict(study.user_attrs["facts"])
    assert facts["train.optim.monitor_name"] == metric
    study.set_user_attr("facts", {**facts, "train.optim.monitor_name": "train_loss"})
    open_study(spec)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": {"optim": {"weight_decay": 0.2}}},
        {"dataset": {"batch_size": 8}},
        {"ranges": {"train.optim.lr": [1e-4, 1e-3]}},
        {"max_epochs": 12},
        {"parameters": ["train.optim.lr"]},
    ],
)
def test_options_that_change_a_result_are_another_search(tmp_path: Path, settings: dict[str, Any]) -> None:
    _next(open_study(make_spec(tmp_path)))
    with pytest.raises(SpecError, match="holds another search"):
        open_study(make_spec(tmp_path, **settings))


def test_more_trials_and_other_resources_are_the_same_search(tmp_path: Path) -> None:
    _next(open_study(make_spec(tmp_path)))
    more = {"max_recommendations": 30, "max_concurrent": 2, "timeout": 5, "keep_all": True}
    more |= {"dataset": {"num_workers_per_gpu": 0}, "train": {"keep_checkpoints": 1}}
    assert _next(open_study(make_spec(tmp_path, **more))).number == 1


def test_study_without_trials_is_replaced(tmp_path: Path) -> None:
    open_study(make_spec(tmp_path))
    other = open_study(make_spec(tmp_path, seed=7, algorithm="random"))
    assert _next(other).number == 0
    with pytest.raises(SpecError, match=r"automl\.seed was 7 and is 1234"):
        open_study(make_spec(tmp_path))


def test_folder_with_trials_of_a_lost_study_is_rejected(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    _next(open_study(spec))
    (tmp_path / "automl" / "trials" / "000").mkdir(parents=True)
    (tmp_path / "automl" / "study.db").unlink()
    for _ in range(2):
        with pytest.raises(SpecError) as caught:
            open_study(spec)
        assert "holds trials of a search whose study is missing" in caught.value.problem
        assert f"remove {tmp_path}/automl" in caught.value.fix


def test_damaged_study_is_reported_with_a_fix(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    open_study(spec)
    (tmp_path / "automl" / "study.db").write_bytes(b"this is no database, whatever its name says" * 100)
    for opened in (open_study, read_storage):
        with pytest.raises(SpecError) as caught:
            opened(spec)
        assert caught.value.problem == (
            f"results_dir: {tmp_path}/automl/study.db cannot be used: file is not a database."
        )
        assert "move its folder away" in caught.value.fix


def test_missing_search_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        read_storage(make_spec(tmp_path))
    assert caught.value.problem == f"results_dir: there is no search in {tmp_path}/automl."
    assert caught.value.fix == "Start one: `mae automl -e SPEC`."


@pytest.mark.parametrize("name", ["a folder", "100%", "what?", "a#b"])
def test_folder_with_special_characters(tmp_path: Path, name: str) -> None:
    spec = make_spec(tmp_path / name)
    study = open_study(spec)
    _finish(study, _next(study))
    assert (tmp_path / name / "automl" / "study.db").is_file(), [*tmp_path.rglob("*")]
    assert len(open_study(spec).trials()) == 1


def test_best_is_complete_and_the_first_of_equals(tmp_path: Path) -> None:
    study = open_study(make_spec(tmp_path))
    for value in (0.5, 0.3, 0.3):
        _finish(study, _next(study), value)
    stopped, failed = _next(study), _next(study)
    assert study.report(stopped, 0.1, 1)
    assert study.end(stopped, TrialState.PRUNED)
    assert study.end(failed, TrialState.FAIL, cause="data: broken")
    best = study.best()
    assert best is not None
    assert best.number == 1
    shown = study.summaries()
    assert [trial.state for trial in shown] == ["complete"] * 3 + ["stopped early", "failed"]
    assert [trial.value for trial in shown] == pytest.approx([0.5, 0.3, 0.3, 0.1, math.nan], nan_ok=True)


def test_study_survives_repeated_kills(tmp_path: Path) -> None:
    """After a kill at any moment, the study is not locked or damaged, and no trial is counted twice."""
    seen = 0
    for turn in range(2):
        process = _process(TAKER, tmp_path)
        _line(process)
        time.sleep(0.3 * turn)  # another moment each time
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        study = open_study(make_spec(tmp_path, algorithm="random", max_recommendations=24))
        assert len(study.unfinished()) <= 1
        assert len(study.trials()) >= seen
        seen = len(study.trials())
    taken = 0
    while (one := study.next()) is not None:
        _finish(study, one)
        taken += 1
    assert len(study.trials()) == 24
    assert {trial.state for trial in study.trials()} == {TrialState.COMPLETE}
    names = {trial.user_attrs["folder"] for trial in study.trials()}
    assert names == {f"{number:03d}" for number in range(24)}


def test_resume_trial_continues_a_running_trial(tmp_path: Path) -> None:
    """The adapter to a private name of Optuna: values, reports and pruning continue in another process's object."""
    storage, pruner = f"sqlite:///{tmp_path}/study.db", optuna.pruners.ThresholdPruner(upper=1)
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    drawn = trial.suggest_float("x", 0.0, 1.0)
    trial.report(0.5, 1)
    other = optuna.load_study(study_name=study.study_name, storage=storage, pruner=pruner)
    resumed = resume_trial(other, other.trials[0])
    assert (resumed.number, resumed.suggest_float("x", 0.0, 1.0), resumed.should_prune()) == (0, drawn, False)
    resumed.report(2.0, 2)
    resumed.set_user_attr("folder", "000")
    assert resumed.should_prune()
    other.tell(0, state=TrialState.PRUNED)
    (found,) = study.trials
    assert (found.intermediate_values, found.user_attrs) == ({1: 0.5, 2: 2.0}, {"folder": "000"})


@pytest.mark.filterwarnings("ignore")
def test_optuna_retry_counts_a_trial_twice() -> None:
    """The reason for the adapter: a failed trial and its copy both compete in successive halving."""
    study = optuna.create_study(pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2))
    lost = study.ask()
    lost.report(0.1, 1)
    assert not lost.should_prune()
    study.tell(lost, state=TrialState.FAIL)
    optuna.storages.RetryFailedTrialCallback()(study, study.trials[0])
    rungs = [trial.system_attrs.get("completed_rung_0") for trial in study.trials]
    assert rungs == [0.1, 0.1], "Optuna's own retry would give the same guarantee: use it instead of the adapter"


def test_storage_is_readable_with_optuna(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    study = open_study(spec)
    _finish(study, _next(study), 0.25)
    (name,) = optuna.get_all_study_names(read_storage(spec))
    assert optuna.load_study(study_name=name, storage=read_storage(spec)).best_value == 0.25


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("env:NOWHERE", "automl.storage: the environment variable NOWHERE is not set."),
        ("env:OTHER", "automl.storage: the URL is not a PostgreSQL URL."),
    ],
)
def test_storage_from_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, problem: str) -> None:
    monkeypatch.setenv("OTHER", "mysql://user:secret@host/database")
    with pytest.raises(SpecError) as caught:
        open_study(make_spec(tmp_path, storage=value))
    assert caught.value.problem == problem
    assert "secret" not in str(caught.value)


def test_unreachable_database_is_reported(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"postgresql://127.0.0.1:{port}/studies"
    with pytest.raises(SpecError) as caught:
        open_study(make_spec(tmp_path, storage=url))
    assert caught.value.problem.startswith(f"automl.storage: {url} cannot be used: ")
    assert "refused" in caught.value.problem
    assert caught.value.fix.startswith("Check the URL, the user and the database;")


def test_facts_are_plain_json(tmp_path: Path) -> None:
    study = open_study(make_spec(tmp_path))
    assert json.loads(json.dumps(study.study.user_attrs["facts"])) == study.study.user_attrs["facts"]
    assert os.path.isfile(tmp_path / "automl" / "study.db")
