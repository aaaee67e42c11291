"""The content of ``skill_info.yaml``: the actions, their inputs and outputs, and the commands that start them."""

from __future__ import annotations

from typing import Any

from openmae.skill import NAME
from openmae.spec.actions import ACTIONS, SHORTHANDS, TABLE, Data, expand_shorthand
from openmae.spec.metrics import METRICS

DEPLOY = "tao-deploy-mask-auto-encoder"
SCRIPT = "scripts/run_action.py"
DEPLOY_ACTIONS = ("gen_trt_engine",)
_EXCLUDED = (".*", "*.tmp")  # files that are still being written


def skill_info() -> dict[str, Any]:
    """Return the content of ``references/skill_info.yaml``."""
    return {
        **_head(NAME, "Pretrain, fine-tune, evaluate, run and export masked autoencoders (ViT, Hiera, ConvNeXt V2)."),
        "automl_enabled": True,
        "dataset_type": "image_classification",
        "data_format": "ssl",
        "accepted_dataset_intents": ["training", "evaluation", "testing"],
        "gpu_spec_key": "train.num_gpus",
        "monitoring_metric": "train_loss",
        "metrics": {
            action: {stage: {"name": name, "direction": METRICS[name].direction} for stage, name in row.metrics.items()}
            for action, row in TABLE.items()
            if row.metrics
        },
        "actions": {action: _action(action) for action in ACTIONS},
        "data_sources": {action: _data(action) for action in ACTIONS if _sources(action)},
        "spec_params": {action: _parameters(action) for action in ACTIONS},
        "spec_shorthand_keys": {word: _meaning(word) for word in SHORTHANDS},
        "spec_templates": {action: f"references/spec_template_{action}.yaml" for action in ACTIONS},
        "schemas": {action: f"schemas/{action}.schema.json" for action in ACTIONS},
        "deploy": {"skill_info": f"references/{DEPLOY}.skill_info.yaml", "guide": f"references/{DEPLOY}.md"},
    }


def deploy_info() -> dict[str, Any]:
    """Return the content of ``references/tao-deploy-mask-auto-encoder.skill_info.yaml``."""
    return {
        **_head(DEPLOY, "Build a TensorRT engine from a masked autoencoder's ONNX file."),
        "automl_enabled": False,
        "parent_skill": NAME,
        "actions": {action: _action(action) for action in DEPLOY_ACTIONS},
        "spec_params": {action: _parameters(action) for action in DEPLOY_ACTIONS},
        "spec_templates": {action: f"references/spec_template_deploy_{action}.yaml" for action in DEPLOY_ACTIONS},
    }


def _parameters(action: str) -> dict[str, str]:
    return {"encryption_key": "key", "results_dir": "output_dir", **TABLE[action].filled}


def _head(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "description": description, "network_arch": "mae"}


def _sources(action: str) -> list[Data]:
    return [data for data in TABLE[action].data if data.in_skill]


def _action(action: str) -> dict[str, Any]:
    row = TABLE[action]
    return {
        "command": f"mae {action} -e {{config_path}}",
        "config_format": "yaml",
        "mode": "config",
        "inputs": {data.key: _input(action, data.key, "folder") for data in _sources(action)}
        | {file.key: _input(action, file.key, "file") for file in row.inputs},
        "outputs": {"results_dir": {"type": "folder"}} | ({row.output.key: {"type": "file"}} if row.output else {}),
        "upload_excludes": list(_EXCLUDED),
        "execution": {
            "type": "python_script",
            "script": SCRIPT,
            "args": [action, "{config_path}"],
            "config_format": "yaml",
        },
    }


def _input(action: str, key: str, kind: str) -> dict[str, Any]:
    group = next((group for group in TABLE[action].required if key in group), ())
    found: dict[str, Any] = {"type": kind}
    if len(group) != 1:
        found["optional"] = True
    if len(group) > 1:
        found["one_of"] = list(group)
    return found


def _meaning(word: str) -> str:
    """Return the config key that a shorthand stands for."""
    (key,) = expand_shorthand("gen_trt_engine" if word.startswith("trt_") else "train", word, None)
    return key


def _data(action: str) -> dict[str, Any]:
    return {
        data.key: {
            "source": data.source,
            "path": data.file,
            "files": [data.file],
            "list": False,
            "required": data.required,
        }
        for data in _sources(action)
    }
