"""The section ``automl``: hyperparameter search. TAO does not have it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from openmae.spec.option import KEY_IN_ENVIRONMENT, Count, OutputPath, Section, Texts, broken, option
from openmae.spec.tree import flatten

Algorithm = Literal["bayesian", "random", "grid", "hyperband", "asha", "bohb", "pbt", "cmaes"]


def _flat(value: Any) -> Any:
    return flatten(value) if isinstance(value, Mapping) else value


def _ranges(value: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    for key, range_ in value.items():
        if not isinstance(range_, list | tuple) or len(range_) < 2:
            raise broken(f"must give [low, high] of numbers or a list of choices for each option, got {key}: {range_}")
    return {key: tuple(range_) for key, range_ in value.items()}


def _no_password(url: str) -> str:
    """Refuse a password: the URL is written to specs and results, and is visible in the list of processes."""
    if re.match(r"[^/]*//[^/@]*:[^/@]*@", url) or re.search(r"[?&]password=", url):
        raise broken("must not contain a password. Put the URL into a variable and give env:NAME, or use ~/.pgpass")
    if url and not url.startswith((KEY_IN_ENVIRONMENT, "postgresql")):
        raise broken("must be a URL such as postgresql://USER@HOST/DATABASE, or env:NAME, or empty for a file")
    return url


StudyUrl = Annotated[str, AfterValidator(_no_password), Field(repr=False)]
Ranges = Annotated[dict[str, Any], BeforeValidator(_flat), AfterValidator(_ranges)]


class AutomlSpec(Section):
    """``automl``: a search in which every trial is a training job."""

    algorithm: Algorithm = option("bayesian", "search algorithm; asha, hyperband and bohb stop bad trials early")
    max_recommendations: Count = option(20, "number of trials; the first one has the spec's own values")
    max_epochs: int | None = option(None, "epochs of a complete trial; unset: train.num_epochs", ge=1)
    metric: str = option("", "metric to optimise; unset: train_loss for pretraining, ACC_all for fine-tuning")
    direction: Literal["", "minimize", "maximize"] = option("", "unset: the natural direction of the metric")
    parameters: Texts = option((), "options to search; unset: lr, weight_decay, momentum, warmup, backbone_multiplier")
    ranges: Ranges = option({}, "values to search, by option: [low, high], or the choices")
    reduction_factor: int = option(
        3, "asha, hyperband, bohb: 1 of this many trials continues, for this many times the epochs", ge=2
    )
    population_size: int = option(5, "pbt: trials of a generation", ge=2)
    max_concurrent: Count = option(1, "trials that run at the same time, in each worker")
    timeout: float = option(0.0, "seconds after which a trial is stopped; 0: never", ge=0)
    seed: int = option(1234, "seed of the search", ge=0)
    keep_all: bool = option(False, "keep the checkpoints of trials that cannot win")
    storage: StudyUrl = option("", "PostgreSQL URL of a study that machines share, or env:NAME; unset: a file")
    results_dir: OutputPath = option("", "folder for results of the search; unset: <results_dir>/automl")
