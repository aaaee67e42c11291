"""The search space: default options and ranges, the user's, and what is rejected."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmae.automl.algorithms import Algorithm
from openmae.automl.space import Space, make_space
from openmae.errors import SpecError
from openmae.spec.describe import fields, traits
from openmae.spec.load import load_spec
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of

OPTIM = "train.optim."
FLAGGED = ["lr", "weight_decay", "momentum", "backbone_multiplier", "warmup_epochs"]
STAGES = ("pretrain", "finetune")


def _spec(*overrides: str, stage: str = "pretrain", epochs: int = 30, **automl: Any) -> ExperimentSpec:
    tree = {
        "dataset": {"train_data_sources": "images", "batch_size": 8},
        "train": {"recipe": "tao", "stage": stage, "num_epochs": epochs},
        "automl": automl,
    }
    return load_spec(tree, overrides, action="automl")


def _refused(*overrides: str, **more: Any) -> str:
    with pytest.raises(SpecError) as caught:
        make_space(_spec(*overrides, **more))
    assert caught.value.fix
    return caught.value.problem


def _ranges(space: Space) -> dict[str, str]:
    return {item.key: item.range_words for item in space.parameters}


def test_default_space_of_finetuning() -> None:
    space = make_space(_spec(stage="finetune"))
    assert _ranges(space) == {
        "train.optim.lr": "2e-05 to 0.005, log",
        "train.optim.weight_decay": "0.001 to 0.3, log",
        "train.optim.momentum": "0.8 to 0.98",
        "train.optim.backbone_multiplier": "0.05 to 1, log",
        "train.optim.warmup_epochs": "0 to 20",
    }
    assert not space.left_out
    assert space.log_keys == {OPTIM + "lr", OPTIM + "weight_decay", OPTIM + "backbone_multiplier"}
    assert space.own == {
        OPTIM + "lr": 2e-4,
        OPTIM + "weight_decay": 0.05,
        OPTIM + "momentum": 0.9,
        OPTIM + "backbone_multiplier": 1.0,
        OPTIM + "warmup_epochs": 1,
    }


def test_default_space_of_pretraining_has_no_head_options() -> None:
    space = make_space(_spec(stage="pretrain"))
    assert sorted(_ranges(space)) == sorted(OPTIM + name for name in FLAGGED if name != "backbone_multiplier")
    assert space.left_out == {OPTIM + "backbone_multiplier": "it has no effect in the pretrain stage."}


@pytest.mark.parametrize("stage", STAGES)
def test_default_ranges_are_inside_the_legal_bounds(stage: str) -> None:
    """Never the schema's extremes: a learning rate of 1 or a beta1 of 0.999 only costs time."""
    for item in make_space(_spec(stage=stage)).parameters:
        low, high = item.bounds
        for bound in fields()[item.key].metadata:
            assert getattr(bound, "gt", -1.0) < low, item
            assert high < getattr(bound, "lt", 1e9), item
            if item.key != OPTIM + "backbone_multiplier":  # 1: the backbone learns as fast as the head
                assert high < getattr(bound, "le", 1e9), item


@pytest.mark.parametrize(("epochs", "most"), [(30, 20), (12, 11), (2, 1)])
def test_warmup_stays_below_the_epochs(epochs: int, most: int) -> None:
    for spec in (_spec(epochs=epochs), _spec(epochs=500, max_epochs=epochs)):
        (item,) = [item for item in make_space(spec).parameters if item.key == OPTIM + "warmup_epochs"]
        assert item.bounds == (0, most)


def test_one_epoch_leaves_no_warmup_to_search() -> None:
    space = make_space(_spec("train.optim.warmup_epochs=0", epochs=1))
    assert OPTIM + "warmup_epochs" not in _ranges(space)
    assert "[0, 0] leaves nothing to search" in space.left_out[OPTIM + "warmup_epochs"]


@pytest.mark.parametrize("warmup", [1, 5, 40])
def test_warmup_longer_than_the_trials_does_not_widen_the_range(warmup: int) -> None:
    """The nearest value that can be tried stands for the spec's own."""
    spec = _spec(f"train.optim.warmup_epochs={warmup}", epochs=100, max_epochs=4)
    (item,) = [item for item in make_space(spec).parameters if item.key == OPTIM + "warmup_epochs"]
    assert item.bounds == (0, 3)
    assert item.own == min(warmup, 3)


def test_spec_value_widens_the_default_range() -> None:
    space = make_space(_spec("train.optim.lr=0.05", "train.optim.weight_decay=0"))
    (rate, decay, *_) = space.parameters
    assert (rate.bounds, rate.own, rate.log) == ((2e-5, 0.05), 0.05, True)
    assert (decay.bounds, decay.own, decay.log) == ((0, 0.3), 0.0, False), "0 has no place on a logarithmic axis"


def test_user_range_is_kept() -> None:
    spec = _spec(
        "train.optim.lr=0.05", ranges={"train": {"optim": {"lr": [1e-4, 1e-3]}}, OPTIM + "momentum": [0.85, 0.95]}
    )
    by_key = {item.key: item for item in make_space(spec).parameters}
    assert (by_key[OPTIM + "lr"].bounds, by_key[OPTIM + "lr"].own) == ((1e-4, 1e-3), None)
    assert (by_key[OPTIM + "momentum"].bounds, by_key[OPTIM + "momentum"].own) == ((0.85, 0.95), 0.9)


def test_override_narrows_a_range() -> None:
    spec = _spec("automl.ranges.train.optim.lr=[1e-4,1e-3]", stage="finetune")
    assert _ranges(make_space(spec))[OPTIM + "lr"] == "0.0001 to 0.001, log"


def test_named_parameters_replace_the_defaults() -> None:
    names = ["model.arch", "model.mask_ratio", OPTIM + "lr", "model.drop_path_rate", "dataset.batch_size"]
    ranges = {"model.arch": ["vit_tiny_patch16", "vit_small_patch16"], "dataset.batch_size": [8, 16, 32]}
    space = make_space(_spec("model.arch=vit_small_patch16", parameters=names, ranges=ranges))
    assert _ranges(space) == {
        "model.arch": "vit_tiny_patch16, vit_small_patch16",
        "model.mask_ratio": "0.4 to 0.9",
        "train.optim.lr": "2e-05 to 0.005, log",
        "model.drop_path_rate": "0 to 0.4",
        "dataset.batch_size": "8, 16, 32",
    }
    assert space.own["model.arch"] == "vit_small_patch16"
    assert space.own["dataset.batch_size"] == 8


def test_alias_of_the_mask_ratio() -> None:
    spec = _spec(parameters=["train.mask_ratio"], ranges={"train.mask_ratio": [0.5, 0.8]})
    assert _ranges(make_space(spec)) == {"model.mask_ratio": "0.5 to 0.8"}


def test_booleans_and_choices() -> None:
    space = make_space(_spec(parameters=["model.norm_pix_loss", OPTIM + "lr_scheduler"]))
    pixels, scheduler = space.parameters
    assert (pixels.choices, pixels.own) == ((True, False), True)
    assert (set(scheduler.choices), scheduler.own) == ({"cosine", "MultiStep"}, "MultiStep")
    weights = dict(zip(scheduler.choices, scheduler.weights, strict=True))
    assert weights == {"cosine": 0.7, "MultiStep": 0.3}


def test_conditional_option_is_drawn_only_when_it_has_an_effect() -> None:
    spec = _spec(parameters=[OPTIM + "gamma", OPTIM + "lr_scheduler"], algorithm="random")
    space = make_space(spec)
    assert [item.key for item in space.parameters] == [OPTIM + "lr_scheduler", OPTIM + "gamma"], "the cause comes first"
    assert space.conditional
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask()) for _ in range(40)]
    for params in drawn:
        assert (OPTIM + "gamma" in params) == (params[OPTIM + "lr_scheduler"] == "MultiStep")
    assert len({len(params) for params in drawn}) == 2


def test_conditional_option_without_its_condition_needs_the_spec_value() -> None:
    space = make_space(_spec(parameters=[OPTIM + "gamma"]))
    assert _ranges(space) == {OPTIM + "gamma": "0.05 to 0.5, log"}
    assert not space.conditional
    problem = _refused("train.optim.lr_scheduler=cosine", parameters=[OPTIM + "gamma"])
    assert (
        problem == "automl.parameters: train.optim.gamma: it has no effect without train.optim.lr_scheduler=MultiStep."
    )


def test_mixup_switch_needs_mixup() -> None:
    key = "dataset.augmentation.mixup_switch_prob"
    problem = _refused("dataset.augmentation.mixup=0", stage="finetune", parameters=[key])
    assert problem == f"automl.parameters: {key}: it has no effect without dataset.augmentation.mixup>0."
    assert key in _ranges(make_space(_spec(stage="finetune", parameters=[key])))


@pytest.mark.parametrize(
    ("stage", "key", "why"),
    [
        ("pretrain", "train.optim.rate", "there is no such option."),
        ("pretrain", "optim.lr", "there is no such option. Did you mean train.optim.lr?"),
        ("pretrain", "learning_rate", "there is no such option."),
        (
            "pretrain",
            "train.num_epochs",
            "it is the length of a trial and cannot be searched. Set automl.max_epochs.",
        ),
        (
            "pretrain",
            "train.precision",
            "it cannot be searched: it sets what is trained and where, not how well. Set it in the spec.",
        ),
        (
            "pretrain",
            "evaluate.batch_size",
            "it cannot be searched: it sets what is trained and where, not how well. Set it in the spec.",
        ),
        ("pretrain", "train.optim.layer_decay", "it has no effect in the pretrain stage."),
        ("finetune", "model.mask_ratio", "it has no effect in the finetune stage."),
    ],
)
def test_options_that_cannot_be_searched_are_rejected_with_the_reason(stage: str, key: str, why: str) -> None:
    problem = _refused(stage=stage, parameters=[key])
    assert problem.startswith(f"automl.parameters: {key}: {why}")


def test_base_lr_replaces_lr() -> None:
    why = "train.optim.base_lr replaces it. Search train.optim.base_lr instead, and set its range in automl.ranges."
    assert (
        _refused("train.optim.base_lr=1e-3", parameters=[OPTIM + "lr"]) == f"automl.parameters: train.optim.lr: {why}"
    )
    assert make_space(_spec("train.optim.base_lr=1e-3")).left_out[OPTIM + "lr"] == why
    spec = _spec("train.optim.base_lr=1e-3", parameters=[OPTIM + "base_lr"], ranges={OPTIM + "base_lr": [1e-4, 1e-2]})
    (item,) = make_space(spec).parameters
    assert (item.bounds, item.own) == ((1e-4, 1e-2), 1e-3)


def test_all_mistakes_are_reported_at_once() -> None:
    problem = _refused(
        parameters=["nothing", "train.precision", OPTIM + "lr", "model.arch", OPTIM + "base_lr"],
        ranges={OPTIM + "lr": [0.5, 2.0], OPTIM + "momentum": [0.8, 0.9]},
    )
    assert problem.splitlines() == [
        "automl.ranges.train.optim.momentum: it is not in automl.parameters. Add it there, or remove it.",
        "automl.parameters: nothing: there is no such option.",
        "automl.parameters: train.precision: it cannot be searched: it sets what is trained and where, not how "
        "well. Set it in the spec.",
        "automl.ranges.train.optim.lr: 2.0 is not a legal value of train.optim.lr: input should be less than or equal "
        "to 1.",
        "automl.ranges.model.arch: list the architectures, such as [vit_tiny_patch16, vit_small_patch16].",
        "automl.ranges.train.optim.base_lr: it has no default range. Give [low, high] or a list of choices.",
    ]


@pytest.mark.parametrize(
    ("key", "range_", "why"),
    [
        (OPTIM + "lr", [1e-3, 1e-4], "[0.001, 0.0001] leaves nothing to search. Give the lower number first"),
        (OPTIM + "lr", [1e-3, 1e-3], "[0.001, 0.001] leaves nothing to search."),
        (OPTIM + "lr", [0.0, 1e-3], "0.0 is not a legal value of train.optim.lr: input should be greater than 0."),
        (OPTIM + "warmup_epochs", [0.5, 2], "0.5 is not a legal value of train.optim.warmup_epochs"),
        (OPTIM + "warmup_epochs", [0, 30], "must stay below the 30 epochs of a trial, got 0 to 30."),
        (OPTIM + "lr_scheduler", ["cosine", "linear"], "'linear' is not a legal value of train.optim.lr_scheduler"),
        (OPTIM + "lr_scheduler", ["cosine", "cosine"], "lists a choice twice: cosine, cosine."),
        (
            "model.arch",
            ["vit_tiny_patch16", "vit_tiny_patch17"],
            "'vit_tiny_patch17' is not a legal value of model.arch",
        ),
    ],
)
def test_impossible_ranges_are_rejected(key: str, range_: list[Any], why: str) -> None:
    problem = _refused(parameters=[key], ranges={key: range_})
    assert problem.startswith(f"automl.ranges.{key}: {why}")


def test_ranges_of_unknown_options() -> None:
    problem = _refused(ranges={"train.optim.rate": [1, 2]})
    assert problem.startswith("automl.ranges.train.optim.rate: there is no such option.")


def test_ranges_that_cross() -> None:
    names = ["dataset.augmentation.min_scale", "dataset.augmentation.max_scale"]
    problem = _refused(parameters=names)
    assert problem.startswith(
        f"automl.ranges: a trial would be rejected: {names[0]}: must not be above max_scale (0.6)"
    )
    apart = {names[0]: [0.1, 0.5], names[1]: [0.6, 1.0]}
    assert len(make_space(_spec(parameters=names, ranges=apart)).parameters) == 2


def test_a_range_is_capped_by_the_option_that_bounds_it() -> None:
    key = "dataset.augmentation.min_scale"
    (item,) = make_space(_spec("dataset.augmentation.max_scale=0.5", parameters=[key])).parameters
    assert item.bounds == (0.08, 0.5)
    problem = _refused("dataset.augmentation.max_scale=0.5", parameters=[key], ranges={key: [0.2, 0.9]})
    assert problem.startswith(f"automl.ranges: a trial would be rejected: {key}: ")
    assert "(0.5)" in problem


def _draws(spec: ExperimentSpec, count: int = 40) -> list[dict[str, Any]]:
    """Random draws; each of them is a training that the spec admits, or this raises."""
    space, study = make_space(spec), optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = [space.suggest(study.ask()) for _ in range(count)]
    typed = {key: value_of(spec, key) for key in fields() if spec.is_set(key) and not key.startswith("automl.")}
    for params in found:
        load_spec(None, [f"{key}={value}" for key, value in {**typed, **params}.items()], action="train")
    return found


WIDTH, RATIO, ARCH = "model.decoder_embed_dim", "model.mask_ratio", "model.arch"
VIT_OR_CONVNEXT = {ARCH: ["vit_tiny_patch16", "convnextv2_atto"]}


@pytest.mark.parametrize(
    ("own", "range_", "searched"),
    [
        (None, None, "128 to 512, in steps of 64"),
        (96, None, "96 to 512, in steps of 32"),
        (32, None, "32 to 512, in steps of 32"),
        (160, None, "128 to 512, in steps of 32"),
        (None, [96, 512], "96 to 512, in steps of 32"),
        (None, [100, 500], "128 to 480, in steps of 32"),
        (None, [64, 256], "64 to 256, in steps of 64"),
    ],
)
def test_decoder_widths_are_multiples_of_a_head(own: int | None, range_: list[int] | None, searched: str) -> None:
    typed = [f"{WIDTH}={own}"] if own else []
    spec = _spec("model.arch=vit_tiny_patch16", *typed, parameters=[WIDTH], ranges={WIDTH: range_} if range_ else {})
    (item,) = make_space(spec).parameters
    assert item.range_words == searched
    assert item.own == own or own is None, "the spec's own value is the first to be tried"
    drawn = {params[WIDTH] for params in _draws(spec)}
    assert len(drawn) > 3
    assert all(width % 32 == 0 for width in drawn)


def test_range_narrower_than_a_head_is_rejected() -> None:
    problem = _refused("model.arch=vit_tiny_patch16", parameters=[WIDTH], ranges={WIDTH: [100, 120]})
    assert problem.startswith(f"automl.ranges.{WIDTH}: [128, 96] in steps of 32 leaves nothing to search.")


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("model.decoder_attention=cross", "model.decoder_attention: cross needs a decoder with attention"),
        ("model.patch_size=8", "model.patch_size: only ViT has a patch size to choose"),
    ],
)
def test_architecture_that_conflicts_with_the_spec_is_rejected(override: str, why: str) -> None:
    typed = ("model.arch=vit_tiny_patch16", override)
    problem = _refused(*typed, parameters=[ARCH], ranges=VIT_OR_CONVNEXT)
    assert problem.startswith(f"automl.ranges.{ARCH}: convnextv2_atto would be rejected: {why}")
    assert "\n" not in problem
    _draws(_spec(*typed, parameters=[ARCH], ranges={ARCH: ["vit_tiny_patch16", "vit_small_patch16"]}))


def test_architecture_defaults_are_resolved_for_each_choice() -> None:
    """The mask ratio of 0.75 is ViT's, and hides too much of ConvNeXt's four units only where it is typed as 0.8."""
    typed = ("model.arch=vit_tiny_patch16", "dataset.augmentation.input_size=64")
    _draws(_spec(*typed, parameters=[ARCH], ranges=VIT_OR_CONVNEXT))
    problem = _refused(*typed, f"{RATIO}=0.8", parameters=[ARCH], ranges=VIT_OR_CONVNEXT)
    assert "convnextv2_atto would be rejected: model.mask_ratio: must leave some mask units visible" in problem


@pytest.mark.parametrize(
    ("arch", "size", "searched"),
    [
        (["convnextv2_atto"], 64, "0.4 to 0.75"),
        (["vit_tiny_patch16", "convnextv2_atto"], 64, "0.4 to 0.75"),
        (["vit_tiny_patch16", "vit_small_patch16"], 64, "0.4 to 0.9"),
        (["vit_tiny_patch16"], 32, "0.4 to 0.75"),
        (["convnextv2_atto"], [32, 64], ""),
    ],
)
def test_mask_ratios_leave_units_visible(arch: list[str], size: Any, searched: str) -> None:
    several = len(arch) > 1
    overrides = (f"{ARCH}={arch[0]}", f"dataset.augmentation.input_size={size}", f"{RATIO}=0.5")
    more = {"parameters": [RATIO, *([ARCH] if several else [])], "ranges": {ARCH: arch} if several else {}}
    if not searched:
        assert f"automl.ranges.{RATIO}: [0.5, 0.5] leaves nothing to search" in _refused(*overrides, **more)
        return
    spec = _spec(*overrides, **more)
    assert _ranges(make_space(spec))[RATIO] == searched
    _draws(spec)


def test_user_range_that_breaks_a_rule_is_rejected() -> None:
    typed = ("model.arch=convnextv2_atto", "dataset.augmentation.input_size=64")
    problem = _refused(*typed, parameters=[RATIO], ranges={RATIO: [0.5, 0.8]})
    assert "automl.ranges: a trial would be rejected: model.mask_ratio: must leave some mask units visible" in problem
    assert "0.8 leaves 0 of 4 visible" in problem
    widths = {WIDTH: [100, 128, 256]}
    problem = _refused("model.arch=vit_tiny_patch16", parameters=[WIDTH], ranges=widths)
    assert "must be a multiple of 32, the width of an attention head, got 100. Use 96." in problem
    rates = [OPTIM + "lr", OPTIM + "base_lr"]
    problem = _refused(parameters=rates, ranges={OPTIM + "base_lr": [1e-4, 1e-2]})
    assert "both set the learning rate" in problem


def test_nothing_left_to_search() -> None:
    spec = _spec("train.optim.base_lr=1e-3", "train.optim.warmup_epochs=0", epochs=1)
    assert len(make_space(spec).parameters) == 2  # weight decay and momentum are always there
    with pytest.raises(SpecError):
        make_space(_spec(parameters=["train.seed"]))


def test_malformed_ranges_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="must give"):
        _spec(ranges={OPTIM + "lr": 0.1})
    with pytest.raises(SpecError, match="must give"):
        _spec(ranges={OPTIM + "lr": [0.1]})


def _drawn(stage: str, epochs: int, seed: int, parameters: list[str]) -> ExperimentSpec:
    spec = _spec("model.arch=vit_tiny_patch16", stage=stage, epochs=epochs, parameters=parameters, seed=seed)
    space = make_space(spec)
    study = optuna.create_study()
    study.sampler = Algorithm(spec.automl, space, spec.trial_epochs).sampler(1)
    params = space.suggest(study.ask())
    assert params
    overrides = [f"{key}={value}" for key, value in params.items()]
    return load_spec(
        {"dataset": {"train_data_sources": "images", "batch_size": 8}, "model": {"arch": "vit_tiny_patch16"},
         "train": {"recipe": "tao", "stage": stage, "num_epochs": epochs}}, overrides, action="train",
    )  # fmt: skip


_QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@_QUICK
@given(st.sampled_from(STAGES), st.integers(1, 120), st.integers(0, 2**31))
def test_every_draw_of_a_default_space_is_a_valid_spec(stage: str, epochs: int, seed: int) -> None:
    optim = _drawn(stage, epochs, seed, []).train.optim
    assert optim.warmup_epochs < epochs or epochs == 1
    assert 2e-5 <= optim.lr <= 5e-3


@functools.cache
def _with_ranges(stage: str) -> list[str]:
    """All options that say where good values lie, and act in a stage."""
    found = []
    for key in fields():
        if traits(key).search is None or key.endswith("max_scale"):
            continue
        with contextlib.suppress(SpecError):
            make_space(_spec(stage=stage, parameters=[key]))
            found.append(key)
    return found


def test_most_options_have_a_default_range() -> None:
    assert len(_with_ranges("pretrain")) >= 10
    assert len(_with_ranges("finetune")) >= 18


@_QUICK
@given(st.data())
def test_every_draw_of_default_ranges_is_a_valid_spec(data: st.DataObject) -> None:
    stage = data.draw(st.sampled_from(STAGES))
    names = data.draw(st.lists(st.sampled_from(_with_ranges(stage)), min_size=1, max_size=5, unique=True))
    _drawn(stage, data.draw(st.integers(2, 50)), data.draw(st.integers(0, 999)), names)
