"""Validation of a skill folder, by the rules of NVIDIA's AutoML runner (7.0 to 7.2), its skill bank and OpenMAE.

The structure of each file is declared as a model; functions check rules across files. ``tests/nvidia`` runs NVIDIA's
own code on the packaged folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from openmae.spec.tree import flatten

BODY_LIMIT = 18_000  # characters
SEARCHED = {f"train.optim.{n}" for n in ("lr", "weight_decay", "momentum", "warmup_epochs", "backbone_multiplier")}
_INFO = "references/skill_info.yaml"
_CONDITION = r"^(<|<=|>|>=) (depends_on|-?\d+(\.\d+)?(e[+-]?\d+)?)$"
_VALUES: dict[str, Any] = {
    "string": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "list": list,
    "ordered_int": int,
    "categorical": object,
}

Kind = Literal["string", "int", "float", "bool", "list", "categorical", "ordered_int"]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Mapped = Annotated[dict[str, Any], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=_Part)


class _Metadata(_Part):
    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    author: Text


class FrontMatter(_Part):
    """The frontmatter of SKILL.md."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)]
    description: Annotated[str, Field(pattern=r"^[^<>]+$", max_length=1024)]
    license: Text
    compatibility: Annotated[str, Field(min_length=1, max_length=500)]
    metadata: _Metadata
    allowed_tools: Text = Field(alias="allowed-tools")
    tags: Texts


class _File(_Part):
    type: Literal["folder", "file"]


class _Execution(_Part):
    type: Literal["python_script"]
    config_format: Literal["yaml"]
    script: Text
    args: Texts


class _Action(_Part):
    command: Text
    config_format: Literal["yaml"]
    mode: Literal["config"]
    inputs: Annotated[dict[str, _File], Field(min_length=1)]
    outputs: Annotated[dict[str, _File], Field(min_length=1)]
    upload_excludes: Texts
    execution: _Execution | None = None


class _Source(_Part):
    source: Text
    path: Text  # one file name; NVIDIA's SDK takes no list


class DeployInfo(_Part):
    """``references/tao-deploy-*.skill_info.yaml``."""

    name: Text
    description: Text
    network_arch: Literal["mae"]
    automl_enabled: bool
    actions: Annotated[dict[str, _Action], Field(min_length=1)]
    spec_params: Mapped
    spec_templates: Annotated[dict[str, Text], Field(min_length=1)]


class SkillInfo(DeployInfo):
    """``references/skill_info.yaml``."""

    automl_enabled: Literal[True]
    data_format: Literal["ssl"]
    gpu_spec_key: Literal["train.num_gpus"]
    data_sources: Annotated[dict[str, dict[str, _Source]], Field(min_length=1)]
    spec_shorthand_keys: Mapped


class _Manifest(_Part):
    actions: Mapped


class _Case(_Part):
    id: Text
    question: Text
    expected_skill: Text
    ground_truth: Text
    expected_behavior: Texts


class _Cases(_Part):
    cases: Annotated[list[_Case], Field(min_length=1)]


class _Origin(_Part):
    action: Text
    core_module: Text
    model: Text
    network_arch: Text
    schema_action: Text
    schema_version: Annotated[int, Field(ge=1)]
    source: Text


class Schema(_Part):
    """``schemas/<action>.schema.json``."""

    type: Literal["object"]
    default: dict[str, Any]
    properties: Mapped
    automl_default_parameters: list[str]
    automl_disabled_parameters: list[str]
    popular: dict[str, Any]
    x_tao_schema: _Origin


class _Collection(_Part):
    type: Literal["collection"]
    properties: Mapped


class _OneType(_Part):
    type: Kind | Literal["null"]


class Leaf(_Part):
    """An option in a schema."""

    title: Text
    description: str
    default: Any
    type: Kind | None = None
    any_of: list[_OneType] = Field([], alias="anyOf")
    minimum: float | None = None
    maximum: float | None = None
    enum: Annotated[list[Any], Field(min_length=1)] | None = None
    option_weights: list[Annotated[float, Field(ge=0)]] | None = None
    math_cond: Annotated[str, Field(pattern=_CONDITION)] | None = None
    depends_on: str | None = None
    popular: bool = False
    automl_enabled: bool | None = None

    @property
    def kinds(self) -> list[str]:
        """The types except null; a valid leaf has exactly one."""
        return [self.type] if self.type else [item.type for item in self.any_of if item.type != "null"]

    def fits(self, value: Any, *, choice: bool = False) -> bool:
        """Return whether a value is legal; with ``choice``, it need not be in ``enum``."""
        if value is None:
            return any(item.type == "null" for item in self.any_of)
        kind = self.kinds[0]
        if not isinstance(value, _VALUES[kind]) or (isinstance(value, bool) and kind not in ("bool", "categorical")):
            return False
        if isinstance(value, int | float) and kind != "categorical":
            low, high = (-float("inf") if self.minimum is None else self.minimum, self.maximum)
            if value < low or (high is not None and value > high):
                return False
        return choice or self.enum is None or value in self.enum

    @model_validator(mode="after")
    def _check(self) -> Leaf:
        if problems := list(self._problems()):
            raise PydanticCustomError("rule", "{text}", {"text": "; ".join(problems)})
        return self

    def _problems(self) -> Iterator[str]:
        if len(self.kinds) != 1 or bool(self.type) == bool(self.any_of):
            yield "must have a type, or an anyOf of one type and null"
            return
        kind, choices = self.kinds[0], self.enum or []
        if self.default != "???" and not self.fits(self.default):
            yield f"the default {self.default!r} is not a legal value"
        if kind not in ("int", "float", "ordered_int") and not self.minimum is self.maximum is None:
            yield "minimum and maximum are for numbers"
        if kind in ("categorical", "ordered_int") and not choices:
            yield "enum is missing"
        if not all(self.fits(value, choice=True) for value in choices):
            yield f"enum must be a list of legal values, got {choices}"
        weights = self.option_weights
        if weights is not None and (len(weights) != len(choices) or not any(weights)):
            yield f"option_weights must have one number for each value of enum, one of them above 0, got {weights}"
        if self.automl_enabled and not choices and None in (self.minimum, self.maximum):
            yield "automl_enabled needs a minimum and a maximum, or an enum"
        condition = self.math_cond or ""
        if kind == "int" and "." in condition:
            yield f"math_cond must compare with an integer, got {condition!r}"
        if condition.endswith("depends_on") and self.depends_on is None:
            yield f"math_cond {condition!r} needs depends_on, the key to compare with"


def find_breaches(folder: Path) -> list[str]:
    """Return the broken rules of a skill folder as "FILE: key: rule, value", in a fixed order."""
    if not folder.is_dir():
        return [f"{folder}: is not a folder"]
    found: list[str] = []
    _check_skill_md(folder, found)
    info = _read(folder, _INFO, SkillInfo, found)
    actions = list(info.actions) if info else []
    leaves = {action: _check_schema(folder, action, found) for action in actions}
    if info:
        _check_info(folder, info, folder.name, _INFO, leaves, found)
    manifest = _read(folder, "schemas/manifest.json", _Manifest, found)
    if info and manifest and sorted(manifest.actions) != sorted(actions):
        found.append(f"schemas/manifest.json: actions: must be those of skill_info.yaml, {sorted(actions)}")
    _check_deploy(folder, leaves, found)
    cases = _read(folder, "evals/evals.json", _Cases, found)
    ids = [case.id for case in cases.cases] if cases else []
    twice = sorted({name for name in ids if ids.count(name) > 1})
    return [*found, *(f"evals/evals.json: the id {name!r} occurs twice" for name in twice)]


def _content(folder: Path, name: str, found: list[str]) -> Any:
    """Return the content of a JSON or YAML file; None, with a line in ``found``, if it cannot be read or parsed."""
    try:
        text = (folder / name).read_text(encoding="utf-8")
        return json.loads(text, parse_constant=_refuse) if name.endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        found.append(f"{name}: cannot be read: {getattr(error, 'strerror', None) or 'not text'}")
    except (ValueError, yaml.YAMLError) as error:
        found.append(f"{name}: does not parse: {str(error).splitlines()[0]}")
    return None


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not allowed: bounds are finite")


def _read(folder: Path, name: str, model: type[Model], found: list[str]) -> Model | None:
    before = len(found)
    content = _content(folder, name, found)
    if len(found) > before:
        return None
    return _validated(model, {"cases": content} if model is _Cases else content, name, found)


def _validated(model: type[Model], content: Any, where: str, found: list[str]) -> Model | None:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = ".".join(map(str, detail["loc"]))
            value = "" if detail["type"] in ("missing", "rule") else f", got {detail['input']!r:.60}"
            found.append(": ".join(filter(None, (where, key, f"{detail['msg']}{value}"))))
        return None


def _check_skill_md(folder: Path, found: list[str]) -> None:
    file = "SKILL.md"
    try:
        text = (folder / file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        found.append(f"{file}: cannot be read")
        return
    parts = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    if not parts:
        found.append(f"{file}: must begin with frontmatter between two lines of ---")
        return
    try:
        front = _validated(FrontMatter, yaml.safe_load(parts[1]), file, found)
    except yaml.YAMLError as error:
        found.append(f"{file}: the frontmatter does not parse: {str(error).splitlines()[0]}")
        return
    if front and front.name != folder.name:
        found.append(f"{file}: name: must be the folder's, {folder.name!r}, got {front.name!r}")
    if len(parts[2]) > BODY_LIMIT:
        found.append(f"{file}: the body must have up to {BODY_LIMIT} characters, got {len(parts[2])}")
    if not re.search(r"```bash\n(?:(?!```).*\n)*?python3? -m venv ", parts[2]):
        found.append(f"{file}: the body must have a quick start, a bash block with python -m venv")
    if home := re.search(r"/(?:home|Users)/\w+", text):
        found.append(f"{file}: {home[0]} is a path of one machine; write a relative path, or /data")


def _check_schema(folder: Path, action: str, found: list[str]) -> dict[str, Leaf | None]:
    """Return the leaves of a schema by key; an invalid leaf is None."""
    file, template_file = f"schemas/{action}.schema.json", f"references/spec_template_{action}.yaml"
    schema = _read(folder, file, Schema, found)
    template = _content(folder, template_file, found)
    if schema is None:
        return {}
    if template != schema.default:
        found.append(f"{template_file}: must equal the default of {file}")
    if schema.x_tao_schema.action != action:
        found.append(f"{file}: x_tao_schema.action: must be {action!r}, got {schema.x_tao_schema.action!r}")
    leaves = dict(_leaves(schema.properties, file, "", found))
    for key, leaf in leaves.items():
        if leaf and leaf.depends_on is not None and leaf.depends_on not in leaves:
            found.append(f"{file}: {key}: depends_on must be a key of this schema, got {leaf.depends_on!r}")
    named = [*schema.automl_default_parameters, *schema.automl_disabled_parameters, *flatten(schema.default)]
    found += [f"{file}: {key} is not a key of the schema" for key in named if key not in leaves]
    if action == "train" and set(schema.automl_default_parameters) != SEARCHED:
        found.append(f"{file}: automl_default_parameters: must be {', '.join(sorted(SEARCHED))}")
    for key, value in flatten(schema.default).items():
        leaf = leaves.get(key)
        if leaf and value != "???" and not leaf.fits(value):
            found.append(f"{file}: default: {value!r} is not a legal value of {key}")
    return leaves


def _leaves(
    properties: Mapping[str, Any], file: str, prefix: str, found: list[str]
) -> Iterator[tuple[str, Leaf | None]]:
    for name, node in properties.items():
        key = f"{prefix}{name}"
        if isinstance(node, dict) and ("properties" in node or "collection" in str(node.get("type", node))):
            section = _validated(_Collection, node, f"{file}: {key}", found)
            if section:
                yield from _leaves(section.properties, file, f"{key}.", found)
        else:
            yield key, _validated(Leaf, node, f"{file}: {key}", found)


def _check_info(
    folder: Path, info: DeployInfo, name: str, file: str, leaves: Mapping[str, Collection[str]], found: list[str]
) -> None:
    if info.name != name:
        found.append(f"{file}: name: must be {name!r}, got {info.name!r}")
    for action, entry in info.actions.items():
        where = f"{file}: actions.{action}"
        if entry.command != (command := f"mae {action} -e {{config_path}}"):
            found.append(f"{where}.command: must be {command!r}, got {entry.command!r}")
        known = leaves.get(action) or (*entry.inputs, *entry.outputs)
        strange = [key for key in (*entry.inputs, *entry.outputs) if key not in known]  # NVIDIA's SDK sets them
        found += [f"{where}: inputs and outputs must be keys of the spec, got {key}" for key in strange]
        if entry.execution and not (folder / entry.execution.script).is_file():
            found.append(f"{where}.execution.script: {entry.execution.script!r} does not exist")
        if entry.execution and "{config_path}" not in entry.execution.args:
            found.append(f'{where}.execution.args: must contain "{{config_path}}"')
    for action, path in info.spec_templates.items():
        if not (folder / path).is_file():
            found.append(f"{file}: spec_templates.{action}: {path!r} does not exist")


def _check_deploy(folder: Path, leaves: Mapping[str, Collection[str]], found: list[str]) -> None:
    guides = sorted(path.name.removesuffix(".md") for path in (folder / "references").glob("tao-deploy-*.md"))
    if not guides:
        found.append("references: there is no tao-deploy-*.md")
    for name in guides:
        file = f"references/{name}.skill_info.yaml"
        info = _read(folder, file, DeployInfo, found)
        if info is None:
            continue
        _check_info(folder, info, name, file, leaves, found)
        if info.automl_enabled:
            found.append(f"{file}: automl_enabled: must be false")
        for action, path in info.spec_templates.items():
            if not Path(path).name.startswith("spec_template_deploy_"):
                found.append(f"{file}: spec_templates.{action}: must be a spec_template_deploy_*.yaml, got {path!r}")
            elif (folder / path).is_file():
                template = _content(folder, path, found)
                if not isinstance(template, dict) or not isinstance(template.get(action), dict):
                    found.append(f"{path}: must have a section {action}")
