import pytest
import yaml

from openmae.errors import UserError
from openmae.spec.actions import ACTIONS, TABLE
from openmae.spec.describe import fields, keys_table, sections, template
from openmae.spec.load import load_spec, to_dict


def test_keys_table():
    rows = {row.key: row for row in keys_table()}
    assert set(rows) == set(fields())
    assert rows["train.optim.lr"][1:4] == ("number", "0.0002", "> 0 and <= 1")
    assert rows["train.stage"][1:4] == ("choice", "pretrain", "pretrain, finetune")
    assert rows["model.in_chans"][1:4] == ("choice", "3", "1, 3, 4")
    assert rows["export.input_channel"][1:4] == ("choice", "unset", "1, 3, 4")
    assert rows["model.mask_ratio"][1:4] == ("number", "unset", "> 0 and < 1")
    assert rows["dataset.augmentation.input_size"].type == "integer or [height, width]"
    assert rows["dataset.augmentation.cutmix_minmax"].type == "number or [min, max]"
    assert rows["train.gpu_ids"][1:3] == ("list of integers", "[0]")
    assert rows["train.freeze"].type == "list of texts"
    assert rows["train.cudnn.benchmark"][1:3] == ("true or false", "false")
    assert rows["results_dir"][1:3] == ("text", '""')
    assert len(rows["model.arch"].bounds.split(", ")) == 19
    assert all(row.help for row in rows.values())


def test_keys_table_of_an_action():
    keys = {row.key.split(".")[0] for row in keys_table("evaluate")}
    assert "evaluate" in keys
    assert not {"inference", "export", "gen_trt_engine"} & keys


def test_sections():
    assert {
        "train",
        "train.optim",
        "train.cudnn",
        "dataset.augmentation",
        "gen_trt_engine.tensorrt",
    } <= sections()


@pytest.mark.parametrize("action", ACTIONS)
def test_a_completed_template_loads(action, caplog):
    text = template(action)
    assert text.count("???") - 1 == len(TABLE[action].required)  # the header names ??? too
    spec = load_spec(yaml.safe_load(text.replace(": ???", ": path")), action=action)
    assert not caplog.records
    assert all(line == line.rstrip() for line in text.splitlines())
    groups = [f"{group[0]}=path" for group in TABLE[action].required]
    assert to_dict(spec) == to_dict(load_spec(None, groups, action))


def test_a_template_says_where_long_lists_of_choices_are():
    (arch,) = [line for line in template("train").splitlines() if line.startswith("  # arch: ")]
    assert arch.endswith("# architecture of the backbone (recipe) [choices: mae spec keys]")


@pytest.mark.parametrize("action", ACTIONS)
def test_a_template_with_every_line_active_loads(action):
    lines = template(action).replace(": ???", ": path").splitlines()[3:]
    active = "\n".join(line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in lines)
    load_spec(yaml.safe_load(active), action=action)


def test_template_of_an_unknown_action():
    with pytest.raises(UserError, match="There is no action 'trian'"):
        template("trian")
