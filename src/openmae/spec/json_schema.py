"""JSON schemas of the actions' specs, in the format of NVIDIA's AutoML runner.

The types are TAO Core's: ``string``, ``int``, ``float``, ``bool``, ``list``, ``categorical``, ``ordered_int``, and
``collection`` for a section. A leaf has one type, or one type and null if it may be unset. ``minimum`` and ``maximum``
bound the legal values; ``automl_minimum``, ``automl_maximum``, ``automl_log`` and ``automl_step`` describe the range
that OpenMAE searches by default.
"""

from __future__ import annotations

import copy
import math
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from openmae.spec.actions import ACTIONS, get_action
from openmae.spec.describe import bounds, choice_values, fields, sections, traits
from openmae.spec.option import Search
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import Tree, nest
from openmae.spec.yaml_reader import MISSING

SCHEMA_VERSION = 1
_TYPES = {bool: "bool", int: "int", float: "float", str: "string", tuple: "list"}
_FREE_FORM = "dataset.segment"  # a mapping without declared keys, which the schema format cannot describe
#: Options that a template must not contain, because NVIDIA's runner sets every key of it: a spec with a key and its
#: alias is an error, and model_name has no effect.
_NOT_IN_TEMPLATES = ("model.mask_ratio", "model.norm_pix_loss", "train.mask_ratio", "train.norm_pix_loss", "model_name")
_DATA_OPTIONS = (
    "dataset.batch_size",
    "dataset.num_workers_per_gpu",
    "dataset.max_corrupt_fraction",
    "dataset.val_data_sources",
    "dataset.test_data_sources",
)


def action_schema(action: str) -> dict[str, Any]:
    """Return the JSON schema of an action's spec; ``default`` is the template of a spec.

    The schema consists of plain values, without NaN or infinity.

    Raises:
        SpecError: there is no such action.
    """
    get_action(action)
    keys = [key for key in fields() if _is_in_schema(key, action)]
    defaults = {key: _default(key, action) for key in keys}
    leaves = nest({key: _leaf(key, default) for key, default in defaults.items()})
    return {
        "type": "object",
        "title": f"mae {action}",
        "default": nest({key: default for key, default in defaults.items() if _is_in_template(key, default, action)}),
        "properties": _properties(leaves, nest(defaults), ""),
        "automl_default_parameters": [key for key in keys if traits(key).automl is True],
        "automl_disabled_parameters": [key for key in keys if traits(key).automl is False],
        "popular": nest({key: default for key, default in defaults.items() if traits(key).popular}),
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


def _is_in_schema(key: str, action: str) -> bool:
    """Return whether an action's schema has an option: as in TAO, not those of other actions, except train's."""
    section = key.split(".")[0]
    return key != _FREE_FORM and (section == action or section not in (*ACTIONS[1:], "automl"))


def _is_in_template(key: str, default: Any, action: str) -> bool:
    """Return whether a spec may set an option to its default without contradicting a checkpoint or another key."""
    if default is None or key in _NOT_IN_TEMPLATES or key.startswith("train.checkpointer."):
        return False
    own = key.split(".")[0] in (action, "results_dir", "encryption_key")
    return action == "train" or own or key in _DATA_OPTIONS


def _leaf(key: str, default: Any) -> dict[str, Any]:
    field, declared = fields()[key], traits(key)
    kind, enum = _kind(field), choice_values(field)
    leaf: dict[str, Any] = {"anyOf": [{"type": kind}, {"type": "null"}]} if field.default is None else {"type": kind}
    leaf |= {"title": _title(key), "description": field.description or "", "default": default}
    if enum:
        leaf["enum"] = enum
    sign, other = declared.bound
    leaf |= _bounds(field, f"{sign} depends_on" if other else None, kind)
    needed = declared.condition[0] if declared.automl is not False and not declared.compat else ""
    if other or needed:
        leaf["depends_on"] = other or needed
    if declared.popular:
        leaf["popular"] = True
    if declared.automl is not None:
        leaf["automl_enabled"] = declared.automl
    return leaf | (_search(declared.search, enum) if declared.search else {})


def _kind(field: FieldInfo) -> str:
    """Return the type of a leaf that is set; a number if an option takes a number or a list, such as an image size."""
    if enum := choice_values(field):
        return "ordered_int" if all(isinstance(choice, int) for choice in enum) else "categorical"
    part = _first(field.annotation)
    return _TYPES[get_origin(part) or part]


def _first(annotation: Any) -> Any:
    """Return the first type of a union that is not None."""
    if get_origin(annotation) is Annotated:
        return _first(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return next(_first(part) for part in get_args(annotation) if part is not type(None))
    return annotation


def _bounds(field: FieldInfo, cond: str | None, kind: str) -> dict[str, Any]:
    """Return ``minimum``, ``maximum`` and one ``math_cond``: a sign and a number, or a sign and ``depends_on``.

    The format has one condition per leaf, so a second exclusive bound is replaced by the next number inside it.
    """
    if choice_values(field):
        return {}
    limits = bounds(field)
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


def _search(search: Search, enum: list[Any]) -> dict[str, Any]:
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
    """Return the default, or ``???`` for a required option of the action's own section."""
    if key.split(".")[0] == action and any(group[0] == key for group in get_action(action).required):
        return MISSING
    value = fields()[key].default
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)


def _properties(leaves: Tree, defaults: Tree, prefix: str) -> dict[str, Any]:
    """Return the leaves in the sections of the schema; each section is a ``collection``."""
    found: dict[str, Any] = {}
    for name, node in leaves.items():
        key = f"{prefix}{name}"
        found[name] = node
        if key in sections():
            found[name] = {
                "type": "collection",
                "title": _title(key),
                "description": _section_help(key),
                "default": defaults[name],
                "properties": _properties(node, defaults[name], f"{key}."),
            }
    return found


def _section_help(section: str) -> str:
    owner: Any = ExperimentSpec
    for part in section.split("."):
        field = owner.model_fields[part]
        owner = field.annotation
    return field.description or ""


def _title(key: str) -> str:
    words = key.rpartition(".")[2].replace("_", " ")
    return words[0].upper() + words[1:]
