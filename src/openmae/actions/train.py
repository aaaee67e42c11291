"""``mae train``: pretrain or fine-tune a model, and write its backbone and a report."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import nn

from openmae.actions.plan import Plan, make_plan, new_run
from openmae.actions.profiling import leave_profile
from openmae.actions.restart import check_restart, set_aside
from openmae.actions.run import begin_results, running, show_table
from openmae.actions.run_report import RunReport
from openmae.actions.sections import best_epoch
from openmae.actions.sources import loader_settings, train_transform, training_copies
from openmae.checkpoints.folder import CheckpointFolder
from openmae.checkpoints.format import Checkpoint, read_checkpoint, read_training_state, save_backbone
from openmae.checkpoints.matching import LoadReport
from openmae.checkpoints.resume import best_was_set_aside
from openmae.checkpoints.shapes import patch_size_of
from openmae.checkpoints.weights import load_into
from openmae.data.loaders import EvaluationLoader, TrainingLoader
from openmae.data.scaled_copies import kept_in_cache
from openmae.data.transforms import EvalTransform
from openmae.distributed.fsdp import shard
from openmae.distributed.launch import build_fabric, check_agreement, launch
from openmae.distributed.signals import PreemptionWatch
from openmae.errors import CheckpointError, blaming
from openmae.models.blocks import recompute_activations
from openmae.models.build import build_model
from openmae.models.mae import MaskedAutoencoder
from openmae.models.normalise import Normaliser
from openmae.results.metrics_csv import read_metrics
from openmae.results.profile import Breakdown
from openmae.results.report import is_final
from openmae.results.status import StatusLog
from openmae.spec.load import choices_of
from openmae.spec.metrics import EPOCH_TRAIN_LOSS
from openmae.spec.recipe import chosen_values
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import get
from openmae.storage import layout
from openmae.training.elastic import BatchLayout, same_position
from openmae.training.loggers import Loggers, open_wandb
from openmae.training.optim import Schedule, build_adamw, finetuning_groups, freeze, pretraining_groups
from openmae.training.profiler import StepClock
from openmae.training.state import Outputs
from openmae.training.summary import recipe_rows
from openmae.training.tasks import build_task
from openmae.training.trainer import Trainer

log = logging.getLogger("openmae")


def run(spec: ExperimentSpec, *, restart: bool = False) -> dict[str, float]:
    """Train or resume in the results folder, up to the last epoch; return the metrics of the last epoch.

    A finished run is not changed. With ``restart``, a new run begins, and the earlier one gets a dated name. With
    ``train.stop_after_epoch``, the run pauses after that epoch; the backbone and the final report are written after the
    last epoch.

    Raises:
        UserError: the spec or the data are invalid; nothing was trained.
        RunError: training failed; the checkpoints written so far are valid.
        KeyboardInterrupt: Ctrl-C, or (as ``Preempted``) SIGTERM or SIGUSR1; a checkpoint was written.
    """
    if restart:
        check_restart(spec)
    with PreemptionWatch(), running(spec, "train") as this_run:
        spec = this_run.spec
        plan = make_plan(spec, this_run.folder, restart=restart)
        if restart and this_run.leads:
            set_aside(this_run)
        if _nothing_left(plan):
            this_run.skipped = f"All {plan.epochs_done} epochs are trained already; nothing was changed."
            more = "train.num_epochs" if spec.train.stop_after_epoch is None else "train.stop_after_epoch"
            log.warning("%s Raise %s to train longer, or begin a new run: %s.", this_run.skipped, more, new_run(spec))
            return _last_metrics(plan.folder)
        train = plan.spec.train
        fabric = build_fabric(
            "train", train.num_gpus, train.gpu_ids, train.num_nodes, train.precision, train.distributed_strategy
        )
        outcome = launch(fabric, _work, plan)
        this_run.facts = outcome.facts
        return outcome.metrics


class TrainingEnd(NamedTuple):
    """Metrics of the last epoch, and duration, peak memory and versions."""

    metrics: dict[str, float]
    facts: Mapping[str, int | str]


def _nothing_left(plan: Plan) -> bool:
    """Return whether an earlier run has done everything: its epochs and, after the last, backbone and report."""
    train = plan.spec.train
    if train.last_epoch < train.num_epochs:
        return plan.epochs_done >= train.last_epoch
    complete = (plan.folder / layout.BACKBONE).is_file() and is_final(plan.folder / layout.REPORT)
    return complete and plan.epochs_done >= train.num_epochs


def _last_metrics(folder: Path) -> dict[str, float]:
    epochs = [row for row in read_metrics(folder / layout.METRICS) if "train_loss" not in row and row["step"]]
    names = {EPOCH_TRAIN_LOSS: "train_loss"}
    last = epochs[-1] if epochs else {}
    return {names.get(name, name): value for name, value in last.items() if name not in ("step", "epoch")}


def _work(fabric: Fabric, plan: Plan) -> TrainingEnd:
    """Train in one process."""
    plan = _agreed(fabric, plan)
    spec, config = plan.spec, plan.config
    torch.manual_seed(spec.train.seed)  # the same weights in every process
    torch.backends.cudnn.benchmark = spec.train.cudnn.benchmark
    torch.backends.cudnn.deterministic = spec.train.cudnn.deterministic
    state = read_training_state(plan.resume, plan.key) if plan.resume else None
    model = build_model(config)
    weights = _initial_weights(model, plan)
    freeze(model, spec.train.freeze)
    if spec.train.activation_checkpointing:
        recompute_activations(model)
    shard(model, config, fabric)
    task = build_task(spec, model, Normaliser(plan.info.mean, plan.info.std))
    train_loader, val_loader = _loaders(fabric, plan)
    schedule = _schedule(spec, fabric.world_size, len(train_loader))
    groups = _groups(plan, model)
    optimizer = build_adamw(groups, schedule.peak, spec.train.optim.momentum, spec.train.optim.beta2)
    images = (len(plan.train), len(plan.val) if plan.val else 0)
    rows = recipe_rows(fabric, task, config, groups, schedule, spec.train, images, spec.dataset.batch_size)
    rows.append(("weights", weights))
    outputs = _outputs(fabric, plan, state)
    trainer = Trainer(fabric, task, optimizer, schedule, spec.train, train_loader, val_loader, outputs)
    if fabric.is_global_zero:
        show_table(f"{spec.train.stage} recipe", rows)
        _show_choices(plan)
    if state is not None:
        _resume(trainer, plan, state, len(train_loader))
        state = None  # free the memory: weights, moments and averaged weights
    breakdown, verdict, report = None, "", RunReport(fabric, plan, trainer, rows)
    try:
        metrics = trainer.fit(report) or _last_metrics(plan.folder)
    finally:
        for loader in filter(None, (train_loader, val_loader)):
            loader.close()
        if outputs.loggers:
            outputs.loggers.close()
        if outputs.clock is not None and not isinstance(sys.exception(), Exception):  # also after Ctrl-C
            breakdown = leave_profile(fabric, spec, plan.folder, outputs.clock.read())
    best = best_epoch(plan.folder, task.monitor, trainer.progress.best) if fabric.is_global_zero else ""
    if trainer.progress.epoch < spec.train.num_epochs:
        log.info("Paused after epoch %d of %d (train.stop_after_epoch).", trainer.progress.epoch, spec.train.num_epochs)
    else:
        verdict = _finish(fabric, plan, trainer, report, breakdown)
    for text in filter(None, (best, verdict)):
        log.info("%s", text)
    return TrainingEnd(metrics, report.facts)


def _show_choices(plan: Plan) -> None:
    """Print the options that the recipe has chosen, with the reasons."""
    choices, recipe = choices_of(plan.spec), plan.spec.train.recipe
    if plan.resume:
        log.info("Options that are not set have the values of the first start; see experiment.yaml.")
    elif choices:
        show_table(f"chosen by train.recipe={recipe}", [(f"{key}={value}", why) for key, value, why in choices])


def _resume(trainer: Trainer, plan: Plan, state: dict[str, Any], batches_per_epoch: int) -> None:
    """Load the training state of a checkpoint; errors name the file."""
    layouts = BatchLayout.of(state["openmae"]["spec"]), BatchLayout.of(plan.info.spec)
    try:
        with blaming(str(plan.resume)):
            trainer.resume({**state, "progress": same_position(state["progress"], *layouts, batches_per_epoch)})
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{plan.resume} does not hold the state of a run of {plan.config.arch} ({said}).",
            "Use an older checkpoint, or give this one as train.pretrained_model_path to start from its weights.",
        ) from error
    progress, monitor = trainer.progress, trainer.task.monitor
    before = progress.best_metric or get(state, "openmae.spec.train.optim.monitor_name")
    if progress.best is not None and before != monitor:
        log.warning(
            "%s was picked by %s and is now picked by %s: the next epoch counts as the best so far.",
            *(layout.BEST, before, monitor),
        )
    if best_was_set_aside(plan.folder) or before != monitor:
        progress.best = None  # the next epoch counts as the best so far
    log.info("Resuming from %s, after epoch %d, step %d.", plan.resume, progress.epoch, progress.step)


def _agreed(fabric: Fabric, plan: Plan) -> Plan:
    """Return the plan with the description and the seed of rank 0; refuse nodes with other images or checkpoints."""
    check_agreement(
        fabric,
        lambda: {
            "training set": plan.train.digest,
            "validation set": plan.val.digest if plan.val else "none",
            "checkpoint to resume from": plan.resume.name if plan.resume else "none",
        },
    )
    # each node has drawn another seed (train.seed=-1), and its recipe may have found another machine
    info, chosen, reasons = fabric.broadcast((plan.info, chosen_values(plan.spec), dict(plan.spec.chosen)))
    spec = plan.spec.choosing(chosen, reasons).replaced({"train.seed": info.spec["train"]["seed"]})
    return replace(plan, info=info, spec=spec)


def _initial_weights(model: nn.Module, plan: Plan) -> str:
    """Load the pretrained weights into the model of a new run; return the source of the weights in words."""
    pretrained = plan.spec.train.pretrained_model_path
    if plan.resume:
        return f"{plan.resume.name}{f', of a run that began with {pretrained}' if pretrained else ''}"
    return f"{pretrained}: {_load_pretrained(model, plan)}" if pretrained else "random"


def _load_pretrained(model: nn.Module, plan: Plan) -> LoadReport:
    with blaming("train.pretrained_model_path"):
        train = plan.spec.train
        checkpoint = read_checkpoint(train.pretrained_model_path, plan.key, train.pretrained_weights_key)
        info = checkpoint.info
        if info is not None and info.model.arch != plan.config.arch:
            raise CheckpointError(
                f"{checkpoint.path} holds {info.model.arch}, but model.arch is {plan.config.arch}.",
                f"Set model.arch={info.model.arch}, or give a checkpoint of {plan.config.arch}.",
            )
        _check_patches(checkpoint, plan)
        report = load_into(model, checkpoint, part="backbone", allow_partial=train.allow_partial_weights)
    if info is not None and not plan.spec.is_set("dataset.augmentation.input_size"):
        _compare_size(info.model.input_size, plan.config.input_size)
    return report


def _compare_size(trained: tuple[int, int], used: tuple[int, int]) -> None:
    """Warn if the default image size is not the one that the weights were trained at."""
    if trained != used:
        height, width = trained
        log.warning(
            "The weights were trained at %dx%d px, and this run uses %dx%d px. Set "
            "dataset.augmentation.input_size=%s to keep the size.",
            *(*trained, *used, height if height == width else f"[{height},{width}]"),
        )


def _check_patches(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse another patch size, unless the user has set one and so asked for resampling."""
    held, unit = patch_size_of(checkpoint.weights), plan.config.unit
    if held in (None, unit) or plan.config.architecture.family != "vit" or plan.spec.is_set("model.patch_size"):
        return
    raise CheckpointError(
        f"{checkpoint.path} has patches of {held} pixels, and {plan.config.arch} has {unit}.",
        f"Set model.patch_size={held} to keep those of the file, or model.patch_size={unit} to resample them.",
    )


def _groups(plan: Plan, model: nn.Module) -> list[dict]:
    optim = plan.spec.train.optim
    if plan.config.num_classes:
        return finetuning_groups(model, plan.config, optim.weight_decay, optim.layer_decay, optim.backbone_multiplier)
    return pretraining_groups(model, optim.weight_decay)


def _schedule(spec: ExperimentSpec, processes: int, batches: int) -> Schedule:
    """Return the schedule for ``batches`` per process and epoch."""
    train = spec.train
    peak = train.optim.effective_lr(spec.dataset.batch_size * processes * train.accum_grad_batches)
    return Schedule(train.optim, peak, train.num_epochs, math.ceil(batches / train.accum_grad_batches))


def _loaders(fabric: Fabric, plan: Plan) -> tuple[TrainingLoader, EvaluationLoader | None]:
    spec = plan.spec
    settings = loader_settings(spec, spec.dataset.batch_size, plan.folder, fabric)
    copies = None
    if spec.dataset.cache == "on":
        workers = max(spec.dataset.num_workers_per_gpu, 1) * spec.train.num_gpus
        copies = kept_in_cache(training_copies(spec), plan.train, workers)
    train = TrainingLoader(plan.train, train_transform(spec), settings, spec.train.seed, copies)
    if plan.val is None:
        return train, None
    transform = EvalTransform(plan.config.input_size, plan.config.in_chans)
    return train, EvaluationLoader(plan.val, transform, settings)


def _outputs(fabric: Fabric, plan: Plan, state: dict[str, Any] | None) -> Outputs:
    spec = plan.spec
    checkpoints = CheckpointFolder(plan.folder, plan.config.arch, spec.train.keep_checkpoints, plan.key)
    if not fabric.is_global_zero:
        return Outputs(checkpoints, plan.facts, console=Console(force_terminal=False))  # one bar is enough
    begin_results(plan.folder, spec, resumed=state is not None)
    if state is not None:
        checkpoints.resume_from(state["progress"]["epoch"], state["progress"]["step"])
    wandb_run = open_wandb(spec.wandb.model_dump(), plan.folder, dict(plan.info.spec))
    clock = StepClock(fabric.device) if spec.train.profile else None
    loggers = Loggers(plan.folder, state["progress"]["step"] if state else None, wandb_run)
    return Outputs(checkpoints, plan.facts, loggers, StatusLog(plan.folder, append=True), clock)


def _finish(fabric: Fabric, plan: Plan, trainer: Trainer, report: RunReport, breakdown: Breakdown | None) -> str:
    """Write the backbone with timm's parameter names and the report, on rank 0.

    Returns:
        The verdict on the run; empty on other ranks.
    """
    model = trainer.evaluated_model()
    if not fabric.is_global_zero:
        return ""
    backbone = model.encoder.backbone if isinstance(model, MaskedAutoencoder) else model
    save_backbone(plan.folder / layout.BACKBONE, backbone.state_dict(), plan.info, plan.key)
    return report.finish(model, breakdown)
