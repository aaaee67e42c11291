"""Generate parts of the skill: schemas, templates, ``skill_info.yaml``, and tables, ranges and version in SKILL.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from openmae._version import __version__
from openmae.errors import UserError
from openmae.skill import COMMAND, FOLDER, NAME
from openmae.skill.info import DEPLOY, DEPLOY_ACTIONS, data_rows, deploy_info, parameter_rows, skill_info
from openmae.spec.actions import ACTIONS
from openmae.spec.describe import fields, traits
from openmae.spec.json_schema import SCHEMA_VERSION, action_schema
from openmae.spec.yaml_reader import write_text

_MARK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_VERSION = re.compile(r'(?m)^(  version: )".*"$')
_TEMPLATE_HEAD = {
    "train": "# Every option that may be typed with its default. Set the data sources; keep what you know to change.\n",
    "other": "# Set what is ???, and the data source. The model's shape comes from the checkpoint.\n",
}


class _Plain(yaml.SafeDumper):
    """Short lists on one line, no references between parts."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Plain.add_representer(
    list,
    lambda dumper, data: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", data, flow_style=not any(isinstance(item, dict | list) for item in data)
    ),
)


def render(folder: Path = FOLDER) -> dict[str, str]:
    """Every generated file of the skill: path below the folder -> text.

    Args:
        folder: of the skill, whose SKILL.md has the places to fill.

    Raises:
        UserError: SKILL.md is missing, or a place in it has a name that nothing fills.
    """
    schemas = {action: action_schema(action) for action in ACTIONS}
    files = {f"schemas/{action}.schema.json": _json(schema) for action, schema in schemas.items()}
    files["schemas/manifest.json"] = _json(_manifest())
    for action, schema in schemas.items():
        files[f"references/spec_template_{action}.yaml"] = _template(action, schema["default"])
    for action in DEPLOY_ACTIONS:
        files[f"references/spec_template_deploy_{action}.yaml"] = _template(action, schemas[action]["default"])
    files["references/skill_info.yaml"] = _yaml(skill_info())
    files[f"references/{DEPLOY}.skill_info.yaml"] = _yaml(deploy_info())
    files["SKILL.md"] = _fill(folder / "SKILL.md")
    return files


def differences(folder: Path = FOLDER) -> list[str]:
    """Generated files that are missing or not as they would be made now, and files that nothing knows."""
    made = render(folder)
    wrong = [name for name, text in made.items() if _read(folder / name) != text]
    known = {*made, "evals/evals.json", f"references/{DEPLOY}.md", "scripts/run_action.py"}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    strange = {name for name in there - known if "__pycache__" not in name}
    return sorted({*wrong, *strange})


def build(folder: Path = FOLDER) -> list[str]:
    """Write every generated file that is not right; returns their names.

    Raises:
        UserError: the folder cannot be written.
    """
    changed = []
    for name, text in render(folder).items():
        path = folder / name
        if _read(path) == text:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            fix = f"Run `{COMMAND}` in a clone of the repository that you may write to."
            raise UserError(f"{path} cannot be written: {error.strerror}.", fix) from error
        changed.append(name)
    return changed


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _manifest() -> dict[str, Any]:
    return {
        "skill": NAME,
        "network_arch": "mae",
        "schema_version": SCHEMA_VERSION,
        "actions": {
            action: {
                "schema": f"schemas/{action}.schema.json",
                "spec_template": f"references/spec_template_{action}.yaml",
            }
            for action in ACTIONS
        },
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _yaml(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=110)
    return f"# Made by `{COMMAND}`.\n{text}"


def _template(action: str, default: dict[str, Any]) -> str:
    head = _TEMPLATE_HEAD.get(action, _TEMPLATE_HEAD["other"])
    return f"# Made by `{COMMAND}`, from the default of schemas/{action}.schema.json.\n{head}{write_text(default)}"


def _fill(path: Path) -> str:
    text = _read(path)
    if text is None:
        raise UserError(f"There is no {path}.", "It is written by hand, and its tables are filled in: restore it.")
    tables = {"data": _data_table, "parameters": _parameter_table, "search": _search_ranges}

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables:
            raise UserError(f"{path.name}: nothing fills a place named {name!r}.", f"Use one of: {', '.join(tables)}.")
        return f"{match[1]}{tables[name]()}{match[3]}"

    return _VERSION.sub(rf'\1"{__version__}"', _MARK.sub(table, text))


def _data_table() -> str:
    return _markdown(("action", "spec key", "source", "file"), data_rows())


def _parameter_table() -> str:
    grouped: dict[tuple[str, str], list[str]] = {}
    for action, key, function in parameter_rows():
        grouped.setdefault((key, function), []).append(action)
    every = len(ACTIONS)
    rows = [
        ("every action" if len(actions) == every else ", ".join(actions), f"`{key}`", function)
        for (key, function), actions in grouped.items()
    ]
    return _markdown(("action", "key", "function"), rows)


def _search_ranges() -> str:
    """Return ``custom_param_ranges`` for NVIDIA's runner: numbers between which its samplers draw uniformly."""
    ranges: dict[str, dict[str, Any]] = {}
    for key in fields():
        search = traits(key).search
        if traits(key).automl is True and search is not None:
            ranges[key] = {"valid_min": search.low, "valid_max": search.high}
    # Their samplers compare with another key only where both are searched, else with this key's own default.
    ranges["train.optim.warmup_epochs"] |= {"valid_max": fields()["train.num_epochs"].default // 5, "depends_on": ""}
    lines = [f'    "{key}": {json.dumps(value)},\n' for key, value in ranges.items()]
    return f"```python\ncustom_param_ranges = {{\n{''.join(lines)}}}\n```\n"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
