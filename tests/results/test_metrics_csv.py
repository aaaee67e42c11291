import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmae.results.metrics_csv import MetricsLog, before_training, read_metrics, series


def test_columns_grow_as_metrics_appear(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, append=False)
    metrics.write(10, 1, {"train_loss": 0.5})
    metrics.write(20, 2, {"train_loss": 0.25, "val_loss": 0.375})
    metrics.write(30, 2, {"ACC_all": 0.9})
    assert metrics.path.read_text() == (
        "step,epoch,train_loss,val_loss,ACC_all\n10,1,0.5,,\n20,2,0.25,0.375,\n30,2,,,0.9\n"
    )
    assert read_metrics(metrics.path) == [
        {"step": 10, "epoch": 1, "train_loss": 0.5},
        {"step": 20, "epoch": 2, "train_loss": 0.25, "val_loss": 0.375},
        {"step": 30, "epoch": 2, "ACC_all": 0.9},
    ]
    assert series(read_metrics(metrics.path), "train_loss") == ([10, 20], [0.5, 0.25])


@given(value=st.floats())
def test_values_keep_full_precision(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    metrics = MetricsLog(tmp_path_factory.mktemp("run"), append=False)
    metrics.write(1, 1, {"x": value})
    (row,) = read_metrics(metrics.path)
    assert row["x"] == value or (math.isnan(row["x"]) and math.isnan(value))


def test_resume_drops_rows_after_the_checkpoint(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, append=False)
    for step in (10, 20, 30):
        metrics.write(step, 1, {"train_loss": 1 / step, "lr": 0.1})
    resumed = MetricsLog(tmp_path, append=True)
    resumed.truncate_after(20)
    resumed.write(30, 1, {"train_loss": 7.0, "lr": 0.1})
    steps, values = series(read_metrics(resumed.path), "train_loss")
    assert steps == [10, 20, 30]
    assert values[-1] == 7.0
    assert resumed.path.read_text().count("step") == 1


def test_without_append_the_file_is_replaced(tmp_path: Path) -> None:
    MetricsLog(tmp_path, append=False).write(1, 1, {"a": 1.0})
    assert MetricsLog(tmp_path, append=False).path.read_text() == "step,epoch\n"


@pytest.mark.parametrize("content", ["", "step,ep"])
def test_append_to_a_file_with_an_incomplete_header(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    metrics = MetricsLog(tmp_path, append=True)
    metrics.write(1, 1, {"a": 1.0})
    assert read_metrics(metrics.path) == [{"step": 1, "epoch": 1, "a": 1.0}]


def test_incomplete_last_row_is_ignored_and_removed_on_append(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, append=False)
    metrics.write(1, 1, {"a": 0.125})
    with metrics.path.open("a") as file:
        file.write("2,1,0.1")
    assert [row["step"] for row in read_metrics(metrics.path)] == [1]
    MetricsLog(tmp_path, append=True).write(2, 1, {"a": 0.5})
    assert series(read_metrics(metrics.path), "a") == ([1, 2], [0.125, 0.5])


def test_failed_rewrite_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsLog(tmp_path, append=False)
    metrics.write(1, 1, {"a": 1.0})
    before = metrics.path.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        metrics.write(2, 1, {"b": 1.0})
    assert metrics.path.read_text() == before
    assert list(tmp_path.iterdir()) == [metrics.path]


def test_a_row_before_the_first_step_is_epoch_0(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, append=False)
    metrics.write(0, 0, {"val_loss": 1.0})
    assert before_training(read_metrics(metrics.path)) == {"step": 0, "epoch": 0, "val_loss": 1.0}
    metrics.write(1, 1, {"train_loss": 0.5})
    MetricsLog(tmp_path, append=True).truncate_after(1)
    assert [(row["step"], row["epoch"]) for row in read_metrics(metrics.path)] == [(0, 0), (1, 1)]
    assert before_training([{"step": 1, "epoch": 1}]) == {}


def test_old_files_with_epochs_from_0(tmp_path: Path) -> None:
    """A resumed run rewrites them with epochs from 1."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train_loss\n1,0,0.5\n2,0,0.4\n3,1,0.3\n4,1,0.2\n")
    assert [row["epoch"] for row in read_metrics(path)] == [1, 1, 2, 2]
    resumed = MetricsLog(tmp_path, append=True)
    resumed.truncate_after(3)
    resumed.write(4, 2, {"train_loss": 0.1})
    resumed.write(5, 3, {"train_loss": 0.05})
    assert path.read_text() == "step,epoch,train_loss\n1,1,0.5\n2,1,0.4\n3,2,0.3\n4,2,0.1\n5,3,0.05\n"
