import json
import os
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmae.errors import SpecError
from openmae.spec import yaml_reader
from openmae.spec.describe import choices, fields
from openmae.spec.load import find_refusals, load_spec, to_dict, to_yaml
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of

TRAIN = ["dataset.train_data_sources=photos"]
FINETUNE = [*TRAIN, "train.stage=finetune", "dataset.batch_size=8"]


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "spec.yaml"
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return write


def mistakes(source=None, overrides=(), action=None):
    with pytest.raises(SpecError) as caught:
        load_spec(source, overrides, action)
    return str(caught.value)


# --- reading -------------------------------------------------------------------------------------------


def test_published_specs_load_unchanged(write):
    spec = load_spec(
        write("""\
        results_dir: /tao_experiments/fcmae/finetune
        dataset:
          batch_size: 16
          train_data_sources: /datasets/split/train
          val_data_sources: /datasets/split/val
          augmentation: {smoothing: 0.1, cutmix: 1.0, mixup: 0.8, input_size: 224}
        train:
          stage: "finetune"
          precision: 'bf16'
          num_gpus: 4
          num_epochs: 100
          optim: {type: "AdamW", lr: 0.002, layer_decay: 0.65, lr_scheduler: "cosine", warmup_epochs: 5}
        model:
          arch: convnextv2_base
          num_classes: 1000
        evaluate:
          checkpoint: ???
        inference:
          checkpoint: ???
        """),
        action="train",
    )
    assert spec.train.gpu_ids == (0, 1, 2, 3)
    assert spec.is_set("model.num_classes")
    assert not spec.is_set("evaluate.checkpoint")
    assert spec.evaluate.checkpoint == ""


def test_numbers_in_yaml(write):
    path = write("""\
        train: {optim: {lr: 1e-4, weight_decay: .5}, num_epochs: 1e2}
        wandb: {name: 007, group: 2026-01-31, entity: 12:30, run_id: 5}
        """)
    spec = load_spec(path)
    assert (spec.train.optim.lr, spec.train.optim.weight_decay, spec.train.num_epochs) == (1e-4, 0.5, 100)
    wandb = spec.wandb
    assert (wandb.name, wandb.group, wandb.entity, wandb.run_id) == ("007", "2026-01-31", "12:30", "5")


def test_an_empty_file_gives_the_defaults(write):
    assert to_dict(load_spec(write(""))) == to_dict(load_spec(None)) == to_dict(load_spec({}))


def test_null_unsets(write):
    path = write("train: {pretrained_model_path: null, num_epochs: 3}\nmodel:\n")
    assert not load_spec(path).is_set("train.pretrained_model_path")
    assert load_spec(path, ["train.num_epochs="]).train.num_epochs == 10


def test_a_duplicate_key_names_both_lines(write):
    text = mistakes(write("train:\n  num_epochs: 1\nmodel:\n  arch: vit_base_patch16\ntrain:\n  seed: 3\n"))
    assert "train (line 5): occurs twice, on lines 1 and 5. Keep one" in text


def test_a_duplicate_key_hides_its_consequences(write):
    path = write("dataset: {train_data_sources: photos}\ndataset: {batch_size: 2}\n")
    assert "has a mistake:" in mistakes(path, action="train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1", r"is not valid YAML: line 1, column 10: expected"),
        ("a: 1\n b: 2", r"is not valid YAML: line 2"),
        ("- 1\n- 2", r"must hold sections such as `model:` and `train:`, not a list."),
        ("model: !!python/object:os.system {}", r"is not valid YAML"),
        ("model: &x\n  arch: *x", r"is not valid YAML: line 1 contains itself"),
        ("a: 1\n---\nb: 2", r"is not valid YAML"),
    ],
)
def test_broken_yaml(write, text, message):
    path = write(text)
    assert mistakes(path).startswith(f"{path} {message}")


def test_files_that_are_not_specs(tmp_path):
    assert "There is no spec file" in mistakes(tmp_path / "nope.yaml")
    assert "is a folder, not a spec file" in mistakes(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "is not a text file" in mistakes(tmp_path / "image.yaml")
    assert "A spec is a path, a mapping or an ExperimentSpec, got int." in mistakes(5)


def test_a_spec_that_is_a_pipe_a_device_or_huge(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    assert "pipe.yaml cannot be read: it is a pipe without a writer." in mistakes(tmp_path / "pipe.yaml")
    assert "endless.yaml cannot be read: it is a device, not a regular" in mistakes(tmp_path / "endless.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 2000)
    monkeypatch.setattr(yaml_reader, "_MAX_FILE_SIZE", 1000)
    assert "large.yaml has more than 0.001 MB, which is too large for a spec" in mistakes(tmp_path / "large.yaml")


def test_a_spec_from_a_pipe():
    end, start = os.pipe()
    os.write(start, b"train: {num_epochs: 3}\n")
    os.close(start)
    try:
        assert load_spec(f"/dev/fd/{end}", []).train.num_epochs == 3
    finally:
        os.close(end)


def test_unknown_action():
    assert "There is no action 'trian'.\n  Fix: Use one of: train," in mistakes(action="trian")


# --- interpolation -------------------------------------------------------------------------------------


def test_interpolation(write, monkeypatch):
    monkeypatch.setenv("MAE_DATA", "/data")
    spec = load_spec(
        write("""\
        results_dir: /results/mae
        train: {pretrained_model_path: path/model.pt}
        dataset: {train_data_sources: "${oc.env:MAE_DATA}/train", batch_size: "${train.num_epochs}"}
        export:
          checkpoint: ${train.pretrained_model_path}
          onnx_file: "${export.results_dir}/model.onnx"
        """),
        ["train.num_epochs=7"],
    )
    assert spec.export.checkpoint == "path/model.pt"
    assert spec.export.onnx_file == "/results/mae/export/model.onnx"
    assert spec.dataset.train_data_sources == "/data/train"
    assert spec.dataset.batch_size == 7


def test_interpolation_of_something_missing_is_missing(write):
    path = write("evaluate:\n  checkpoint: ${train.pretrained_model_path}\ntrain:\n  pretrained_model_path: ???\n")
    assert not load_spec(path).is_set("evaluate.checkpoint")


def test_invalid_interpolations_are_reported():
    text = mistakes(
        {
            "train": {"pretrained_model_path": "${nope.key}", "results_dir": "${train.results_dir}"},
            "model": {"arch": "${"},
            "evaluate": {"checkpoint": "${oc.env:MAE_NOT_SET_ANYWHERE}"},
        }
    )
    assert "has 4 mistakes" in text
    assert "train.pretrained_model_path: '${nope.key}' cannot be resolved: Interpolation key" in text
    assert "train.results_dir: '${train.results_dir}' cannot be resolved: " in text
    assert "model.arch: '${' cannot be resolved: " in text
    assert "evaluate.checkpoint: '${oc.env:MAE_NOT_SET_ANYWHERE}' cannot be resolved: Environment" in text


def test_a_given_mapping_is_not_changed():
    source = {"train": {"freeze": ["${model.arch}"], "mask_ratio": 0.5}}
    assert load_spec(source).train.freeze == ("convnextv2_base",)
    assert source == {"train": {"freeze": ["${model.arch}"], "mask_ratio": 0.5}}


# --- overrides -----------------------------------------------------------------------------------------


def test_overrides_replace_the_file(write):
    path = write("train: {num_epochs: 3, optim: {lr: 0.1}}\n")
    spec = load_spec(path, ["train.optim.lr=2e-3", "train.gpu_ids=[2,3]", "dataset.augmentation={hflip: 0}"])
    assert (spec.train.num_epochs, spec.train.optim.lr, spec.train.num_gpus) == (3, 2e-3, 2)
    assert spec.dataset.augmentation.hflip == 0
    assert spec.is_set("dataset.augmentation.hflip")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_epochs", "train.num_epochs (override): an override is written key=value, got 'train.num_epochs'."),
        ("=3", "an override is written key=value, got '=3'."),
        ("train..x=3", "an override is written key=value"),
        ("train.gpu_ids=[1", "train.gpu_ids (override): '[1' is not valid YAML"),
        (
            "dataset.train_data_sources=caf\udce9",
            "dataset.train_data_sources (override): 'caf\\udce9' contains bytes that are not UTF-8. Rename it, or "
            "write caf\\xe9 for a data source.",
        ),
        ("train=3", "train (override): is a section and must have keys below it, got 3."),
        ("nothing=3", "nothing (override): there is no such key. `mae spec keys` lists all keys."),
        (
            "train.sharded_checkpoints=true",
            "this option was removed: checkpoints are always complete. Remove the key.",
        ),
    ],
)
def test_bad_overrides(override, message):
    assert message in mistakes(None, [override])


def test_an_override_below_a_value():
    text = mistakes({"train": {"num_epochs": 3}}, ["train.num_epochs.x=3"])
    assert "train.num_epochs.x (override): cannot be set, since train.num_epochs is 3 and not a section." in text


plain_text = st.text(st.characters(max_codepoint=0x2FF, exclude_categories=["Cc"]), max_size=20)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lr=st.floats(1e-12, 1, exclude_min=True),
    epochs=st.integers(1, 10**6),
    flip=st.booleans(),
    freeze=st.lists(plain_text.filter(lambda s: "${" not in s), max_size=3),
    name=plain_text.filter(lambda s: "${" not in s and s != "???"),
)
def test_overrides_and_yaml_round_trip(lr, epochs, flip, freeze, name, tmp_path):
    values = {"train.optim.lr": lr, "train.num_epochs": epochs, "model.global_pool": flip}
    values |= {"train.freeze": freeze, "wandb.name": name}
    spec = load_spec(None, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    assert (spec.train.optim.lr, spec.train.num_epochs, spec.model.global_pool) == (lr, epochs, flip)
    assert (spec.train.freeze, spec.wandb.name) == (tuple(freeze), name)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(spec), encoding="utf-8")
    assert to_dict(load_spec(path)) == to_dict(spec)


# --- what is filled in ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.arch=vit_base_patch16"], (0.75, 8, 512, 0.0, 0.95)),
        (["model.arch=hiera_base_224"], (0.6, 8, 512, 0.2, 0.95)),
        (["model.arch=convnextv2_atto"], (0.6, 1, 512, 0.0, 0.95)),
        (["model.arch=hiera_base_224", "train.stage=finetune"], (0.6, 8, 512, 0.1, 0.999)),
        (["model.mask_ratio=.5", "model.drop_path_rate=.3", "train.optim.beta2=.9"], (0.5, 1, 512, 0.3, 0.9)),
    ],
)
def test_dependent_defaults(overrides, expected):
    spec = load_spec(None, ["dataset.batch_size=2", *overrides])
    model = spec.model
    decoder = (model.decoder_depth, model.decoder_embed_dim)
    assert (model.mask_ratio, *decoder, model.drop_path_rate, spec.train.optim.beta2) == expected


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [
        (1, (0.449,), (0.226,)),
        (3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (4, (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)),
    ],
)
def test_mean_and_std_follow_the_channels(channels, mean, std):
    augment = load_spec(None, [f"model.in_chans={channels}"]).dataset.augmentation
    assert (augment.mean, augment.std) == (mean, std)


def test_aliases_of_mask_ratio_and_norm_pix_loss():
    spec = load_spec({"train": {"mask_ratio": 0.5, "norm_pix_loss": False}})
    assert (spec.model.mask_ratio, spec.model.norm_pix_loss) == (0.5, False)
    assert spec.is_set("model.mask_ratio")
    load_spec({"train": {"mask_ratio": 0.5}, "model": {"mask_ratio": 0.5}})


def test_num_gpus_and_gpu_ids_follow_each_other():
    def gpus(*overrides):
        train = load_spec(None, overrides).train
        return train.num_gpus, train.gpu_ids

    assert gpus() == (1, (0,))
    assert gpus("train.num_gpus=3") == (3, (0, 1, 2))
    assert gpus("train.gpu_ids=[1,3]") == (2, (1, 3))
    assert gpus("train.gpu_ids=[0]", "train.num_gpus=2") == (2, (0, 1))  # the published default beside it
    assert gpus("train.gpu_ids=[3]", "train.num_gpus=1") == (1, (3,))


def test_the_resolved_spec_loads_back_unchanged(tmp_path, caplog):
    overrides = [*FINETUNE, "model.arch=vit_tiny_patch16", "train.num_gpus=2", "train.optim.base_lr=1e-3"]
    spec = load_spec(None, [*overrides, "train.optim.lr_scheduler=cosine"], "train")
    text = to_yaml(spec)
    assert "mask_ratio" not in text
    assert "\n    lr:" not in text
    assert "mean: [0.485, 0.456, 0.406]" in text
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    caplog.clear()
    assert to_dict(load_spec(path, action="train")) == to_dict(spec)
    assert not caplog.records


def test_a_spec_can_be_loaded_again_with_other_overrides():
    spec = load_spec(None, ["model.arch=vit_base_patch16", "train.num_gpus=4"]).replaced({"model.num_classes": 7})
    again = load_spec(spec, ["model.arch=hiera_tiny_224", "train.num_gpus=2"])
    assert (again.model.mask_ratio, again.train.gpu_ids, again.model.num_classes) == (0.6, (0, 1), 7)
    assert again.is_set("model.arch")
    assert not again.is_set("model.num_classes")
    assert not again.is_set("model.mask_ratio")


def test_find_refusals_ignores_existing_problems():
    """Wherever these stand among the others."""
    spec = load_spec(None, ["model.arch=convnextv2_atto", "dataset.train_data_sources=photos"], "train")
    spec = spec.replaced({"train.optim.monitor_name": "val_loss"})
    assert find_refusals(spec, {}) == []
    (refusal,) = find_refusals(spec, {"model.patch_size": 8})
    assert refusal.startswith("model.patch_size: ")


@pytest.mark.parametrize("change", [str.upper, str.lower, str.title], ids=["upper", "lower", "title"])
def test_choices_in_any_case(change):
    found = 0
    for key, field in fields().items():
        for choice in choices(field):
            if choice and not choice.isdecimal():
                tree = change(choice)
                for name in reversed(key.split(".")):
                    tree = {name: tree}
                assert value_of(ExperimentSpec.model_validate(tree), key) == choice, key
                found += 1
    assert found > 40


def _nested(levels: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(levels):
        tree = {"a": tree}
    return tree


def _in_itself() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    tree["train"] = {"num_epochs": [tree]}
    return tree


def _wide() -> dict[str, Any]:
    item: list[Any] = []
    for _ in range(40):
        item = [item, item, item]
    return {"train": item}


@pytest.mark.parametrize("make", [lambda: _nested(5000), _in_itself, _wide], ids=["deep", "in itself", "wide"])
def test_a_mapping_that_is_nested_too_deeply(make):
    with pytest.raises(SpecError, match=r"The spec has more than 100,000 values, or is nested deeper than 50 levels\."):
        load_spec(make())


@pytest.mark.parametrize("text", ["${a:" * 900 + "a" + "}" * 900, "${" * 2000 + "a" + "}" * 2000])
def test_a_reference_that_is_nested_too_deeply(text):
    with pytest.raises(SpecError, match=r"results_dir.*cannot be resolved"):
        load_spec({"results_dir": text})


def test_a_key_that_is_not_text():
    for arguments in ((None, ["\ud800=1"]), ({"\ud800": 1}, [])):
        with pytest.raises(SpecError, match=r"\?.*: there is no such key"):
            load_spec(*arguments)


@pytest.mark.parametrize(("path", "reason"), [("a\0b", "embedded null"), ("x" * 5000, "File name too long")])
def test_an_impossible_path(path, reason):
    with pytest.raises(SpecError, match=f"cannot be read: {reason}"):
        load_spec(path)
