"""The spec: one frozen model per section; each option is declared once, with type, bounds, default, help and traits.

Keys and defaults are those that NVIDIA TAO publishes for its MAE task; ``Traits.in_tao`` is False for all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from pydantic import PrivateAttr

from openmae.spec.option import OutputPath, Secret, Section, option
from openmae.spec.sections.automl import AutomlSpec
from openmae.spec.sections.dataset import DatasetSpec
from openmae.spec.sections.deploy import EvaluateSpec, ExportSpec, GenTrtEngineSpec, InferenceSpec
from openmae.spec.sections.model import ModelSpec
from openmae.spec.sections.train import TrainSpec
from openmae.spec.tree import value_of

AnySection = TypeVar("AnySection", bound=Section)


class WandbSpec(Section):
    """``wandb``: Weights & Biases."""

    enable: bool = option(True, "log to Weights & Biases if an API key or WANDB_MODE=offline is set")
    project: str = option("openmae", "project")
    entity: str = option("", "user or team")
    name: str = option("", "name of the run")
    group: str = option("", "group of the run")
    run_id: str = option("", "run to continue")
    tags: tuple[str, ...] = option((), "tags", automl=False)
    reinit: bool = option(False, "allow several runs in one process")
    save_code: bool = option(False, "upload the main script")
    sync_tensorboard: bool = option(False, "upload TensorBoard's events")


class ExperimentSpec(Section):
    """The spec of an action, as ``load_spec`` returns it."""

    results_dir: OutputPath = option("", "folder for results; unset: results", popular=True)
    encryption_key: Secret = option(
        "", "key that encrypts written models and decrypts those that are read: env:NAME, file:PATH or the key"
    )
    model_name: str = option("", "accepted; it has no effect", no_effect="the architecture is model.arch", compat=True)
    model: ModelSpec = option(ModelSpec(), "the network")
    dataset: DatasetSpec = option(DatasetSpec(), "the images")
    train: TrainSpec = option(TrainSpec(), "training")
    evaluate: EvaluateSpec = option(EvaluateSpec(), "evaluation")
    inference: InferenceSpec = option(InferenceSpec(), "inference")
    export: ExportSpec = option(ExportSpec(), "export to ONNX")
    gen_trt_engine: GenTrtEngineSpec = option(GenTrtEngineSpec(), "TensorRT engine")
    automl: AutomlSpec = option(AutomlSpec(), "hyperparameter search")
    wandb: WandbSpec = option(WandbSpec(), "Weights & Biases")

    _set_keys: frozenset[str] = PrivateAttr(frozenset())
    _shown: Mapping[str, Any] = PrivateAttr(default_factory=dict)
    _chosen: Mapping[str, str] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Remember the keys that were given."""
        self._set_keys = frozenset(_given_keys(self))

    @property
    def set_keys(self) -> frozenset[str]:
        """The dotted keys for which ``is_set`` is true."""
        return self._set_keys

    def with_set_keys(self, keys: frozenset[str]) -> ExperimentSpec:
        """Return a copy in which these keys, and no others, count as set."""
        spec = self.model_copy()
        spec._set_keys = keys
        return spec

    def is_set(self, key: str) -> bool:
        """Return whether the user set the dotted ``key``, such as ``"model.arch"``, in a file, an override or a call.

        Raises:
            KeyError: there is no such key.
        """
        section, _, name = key.rpartition(".")
        owner: Section = value_of(self, section) if section else self
        if name not in type(owner).model_fields:
            raise KeyError(key)
        return key in self._set_keys

    def replaced(self, values: Mapping[str, Any]) -> ExperimentSpec:
        """Return a copy with other values, by dotted key. They are not validated, and do not count as set."""
        spec = self
        for key, value in values.items():
            spec = _replace(spec, key.split("."), value)
        return spec

    def standing_for(self, values: Mapping[str, Any]) -> ExperimentSpec:
        """Return a copy for which ``experiment.yaml`` has these values, by dotted key, instead of the actual ones.

        Values of an earlier call have priority.
        """
        spec = self.model_copy()
        spec._shown = {**values, **self._shown}
        return spec

    @property
    def shown(self) -> Mapping[str, Any]:
        """The values, by dotted key, that ``experiment.yaml`` has instead of the actual ones."""
        return self._shown

    def choosing(self, values: Mapping[str, Any], reasons: Mapping[str, str]) -> ExperimentSpec:
        """Return a copy with values that a recipe has chosen, by dotted key; see ``chosen``."""
        spec = self.replaced(values)
        spec = spec.model_copy()
        spec._chosen = dict(reasons)
        return spec

    @property
    def chosen(self) -> Mapping[str, str]:
        """The reasons for the values that ``train.recipe`` has chosen, by dotted key."""
        return self._chosen

    def results_folder(self, action: str) -> str:
        """Return ``<action>.results_dir`` or, if unset, ``<results_dir>/<action>``: a path or a URL."""
        own: str = getattr(self, action).results_dir
        return own or f"{(self.results_dir or 'results').rstrip('/')}/{action}"

    def batch_size(self, action: Literal["train", "evaluate", "inference"]) -> int:
        """Return the images per batch and device: ``<action>.batch_size``, or ``dataset.batch_size`` if that is -1."""
        own: int = getattr(getattr(self, action), "batch_size", -1)
        return self.dataset.batch_size if own == -1 else own

    @property
    def trial_epochs(self) -> int:
        """The epochs of a complete trial of a hyperparameter search."""
        return self.automl.max_epochs or self.train.num_epochs


def _given_keys(section: Section, prefix: str = "") -> Iterator[str]:
    for name in section.model_fields_set:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _given_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _replace(section: AnySection, path: list[str], value: Any) -> AnySection:
    name, *rest = path
    if name not in type(section).model_fields:
        raise KeyError(name)
    new = _replace(getattr(section, name), rest, value) if rest else value
    return section.model_copy(update={name: new})
