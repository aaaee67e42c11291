"""The schema as JSON, in the format that NVIDIA's AutoML runner reads: one object per action.

The types are TAO Core's: ``string``, ``int``, ``float``, ``bool``, ``list``, ``categorical``, ``ordered_int``, and
``collection`` for a section. A leaf has one type, and null where it may be unset. ``minimum`` and ``maximum`` are the
legal values; the range that OpenMAE searches by default is given next to them as ``automl_minimum``,
``automl_maximum``, ``automl_log`` and ``automl_step``.
"""

from __future__ import annotations

import copy
import math
import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from openmae.errors import UserError
from openmae.spec.describe import REQUIRED, choices, fields, sections
from openmae.spec.option import Search
from openmae.spec.schema import ACTIONS, ExperimentSpec

SCHEMA_VERSION = 1
MISSING = "???"
_TYPES = {bool: "bool", int: "int", float: "float", str: "string", tuple: "list"}
_FREE_FORM = "dataset.segment"  # a mapping without declared keys, which a schema cannot describe; the loader accepts it
_ALIASED = ("mask_ratio", "norm_pix_loss")  # of model and of train: a template that holds one forbids the other


def action_schema(action: str) -> dict[str, Any]:
    """The JSON schema of an action's spec.

    Args:
        action: one of ``ACTIONS``.

    Returns:
        ``type``, ``default`` (a template: what is safe to type), ``properties``, ``automl_default_parameters``,
        ``automl_disabled_parameters``, ``popular`` and ``x_tao_schema``; plain values, without NaN or infinity.

    Raises:
        UserError: there is no such action.
    """
    if action not in ACTIONS:
        raise UserError(f"There is no action {action!r}.", f"Use one of: {', '.join(ACTIONS)}.")
    keys = [key for key in fields() if _stands_in(key, action)]
    properties: dict[str, Any] = {}
    for key in keys:
        _put(properties, key, _leaf(key, action))
    for section in sorted(sections(), key=lambda name: name.count(".")):
        if any(key.startswith(f"{section}.") for key in keys):
            _describe_section(properties, section, [key for key in keys if key.startswith(f"{section}.")], action)
    return {
        "type": "object",
        "title": f"mae {action}",
        "default": _tree({key: _default(key, action) for key in keys if _is_template_key(key, action)}),
        "properties": properties,
        "automl_default_parameters": [key for key in keys if _extra(key).get("automl") is True],
        "automl_disabled_parameters": [key for key in keys if _extra(key).get("automl") is False],
        "popular": _tree({key: _default(key, action) for key in keys if _extra(key).get("popular")}),
        "x_tao_schema": {
            "action": action,
            "core_module": "openmae.spec.schema",
            "model": "tao-train-mask-auto-encoder",
            "network_arch": "mae",
            "schema_action": action,
            "schema_version": SCHEMA_VERSION,
            "source": "OpenMAE spec sections",
        },
    }


def leaves(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The leaves of an action's schema by dotted key."""
    found: dict[str, dict[str, Any]] = {}

    def walk(properties: dict[str, Any], prefix: str) -> None:
        for name, node in properties.items():
            if "properties" in node:
                walk(node["properties"], f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}"] = node

    walk(schema["properties"], "")
    return found


def _stands_in(key: str, action: str) -> bool:
    """As published: every section but those of the other actions; ``mae automl`` reads its own section itself."""
    section = key.split(".")[0]
    return key != _FREE_FORM and (section == action or section not in (*ACTIONS[1:], "automl"))


def _is_template_key(key: str, action: str) -> bool:
    """What may stand in a spec with its default: not what would contradict the parent's checkpoint or another key."""
    section, name = key.split(".")[0], key.split(".")[-1]
    if name in _ALIASED or key == "model_name" or ".checkpointer." in key:  # NVIDIA's runner sets what it finds there
        return False
    if action == "train":
        return _default(key, action) is not None
    data = ("batch_size", "num_workers_per_gpu", "max_corrupt_fraction", "val_data_sources", "test_data_sources")
    return (
        section in (action, "results_dir", "encryption_key") or (section == "dataset" and name in data)
    ) and _default(key, action) is not None


def _leaf(key: str, action: str) -> dict[str, Any]:
    field, extra = fields()[key], _extra(key)
    kind = _kind(field)
    leaf: dict[str, Any] = {"anyOf": [{"type": kind}, {"type": "null"}]} if field.default is None else {"type": kind}
    leaf |= {"title": _title(key), "description": field.description or "", "default": _default(key, action)}
    if choices(field):
        leaf["enum"] = _enum(field)
    sign, _, other = (extra.get("cond") or "").partition(" ")
    leaf |= _bounds(field, f"{sign} depends_on" if other else None, kind)
    if other or extra.get("needs"):
        leaf["depends_on"] = other or re.split("[=>]", extra["needs"])[0]
    if extra.get("popular"):
        leaf["popular"] = True
    if extra.get("automl") is not None:
        leaf["automl_enabled"] = extra["automl"]
    return leaf | _search(extra.get("search"), leaf.get("enum"))


def _kind(field: FieldInfo) -> str:
    """The type of a leaf that is set; of an option that also takes a list, such as an image size, the plain number."""
    if choices(field):
        return "ordered_int" if all(isinstance(choice, int) for choice in _enum(field)) else "categorical"
    part = _first(field.annotation)
    return _TYPES[get_origin(part) or part]


def _first(annotation: Any) -> Any:
    """The first type of a union that is not None."""
    if get_origin(annotation) is Annotated:
        return _first(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return next(_first(part) for part in get_args(annotation) if part is not type(None))
    return annotation


def _enum(field: FieldInfo) -> list[Any]:
    """The choices in their own type."""
    for part in (field.annotation, *get_args(field.annotation)):
        if get_origin(part) is Literal:
            return list(get_args(part))
    return list(choices(field))


def _bounds(field: FieldInfo, cond: str | None, kind: str) -> dict[str, Any]:
    """Return ``minimum``, ``maximum`` and one ``math_cond``: a sign and a number, or a sign and ``depends_on``.

    The format has room for one condition. Any other exclusive bound is moved to the next number inside.
    """
    if choices(field):
        return {}
    limits = {
        name: getattr(item, name)
        for item in field.metadata
        for name in ("gt", "ge", "lt", "le")
        if getattr(item, name, None) is not None
    }
    number = float if kind == "float" else int
    found: dict[str, Any] = {}
    conditions = [cond] if cond else []
    for name, exclusive, sign, toward in (("minimum", "gt", ">", math.inf), ("maximum", "lt", "<", -math.inf)):
        inclusive = {"gt": "ge", "lt": "le"}[exclusive]
        if inclusive in limits:
            found[name] = number(limits[inclusive])
        elif exclusive in limits:
            bound = number(limits[exclusive])
            found[name] = math.nextafter(bound, toward) if conditions else bound
            conditions = conditions or [f"{sign} {bound}"]
    return found | ({"math_cond": conditions[0]} if conditions else {})


def _search(search: Search | None, enum: list[Any] | None) -> dict[str, Any]:
    if search is None:
        return {}
    found: dict[str, Any] = {}
    if enum and search.weights:
        found["option_weights"] = [search.weights.get(str(choice), 0.0) for choice in enum]
    if search.low is not None:
        found["automl_minimum"] = search.low
    if search.high is not None:
        found["automl_maximum"] = search.high
    if search.log:
        found["automl_log"] = True
    if search.step is not None:
        found["automl_step"] = search.step
    return found


def _default(key: str, action: str) -> Any:
    """As the spec has it; ``???`` where the action cannot do without a value of its own section."""
    if key.split(".")[0] == action and any(group[0] == key for group in REQUIRED[action]):
        return MISSING
    value = fields()[key].default
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)


def _describe_section(properties: dict[str, Any], section: str, keys: list[str], action: str) -> None:
    node: dict[str, Any] = {"properties": properties}
    owner: Any = ExperimentSpec
    field: FieldInfo | None = None
    for part in section.split("."):
        node, field = node["properties"][part], owner.model_fields[part]
        owner = field.annotation
    inner = node.pop("properties")
    below = {key.removeprefix(f"{section}."): _default(key, action) for key in keys}
    node |= {
        "type": "collection",
        "title": _title(section),
        "description": (field.description if field else "") or "",
        "default": _tree(below),
        "properties": inner,
    }


def _put(properties: dict[str, Any], key: str, leaf: dict[str, Any]) -> None:
    *parents, name = key.split(".")
    for part in parents:
        properties = properties.setdefault(part, {"properties": {}})["properties"]
    properties[name] = leaf


def _tree(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        inner = tree
        for part in parents:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return tree


def _title(key: str) -> str:
    words = key.rpartition(".")[2].replace("_", " ")
    return words[0].upper() + words[1:]


def _extra(key: str) -> dict[str, Any]:
    extra = fields()[key].json_schema_extra
    return extra if isinstance(extra, dict) else {}
