"""What a user may ask for: one frozen model per section, every option declared once.

An option carries its type, bounds, default, help text and AutoML flag; ``load`` reads them to check a
spec, ``describe`` to print it. Keys and defaults are those that NVIDIA's TAO publishes for its MAE task,
except where a help text says "ours".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import PrivateAttr

from openmae.spec.architectures import Architecture, get_architecture
from openmae.spec.automl import AutomlSpec
from openmae.spec.deployment import ExportSpec, GenTrtEngineSpec
from openmae.spec.option import (
    ArchName,
    AutoAugment,
    BatchOrAuto,
    Deviations,
    GpuIds,
    InputSize,
    LocalPath,
    Milestones,
    Search,
    Secret,
    Section,
    SharePair,
    option,
)
from openmae.spec.tao import CheckpointerSpec

ACTIONS = ("train", "evaluate", "inference", "export", "gen_trt_engine")
DEVICES = ("train", "evaluate", "inference")  # actions that have num_gpus, gpu_ids and num_nodes
Stage = Literal["pretrain", "finetune"]
AnySection = TypeVar("AnySection", bound=Section)


class ModelSpec(Section):
    """``model``: the backbone, and what pretraining puts around it."""

    arch: ArchName = option("convnextv2_base", "architecture of the backbone", popular=True)
    num_classes: int | None = option(
        None, "classes to tell apart when fine-tuning; unset: as in the data", ge=1, automl=False
    )
    in_chans: Literal[1, 3, 4] = option(3, "image channels: 1 grey, 3 RGB, 4 RGB and alpha (ours)", automl=False)
    patch_size: int | None = option(
        None, "side of a ViT patch in pixels; unset: as in the name (ours)", ge=1, automl=False
    )
    mask_ratio: float | None = option(
        None,
        "share of mask units hidden in pretraining; unset: 0.75 ViT, 0.6 Hiera and ConvNeXt V2",
        gt=0,
        lt=1,
        search=Search(0.4, 0.9),
    )
    norm_pix_loss: bool = option(True, "normalise the pixels of each patch before the loss compares them")
    decoder_depth: int | None = option(
        None, "decoder blocks; unset: 8 ViT and Hiera, 1 ConvNeXt V2", ge=1, search=Search(1, 8)
    )
    decoder_embed_dim: int | None = option(None, "decoder width; unset: 512", ge=1, search=Search(128, 512, step=64))
    decoder_attention: Literal["self", "cross"] = option(
        "self",
        "what masked tokens see in the decoder: all tokens (self), or the visible ones alone (cross, as in CrossMAE: "
        "faster; ViT and Hiera; ours)",
        automl=False,
    )
    decoder_targets: float = option(
        1.0,
        "share of the masked units that a training step predicts, chosen anew each time; validation predicts all. Less "
        "is faster and learns from less (ours)",
        gt=0,
        le=1,
        search=Search(0.25, 1.0),
    )
    drop_path_rate: float | None = option(
        None,
        "stochastic depth; unset: the paper's in pretraining, 0.1 in fine-tuning",
        ge=0,
        lt=1,
        search=Search(0.0, 0.4),
    )
    global_pool: bool = option(True, "classify the mean of the tokens (false: the class token, ViT only)")

    @property
    def architecture(self) -> Architecture:
        """The row of the table that ``arch`` names."""
        return get_architecture(self.arch)

    @property
    def mask_unit(self) -> int:
        """Side in pixels of the square that is masked as one; ViT: of a patch."""
        return self.patch_size or self.architecture.mask_unit


class AugmentationSpec(Section):
    """``dataset.augmentation``: from a decoded image to what the model sees."""

    input_size: InputSize = option(
        224, "image size in pixels: a number, or [height, width]", popular=True, automl=False
    )
    mean: tuple[float, ...] | None = option(None, "mean of each channel, 0 to 1; unset: ImageNet's", automl=False)
    std: Deviations = option(None, "standard deviation of each channel; unset: ImageNet's", automl=False)
    min_scale: float = option(
        0.1,
        "smallest share of the area that a random crop keeps",
        gt=0,
        le=1,
        search=Search(0.08, 0.8),
        cond="<= dataset.augmentation.max_scale",
    )
    max_scale: float = option(
        1.0,
        "largest share of the area that a random crop keeps; over 1 means 1",
        gt=0,
        search=Search(0.6, 1.0),
        cond=">= dataset.augmentation.min_scale",
    )
    min_ratio: float = option(
        0.75, "smallest width / height of a random crop", gt=0, le=100, cond="<= dataset.augmentation.max_ratio"
    )
    max_ratio: float = option(
        1.33, "largest width / height of a random crop", gt=0, le=100, cond=">= dataset.augmentation.min_ratio"
    )
    interpolation: Literal["bilinear", "bicubic", "random"] = option(
        "bilinear", "how training crops are resized (finetune); pretraining and evaluation are bicubic"
    )
    hflip: float = option(0.5, "chance of a horizontal flip", ge=0, le=1, search=Search(0.0, 0.5))
    color_jitter: float = option(
        0.0, "strength of colour jitter, 0: off (finetune)", ge=0, le=10, search=Search(0, 0.4)
    )
    auto_aug: AutoAugment = option("rand-m9-mstd0.5-inc1", "timm's augmentation policy, empty: off (finetune)")
    re_prob: float = option(0.0, "chance of random erasing (finetune)", ge=0, le=1, search=Search(0.0, 0.4))
    smoothing: float = option(0.1, "label smoothing (finetune)", ge=0, lt=1, search=Search(0.0, 0.2))
    mixup: float = option(0.8, "Mixup's alpha, 0: off (finetune)", ge=0, search=Search(0.0, 1.0))
    cutmix: float = option(1.0, "CutMix's alpha, 0: off (finetune)", ge=0, search=Search(0.0, 1.0))
    cutmix_minmax: SharePair | None = option(
        None, "[min, max] side of CutMix's box as a share of the image; replaces cutmix's alpha (finetune)"
    )
    mixup_prob: float = option(1.0, "chance that a batch is mixed (finetune)", ge=0, le=1, search=Search(0.2, 1.0))
    mixup_switch_prob: float = option(
        0.5,
        "chance of CutMix where both are on (finetune)",
        ge=0,
        le=1,
        search=Search(0.2, 0.8),
        needs="dataset.augmentation.mixup>0",
    )
    mixup_mode: Literal["batch", "pair", "elem"] = option("batch", "what shares one mixing weight (finetune)")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.input_size if isinstance(self.input_size, tuple) else (self.input_size, self.input_size)

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix may act on a batch."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None)


class DatasetSpec(Section):
    """``dataset``: where the images are, and how they are read."""

    train_data_sources: LocalPath = option("", "training images: a folder, an archive, or shards (a-{000..099}.tar)")
    val_data_sources: LocalPath = option("", "validation images, as above")
    test_data_sources: LocalPath = option("", "images for inference, as above")
    batch_size: int = option(1, "images per batch and device", ge=1, popular=True)
    num_workers_per_gpu: int = option(2, "processes that load images, per device", ge=0, le=256, automl=False)
    max_corrupt_fraction: float = option(
        0.01, "share of unreadable images that ends the run (ours)", ge=0, le=1, automl=False
    )
    max_megapixels: int = option(
        179, "images with more million pixels count as unreadable (not in TAO)", ge=1, le=100_000, automl=False
    )
    augmentation: AugmentationSpec = option(AugmentationSpec(), "what is done to each image")
    segment: dict[str, Any] | None = option(None, "stands in published examples; nothing reads it")


class OptimSpec(Section):
    """``train.optim``: AdamW and its schedule."""

    type: Literal["AdamW"] = option("AdamW", "optimizer", automl=False)
    lr: float = option(
        2e-4, "learning rate at its peak", automl=True, search=Search(2e-5, 5e-3, log=True), popular=True, gt=0, le=1
    )
    base_lr: float | None = option(None, "learning rate per 256 images of a global batch; replaces lr (ours)", gt=0)
    weight_decay: float = option(0.05, "weight decay", automl=True, ge=0, le=1, search=Search(1e-3, 0.3, log=True))
    momentum: float = option(0.9, "AdamW's beta1", automl=True, gt=0, lt=1, search=Search(0.8, 0.98))
    beta2: float | None = option(
        None, "AdamW's beta2; unset: 0.95 pretrain, 0.999 finetune (ours)", gt=0, lt=1, search=Search(0.9, 0.999)
    )
    layer_decay: float = option(
        0.75, "each layer's learning rate over that of the next one (finetune)", gt=0, le=1, search=Search(0.5, 1.0)
    )
    backbone_multiplier: float = option(
        1.0,
        "the backbone's learning rate over the head's (finetune)",
        automl=True,
        search=Search(0.05, 1.0, log=True),
        gt=0,
        le=1,
    )
    lr_scheduler: Literal["MultiStep", "cosine"] = option(
        "MultiStep", "learning rate schedule", popular=True, search=Search(weights={"cosine": 0.7, "MultiStep": 0.3})
    )
    warmup_epochs: int = option(
        1,
        "epochs of linear warmup",
        automl=True,
        search=Search(0, 20),
        cond="< train.num_epochs",
        popular=True,
        ge=0,
        le=100,
    )
    milestones: Milestones = option((88, 96), "epochs where MultiStep multiplies by gamma", automl=False)
    gamma: float = option(
        0.1, "MultiStep's factor", gt=0, search=Search(0.05, 0.5, log=True), needs="train.optim.lr_scheduler=MultiStep"
    )
    monitor_name: Literal["val_loss", "train_loss"] = option(
        "train_loss", "metric that picks model_best.pth", automl=False
    )

    def effective_lr(self, global_batch: int) -> float:
        """The peak learning rate for ``global_batch`` images per optimizer step (recipes' linear rule)."""
        return self.lr if self.base_lr is None else self.base_lr * global_batch / 256


class CudnnSpec(Section):
    """``train.cudnn``: torch.backends.cudnn."""

    benchmark: bool = option(False, "time cuDNN's kernels and take the fastest")
    deterministic: bool = option(True, "use cuDNN's deterministic kernels only")


class TrainSpec(Section):
    """``train``: how long, on what, from where."""

    stage: Stage = option(
        "pretrain", "pretrain: masked images, no labels; finetune: a classifier", popular=True, automl=False
    )
    num_epochs: int = option(10, "passes over the training images", popular=True, ge=1, automl=False)
    num_gpus: int = option(1, "GPUs per node; without a GPU, CPU processes", popular=True, ge=1, automl=False)
    gpu_ids: GpuIds = option((0,), "which GPUs of a node", automl=False)
    num_nodes: int = option(1, "machines", ge=1, automl=False)
    distributed_strategy: Literal["ddp", "fsdp"] = option("ddp", "how several devices share the work", automl=False)
    precision: Literal["fp16", "bf16", "fp32"] = option(
        "fp32", "arithmetic of the forward pass", popular=True, automl=False
    )
    seed: int = option(
        1234, "fixes weights, masks, order and augmentation; -1: another one each run", ge=-1, automl=False
    )
    results_dir: LocalPath = option("", "where train writes; unset: <results_dir>/train", automl=False)
    pretrained_model_path: LocalPath = option(
        "", "checkpoint whose weights training starts from", popular=True, automl=False
    )
    pretrained_weights_key: str = option(
        "", "entry of that file to take the weights from, such as model_ema; unset: found by name (ours)", automl=False
    )
    allow_partial_weights: bool = option(False, "accept weights of which less than 95 % match (ours)", automl=False)
    resume_training_checkpoint_path: LocalPath = option(
        "", "checkpoint of an interrupted run to go on from", automl=False
    )
    checkpoint_interval: int = option(1, "epochs or steps between checkpoints", ge=1, automl=False)
    checkpoint_interval_unit: Literal["epoch", "step"] = option("epoch", "unit of checkpoint_interval", automl=False)
    keep_checkpoints: int = option(3, "newest checkpoints to keep, besides the best one (ours)", ge=1, automl=False)
    validation_interval: int = option(1, "epochs between validations", ge=1, automl=False)
    accum_grad_batches: int = option(1, "batches whose gradients make one optimizer step", ge=1)
    clip_grad_norm: float = option(
        0.0, "largest norm of a gradient, 0: no clipping (ours)", ge=0, le=1e6, search=Search(0.5, 5.0, log=True)
    )
    ema_decay: float = option(
        0.0, "decay of averaged weights, 0: off (ours, finetune)", ge=0, lt=1, search=Search(0.9, 0.9999)
    )
    stop_after_epoch: int | None = option(
        None, "pause after this epoch of num_epochs; the same command without it goes on (ours)", ge=1, automl=False
    )
    freeze: tuple[str, ...] = option((), "modules that do not learn, by name", automl=False)
    compile: bool = option(False, "torch.compile the model; for GPUs (ours)", automl=False)
    profile: bool = option(False, "measure what a step's time goes to, and say what would help (ours)", automl=False)
    mask_ratio: float | None = option(None, "the same as model.mask_ratio", gt=0, lt=1)
    norm_pix_loss: bool | None = option(None, "the same as model.norm_pix_loss")
    cudnn: CudnnSpec = option(CudnnSpec(), "cuDNN's settings")
    optim: OptimSpec = option(OptimSpec(), "optimizer and schedule")
    checkpointer: CheckpointerSpec = option(CheckpointerSpec(), "TAO's settings of the best checkpoint")


class EvaluateSpec(Section):
    """``evaluate``: which model is measured, and on what devices."""

    checkpoint: LocalPath = option("", "checkpoint to evaluate", popular=True)
    trt_engine: LocalPath = option("", "TensorRT engine or ONNX file to evaluate instead of a checkpoint")
    batch_size: BatchOrAuto = option(-1, "images per batch; -1: dataset.batch_size", ge=-1)
    num_gpus: int = option(1, "GPUs per node", ge=1)
    gpu_ids: GpuIds = option((0,), "which GPUs of a node", automl=False)
    num_nodes: int = option(1, "machines", ge=1)
    results_dir: LocalPath = option("", "where evaluate writes; unset: <results_dir>/evaluate")


class InferenceSpec(Section):
    """``inference``: which model looks at the test images, and on what devices."""

    checkpoint: LocalPath = option("", "checkpoint to run", popular=True)
    trt_engine: LocalPath = option("", "TensorRT engine or ONNX file to run instead of a checkpoint")
    batch_size: BatchOrAuto = option(-1, "images per batch; -1: dataset.batch_size", ge=-1)
    num_gpus: int = option(1, "GPUs per node", ge=1)
    gpu_ids: GpuIds = option((0,), "which GPUs of a node", automl=False)
    num_nodes: int = option(1, "machines", ge=1)
    results_dir: LocalPath = option("", "where inference writes; unset: <results_dir>/inference")


class WandbSpec(Section):
    """``wandb``: Weights & Biases."""

    enable: bool = option(True, "log to Weights & Biases where a key or WANDB_MODE=offline is present")
    project: str = option("openmae", "project")
    entity: str = option("", "user or team")
    name: str = option("", "name of the run")
    group: str = option("", "group of the run")
    run_id: str = option("", "run to go on with")
    tags: tuple[str, ...] = option((), "tags", automl=False)
    reinit: bool = option(False, "allow several runs in one process")
    save_code: bool = option(False, "upload the main script")
    sync_tensorboard: bool = option(False, "copy what TensorBoard gets")


class ExperimentSpec(Section):
    """The whole request. ``load_spec`` makes it from a file; every action takes it."""

    results_dir: LocalPath = option("", "where results go; unset: results", popular=True)
    encryption_key: Secret = option("", "encrypts models that are written, opens them: env:NAME, file:PATH or the key")
    model_name: str = option("", "stands in published examples; nothing reads it")
    model: ModelSpec = option(ModelSpec(), "the network")
    dataset: DatasetSpec = option(DatasetSpec(), "the images")
    train: TrainSpec = option(TrainSpec(), "training")
    evaluate: EvaluateSpec = option(EvaluateSpec(), "evaluation")
    inference: InferenceSpec = option(InferenceSpec(), "inference")
    export: ExportSpec = option(ExportSpec(), "export to ONNX")
    gen_trt_engine: GenTrtEngineSpec = option(GenTrtEngineSpec(), "TensorRT engine")
    automl: AutomlSpec = option(AutomlSpec(), "search for the best options")
    wandb: WandbSpec = option(WandbSpec(), "Weights & Biases")

    _typed: frozenset[str] | None = PrivateAttr(None)
    _shown: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    def typed(self, key: str) -> bool:
        """Whether the user set ``key`` (dotted: ``"model.arch"``), in a file, an override or a call."""
        *sections, name = key.split(".")
        section: Section = self
        for part in sections:
            section = getattr(section, part)
        if name not in type(section).model_fields:
            raise KeyError(key)
        return name in section.model_fields_set if self._typed is None else key in self._typed

    def replaced(self, values: Mapping[str, Any]) -> ExperimentSpec:
        """A copy with dotted keys set to values that are known to be right; they do not count as typed."""
        spec = self
        for key, value in values.items():
            spec = _replace(spec, key.split("."), value)
        return spec

    def standing_for(self, values: Mapping[str, Any]) -> ExperimentSpec:
        """A copy whose dotted keys are written down as these values, whatever they are set to; the first ones stay."""
        spec = self.model_copy()
        spec._shown = {**values, **self._shown}
        return spec

    @property
    def shown(self) -> Mapping[str, Any]:
        """What is written down in place of the value of a dotted key."""
        return self._shown

    def results_folder(self, action: str) -> str:
        """``<action>.results_dir``, else ``<results_dir>/<action>``: a path or a URL; nothing is created."""
        own: str = getattr(self, action).results_dir
        return own or f"{(self.results_dir or 'results').rstrip('/')}/{action}"

    def batch_size(self, action: Literal["train", "evaluate", "inference"]) -> int:
        """Images per batch and device: ``<action>.batch_size``, or ``dataset.batch_size`` where it is -1."""
        own: int = getattr(getattr(self, action), "batch_size", -1)
        return self.dataset.batch_size if own == -1 else own


def _replace(section: AnySection, path: list[str], value: Any) -> AnySection:
    name, *rest = path
    if name not in type(section).model_fields:
        raise KeyError(name)
    new = _replace(getattr(section, name), rest, value) if rest else value
    return section.model_copy(update={name: new})
