"""Which requests turn AutoML off, and where a training job then runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openmae.errors import SpecError
from openmae.jobs.policy import NOT_RUNNABLE, SKILL, Route, resolve_policy, route


@pytest.mark.parametrize(
    "words",
    [
        "turn off AutoML",
        "Please turn AutoML off for this run.",
        "disable AutoML",
        "Disable automl and train a vit_tiny for 3 epochs",
        "no HPO",
        "train, 10 epochs;  no\nhpo please",
        "plain training",
        "Pretrain on photos. Plain training, please.",
        "train without AutoML",
        "skip the mixup, and skip hyperparameter tuning",
        "don’t use AutoML",
    ],
)
def test_these_words_turn_automl_off(words: str) -> None:
    policy, reason = resolve_policy(None, words)
    assert (policy, reason.endswith("turns AutoML off")) == ("off", True)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "pretrain on photos",
        "tune the lr",
        "no augmentation",
        "turn off mixup",
        "train without labels",
        "do not turn off AutoML",
        "Don't disable AutoML!",
        "never skip HPO",
        "use AutoML",
        "write into runs/automl_off",
    ],
)
def test_these_words_do_not(words: str) -> None:
    assert resolve_policy(None, words) == ("auto", "auto is the default")


@pytest.mark.parametrize(
    ("explicit", "policy"),
    [("auto", "auto"), ("on", "auto"), ("off", "off"), (" OFF ", "off"), (True, "auto"), (False, "off")],
)
def test_an_explicit_value_has_precedence_over_words(explicit: str | bool, policy: str) -> None:
    assert resolve_policy(explicit, "no AutoML" if policy == "auto" else "use AutoML")[0] == policy


@pytest.mark.parametrize("explicit", ["maybe", "", 1, []])
def test_any_other_value_is_refused(explicit: object) -> None:
    with pytest.raises(SpecError, match=r"automl_policy: must be auto, on or off, got") as caught:
        resolve_policy(explicit)  # type: ignore[arg-type]
    assert repr(explicit) in str(caught.value)


def test_a_training_job_becomes_a_search_unless_automl_is_off() -> None:
    assert route("train") == Route("auto", "automl", "It becomes a hyperparameter search: auto is the default.")
    assert route("train", "on").reason == "It becomes a hyperparameter search: automl_policy is on."
    off = Route("off", "train", "It trains once, for this run only: 'plain training' turns AutoML off.")
    assert route("train", None, "Plain training.") == off
    assert route("train").where == "automl", "the policy of an earlier run was remembered"


@pytest.mark.parametrize("action", ["evaluate", "inference", "export", "gen_trt_engine"])
@pytest.mark.parametrize("explicit", [None, "on", "off"])
def test_other_actions_are_never_routed(action: str, explicit: str | None) -> None:
    found = route(action, explicit, "use AutoML")
    assert (found.where, found.reason) == (action, f"{action} is never routed to AutoML.")


@pytest.fixture
def skill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the skill, which is used instead of it."""
    folder = Path(shutil.copytree(SKILL, tmp_path / "skill"))
    monkeypatch.setattr("openmae.jobs.policy.SKILL", folder)
    return folder


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
def test_without_its_schemas_a_training_job_trains_once(skill: Path, name: str, text: str | None, why: str) -> None:
    assert route("train").where == "automl"
    if text is None:
        (skill / name).unlink()
    else:
        (skill / name).write_text(text)
    assert route("train") == Route("auto", "train", f"{NOT_RUNNABLE} ({name} {why}). It trains once.")
    assert route("train", "off").policy == "off"


def test_a_model_that_is_not_enabled_trains_once(skill: Path) -> None:
    path = skill / "references/skill_info.yaml"
    path.write_text(path.read_text().replace("automl_enabled: true", "automl_enabled: false"))
    assert route("train", "on").reason.startswith("It trains once: AutoML is not enabled")


def test_the_text_of_the_contract() -> None:
    assert NOT_RUNNABLE == "AutoML is enabled but not runnable until schemas are generated"


@pytest.mark.integration
def test_it_imports_nothing_heavy() -> None:
    code = "import sys; from openmae.jobs.policy import route; route('train'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
