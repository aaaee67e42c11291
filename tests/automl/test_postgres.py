"""A study in a real PostgreSQL: several workers, one of them killed at any moment."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from optuna.trial import TrialState
from tests.helpers.simulation import make_spec, make_worker, open_study

from openmae.automl import study as module
from openmae.automl.database import read_storage
from openmae.errors import SpecError

ROOT = Path(__file__).parents[2]


def _program(name: str) -> str | None:
    places = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))


def _until(what: Callable[[], Any], text: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"{text} did not come in {seconds:g} s"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Start a server on a socket and yield the URL of its database."""
    initdb, postgres = _program("initdb"), _program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg")
    who: dict[str, Any] = {}
    root = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # pytest's own folder is closed to others, and long
    if os.getuid() == 0:  # the server refuses to run as root
        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        entry = names.get("postgres") or names["nobody"]
        os.chown(root, entry.pw_uid, entry.pw_gid)
        who = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    made = [initdb, "-D", str(root / "data"), "-U", "tester", "-A", "trust", "--no-sync", "--no-instructions"]
    subprocess.run(made, check=True, capture_output=True, cwd=root, **who)
    command = [postgres, "-D", str(root / "data"), "-k", str(root), "-c", "listen_addresses=", "-c", "fsync=off"]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=root, **who)
    try:
        _until(lambda: (root / ".s.PGSQL.5432").exists() or process.poll() is not None, "the server's socket")
        assert process.poll() is None, (root / "log").read_text(encoding="utf-8")
        yield f"postgresql://tester@/postgres?host={quote(str(root), safe='')}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        shutil.rmtree(root)


def _worker(folder: Path, settings: dict[str, Any], pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.helpers.simulation", str(folder), json.dumps(settings), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow(reason="starts a search twice")
def test_search_survives_a_killed_worker(server: str, tmp_path: Path) -> None:
    settings = {"storage": server, "algorithm": "asha", "max_recommendations": 12}
    workers = [_worker(tmp_path, settings, 0.05) for _ in range(3)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n", worker.stderr and worker.stderr.read()
        victim = workers[0]
        assert victim.stdout is not None
        assert victim.stdout.readline().startswith("["), "it must be killed while it trains"
        victim.send_signal(signal.SIGKILL)
        for worker in workers[1:]:
            _, error = worker.communicate(timeout=120)
            assert worker.returncode == 0, error
    finally:
        for worker in workers:
            worker.kill()
            worker.wait(10)
    study = open_study(make_spec(tmp_path, **settings))
    trials = study.trials()
    assert [trial.number for trial in trials] == list(range(12))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert len({trial.params["train.optim.lr"] for trial in trials}) == 12
    told = {trial.number: _epochs(tmp_path, trial.user_attrs["folder"]) for trial in trials}
    assert {number: told[number] - trial.user_attrs["epochs"] for number, trial in enumerate(trials)} in [
        {n: (n == again) * 1 for n in range(12)}
        for again in range(-1, 12)  # the epoch in which it was killed, at most
    ], "an epoch was lost or trained again"
    processes = {trial.user_attrs["worker"]["process"]["pid"] for trial in trials}
    assert processes >= {worker.pid for worker in workers[1:]}, "one of them did nothing"


def _epochs(folder: Path, name: str) -> int:
    path = folder / "automl" / "trials" / name / "status.json"
    return len(path.read_text(encoding="utf-8").splitlines())


def test_lock_is_freed_when_its_holder_dies(server: str, tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
sys.path.append({str(ROOT)!r})
from tests.helpers.simulation import make_spec, open_study
study = open_study(make_spec(Path({str(tmp_path)!r}), storage={server!r}))
with study._lock():
    print("mine", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    study = open_study(make_spec(tmp_path, storage=server))
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    begun = time.monotonic()
    one = study.next()
    assert one is not None
    assert one.number == 0
    assert time.monotonic() - begun < 10


def test_another_machine_continues_in_its_own_folder(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machines share the database but no disk, so the trial starts again here."""
    settings = {"storage": server, "algorithm": "random", "max_recommendations": 2, "results_dir": str(tmp_path / "a")}
    with monkeypatch.context() as patched:
        patched.setattr(socket, "gethostname", lambda: "far-away")
        there, _ = make_worker(make_spec(Path("shared"), **settings), stride=1)
    while not there.running:
        there.turn()
    monkeypatch.setattr(module, "LOST", -1.0)
    here, _ = make_worker(make_spec(Path("shared"), **settings | {"results_dir": str(tmp_path / "b")}))
    here.run()
    assert [trial.state for trial in here.study.trials()] == [TrialState.COMPLETE] * 2
    folder = here.study.trials()[0].user_attrs["folder"]
    assert folder.startswith("000-")
    assert (tmp_path / "b" / "trials" / folder / "status.json").is_file()


def test_searches_in_one_database_do_not_mix(server: str, tmp_path: Path) -> None:
    first = make_spec(tmp_path / "first", storage=server, algorithm="random", max_recommendations=2)
    second = make_spec(tmp_path / "second", storage=server, algorithm="random", max_recommendations=2)
    for spec in (first, second):
        worker, _ = make_worker(spec)
        worker.run()
        assert len(worker.study.trials()) == 2
    with pytest.raises(SpecError) as caught:
        open_study(make_spec(tmp_path / "first", storage=server, algorithm="random", max_recommendations=2, seed=7))
    assert "holds trials of a search whose study is missing or is another one" in caught.value.problem


def test_url_from_an_environment_variable(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIES", server)
    spec = make_spec(tmp_path, storage="env:STUDIES")
    assert open_study(spec).next() is not None
    assert [study.study_name for study in read_storage(spec).get_all_studies()]


def test_missing_database_is_named(server: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        open_study(make_spec(tmp_path, storage=server.replace("/postgres?", "/nowhere?")))
    assert 'database "nowhere" does not exist' in caught.value.problem


@pytest.mark.slow  # minutes: every job imports torch
def test_leader_and_worker_share_real_trials(server: str, tmp_path: Path, images: Path) -> None:
    command = [
        *(sys.executable, "-m", "openmae", "automl"),
        *(f"dataset.train_data_sources={images / 'train'}", "dataset.batch_size=5", "model.arch=vit_tiny_patch16"),
        *("dataset.augmentation.input_size=32", "dataset.num_workers_per_gpu=0", "train.num_epochs=1"),
        *("automl.algorithm=random", "automl.max_recommendations=4", f"automl.storage={server}"),
        f"results_dir={tmp_path / 'results'}",
    ]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    leader = subprocess.Popen(command, **told)
    root = tmp_path / "results" / "automl" / "trials"
    _until(lambda: root.is_dir() or leader.poll() is not None, "the first training", 120)
    worker = subprocess.Popen([*command[:4], "worker", *command[4:]], **told)
    for process in (leader, worker):
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
    assert (root.parent / "best.yaml").is_file()
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in (root.parent / "jobs").glob("*/*/job.json")]
    assert sorted(job["name"] for job in jobs if job["name"] != "probe") == [f"{n:03d} to epoch 1" for n in range(4)]
    assert {job["submitter"]["pid"] for job in jobs} == {leader.pid, worker.pid}, "one of them trained nothing"
