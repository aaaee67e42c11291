"""The table of actions: one row each, with the data, model files and metrics of the action."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from openmae.errors import SpecError

ModelKind = Literal["checkpoint", "onnx", "engine"]
#: The functions that fill in the keys of a job, under TAO's names; ``openmae.jobs.parameters`` implements them.
Function = Literal["parent_model", "resume_model", "ptm_if_no_resume_model", "create_onnx_file", "create_engine_file"]


@dataclass(frozen=True)
class Data:
    """A data source of an action; ``key`` names it in the spec.

    Attributes:
        source: TAO's name for the data set.
        file: TAO's name for the archive.
        required: the action cannot run without it.
        in_skill: the skill lists it, so that a runner provides it.
    """

    key: str
    source: str
    file: str
    required: bool = True
    in_skill: bool = True


@dataclass(frozen=True)
class Input:
    """A key that names a model file to read.

    Attributes:
        kinds: that the key takes.
        function: fills the key of a job.
    """

    key: str
    kinds: tuple[ModelKind, ...]
    function: Function = "parent_model"


@dataclass(frozen=True)
class Output:
    """A key that names a file to write outside the results folder.

    Attributes:
        function: fills the key of a job.
        file: the name that the function gives it.
    """

    key: str
    function: Function
    file: str


@dataclass(frozen=True)
class Action:
    """One action.

    Attributes:
        name: of the command and of the section of the spec.
        title: one line of help.
        produces: the kind of model that it leaves to a child job; empty: none.
        needs_input: one of ``inputs`` must be set.
        has_devices: its section has ``num_gpus``, ``gpu_ids`` and ``num_nodes``; else it has ``gpu_id``.
        metrics: by stage, the metric by which a runner judges it.
        shorthands: the keys of words that mean something else than in ``SHORTHANDS``.
    """

    name: str
    title: str
    produces: ModelKind | Literal[""] = ""
    data: tuple[Data, ...] = ()
    inputs: tuple[Input, ...] = ()
    needs_input: bool = True
    output: Output | None = None
    has_devices: bool = False
    metrics: Mapping[str, str] = field(default_factory=dict)
    shorthands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def required(self) -> tuple[tuple[str, ...], ...]:
        """Groups of keys; of each group, one key must be set."""
        model = (tuple(file.key for file in self.inputs),) if self.needs_input else ()
        written = ((self.output.key,),) if self.output else ()
        return (*model, *written, *((item.key,) for item in self.data if item.required))

    @property
    def filled(self) -> dict[str, Function]:
        """The keys that a job fills in, each with the function that does it."""
        output = {self.output.key: self.output.function} if self.output else {}
        return {file.key: file.function for file in self.inputs} | output


_VAL = Data("dataset.val_data_sources", "eval_dataset", "images_val.tar.gz")
_TRAIN_DATA = (
    Data("dataset.train_data_sources", "train_datasets", "images_train.tar.gz"),
    Data("dataset.val_data_sources", "eval_dataset", "images_val.tar.gz", required=False),
)
_PRETRAINED = Input("train.pretrained_model_path", ("checkpoint",), "ptm_if_no_resume_model")

TABLE = {
    action.name: action
    for action in (
        Action(
            "train",
            "pretrain or fine-tune a backbone",
            produces="checkpoint",
            data=_TRAIN_DATA,
            inputs=(Input("train.resume_training_checkpoint_path", ("checkpoint",), "resume_model"), _PRETRAINED),
            needs_input=False,
            has_devices=True,
            metrics={"pretrain": "train_loss", "finetune": "ACC_all"},
        ),
        Action(
            "evaluate",
            "measure a trained model on validation images",
            data=(_VAL,),
            inputs=(Input("evaluate.checkpoint", ("checkpoint",)), Input("evaluate.trt_engine", ("engine", "onnx"))),
            has_devices=True,
            metrics={"pretrain": "val_loss", "finetune": "ACC_all"},
            shorthands={"trt_engine": ("evaluate.trt_engine",)},
        ),
        Action(
            "inference",
            "classify test images, or compute embeddings",
            data=(Data("dataset.test_data_sources", "inference_dataset", "images_test.tar.gz"),),
            inputs=(Input("inference.checkpoint", ("checkpoint",)), Input("inference.trt_engine", ("engine", "onnx"))),
            has_devices=True,
            shorthands={"trt_engine": ("inference.trt_engine",)},
        ),
        Action(
            "export",
            "export a trained model to ONNX",
            produces="onnx",
            data=(
                Data("dataset.val_data_sources", "eval_dataset", "images_val.tar.gz", required=False, in_skill=False),
            ),
            inputs=(Input("export.checkpoint", ("checkpoint",)),),
            output=Output("export.onnx_file", "create_onnx_file", "model.onnx"),
            shorthands={
                "batch_size": ("export.batch_size",),
                "image_size": ("export.input_height", "export.input_width"),
            },
        ),
        Action(
            "gen_trt_engine",
            "build a TensorRT engine from an ONNX file",
            produces="engine",
            inputs=(Input("gen_trt_engine.onnx_file", ("onnx",)),),
            output=Output("gen_trt_engine.trt_engine", "create_engine_file", "model.engine"),
            shorthands={
                "batch_size": ("gen_trt_engine.batch_size",),
                "trt_engine": ("gen_trt_engine.trt_engine",),
            },
        ),
    )
}
#: The row of ``mae automl``. Each trial is a training run.
SEARCH = Action(
    "automl",
    "search for the best training options",
    produces="checkpoint",
    data=_TRAIN_DATA,
    inputs=(_PRETRAINED,),
    needs_input=False,
    metrics=TABLE["train"].metrics,
)
#: All rows, by command name.
ROWS = {**TABLE, SEARCH.name: SEARCH}
ACTIONS = tuple(TABLE)
DEVICES = tuple(name for name, action in TABLE.items() if action.has_devices)

#: Words that a job accepts instead of keys. ``trt_engine`` has a meaning only for some actions.
SHORTHANDS: dict[str, str] = {
    "num_epochs": "train.num_epochs",
    "batch_size": "dataset.batch_size",
    "learning_rate": "train.optim.lr",
    "num_classes": "model.num_classes",
    "stage": "train.stage",
    "arch": "model.arch",
    "image_size": "dataset.augmentation.input_size",
    "resume_checkpoint": "train.resume_training_checkpoint_path",
    "trt_data_type": "gen_trt_engine.tensorrt.data_type",
    "trt_engine": "",
}


def get_action(name: str) -> Action:
    """Return the row of an action.

    Raises:
        SpecError: there is no such action.
    """
    if name not in TABLE:
        raise SpecError(f"There is no action {name!r}.", f"Use one of: {', '.join(ACTIONS)}.")
    return TABLE[name]


def expand_shorthand(action: str, word: str, value: Any) -> dict[str, Any]:
    """Return the keys that a shorthand stands for, each with its value.

    Raises:
        SpecError: the shorthand has no meaning for the action.
    """
    keys = TABLE[action].shorthands.get(word) or (SHORTHANDS[word],)
    if keys == ("",):
        known = [name for name, row in TABLE.items() if word in row.shorthands]
        raise SpecError(f"{word}: the shorthand has no meaning for {action}.", f"Use it with {', '.join(known)}.")
    values = value if isinstance(value, list | tuple) and len(value) == len(keys) > 1 else [value] * len(keys)
    return dict(zip(keys, values, strict=True))
