"""The rules of recipes: what they choose, and that a value of the user always wins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmae.spec.choices import Facts
from openmae.spec.describe import fields, traits
from openmae.spec.load import check, choices_of, load_spec, to_dict, to_yaml
from openmae.spec.recipe import FEW_LABELS, choose, estimate, keep
from openmae.spec.tree import flatten, get, value_of

LAPTOP = Facts(images=1300, val_images=500, side=32, on_gpu=False, fast_bf16=True)
_DATA = "dataset.train_data_sources=x"
_SOURCES = (_DATA, "dataset.val_data_sources=y")
LARGE = Facts(images=1000, seconds_per_image=0.032, seconds_saved=0.016, copies=2 * 10**9, room=5 * 10**9)
LABELLED = Facts(images=100, val_images=500, classes=10, per_class=10, side=32, on_gpu=False)


def chosen(facts: Facts, *overrides: str, stage: str = "pretrain") -> dict[str, Any]:
    spec = choose(load_spec(None, [f"train.stage={stage}", _DATA, *overrides]), facts)
    check(spec)
    return {key: value_of(spec, key) for key in spec.chosen}


@pytest.mark.parametrize(
    ("facts", "overrides", "expected"),
    [
        (LAPTOP, [], {"model.arch": "vit_tiny_patch16", "model.patch_size": 4}),
        (LAPTOP, [], {"dataset.augmentation.input_size": 32, "dataset.augmentation.min_scale": 0.2}),
        (LAPTOP, [], {"train.precision": "bf16", "train.optim.lr_scheduler": "cosine"}),
        (LAPTOP, [], {"model.decoder_depth": 2, "model.decoder_embed_dim": 192}),
        (Facts(on_gpu=True), [], {"model.arch": "vit_small_patch16", "dataset.batch_size": 256}),
        (Facts(side=500), ["model.arch=vit_base_patch16"], {"dataset.augmentation.input_size": 224}),
        (
            Facts(side=60),
            ["model.arch=vit_base_patch16"],
            {"dataset.augmentation.input_size": 64, "model.patch_size": 8},
        ),
        (Facts(side=32), ["model.arch=convnextv2_atto"], {"dataset.augmentation.input_size": 128}),
        (Facts(side=32), ["model.arch=hiera_tiny_224"], {"dataset.augmentation.input_size": 128}),
        (
            Facts(side=32),
            ["model.arch=vit_tiny_patch16", "model.patch_size=16"],
            {"dataset.augmentation.input_size": 128},
        ),
        (Facts(images=1300), [], {"dataset.batch_size": 32, "train.optim.lr": 0.00021}),
        (Facts(images=454), [], {"dataset.batch_size": 16}),
        (Facts(images=24), [], {"dataset.batch_size": 8}),
        (Facts(images=100_000), [], {"dataset.batch_size": 64}),
        (Facts(images=3), [], {"dataset.batch_size": 2}),
        (Facts(images=1), [], {"dataset.batch_size": 1}),
        (
            Facts(images=100_000, free_memory=10**9, bytes_per_image=60e6),
            [],
            {"dataset.batch_size": 8, "train.accum_grad_batches": 8},
        ),
        (
            Facts(images=100_000, free_memory=10**9, bytes_of_state=5 * 10**8, bytes_per_image=60e6),
            [],
            {"dataset.batch_size": 4, "train.accum_grad_batches": 16},
        ),
        (Facts(images=100_000, on_gpu=True), ["train.num_gpus=8"], {"dataset.batch_size": 32}),
        (Facts(images=1000), ["dataset.batch_size=10"], {"train.num_epochs": 200, "train.optim.warmup_steps": 1000}),
        (Facts(images=30), ["dataset.batch_size=2"], {"train.num_epochs": 570}),
        (
            Facts(images=1000, seconds_per_image=0.02),
            ["dataset.batch_size=10"],
            {"train.num_epochs": 90, "train.optim.warmup_steps": 450, "train.checkpoint_interval": 1},
        ),
        (Facts(images=100, seconds_per_image=0.01), ["dataset.batch_size=10"], {"train.checkpoint_interval": 20}),
        (LARGE, [], {"dataset.cache": "on", "train.num_epochs": 111}),
        (LARGE, ["dataset.cache=auto"], {"dataset.cache": "on"}),
        (LARGE, ["train.num_epochs=1"], {"dataset.cache": None}),
        (replace(LARGE, images=20_000), [], {"dataset.cache": None, "train.num_epochs": 2}),
        (replace(LARGE, images=20_000), ["train.num_epochs=5"], {"dataset.cache": "on"}),
        (replace(LARGE, seconds_saved=0.001), [], {"dataset.cache": None, "train.num_epochs": 56}),
        (replace(LARGE, room=10**8), [], {"dataset.cache": "off", "train.num_epochs": 56}),
        (LAPTOP, ["train.num_epochs=100"], {"train.validation_interval": 5}),
        (LAPTOP, ["train.num_epochs=10"], {"train.validation_interval": 1}),
    ],
)
def test_pretraining(facts, overrides, expected):
    found = chosen(facts, *overrides)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("facts", "overrides", "expected"),
    [
        (LABELLED, [], {"dataset.augmentation.mixup": 0.0, "dataset.augmentation.cutmix": 0.0}),
        (LABELLED, [], {"dataset.augmentation.auto_aug": "", "dataset.augmentation.min_scale": 0.5}),
        (LABELLED, [], {"dataset.batch_size": 16, "train.optim.layer_decay": 1.0}),
        (LABELLED, ["dataset.augmentation.max_scale=0.4"], {"dataset.augmentation.min_scale": 0.4}),
        (LABELLED, ["dataset.augmentation.cutmix_minmax=[0.2,0.4]"], {"dataset.augmentation.cutmix": None}),
        (
            Facts(per_class=1000),
            ["dataset.batch_size=7"],
            {"dataset.augmentation.mixup": 0.0, "dataset.augmentation.auto_aug": None},
        ),
        (LABELLED, ["train.pretrained_model_path=x"], {"train.optim.layer_decay": None}),
        (Facts(images=10_000, per_class=FEW_LABELS), [], {"dataset.augmentation.mixup": None}),
        (Facts(images=10_000, per_class=1000), [], {"train.num_epochs": 30}),
        (
            Facts(
                weights={"model.arch": "hiera_tiny_224", "dataset.augmentation.input_size": 96}, side=500, on_gpu=True
            ),
            ["train.pretrained_model_path=x"],
            {"model.arch": "hiera_tiny_224", "dataset.augmentation.input_size": 96},
        ),
    ],
)
def test_finetuning(facts, overrides, expected):
    found = chosen(facts, *overrides, stage="finetune")
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("stage", "arch", "expected"),
    [
        ("pretrain", "vit_base_patch16", {"train.num_epochs": 800, "train.optim.lr": 2.4e-3}),
        ("pretrain", "hiera_base_224", {"train.optim.lr": 8e-4, "train.optim.warmup_epochs": 40}),
        ("finetune", "vit_base_patch16", {"train.optim.lr": 2e-3, "train.optim.layer_decay": 0.65}),
        ("finetune", "convnextv2_atto", {"train.num_epochs": 600, "train.ema_decay": 0.9999}),
        ("finetune", "hiera_large_224", {"train.optim.lr": 1e-3, "train.num_epochs": 50}),
    ],
)
def test_paper(stage, arch, expected):
    """The values are those of the papers' tables (docs/training-recipes.md)."""
    found = chosen(Facts(images=10**6), "train.recipe=paper", f"model.arch={arch}", stage=stage)
    assert {key: found.get(key) for key in expected} == expected
    assert found["dataset.batch_size"] * found["train.accum_grad_batches"] == (4096 if stage == "pretrain" else 1024)


def test_tao_chooses_nothing():
    spec = choose(load_spec(None, ["train.recipe=tao"]), LAPTOP)
    assert not spec.chosen
    published = {
        key: field.default for key, field in fields().items() if traits(key).recipe and field.default is not None
    }
    assert {key: value_of(spec, key) for key in published} == published
    assert (spec.dataset.batch_size, spec.train.num_epochs, spec.model.arch) == (1, 10, "convnextv2_base")


_VALUES = {
    "model.arch": "vit_base_patch16",
    "model.in_chans": 1,
    "model.patch_size": 16,
    "model.decoder_depth": 3,
    "model.decoder_embed_dim": 96,
    "model.drop_path_rate": 0.2,
    "dataset.batch_size": 6,
    "dataset.cache": "off",
    "dataset.augmentation.input_size": 160,
    "dataset.augmentation.min_scale": 0.3,
    "dataset.augmentation.interpolation": "random",
    "dataset.augmentation.auto_aug": "rand-m3",
    "dataset.augmentation.re_prob": 0.1,
    "dataset.augmentation.smoothing": 0.2,
    "dataset.augmentation.mixup": 0.1,
    "dataset.augmentation.cutmix": 0.3,
    "train.num_epochs": 7,
    "train.precision": "fp32",
    "train.accum_grad_batches": 3,
    "train.ema_decay": 0.9,
    "train.validation_interval": 2,
    "train.checkpoint_interval": 3,
    "train.optim.lr": 3e-3,
    "train.optim.layer_decay": 0.9,
    "train.optim.lr_scheduler": "MultiStep",
    "train.optim.warmup_epochs": 2,
    "train.optim.warmup_steps": 5,
}


def test_every_choice_is_declared_and_can_be_overridden():
    declared = {key for key in fields() if traits(key).recipe}
    assert declared == _VALUES.keys(), "give the option a value here, so that the property below holds for it"


@settings(deadline=None)
@given(
    st.sets(st.sampled_from(sorted(_VALUES))),
    st.sampled_from(["auto", "paper"]),
    st.sampled_from(["pretrain", "finetune"]),
    st.builds(
        Facts,
        images=st.none() | st.integers(2, 10**7),
        val_images=st.integers(1, 1000),
        per_class=st.none() | st.integers(1, 10**4),
        side=st.none() | st.integers(1, 5000),
        on_gpu=st.booleans(),
        fast_bf16=st.booleans(),
        free_memory=st.none() | st.integers(0, 2**40),
        bytes_of_state=st.integers(0, 2**36),
        bytes_per_image=st.none() | st.floats(1, 2**34),
        seconds_per_image=st.none() | st.floats(1e-6, 1e4),
        seconds_saved=st.floats(0, 1e-6),
        copies=st.none() | st.integers(1, 10**12),
        room=st.integers(0, 10**12),
        searching=st.booleans(),
    ),
)
def test_values_of_the_user_win_and_all_choices_are_legal(keys, recipe, stage, facts):
    keys = keys | ({"model.arch"} if "model.patch_size" in keys else set())  # only a ViT has patches
    values = {key: _VALUES[key] for key in keys}
    overrides = [f"{key}={value!r}" for key, value in values.items()]
    spec = choose(load_spec(None, [*overrides, *_SOURCES, f"train.stage={stage}", f"train.recipe={recipe}"]), facts)
    assert {key: value_of(spec, key) for key in keys} == values
    assert not spec.chosen.keys() & keys
    check(spec)
    again = load_spec(to_dict(spec))
    assert again.model_dump() == spec.model_dump(), "the recorded spec is another one"


def test_choosing_again_replaces_the_choices():
    spec = choose(load_spec(None), LAPTOP)
    assert choose(spec, LAPTOP) == spec
    assert choose(spec, Facts()).dataset.batch_size == load_spec(None).dataset.batch_size


def test_choices_that_count_as_set_are_kept():
    """As in a search, whose trials share them."""
    spec = choose(load_spec(None), LAPTOP)
    settled = spec.with_set_keys(frozenset(spec.chosen))
    again = choose(settled, Facts(images=10**6, on_gpu=True))
    assert again.model_dump() == spec.model_dump()


def test_a_resumed_run_keeps_the_choices():
    first = choose(load_spec(None), LAPTOP)
    other = choose(load_spec(None, ["train.optim.lr=1e-3"]), Facts(images=10**6, on_gpu=True))
    kept = keep(other, flatten(to_dict(first)))
    assert kept.model.arch == "vit_tiny_patch16"
    assert kept.train.optim.lr == 1e-3
    assert kept.train.num_epochs == first.train.num_epochs


def test_choices_are_recorded_with_reasons():
    spec = choose(load_spec(None), LAPTOP)
    text = to_yaml(spec)
    assert text.startswith(
        "# Chosen by train.recipe=auto, for options that are not set:\n#   model.arch=vit_tiny_patch16: "
    )
    assert "#   dataset.batch_size=32: training images: 1,300\n" in text
    assert get(to_dict(spec), "dataset.batch_size") == 32
    assert not any(key.startswith("dataset.augmentation.mixup") for key, _, _ in choices_of(spec)), "it has no effect"


def test_why_decoded_images_are_kept_or_not():
    spec, full = (choose(load_spec(None), facts) for facts in (LARGE, replace(LARGE, room=10**8)))
    assert spec.chosen["dataset.cache"] == "decoding images once saves 50% of the time; their copies take 2 GB"
    assert full.chosen["dataset.cache"] == "scaled copies of the images take 2 GB, and the cache has room for 0.1 GB"
    unusable = choose(load_spec(None), replace(LARGE, room=0))
    assert unusable.chosen["dataset.cache"] == "the cache cannot be used, or is full"


def test_the_announced_duration_includes_the_epoch_that_makes_the_copies():
    facts = replace(LARGE, images=10_000)
    spec = choose(load_spec(None, ["train.num_epochs=5"]), facts)
    assert estimate(spec, facts, 5) == pytest.approx(10_000 * (0.032 + 4 * 0.016))


def test_a_long_run_is_cut_to_the_budget_and_says_so():
    spec = choose(load_spec(None), Facts(images=100_000, seconds_per_image=0.01))
    assert spec.train.num_epochs == 1
    assert spec.chosen["train.num_epochs"] == (
        "as many as 30 minutes allow; 50 epochs would be better, and take 13.9 hours; duration: about 17 minutes; "
        "optimizer steps: 1,562"
    )
