"""The facts from which a recipe chooses, its choices, and numbers that several rules need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from openmae.spec.schema import ExperimentSpec


@dataclass(frozen=True)
class Facts:
    """Facts about the data, the weights and the machine; None: unknown.

    Attributes:
        images: number of training images.
        val_images: number of validation images.
        per_class: number of labelled training images of a class (median over the classes).
        classes: number of classes of the training or, in pretraining, of the validation images.
        side: shorter side of the training images in pixels (median).
        weights: options that follow from the weights in ``train.pretrained_model_path``, by dotted key.
        on_gpu: whether the run uses GPUs.
        fast_bf16: whether the device multiplies bf16 matrices much faster than fp32 ones.
        free_memory: bytes that each process may use.
        bytes_of_state: bytes of weights, gradients and moments in each process.
        bytes_per_image: bytes of activations per image, measured with the choices so far.
        seconds_per_image: duration of a training step per image on all devices, measured with the choices so far.
        seconds_saved: the part of it that is saved by making samples from scaled copies.
        copies: bytes of the scaled copies of all images.
        room: bytes of them that the cache can take.
        searching: whether the run is a trial of a hyperparameter search, in which all trials have the same length.
    """

    images: int | None = None
    val_images: int = 0
    per_class: int | None = None
    classes: int = 0
    side: int | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    on_gpu: bool | None = None
    fast_bf16: bool = False
    free_memory: int | None = None
    bytes_of_state: int = 0
    bytes_per_image: float | None = None
    seconds_per_image: float | None = None
    seconds_saved: float = 0.0
    copies: int | None = None
    room: int = 0
    searching: bool = False


class Choice(NamedTuple):
    """The value that a recipe chooses for an option, and the reason."""

    key: str
    value: Any
    reason: str


Rule = Callable[[ExperimentSpec, Facts], Iterable[Choice]]


def processes(spec: ExperimentSpec) -> int:
    """Return the number of processes of a training run."""
    return spec.train.num_gpus * spec.train.num_nodes


def global_batch(spec: ExperimentSpec) -> int:
    """Return the number of images per optimizer step."""
    return spec.dataset.batch_size * processes(spec) * spec.train.accum_grad_batches


def even(number: int) -> int:
    """Return the largest even number that is not above a number, at least 2: Mixup mixes pairs."""
    return max(number - number % 2, 2)
