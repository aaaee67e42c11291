import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from openmae import __version__
from openmae.cli.main import main
from openmae.errors import Preempted, RunError
from openmae.serving.settings import Settings
from openmae.spec.schema import ExperimentSpec


@pytest.fixture
def action(monkeypatch):
    """Put a stand-in for one of openmae.actions in place; returns the specs that it was given."""
    received = []

    def install(name, run=received.append):
        module = ModuleType(f"openmae.actions.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return received

    return install


def test_help_imports_nothing_heavy():
    code = (
        "import sys, json; from openmae.cli.main import main; code = main(['--help']);"
        "print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exit_code, modules = json.loads(done.stderr)
    assert exit_code == 0
    assert "quickstart" in done.stdout
    heavy = {
        "torch",
        "torchvision",
        "timm",
        "lightning_fabric",
        "numpy",
        "pydantic",
        "omegaconf",
        "yaml",
        "rich",
        "fastapi",
        "PIL",
    }
    assert not heavy & set(modules)


def test_checking_a_spec_imports_no_torch():
    code = (
        "import sys; from openmae.cli.main import main; assert main(['spec', 'keys']) == 0;"
        "main(['spec', 'check', 'dataset.train_data_sources=x']);"
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"openmae {__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["trian"],
        ["train", "--epochs", "3"],
        ["spec"],
        ["spec", "template", "nothing"],
        ["spec", "keys", "extra"],
        ["quickstart", "x=1"],
        ["serve"],
        ["serve", "-m", "model.pth", "--port", "eighty"],
        ["serve", "-m", "model.pth", "--device", "tpu"],
    ],
)
def test_a_wrong_command_is_2(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err


def test_options_in_the_wrong_form_get_a_hint(capsys):
    assert main(["train", "--num_epochs", "3"]) == 2
    assert "options of a spec are written key=value" in capsys.readouterr().err


def test_an_action_gets_the_spec(action, tmp_path):
    received = action("train")
    path = tmp_path / "spec.yaml"
    path.write_text("dataset: {train_data_sources: photos}\n")
    assert main(["train", "train.seed=1", "-e", str(path), "train.num_epochs=2", "train.seed=3"]) == 0
    (spec,) = received
    assert isinstance(spec, ExperimentSpec)
    assert (spec.train.num_epochs, spec.train.seed) == (2, 3)
    assert spec.dataset.train_data_sources == "photos"


def test_a_wrong_spec_is_2_and_runs_nothing(action, capsys):
    received = action("train")
    assert main(["train", "train.num_epochs=0"]) == 2
    text = capsys.readouterr().err
    assert "The spec has 2 mistakes:" in text
    assert "train.num_epochs (override): must be an integer >= 1, got 0." in text
    assert received == []


def raiser(error):
    def run(spec):
        raise error

    return run


def test_a_failed_run_is_1(action, capsys):
    action("train", raiser(RunError("The disk is full.", "Free some space.")))
    assert main(["train", "dataset.train_data_sources=x"]) == 1
    assert capsys.readouterr().err == "The disk is full.\n  Fix: Free some space.\n"


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Preempted(), 75)])
def test_an_interrupted_program_waits_for_no_thread(stop, code, action, monkeypatch, capsys):
    """Python's own end would: of a thread that is no daemon, for ever."""
    action("train", raiser(stop))
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr("sys.argv", ["mae", "train", "dataset.train_data_sources=x"])
    handler = signal.getsignal(signal.SIGINT)
    try:
        main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert codes == [code]
    assert capsys.readouterr().err


def test_an_interrupted_run_is_130(action, capsys):
    action("train", raiser(KeyboardInterrupt()))
    assert main(["train", "dataset.train_data_sources=x"]) == 130
    assert "Interrupted." in capsys.readouterr().err


def test_a_fault_of_ours_is_1_and_keeps_its_traceback(action, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    action("train", raiser(ZeroDivisionError("by zero")))
    assert main(["train", "dataset.train_data_sources=x"]) == 1
    text = capsys.readouterr().err
    (file,) = tmp_path.glob("mae-traceback-*.txt")
    assert text.startswith("mae train failed: ZeroDivisionError: by zero\n")
    assert str(file) in text
    assert "Traceback (most recent call last)" in file.read_text()


def test_spec_check_prints_the_resolved_spec(capsys):
    assert main(["spec", "check", "dataset.train_data_sources=x", "dataset.augmentation.max_scale=2"]) == 0
    out, err = capsys.readouterr()
    resolved = yaml.safe_load(out)
    assert resolved["model"]["mask_ratio"] == 0.6
    assert resolved["dataset"]["augmentation"]["max_scale"] == 1
    assert err.startswith("Notice: dataset.augmentation.max_scale 2 is used as 1")


def test_spec_check_for_an_action(capsys):
    assert main(["spec", "check", "--action", "evaluate"]) == 2
    assert "evaluate.checkpoint: `mae evaluate` needs it" in capsys.readouterr().err


def test_spec_check_of_a_missing_file(capsys, tmp_path):
    assert main(["spec", "check", "-e", str(tmp_path / "nope.yaml")]) == 2
    assert "There is no spec file" in capsys.readouterr().err


def test_spec_template_can_be_used(capsys, tmp_path):
    assert main(["spec", "template", "train"]) == 0
    path = tmp_path / "spec.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["spec", "check", "-e", str(path)]) == 2
    assert main(["spec", "check", "-e", str(path), "dataset.train_data_sources=photos"]) == 0


def test_spec_keys_is_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["spec", "keys", "--action", "evaluate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "type", "default", "bounds", "help"]
    assert max(map(len, lines)) <= 140
    assert any(line.startswith("evaluate.checkpoint ") for line in lines)
    assert not any(line.startswith("inference.") for line in lines)


def shell(script: str) -> subprocess.CompletedProcess[str]:
    """Run ``mae`` in a shell; ``$MAE`` is the command."""
    mae = f"{sys.executable} -m openmae"
    return subprocess.run(["bash", "-c", script.replace("$MAE", mae)], capture_output=True, text=True)


@pytest.mark.parametrize("command", ["spec keys", "jobs list --root {root}", "--help"])
def test_a_reader_that_goes_away_is_no_fault(command, tmp_path):
    done = shell(f"set -o pipefail; $MAE {command.format(root=tmp_path)} | head -c1 >/dev/null")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["spec template train", "jobs list --root {root}"])
def test_a_closed_stdout_is_no_fault(command, tmp_path):
    done = shell(f"$MAE {command.format(root=tmp_path)} >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_does_not_fit_on_the_disk_is_an_error():
    done = shell("$MAE spec template train > /dev/full")
    assert done.returncode == 1
    assert done.stderr == (
        "stdout cannot be written (No space left on device).\n"
        "  Fix: Free space on the disk, or redirect the output to another one.\n"
    )


def test_quickstart_gets_its_arguments(monkeypatch, tmp_path):
    calls = []
    module = ModuleType("openmae.quickstart")
    module.run = lambda results_dir, seed: calls.append((results_dir, seed))
    monkeypatch.setitem(sys.modules, "openmae.quickstart", module)
    assert main(["quickstart", "--results_dir", str(tmp_path), "--seed", "4"]) == 0
    assert calls == [(tmp_path, 4)]


def test_serve_gets_its_arguments(monkeypatch):
    calls = []
    module = ModuleType("openmae.serving.server")
    module.serve = lambda *arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "openmae.serving.server", module)
    assert main(["serve", "-m", "model.onnx"]) == 0
    limits = ("--max-batch", "2", "--max-request-mb", "0.5", "--max-pixels", "1000")
    more = ("--device", "cpu", "--encryption-key", "env:NAME")
    assert main(["serve", "--model", "m.pth", "--host", "::", "--port", "0", *more, *limits]) == 0
    assert calls == [
        (Path("model.onnx"), "127.0.0.1", 8000, Settings(), "auto", ""),
        (Path("m.pth"), "::", 0, Settings(max_batch=2, max_request_mb=0.5, max_pixels=1000), "cpu", "env:NAME"),
    ]


def test_wrong_limits_of_serve(capsys):
    assert main(["serve", "-m", "model.pth", "--max-batch", "0"]) == 2
    assert capsys.readouterr().err == "--max-batch must be 1 or more, got 0.\n  Fix: Leave it out for 8.\n"


@pytest.mark.parametrize(
    ("argv", "instead"),
    [
        (["train", "-r", "out", "-k", "geheim", "-g", "2"], "results_dir=VALUE encryption_key=VALUE train.num_gpus=V"),
        (["train", "--gpus=2"], "here train.num_gpus=2)"),
        (["train", "--key=geheim"], "here encryption_key=VALUE)"),
        (["train", "--results_dir=out"], "here results_dir=out)"),
        (["train", "--train.num-epochs", "3"], "here train.num_epochs=VALUE)"),
        (["train", "--config-name", "spec"], "here -e SPEC)"),
        (["evaluate", "-g", "2"], "here evaluate.num_gpus=VALUE)"),
        (["export", "--gpus", "2"], "here export.gpu_id=VALUE)"),
        (["automl", "--lr", "3"], "here train.optim.lr=VALUE)"),
        (["jobs", "submit", "inference", "-k", "geheim"], "here encryption_key=VALUE)"),
    ],
)
def test_an_option_that_is_a_key_is_named_by_it(argv, instead, capsys):
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert f"options of a spec are written key=value, {instead.removeprefix('here ')}" in text.replace("here ", "")
    assert "geheim" not in text


@pytest.mark.parametrize("option", ["-e", "--experiment_spec_file", "--experiment_spec"])
@pytest.mark.parametrize("override", ["train.num_epochs=2", "+train.num_epochs=2", "++train.num_epochs=2"])
def test_the_ways_in_which_tao_names_a_spec_and_overrides(option, override, action, tmp_path):
    received = action("train")
    path = tmp_path / "spec.yaml"
    path.write_text("dataset: {train_data_sources: photos}\ntrain: {num_epochs: 1}\n")
    assert main(["train", option, str(path), override]) == 0
    assert received[0].train.num_epochs == 2


@pytest.mark.parametrize("override", ["~train.num_epochs", "~train.num_epochs=3"])
def test_deleting_a_key_says_to_drop_it(override, capsys):
    assert main(["train", "dataset.train_data_sources=photos", override]) == 2
    assert f"train.num_epochs: {override!r} deletes a key in Hydra. Drop the key instead" in capsys.readouterr().err


def test_a_spec_file_without_its_option_gets_a_hint(capsys):
    assert main(["train", "spec.yaml"]) == 2
    assert "A spec file is given as -e spec.yaml." in capsys.readouterr().err


def test_a_secret_after_a_plus_is_hidden(action, monkeypatch):
    action("train")
    argv = ["train", "dataset.train_data_sources=photos", "++encryption_key=geheim"]
    monkeypatch.setattr(sys, "argv", ["mae", *argv])
    assert main(argv) == 0
    assert sys.argv[-1] == "++encryption_key=***"
