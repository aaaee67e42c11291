"""Match a checkpoint's tensors to a model's, resample them if necessary, and report the result."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import timm
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from openmae.checkpoints.foreign_names import NamedWeights, family_of
from openmae.checkpoints.shapes import OTHER_ARCHITECTURES, foreign_parts, likely_arch
from openmae.checkpoints.wrappers import State
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig
from openmae.models.decoders import ConvNeXtDecoder
from openmae.models.mae import MaskedAutoencoder
from openmae.spec.architectures import ARCHITECTURES
from openmae.storage.printable import listed

REQUIRED_PERCENT = 95
_CLASSIFIER = frozenset({"head.weight", "head.bias", "head.fc.weight", "head.fc.bias"})
_FINAL_NORMS = ("norm.", "fc_norm.", "head.norm.")
_FIRST_CONVOLUTIONS = ("patch_embed.proj.weight", "stem.0.weight")


@dataclass(frozen=True)
class LoadReport:
    """Report of the tensors that a model takes from a checkpoint; ``str()`` is one line.

    The percentage counts tensor elements. Unless ``everything`` is set, it leaves out the decoder, a classifier that is
    missing or has other classes, and a missing final norm; ``fresh`` lists them if they keep their initial weights.

    Attributes:
        everything: all of the model must match, not only its backbone.
        same_family: the file's backbone is of the model's family; otherwise names match by chance.
        percent: matched elements, in percent of the model's elements and of unexpected ones in the file.
        missing: counted names that were not found or do not fit, with the model's shape, and the file's if it differs.
        unexpected: names in the file that the model lacks, with shapes.
        foreign: unexpected names without which the model would compute a different function.
        resized: names that were resampled to the model's grid, channels or patch size.
        fresh: modules that keep their initial weights.
        unused: parts of the file that the model does not have, such as a decoder.
    """

    arch: str
    layout: str
    everything: bool
    same_family: bool
    percent: float
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    foreign: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def sufficient(self) -> bool:
        """True if the model may be used without ``train.allow_partial_weights``."""
        enough = not self.missing if self.everything else self.percent >= REQUIRED_PERCENT
        return self.same_family and enough and not self.unexpected

    @property
    def partial(self) -> bool:
        """True if the model may be used with ``train.allow_partial_weights``."""
        return self.same_family and self.percent > 0 and not self.foreign

    def __str__(self) -> str:
        part = "weights" if self.everything else "backbone"
        notes = {"resized": self.resized, "newly initialised": self.fresh, "not used": self.unused}
        details = "; ".join(f"{label}: {', '.join(names)}" for label, names in notes.items() if names)
        line = f"loaded {_floor(self.percent)} % of {self.arch}'s {part} from the {self.layout} layout"
        return f"{line} ({details})" if details else line


def match(
    model: nn.Module, weights: NamedWeights, source: ModelConfig | None, everything: bool
) -> tuple[LoadReport, State]:
    """Match ``weights`` to ``model`` without changing the model.

    Args:
        model: a masked autoencoder or a timm model.
        weights: tensors of the file.
        source: model that wrote the weights; None if unknown, then position grids are assumed to be square.
        everything: count the complete model, not only its backbone.

    Returns:
        The report, and the matching tensors in the model's shapes, by the model's names.
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
    parts = {name: _part_of(name, prefix) for name in (*target, *found)}
    optional: dict[str, Collection[str]] = {"decoder": (), "classifier": fitted, "norm": found}
    counted = [name for name in target if everything or name in optional.get(parts[name], target)]
    unexpected = [name for name in found if name not in target and (everything or parts[name] in ("head", "trunk"))]
    matched = sum(target[name].numel() for name in counted if name in fitted)
    total = sum(target[name].numel() for name in counted) + sum(found[name].numel() for name in unexpected)
    report = LoadReport(
        arch=_arch_of(model),
        layout=weights.layout,
        everything=everything,
        same_family=family_of(_backbone_of(model).state_dict()) == weights.family,
        percent=100 * matched / total,
        missing=tuple(_describe(name, target[name], found) for name in counted if name not in fitted),
        unexpected=tuple(f"{name} {list(found[name].shape)}" for name in unexpected),
        foreign=tuple(n for n in unexpected if parts[n] == "trunk" and not _is_another_block(n, target)),
        resized=tuple(
            name.removeprefix(prefix).removesuffix(".weight")
            for name, value in fitted.items()
            if value is not found[name] and (name in grids or name.endswith(_FIRST_CONVOLUTIONS))
        ),
        fresh=tuple(module.removeprefix(prefix) for module in _outer_modules(target, fitted)),
        unused=_unused_parts(weights, target, fitted, prefix),
    )
    return report, fitted


def complaint(report: LoadReport, weights: NamedWeights, source: ModelConfig | None, path: Path) -> CheckpointError:
    """Return the error for a report that is not sufficient."""
    likely = source.arch if source else likely_arch(weights)
    if not report.same_family:
        return CheckpointError(
            f"{path} holds {likely or f'a backbone of the {weights.family} family'} ({weights.layout} layout), which "
            f"is of a different family from {report.arch}.",
            f"Set model.arch={likely}." if likely else "Use a checkpoint of this architecture.",
        )
    if report.foreign:
        return _foreign_complaint(report, path)
    part = "weights" if report.everything else "backbone"
    required = "all" if report.everything else f"{REQUIRED_PERCENT} %"
    problem = (
        f"{path}: {_floor(report.percent)} % of {report.arch}'s {part} was found in this file "
        f"({weights.layout} layout), but {required} must match."
    )
    for title, names in (("Missing", report.missing), ("Not in the model", report.unexpected)):
        if names:
            problem += f" {title}: {listed(names)}."
    fixes = []
    if likely and likely != report.arch:
        problem += f" The file looks like {likely}."
        fixes.append(f"set model.arch={likely}")
    if report.everything:
        fixes.append("use the stage, classes and model.* keys that the checkpoint was written with")
    elif not fixes and report.percent:
        fixes.append("set train.allow_partial_weights=true to initialise what is missing")
    fix = ", or ".join(fixes) or "use a checkpoint of this architecture"
    return CheckpointError(problem, f"{fix[0].upper()}{fix[1:]}.")


def _foreign_complaint(report: LoadReport, path: Path) -> CheckpointError:
    """Return the error for a file whose model has the same names but computes a different function."""
    parts = foreign_parts(report.foreign)
    named = f" ({', '.join(parts)})" if parts else ""
    shown = [text for text in report.unexpected if text.split(" ")[0] in report.foreign]
    count, them = ("a tensor", "it") if len(report.foreign) == 1 else (f"{len(report.foreign)} tensors", "them")
    return CheckpointError(
        f"{path} holds {count} that {report.arch} does not have{named}: {listed(shown)}. Without {them} "
        f"the model would compute a different function from the trained one ({report.layout} layout).",
        OTHER_ARCHITECTURES,
    )


@dataclass(frozen=True)
class _PositionGrid:
    """The grid of a position embedding in the model and in the file (None: unknown)."""

    new: tuple[int, int]
    old: tuple[int, int] | None
    num_prefix_tokens: int


def _grids(model: nn.Module, source: ModelConfig | None) -> dict[str, _PositionGrid]:

    def grid(new: tuple[int, int], split: int, num_prefix_tokens: int) -> _PositionGrid:
        if source is None:
            return _PositionGrid(new, None, num_prefix_tokens)
        height, width = source.input_size
        return _PositionGrid(new, (height // source.unit * split, width // source.unit * split), num_prefix_tokens)

    backbone = _backbone_of(model)
    name = "pos_embed" if backbone is model else "encoder.backbone.pos_embed"
    grids = {}
    if isinstance(backbone, timm.models.VisionTransformer):
        grids[name] = grid(tuple(backbone.patch_embed.grid_size), 1, backbone.num_prefix_tokens)
    elif isinstance(backbone, timm.models.Hiera):
        grids[name] = grid(tuple(backbone.tokens_spatial_shape), backbone.mask_unit_size[0], 0)
    if isinstance(model, MaskedAutoencoder) and not isinstance(model.decoder, ConvNeXtDecoder):
        encoder = model.encoder
        grids["decoder.pos_embed"] = grid(encoder.token_grid, encoder.split, encoder.num_prefix_tokens)
    return grids


def _fit(name: str, value: Tensor, target: Tensor, grid: _PositionGrid | None) -> Tensor | None:
    """Convert a value to the target's shape; return None if that is impossible."""
    if grid is not None:
        value = _fit_positions(value, grid)
    elif name.endswith(_FIRST_CONVOLUTIONS):
        value = _fit_first_convolution(value, target)
    elif [n for n in value.shape if n > 1] == [n for n in target.shape if n > 1]:
        value = value.reshape(target.shape)  # a 1x1 convolution for a linear layer, and vice versa
    return value if value.shape == target.shape else None


def _fit_positions(value: Tensor, grid: _PositionGrid) -> Tensor:
    if value.ndim != 3:
        return value
    tokens = value.shape[1] - grid.num_prefix_tokens
    side = math.isqrt(max(tokens, 0))
    guesses = [g for g in (grid.old, (side, side), grid.new) if g is not None and g[0] * g[1] == tokens]
    if not guesses:
        return value
    return resample_abs_pos_embed(
        value, list(grid.new), old_size=list(guesses[0]), num_prefix_tokens=grid.num_prefix_tokens
    )


def _fit_first_convolution(value: Tensor, target: Tensor) -> Tensor:
    if value.ndim != 4 or value.shape[0] != target.shape[0]:
        return value
    if value.shape[1] != target.shape[1]:
        value = adapt_input_conv(target.shape[1], value, base_chans=value.shape[1])
    return resample_patch_embed(value, list(target.shape[2:]))


def _part_of(name: str, prefix: str) -> str:
    """Return the part of the model that a tensor belongs to; fusion heads count as "decoder"."""
    inner = name.removeprefix(prefix)
    if not name.startswith(prefix):
        return "decoder"
    if inner in _CLASSIFIER:
        return "classifier"
    if inner.startswith(_FINAL_NORMS):
        return "norm"
    return "head" if inner.startswith(("head.", "pre_logits.")) else "trunk"


def _outer_modules(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Return the outermost modules that hold the names not in ``others``, but none of ``others``."""
    modules: dict[str, None] = {}
    for name in names:
        if name in others:
            continue
        parts = name.split(".")
        outer = (".".join(parts[:n]) for n in range(1, len(parts)))
        modules[next((m for m in outer if not any(key.startswith(f"{m}.") for key in others)), name)] = None
    return sorted(modules)


def _unused_parts(weights: NamedWeights, target: State, fitted: State, prefix: str) -> tuple[str, ...]:
    places = {name: prefix + name for name in weights.backbone} | {name: name for name in weights.rest}
    unused = [name for name, place in places.items() if place not in target]
    return tuple(_outer_modules(unused, {name for name, place in places.items() if place in fitted}))


def _is_another_block(name: str, target: State) -> bool:
    """Return whether a name belongs to a block or stage that the model does not have at all."""
    block = re.match(r"(.*\b(?:blocks|stages)\.\d+\.)", name)
    return block is not None and not any(other.startswith(block[1]) for other in target)


def _describe(name: str, target: Tensor, found: State) -> str:
    shape = f"{name} {list(target.shape)}"
    return f"{shape} (the file has {list(found[name].shape)})" if name in found else shape


def _backbone_of(model: nn.Module) -> nn.Module:
    return model.encoder.backbone if isinstance(model, MaskedAutoencoder) else model


def _arch_of(model: nn.Module) -> str:
    """Return the architecture's name in the table, or timm's name if it is not in the table."""
    config = getattr(_backbone_of(model), "pretrained_cfg", {})
    timm_name = config.get("architecture", type(model).__name__)
    return next((row.name for row in ARCHITECTURES.values() if row.timm_name == timm_name), timm_name)


def _floor(percent: float) -> str:
    """Format with one decimal, rounded down, so that only a complete match is shown as 100."""
    return f"{math.floor(percent * 10) / 10:g}"
