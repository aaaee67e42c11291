"""``Client``: invalid requests, notices, results, and chains of real actions."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.platform_contract import SLEEP, RunCode, Submit, until

from openmae.errors import CheckpointError, DataError, RunError, SpecError
from openmae.jobs import Client, Job
from openmae.jobs.prepare import JobRequest, prepare
from openmae.storage import layout

pytestmark = pytest.mark.integration

SMALL = {
    **{"arch": "vit_tiny_patch16", "image_size": 32, "batch_size": 4, "num_epochs": 1, "stage": "finetune"},
    **{"dataset.num_workers_per_gpu": 0, "wandb.enable": False, "dataset.augmentation.auto_aug": ""},
}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"action": "dance"}, "action: there is no action 'dance'.\n  Fix: Use one of: train, evaluate"),
        ({"automl_policy": "maybe"}, "automl_policy: must be auto, on or off, got 'maybe'."),
        ({"gpu_count": -1}, "gpu_count: must be an integer >= 0, got -1."),
        ({"gpu_count": True}, "gpu_count: must be an integer >= 0, got True."),
        ({"num_nodes": 0}, "num_nodes: must be an integer >= 1, got 0."),
        ({"num_nodes": 2, "automl_policy": "off"}, "num_nodes: local is one machine, got 2."),
        ({"num_nodes": 2, "automl_policy": "on"}, "num_nodes: local is one machine, got 2."),
        ({"env_vars": {"A=B": "x"}}, "env_vars: 'A=B' must be the name of an environment variable"),
        (
            {"env_vars": {"A": 3}},
            "env_vars: 'A' must be the name of an environment variable, with a string as its value.",
        ),
        ({"specs": "spec.yaml"}, "specs: must be a mapping, got str."),
        ({"spec_overrides": ["a=b"]}, "spec_overrides: must be a mapping, got list."),
        ({"parent_job_id": "0123"}, "There is no job '0123' in"),
        (
            {"specs": {"train": {"num_epoch": 1}}},
            "train.num_epoch: there is no such key. Did you mean train.num_epochs",
        ),
        ({"action": "evaluate"}, "evaluate.checkpoint: `mae evaluate` needs it, but it is not set"),
        ({"action": "evaluate"}, "dataset.val_data_sources: `mae evaluate` needs it, but it is not set"),
        ({"action": "inference"}, "dataset.test_data_sources: `mae inference` needs it, but it is not set"),
        (
            {"action": "export", "specs": {"export": {"gpu_id": 1, "checkpoint": "c"}}},
            "export.gpu_id: a platform numbers the GPUs",
        ),
    ],
)
def test_an_invalid_request_starts_nothing(client: Client, images: Path, arguments: dict[str, Any], text: str) -> None:
    full = {"action": "train", "spec_overrides": {"dataset.train_data_sources": str(images / "train")}, **arguments}
    if full["action"] != "train":
        full["spec_overrides"] = {}
    with pytest.raises(SpecError) as caught:
        client.create_job(**full)
    assert text in str(caught.value)
    assert list(client.store.root.iterdir()) == []


@pytest.mark.parametrize(
    ("action", "section", "counts", "expected", "notice"),
    [
        (
            "train",
            {"num_gpus": 1, "num_nodes": 1, "gpu_ids": [0]},
            (2, 2),
            {"num_gpus": 2, "num_nodes": 2, "gpu_ids": [0, 1]},
            "train.num_gpus=1, train.gpu_ids=[0], train.num_nodes=1",
        ),
        ("train", {"gpu_ids": [2, 3]}, (1, None), {"num_gpus": 1, "gpu_ids": [0]}, "train.gpu_ids=[2, 3]"),
        ("train", {"num_gpus": 2}, (2, None), {"num_gpus": 2}, ""),
        ("train", {"num_gpus": 4}, (0, None), {"num_gpus": 4}, ""),
        ("inference", {"num_gpus": 4}, (2, 1), {"num_gpus": 2, "num_nodes": 1}, "inference.num_gpus=4"),
        ("export", {"gpu_id": 3}, (1, None), {"gpu_id": 0}, "export.gpu_id=3"),
    ],
)
def test_the_counts_of_a_job_replace_those_of_a_template(
    images: Path, action: str, section: dict[str, Any], counts: tuple[Any, Any], expected: Any, notice: str
) -> None:
    specs = {
        "dataset": {f"{name}_data_sources": str(images / "train") for name in ("train", "val", "test")},
        action: section | ({} if action == "train" else {"checkpoint": "model.pth"}),
    }
    if action == "export":
        del specs["dataset"]
    gpus, nodes = counts
    policy = "off" if action == "train" else None
    request = JobRequest(action, "slurm", specs, automl_policy=policy, gpu_count=gpus, num_nodes=nodes)
    record = prepare(request, None, "1", Path("/jobs/1")).record
    found = record.spec[action]
    assert {key: found[key] for key in expected} == expected
    told = [item for item in record.notices if item.startswith("gpu_count and num_nodes")]
    assert told == ([f"gpu_count and num_nodes of the job replace {notice} in the spec."] if notice else [])


def test_data_sources_are_checked_before_anything_starts(client: Client) -> None:
    with pytest.raises(SpecError, match=r"dataset\.train_data_sources: `mae train` needs it, but it is not set"):
        client.create_job("train")
    with pytest.raises(DataError, match=r"dataset.train_data_sources: there is nothing at '/no/images_train.tar.gz'"):
        client.create_job("train", spec_overrides={"dataset.train_data_sources": "/no/images_train.tar.gz"})
    both = {"dataset.train_data_sources": "/no/train", "dataset.val_data_sources": "/no/val"}
    with pytest.raises(
        DataError, match=r"nothing at '/no/train'\.\ndataset.val_data_sources: there is nothing at '/no/val'"
    ):
        client.create_job("train", spec_overrides=both)
    assert client.list_jobs() == []


def test_the_platform_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"platform: there is no 'moon'\.\n  Fix: Use one of: local, slurm"):
        Client("moon", tmp_path)


def test_a_training_job_is_a_search_unless_automl_is_off(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code("pass")
    searching, training = submit(automl_policy=None, specs={"automl": {"max_recommendations": 3}}), submit()
    assert searching.results_folder == f"{searching.results_dir}/automl"
    assert training.results_folder == f"{training.results_dir}/train"
    assert searching.action == training.action == "train"
    commands = [client.store.read(job.id).command for job in (searching, training)]
    assert [command[-2:] == ["--platform", "local"] for command in commands] == [True, False], commands
    with pytest.raises(SpecError, match=r"automl.max_recommendations.*got 0"):
        submit(automl_policy="auto", specs={"automl": {"max_recommendations": 0}})


def test_a_trial_of_a_search_can_be_a_parent(
    client: Client, submit: Submit, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is in the folder of the search. A pruned trial is refused with the reason."""
    monkeypatch.setattr(
        "openmae.jobs.prepare.command_of", lambda action, spec: [sys.executable, "-c", "pass", action, "-e", str(spec)]
    )
    search = submit(automl_policy="auto")
    trainings = Client("local", Path(search.results_folder) / "jobs" / "this-machine")
    overrides = {"dataset.train_data_sources": str(images / "train"), "model.arch": "vit_tiny_patch16"}
    kept, pruned = (
        trainings.create_job(
            "train",
            spec_overrides={**overrides, "train.results_dir": f"{search.results_folder}/trials/{number}"},
            automl_policy="off",
        )
        for number in range(2)
    )
    for job, name in ((kept, "model_best.pth"), (pruned, layout.CHECKPOINTS_DELETED)):
        Path(job.results_folder).mkdir(parents=True)
        Path(job.results_folder, name).write_text("Trial 1 of the search was pruned after epoch 3 of 9.\n")
    export = {"export.onnx_file": str(client.store.root / "m.onnx")}
    child = client.create_job("export", spec_overrides=export, parent_job_id=kept.id[:13])
    assert child.parent_job_id == kept.id
    explained = {item["key"]: item["value"] for item in client.explain_job(child.id)}
    assert explained["export.checkpoint"] == f"{kept.results_folder}/model_best.pth"
    with pytest.raises(CheckpointError) as caught:
        client.create_job("export", spec_overrides=export, parent_job_id=pruned.id)
    assert "has no checkpoint. Trial 1 of the search was pruned after epoch 3 of 9." in str(caught.value)
    assert "Use the search itself as the parent" in str(caught.value)
    assert "Wait for the parent" not in str(caught.value)
    with pytest.raises(SpecError, match="There is no job 'abcdef'"):
        client.create_job("export", spec_overrides=export, parent_job_id="abcdef")
    for owner, job in ((client, search), (trainings, kept), (trainings, pruned), (client, child)):
        owner.wait(job.id, 20)


@pytest.mark.parametrize(
    ("automl", "words"),
    [
        ({}, "It has 20 trials of 10 epochs (bayesian, 1 at a time) and takes about 20 times as long"),
        (
            {"max_recommendations": 9, "max_concurrent": 2, "max_epochs": 5},
            "It has 9 trials of 5 epochs (bayesian, 2 at a time) and takes about 5 times as long as",
        ),
        ({"algorithm": "ASHA"}, "20 trials of 10 epochs (asha, 1 at a time) and takes at most 20 times as long"),
        ({"algorithm": "grid"}, "It has up to 20 trials of 10 epochs (grid, 1 at a time) and takes at most"),
    ],
)
def test_a_search_is_described_before_it_starts(
    client: Client, submit: Submit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, automl, words
) -> None:
    def refuse(job_id: str, environment: Any) -> None:
        assert words in caplog.text, "it is reported after the start"
        raise RunError("no platform")

    monkeypatch.setattr(client._platform("local"), "submit", refuse)
    with caplog.at_level(logging.WARNING, "openmae"), pytest.raises(RunError, match="no platform"):
        submit(automl_policy=None, specs={"automl": automl})
    assert words in caplog.text
    assert 'submit with --automl off (mae jobs submit) or automl_policy="off" (Python).' in caplog.text


def test_arguments_without_effect_are_reported(
    client: Client, submit: Submit, run_code: RunCode, caplog: pytest.LogCaptureFixture
) -> None:
    run_code("pass")
    with caplog.at_level(logging.WARNING, "openmae"):
        job = submit(image="nvcr.io/x", automl_policy="on")
    assert "image nvcr.io/x has no effect" in caplog.text
    assert (
        "It becomes a hyperparameter search: automl_policy is on. It has 20 trials of 10 epochs (bayesian, "
        in caplog.text
    )
    assert len(job.notices) == 2
    assert submit(automl_policy="off").notices == ()
    for one in client.list_jobs():
        client.wait(one.id, 20)


def test_jobs_are_listed_oldest_first_and_filtered(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code("pass")
    good = client.wait(submit().id, 20)
    run_code("raise SystemExit(1)")
    bad = client.wait(submit().id, 20)
    assert [job.id for job in client.list_jobs()] == [good.id, bad.id]
    assert client.list_jobs(status="ERROR") == [bad]
    assert client.list_jobs(action="export") == []
    with pytest.raises(SpecError, match=r"status: there is no state 'DONE'\.\n  Fix: Use one of: PENDING, RUNNING"):
        client.list_jobs(status="DONE")
    assert Client("local", client.store.root).get_job_status(bad.id[:8]) == bad, (
        "another client sees the job differently"
    )


def test_waiting_has_a_limit(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(SLEEP)
    job = submit()
    with pytest.raises(RunError, match=r"is still (PENDING|RUNNING) after 0\.2 s"):
        client.wait(job.id, 0.2)
    with pytest.raises(SpecError, match="tail: must be 0 or more lines, got -1"):
        client.get_job_logs(job.id, tail=-1)
    client.cancel_job(job.id)
    client.wait(job.id, 20)


def _writer(folder: Path, *names: str) -> str:
    return (
        f"import pathlib\nfolder = pathlib.Path({str(folder)!r})\nfolder.mkdir(parents=True, exist_ok=True)\n"
        f"for name in {names!r}: (folder / name).write_text('x')"
    )


def test_a_results_folder_of_the_job_is_deleted_completely(
    client: Client, submit: Submit, run_code: RunCode, tmp_path: Path
) -> None:
    run_code(
        "import sys, yaml, pathlib, os\nfolder = pathlib.Path('.').resolve()\n"
        f"for base in pathlib.Path({str(client.store.root)!r}).glob('*/spec.yaml'):\n"
        "    out = pathlib.Path(yaml.safe_load(base.read_text())['results_dir'], 'train'); out.mkdir(parents=True)\n"
        "    for name in ('model_best.pth', 'notes.txt'): (out / name).write_text('x')\n"
        "    (out / '.openmae.lock').touch()"
    )
    job = client.wait(submit().id, 20)
    assert [item.name for item in client.list_results(job.id)] == ["model_best.pth", "notes.txt"]
    assert [item.name for item in client.delete_job_artifacts(job.id)] == ["model_best.pth", "notes.txt"]
    assert client.list_results(job.id) == []
    assert not Path(job.results_dir).exists()
    assert client.get_job_status(job.id) == job, "the record was deleted too"


def test_other_files_in_a_named_results_folder_are_kept(
    client: Client, submit: Submit, run_code: RunCode, tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "train"
    run_code(_writer(folder, "model_best.pth", "notes.txt"))
    job = client.wait(submit(spec_overrides={"results_dir": str(tmp_path / "out")}).id, 20)
    assert [item.name for item in client.delete_job_artifacts(job.id)] == ["model_best.pth"]
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_artifacts_in_use_are_not_deleted(client: Client, submit: Submit, run_code: RunCode, tmp_path: Path) -> None:
    run_code(_writer(tmp_path / "out" / "train", "model_best.pth"))
    parent = client.wait(submit(spec_overrides={"results_dir": str(tmp_path / "out")}).id, 20)
    run_code(SLEEP)
    child = submit(parent_job_id=parent.id)
    with pytest.raises(SpecError, match=rf"The artifacts of {parent.id} are in use: job {child.id} \(train\) is"):
        client.delete_job_artifacts(parent.id)
    with pytest.raises(SpecError, match=r"are in use.*\n  Fix: Wait until it has ended, or cancel it\."):
        client.delete_job_artifacts(child.id)
    client.cancel_job(child.id)
    client.wait(child.id, 20)
    assert client.delete_job_artifacts(parent.id)


def test_a_relative_results_folder_is_that_of_the_client(
    client: Client, submit: Submit, run_code: RunCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_code("import os; print(os.getcwd())")
    job = client.wait(submit(spec_overrides={"results_dir": "here"}).id, 20)
    assert job.results_dir == str(tmp_path / "here")
    assert client.get_job_logs(job.id) == f"{tmp_path}\n"


def test_passwords_in_addresses_are_not_stored(
    client: Client, monkeypatch: pytest.MonkeyPatch, run_code: RunCode
) -> None:
    monkeypatch.setattr("openmae.storage.listing.require", lambda url: None)
    run_code("pass")
    job = client.create_job(
        "train", spec_overrides={"dataset.train_data_sources": "https://me:pa55@host/a.tar.gz?X-Amz-Signature=s1gn"}
    )
    client.wait(job.id, 20)
    text = (client.store.folder(job.id) / "job.json").read_text()
    assert "pa55" not in text
    assert "s1gn" not in text
    assert "https://host/a.tar.gz?..." in text


def test_a_key_that_the_job_would_not_find_is_refused(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for key, problem in (("env:NO_SUCH_KEY", "'NO_SUCH_KEY' is not set"), ("file:/no/key", "no file '/no/key'")):
        with pytest.raises(SpecError, match=f"encryption_key: .*{problem}"):
            submit(specs={"encryption_key": key})


def test_a_key_that_refers_to_a_variable_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_SECRET", "hush-hush")
    specs = {"dataset.train_data_sources": "/", "encryption_key": "${oc.env:MAE_SECRET}"}
    prepared = prepare(JobRequest("train", "local", specs), None, "1", Path("/jobs/1"))
    assert prepared.environment["OPENMAE_ENCRYPTION_KEY"] == "hush-hush"
    assert "hush-hush" not in prepared.spec_text + str(prepared.record)


def test_listing_imports_no_torch(client: Client) -> None:
    code = (
        "import sys; from openmae.cli.main import main; main(['jobs', 'list', '--root', sys.argv[1]]); "
        "print(sorted({'torch', 'lightning_fabric', 's3fs', 'fsspec'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(client.store.root)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow  # five processes, one after another, that import torch
def test_a_chain_by_parent_job_id_only(client: Client, images: Path) -> None:
    def run(action: str, overrides: dict[str, Any], parent: str | None = None) -> Job:
        policy = "off" if action == "train" else None
        job = client.create_job(action, None, overrides, parent_job_id=parent, automl_policy=policy)
        done = client.wait(job.id, 240)
        assert done.status == "COMPLETE", client.get_job_logs(job.id)
        return done

    def explained(job: Job) -> dict[str, dict[str, Any]]:
        return {row["key"]: row for row in client.explain_job(job.id)}

    train = run("train", {**SMALL, "dataset.train_data_sources": str(images / "train")})
    kinds = {item.kind for item in client.list_results(train.id)}
    assert kinds >= {"checkpoint", "weights", "status", "spec", "metrics", "report", "events"}
    small = {"batch_size": 4, "dataset.num_workers_per_gpu": 0}
    val, test = ({**small, f"dataset.{name}_data_sources": str(images / "val")} for name in ("val", "test"))
    evaluate = run("evaluate", val, train.id)
    origins = explained(evaluate)
    assert origins["evaluate.checkpoint"]["function"] == "parent_model"
    assert Path(origins["evaluate.checkpoint"]["value"]).parent == Path(train.results_folder)
    assert (origins["model.num_classes"]["value"], origins["train.stage"]["value"]) == (3, "finetune")
    assert origins["dataset.val_data_sources"]["why"] == "given in spec_overrides"
    assert "ACC_all" in client.get_job_logs(evaluate.id)
    export = run("export", {}, train.id)
    engine = run("gen_trt_engine", {"gen_trt_engine.compute_capability": ["sm_89"]}, export.id)
    inference = run("inference", test, export.id)  # the engine needs the GPU that it was built for
    assert (Path(inference.results_folder) / "results.csv").is_file()
    on_engine = client.create_job("inference", None, test, parent_job_id=engine.id)
    values = {key: row["value"] for key, row in explained(on_engine).items()}
    assert values["inference.trt_engine"] == str(Path(engine.results_folder) / "model.engine")
    assert values["inference.checkpoint"] is None
    assert values["model.arch"] == "vit_tiny_patch16", "the architecture was not carried forward"
    assert client.wait(on_engine.id, 240).finished


@pytest.mark.slow  # a long training run that is stopped
def test_a_canceled_training_has_written_a_checkpoint(
    client: Client, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENMAE_JOB_GRACE", "60")
    overrides = {**SMALL, "num_epochs": 1000, "dataset.train_data_sources": str(images / "train")}
    overrides |= {"train.checkpoint_interval": 1000, "results_dir": str(client.store.root.parent / "out")}
    job = client.create_job("train", None, overrides, automl_policy="off")
    until(lambda: "Epoch 1 of" in client.get_job_logs(job.id), "the first epoch", 120)
    client.cancel_job(job.id)
    done = client.wait(job.id, 90)
    assert (done.status, done.exit_code) == ("CANCELED", 130), client.get_job_logs(job.id)
    again = client.create_job("train", None, {**overrides, "num_epochs": 1}, automl_policy="off")
    origins = {row["key"]: row for row in client.explain_job(again.id)}
    resumed = origins["train.resume_training_checkpoint_path"]
    assert (resumed["function"], "model_epoch_" in resumed["value"]) == ("resume_model", True)
    client.cancel_job(again.id)
    client.wait(again.id, 90)
