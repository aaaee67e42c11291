"""``mae jobs``: tables, JSON, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.platform_contract import RunCode

from openmae.cli.main import main

Mae = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mae(capsys: pytest.CaptureFixture[str]) -> Mae:
    """Return a function that runs ``mae jobs ...`` and returns the exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["jobs", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def done(mae: Mae, run_code: RunCode, images: Path, tmp_path: Path) -> dict[str, Any]:
    """Run a job that writes a checkpoint; return its JSON."""
    folder = tmp_path / "out" / "train"
    run_code(
        f"import pathlib\nf = pathlib.Path({str(folder)!r}); f.mkdir(parents=True)\n"
        "(f / 'model_best.pth').write_text('x')\nprint('ran')"
    )
    code, out, err = mae(
        *(
            "submit",
            "train",
            "--automl",
            "off",
            f"dataset.train_data_sources={images / 'train'}",
            "num_epochs=3",
            "--wait",
            "--json",
        ),
        *("--name", "mine", f"results_dir={tmp_path / 'out'}"),
    )
    assert code == 0, err
    return json.loads(out)


def test_a_job_from_the_shell(mae: Mae, done: dict[str, Any]) -> None:
    assert (done["status"], done["name"], done["exit_code"]) == ("COMPLETE", "mine", 0)
    code, out, _ = mae("list", "--json")
    assert (code, [job["id"] for job in json.loads(out)]) == (0, [done["id"]])
    code, out, _ = mae("list")
    assert "COMPLETE" in out
    assert done["id"][:8] in out
    assert mae("list", "--status", "error", "--json")[1] == "[]\n"
    code, out, _ = mae("status", done["id"][:6])
    assert code == 0
    assert done["id"] in out
    assert "PENDING" in out, "the transitions are not shown"
    assert json.loads(mae("status", done["id"], "--json")[1])["failure"] is None
    assert mae("logs", done["id"])[1] == "ran\n"
    assert mae("logs", "--follow", done["id"])[1] == "ran\n"
    assert json.loads(mae("logs", "--json", done["id"])[1]) == {"log": "ran\n"}
    assert json.loads(mae("cancel", done["id"], "--json")[1])["status"] == "COMPLETE"


def test_explain_shows_the_origin_of_every_value(mae: Mae, done: dict[str, Any]) -> None:
    code, out, _ = mae("explain", done["id"])
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "shorthand num_epochs in spec_overrides" in rows["train.num_epochs"]
    assert "ptm_if_no_resume_model" in rows["train.pretrained_model_path"]
    told = json.loads(mae("explain", done["id"], "--json")[1])
    assert {"key", "value", "function", "why"} == set(told[0])


def test_results_are_listed(mae: Mae, done: dict[str, Any]) -> None:
    code, out, _ = mae("results", done["id"])
    assert code == 0
    assert "model_best.pth" in out
    assert "checkpoint" in out
    (item,) = json.loads(mae("results", done["id"], "--json")[1])
    assert (item["kind"], item["size"]) == ("checkpoint", 1)


def test_a_child_is_submitted_with_its_parent(mae: Mae, done: dict[str, Any], run_code: RunCode, images: Path) -> None:
    run_code("pass")
    code, out, err = mae(
        *("submit", "evaluate", "--parent", done["id"][:8], f"dataset.val_data_sources={images / 'val'}"),
        *("--wait", "--json"),
    )
    assert code == 0, err
    assert json.loads(out)["parent_job_id"] == done["id"]


def test_a_failed_job_is_exit_code_1_with_the_reason(mae: Mae, run_code: RunCode, images: Path) -> None:
    run_code("print('MemoryError: no'); raise SystemExit(1)")
    code, out, err = mae(
        "submit", "train", "--automl", "off", f"dataset.train_data_sources={images / 'train'}", "--wait", "--json"
    )
    job = json.loads(out)
    assert (code, job["status"]) == (1, "ERROR")
    assert f"Job {job['id']} failed: MemoryError: no\n  Fix: Lower dataset.batch_size" in err
    code, out, _ = mae("status", job["id"])
    assert code == 0
    assert "out of memory" in out
    assert json.loads(mae("status", job["id"], "--json")[1])["failure"]["category"] == "out of memory"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("status", "abc"), "There is no job 'abc' in"),
        (("submit", "train"), "dataset.train_data_sources: `mae train` needs it"),
        (("submit", "train", "--env", "NO_SUCH=secret"), "--env: NO_SUCH is not the name of a variable that is set."),
        (("submit", "train", "=3"), "an override is written key=value"),
        (("submit", "train", "-e", "/no/spec.yaml"), "There is no spec file /no/spec.yaml."),
        (("submit", "dance"), "invalid choice: 'dance'"),
        (("list", "--status", "done"), "status: there is no state 'DONE'."),
        (("logs", "abc", "-n", "x"), "invalid int value"),
        ((), "required"),
    ],
)
def test_an_invalid_request_is_exit_code_2(mae: Mae, arguments: tuple[str, ...], text: str) -> None:
    code, out, err = mae(*arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert "secret" not in err.replace("--env NO_SUCH=secret", "")


def test_a_spec_file_and_a_variable_by_name(
    mae: Mae, run_code: RunCode, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spec.yaml").write_text(f"dataset: {{train_data_sources: {images / 'train'}}}\n", encoding="utf-8")
    monkeypatch.setenv("TOKEN", "t0k")
    run_code("import os; print(os.environ['TOKEN'])")
    code, out, err = mae(
        "submit", "train", "--automl", "off", "-e", str(tmp_path / "spec.yaml"), "--env", "TOKEN", "--wait", "--json"
    )
    assert code == 0, err
    told = {row["key"]: row for row in json.loads(mae("explain", json.loads(out)["id"], "--json")[1])}
    assert told["dataset.train_data_sources"]["why"] == "given in specs"


@pytest.mark.integration
def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m openmae jobs list --root {tmp_path} | true",
        shell=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
