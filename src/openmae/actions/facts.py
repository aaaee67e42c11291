"""The facts from which ``train.recipe`` chooses: about the images, the weights and the machine, and a measured step."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from openmae.actions.sources import model_config, train_transform, training_copies
from openmae.checkpoints.format import read_config
from openmae.data.decode import CorruptImage
from openmae.data.image_dataset import Batch, ImageDataset
from openmae.data.index import ImageIndex
from openmae.data.scaled_copies import ScaledCopies, bytes_of_copies, entry_of
from openmae.data.transforms import rng_at
from openmae.distributed.launch import DTYPES, acting_precision
from openmae.errors import CheckpointError
from openmae.machine import usable_cores
from openmae.models.blocks import recompute_activations
from openmae.models.build import build_model
from openmae.models.memory import LiveMemory
from openmae.models.normalise import Normaliser
from openmae.models.operations import has_fast_bf16
from openmae.spec.choices import Facts, processes
from openmae.spec.costs import STATE_BYTES
from openmae.spec.load import check
from openmae.spec.notices import find_data_notices
from openmae.spec.recipe import choose
from openmae.spec.schema import ExperimentSpec
from openmae.storage import cache
from openmae.storage.encryption import Key
from openmae.training.optim import build_adamw, freeze
from openmae.training.tasks import build_task

_SAMPLE = 64  # images whose size is read
_MEASURED, _MOST_MEASURED = 8, 64  # images of the first measured step, and of a later one with the chosen batch
_MEASURED_SECONDS = 0.5  # the duration of all steps of a measurement, about
_FASTER_STEP = 1.1  # times as fast that a training step in bf16 must be
_CHEAP_SIDE = 256  # px; smaller images are decoded fast
_CONTROL_GROUP = Path("/sys/fs/cgroup")

log = logging.getLogger("openmae")


def decide(spec: ExperimentSpec, train: ImageIndex, val: ImageIndex | None, key: Key | None) -> ExperimentSpec:
    """Return the spec with the choices of its recipe. A short step is measured if a choice depends on it.

    Args:
        spec: the spec of a training run.
        train: its training images.
        val: its validation images, if it has any.
        key: the key of encrypted weights.

    Raises:
        SpecError: a value of the user cannot be used with the choices.
    """
    facts = find_facts(spec, train, val, key)
    chosen = choose(spec, facts)
    check(chosen)
    large = (facts.side or 0) >= _CHEAP_SIDE and spec.train.recipe == "auto" and not spec.is_set("dataset.cache")
    if large or {"dataset.batch_size", "train.num_epochs", "train.precision"} & chosen.chosen.keys():
        facts = measure(spec, facts, train)
        chosen = choose(spec, facts)
        check(chosen)
    for notice in find_data_notices(chosen, facts):
        log.warning(notice)
    return chosen


def find_facts(spec: ExperimentSpec, train: ImageIndex, val: ImageIndex | None, key: Key | None) -> Facts:
    """Return the facts that are known without training."""
    counts = Facts(
        images=len(train),
        val_images=len(val) if val else 0,
        classes=len((train if spec.train.stage == "finetune" else val or train).class_names),
    )
    if spec.train.recipe == "tao":  # it chooses nothing
        return counts
    on_gpu = torch.cuda.is_available()
    return replace(
        counts,
        per_class=_per_class(train) if spec.train.stage == "finetune" else None,
        side=_side(train),
        weights=_weights(spec, key),
        on_gpu=on_gpu,
        fast_bf16=has_fast_bf16(on_gpu),
        free_memory=_free_memory(on_gpu, spec.train.num_gpus),
    )


def _per_class(index: ImageIndex) -> int:
    counts = [0] * len(index.class_names)
    for label in index.labels or ():
        if label >= 0:
            counts[label] += 1
    return int(statistics.median(counts)) if counts else 0


def _side(index: ImageIndex) -> int | None:
    """Return the median of the shorter sides of some images; None if none can be read."""
    sides = []
    for number in index.spread(_SAMPLE):
        with suppress(CorruptImage), index.open(number) as file:
            sides.append(min(file.size))
    return int(statistics.median(sides)) if sides else None


def _weights(spec: ExperimentSpec, key: Key | None) -> Mapping[str, Any]:
    """Return the options that pretrained weights determine; none if training will reject the file."""
    train = spec.train
    if not train.pretrained_model_path:
        return {}
    with suppress(CheckpointError, OSError):
        config = read_config(train.pretrained_model_path, key, train.pretrained_weights_key)
        height, width = config.input_size
        found = {
            "model.arch": config.arch,
            "model.in_chans": config.in_chans,
            "dataset.augmentation.input_size": height if height == width else (height, width),
        }
        if config.architecture.family == "vit" and config.unit != config.architecture.mask_unit:
            found["model.patch_size"] = config.unit
        return found
    return {}


def _free_memory(on_gpu: bool, processes: int) -> int:
    """Return the bytes that each process of this machine may use, within its control group."""
    if on_gpu:
        return int(torch.cuda.mem_get_info()[0])
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # "max": no limit
        limit, used = (int((_CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return max(free, 0) // processes


def measure(spec: ExperimentSpec, facts: Facts, index: ImageIndex) -> Facts:
    """Return the facts with what is measured on training steps on some of the images.

    A model that trains about as fast in fp32 as in bf16 on this CPU has no fast bf16. Small steps are measured with the
    batch that is chosen, since the time per image depends on it.
    """
    first, from_copies = choose(spec, facts), 0.0
    if (facts.side or 0) >= _CHEAP_SIDE and not index.remote:
        copies = training_copies(first)
        room = cache.room(entry_of(index, copies))
        facts = replace(facts, copies=bytes_of_copies(index, copies), room=room)
        from_copies = _seconds_from_copies(first, index, copies)
    measured = _measure_step(first, facts, index, _MEASURED, from_copies)
    chosen, count = choose(spec, measured), _MEASURED
    batch = min(chosen.dataset.batch_size, _MOST_MEASURED)
    if batch != count and (measured.seconds_per_image or math.inf) * batch < _MEASURED_SECONDS:
        count = batch
        measured = _measure_step(chosen, measured, index, count, from_copies)
    if facts.on_gpu or "train.precision" not in chosen.chosen or not measured.seconds_per_image:
        return measured
    plain = replace(measured, fast_bf16=False)
    in_fp32 = _measure_step(choose(spec, plain), plain, index, count, from_copies)
    return in_fp32 if (in_fp32.seconds_per_image or 0.0) < _FASTER_STEP * measured.seconds_per_image else measured


def _measure_step(spec: ExperimentSpec, facts: Facts, index: ImageIndex, count: int, from_copies: float = 0.0) -> Facts:
    """Return the facts with the memory and the duration of a training step on ``count`` images.

    ``from_copies`` is how many seconds it takes to load an image from its scaled copy, if ``facts`` have copies.

    On several GPUs, only the memory is measured, on the CPU: a process must not use a GPU before it starts others.
    """
    alone = processes(spec) == 1
    on_gpu = bool(facts.on_gpu) and alone
    device = torch.device("cuda" if on_gpu else "cpu")
    began = time.perf_counter()
    batch = _load(spec, index, count)
    loading = (time.perf_counter() - began) / max(len(batch.images), 1)
    if not len(batch.images):
        return facts
    with torch.random.fork_rng():
        step = _Step(spec, batch, device)
        try:
            used, state = step.bytes_per_image(), step.bytes_of_state()
            seconds = step.seconds_per_image()
        except torch.OutOfMemoryError:
            return facts
        finally:
            del step
            if on_gpu:
                torch.cuda.empty_cache()
    facts = replace(facts, bytes_per_image=used, bytes_of_state=state)
    if not alone and facts.on_gpu:
        return facts
    total = _with_loading(spec, facts, seconds, loading)
    saved = total - _with_loading(spec, facts, seconds, min(loading, from_copies)) if facts.copies else 0.0
    return replace(facts, seconds_per_image=total, seconds_saved=saved)


def _with_loading(spec: ExperimentSpec, facts: Facts, seconds: float, loading: float) -> float:
    """Return the seconds of training per image, with those of loading it on one core."""
    if facts.on_gpu:  # images are loaded during the training
        return max(seconds, loading / max(spec.dataset.num_workers_per_gpu, 1))
    return seconds + loading / usable_cores()


def _seconds_from_copies(spec: ExperimentSpec, index: ImageIndex, copies: ScaledCopies) -> float:
    """Return the seconds that it takes to load an image from its scaled copy."""
    transform, found = train_transform(spec), []
    for number in index.spread(_MEASURED):
        with suppress(CorruptImage):
            found.append(copies.open(index, number))
    began = time.perf_counter()
    for number, copy in enumerate(found):
        transform(copy, rng_at(spec.train.seed, 0, number))
    return (time.perf_counter() - began) / max(len(found), 1)


def _load(spec: ExperimentSpec, index: ImageIndex, count: int) -> Batch:
    """Load some images as training does; those that cannot be read are left out."""
    data = ImageDataset(index, train_transform(spec), spec.train.seed)
    return data.collate([data[0, number] for number in index.spread(count)])


class _Step:
    """A training step of a new model."""

    def __init__(self, spec: ExperimentSpec, batch: Batch, device: torch.device) -> None:
        classes = spec.model.num_classes or 2
        if spec.train.stage == "finetune":
            spec = spec.replaced({"model.num_classes": classes, "dataset.augmentation.mixup_prob": 0.0})
        config = model_config(spec)
        sharded = spec.train.distributed_strategy == "fsdp"
        self._shards = processes(spec) if sharded else 1
        precision = acting_precision(spec.train.precision, sharded, device.type == "cuda")
        self._autocast = torch.autocast(device.type, DTYPES[precision], precision != "fp32")
        model = build_model(config)
        freeze(model, spec.train.freeze)
        if spec.train.activation_checkpointing:
            recompute_activations(model)
        self._model = model.to(device).train()
        self._optimizer = build_adamw([{"params": list(model.parameters())}], 0.0, 0.9, 0.95)
        augmentation = spec.dataset.augmentation
        self._task = build_task(spec, model, Normaliser(augmentation.mean, augmentation.std))
        self._batch = batch._replace(
            images=batch.images.to(device),
            labels=(torch.arange(len(batch.images)) % classes).to(device),
            indices=batch.indices.to(device),
        )

    def bytes_of_state(self) -> int:
        """Return the bytes of weights, gradients and moments in each process."""
        trained = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        return STATE_BYTES * trained // self._shards

    def bytes_per_image(self) -> float:
        """Return the bytes that a forward and a backward pass need per image, beyond weights and gradients."""
        with LiveMemory(self._model.parameters()) as memory:
            weights = memory.bytes
            loss = self._loss()
            kept = memory.bytes - weights
            loss.backward()
            gradients = memory.bytes - weights
            needed = max(kept, memory.peak - weights - gradients)
        self._optimizer.zero_grad()
        return needed / len(self._batch.images)

    def seconds_per_image(self) -> float:
        """Return the duration of the fastest of some steps, per image."""
        times: list[float] = []
        while len(times) < 2 or (sum(times) < _MEASURED_SECONDS and len(times) < 10):
            start = time.perf_counter()
            self._loss().backward()
            torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None]).item()
            self._optimizer.step()
            self._optimizer.zero_grad()
            if self._batch.images.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times) / len(self._batch.images)

    def _loss(self) -> Tensor:
        with self._autocast:
            return self._task.training_loss(self._model, self._batch, epoch=0)
