from __future__ import annotations

import logging
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openmae.results.metrics_csv import read_metrics
from openmae.spec.schema import WandbSpec
from openmae.training import loggers as module
from openmae.training.loggers import Loggers, open_wandb


def events(folder) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_metrics_go_to_csv_and_tensorboard(tmp_path):
    loggers = Loggers(tmp_path, None)
    loggers.write(1, 1, {"train_loss": 0.5, "lr": 0.25})
    loggers.write(2, 1, {"train_loss": 0.25})
    loggers.close()
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 1, "epoch": 1, "train_loss": 0.5, "lr": 0.25},
        {"step": 2, "epoch": 1, "train_loss": 0.25},
    ]
    assert events(tmp_path) == {"train_loss": [(1, 0.5), (2, 0.25)], "lr": [(1, 0.25)]}


def test_a_resumed_run_drops_rows_after_its_checkpoint(tmp_path):
    first = Loggers(tmp_path, None)
    for step in (1, 2, 3):
        first.write(step, 1, {"train_loss": float(step)})
    first.close()
    resumed = Loggers(tmp_path, 2)
    resumed.write(3, 1, {"train_loss": 30.0})
    resumed.close()
    assert [row["train_loss"] for row in read_metrics(tmp_path / "metrics.csv")] == [1.0, 2.0, 30.0]
    assert events(tmp_path)["train_loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_new_run_replaces_the_metrics(tmp_path):
    for _ in range(2):
        loggers = Loggers(tmp_path, None)
        loggers.write(1, 1, {"train_loss": 1.0})
        loggers.close()
    assert len(read_metrics(tmp_path / "metrics.csv")) == 1


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A stand-in for the package, and no key anywhere."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    calls = SimpleNamespace(init=[], log=[], finished=0)

    class Run:
        def log(self, values, step):
            calls.log.append((step, values))

        def finish(self):
            calls.finished += 1

    def init(**options):
        calls.init.append(options)
        return Run()

    module = ModuleType("wandb")
    module.init = init
    module.__spec__ = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def settings(**changes) -> dict:
    return WandbSpec(**changes).model_dump()


def test_wandb_offline(wandb, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = open_wandb(settings(name="first", tags=("a", "b")), tmp_path, {"train": {"seed": 1}})
    (options,) = wandb.init
    assert options["dir"] == str(tmp_path)
    assert options["config"] == {"train": {"seed": 1}}
    assert (options["project"], options["name"], options["tags"]) == ("openmae", "first", ["a", "b"])
    assert options["entity"] is options["id"] is options["resume"] is None
    loggers = Loggers(tmp_path, None, run)
    loggers.write(7, 1, {"train_loss": 0.5})
    loggers.close()
    assert wandb.log == [(7, {"train_loss": 0.5, "epoch": 1})]
    assert wandb.finished == 1


def test_wandb_resumes_a_run_by_its_id(wandb, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    open_wandb(settings(run_id="abc"), tmp_path, {})
    assert (wandb.init[0]["id"], wandb.init[0]["resume"]) == ("abc", "allow")


def test_wandb_without_a_key_logs_one_notice(wandb, caplog, tmp_path):
    with caplog.at_level(logging.INFO, "openmae"):
        assert open_wandb(settings(), tmp_path, {}) is None
    assert caplog.messages == [
        "Weights & Biases is off: no API key found. Set WANDB_API_KEY or WANDB_MODE=offline to use it."
    ]
    assert wandb.init == []


def test_wandb_without_the_package_logs_one_warning(wandb, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_wandb(settings(), tmp_path, {}) is None
    assert caplog.messages == ["Weights & Biases is off: the package is missing. Fix: pip install 'openmae[wandb]'."]


@pytest.mark.parametrize("off", ["setting", "mode"])
def test_wandb_logs_nothing_when_it_is_switched_off(wandb, monkeypatch, caplog, tmp_path, off):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    if off == "mode":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    with caplog.at_level(logging.INFO, "openmae"):
        assert open_wandb(settings(enable=off != "setting"), tmp_path, {}) is None
    assert caplog.messages == []
    assert wandb.init == []


def test_close_does_not_wait_for_a_hanging_writer(tmp_path, monkeypatch, caplog):
    """After a Ctrl-C inside TensorBoard's queue, its own close would wait forever."""
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0.05)
    loggers, release = Loggers(tmp_path, None), threading.Event()
    close = loggers._tensorboard.close
    monkeypatch.setattr(loggers._tensorboard, "close", release.wait)
    with caplog.at_level(logging.WARNING, "openmae"):
        loggers.close()
    assert "TensorBoard's events are incomplete: their writer did not end within 0.05 s." in caplog.messages
    release.set()
    close()


def test_close_does_not_wait_for_a_queue_that_never_empties(tmp_path, monkeypatch, caplog):
    """A KeyboardInterrupt between two lines of Queue.put leaves an item that is counted and never written."""
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0.5)
    loggers = Loggers(tmp_path, None)
    loggers.write(1, 1, {"train_loss": 0.5})
    loggers._tensorboard.file_writer.event_writer._async_writer._byte_queue.unfinished_tasks += 1
    with caplog.at_level(logging.WARNING, "openmae"):
        loggers.close()
    assert "did not end within 0.5 s" in caplog.text
    assert read_metrics(tmp_path / "metrics.csv")[0]["train_loss"] == 0.5
