"""The JSON schemas: the contract's format, the published values, and the same rules as the spec itself."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from openmae.errors import UserError
from openmae.spec.actions import ACTIONS, TABLE
from openmae.spec.describe import fields
from openmae.spec.json_schema import action_schema
from openmae.spec.load import load_spec
from openmae.spec.schema import ExperimentSpec

PUBLISHED = list(
    csv.DictReader((Path(__file__).parent / "data/published_keys.tsv").open(), delimiter="\t", quoting=csv.QUOTE_NONE)
)
SEARCHED = {
    f"train.optim.{name}" for name in ("lr", "weight_decay", "momentum", "warmup_epochs", "backbone_multiplier")
}
#: Where a default is ours on purpose (contract.md), and not the published one.
OUR_DEFAULTS = {
    "dataset.augmentation.max_scale",  # over 1 is clamped anyway
    "dataset.augmentation.mean",
    "dataset.augmentation.std",  # by the number of channels
    "dataset.test_data_sources",
    "model.decoder_depth",
    "model.decoder_embed_dim",
    "model.drop_path_rate",  # by the architecture, and the stage
    "model.num_classes",  # by the data
    "train.mask_ratio",
    "train.norm_pix_loss",  # of model
    "train.optim.backbone_multiplier",
    "export.input_channel",
    "export.input_height",
    "export.input_width",  # by the checkpoint
    "wandb.name",
    "wandb.project",
    "wandb.tags",
}
SCHEMAS = {action: action_schema(action) for action in ACTIONS}


def leaves(schema: dict, prefix: str = "") -> dict[str, dict]:
    """Return the leaves of a schema by dotted key."""
    found: dict[str, dict] = {}
    for name, node in schema["properties"].items():
        key = f"{prefix}{name}"
        found |= leaves(node, f"{key}.") if "properties" in node else {key: node}
    return found


@pytest.mark.parametrize("action", ACTIONS)
def test_every_published_key_is_a_leaf_with_its_default(action):
    found = leaves(SCHEMAS[action])
    for row in PUBLISHED:
        key = row["key"]
        section = key.split(".")[0]
        if section in ACTIONS[1:] and section != action:
            assert key not in found
            continue
        leaf = found[key]
        published = json.loads(row["default_in_published_schema"]) if row["default_in_published_schema"] else None
        if key not in OUR_DEFAULTS:
            assert leaf["default"] == published, key
        else:
            assert leaf["default"] != published, f"{key} has the published default again: take it off the list"
        if row["enum"]:
            assert set(json.loads(row["enum"])) <= set(leaf["enum"]), key


def test_types_are_the_published_ones():
    allowed = {("string", "categorical"), ("float", "list")}  # choices; a pair
    for row in PUBLISHED:
        action = row["key"].split(".")[0] if row["key"].split(".")[0] in ACTIONS else "train"
        leaf = leaves(SCHEMAS[action])[row["key"]]
        kinds = {leaf["type"]} if "type" in leaf else {part["type"] for part in leaf["anyOf"]}
        assert row["type"] in kinds or any((row["type"], kind) in allowed for kind in kinds), row["key"]


@pytest.mark.parametrize("action", ACTIONS)
def test_the_format(action):
    schema = SCHEMAS[action]
    text = json.dumps(schema, allow_nan=False)
    assert "Infinity" not in text
    assert json.loads(text) == schema, "only plain values"
    assert schema["type"] == "object"
    assert set(schema["automl_default_parameters"]) == SEARCHED
    assert "train.stage" in schema["automl_disabled_parameters"]
    assert not set(schema["automl_default_parameters"]) & set(schema["automl_disabled_parameters"])
    assert schema["x_tao_schema"]["action"] == schema["x_tao_schema"]["schema_action"] == action
    for key, leaf in leaves(schema).items():
        assert isinstance(leaf.get("type", ""), str), key
        assert ("type" in leaf) != ("anyOf" in leaf), key
        if leaf["default"] is None:
            assert {"type": "null"} in leaf["anyOf"], key
        for name in ("minimum", "maximum"):
            assert math.isfinite(leaf.get(name, 0)), key


@pytest.mark.parametrize("action", ACTIONS)
def test_a_node_is_of_one_type_and_no_collection_is_empty(action):
    """NVIDIA's runner refuses a leaf of two types, and a mapping whose keys nobody declares."""
    schema = SCHEMAS[action]
    nodes = [("", schema)]
    while nodes:
        name, node = nodes.pop()
        assert node.get("type") != "collection" or node["properties"], name
        nodes += [(f"{name}.{key}", inner) for key, inner in node.get("properties", {}).items()]
        assert len([part for part in node.get("anyOf", ()) if part["type"] != "null"]) == ("anyOf" in node), name
    found = leaves(schema)
    assert found["dataset.augmentation.input_size"]["type"] == "int"
    assert "dataset.segment" not in found


def test_options_outside_the_schema_still_load():
    spec = load_spec(
        {
            "dataset": {
                "train_data_sources": "photos",
                "segment": {"palette": [{"label_id": 0}]},
                "augmentation": {"input_size": [64, 96]},
            }
        },
        action="train",
    )
    assert spec.dataset.augmentation.size == (64, 96)


def test_an_option_without_a_positive_default_has_two_bounds():
    """Without a bound, NVIDIA's samplers draw around the default: from -1 to 1 if it is 0."""
    for key, leaf in leaves(SCHEMAS["train"]).items():
        if leaf.get("type") in ("int", "float") and leaf.get("automl_enabled") is not False and leaf["default"] <= 0:
            assert {"minimum", "maximum"} <= leaf.keys(), key


def test_the_five_searched_parameters_as_published():
    found = leaves(SCHEMAS["train"])
    for name, bounds in {
        "lr": (0.0, 1.0, "> 0.0"),
        "weight_decay": (0.0, 1.0, None),
        "momentum": (0.0, math.nextafter(1, 0), "> 0.0"),
        "backbone_multiplier": (0.0, 1.0, "> 0.0"),
        "warmup_epochs": (0, 100, "< depends_on"),
    }.items():
        leaf = found[f"train.optim.{name}"]
        assert (leaf["minimum"], leaf["maximum"], leaf.get("math_cond")) == bounds, name
        assert leaf["automl_enabled"] is True
        assert leaf["minimum"] <= leaf["automl_minimum"] < leaf["automl_maximum"] <= leaf["maximum"]
    assert found["train.optim.lr"]["automl_log"] is True


def test_weights_conditions_and_dependencies():
    found = leaves(SCHEMAS["train"])
    scheduler = found["train.optim.lr_scheduler"]
    assert dict(zip(scheduler["enum"], scheduler["option_weights"], strict=True)) == {"MultiStep": 0.3, "cosine": 0.7}
    assert found["train.optim.warmup_epochs"]["depends_on"] == "train.num_epochs"
    assert found["train.optim.gamma"]["depends_on"] == "train.optim.lr_scheduler"
    for low, high in (("min_scale", "max_scale"), ("min_ratio", "max_ratio")):
        for key, other, sign in ((low, high, "<="), (high, low, ">=")):
            leaf = found[f"dataset.augmentation.{key}"]
            assert (leaf["math_cond"], leaf["depends_on"]) == (f"{sign} depends_on", f"dataset.augmentation.{other}")
    assert found["model.in_chans"]["type"] == "ordered_int"
    assert found["model.in_chans"]["enum"] == [1, 3, 4]
    assert found["model.drop_path_rate"]["math_cond"] == "< 1.0"
    for key, leaf in found.items():
        if condition := leaf.get("math_cond"):
            sign, value = condition.split(" ")
            assert sign in ("<", "<=", ">", ">="), key
            assert leaf["depends_on"] in found if value == "depends_on" else math.isfinite(float(value)), key
            if leaf.get("type") == "int":
                assert value == "depends_on" or value.isdecimal(), "NVIDIA's samplers call int() on it"


def is_legal(key: str, value: object) -> bool:
    tree: object = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    try:
        ExperimentSpec.model_validate(tree)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("key", [key for key, leaf in leaves(SCHEMAS["train"]).items() if "minimum" in leaf])
def test_bounds_are_those_of_the_spec(key):
    """A value at each bound of the schema is legal, and one beyond it is not."""
    leaf = leaves(SCHEMAS["train"])[key]
    whole = "int" in (leaf.get("type"), *(part["type"] for part in leaf.get("anyOf", ())))
    sign, _, edge = leaf.get("math_cond", "").partition(" ")
    for name, beyond in (("minimum", -1), ("maximum", 1)):
        if name not in leaf:
            continue
        bound = leaf[name]
        excluded = (sign, name) in ((">", "minimum"), ("<", "maximum")) and edge == str(bound)
        assert is_legal(key, bound) != excluded, f"{name} {bound}"
        outside = bound + beyond if whole else math.nextafter(bound, beyond * math.inf)
        assert not is_legal(key, outside), f"{outside} is legal, but beyond {name}"
        inside = bound if not excluded else math.nextafter(bound, -beyond * math.inf)
        assert is_legal(key, inside)


@pytest.mark.parametrize("action", ACTIONS)
def test_the_default_loads(action):
    spec = copy.deepcopy(SCHEMAS[action]["default"])
    sources = {"train": "train", "evaluate": "val", "inference": "test"}
    if action in sources:
        assert spec["dataset"][f"{sources[action]}_data_sources"] == ""
        spec["dataset"][f"{sources[action]}_data_sources"] = "photos"
    for group in TABLE[action].required:
        section, name = group[0].split(".", 1)
        if section == action:
            assert spec[section][name] == "???", group[0]
            spec[section][name] = f"/models/{name}"
    loaded = load_spec(spec, action=action)
    if action == "train":
        unset = load_spec({"dataset": {"train_data_sources": "photos"}}, ["train.recipe=tao"], action="train")
        loaded = load_spec(loaded, ["train.recipe=tao"], action="train")
        assert loaded.model_dump() == unset.model_dump(), "the template changes what acts"
    else:
        assert not any(loaded.is_set(key) for key in fields() if key.startswith(("model.", "train.")))


def test_no_template_has_a_checkpointer():
    """NVIDIA's runner would fill it in; without one it sets checkpoint_interval to num_epochs."""
    assert "checkpointer" not in SCHEMAS["train"]["default"]["train"]


@pytest.mark.parametrize("alias", ["mask_ratio", "norm_pix_loss"])
def test_aliased_keys_are_in_no_template(alias):
    """Else setting one place in a template would contradict the other."""
    found = leaves(SCHEMAS["train"])
    for section in ("model", "train"):
        assert f"{section}.{alias}" in found
        assert alias not in SCHEMAS["train"]["default"][section]
        value = 0.5 if alias == "mask_ratio" else False
        spec = copy.deepcopy(SCHEMAS["train"]["default"])
        spec[section][alias] = value
        spec["dataset"]["train_data_sources"] = "photos"
        assert getattr(load_spec(spec, action="train").model, alias) == value


def test_popular_options():
    popular = SCHEMAS["train"]["popular"]
    assert popular["train"]["optim"]["lr"] == 2e-4
    assert popular["model"] == {"arch": "convnextv2_base"}
    marked = {key for key, leaf in leaves(SCHEMAS["train"]).items() if leaf.get("popular")}
    assert marked == set(flat(popular))


def flat(tree: dict, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, value in tree.items():
        found += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return found


def test_an_unknown_action_is_an_error():
    with pytest.raises(UserError, match="There is no action 'automl'"):
        action_schema("automl")


def standard(node: dict) -> dict:
    """The same schema in JSON Schema's own words."""
    kinds = {"string": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array"}
    kinds |= {"collection": "object", "categorical": "string", "ordered_int": "integer", "null": "null"}
    made = {key: node[key] for key in ("minimum", "maximum", "enum", "default") if key in node}
    if "type" in node:
        made["type"] = kinds.get(node["type"], node["type"])
    if "anyOf" in node:
        made["anyOf"] = [standard(part) for part in node["anyOf"]]
        if "enum" in made:
            made["enum"] = [*made["enum"], None]
    if "properties" in node:
        made["properties"] = {name: standard(inner) for name, inner in node["properties"].items()}
        made["additionalProperties"] = False
    if made.get("default") == "???":
        del made["default"]
    return made


@pytest.mark.parametrize("action", ACTIONS)
def test_jsonschema_agrees(action):
    jsonschema = pytest.importorskip("jsonschema", reason="an independent reader of JSON Schema")
    schema = standard(SCHEMAS[action])
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    template = SCHEMAS[action]["default"]
    assert list(validator.iter_errors(template)) == []
    for key, leaf in leaves(SCHEMAS[action]).items():
        plain = jsonschema.Draft202012Validator(standard(leaf))
        assert leaf["default"] == "???" or plain.is_valid(leaf["default"]), key
    for wrong in ({"model": {"arch": "resnet"}}, {"train": {"optim": {"lr": 2.0}}}, {"dataset": {"batch_size": 0}}):
        assert not validator.is_valid(wrong), wrong
    assert not validator.is_valid({"model": {"archs": 1}})
