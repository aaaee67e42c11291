"""The papers' settings of a training run, by family and size.

Sources: arXiv:2111.06377 (ViT), arXiv:2301.00808 (ConvNeXt V2), arXiv:2306.00989 (Hiera), and their official code. The
papers do not train ViT-Tiny and ViT-Small; they get the settings of ViT-Base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from openmae.spec.architectures import Family
from openmae.spec.choices import Choice, Facts, even, global_batch, processes
from openmae.spec.schema import ExperimentSpec

_AUGMENTATION = "dataset.augmentation."
PRETRAINING_BATCH, FINETUNING_BATCH = 4096, 1024  # images per optimizer step
PRETRAINING_EPOCHS, PRETRAINING_WARMUP = 800, 40
PRETRAINING_BASE_LR: dict[Family, float] = {"vit": 1.5e-4, "convnextv2": 1.5e-4, "hiera": 8e-4 * 256 / 4096}


class Finetuning(NamedTuple):
    """Settings of fine-tuning; ``base_lr`` is the learning rate per 256 images of a global batch."""

    base_lr: float
    layer_decay: float
    drop_path: float
    epochs: int
    warmup: int
    smoothing: float = 0.1
    ema_decay: float = 0.0


_VIT = Finetuning(5e-4, 0.65, 0.1, 100, 5)
_ATTO = Finetuning(2e-4, 0.9, 0.1, 600, 0, smoothing=0.2, ema_decay=0.9999)
_FINETUNING = {
    "vit_large_patch16": Finetuning(1e-3, 0.75, 0.2, 50, 5),
    "vit_huge_patch14": Finetuning(1e-3, 0.75, 0.3, 50, 5),
    "convnextv2_tiny": Finetuning(8e-4, 0.9, 0.2, 300, 40, ema_decay=0.9999),
    "convnextv2_base": Finetuning(6.25e-4, 0.6, 0.1, 100, 20, ema_decay=0.9999),
    "convnextv2_large": Finetuning(6.25e-4, 0.6, 0.1, 100, 20, ema_decay=0.9999),
    "convnextv2_huge": Finetuning(6.25e-4, 0.75, 0.3, 50, 10, ema_decay=0.9999),
    "hiera_tiny_224": Finetuning(5e-4, 0.65, 0.1, 300, 5),
    "hiera_small_224": Finetuning(5e-4, 0.65, 0.1, 200, 5),
    "hiera_base_224": Finetuning(5e-4, 0.7, 0.1, 100, 5),
    "hiera_base_plus_224": Finetuning(5e-4, 0.7, 0.1, 100, 5),
    "hiera_large_224": Finetuning(2.5e-4, 0.85, 0.2, 50, 5),
    "hiera_huge_224": Finetuning(2.5e-4, 0.85, 0.3, 50, 5),
}


def finetuning_of(arch: str, family: Family) -> Finetuning:
    """Return the settings with which the paper fine-tunes an architecture."""
    return _FINETUNING.get(arch, _ATTO if family == "convnextv2" else _VIT)


def paper_settings(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    """Take the settings of the paper, with a global batch that is not larger than the data set."""
    stage, row = spec.train.stage, spec.model.architecture
    tuned = finetuning_of(row.name, row.family)
    pretrains = stage == "pretrain"
    total = PRETRAINING_BATCH if pretrains else FINETUNING_BATCH
    reason = f"the paper of {row.name}"
    total = min(total, even(facts.images or total))
    size = max(even(min(total // processes(spec), 256)), 1)
    yield Choice("dataset.batch_size", size, f"{total} images per step, as far as the data allow")
    if not spec.is_set("dataset.batch_size"):
        yield Choice("train.accum_grad_batches", max(total // (size * processes(spec)), 1), reason)
    yield Choice("train.num_epochs", PRETRAINING_EPOCHS if pretrains else tuned.epochs, reason)
    yield Choice("train.optim.lr_scheduler", "cosine", reason)
    smallest = min(0.2 if pretrains else 0.08, spec.dataset.augmentation.max_scale)
    yield Choice(f"{_AUGMENTATION}min_scale", smallest, reason)
    if not pretrains:
        yield Choice("train.optim.layer_decay", tuned.layer_decay, reason)
        yield Choice("train.ema_decay", tuned.ema_decay, reason)
        yield Choice("model.drop_path_rate", tuned.drop_path, reason)
        yield Choice(f"{_AUGMENTATION}smoothing", tuned.smoothing, reason)
        yield Choice(f"{_AUGMENTATION}re_prob", 0.25, reason)
        yield Choice(f"{_AUGMENTATION}interpolation", "bicubic", reason)


def paper_schedule(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    """Take the paper's learning rate, and its share of warmup."""
    row, batch, epochs = spec.model.architecture, global_batch(spec), spec.train.num_epochs
    tuned = finetuning_of(row.name, row.family)
    pretrains = spec.train.stage == "pretrain"
    base = PRETRAINING_BASE_LR[row.family] if pretrains else tuned.base_lr
    if spec.train.optim.base_lr is None:
        rate = min(base * batch / 256, 1.0)
        yield Choice("train.optim.lr", float(f"{rate:.3g}"), f"{base:g} x {batch} / 256, for {batch} images per step")
    if not spec.is_set("train.optim.warmup_steps"):
        usual, of = (PRETRAINING_WARMUP, PRETRAINING_EPOCHS) if pretrains else (tuned.warmup, tuned.epochs)
        yield Choice("train.optim.warmup_epochs", round(usual * epochs / of), f"{usual} of {of} epochs in the paper")
