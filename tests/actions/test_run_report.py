"""The report of a training run while it is in progress, after an interruption, and at its end."""

from __future__ import annotations

import doctest
import logging
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from openmae.actions import run_report
from openmae.actions.evidence import collect_evidence
from openmae.actions.run_report import RunReport, shown_epochs
from openmae.cli.main import main
from openmae.results.status import read_status
from openmae.training.pretrain import PretrainTask

from .conftest import train_arguments

pytestmark = pytest.mark.xdist_group("actions")


@pytest.fixture
def command(photos, tmp_path):
    """A pretraining run of three epochs of two steps."""
    return ["train", *train_arguments(photos, "vit", "pretrain"), f"results_dir={tmp_path}", "train.num_epochs=3"]


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(n, signal)``: send a signal to this process in the n-th training step from now on."""

    def install(number: int, sent: signal.Signals) -> None:
        original, calls = PretrainTask.training_loss, []

        def training_loss(self, *arguments):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), sent)
            return original(self, *arguments)

        monkeypatch.setattr(PretrainTask, "training_loss", training_loss)

    return install


def text_of(folder: Path) -> str:
    return re.sub(r"data:image/png[^\"]*", "", (folder / "train" / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("validated", [True, False])
def test_the_report_is_refreshed_during_the_run(validated, command, tmp_path, monkeypatch):
    monkeypatch.setattr(run_report, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(run_report, "_SHARE", 1e9)
    seen = []
    refresh = RunReport._refresh

    def look(self, state):
        refresh(self, state)
        seen.append(text_of(tmp_path))

    monkeypatch.setattr(RunReport, "_refresh", look)
    assert main([*command, *([] if validated else ["dataset.val_data_sources=''"])]) == 0
    for epoch, page in enumerate(seen, start=1):
        assert f"This run has not finished: the state after epoch {epoch} of 3, step {2 * epoch}." in page
        assert "Latest metrics" in page
        assert "Progress of the reconstructions" in page
        assert ("validation loss" in page) == validated
    assert len(seen) == 2, "the last report is that of the finished run"
    page = text_of(tmp_path)
    assert "This run has not finished" not in page
    assert "Final metrics" in page
    names = {path.name for path in (tmp_path / "train" / "reconstructions").iterdir()}
    assert names == {"last.png", "progress.png", *(f"epoch_000{epoch}.png" for epoch in (1, 2, 3))}


def test_short_epochs_and_long_reports_are_not_reported(command, tmp_path, monkeypatch):
    """The first report waits for ``REFRESH_SECONDS``; after a long one, the next waits until it is a small share."""
    written = []

    def write(self, *_, unfinished=""):
        written.append(unfinished)
        return collect_evidence(self._plan, None)

    monkeypatch.setattr(RunReport, "_write", write)
    assert main(command) == 0
    assert written == [""], "a run of a second is reported once"
    (tmp_path / "train" / "backbone.safetensors").unlink()
    written.clear()
    monkeypatch.setattr(run_report, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(run_report, "_SHARE", 1e-9)
    assert main([*command, "train.num_epochs=6"]) == 0
    assert len(written) == 2


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_an_interrupted_run_is_reported_and_resumes(sent, code, command, tmp_path, at_step):
    at_step(4, sent)
    assert main(command) == code
    page = text_of(tmp_path)
    assert "This run was interrupted in epoch 2 of 3, after step 4. The same command resumes it." in page
    assert "Progress of the reconstructions" in page
    first = tmp_path / "train" / "reconstructions" / "epoch_0001.png"
    before = first.stat().st_mtime_ns
    assert main(command) == 0
    assert first.stat().st_mtime_ns == before, "the earlier reconstructions are kept"
    page = text_of(tmp_path)
    assert "run was interrupted" not in page
    assert re.search(r"0:00:\d\d, 0:00:\d\d of it since the run was resumed", page)
    assert "GiB, with the workers, since the run was resumed" in page


def test_a_run_with_the_report_of_an_unfinished_run_is_completed(command, tmp_path, at_step, monkeypatch):
    """Killed after its last checkpoint: backbone and report of a shorter run do not count."""
    assert main([*command, "train.num_epochs=1"]) == 0
    before = (tmp_path / "train" / "backbone.safetensors").read_bytes()
    monkeypatch.setattr(run_report, "REFRESH_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr("openmae.actions.train.save_backbone", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert main(command) == 130
    assert "This run has not finished" in text_of(tmp_path)
    assert main(command) == 0
    assert "Final metrics" in text_of(tmp_path)
    assert (tmp_path / "train" / "backbone.safetensors").read_bytes() != before


def test_duration_peak_memory_and_versions_are_recorded(command, tmp_path):
    for _ in range(2):
        assert main([*command, "train.stop_after_epoch=1"]) == 0
    assert main(command) == 0
    lines = [line for line in read_status(tmp_path / "train" / "status.json") if line["status"] == "SUCCESS"]
    first, last = lines
    for line in lines:
        assert re.fullmatch(r"0:00:\d\d\.\d{6}", line["duration"])
        assert line["peak_memory_bytes"] > 2e7
        assert re.fullmatch(r"openmae \S+, torch \S+, timm \S+, Python \S+", line["versions"])
    assert last["duration"] > first["duration"], "the duration of the first part is missing"
    assert f"torch {torch.__version__}, timm" in text_of(tmp_path)


def test_the_reconstructions_of_an_earlier_run_are_removed(command, tmp_path):
    assert main([*command, "train.num_epochs=2"]) == 0
    for path in (tmp_path / "train").glob("model_*"):
        path.unlink()
    assert main([*command, "train.num_epochs=1"]) == 0
    assert not (tmp_path / "train" / "reconstructions" / "epoch_0002.png").exists()


def test_a_full_disk_during_a_refresh_is_a_warning(command, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_report, "REFRESH_SECONDS", 0.0)
    write = run_report.train_report

    def full(*arguments, unfinished):
        if unfinished:
            raise OSError(28, "No space left on device")
        write(*arguments, unfinished=unfinished)

    def full_folder(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_report, "train_report", full)
    monkeypatch.setattr(run_report, "reconstruction_strip", full_folder)
    with caplog.at_level(logging.WARNING, "openmae"):
        assert main(command) == 0
    assert "The reconstructions could not be written (No space left on device)." in caplog.text
    assert "report.html could not be refreshed (No space left on device)." in caplog.text


def test_on_a_gpu_the_memory_is_that_of_the_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.max_memory_allocated", {torch.device("cuda:1"): 7}.get)
    report = RunReport.__new__(RunReport)
    report._fabric = SimpleNamespace(device=torch.device("cuda:1"))
    assert report._memory() == 7


def test_fine_tuning_has_no_reconstructions(trained):
    folder = trained("vit", "finetune").folder
    assert not (folder / "reconstructions").exists()
    assert "peak memory" in text_of(folder.parent)


@pytest.mark.parametrize(("epochs", "shown"), [(1, (1,)), (5, (1, 2, 3, 4, 5)), (6, (1, 2, 4, 6)), (800, 5)])
def test_up_to_five_epochs_are_shown(epochs, shown):
    found = shown_epochs(epochs)
    assert (found[0], found[-1]) == (1, epochs)
    assert (len(found) if isinstance(shown, int) else found) == shown


def test_examples_run() -> None:
    assert doctest.testmod(run_report).failed == 0
