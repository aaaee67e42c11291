"""Descriptions of the options: the table of keys, types and bounds, and spec templates."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from openmae.spec.actions import ACTIONS, get_action
from openmae.spec.option import FileUse, Section, Traits, TypeWords
from openmae.spec.schema import ExperimentSpec

_WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}

#: Options of TAO's older entrypoints, and the names of the keys that they set.
_OPTIONS_OF_TAO = {
    "r": "results_dir",
    "k": "encryption_key",
    "key": "encryption_key",
    "g": "num_gpus",
    "gpus": "num_gpus",
    "gpu_index": "gpu_ids",
}
#: Options of ``dataset`` that evaluate and inference use.
_INFERENCE_DATA = {
    "dataset.batch_size",
    "dataset.num_workers_per_gpu",
    "dataset.max_corrupt_fraction",
    "dataset.max_megapixels",
    "dataset.augmentation.input_size",
    "dataset.augmentation.mean",
    "dataset.augmentation.std",
}


class KeyRow(NamedTuple):
    """One option, in words."""

    key: str
    type: str
    default: str
    bounds: str
    help: str


@cache
def fields() -> dict[str, FieldInfo]:
    """Return every option by its dotted key, in the order of the schema."""
    return dict(_walk(ExperimentSpec, ""))


@cache
def sections() -> frozenset[str]:
    """Return the dotted names of all sections."""
    return frozenset(key.rsplit(".", depth)[0] for key in fields() for depth in range(1, key.count(".") + 1))


def traits(key: str) -> Traits:
    """Return the declared behaviour of an option."""
    extra = fields()[key].json_schema_extra
    assert isinstance(extra, dict), f"{key} is not declared with option()"
    return cast("Traits", extra["traits"])


@cache
def file_use(key: str) -> FileUse | None:
    """Return the use of the file or folder that an option names; None if it names none."""
    return next((item for item in fields()[key].metadata if isinstance(item, FileUse)), None)


def choice_values(field: FieldInfo) -> list[Any]:
    """Return the values of an option that has choices; empty if it has none."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and isinstance(extra.get("enum"), list):
        return list(cast("list[Any]", extra["enum"]))
    kinds = [field.annotation, *get_args(field.annotation)]
    return [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the values of an option that has choices, as text; empty if it has none."""
    return tuple(map(str, choice_values(field)))


def type_words(field: FieldInfo) -> str:
    """Return the type of an option: "integer", "number", "text", "true or false", "list of numbers", "choice"."""
    return "choice" if choices(field) else _words(field.rebuild_annotation())


def bounds(field: FieldInfo) -> dict[str, float]:
    """Return the bounds of an option: ``gt``, ``ge``, ``lt`` or ``le`` -> number."""
    found = ((name, getattr(item, name, None)) for name in _SIGNS for item in field.metadata)
    return {name: number for name, number in found if number is not None}


def bounds_words(field: FieldInfo) -> str:
    """Return the bounds of an option, such as "> 0 and <= 1", or its choices; empty if it has none."""
    if choices(field):
        return ", ".join(filter(None, choices(field)))
    return " and ".join(f"{_SIGNS[name]} {number:g}" for name, number in bounds(field).items())


def why_illegal(key: str, values: Iterable[Any]) -> str:
    """Return the rule of an option that the first illegal value breaks; empty if all are legal."""
    adapter: TypeAdapter[Any] = TypeAdapter(fields()[key].rebuild_annotation())
    for value in values:
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            return f"{value!r} is not a legal value of {key}: {error.errors()[0]['msg'].lower()}."
    return ""


def similar(word: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Return up to three names similar to a word, ignoring case."""
    by_lower = {name.lower(): name for name in names}
    return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=cutoff)]


def similar_keys(key: str) -> list[str]:
    """Return up to three options or sections that an unknown key may stand for: its neighbours, or namesakes."""
    names = [*fields(), *sorted(sections())]
    parent, _, leaf = key.rpartition(".")
    neighbours = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == parent}
    near = [neighbours[name] for name in similar(leaf, neighbours)]
    near += similar(key, [name for name in names if name.rpartition(".")[2] == leaf], cutoff=0.0)
    return list(dict.fromkeys(near or similar(key, names)))[:3]


def key_of_option(option: str, section: str) -> str:
    """Return the override that replaces a command-line option such as ``-g`` or ``--num_epochs=3``; empty if unknown.

    If several sections have a key of that name, ``section`` is preferred.
    """
    name, _, value = option.lstrip("-").partition("=")
    if name in ("config-path", "config-name"):
        return "-e SPEC"
    name = name.replace("-", "_")
    name = _OPTIONS_OF_TAO.get(name, name)
    keys = [key for key in fields() if name in (key, key.rpartition(".")[2])]
    if name == "num_gpus" and f"{section}.num_gpus" not in keys:
        keys = [f"{section}.gpu_id"]
    keys.sort(key=lambda key: (key != name, not key.startswith(f"{section}."), not key.startswith("train.")))
    shown = "VALUE" if not value or "encryption_key" in keys else value
    return f"{keys[0]}={shown}" if keys else ""


def keys_table(action: str | None = None) -> list[KeyRow]:
    """Return the rows of all options, or of those that an action uses."""
    return [
        KeyRow(
            key,
            type_words(field),
            "unset" if field.default is None else _yaml_value(field.default),
            bounds_words(field),
            field.description or "",
        )
        for key, field in fields().items()
        if is_used(key, action)
    ]


def template(action: str) -> str:
    """Return a commented spec for an action. Popular options are active; the others are comments with their default.

    ``???`` marks the values that have to be filled in.

    Raises:
        SpecError: there is no such action.
    """
    needed = {group[0] for group in get_action(action).required}
    lines = [
        f"# mae {action} -e this_file.yaml [key=value ...]",
        "# Replace each ???. A commented line shows an option and its default.",
        *(["# train.recipe chooses the options marked with (recipe)."] if action == "train" else []),
    ]
    keys = [key for key in fields() if _is_in_template(key, action)]
    # an active default of an option that the checkpoint determines would contradict the checkpoint
    own = [key for key in keys if action == "train" or key.split(".")[0] in (action, "results_dir")]
    active = needed | {key for key in own if traits(key).popular and not (action == "train" and traits(key).recipe)}
    opened: list[str] = []
    for key in keys:
        *parents, name = key.split(".")
        for depth in range(len(parents)):
            path = ".".join(parents[: depth + 1])
            if path in opened:
                continue
            opened.append(path)
            used = any(k.startswith(f"{path}.") for k in active)
            lines += ["", f"{path}:"] if depth == 0 else [f"{'  ' * depth}{'' if used else '# '}{parents[depth]}:"]
        field = fields()[key]
        value = "???" if key in needed else _yaml_value(field.default)
        mark = "" if key in active else "# "
        lines.append(f"{'  ' * len(parents)}{mark}{name}: {value}".ljust(44) + f"  # {_comment(field)}")
    return "\n".join(lines) + "\n"


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _words(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return next((str(part) for part in parts if isinstance(part, TypeWords)), None) or _words(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts if part is not type(None))
    if origin is tuple:
        return f"list of {_PLURALS[parts[0]]}"
    return _WORDS[origin or annotation]


def _yaml_value(value: Any) -> str:
    if value is None:
        return "null"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
    return '""' if value == "" else text


def is_used(key: str, action: str | None) -> bool:
    """Return whether an action may use an option; without an action, True."""
    if action in (None, "train"):
        return action is None or key.split(".")[0] not in ACTIONS[1:]
    return _is_in_template(key, action) or key == "train.seed"  # the seed of the masks


def _is_in_template(key: str, action: str) -> bool:
    """Return whether the template of an action lists an option.

    The template of train lists all training options; any other lists the action's section, and the options that reading
    a model and data may need.
    """
    section = key.split(".")[0]
    if key == "encryption_key" or traits(key).compat:
        return False
    if key.endswith("_data_sources"):
        return key in [data.key for data in get_action(action).data]
    if action == "train" or section == action:
        return section not in ACTIONS or section == action
    if section == "dataset":
        return action in ("evaluate", "inference") and key in _INFERENCE_DATA
    return section in ("results_dir", "model") or key == "train.stage"


def _comment(field: FieldInfo) -> str:
    text, allowed = field.description or "", choices(field)
    if len(allowed) > 6:
        return f"{text} [choices: mae spec keys]"
    if allowed and all(choice in text for choice in allowed):
        return text
    return f"{text} [{bounds_words(field)}]" if bounds_words(field) else text
