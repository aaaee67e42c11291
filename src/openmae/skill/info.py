"""The content of ``skill_info.yaml``: the actions, the spec keys each reads and writes, how to start it as a script."""

from __future__ import annotations

from typing import Any

from openmae.jobs.parameters import FILLED, merge
from openmae.skill import NAME
from openmae.spec.describe import REQUIRED
from openmae.spec.schema import ACTIONS

DEPLOY = "tao-deploy-mask-auto-encoder"
SCRIPT = "scripts/run_action.py"
DEPLOY_ACTIONS = ("gen_trt_engine",)

SHORTHANDS = (
    *("num_epochs", "batch_size", "learning_rate", "num_classes", "stage", "arch", "image_size", "resume_checkpoint"),
    *("trt_data_type", "trt_engine"),
)
_TRAIN = {
    "dataset.train_data_sources": ("train_datasets", "images_train.tar.gz"),
    "dataset.val_data_sources": ("eval_dataset", "images_val.tar.gz"),
}
_SOURCES = {
    "train": _TRAIN,
    "evaluate": {"dataset.val_data_sources": ("eval_dataset", "images_val.tar.gz")},
    "inference": {"dataset.test_data_sources": ("inference_dataset", "images_test.tar.gz")},
}
_FILES = {
    "train": ("train.pretrained_model_path", "train.resume_training_checkpoint_path"),
    "evaluate": ("evaluate.checkpoint", "evaluate.trt_engine"),
    "inference": ("inference.checkpoint", "inference.trt_engine"),
    "export": ("export.checkpoint",),
    "gen_trt_engine": ("gen_trt_engine.onnx_file",),
}
#: The file that an action writes, besides its results folder. A runner puts a path of its own into each of these keys.
_OUTPUTS = {"export": "export.onnx_file", "gen_trt_engine": "gen_trt_engine.trt_engine"}
_METRICS = {
    "train": {
        "pretrain": {"name": "train_loss", "direction": "minimize"},
        "finetune": {"name": "ACC_all", "direction": "maximize"},
    },
    "evaluate": {
        "pretrain": {"name": "val_loss", "direction": "minimize"},
        "finetune": {"name": "ACC_all", "direction": "maximize"},
    },
}
_EXCLUDED = [".*", "*.tmp"]  # files that are still being written


def skill_info() -> dict[str, Any]:
    """``references/skill_info.yaml``."""
    return {
        **_head(NAME, "Pretrain, fine-tune, measure, run and export masked autoencoders (ViT, Hiera, ConvNeXt V2)."),
        "automl_enabled": True,
        "dataset_type": "image_classification",
        "data_format": "ssl",
        "accepted_dataset_intents": ["training", "evaluation", "testing"],
        "gpu_spec_key": "train.num_gpus",
        "monitoring_metric": "train_loss",
        "metrics": _METRICS,
        "actions": {action: _action(action) for action in ACTIONS},
        "data_sources": {action: _data(action) for action in _SOURCES},
        "spec_params": {action: _parameters(action) for action in ACTIONS},
        "spec_shorthand_keys": {word: _meaning(word) for word in SHORTHANDS},
        "spec_templates": {action: f"references/spec_template_{action}.yaml" for action in ACTIONS},
        "schemas": {action: f"schemas/{action}.schema.json" for action in ACTIONS},
        "deploy": {"skill_info": f"references/{DEPLOY}.skill_info.yaml", "guide": f"references/{DEPLOY}.md"},
    }


def deploy_info() -> dict[str, Any]:
    """``references/tao-deploy-mask-auto-encoder.skill_info.yaml``."""
    return {
        **_head(DEPLOY, "Build a TensorRT engine from a masked autoencoder's ONNX file."),
        "automl_enabled": False,
        "parent_skill": NAME,
        "actions": {action: _action(action) for action in DEPLOY_ACTIONS},
        "spec_params": {action: _parameters(action) for action in DEPLOY_ACTIONS},
        "spec_templates": {action: f"references/spec_template_deploy_{action}.yaml" for action in DEPLOY_ACTIONS},
    }


def _parameters(action: str) -> dict[str, str]:
    return {"encryption_key": "key", "results_dir": "output_dir", **FILLED[action]}


def parameter_rows() -> list[tuple[str, str, str]]:
    """(action, key, function), as the table of SKILL.md has them."""
    return [(action, key, function) for action in ACTIONS for key, function in _parameters(action).items()]


def data_rows() -> list[tuple[str, str, str, str]]:
    """(action, key, source, file)."""
    return [(action, key, *where) for action, sources in _SOURCES.items() for key, where in sources.items()]


def _head(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "description": description, "network_arch": "mae"}


def _action(action: str) -> dict[str, Any]:
    return {
        "command": f"mae {action} -e {{config_path}}",
        "config_format": "yaml",
        "mode": "config",
        "inputs": {key: _input(action, key, "folder") for key in _SOURCES.get(action, {})}
        | {key: _input(action, key, "file") for key in _FILES[action]},
        "outputs": {"results_dir": {"type": "folder"}}
        | ({_OUTPUTS[action]: {"type": "file"}} if action in _OUTPUTS else {}),
        "upload_excludes": _EXCLUDED,
        "execution": {
            "type": "python_script",
            "script": SCRIPT,
            "args": [action, "{config_path}"],
            "config_format": "yaml",
        },
    }


def _input(action: str, key: str, kind: str) -> dict[str, Any]:
    group = next((group for group in REQUIRED[action] if key in group), ())
    found: dict[str, Any] = {"type": kind}
    if len(group) != 1:
        found["optional"] = True
    if len(group) > 1:
        found["one_of"] = list(group)
    return found


def _meaning(word: str) -> str:
    """The key that a shorthand stands for, as jobs read it."""
    (key,) = merge("gen_trt_engine" if word.startswith("trt_") else "train", {word: 1}).values
    return key


def _data(action: str) -> dict[str, Any]:
    needed = {key for group in REQUIRED[action] for key in group}
    return {
        key: {"source": source, "path": file, "files": [file], "list": False, "required": key in needed}
        for key, (source, file) in _SOURCES[action].items()
    }
