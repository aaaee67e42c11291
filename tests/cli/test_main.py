"""``mae``: parsing, suggestions, exit codes."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from openmae import __version__
from openmae.cli.main import main
from openmae.data import presence
from openmae.errors import Preempted, RunError
from openmae.results.status import read_status
from openmae.spec.actions import ACTIONS
from openmae.spec.load import load_spec
from openmae.spec.schema import ExperimentSpec


@pytest.fixture
def action(monkeypatch):
    """Replace one of openmae.actions by a fake; returns the specs that it receives."""
    received = []

    def install(name, run=received.append):
        module = ModuleType(f"openmae.actions.{name}")
        module.run = lambda spec, **flags: run(spec)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(presence, "check_sources", lambda *_: None)  # their data need not exist
        return received

    return install


@pytest.mark.integration
def test_a_wrong_path_is_reported_before_torch_is_imported(tmp_path):
    code = (
        "import sys; from openmae.cli.main import main;code = main(sys.argv[1:]); print('torch' in sys.modules, code)"
    )
    argv = ["train", f"dataset.train_data_sources={tmp_path / 'photo'}", f"results_dir={tmp_path / 'runs'}"]
    (tmp_path / "photos").mkdir()
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False 2"
    assert f"dataset.train_data_sources: There is no file or folder {tmp_path / 'photo'}." in done.stderr
    assert "Fix: Did you mean photos?" in done.stderr
    assert '"FAILURE"' in (tmp_path / "runs" / "train" / "status.json").read_text()


@pytest.mark.integration
def test_missing_shards_are_a_failure_once(tmp_path):
    argv = [f"dataset.train_data_sources={tmp_path}/a-{{00..03}}.tar", f"results_dir={tmp_path / 'runs'}"]
    assert main(["train", *argv]) == 2
    status = [line["status"] for line in read_status(tmp_path / "runs" / "train" / "status.json")]
    assert status == ["STARTED", "FAILURE"]


@pytest.mark.integration
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


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["trian"], "mae: there is no command 'trian'.\n  Fix: Did you mean `mae train`?\n"),
        (["xyz"], "mae: there is no command 'xyz'.\n  Fix: `mae --help` lists what it accepts.\n"),
        (["modles"], "mae: there is no command 'modles'.\n  Fix: Did you mean `mae models`?\n"),
        (["jobs", "lst"], "mae jobs: there is no command 'lst'.\n  Fix: Did you mean `mae jobs list`?\n"),
        (["jobs", "submit", "train", "--paltform", "ray"], "--paltform\n  Fix: Did you mean --platform?\n"),
        (["jobs", "submit", "train", "--platform", "slrum"], "'ray')\n  Fix: Did you mean 'slurm'?\n"),
        (["spec", "template", "exprot"], "'gen_trt_engine')\n  Fix: Did you mean 'export'?\n"),
        (["train", "-x"], "  Fix: Config options are written key=value; `mae spec keys` lists them.\n"),
        (
            ["cache", "list", "--all"],
            "unrecognized arguments: --all\n  Fix: `mae cache list --help` lists what it accepts.\n",
        ),
    ],
)
def test_a_misspelled_word_gets_a_suggestion(argv, text, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.endswith(text)


def test_help_fits_one_screen(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 90


@pytest.mark.parametrize("name", ACTIONS)
def test_help_of_an_action_has_an_example(name, capsys):
    """The example sets each key that the action needs."""
    assert main([name, "--help"]) == 0
    example = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"  mae {name} "))
    overrides = example.split()[2:]
    assert all(item.partition("=")[2] for item in overrides)
    load_spec(None, overrides, action=name)


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
    """Python itself would wait for threads that are not daemons, without limit."""
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


def test_a_bug_is_1_and_keeps_its_traceback(action, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    action("train", raiser(ZeroDivisionError("by zero")))
    assert main(["train", "dataset.train_data_sources=x"]) == 1
    text = capsys.readouterr().err
    (file,) = tmp_path.glob("mae-traceback-*.txt")
    assert text.startswith("mae train failed: ZeroDivisionError: by zero\n")
    assert str(file) in text
    assert "Traceback (most recent call last)" in file.read_text()


def shell(script: str) -> subprocess.CompletedProcess[str]:
    """Run ``mae`` in a shell; ``$MAE`` is the command."""
    mae = f"{sys.executable} -m openmae"
    return subprocess.run(["bash", "-c", script.replace("$MAE", mae)], capture_output=True, text=True)


@pytest.mark.integration
@pytest.mark.parametrize("command", ["spec keys", "jobs list --root {root}", "--help"])
def test_a_reader_that_goes_away_is_no_error(command, tmp_path):
    done = shell(f"set -o pipefail; $MAE {command.format(root=tmp_path)} | head -c1 >/dev/null")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.integration
@pytest.mark.parametrize("command", ["spec template train", "jobs list --root {root}"])
def test_a_closed_stdout_is_no_error(command, tmp_path):
    done = shell(f"$MAE {command.format(root=tmp_path)} >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.integration
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


@pytest.mark.parametrize(
    ("argv", "instead"),
    [
        (
            ["train", "-r", "out", "-k", "geheim", "-g", "2"],
            "results_dir=VALUE encryption_key=VALUE train.num_gpus=VALUE",
        ),
        (["train", "--gpus=2"], "train.num_gpus=2"),
        (["train", "--key=geheim"], "encryption_key=VALUE"),
        (["train", "--results_dir=out"], "results_dir=out"),
        (["train", "--train.num-epochs", "3"], "train.num_epochs=VALUE"),
        (["train", "--config-name", "spec"], "-e SPEC"),
        (["evaluate", "-g", "2"], "evaluate.num_gpus=VALUE"),
        (["export", "--gpus", "2"], "export.gpu_id=VALUE"),
        (["automl", "--lr", "3"], "train.optim.lr=VALUE"),
        (["jobs", "submit", "inference", "-k", "geheim"], "encryption_key=VALUE"),
    ],
)
def test_an_option_that_is_a_key_is_named_by_it(argv, instead, capsys):
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert f"Fix: Config options are written key=value, here {instead}" in text
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
    assert (
        f"train.num_epochs (override): {override!r}: deleting a key is not supported. Drop the key: remove it"
        in capsys.readouterr().err
    )


def test_a_spec_file_without_its_option_gets_a_hint(capsys):
    assert main(["train", "spec.yaml"]) == 2
    assert "A spec file is given as -e spec.yaml." in capsys.readouterr().err


def test_a_secret_after_a_plus_is_hidden(action, monkeypatch):
    action("train")
    argv = ["train", "dataset.train_data_sources=photos", "++encryption_key=geheim"]
    monkeypatch.setattr(sys, "argv", ["mae", *argv])
    assert main(argv) == 0
    assert sys.argv[-1] == "++encryption_key=***"
