"""The schema in words: type and bounds of an option, the table of keys, spec templates."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from openmae.errors import UserError
from openmae.spec.option import InputSize, Section, SharePair
from openmae.spec.schema import ACTIONS, ExperimentSpec

_WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}
_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))

#: What an action cannot do without; of the keys in one tuple, it needs one.
REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "train": (("dataset.train_data_sources",),),
    "evaluate": (("evaluate.checkpoint", "evaluate.trt_engine"), ("dataset.val_data_sources",)),
    "inference": (("inference.checkpoint", "inference.trt_engine"), ("dataset.test_data_sources",)),
    "export": (("export.checkpoint",), ("export.onnx_file",)),
    "gen_trt_engine": (("gen_trt_engine.onnx_file",), ("gen_trt_engine.trt_engine",)),
}

#: Options of TAO's older entrypoints, and the names of the keys that they set.
_OPTIONS_OF_TAO = {
    **{"r": "results_dir", "k": "encryption_key", "key": "encryption_key"},
    **{"g": "num_gpus", "gpus": "num_gpus", "gpu_index": "gpu_ids"},
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
    """Every option by its dotted key, in the schema's order."""
    return dict(_walk(ExperimentSpec, ""))


@cache
def sections() -> frozenset[str]:
    """The dotted names of all sections."""
    return frozenset(key.rsplit(".", depth)[0] for key in fields() for depth in range(1, key.count(".") + 1))


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values of an option that admits a few only; else empty."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and isinstance(extra.get("enum"), list):
        return tuple(str(choice) for choice in cast("list[Any]", extra["enum"]))
    kinds = [field.annotation, *get_args(field.annotation)]
    return tuple(str(c) for kind in kinds if get_origin(kind) is Literal for c in get_args(kind))


def type_words(field: FieldInfo) -> str:
    """The type of an option: "integer", "number", "text", "true or false", "list of numbers", "choice"."""
    return "choice" if choices(field) else _words(field.annotation, field.metadata)


def bounds_words(field: FieldInfo) -> str:
    """The bounds of an option, such as "> 0 and <= 1", or its choices; empty where there are none."""
    if choices(field):
        return ", ".join(filter(None, choices(field)))
    found = []
    for name, sign in _SIGNS:
        found += [f"{sign} {getattr(m, name):g}" for m in field.metadata if getattr(m, name, None) is not None]
    return " and ".join(found)


def why_illegal(key: str, values: Iterable[Any]) -> str:
    """What the declaration of an option says against the first of these values that it refuses; empty: nothing."""
    field = fields()[key]
    declared: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    adapter = TypeAdapter(declared)
    for value in values:
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            return f"{value!r} is not a legal value of {key}: {error.errors()[0]['msg'].lower()}."
    return ""


def key_of_option(option: str, section: str) -> str:
    """Return what to write instead of a command-line option such as ``-g`` or ``--num_epochs=3``; empty: unknown.

    Args:
        option: as typed, with its dashes.
        section: the action's, which goes before others that have a key of that name.
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
    """Rows for all options, or for those that stand in the spec of ``action``."""
    return [
        KeyRow(
            key,
            type_words(field),
            _default_words(field.default),
            bounds_words(field),
            field.description or "",
        )
        for key, field in fields().items()
        if _concerns(key, action)
    ]


def template(action: str) -> str:
    """A commented spec for ``action``: what one usually sets is active, the rest shows its default.

    ``???`` marks what has to be filled in.
    """
    if action not in ACTIONS:
        raise UserError(f"There is no action {action!r}.", f"Use one of: {', '.join(ACTIONS)}.")
    needed = {group[0] for group in REQUIRED[action]}
    lines = [
        f"# mae {action} -e this_file.yaml [key=value ...]",
        "# Replace each ???. A commented line shows an option and its default.",
    ]
    keys = [key for key in fields() if _in_template(key, action)]
    # what a checkpoint brings along would contradict it if it stood there with its default
    own = [key for key in keys if action == "train" or key.split(".")[0] in (action, "results_dir")]
    active = needed | {key for key in own if _is_popular(key)}
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


def _words(annotation: Any, metadata: Any = ()) -> str:
    for special, words in ((InputSize, "integer or [height, width]"), (SharePair, "number or [min, max]")):
        if annotation == special or (get_origin(special) is Annotated and _same(annotation, metadata, special)):
            return words
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts if part is not type(None))
    if origin is tuple:
        return f"list of {_PLURALS[parts[0]]}"
    return _WORDS[origin or annotation]


def _same(annotation: Any, metadata: Any, special: Any) -> bool:
    """Pydantic moves the metadata of a top-level ``Annotated`` into the field."""
    return annotation == get_args(special)[0] and any(m in metadata for m in get_args(special)[1:])


def _default_words(default: Any) -> str:
    return "unset" if default is None else _yaml_value(default)


def _yaml_value(value: Any) -> str:
    if value is None:
        return "null"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
    return '""' if value == "" else text


def _is_popular(key: str) -> bool:
    extra = fields()[key].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("popular"))


def _concerns(key: str, action: str | None) -> bool:
    if action in (None, "train"):
        return action is None or key.split(".")[0] not in ACTIONS[1:]
    return _in_template(key, action) or key == "train.seed"  # the seed of the masks


def _in_template(key: str, action: str) -> bool:
    """An action's own section and, for all but train, only what reading a model and data may need."""
    section, name = key.split(".")[0], key.split(".")[-1]
    if key in ("encryption_key", "model_name", "dataset.segment", "train.mask_ratio", "train.norm_pix_loss"):
        return False
    if ".checkpointer." in key or ".cal_" in key:  # other names of options that stand there
        return False
    if name.endswith("_data_sources"):
        used = {"train": ("train", "val"), "evaluate": ("val",), "inference": ("test",), "export": ("val",)}
        return name.split("_")[0] in used.get(action, ())
    if action == "train" or section == action:
        return section not in ACTIONS or section == action
    if section == "dataset":
        return action in ("evaluate", "inference") and name in (
            "batch_size", "num_workers_per_gpu", "max_corrupt_fraction", "max_megapixels", "input_size", "mean", "std"
        )  # fmt: skip
    return section in ("results_dir", "model") or key == "train.stage"


def _comment(field: FieldInfo) -> str:
    text, allowed = field.description or "", choices(field)
    if len(allowed) > 6 or (allowed and all(choice in text for choice in allowed)):
        return text
    return f"{text} [{bounds_words(field)}]" if bounds_words(field) else text
