"""The table that summarizes a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fabric import Fabric

from openmae.distributed.launch import describe_device
from openmae.distributed.rendezvous import world_of
from openmae.models.build import ModelConfig
from openmae.models.operations import decoder_share
from openmae.spec.architectures import visible_units
from openmae.spec.metrics import label
from openmae.spec.sections.train import TrainSpec
from openmae.storage.printable import counted
from openmae.training.finetune import FinetuneTask
from openmae.training.optim import Schedule
from openmae.training.state import Task

Rows = list[tuple[str, str]]


def recipe_rows(
    fabric: Fabric,
    task: Task,
    config: ModelConfig,
    groups: Sequence[dict],
    schedule: Schedule,
    settings: TrainSpec,
    images: tuple[int, int],
    batch_size: int,
) -> Rows:
    """Return the label and the value of each row.

    ``groups`` are the optimizer's parameter groups, ``images`` the numbers of training and validation images, and
    ``batch_size`` the images per process.
    """
    height, width = config.input_size
    units = (height // config.unit) * (width // config.unit)
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in task.model.parameters())
    rows = [
        ("architecture", f"{config.arch}, {height} x {width} px, {counted(config.in_chans, 'channel')}"),
        ("parameters", f"{total / 1e6:.2f} M, {trained / 1e6:.2f} M of them trained"),
    ]
    if isinstance(task, FinetuneTask):
        rows.append(("classes", f"{config.num_classes}"))
    else:
        hidden = units - visible_units(units, config.mask_ratio)
        masked = f"{hidden} of {units} units of {config.unit} px ({config.mask_ratio:g})"
        decoder = f"{config.decoder_depth} x {config.decoder_embed_dim}"
        share = f"; a training step predicts {task.targets:g} of the masked ones" if task.targets != 1 else ""
        cross = ", cross-attention" if config.decoder_attention == "cross" else ""
        costs = f", {decoder_share(config):.0%} of the operations of a step"
        rows += [("masked", masked + share), ("decoder", decoder + cross + costs)]
    rows += [
        ("images", f"{images[0]:,} to train, {f'{images[1]:,}' if images[1] else 'none'} to validate"),
        ("batch", _batch_text(fabric, batch_size, settings.accum_grad_batches)),
        ("epochs", f"{schedule.epochs} x {counted(schedule.steps_per_epoch, 'step')}"),
    ]
    step = batch_size * fabric.world_size
    if left_out := images[0] % step:
        why = f"{images[0]:,} is not a multiple of {step}"
        rows.append(("left out", f"{counted(left_out, 'image')} per epoch, others in each epoch: {why}"))
    rows += [
        ("schedule", _schedule_text(schedule)),
        ("learning rate", _rates_text(groups, schedule.peak)),
        (
            "best checkpoint",
            f"{'lowest' if task.lower_is_better else 'highest'} {label(task.monitor)} ({task.monitor})",
        ),
        ("device", describe_device(fabric) + (", compiled" if settings.compile else "")),
    ]
    return rows


def _batch_text(fabric: Fabric, batch_size: int, accumulated: int) -> str:
    world = world_of(fabric)
    factors = [f"{batch_size} images"]
    if world.nodes > 1:
        factors.append(f"{world.nodes} nodes")
    if world.per_node > 1:
        factors.append(f"{world.per_node} processes")
    if accumulated > 1:
        factors.append(f"{accumulated} accumulated")
    total = batch_size * fabric.world_size * accumulated
    return f"{total} = {' x '.join(factors)}" if len(factors) > 1 else f"{total}"


def _schedule_text(schedule: Schedule) -> str:
    optim = schedule.optim
    number, unit = (optim.warmup_epochs, "epoch") if optim.warmup_steps is None else (optim.warmup_steps, "step")
    warmup = f"{counted(number, unit)} of warmup, then " if number else ""
    if optim.lr_scheduler == "cosine":
        return f"{warmup}cosine to 0"
    milestones = ", ".join(map(str, optim.milestones)) or "never"
    return f"{warmup}x {optim.gamma:g} at epochs {milestones}"


def _rates_text(groups: Sequence[dict], lr: float) -> str:
    scales = {group["name"].removesuffix(", no decay"): group["lr_scale"] for group in groups}
    if len(set(scales.values())) == 1:
        return f"{lr * scales.popitem()[1]:.3g}"
    head = [f"head {lr * scales.pop('head'):.3g}"] if "head" in scales else []
    if len(scales) == 1:
        layers = [f"{name} {lr * scale:.3g}" for name, scale in scales.items()]
    else:
        numbers = sorted(int(name.removeprefix("layer ")) for name in scales)
        low, high = lr * min(scales.values()), lr * max(scales.values())
        rates = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        layers = [f"layers {numbers[0]} to {numbers[-1]}: {rates}"]
    return ", ".join([*layers, *head])
