"""Read YAML, overrides and ``${...}`` into one plain tree. Mistakes are collected; ``load_spec`` raises them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from openmae.errors import SpecError
from openmae.inputs import read_file_or_pipe
from openmae.spec import from_environment
from openmae.spec.tree import Tree, get, merge, nest, put

MISSING = "???"
KeyPath = tuple[str | int, ...]
_MAX_DEPTH, _MAX_VALUES = 50, 100_000  # limits: YAML aliases can expand a few lines to fill the memory
_MAX_FILE_SIZE = 10_000_000  # bytes
_NOT_UTF8 = re.compile(r"[\udc80-\udcff]")  # surrogates: how Python decodes such bytes on the command line


class Problem(NamedTuple):
    """A broken rule. ``key`` is dotted; ``also`` names other keys that the rule compares."""

    key: str
    text: str
    also: tuple[str, ...] = ()


@dataclass
class Reading:
    """The content of a source.

    Attributes:
        tree: nested sections of the keys that the user set.
        origin: dotted key -> its place ("line 12", "override").
        problems: mistakes found while reading.
        shown: dotted key -> the reference to record instead of a value from the environment.
        derived: keys whose value does not count as set by the user, unless ``origin`` has them.
    """

    tree: Tree = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    shown: dict[str, Any] = field(default_factory=dict)
    derived: frozenset[str] = frozenset()


class _Loader(yaml.SafeLoader):
    """YAML with numbers as in OmegaConf.

    1e-4 is a number; only plain decimals are integers, so that 007, 12:30 and 2026-01-31 are text.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node; refuse one that is nested so deeply that recursion would fail."""
        self._depth += 1
        try:
            if self._depth > _MAX_DEPTH:
                raise yaml.YAMLError(f"it is nested deeper than {_MAX_DEPTH} levels")
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":")[-1] not in ("int", "float", "timestamp")]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """YAML with lists on one line, and quotes around texts that this loader or another one would read as a number."""


_Dumper.yaml_implicit_resolvers = {
    start: [*yaml.SafeDumper.yaml_implicit_resolvers.get(start, ()), *resolvers]
    for start, resolvers in (yaml.SafeDumper.yaml_implicit_resolvers | _Loader.yaml_implicit_resolvers).items()
}
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def write_text(tree: Tree) -> str:
    """Return a tree of plain values as YAML text that reads back unchanged."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def read_file(path: Path) -> Reading:
    """Read a YAML file.

    Raises:
        SpecError: the file is missing, is not text, or its YAML cannot be parsed.
    """
    try:
        content = read_file_or_pipe(path, _MAX_FILE_SIZE + 1)
        text = content.decode("utf-8")
    except IsADirectoryError:
        raise SpecError(f"{path} is a folder, not a spec file.", "Name the YAML file in it.") from None
    except FileNotFoundError:
        fix = "Check the path, or write a spec with `mae spec template train`."
        raise SpecError(f"There is no spec file {path}.", fix) from None
    except UnicodeDecodeError:
        raise SpecError(f"{path} is not a text file.", "A spec is YAML, in UTF-8.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"{path} cannot be read: {reason}.", "Check the path and its permissions.") from None
    if len(content) > _MAX_FILE_SIZE:
        raise SpecError(
            f"{path} has more than {_MAX_FILE_SIZE / 1e6:g} MB, which is too large for a spec.", "Name a YAML file."
        )
    reading = Reading()
    try:
        node, tree = _parse(text)
        if node is not None:
            _note_lines(node, "", reading)
    except yaml.YAMLError as error:
        raise SpecError(
            f"{path} is not valid YAML: {_yaml_message(error, text)}.",
            "Check its indentation, quotes and brackets.",
        ) from None
    if not isinstance(tree, dict | None):
        raise SpecError(
            f"{path} must hold sections such as `model:` and `train:`, not a {type(tree).__name__}.",
            "`mae spec template train` prints an example.",
        )
    reading.tree = _text_keys(tree or {})
    return reading


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """Return nodes and values of a YAML text; raise ``YAMLError`` if it is invalid, too deep or too large."""
    node = yaml.compose(text, _Loader)
    if node is not None:
        _measure(node, {}, ())
    try:
        return node, yaml.load(text, _Loader)
    except ValueError as error:  # Python refuses integers with thousands of digits
        raise yaml.YAMLError("it has a number with too many digits") from error


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], above: tuple[yaml.Node, ...]) -> tuple[int, int]:
    """Return the number of values and of levels below a node; an alias counts wherever it is used."""
    if node in above:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1} contains itself")
    if id(node) not in known:
        below = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        sizes = [_measure(part, known, (*above, node)) for part in below]
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        size, depth = known[id(node)]
        if size > _MAX_VALUES or depth > _MAX_DEPTH:
            raise yaml.YAMLError(
                f"it has more than {_MAX_VALUES:,} values, or is nested deeper than {_MAX_DEPTH} levels"
            )
    return known[id(node)]


def read_mapping(source: Mapping[Any, Any]) -> Reading:
    """Read a nested mapping, and copy it.

    Raises:
        SpecError: it is too large or too deep; this includes a mapping that contains itself.
    """
    level: list[Any] = [source]
    values = 0
    for _ in range(_MAX_DEPTH + 1):
        below = [value for item in level for value in (item.values() if isinstance(item, Mapping) else item)]
        values += len(below)
        level = [value for value in below if isinstance(value, Mapping | list | tuple)]
        if not level or values > _MAX_VALUES:
            break
    if level or values > _MAX_VALUES:
        raise SpecError(
            f"The spec has more than {_MAX_VALUES:,} values, or is nested deeper than {_MAX_DEPTH} levels.",
            "Give sections with keys below them, such as {'train': {'num_epochs': 3}}.",
        )
    return Reading(tree=_text_keys(source))


def apply_overrides(reading: Reading, overrides: Iterable[str]) -> None:
    """Merge overrides ``a.b=c`` into a reading. ``c`` is YAML; ``a.b=`` unsets the key.

    Hydra's ``+a.b=c`` and ``++a.b=c`` mean the same here: ``load_spec`` always checks that the key exists.
    """
    for item in overrides:
        key, equals, text = item.partition("=")
        key = re.sub(r"^\+{1,2}", "", _text(key.strip()))
        if key.startswith("~"):
            key = key.lstrip("~")
            text = f"{item!r}: deleting a key is not supported. Drop the key: remove it from the spec"
            _refuse(reading, key or item, f"{text}, or unset it with {key or 'key'}= (nothing after =).")
            continue
        if not equals or not all(key.split(".")) or key.count(".") >= _MAX_DEPTH:
            hint = f" A spec file is given as -e {item}." if item.endswith((".yaml", ".yml")) else ""
            _refuse(reading, key or item, f"an override is written key=value, got {item!r}.{hint}")
            continue
        if _NOT_UTF8.search(text):
            written = _NOT_UTF8.sub(lambda sign: f"\\x{ord(sign[0]) - 0xDC00:02x}", text)
            text = f"{text!r} contains bytes that are not UTF-8. Rename it, or write {written} for a data source."
            _refuse(reading, key, text)
            continue
        try:
            _, value = _parse(text)
        except yaml.YAMLError as error:
            _refuse(reading, key, f"{text!r} is not valid YAML: {_yaml_message(error)}.")
            continue
        _set(reading, key, _text_keys(value) if isinstance(value, dict) else value)


def interpolate(reading: Reading, defaults: Tree) -> None:
    """Replace ``${section.key}`` and ``${oc.env:NAME}`` with their values.

    A key that the user did not set has its default; that of ``<action>.results_dir`` is ``<results_dir>/<action>``.
    """
    references = {path: value for path, value in _leaves(reading.tree) if "${" in str(value)}
    if not references:
        return
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

    base = copy.deepcopy(defaults)
    merge(base, reading.tree)
    base["results_dir"] = base["results_dir"] if base["results_dir"] not in (None, "", MISSING) else "results"
    for name, section in base.items():
        if isinstance(section, dict) and section.get("results_dir", name) in (None, "", MISSING):
            section["results_dir"] = f"${{results_dir}}/{name}"

    def resolved(path: KeyPath) -> Any:
        config: Any = OmegaConf.create(base)
        for part in path:
            config = config[part]
        return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config

    def refuse(path: KeyPath, error: Exception) -> None:
        reason = "it refers to itself" if isinstance(error, RecursionError) else str(error).split("\n")[0]
        reason = reason.removeprefix("KeyError raised while resolving interpolation: ").strip('"')
        text = f"{references[path]!r} cannot be resolved: {reason.rstrip('.')}."
        reading.problems.append(Problem(".".join(map(str, path)), text))
        _put(reading.tree, path, None)

    for path, value in list(references.items()):  # find malformed ones first: OmegaConf parses a tree as a unit
        try:
            OmegaConf.create({"value": value})
        except (OmegaConfBaseException, RecursionError) as error:
            refuse(path, error)
            _put(base, path, None)
            del references[path]
    reading.shown |= from_environment.references(base, references)
    for path in references:
        try:
            _put(reading.tree, path, resolved(path))
        except InterpolationToMissingValueError:
            _put(reading.tree, path, MISSING)
        except (OmegaConfBaseException, RecursionError) as error:
            refuse(path, error)


def drop_unset(tree: Tree) -> Tree:
    """Return the tree without ``???`` and null, whose keys count as unset."""
    return {
        key: drop_unset(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None and not (isinstance(value, str) and value == MISSING)
    }


def _note_lines(node: yaml.Node, prefix: str, reading: Reading) -> None:
    """Record the line of every key, and a problem for a key that occurs twice in a section."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _note_lines(item, prefix, reading)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        key = prefix + name
        if name in first:
            text = f"occurs twice, on lines {first[name]} and {line}. Keep one, and merge their contents."
            reading.problems.append(Problem(key, text))
        first.setdefault(name, line)
        reading.origin[key] = f"line {line}"
        _note_lines(value_node, f"{key}.", reading)


def _yaml_message(error: yaml.YAMLError, text: str = "") -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error).replace("\n", " ")
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if mark and "encryption_key" in "".join(
        text.splitlines()[mark.line : mark.line + 1]
    ):  # the error must not repeat the value
        return f"{where}the value of encryption_key needs quotes"
    return f"{where}{error.problem or error.context}"


def _text(key: Any) -> str:
    """Return a key as in pydantic's errors: with ``?`` for bytes that are not UTF-8."""
    return str(key).encode("utf-8", "replace").decode("utf-8")


def _text_keys(mapping: Mapping[Any, Any]) -> Tree:
    return {_text(k): _text_keys(v) if isinstance(v, Mapping) else copy.deepcopy(v) for k, v in mapping.items()}


def _refuse(reading: Reading, key: str, text: str, also: tuple[str, ...] = ()) -> None:
    """Record a mistake in an override."""
    reading.problems.append(Problem(key, text, also))
    reading.origin[key] = "override"


def _set(reading: Reading, key: str, value: Any) -> None:
    parents = key.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        parent = ".".join(parents[:depth])
        below = get(reading.tree, parent)
        if below is None or below == MISSING:
            put(reading.tree, parent, {})
            reading.origin.setdefault(parent, "override")
        elif not isinstance(below, dict):
            text = f"cannot be set, since {parent} is {below!r} and not a section."
            _refuse(reading, key, text, also=(parent,))
            return
    new = nest({key: value})
    merge(reading.tree, new)
    for changed in (key, *(".".join(map(str, path)) for path, _ in _leaves(new))):
        reading.origin[changed] = "override"
        reading.shown.pop(changed, None)


def _leaves(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if not isinstance(tree, dict | list):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _leaves(value, (*path, key))


def _put(tree: Any, path: KeyPath, value: Any) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value
