"""Fit a checkpoint's tensors to a model's, and say what matched."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.layers import resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from openmae.checkpoints.foreign_names import NamedWeights, family_of
from openmae.checkpoints.wrappers import State
from openmae.models.build import ModelConfig
from openmae.models.decoders import ConvNeXtDecoder
from openmae.models.mae import MaskedAutoencoder
from openmae.models.positions import resize_position_embedding
from openmae.spec.architectures import ARCHITECTURES

REQUIRED_PERCENT = 95
_CLASSIFIER = frozenset({"head.weight", "head.bias", "head.fc.weight", "head.fc.bias"})
_FINAL_NORMS = ("norm.", "fc_norm.", "head.norm.")
_FIRST_CONVOLUTIONS = ("patch_embed.proj.weight", "stem.0.weight")
_SHOWN = 3
OTHER_ARCHITECTURES = "Use weights of this architecture: DINOv2, DeiT III, EVA and CLIP, for example, have another one."
_FOREIGN_PARTS = (
    (r"\.(ls[12]\.gamma|gamma(_[12])?)$", "LayerScale"),
    (r"\breg_tokens?$|register_tokens", "register tokens"),
    (r"\b[qk]_norm\.", "normed queries and keys"),
    (r"rope|rotary|\bfreqs", "rotary positions"),
    (r"rel_pos|relative_position", "relative positions"),
    (r"\bdist_token$|head_dist", "a distillation token"),
    (r"\bnorm_pre\.|norm_post\.", "another norm"),
    (r"\bmlp\.(w12|w3|fc1_g|fc1_x|norm)\b", "a gated MLP"),
)


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave to a model; ``str()`` is one line.

    What counts are the values (not the tensors) that a file of its layout can hold: a classifier that is
    absent or of another class count, and a final norm that is absent, are left out and stand in ``fresh``.

    Attributes:
        arch: of the model.
        layout: of the file.
        everything: all of the model was asked for, not only its backbone.
        same_family: the file's backbone is of the model's family; names of another's fit by chance.
        matched, total: values that were found, and that count.
        missing: names that count and were not found, with the model's shape, and the file's where it differs.
        unexpected: names that the model lacks, with shapes.
        foreign: those of them that belong to parts that the model has: it would be another function without them.
        unexpected_values: how many values they have.
        resized: names that were resampled to the model's grid, channels or patch size.
        fresh: modules that keep their fresh start.
        unused: parts of the file that the model does not have, such as a decoder.
    """

    arch: str
    layout: str
    everything: bool
    same_family: bool
    matched: int
    total: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    foreign: tuple[str, ...]
    unexpected_values: int
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def percent(self) -> float:
        """Share of the values that matched, of the model's and of the file's that the model lacks; 0 to 100."""
        return 100 * self.matched / (self.total + self.unexpected_values)

    @property
    def sufficient(self) -> bool:
        """Whether the model may be used without ``train.allow_partial_weights``."""
        enough = not self.missing if self.everything else self.percent >= REQUIRED_PERCENT
        return self.same_family and enough and not self.unexpected

    @property
    def partial(self) -> bool:
        """Whether there is anything in it that the model may take, and the rest of it does not matter."""
        return self.same_family and self.matched > 0 and not self.foreign

    def __str__(self) -> str:
        part = "weights" if self.everything else "backbone"
        notes = {"resized": self.resized, "fresh": self.fresh, "not used": self.unused}
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in notes.items() if names)
        line = f"loaded {_floor(self.percent)} % of {self.arch}'s {part} from the {self.layout} layout"
        return f"{line} ({said})" if said else line


def match(
    model: nn.Module, weights: NamedWeights, source: ModelConfig | None, everything: bool
) -> tuple[LoadReport, State]:
    """Fit ``weights`` to ``model`` without changing it.

    Args:
        model: a masked autoencoder or a timm model.
        source: the model that wrote the weights, where the file says so; else its grids are taken as square.
        everything: count all of the model, not only the backbone.

    Returns:
        The report, and the fitted tensors by the model's names.
    """
    prefix = "encoder.backbone." if isinstance(model, MaskedAutoencoder) else ""
    found = {prefix + name: value for name, value in weights.backbone.items()}
    if prefix:
        found |= weights.rest
    target = model.state_dict()
    grids = _grids(model, source)
    fitted = {
        name: value
        for name in target
        if name in found and (value := _fit(name, found[name], target[name], grids.get(name))) is not None
    }
    counted = [name for name in target if everything or _counts(name, prefix, found, fitted)]
    unexpected = [name for name in found if name not in target and (everything or _is_trunk(name, prefix))]
    report = LoadReport(
        arch=_arch_of(model),
        layout=weights.layout,
        everything=everything,
        same_family=family_of(_backbone_of(model).state_dict()) == weights.family,
        matched=sum(target[name].numel() for name in counted if name in fitted),
        total=sum(target[name].numel() for name in counted),
        missing=tuple(_describe(name, target[name], found) for name in counted if name not in fitted),
        unexpected=tuple(f"{name} {list(found[name].shape)}" for name in unexpected),
        foreign=tuple(n for n in unexpected if _changes_features(n, prefix) and not _is_another_block(n, target)),
        unexpected_values=sum(found[name].numel() for name in unexpected),
        resized=tuple(
            name.removeprefix(prefix).removesuffix(".weight")
            for name, value in fitted.items()
            if _is_resized(name, value, found[name], grids)
        ),
        fresh=tuple(module.removeprefix(prefix) for module in _outer_modules(target, fitted)),
        unused=_unused_parts(weights, target, fitted, prefix),
    )
    return report, fitted


def complain(report: LoadReport, weights: NamedWeights, source: ModelConfig | None, path: Path) -> tuple[str, str]:
    """(problem, mend) for a report that is not sufficient."""
    likely = source.arch if source else likely_arch(weights)
    if not report.same_family:
        return (
            f"{path} holds {likely or f'a backbone of the {weights.family} family'} ({weights.layout} layout), "
            f"of which {report.arch} can use nothing: another family.",
            f"Set model.arch={likely}." if likely else "Use a checkpoint of this architecture.",
        )
    if report.foreign:
        return _complain_of_foreign(report, path)
    part = "weights" if report.everything else "backbone"
    required = "all" if report.everything else f"{REQUIRED_PERCENT} %"
    problem = (
        f"{path}: {_floor(report.percent)} % of {report.arch}'s {part} was found in this file "
        f"({weights.layout} layout), and {required} must match."
    )
    for title, names in (("Missing", report.missing), ("Not in the model", report.unexpected)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problem += f" {title}: {', '.join(names[:_SHOWN])}{more}."
    mends = []
    if likely and likely != report.arch:
        problem += f" The file looks like {likely}."
        mends.append(f"set model.arch={likely}")
    if report.everything:
        mends.append("use the stage, classes and model.* keys that the checkpoint was written with")
    elif not mends and report.matched:
        mends.append("set train.allow_partial_weights=true to train what is missing afresh")
    fix = ", or ".join(mends) or "use a checkpoint of this architecture"
    return problem, f"{fix[0].upper()}{fix[1:]}."


def _complain_of_foreign(report: LoadReport, path: Path) -> tuple[str, str]:
    """A model of the same names, but of another function: without these tensors its outputs would mean nothing."""
    kinds = foreign_parts(report.foreign)
    named = f" ({', '.join(kinds)})" if kinds else ""
    shown = [text for text in report.unexpected if text.split(" ")[0] in report.foreign][:_SHOWN]
    more = f" and {len(report.foreign) - len(shown)} more" if len(report.foreign) > len(shown) else ""
    count, it = ("a tensor", "it") if len(report.foreign) == 1 else (f"{len(report.foreign)} tensors", "them")
    return (
        f"{path} holds {count} that {report.arch} has no place for{named}: {', '.join(shown)}{more}. Without {it} "
        f"the model would be another function than the one that was trained ({report.layout} layout).",
        OTHER_ARCHITECTURES,
    )


def foreign_parts(names: Iterable[str]) -> list[str]:
    """What the tensors' names say about parts that no architecture of the table has."""
    names = list(names)
    return [said for pattern, said in _FOREIGN_PARTS if any(re.search(pattern, name) for name in names)]


def likely_arch(weights: NamedWeights) -> str | None:
    """The architecture whose blocks have just these names and sizes; None where no row of the table fits."""
    sizes = _block_sizes(weights.backbone)
    rows = (row for row in ARCHITECTURES.values() if row.family == weights.family)
    return next((row.name for row in rows if _timm_block_sizes(row.timm_name) == sizes), None)


def has_blocks_of(weights: NamedWeights, arch: str) -> bool:
    """Whether the blocks have the names and sizes of an architecture of the table."""
    return _block_sizes(weights.backbone) == _timm_block_sizes(ARCHITECTURES[arch].timm_name)


@dataclass(frozen=True)
class _Grid:
    """A position embedding's grid in the model and in the file (None: unknown), and the tokens before it."""

    new: tuple[int, int]
    old: tuple[int, int] | None
    num_prefix_tokens: int


def _grids(model: nn.Module, source: ModelConfig | None) -> dict[str, _Grid]:
    """The position embeddings of a model by name."""

    def grid(new: tuple[int, int], split: int, num_prefix_tokens: int) -> _Grid:
        """``split`` tokens along a unit's side, in the file's model as in this one."""
        if source is None:
            return _Grid(new, None, num_prefix_tokens)
        height, width = source.input_size
        return _Grid(new, (height // source.unit * split, width // source.unit * split), num_prefix_tokens)

    backbone = _backbone_of(model)
    name = "pos_embed" if backbone is model else "encoder.backbone.pos_embed"
    grids = {}
    if isinstance(backbone, timm.models.VisionTransformer):
        rows, columns = backbone.patch_embed.grid_size
        grids[name] = grid((rows, columns), 1, backbone.num_prefix_tokens)
    elif isinstance(backbone, timm.models.Hiera):
        rows, columns = backbone.tokens_spatial_shape
        grids[name] = grid((rows, columns), backbone.mask_unit_size[0], 0)
    if isinstance(model, MaskedAutoencoder) and not isinstance(model.decoder, ConvNeXtDecoder):
        encoder = model.encoder
        grids["decoder.pos_embed"] = grid(encoder.token_grid, encoder.split, encoder.num_prefix_tokens)
    return grids


def _fit(name: str, value: Tensor, target: Tensor, grid: _Grid | None) -> Tensor | None:
    """The value in the target's shape; None where it cannot be brought there."""
    if grid is not None:
        value = _fit_positions(value, grid)
    elif name.endswith(_FIRST_CONVOLUTIONS):
        value = _fit_first_convolution(value, target)
    elif [n for n in value.shape if n > 1] == [n for n in target.shape if n > 1]:
        value = value.reshape(target.shape)  # a 1x1 convolution for a linear layer, and the other way round
    return value if value.shape == target.shape else None


def _fit_positions(value: Tensor, grid: _Grid) -> Tensor:
    if value.ndim != 3:
        return value
    tokens = value.shape[1] - grid.num_prefix_tokens
    side = math.isqrt(max(tokens, 0))
    guesses = [g for g in (grid.old, (side, side), grid.new) if g is not None and g[0] * g[1] == tokens]
    return resize_position_embedding(value, guesses[0], grid.new, grid.num_prefix_tokens) if guesses else value


def _fit_first_convolution(value: Tensor, target: Tensor) -> Tensor:
    if value.ndim != 4 or value.shape[0] != target.shape[0]:
        return value
    if value.shape[1] != target.shape[1]:
        value = adapt_input_conv(target.shape[1], value, base_chans=value.shape[1])
    return resample_patch_embed(value, list(target.shape[2:]))


def _counts(name: str, prefix: str, found: State, fitted: State) -> bool:
    """Whether a file of this layout can be expected to hold this part of the backbone."""
    inner = name.removeprefix(prefix)
    if not name.startswith(prefix) or (inner in _CLASSIFIER and name not in fitted):
        return False
    return name in found or not inner.startswith(_FINAL_NORMS)


def _is_trunk(name: str, prefix: str) -> bool:
    """Neither classifier, final norm, fusion head nor decoder."""
    inner = name.removeprefix(prefix)
    return name.startswith(prefix) and inner not in _CLASSIFIER and not inner.startswith(_FINAL_NORMS)


def _changes_features(name: str, prefix: str) -> bool:
    """Whether a model without this tensor computes other features: a classifier's own layers do not count."""
    return _is_trunk(name, prefix) and not name.removeprefix(prefix).startswith(("head.", "pre_logits."))


def _is_resized(name: str, value: Tensor, before: Tensor, grids: Mapping[str, _Grid]) -> bool:
    return value is not before and (name in grids or name.endswith(_FIRST_CONVOLUTIONS))


def _outer_modules(names: Iterable[str], others: Collection[str]) -> list[str]:
    """The outermost modules of the names that ``others`` lack, and that hold none of ``others``."""
    modules: dict[str, None] = {}
    for name in names:
        if name in others:
            continue
        parts = name.split(".")
        outer = (".".join(parts[:n]) for n in range(1, len(parts)))
        modules[next((m for m in outer if not any(key.startswith(f"{m}.") for key in others)), name)] = None
    return sorted(modules)


def _unused_parts(weights: NamedWeights, target: State, fitted: State, prefix: str) -> tuple[str, ...]:
    """Modules of the file that the model does not have."""
    names = [*weights.backbone, *weights.rest]
    places = {name: name if name in weights.rest else prefix + name for name in names}
    left = [name for name in names if places[name] not in target]
    return tuple(_outer_modules(left, {name for name in names if places[name] in fitted}))


def _is_another_block(name: str, target: State) -> bool:
    """Whether a name belongs to a block or stage that the model does not have at all."""
    block = re.match(r"(.*\b(?:blocks|stages)\.\d+\.)", name)
    return block is not None and not any(other.startswith(block[1]) for other in target)


def _describe(name: str, target: Tensor, found: State) -> str:
    shape = f"{name} {list(target.shape)}"
    return f"{shape} (the file has {list(found[name].shape)})" if name in found else shape


def _backbone_of(model: nn.Module) -> nn.Module:
    return model.encoder.backbone if isinstance(model, MaskedAutoencoder) else model


def _arch_of(model: nn.Module) -> str:
    """Our name of a timm model's architecture; timm's where the table has none."""
    config = getattr(_backbone_of(model), "pretrained_cfg", {})
    timm_name = config.get("architecture", type(model).__name__)
    return next((row.name for row in ARCHITECTURES.values() if row.timm_name == timm_name), timm_name)


def _block_sizes(backbone: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: value.numel() for name, value in backbone.items() if name.startswith(("blocks.", "stages."))}


def _timm_block_sizes(timm_name: str) -> dict[str, int]:
    return _timm_shape(timm_name)[0]


def width_of(arch: str) -> int:
    """Features that the classifier of an architecture of the table takes."""
    return _timm_shape(ARCHITECTURES[arch].timm_name)[1]


@functools.cache
def _timm_shape(timm_name: str) -> tuple[dict[str, int], int]:
    with torch.device("meta"):
        model = timm.create_model(timm_name, num_classes=0)
    return _block_sizes(model.state_dict()), model.num_features


def _floor(percent: float) -> str:
    """One decimal, rounded down, so that only a whole match reads 100."""
    return f"{math.floor(percent * 10) / 10:g}"
