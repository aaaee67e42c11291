"""Check a skill folder: the contract's rules, and those of NVIDIA's AutoML runner (7.0 to 7.2) and skill bank.

``tests/nvidia`` runs NVIDIA's own code against the packaged folder. This module checks the same rules without it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

BODY_LIMIT, COMPATIBILITY_LIMIT, NAME_LIMIT, DESCRIPTION_LIMIT = 18_000, 500, 64, 1024
TYPES = ("string", "int", "float", "bool", "list", "categorical", "ordered_int", "collection")
TOP_LEVEL = (
    *("type", "default", "properties", "automl_default_parameters", "automl_disabled_parameters", "popular"),
    "x_tao_schema",
)
ORIGIN = ("action", "core_module", "model", "network_arch", "schema_action", "schema_version", "source")
SEARCHED = {f"train.optim.{n}" for n in ("lr", "weight_decay", "momentum", "warmup_epochs", "backbone_multiplier")}
CASE = {"id": str, "question": str, "expected_skill": str, "ground_truth": str, "expected_behavior": list}
_VALUES: dict[str, Any] = {
    "string": str, "int": int, "float": (int, float), "bool": bool, "list": list, "ordered_int": int
}  # fmt: skip
_NUMBERS = ("int", "float", "ordered_int")
_CONDITION = re.compile(r"(?:<|<=|>|>=) (depends_on|-?\d+(?P<fraction>\.\d+)?(?:e[+-]?\d+)?)")
_INFO = "references/skill_info.yaml"


def find_breaches(folder: Path) -> list[str]:
    """Return the broken rules of a skill folder as "FILE: rule, value", in a fixed order."""
    if not folder.is_dir():
        return [f"{folder}: is not a folder"]
    found: list[str] = []
    info = _load(folder, _INFO, found, dict) or {}
    actions = list(_mapping(info.get("actions")))
    found += _front(folder)
    leaves: dict[str, dict[str, Any]] = {action: {} for action in actions}
    schemas = [text for action in actions for text in _schema(folder, action, leaves[action])]
    if info:
        found += _info(folder, info, folder.name, _INFO, leaves)
    manifest = _load(folder, "schemas/manifest.json", found, dict)
    if manifest is not None and sorted(_mapping(manifest.get("actions"))) != sorted(actions):
        found.append(f"schemas/manifest.json: actions must be those of skill_info.yaml, {sorted(actions)}")
    found += schemas
    found += _deploy(folder, leaves)
    found += _evals(folder)
    return found


def _load(folder: Path, name: str, found: list[str], kind: type) -> Any:
    """Return the content of a JSON or YAML file; None where it cannot be used, which is noted."""
    try:
        text = (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found.append(f"{name}: cannot be read: {getattr(error, 'strerror', None) or 'not text'}")
        return None
    try:
        content = json.loads(text, parse_constant=_refuse) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        found.append(f"{name}: does not parse: {str(error).splitlines()[0]}")
        return None
    if not isinstance(content, kind):
        found.append(f"{name}: must be {'a mapping' if kind is dict else 'a list'} at its top level")
        return None
    return content


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not allowed: bounds are finite")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _front(folder: Path) -> Iterator[str]:
    file = "SKILL.md"
    try:
        text = (folder / file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        yield f"{file}: cannot be read"
        return
    parts = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    if not parts:
        yield f"{file}: must begin with frontmatter between two lines of ---"
        return
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        yield f"{file}: the frontmatter does not parse: {str(error).splitlines()[0]}"
        return
    if not isinstance(front, dict):
        yield f"{file}: the frontmatter must be a mapping"
        return
    yield from (f"{file}: {text}" for text in _fields(folder, front))
    if len(parts[2]) > BODY_LIMIT:
        yield f"{file}: the body must have up to {BODY_LIMIT} characters, got {len(parts[2])}"
    if not re.search(r"```bash\n(?:(?!```).*\n)*?python3? -m venv ", parts[2]):
        yield f"{file}: the body must have a quick start, a bash block with python -m venv"
    if home := re.search(r"/(?:home|Users)/\w+", text):
        yield f"{file}: {home[0]} is a path of one machine; write a relative path, or /data"


def _fields(folder: Path, front: dict[str, Any]) -> Iterator[str]:
    name, description, compatibility = (front.get(key) for key in ("name", "description", "compatibility"))
    if name != folder.name:
        yield f"name must be the folder's, {folder.name!r}, got {name!r}"
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(name)) or len(str(name)) > NAME_LIMIT:
        yield f"name must be lower-case words joined by hyphens, up to {NAME_LIMIT} characters"
    if not isinstance(description, str) or not 0 < len(description) <= DESCRIPTION_LIMIT:
        yield f"description must be a text of 1 to {DESCRIPTION_LIMIT} characters"
    elif set("<>") & set(description):
        yield "description must not hold angle brackets"
    for key in ("license", "allowed-tools"):
        if not front.get(key):
            yield f"{key} must be given"
    if not isinstance(compatibility, str) or not 0 < len(compatibility) <= COMPATIBILITY_LIMIT:
        yield f"compatibility must be a text of up to {COMPATIBILITY_LIMIT} characters"
    metadata = _mapping(front.get("metadata"))
    version, tags = metadata.get("version"), front.get("tags")
    if not isinstance(version, str) or not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f'metadata.version must be a text "x.y.z", got {version!r}'
    if not metadata.get("author"):
        yield "metadata.author must be given"
    if not isinstance(tags, list) or not tags or not all(isinstance(tag, str) and tag for tag in tags):
        yield "tags must be a list of at least one text"


def _info(folder: Path, info: dict[str, Any], name: str, file: str, leaves: dict[str, dict[str, Any]]) -> Iterator[str]:
    expected = {"name": name, "network_arch": "mae", "automl_enabled": file == _INFO}
    expected |= {"data_format": "ssl", "gpu_spec_key": "train.num_gpus"} if file == _INFO else {}
    for key, value in expected.items():
        if info.get(key) != value:
            yield f"{file}: {key} must be {value!r}, got {info.get(key)!r}"
    mappings = ("actions", "spec_params", "spec_templates")
    for key in ("description", *mappings, *(("data_sources", "spec_shorthand_keys") if file == _INFO else ())):
        if not info.get(key) or (key in mappings and not isinstance(info[key], dict)):
            yield f"{file}: {key} must be {'a mapping' if key in mappings else 'given'}"
    for action, entry in _mapping(info.get("actions")).items():
        yield from (f"{file}: actions.{action}{text}" for text in _action(folder, action, entry, leaves))
    for action, sources in _mapping(info.get("data_sources")).items():
        for key, rule in _mapping(sources).items():
            if not _mapping(rule).get("source") or not isinstance(rule.get("path"), str):
                yield f"{file}: data_sources.{action}.{key} must have a source and a path, the name of a file"
    for action, path in _mapping(info.get("spec_templates")).items():
        if not isinstance(path, str) or not (folder / path).is_file():
            yield f"{file}: spec_templates.{action} names {path!r}, which does not exist"


def _action(folder: Path, action: str, entry: Any, leaves: dict[str, dict[str, Any]]) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield " must be a mapping"
        return
    expected = {"command": f"mae {action} -e {{config_path}}", "config_format": "yaml", "mode": "config"}
    for key, value in expected.items():
        if entry.get(key) != value:
            yield f".{key} must be {value!r}, got {entry.get(key)!r}"
    for key in ("inputs", "outputs", "upload_excludes"):
        if not entry.get(key):
            yield f".{key} must be given"
    for key in ("inputs", "outputs"):  # names that NVIDIA's SDK looks up in the spec, or writes into it
        for name, declared in _mapping(entry.get(key)).items():
            if leaves.get(action) and name not in leaves[action]:
                yield f".{key} names {name}, which is no spec key"
            if _mapping(declared).get("type") not in ("folder", "file"):
                yield f".{key}.{name} must have the type folder or file"
    how = entry.get("execution")
    if how is None:
        return
    if not isinstance(how, dict) or how.get("type") != "python_script" or how.get("config_format") != "yaml":
        yield ".execution must have type python_script and config_format yaml"
        return
    if not isinstance(how.get("script"), str) or not (folder / how["script"]).is_file():
        yield f".execution.script names {how.get('script')!r}, which does not exist"
    if not isinstance(how.get("args"), list) or "{config_path}" not in how["args"]:
        yield '.execution.args must be a list with "{config_path}"'


def _schema(folder: Path, action: str, leaves: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a schema and its template; its leaves are put into ``leaves``."""
    found: list[str] = []
    file, template_file = f"schemas/{action}.schema.json", f"references/spec_template_{action}.yaml"
    schema, template = _load(folder, file, found, dict), _load(folder, template_file, found, dict)
    yield from found
    if schema is None:
        return
    for key in TOP_LEVEL:
        if key not in schema:
            yield f"{file}: {key} must be given"
    if schema.get("type") != "object":
        yield f"{file}: type must be 'object', got {schema.get('type')!r}"
    if template is not None and template != schema.get("default"):
        yield f"{template_file}: must equal the default of {file}"
    origin = _mapping(schema.get("x_tao_schema"))
    for key in ORIGIN:
        if not origin.get(key):
            yield f"{file}: x_tao_schema.{key} must be given"
    if origin.get("action") != action:
        yield f"{file}: x_tao_schema.action must be {action!r}, got {origin.get('action')!r}"
    yield from (f"{file}: {text}" for text in _collection(schema, "", leaves))
    for key, leaf in leaves.items():
        yield from (f"{file}: {key}: {text}" for text in _leaf(leaf, leaves))
    for name in ("automl_default_parameters", "automl_disabled_parameters"):
        for key in schema.get(name) or ():
            if key not in leaves:
                yield f"{file}: {name} names {key}, which is no leaf"
    if action == "train" and set(schema.get("automl_default_parameters") or ()) != SEARCHED:
        yield f"{file}: automl_default_parameters must be {', '.join(sorted(SEARCHED))}"
    for key, value in _flat(schema.get("default")):
        if key not in leaves:
            yield f"{file}: default names {key}, which is no leaf"
        elif value not in ("???", leaves[key].get("default")) and not _fits(value, leaves[key]):
            yield f"{file}: default: {value!r} is no legal value of {key}"


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in _mapping(tree).items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _collection(node: dict[str, Any], prefix: str, leaves: dict[str, Any]) -> Iterator[str]:
    if not _mapping(node.get("properties")):
        yield f"{prefix.removesuffix('.') or 'the schema'} must have properties, an object that is not empty"
    for name, inner in _mapping(node.get("properties")).items():
        key = f"{prefix}{name}"
        if not isinstance(inner, dict):
            yield f"{key} must be an object"
        elif "properties" in inner or _kind(inner) == "collection":
            if inner.get("type") != "collection":
                yield f"{key}: a nested object's type must be 'collection', got {inner.get('type')!r}"
            yield from _collection(inner, f"{key}.", leaves)
        else:
            leaves[key] = inner


def _leaf(leaf: dict[str, Any], leaves: dict[str, Any]) -> Iterator[str]:
    for key in ("default", "description", "title"):
        if key not in leaf:
            yield f"{key} must be given"
    kind, options, weights = _kind(leaf), leaf.get("enum"), leaf.get("option_weights")
    if isinstance(leaf.get("type"), list):
        yield "type must not be a list; an optional leaf uses anyOf"
    elif "type" in leaf and "anyOf" in leaf:
        yield "type and anyOf must not both be given"
    elif kind not in TYPES:
        said = leaf.get("type", leaf.get("anyOf"))
        yield f"type must be one of {', '.join(TYPES)}, or an anyOf of one of them and null, got {said!r}"
    elif leaf.get("default") != "???" and not _fits(leaf.get("default"), leaf):
        yield f"the default {leaf.get('default')!r} is not of type {kind}"
    for key in ("minimum", "maximum"):
        if key in leaf and (not _is_finite(leaf[key]) or kind not in _NUMBERS):
            yield f"{key} must be a finite number, of a leaf that is one, got {leaf[key]!r}"
    choices = options if isinstance(options, list) else []
    needed = "enum" in leaf or kind in ("categorical", "ordered_int")
    if needed and not (choices and all(_is_of_type(choice, leaf) for choice in choices)):
        yield f"enum must be a list of legal values that is not empty, got {options!r}"
    shares = weights if isinstance(weights, list) else []
    good = len(shares) == len(choices) and all(_is_finite(share) and share >= 0 for share in shares) and any(shares)
    if "option_weights" in leaf and not good:
        yield "option_weights must have one number >= 0 for each value of enum, and one above 0"
    for key in ("popular", "automl_enabled"):
        if not isinstance(leaf.get(key, True), bool):
            yield f"{key} must be true or false, got {leaf[key]!r}"
    if leaf.get("automl_enabled") is True and not choices and not {"minimum", "maximum"} <= leaf.keys():
        yield "automl_enabled needs a minimum and a maximum, or an enum"
    condition, other = leaf.get("math_cond"), leaf.get("depends_on")
    if other is not None and other not in leaves:
        yield f"depends_on must be a key of this schema, got {other!r}"
    if condition is None:
        return
    match = _CONDITION.fullmatch(str(condition))
    if not match or (match["fraction"] and kind == "int"):
        number = "an integer" if kind == "int" else "a number"
        yield f"math_cond must be a sign and {number}, or a sign and depends_on, got {condition!r}"
    elif match[1] == "depends_on" and other is None:
        yield f"math_cond {condition!r} needs depends_on, the key to compare with"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(leaf: dict[str, Any]) -> Any:
    """Return the one type of a leaf besides null; None if there is not exactly one."""
    if "anyOf" not in leaf:
        return leaf.get("type") if isinstance(leaf.get("type"), str) else None
    options = leaf["anyOf"] if isinstance(leaf["anyOf"], list) else []
    kinds = [_mapping(option).get("type") for option in options if _mapping(option).get("type") != "null"]
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], str) else None


def _fits(value: Any, leaf: dict[str, Any]) -> bool:
    if value is None:
        return {"type": "null"} in (leaf.get("anyOf") or ())
    return _is_of_type(value, leaf) and ("enum" not in leaf or value in (leaf["enum"] or ()))


def _is_of_type(value: Any, leaf: dict[str, Any]) -> bool:
    """Return whether a value, or a choice of an enum, has the type of the leaf and lies between its bounds."""
    kind, low, high = _kind(leaf), leaf.get("minimum"), leaf.get("maximum")
    if kind == "categorical":
        return True
    if kind not in _VALUES or not isinstance(value, _VALUES[kind]) or (isinstance(value, bool) and kind != "bool"):
        return False
    return not ((_is_finite(low) and value < low) or (_is_finite(high) and value > high))


def _deploy(folder: Path, leaves: dict[str, dict[str, Any]]) -> Iterator[str]:
    guides = sorted(path.name for path in (folder / "references").glob("tao-deploy-*.md"))
    if not guides:
        yield "references: there is no tao-deploy-*.md"
    for guide in guides:
        name = guide.removesuffix(".md")
        found: list[str] = []
        file = f"references/{name}.skill_info.yaml"
        info = _load(folder, file, found, dict) or {}
        if info:
            found += _info(folder, info, name, file, leaves)
        for action, path in _mapping(info.get("spec_templates")).items():
            if not Path(str(path)).name.startswith("spec_template_deploy_"):
                found.append(f"{file}: spec_templates.{action} must be a spec_template_deploy_*.yaml, got {path!r}")
            elif (folder / path).is_file():
                template = _load(folder, path, found, dict)
                if template is not None and not isinstance(template.get(action), dict):
                    found.append(f"{path}: must have a section {action}")
        yield from found


def _evals(folder: Path) -> Iterator[str]:
    found: list[str] = []
    file = "evals/evals.json"
    cases = _load(folder, file, found, list)
    yield from found
    if cases == []:
        yield f"{file}: must hold at least one case"
    seen: set[str] = set()
    for place, case in enumerate(cases or ()):
        if not all(isinstance(_mapping(case).get(key), kind) and case[key] for key, kind in CASE.items()):
            yield f"{file}: case {place} must have {', '.join(CASE)}; the last is a list that is not empty"
        elif case["id"] in seen:
            yield f"{file}: the id {case['id']!r} is given twice"
        else:
            seen.add(case["id"])
