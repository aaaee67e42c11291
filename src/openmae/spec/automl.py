"""The section ``automl``: how the best values of options are searched for (ours)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from openmae.spec.option import KEY_IN_ENVIRONMENT, LocalPath, Section, Texts, broken, option

Algorithm = Literal["bayesian", "random", "grid", "hyperband", "asha", "bohb", "pbt", "cmaes"]


def _leaves(value: Any) -> Any:
    """Ranges by dotted key, whether they were given nested or dotted."""
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            found.update({f"{name}.{key}": leaf for key, leaf in _leaves(inner).items()})
        else:
            found[str(name)] = inner
    return found


def _ranges(value: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    for key, range_ in value.items():
        if not isinstance(range_, list | tuple) or len(range_) < 2:
            raise broken(f"must give [low, high] of numbers or a list of choices for each option, got {key}: {range_}")
    return {key: tuple(range_) for key, range_ in value.items()}


def _no_password(url: str) -> str:
    """A study's URL stands in specs, results and lists of processes."""
    if re.match(r"[^/]*//[^/@]*:[^/@]*@", url) or re.search(r"[?&]password=", url):
        raise broken("must not hold a password. Put the URL into a variable and give env:NAME, or use ~/.pgpass")
    if url and not url.startswith((KEY_IN_ENVIRONMENT, "postgresql")):
        raise broken("must be a URL such as postgresql://USER@HOST/DATABASE, or env:NAME, or empty for a file")
    return url


StudyUrl = Annotated[str, AfterValidator(_no_password), Field(repr=False)]
Ranges = Annotated[dict[str, Any], BeforeValidator(_leaves), AfterValidator(_ranges)]


class AutomlSpec(Section):
    """``automl``: a search in which every recommendation is a training job."""

    algorithm: Algorithm = option(
        "bayesian", "how recommendations are made; asha, hyperband and bohb stop bad ones early"
    )
    max_recommendations: int = option(20, "trainings to recommend, the spec's own values first", ge=1)
    max_epochs: int | None = option(None, "epochs of a full training; unset: train.num_epochs", ge=1)
    metric: str = option("", "what is judged; unset: train_loss when pretraining, ACC_all when fine-tuning")
    direction: Literal["", "minimize", "maximize"] = option("", "unset: as the metric asks for")
    parameters: Texts = option((), "options to search; unset: lr, weight_decay, momentum, warmup, backbone_multiplier")
    ranges: Ranges = option({}, "where to search, by option: [low, high], or the choices")
    reduction_factor: int = option(3, "asha, hyperband, bohb: one of so many goes on to so many times the epochs", ge=2)
    population_size: int = option(5, "pbt: trainings of a generation", ge=2)
    max_concurrent: int = option(1, "trainings that run at once, in each worker", ge=1)
    timeout: float = option(0.0, "seconds after which a training is stopped as hung; 0: never", ge=0)
    seed: int = option(1234, "fixes the recommendations", ge=0)
    keep_all: bool = option(False, "keep the checkpoints of trainings that cannot win")
    storage: StudyUrl = option("", "PostgreSQL URL of a study that machines share, or env:NAME; unset: a file")
    results_dir: LocalPath = option("", "where automl writes; unset: <results_dir>/automl")
