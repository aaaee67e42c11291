"""What turns AutoML off for a run, what does not, and where a request then goes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openmae.errors import SpecError
from openmae.jobs.policy import NOT_RUNNABLE, SKILL, Route, resolve_policy, route

OFF = (
    "turn off AutoML",
    "AutoML? No.",
    "AutoML? No thanks.",
    "no automatic hyperparameter search",
    "Please turn AutoML off for this run.",
    "disable AutoML",
    "Disable automl and train a vit_tiny for 3 epochs",
    "no HPO",
    "no hpo, 10 epochs please",
    "plain training",
    "Just plain training, batch size 64",
    "Pretrain on photos with plain training",
    "train without AutoML",
    "train without any hyperparameter search",
    "skip AutoML",
    "skip the HPO this time",
    "don't use AutoML",
    "do not use AutoML here",
    "I don't want AutoML",
    "Don't run the hyper-parameter optimization",
    "no auto-ml",
    "AutoML off",
    "automl: off",
    "automl_policy=off, lr 1e-4",
    "set automl_policy to off",
    "AutoML should be disabled",
    "AutoML is not needed",
    "AutoML isn't wanted here",
    "there is no need for AutoML",
    "switch off hpo, thanks",
    "can you turn off AutoML?",
    "could you please disable HPO?",
    "never use AutoML",
    "an AutoML-free run",
    "a non-AutoML training",
    "train directly",
    "vanilla fine-tuning, 20 epochs",
    "opt out of AutoML",
    "leave out AutoML",
    "use AutoML... no wait, turn it off",
    "No AutoML, no mixup, no cutmix",
    "turn off mixup and AutoML",
    "without labels or AutoML",
    "neither wandb nor AutoML",
    "AutoML is off the table",
    "Use a fixed lr instead of AutoML",
    "If possible turn off AutoML",
    "no tuning please",
    "hpo=off",
    "--no-automl",
    "Train on /data/x with AutoML turned off, lr 1e-3",
    "let's not use AutoML",
    "Don't bother me with questions. Disable AutoML.",
)
STAYS = (
    "",
    "pretrain on photos",
    "tune the lr",
    "don't tune the lr",
    "no augmentation",
    "turn off mixup",
    "turn off mixup and use AutoML",
    "train without labels",
    "no labels, so pretrain",
    "disable wandb",
    "no fine-tuning, only pretraining",
    "skip fine tuning",
    "without finetuning",
    "AutoML off the table? no, use it",
    "do not turn off AutoML",
    "Don't disable AutoML!",
    "never skip HPO",
    "don't turn AutoML off",
    "not without AutoML",
    "train, but without turning off AutoML",
    "there's no need to disable AutoML",
    "AutoML must not be disabled",
    "AutoML is not off",
    "I don't want to skip the hyperparameter search",
    "no plain training, please",
    "I don't want plain training",
    "use AutoML",
    "use AutoML without early stopping",
    "AutoML with no augmentation",
    "no augmentation but AutoML",
    "no mixup and tune with AutoML",
    "disable wandb in the AutoML run",
    "turn off cutmix for AutoML trials",
    "should I turn off AutoML?",
    "why is AutoML off?",
    "if AutoML is disabled, tell me",
    "You could turn off AutoML, but don't",
    "Turn off AutoML. Actually no, use it.",
    "write into runs/no-automl",
    "results_dir=runs/no_automl/plain",
    "the data is in s3://bucket/disable-hpo/train",
    "plain ViT, 10 epochs",
    "train directly from s3://bucket/data",
    "turn off the validation set",
    "enable AutoML",
    "keep AutoML on, no matter what",
    "AutoML on",
    "automl_policy: auto",
    "no, AutoML is fine",
    "don't forget AutoML",
    "turn off the light; no snow today",
    "I never said to turn off AutoML",
    "do not under any circumstances turn off AutoML",
    "resume without AutoML results",
    "stop AutoML after 10 trials",
    "no more than 20 AutoML trials",
    "AutoML cannot be turned off here",
)


def test_there_are_enough_phrasings():
    assert len(OFF) + len(STAYS) >= 40
    assert len(set(OFF) | set(STAYS)) == len(OFF) + len(STAYS)


@pytest.mark.parametrize("words", OFF)
def test_these_words_turn_it_off(words):
    policy, reason = resolve_policy(None, words)
    assert policy == "off", f"{words!r} was read as: {reason}"
    assert "turns AutoML off" in reason


@pytest.mark.parametrize("words", STAYS)
def test_these_words_leave_it_on(words):
    policy, reason = resolve_policy(None, words)
    assert policy == "auto", f"{words!r} was read as: {reason}"


@pytest.mark.parametrize(
    ("explicit", "policy"),
    [("auto", "auto"), ("on", "auto"), ("off", "off"), (" OFF ", "off"), (True, "auto"), (False, "off")],
)
def test_an_explicit_value_wins_over_the_words(explicit, policy):
    assert resolve_policy(explicit, "no AutoML" if policy == "auto" else "use AutoML")[0] == policy


@pytest.mark.parametrize("explicit", ["maybe", "", 1, []])
def test_any_other_value_is_refused(explicit):
    with pytest.raises(SpecError, match=r"automl_policy: must be auto, on or off, got") as caught:
        resolve_policy(explicit)
    assert repr(explicit) in str(caught.value)


def test_a_training_goes_to_automl_and_says_why():
    assert route("train") == Route(
        "auto", "automl", "It goes to AutoML: nothing was said against AutoML, and auto is the default."
    )
    assert route("train", "on").reason == "It goes to AutoML: automl_policy is on."
    assert route("train", None, "Use AutoML, please").reason == "It goes to AutoML: 'use automl' asks for AutoML."


def test_off_is_for_one_run_only():
    found = route("train", None, "Plain training.")
    assert found == Route("off", "train", "It trains once, for this run only: 'plain training' turns AutoML off.")
    assert route("train").where == "automl", "an earlier run's policy was remembered"


@pytest.mark.parametrize("action", ["evaluate", "inference", "export", "gen_trt_engine"])
@pytest.mark.parametrize("explicit", [None, "on", "off"])
def test_other_actions_are_never_routed(action, explicit):
    found = route(action, explicit, "use AutoML")
    assert (found.where, found.reason) == (action, f"{action} is never routed to AutoML.")


@pytest.fixture
def skill(tmp_path):
    return Path(shutil.copytree(SKILL, tmp_path / "skill"))


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("schemas/train.schema.json", None, "is missing"),
        ("schemas/train.schema.json", '{"properties": {', "cannot be read"),
        ("schemas/train.schema.json", "[]", "cannot be read"),
        ("schemas/train.schema.json", '{"type": "object"}', "has no properties"),
        ("references/spec_template_train.yaml", None, "is missing"),
        ("references/spec_template_train.yaml", "train: [1", "cannot be read"),
        ("references/spec_template_train.yaml", "", "cannot be read"),
        ("references/skill_info.yaml", None, "is missing"),
    ],
)
def test_without_its_schemas_it_says_so_and_trains_directly(skill, name, text, why):
    assert route("train", skill=skill).where == "automl"
    if text is None:
        (skill / name).unlink()
    else:
        (skill / name).write_text(text)
    assert route("train", skill=skill) == Route("auto", "train", f"{NOT_RUNNABLE} ({name} {why}). It trains once.")
    assert route("train", "off", skill=skill).policy == "off"


def test_a_model_that_is_not_enabled_trains_directly(skill):
    path = skill / "references/skill_info.yaml"
    path.write_text(path.read_text().replace("automl_enabled: true", "automl_enabled: false"))
    assert route("train", "on", skill=skill).reason.startswith("It trains once: AutoML is not enabled")


def test_the_text_of_the_contract():
    assert NOT_RUNNABLE == "AutoML is enabled but not runnable until schemas are generated"


def test_it_imports_no_torch_and_answers_at_once():
    code = (
        "import sys, time, json; from openmae.jobs.policy import route; import yaml;"
        "start = time.perf_counter(); first = route('train', None, 'tune the lr'); cold = time.perf_counter() - start;"
        "start = time.perf_counter(); [route('train', None, 'do not turn off AutoML') for _ in range(20)];"
        "warm = (time.perf_counter() - start) / 20;"
        "print(json.dumps([first.where, cold, warm, bool({'torch', 'numpy', 'pydantic'} & set(sys.modules))]))"
    )
    best = [9.0, 9.0]
    for _ in range(3):  # the machine may be busy
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        where, cold, warm, heavy = json.loads(done.stdout)
        assert (where, heavy) == ("automl", False)
        best = [min(best[0], cold), min(best[1], warm)]
    assert best[1] < 0.01, f"a call took {best[1] * 1000:.1f} ms"
    assert best[0] < 0.1, f"the first call took {best[0] * 1000:.1f} ms"


def test_a_long_request_is_read_quickly():
    start = time.perf_counter()
    assert resolve_policy(None, "turn off mixup, " * 2000 + "no AutoML")[0] == "off"
    assert time.perf_counter() - start < 2
