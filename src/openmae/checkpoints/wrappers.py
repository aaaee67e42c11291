"""Find the weights in a file: their entry in a nested dict, and the prefix of their names.

Training programs wrap a state dict in another dict, keep averaged copies next to it, and prefix the names with those of
the modules that hold the backbone. A backbone is found by the name of its first weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmae.checkpoints.unpickling import NumpyArray
from openmae.errors import CheckpointError
from openmae.storage.printable import listed

State = dict[str, Tensor]

_FIRST_WEIGHTS = r"patch_embed\.proj|stem\.0|downsample_layers\.0\.0|embeddings\.patch_embeddings(\.projection)?"
_FOUND = re.compile(
    rf"(?P<prefix>(?:[\w-]+\.)*?)(?P<own>encoder\.backbone\.|encoder\.|vit\.|hiera\.|convnextv2\.)?"
    rf"(?P<first>{_FIRST_WEIGHTS})\.weight"
)
_TRANSPARENT = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch's, at any depth
_AVERAGED = re.compile(r"(^|[._])(ema|teacher|averaged)([._]|$)")
_SECONDARY = re.compile(r"momentum|target|encoder_k|(^|[._])key([._]|$)")
_USUAL = ("state_dict", "model_state", "model", "module")
_COUNTERS = frozenset({"n_averaged"})  # of torch.optim.swa_utils
_SHOWN = 4
_MAX_DEPTH, _MAX_NAMES = 3, 2_000_000  # of nested dicts, which may contain the same dict many times


@dataclass(frozen=True)
class Wrapped:
    """The tensors of one model in a file.

    Attributes:
        state: tensors by name, without the prefix.
        entry: dotted path of keys to the state dict, such as ``model_ema``; empty for a bare state dict.
        prefix: prefix that was removed from the names.
        note: description of the choice and of what was left out; empty if there was no choice.
    """

    state: State
    entry: str = ""
    prefix: str = ""
    note: str = ""


def unwrap(raw: Mapping[str, Any], wanted: str = "") -> Wrapped:
    """Find the weights of one model in the content of a file.

    ``raw`` is a state dict, or a dict that contains state dicts. ``wanted`` is the entry (dotted if nested) or prefix
    of names to choose. By default, averaged weights (``model_ema``, ``teacher``) are preferred to plain ones, as in
    timm's and DINO's evaluation.

    Raises:
        CheckpointError: There are no weights, or none under ``wanted``.
    """
    if raw.get("state_dict_encrypted"):
        raise CheckpointError("TAO has encrypted the weights of this file.", "Decrypt it with TAO first.")
    entries = {entry: state for entry, state in _entries(raw) if any(map(_FOUND.fullmatch, state))}
    if not entries:
        return _largest(raw)
    candidates = [(entry, prefix) for entry, state in entries.items() for prefix in _prefixes(state)]
    entry, prefix = _choose(candidates, wanted)
    state = entries[entry]
    prefixes = tuple(other for other in _prefixes(state) if other != prefix)
    longer = tuple(other for other in prefixes if other.startswith(prefix))
    names = [name for name in state if name.startswith(prefix) and not name.startswith(longer)]
    own = {name.removeprefix(prefix): state[name] for name in names}
    others = [other for other in entries if other not in ("", entry)] + [p.rstrip(".") for p in prefixes if p]
    outside = [name for name in state if not name.startswith((prefix, *prefixes)) and name not in _COUNTERS]
    _check_tensors(own)
    chosen = f"{entry}.{prefix}".strip(".")
    return Wrapped(own, entry, prefix, _note(chosen, others, list(dict.fromkeys(n.split(".")[0] for n in outside))))


def _note(chosen: str, others: list[str], unused: list[str]) -> str:
    if not others and not unused:
        return ""
    note = f"using the weights under {chosen!r}"
    if others:
        note += f"; the file also has {listed(others, _SHOWN)} (choose with train.pretrained_weights_key)"
    return note + (f"; not used: {listed(unused, _SHOWN)}" if unused else "")


def _choose(candidates: list[tuple[str, str]], wanted: str) -> tuple[str, str]:

    def preference(candidate: tuple[str, str]) -> tuple[Any, ...]:
        entry, prefix = candidate
        usual = entry.split(".")[-1] in _USUAL
        return bool(entry), _rank(entry), not usual, _rank(prefix), prefix.count(".")

    names = {
        (entry, prefix): (entry, prefix.rstrip("."), f"{entry}.{prefix}".rstrip(".")) for entry, prefix in candidates
    }
    fitting = [candidate for candidate in candidates if not wanted or wanted in names[candidate]]
    if not fitting:
        there = dict.fromkeys(name for candidate in candidates for name in names[candidate][:2] if name)
        raise CheckpointError(
            f"The file has no weights under {wanted!r}.",
            f"It has: {', '.join(there)}." if there else "It is a bare state dict: leave the key empty.",
        )
    return min(fitting, key=preference)


def _rank(name: str) -> int:
    return 0 if _AVERAGED.search(name.lower()) else 2 if _SECONDARY.search(name.lower()) else 1


def _prefixes(state: State) -> list[str]:
    """Return the name prefix of each backbone in a state dict."""
    found = []
    for name in state:
        if match := _FOUND.fullmatch(name):
            own, first = match["own"] or "", match["first"]
            if first.startswith("embeddings"):
                belongs = own in ("", "vit.", "hiera.", "convnextv2.")
            else:
                belongs = own in ("", "encoder.backbone.") or (own == "encoder." and first.startswith("downsample"))
            found.append(match["prefix"] if belongs else match["prefix"] + own)
    return list(dict.fromkeys(found))


def _entries(raw: Mapping[str, Any]) -> Iterator[tuple[str, State]]:
    """Yield the dotted path and the tensors of each dict in a file, the outermost first."""
    waiting, names = [("", raw, 0)], 0
    for place, mapping, depth in waiting:
        names += len(mapping)
        if names > _MAX_NAMES:
            raise CheckpointError(
                f"The file holds more than {_MAX_NAMES:,} names.", "Save only the model's state dict."
            )
        tensors = {_plain(name): _as_tensor(value) for name, value in mapping.items()}
        yield place, {name: value for name, value in tensors.items() if value is not None}
        for name, value in mapping.items():
            if isinstance(value, Mapping) and depth < _MAX_DEPTH:
                waiting.append((f"{place}.{name}".lstrip("."), value, depth + 1))


def _plain(name: Any) -> str:
    name = str(name)
    for part in _TRANSPARENT:
        name = name.replace(part, "")
    return name


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, NumpyArray):
        return value.tensor()
    return value if isinstance(value, Tensor) else None


def _largest(raw: Mapping[str, Any]) -> Wrapped:
    """Return the largest state dict of a file without a known backbone, so that an error can name its tensors."""
    entry, state = max(_entries(raw), key=lambda found: len(found[1]))
    if not state:
        keys = ", ".join(str(key) for key in list(raw)[:5]) or "none"
        raise CheckpointError(
            f"The file holds no weights; its first keys: {keys}.",
            "Save the model's state dict: torch.save(model.state_dict(), path).",
        )
    return Wrapped(state, entry)


def _check_tensors(state: State) -> None:
    """Reject tensors that are not dense, or whose values are not all in the file; shapes are trusted afterwards."""
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            kind = "quantized" if value.is_quantized else value.dtype if value.is_complex() else value.layout
            raise CheckpointError(f"{name} is not a dense tensor ({kind}).", "Save dense floating-point weights.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{name} claims the shape {list(value.shape)}, but the file holds fewer values of it.",
                "Save the model's state dict again, with .contiguous() tensors.",
            )
        if value.numel() == 0:
            raise CheckpointError(
                f"{name} is empty: the file is one process's part of a sharded model (DeepSpeed ZeRO-3, FSDP).",
                "Join the parts first; for DeepSpeed use zero_to_fp32.py.",
            )
