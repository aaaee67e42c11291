"""The section ``train``: stage, length, devices, optimizer and checkpoints of a training run."""

from __future__ import annotations

from typing import Literal

from openmae.spec.option import (
    EXECUTION,
    FINETUNE,
    Count,
    GpuIds,
    InputPath,
    Milestones,
    OutputPath,
    PositiveShare,
    Search,
    Section,
    Share,
    Stage,
    option,
)
from openmae.spec.sections.tao import CheckpointerSpec


class OptimSpec(Section):
    """``train.optim``: AdamW and the learning rate schedule."""

    type: Literal["AdamW"] = option("AdamW", "optimizer", automl=False)
    lr: PositiveShare = option(
        2e-4, "peak learning rate", popular=True, recipe=True, automl=True, search=Search(2e-5, 5e-3, log=True)
    )
    base_lr: float | None = option(
        None, "peak learning rate per 256 images of a global batch; replaces lr", gt=0, tao="lacks"
    )
    weight_decay: Share = option(0.05, "weight decay", automl=True, search=Search(1e-3, 0.3, log=True))
    momentum: float = option(0.9, "AdamW's beta1", gt=0, lt=1, tao="ignores", automl=True, search=Search(0.8, 0.98))
    beta2: float = option(
        None, "AdamW's beta2; unset: 0.95 pretrain, 0.999 finetune", gt=0, lt=1, tao="lacks", search=Search(0.9, 0.999)
    )
    layer_decay: PositiveShare = option(
        0.75,
        "learning rate of a layer relative to the next one",
        stages=FINETUNE,
        recipe=True,
        tao="ignores",
        search=Search(0.5, 1.0),
    )
    backbone_multiplier: PositiveShare = option(
        1.0,
        "learning rate of the backbone relative to the head",
        stages=FINETUNE,
        tao="ignores",
        automl=True,
        search=Search(0.05, 1.0, log=True),
    )
    lr_scheduler: Literal["MultiStep", "cosine"] = option(
        "MultiStep",
        "learning rate schedule",
        popular=True,
        recipe=True,
        search=Search(weights={"cosine": 0.7, "MultiStep": 0.3}),
    )
    warmup_epochs: int = option(
        1,
        "epochs of linear warmup",
        ge=0,
        le=100,
        tao="ignores",
        popular=True,
        automl=True,
        search=Search(0, 20),
        recipe=True,
        cond="< train.num_epochs",
    )
    warmup_steps: int | None = option(
        None, "optimizer steps of linear warmup; replaces warmup_epochs", ge=0, recipe=True, tao="lacks", automl=False
    )
    milestones: Milestones = option(
        (88, 96),
        "epochs at which MultiStep multiplies by gamma",
        needs="train.optim.lr_scheduler=MultiStep",
        automl=False,
    )
    gamma: float = option(
        0.1, "MultiStep's factor", gt=0, needs="train.optim.lr_scheduler=MultiStep", search=Search(0.05, 0.5, log=True)
    )
    monitor_name: Literal["val_loss", "train_loss", "ACC_all", "knn_acc", "probe_acc"] = option(
        "train_loss",
        "metric that picks model_best.pth; unset: with validation images val_loss in pretraining and ACC_all in "
        "fine-tuning, else train_loss",
        tao="ignores",
        automl=False,
    )

    def effective_lr(self, global_batch: int) -> float:
        """Return the peak learning rate for ``global_batch`` images per optimizer step (linear scaling rule)."""
        return self.lr if self.base_lr is None else self.base_lr * global_batch / 256


class CudnnSpec(Section):
    """``train.cudnn``: torch.backends.cudnn."""

    benchmark: bool = option(False, "time cuDNN's kernels and use the fastest")
    deterministic: bool = option(True, "use cuDNN's deterministic kernels only")


class TrainSpec(Section):
    """``train``."""

    stage: Stage = option(
        "pretrain",
        "pretrain: masked images, no labels; finetune: a classifier",
        popular=True,
        automl=False,
        on_resume="refuse",
    )
    recipe: Literal["auto", "paper", "tao"] = option(
        "auto",
        "how unset options get their values. auto: chosen for the data, the weights and the machine; paper: as in the "
        "papers; tao: TAO's defaults",
        popular=True,
        tao="lacks",
        automl=False,
        on_resume="allow",
    )
    num_epochs: Count = option(10, "passes over the training images", popular=True, recipe=True, **EXECUTION)
    num_gpus: Count = option(1, "GPUs per node; without a GPU, CPU processes", popular=True, **EXECUTION)
    gpu_ids: GpuIds = option((0,), "GPUs of a node to use, by number", automl=False, on_resume="allow", in_search=False)
    num_nodes: Count = option(1, "nodes", automl=False, on_resume="allow", in_search=False)
    distributed_strategy: Literal["ddp", "fsdp"] = option("ddp", "strategy for several devices", **EXECUTION)
    precision: Literal["fp16", "bf16", "fp32"] = option(
        "fp32", "arithmetic of the forward pass", popular=True, recipe=True, automl=False, on_resume="allow"
    )
    seed: int = option(
        1234, "seed of weights, masks, order and augmentation; -1: a new one for each run", ge=-1, automl=False
    )
    results_dir: OutputPath = option("", "folder for results of train; unset: <results_dir>/train", **EXECUTION)
    pretrained_model_path: InputPath = option(
        "", "checkpoint whose weights training starts from", tao="ignores in pretraining", popular=True, automl=False
    )
    pretrained_weights_key: str = option(
        "",
        "entry of pretrained_model_path to load weights from, such as model_ema; unset: found by name",
        needs="train.pretrained_model_path",
        tao="lacks",
        automl=False,
    )
    allow_partial_weights: bool = option(
        False,
        "accept a checkpoint even if less than 95 % of its weights match",
        needs="train.pretrained_model_path",
        tao="lacks",
        automl=False,
        on_resume="allow",
    )
    resume_training_checkpoint_path: InputPath = option(
        "", "checkpoint of an interrupted run to resume from", **EXECUTION
    )
    checkpoint_interval: Count = option(1, "epochs or steps between checkpoints", recipe=True, **EXECUTION)
    checkpoint_interval_unit: Literal["epoch", "step"] = option("epoch", "unit of checkpoint_interval", **EXECUTION)
    keep_checkpoints: Count = option(
        3, "number of newest checkpoints to keep, in addition to the best one", tao="lacks", **EXECUTION
    )
    validation_interval: Count = option(
        1,
        "epochs between validations",
        needs="dataset.val_data_sources",
        recipe=True,
        automl=False,
        on_resume="allow",
    )
    accum_grad_batches: Count = option(1, "batches accumulated for one optimizer step", recipe=True)
    clip_grad_norm: float = option(
        0.0,
        "maximum norm of the gradients, 0: no clipping",
        ge=0,
        le=1e6,
        tao="lacks",
        search=Search(0.5, 5.0, log=True),
    )
    ema_decay: float = option(
        0.0,
        "decay of averaged weights, 0: off",
        ge=0,
        lt=1,
        stages=FINETUNE,
        recipe=True,
        tao="lacks",
        search=Search(0.9, 0.9999),
    )
    stop_after_epoch: int | None = option(
        None,
        "pause after this epoch of num_epochs; the same command without it resumes",
        ge=1,
        tao="lacks",
        **EXECUTION,
    )
    activation_checkpointing: bool = option(
        False,
        "compute the activations of each block again in the backward pass: less memory, a third more work",
        tao="lacks",
        **EXECUTION,
    )
    freeze: tuple[str, ...] = option((), "names of modules whose weights are not trained", automl=False)
    compile: bool = option(
        False, "compile the model with torch.compile; for GPUs", tao="lacks", automl=False, on_resume="allow"
    )
    profile: bool = option(
        False,
        "measure the time of each phase of a step, and suggest options",
        tao="lacks",
        automl=False,
        on_resume="allow",
    )
    mask_ratio: float | None = option(None, "the same as model.mask_ratio", gt=0, lt=1, compat=True)
    norm_pix_loss: bool | None = option(None, "the same as model.norm_pix_loss", compat=True)
    cudnn: CudnnSpec = option(CudnnSpec(), "settings of cuDNN")
    optim: OptimSpec = option(OptimSpec(), "optimizer and schedule")
    checkpointer: CheckpointerSpec = option(CheckpointerSpec(), "TAO's settings for the best checkpoint")

    @property
    def last_epoch(self) -> int:
        """The epoch after which the run ends or pauses."""
        return min(self.num_epochs, self.stop_after_epoch or self.num_epochs)
