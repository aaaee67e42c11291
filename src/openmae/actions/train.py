"""``mae train``: pretrain or fine-tune, from a spec to a backbone and a report."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from openmae.actions.reports import train_report
from openmae.actions.run import Rows, running, show_table
from openmae.actions.sources import class_count, open_images
from openmae.data.dataset import AddressedSampler, check_same_classes
from openmae.data.images import ImageIndex
from openmae.data.loaders import EvaluationLoader, TrainingLoader, evaluation_loader, training_loader
from openmae.data.normalise import Normaliser
from openmae.data.transforms import EvalTransform, FinetuneTransform, PretrainTransform, Transform
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.mae import MaskedAutoencoder
from openmae.models.weights import CheckpointInfo, load_into, read_checkpoint, save_backbone
from openmae.results.pictures import reconstruction_grid
from openmae.results.status import StatusLog
from openmae.spec.load import load_spec, to_dict
from openmae.spec.schema import AugmentationSpec, ExperimentSpec
from openmae.training.checkpoints import CheckpointFolder, newest_checkpoint, read_training_state
from openmae.training.devices import build_fabric, launch, share_cores
from openmae.training.finetune import FinetuneTask, MixSettings
from openmae.training.loggers import Loggers, open_wandb
from openmae.training.optim import Schedule, build_adamw, finetuning_groups, freeze, pretraining_groups
from openmae.training.pretrain import PretrainTask
from openmae.training.recipe import recipe_rows
from openmae.training.trainer import LoopSettings, Outputs, Trainer

PICTURES = 8  # images of a reconstruction grid

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Plan:
    """A checked request: everything that can be wrong has been looked at before the first process starts."""

    spec: ExperimentSpec
    folder: Path
    train: ImageIndex
    val: ImageIndex | None
    info: CheckpointInfo
    resume: Path | None

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.info.model


def run(spec: ExperimentSpec) -> dict[str, float]:
    """Train to the last epoch, or go on from the newest checkpoint in the results folder.

    Returns:
        The last epoch's metrics; empty if there was nothing left to train.

    Raises:
        UserError: the request is wrong; nothing was trained.
        RunError: training failed; the checkpoints written so far are good.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written.
    """
    spec = load_spec(spec, action="train")
    folder = spec.results_folder("train")
    resume = _resume_path(spec, folder)
    with running(spec, "train", append=resume is not None):
        plan = _plan(spec, folder, resume)
        train = spec.train
        fabric = build_fabric("train", train.num_gpus, train.gpu_ids, train.num_nodes, train.precision)
        return launch(fabric, _work, plan)


def _resume_path(spec: ExperimentSpec, folder: Path) -> Path | None:
    typed = spec.train.resume_training_checkpoint_path
    return Path(typed) if typed else newest_checkpoint(folder)


def _plan(spec: ExperimentSpec, folder: Path, resume: Path | None) -> Plan:
    finetune = spec.train.stage == "finetune"
    train = open_images(spec.dataset.train_data_sources, "dataset.train_data_sources", labelled=finetune)
    val = None
    if spec.dataset.val_data_sources:
        val = open_images(spec.dataset.val_data_sources, "dataset.val_data_sources", labelled=finetune or None)
    if finetune and val is not None:
        check_same_classes(train, val)
    AddressedSampler(len(train), spec.dataset.batch_size, spec.train.seed, 0, spec.train.num_gpus)
    if spec.train.seed < 0:
        spec = spec.replaced({"train.seed": random.SystemRandom().randrange(2**31)})
        log.info("train.seed is -1: this run draws %d.", spec.train.seed)
    config = _model_config(spec, class_count(spec, train) if finetune else 0)
    augmentation = spec.dataset.augmentation
    info = CheckpointInfo(
        stage=spec.train.stage,
        model=config,
        class_names=train.class_names if finetune else (),
        mean=tuple(augmentation.mean or ()),
        std=tuple(augmentation.std or ()),
        spec=to_dict(spec),
    )
    if finetune and not spec.train.pretrained_model_path and resume is None:
        log.warning("train.pretrained_model_path is empty: fine-tuning starts from scratch, with random weights.")
    return Plan(spec, folder, train, val, info, resume)


def _model_config(spec: ExperimentSpec, num_classes: int) -> ModelConfig:
    model = spec.model
    return ModelConfig(
        arch=model.arch,
        input_size=spec.dataset.augmentation.size,
        in_chans=model.in_chans,
        patch_size=model.patch_size,
        drop_path_rate=_resolved(model.drop_path_rate),
        mask_ratio=_resolved(model.mask_ratio),
        norm_pix_loss=model.norm_pix_loss,
        decoder_depth=_resolved(model.decoder_depth),
        decoder_embed_dim=_resolved(model.decoder_embed_dim),
        global_pool=model.global_pool,
        num_classes=num_classes,
    )


def _resolved(value: Any) -> Any:
    assert value is not None, "load_spec fills in what the architecture decides"
    return value


def _work(fabric: Fabric, plan: Plan) -> dict[str, float]:
    """The run of one process."""
    share_cores(fabric)
    spec, config = plan.spec, plan.config
    torch.manual_seed(spec.train.seed)  # the same start in every process
    torch.backends.cudnn.benchmark = spec.train.cudnn.benchmark
    torch.backends.cudnn.deterministic = spec.train.cudnn.deterministic
    state = _read_resume_state(plan) if plan.resume else None
    model = build_classifier(config) if config.num_classes else build_autoencoder(config)
    if spec.train.pretrained_model_path and state is None:
        _load_pretrained(model, plan)
    freeze(model, spec.train.freeze)
    task = _task(plan, model)
    train_loader, val_loader = _loaders(fabric, plan)
    optim = spec.train.optim
    updates = -(-len(train_loader) // spec.train.accum_grad_batches)
    schedule = Schedule(
        optim.lr_scheduler, spec.train.num_epochs, updates, optim.warmup_epochs, optim.milestones, optim.gamma
    )
    settings = _loop_settings(plan, fabric)
    groups = _groups(plan, model)
    optimizer = build_adamw(groups, settings.lr, optim.momentum, _resolved(optim.beta2), fabric.device)
    images = (len(plan.train), len(plan.val) if plan.val else 0)
    rows = recipe_rows(fabric, model, config, groups, schedule, settings, images, spec.dataset.batch_size)
    outputs = _outputs(fabric, plan, state)
    trainer = Trainer(fabric, task, optimizer, schedule, settings, train_loader, val_loader, outputs)
    if fabric.is_global_zero:
        show_table(f"{spec.train.stage} recipe", rows)
    if state is not None:
        trainer.resume(state)
        log.info(
            "Resuming from %s, after epoch %d, step %d.",
            plan.resume,
            trainer.progress.epoch,
            trainer.progress.step,
        )
    if trainer.progress.epoch >= settings.num_epochs:
        log.warning(
            "All %d epochs are trained already. Raise train.num_epochs to train on, or set another results_dir.",
            settings.num_epochs,
        )
    try:
        metrics = trainer.fit()
    finally:
        if outputs.loggers:
            outputs.loggers.close()
    if fabric.is_global_zero:
        _finish(fabric, plan, trainer, rows)
    return metrics


def _read_resume_state(plan: Plan) -> dict[str, Any]:
    assert plan.resume is not None
    state = read_training_state(plan.resume)
    before, now = (_identity(info) for info in (CheckpointInfo.from_dict(state["openmae"]), plan.info))
    changed = [f"{key} was {before[key]} and is {now[key]}" for key in now if before[key] != now[key]]
    if changed:
        raise CheckpointError(
            f"Cannot resume from {plan.resume}: {'; '.join(changed)}.",
            "Set another results_dir for a new run (train.pretrained_model_path starts from given weights), or "
            "restore the old settings.",
        )
    return state


def _identity(info: CheckpointInfo) -> dict[str, Any]:
    """What may not change when a run is resumed."""
    model = {key: value for key, value in info.model.to_dict().items() if key != "drop_path_rate"}
    return {"stage": info.stage, **model, "class_names": list(info.class_names)}


def _load_pretrained(model: nn.Module, plan: Plan) -> None:
    checkpoint = read_checkpoint(plan.spec.train.pretrained_model_path)
    info = checkpoint.info
    if info is not None and info.model.arch != plan.config.arch:
        raise CheckpointError(
            f"train.pretrained_model_path holds {info.model.arch}, but model.arch is {plan.config.arch}.",
            f"Set model.arch={info.model.arch}, or give a checkpoint of {plan.config.arch}.",
        )
    report = load_into(model, checkpoint, part="backbone", allow_partial=plan.spec.train.allow_partial_weights)
    log.info("Weights: %s", report)


def _groups(plan: Plan, model: nn.Module) -> list[dict]:
    optim = plan.spec.train.optim
    if plan.config.num_classes:
        return finetuning_groups(model, plan.config, optim.weight_decay, optim.layer_decay, optim.backbone_multiplier)
    return pretraining_groups(model, optim.weight_decay)


def _loop_settings(plan: Plan, fabric: Fabric) -> LoopSettings:
    train = plan.spec.train
    global_batch = plan.spec.dataset.batch_size * fabric.world_size * train.accum_grad_batches
    return LoopSettings(
        num_epochs=train.num_epochs,
        lr=train.optim.effective_lr(global_batch),
        accum_grad_batches=train.accum_grad_batches,
        validation_interval=train.validation_interval,
        checkpoint_interval=train.checkpoint_interval,
        checkpoint_interval_unit=train.checkpoint_interval_unit,
        clip_grad_norm=train.clip_grad_norm,
        ema_decay=train.ema_decay if plan.config.num_classes else 0.0,
        seed=train.seed,
    )


def _task(plan: Plan, model: nn.Module) -> PretrainTask | FinetuneTask:
    spec, normalise = plan.spec, Normaliser(plan.info.mean, plan.info.std)
    monitor: str = spec.train.optim.monitor_name
    if plan.val is None and monitor == "val_loss":
        log.warning("train.optim.monitor_name=val_loss needs dataset.val_data_sources: train_loss is monitored.")
        monitor = "train_loss"
    if plan.config.num_classes:
        if plan.val is not None and not spec.typed("train.optim.monitor_name"):
            monitor = "ACC_all"
        mix = _mix_settings(spec.dataset.augmentation)
        return FinetuneTask(model, normalise, mix=mix, num_classes=plan.config.num_classes, monitor=monitor)
    assert isinstance(model, MaskedAutoencoder)
    return PretrainTask(model, normalise, mask_ratio=plan.config.mask_ratio, seed=spec.train.seed, monitor=monitor)


def _mix_settings(augmentation: AugmentationSpec) -> MixSettings:
    return MixSettings(
        mixup=augmentation.mixup,
        cutmix=augmentation.cutmix,
        cutmix_minmax=augmentation.cutmix_minmax,
        prob=augmentation.mixup_prob,
        switch_prob=augmentation.mixup_switch_prob,
        mode=augmentation.mixup_mode,
        smoothing=augmentation.smoothing,
    )


def _loaders(fabric: Fabric, plan: Plan) -> tuple[TrainingLoader, EvaluationLoader | None]:
    spec = plan.spec
    common: dict[str, Any] = {
        "batch_size": spec.dataset.batch_size,
        "num_workers": spec.dataset.num_workers_per_gpu,
        "rank": fabric.global_rank,
        "world_size": fabric.world_size,
        "results": plan.folder,
        "max_corrupt_fraction": spec.dataset.max_corrupt_fraction,
    }
    augmentation = spec.dataset.augmentation
    train = training_loader(plan.train, _train_transform(plan), seed=spec.train.seed, **common)
    if plan.val is None:
        return train, None
    transform = EvalTransform(augmentation.size, spec.model.in_chans, augmentation.interpolation)
    return train, evaluation_loader(plan.val, transform, **common)


def _train_transform(plan: Plan) -> Transform:
    augmentation = plan.spec.dataset.augmentation
    crop = PretrainTransform(
        size=augmentation.size,
        in_chans=plan.config.in_chans,
        scale=(augmentation.min_scale, augmentation.max_scale),
        ratio=(augmentation.min_ratio, augmentation.max_ratio),
        hflip=augmentation.hflip,
        interpolation=augmentation.interpolation,
    )
    if not plan.config.num_classes:
        return crop
    return FinetuneTransform(
        crop,
        plan.info.mean,
        plan.info.std,
        auto_aug=augmentation.auto_aug,
        color_jitter=augmentation.color_jitter,
        re_prob=augmentation.re_prob,
    )


def _outputs(fabric: Fabric, plan: Plan, state: dict[str, Any] | None) -> Outputs:
    spec = plan.spec
    checkpoints = CheckpointFolder(plan.folder, plan.config.arch, spec.train.keep_checkpoints)
    if not fabric.is_global_zero:
        return Outputs(checkpoints, plan.info.to_dict())
    wandb_run = open_wandb(spec.wandb.model_dump(), plan.folder, dict(plan.info.spec))
    loggers = Loggers(plan.folder, state["progress"]["step"] if state else None, wandb_run)
    return Outputs(checkpoints, plan.info.to_dict(), loggers, StatusLog(plan.folder, append=True))


def _finish(fabric: Fabric, plan: Plan, trainer: Trainer, rows: Rows) -> None:
    """What is left after the last epoch: the backbone in timm's names, pictures, the report."""
    model: nn.Module = trainer.ema.module if trainer.ema is not None else trainer.task.model
    model.eval()
    backbone = model.encoder.backbone if isinstance(model, MaskedAutoencoder) else model
    save_backbone(plan.folder / "backbone.safetensors", backbone.state_dict(), plan.info)
    picture = None
    if isinstance(trainer.task, PretrainTask):
        loader = trainer.val_loader or evaluation_loader(
            plan.train,
            EvalTransform(plan.config.input_size, plan.config.in_chans),
            batch_size=PICTURES,
            results=plan.folder,
            max_corrupt_fraction=1.0,
        )
        picture = plan.folder / "reconstructions" / "last.png"
        reconstruction_grid(*trainer.task.reconstruct(fabric, loader.first(PICTURES)), picture)
    train_report(plan.folder, plan.info, rows, picture)
