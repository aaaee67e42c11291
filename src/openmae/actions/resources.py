"""``mae train --plan``: what a training run needs on GPUs, counted on any machine."""

from __future__ import annotations

import logging
from dataclasses import replace

from openmae.actions.facts import find_facts
from openmae.actions.sources import model_config, open_training_data
from openmae.distributed.launch import DTYPES, acting_precision
from openmae.models.gpu_memory import step_memory
from openmae.models.operations import step_operations
from openmae.spec.choices import Facts, processes
from openmae.spec.costs import GPU_SIZES, GPUS, REACHED
from openmae.spec.recipe import choose, in_words
from openmae.spec.schema import ExperimentSpec
from openmae.storage.encryption import resolve_key
from openmae.storage.printable import counted
from openmae.storage.urls import is_remote

log = logging.getLogger("openmae")

_GIB, _MIB = 2**30, 2**20
HEADS = (
    *("precision", "checkpointing", "state\n[GiB]", "image\n[MiB]"),
    *(f"batch,\n{size} GB" for size in GPU_SIZES),
    *(f"images/s,\n{name}" for name in GPUS),
)


def planned(spec: ExperimentSpec) -> tuple[ExperimentSpec, int | None]:
    """Return the spec with the choices of its recipe on a GPU, and the number of training images if it is known."""
    sources = (spec.dataset.train_data_sources, spec.dataset.val_data_sources)
    facts = Facts()
    if any(map(is_remote, sources)):
        log.warning("The images are not counted, because they are remote: durations are not estimated.")
    elif sources[0]:
        facts = find_facts(spec, *open_training_data(spec), resolve_key(spec.encryption_key))
    spec = choose(spec, replace(facts, on_gpu=True, fast_bf16=True, free_memory=None))
    if spec.train.stage == "finetune" and not spec.is_set("model.num_classes"):
        spec = spec.replaced({"model.num_classes": max(facts.classes, 2)})
    return spec, facts.images


def rows(spec: ExperimentSpec) -> list[tuple[str, ...]]:
    """Return a row for each precision, without and with activation checkpointing; see ``HEADS``."""
    config, found = model_config(spec), []
    for precision in ("fp32", "bf16"):
        for recompute in (False, True):
            memory = step_memory(config, DTYPES[precision], recompute=recompute)
            sizes = (f"{memory.largest_batch(size) or '-'}" for size in GPU_SIZES)
            speeds = (f"{_two_digits(rate):,}" for rate in _rates(spec, precision, recompute).values())
            memories = f"{memory.state / _GIB:.1f}", f"{memory.image / _MIB:.0f}"
            found.append((precision, "yes" if recompute else "no", *memories, *sizes, *speeds))
    return found


def this_run(spec: ExperimentSpec, images: int | None) -> str:
    """Return the memory of the batch that the spec sets or its recipe chooses, and the duration if that is known."""
    train, batch = spec.train, spec.dataset.batch_size
    sharded = train.distributed_strategy == "fsdp"
    precision = acting_precision(train.precision, sharded, on_gpu=True)
    memory = step_memory(model_config(spec), DTYPES[precision], recompute=train.activation_checkpointing)
    gpus = processes(spec)
    averaged = 1.25 if train.stage == "finetune" and train.ema_decay else 1.0  # a fifth value per parameter
    memory = replace(memory, state=int(averaged * memory.state) // (gpus if sharded else 1))
    text = f"This run: batches of {counted(batch, 'image')} in {precision}"
    text += " with activation checkpointing" if train.activation_checkpointing else ""
    text += f" need {memory.needed(batch) / _GIB:.1f} GiB"
    if not images:
        return f"{text}."
    work = images * train.num_epochs
    times = [
        f"{in_words(work / rate / gpus)} on {f'{gpus} x ' if gpus > 1 else ''}{gpu}"
        for gpu, rate in _rates(spec, precision, train.activation_checkpointing).items()
    ]
    passes = f"{counted(train.num_epochs, 'epoch')} of {counted(images, 'image')}"
    return f"{text}. {passes}: about {', '.join(times)}."


def _rates(spec: ExperimentSpec, precision: str, recompute: bool) -> dict[str, float]:
    """Return the images/s of one GPU of each kind. Activation checkpointing makes four passes instead of three."""
    config = model_config(spec)
    operations = step_operations(config) * (4 / 3 if recompute else 1)
    share = REACHED[config.architecture.family]
    return {name: share * gpu.peak(precision) / operations for name, gpu in GPUS.items()}


def _two_digits(number: float) -> int:
    return int(float(f"{number:.2g}"))
