"""Validation of a skill folder, by the rules of NVIDIA's AutoML runner (7.0 to 7.2), its skill bank and OpenMAE.

The structure of each file is declared as a model; functions check rules across files. ``tests/nvidia`` runs NVIDIA's
own code on the packaged folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
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
_NUMBERS = ("int", "float", "ordered_int")

Kind = Literal["string", "int", "float", "bool", "list", "categorical", "ordered_int"]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Mapped = Annotated[dict[str, Any], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


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


class _Info(_Part):
    name: Text
    description: Text
    network_arch: Literal["mae"]
    actions: Annotated[dict[str, _Action], Field(min_length=1)]
    spec_params: Mapped
    spec_templates: dict[str, Text]


class DeployInfo(_Info):
    """``references/tao-deploy-*.skill_info.yaml``."""

    automl_enabled: Literal[False]


class SkillInfo(_Info):
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


Cases = Annotated[list[_Case], Field(min_length=1)]


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


_OneType = Annotated[dict[Literal["type"], Kind | Literal["null"]], Field(min_length=1)]


class Leaf(_Part):
    """An option in a schema."""

    title: Text
    description: str
    default: Any
    type: Kind | None = None
    any_of: list[_OneType] = Field([], alias="anyOf")
    minimum: float = -math.inf
    maximum: float = math.inf
    enum: list[Any] = Field([], min_length=1)
    option_weights: list[Annotated[float, Field(ge=0)]] = Field([], min_length=1)
    math_cond: str = Field("", pattern=_CONDITION)
    depends_on: str = ""
    popular: bool = False
    automl_enabled: bool = False

    @property
    def kinds(self) -> list[str]:
        """The types except null; a valid leaf has exactly one."""
        return [self.type] if self.type else [part["type"] for part in self.any_of if part["type"] != "null"]

    def fits(self, value: Any) -> bool:
        """Return whether a value has the type and is within the bounds; it need not be in ``enum``."""
        if value is None:
            return {"type": "null"} in self.any_of
        kind = self.kinds[0]
        if not isinstance(value, _VALUES[kind]) or (isinstance(value, bool) and kind not in ("bool", "categorical")):
            return False
        return kind not in _NUMBERS or self.minimum <= value <= self.maximum

    def allows(self, value: Any) -> bool:
        """Return whether a value is legal; ``???`` stands for one that is not known yet."""
        return value == "???" or (self.fits(value) and (value is None or not self.enum or value in self.enum))

    @model_validator(mode="after")
    def _check(self) -> Leaf:
        if problems := list(self._problems()):
            raise PydanticCustomError("rule", "{text}", {"text": "; ".join(problems)})
        return self

    def _problems(self) -> Iterator[str]:
        if len(self.kinds) != 1 or bool(self.type) == bool(self.any_of):
            yield "must have a type, or an anyOf of one type and null"
            return
        kind, choices, weights = self.kinds[0], self.enum, self.option_weights
        if not self.allows(self.default):
            yield f"the default {self.default!r} is not a legal value"
        if kind not in _NUMBERS and (self.minimum, self.maximum) != (-math.inf, math.inf):
            yield "minimum and maximum are for numbers"
        if kind in ("categorical", "ordered_int") and not choices:
            yield "enum is missing"
        if not all(map(self.fits, choices)):
            yield f"enum must be a list of legal values, got {choices}"
        if weights and (len(weights) != len(choices) or not any(weights)):
            yield f"option_weights must have one number for each value of enum, one of them above 0, got {weights}"
        if self.automl_enabled and not choices and math.inf in (-self.minimum, self.maximum):
            yield "automl_enabled needs a minimum and a maximum, or an enum"
        if kind == "int" and "." in self.math_cond:
            yield f"math_cond must compare with an integer, got {self.math_cond!r}"
        if self.math_cond.endswith("depends_on") and not self.depends_on:
            yield f"math_cond {self.math_cond!r} needs depends_on, the key to compare with"


def find_breaches(folder: Path) -> list[str]:
    """Return the broken rules of a skill folder as "FILE: key: rule, value", in a fixed order."""
    if not folder.is_dir():
        return [f"{folder}: is not a folder"]
    check = _Check(folder)
    check.skill_md()
    info: SkillInfo | None = check.read(_INFO, SkillInfo)
    actions = list(info.actions) if info else []
    for action in actions:
        check.schema(action)
    if info:
        check.info(info, folder.name, _INFO, "references/spec_template_")
    manifest: _Manifest | None = check.read("schemas/manifest.json", _Manifest)
    if info and manifest and sorted(manifest.actions) != sorted(actions):
        check.found.append(f"schemas/manifest.json: actions: must be those of skill_info.yaml, {sorted(actions)}")
    guides = sorted(path.stem for path in (folder / "references").glob("tao-deploy-*.md"))
    check.found += [] if guides else ["references: there is no tao-deploy-*.md"]
    for name in guides:
        file = f"references/{name}.skill_info.yaml"
        deploy: DeployInfo | None = check.read(file, DeployInfo)
        if deploy:
            check.info(deploy, name, file, "references/spec_template_deploy_")
    cases: list[_Case] = check.read("evals/evals.json", Cases) or []
    ids = [case.id for case in cases]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    return [*check.found, *(f"evals/evals.json: the id {name!r} occurs twice" for name in twice)]


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not allowed: bounds are finite")


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": partial(json.loads, parse_constant=_refuse),
    ".yaml": yaml.safe_load,
    ".md": str,
}


class _Check:
    """A skill folder, the broken rules found in it, and what its valid schemas contain, by action."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[str] = []
        self.defaults: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, set[str]] = {}

    def read(self, file: str, model: Any = Any) -> Any:
        """Return the content of a file as ``model``; None, after a report, if it cannot be read or is not one."""
        try:
            content = _PARSERS[Path(file).suffix]((self.folder / file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            self.found.append(f"{file}: cannot be read: {getattr(error, 'strerror', None) or 'not text'}")
        except (ValueError, yaml.YAMLError) as error:
            self.found.append(f"{file}: does not parse: {str(error).splitlines()[0]}")
        else:
            return self.validated(model, content, file)
        return None

    def validated(self, model: Any, content: Any, where: str) -> Any:
        """Return ``content`` as ``model``; None, after a report, if it is not one."""
        try:
            return TypeAdapter(model).validate_python(content)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                key = ".".join(map(str, detail["loc"]))
                value = "" if detail["type"] in ("missing", "rule") else f", got {detail['input']!r:.60}"
                self.found.append(": ".join(filter(None, (where, key, f"{detail['msg']}{value}"))))
            return None

    def skill_md(self) -> None:
        """Check SKILL.md."""
        file = "SKILL.md"
        text = self.read(file) or ""
        parts = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
        if not parts:
            self.found.append(f"{file}: must begin with frontmatter between two lines of ---")
            return
        try:
            front = self.validated(FrontMatter, yaml.safe_load(parts[1]), file)
        except yaml.YAMLError as error:
            self.found.append(f"{file}: the frontmatter does not parse: {str(error).splitlines()[0]}")
            return
        if front and front.name != self.folder.name:
            self.found.append(f"{file}: name: must be the folder's, {self.folder.name!r}, got {front.name!r}")
        if len(parts[2]) > BODY_LIMIT:
            self.found.append(f"{file}: the body must have up to {BODY_LIMIT} characters, got {len(parts[2])}")
        if not re.search(r"```bash\n(?:(?!```).*\n)*?python3? -m venv ", parts[2]):
            self.found.append(f"{file}: the body must have a quick start, a bash block with python -m venv")
        if home := re.search(r"/(?:home|Users)/\w+", text):
            self.found.append(f"{file}: {home[0]} is a path of one machine; write a relative path, or /data")

    def schema(self, action: str) -> None:
        """Check the schema of an action."""
        file = f"schemas/{action}.schema.json"
        schema: Schema | None = self.read(file, Schema)
        if schema is None:
            return
        if schema.x_tao_schema.action != action:
            self.found.append(f"{file}: x_tao_schema.action: must be {action!r}, got {schema.x_tao_schema.action!r}")
        leaves = dict(self.leaves(schema.properties, file, ""))
        for key, leaf in leaves.items():
            if leaf and leaf.depends_on and leaf.depends_on not in leaves:
                self.found.append(f"{file}: {key}: depends_on must be a key of this schema, got {leaf.depends_on!r}")
        defaults = flatten(schema.default)
        named = [*schema.automl_default_parameters, *schema.automl_disabled_parameters, *defaults]
        self.found += [f"{file}: {key} is not a key of the schema" for key in named if key not in leaves]
        if action == "train" and set(schema.automl_default_parameters) != SEARCHED:
            self.found.append(f"{file}: automl_default_parameters: must be {', '.join(sorted(SEARCHED))}")
        for key, value in defaults.items():
            if (leaf := leaves.get(key)) and not leaf.allows(value):
                self.found.append(f"{file}: default: {value!r} is not a legal value of {key}")
        self.defaults[action], self.keys[action] = schema.default, set(leaves)

    def leaves(self, properties: Mapping[str, Any], file: str, prefix: str) -> Iterator[tuple[str, Leaf | None]]:
        """Yield the leaves of a schema with their keys; an invalid leaf is None."""
        for name, node in properties.items():
            key = f"{prefix}{name}"
            if isinstance(node, dict) and ("properties" in node or "collection" in str(node.get("type", node))):
                if section := self.validated(_Collection, node, f"{file}: {key}"):
                    yield from self.leaves(section.properties, file, f"{key}.")
            else:
                yield key, self.validated(Leaf, node, f"{file}: {key}")

    def info(self, info: _Info, name: str, file: str, templates: str) -> None:
        """Check a skill_info.yaml across files; ``templates`` is how the paths of its templates begin."""
        if info.name != name:
            self.found.append(f"{file}: name: must be {name!r}, got {info.name!r}")
        for action, entry in info.actions.items():
            where = f"{file}: actions.{action}"
            if entry.command != (command := f"mae {action} -e {{config_path}}"):
                self.found.append(f"{where}.command: must be {command!r}, got {entry.command!r}")
            keys = (*entry.inputs, *entry.outputs)  # NVIDIA's SDK sets them
            strange = [key for key in keys if key not in self.keys.get(action, keys)]
            self.found += [f"{where}: inputs and outputs must be keys of the spec, got {key}" for key in strange]
            if entry.execution and not (self.folder / entry.execution.script).is_file():
                self.found.append(f"{where}.execution.script: {entry.execution.script!r} does not exist")
            if entry.execution and "{config_path}" not in entry.execution.args:
                self.found.append(f'{where}.execution.args: must contain "{{config_path}}"')
            template = f"{templates}{action}.yaml"
            if info.spec_templates.get(action) != template:
                self.found.append(
                    f"{file}: spec_templates.{action}: must be {template!r}, got {info.spec_templates.get(action)!r}"
                )
            if self.read(template) != self.defaults.get(action):
                self.found.append(f"{template}: must equal the default of schemas/{action}.schema.json")
