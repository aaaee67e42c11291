import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmae.results.metrics import MetricsLog, read_metrics, series


def test_columns_grow_as_metrics_appear(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, append=False)
    metrics.write(10, 0, {"train_loss": 0.5})
    metrics.write(20, 1, {"train_loss": 0.25, "val_loss": 0.375})
    metrics.write(30, 1, {"ACC_all": 0.9})
    assert metrics.path.read_text() == (
        "step,epoch,train_loss,val_loss,ACC_all\n10,0,0.5,,\n20,1,0.25,0.375,\n30,1,,,0.9\n"
    )
    assert read_metrics(metrics.path) == [
        {"step": 10, "epoch": 0, "train_loss": 0.5},
        {"step": 20, "epoch": 1, "train_loss": 0.25, "val_loss": 0.375},
        {"step": 30, "epoch": 1, "ACC_all": 0.9},
    ]
    assert series(read_metrics(metrics.path), "train_loss") == ([10, 20], [0.5, 0.25])


@given(value=st.floats())
def test_values_come_back_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    metrics = MetricsLog(tmp_path_factory.mktemp("run"), append=False)
    metrics.write(1, 0, {"x": value})
    (row,) = read_metrics(metrics.path)
    assert row["x"] == value or (math.isnan(row["x"]) and math.isnan(value))


def test_resume_appends_after_dropping_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, append=False)
    for step in (10, 20, 30):
        metrics.write(step, 0, {"train_loss": 1 / step, "lr": 0.1})
    resumed = MetricsLog(tmp_path, append=True)
    resumed.truncate_after(20)
    resumed.write(30, 0, {"train_loss": 7.0, "lr": 0.1})
    steps, values = series(read_metrics(resumed.path), "train_loss")
    assert steps == [10, 20, 30]
    assert values[-1] == 7.0
    assert resumed.path.read_text().count("step") == 1


def test_without_append_the_file_starts_anew(tmp_path: Path) -> None:
    MetricsLog(tmp_path, append=False).write(1, 0, {"a": 1.0})
    assert MetricsLog(tmp_path, append=False).path.read_text() == "step,epoch\n"


@pytest.mark.parametrize("content", ["", "step,ep"])
def test_append_to_a_file_without_a_whole_header(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    metrics = MetricsLog(tmp_path, append=True)
    metrics.write(1, 0, {"a": 1.0})
    assert read_metrics(metrics.path) == [{"step": 1, "epoch": 0, "a": 1.0}]


def test_a_torn_last_row_is_left_out_and_cut_on_append(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, append=False)
    metrics.write(1, 0, {"a": 0.125})
    with metrics.path.open("a") as file:
        file.write("2,0,0.1")
    assert [row["step"] for row in read_metrics(metrics.path)] == [1]
    MetricsLog(tmp_path, append=True).write(2, 0, {"a": 0.5})
    assert series(read_metrics(metrics.path), "a") == ([1, 2], [0.125, 0.5])


def test_the_names_of_the_position_are_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a metric cannot be called 'step'"):
        MetricsLog(tmp_path, append=False).write(1, 0, {"step": 2.0})


def test_a_failed_rewrite_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsLog(tmp_path, append=False)
    metrics.write(1, 0, {"a": 1.0})
    before = metrics.path.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        metrics.write(2, 0, {"b": 1.0})
    assert metrics.path.read_text() == before
    assert list(tmp_path.iterdir()) == [metrics.path]
