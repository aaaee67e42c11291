import logging
from textwrap import dedent

import pytest

from openmae.errors import SpecError
from openmae.spec.load import load_spec, to_dict, to_yaml

TRAIN = ["dataset.train_data_sources=photos"]
FINETUNE = [*TRAIN, "train.stage=finetune", "dataset.batch_size=8"]


def mistakes(source=None, overrides=(), action=None):
    with pytest.raises(SpecError) as caught:
        load_spec(source, overrides, action)
    return str(caught.value)


def notices(caplog, overrides, action="train"):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="openmae"):
        load_spec(None, overrides, action)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.arhc=vit", "model.arhc (override): there is no such key. Did you mean model.arch?"),
        ("train.lr=1", "there is no such key. Did you mean train.optim.lr?"),
        ("train.optim.warmup=1", "Did you mean train.optim.warmup_steps or train.optim.warmup_epochs?"),
        ("trian.num_epochs=1", "trian (override): there is no such key. Did you mean train?"),
        ("model.arch=vit_bas", "no architecture is called 'vit_bas'. Use one of: vit_base_patch16"),
        ("train.stage=Finetun", "must be one of pretrain, finetune, got 'Finetun'. Did you mean finetune?"),
        ("model.in_chans=2", "model.in_chans (override): must be one of 1, 3, 4, got 2."),
        ("train.num_epochs=0", "train.num_epochs (override): must be an integer >= 1, got 0."),
        ("train.num_epochs=1.5", "must be an integer >= 1, got 1.5."),
        ("train.num_epochs=true", "must be an integer >= 1, got True."),
        ("train.optim.lr=5", "train.optim.lr (override): must be a number > 0 and <= 1, got 5."),
        ("train.optim.lr=.nan", "must be a number > 0 and <= 1, got nan."),
        ("train.optim.layer_decay=0", "must be a number > 0 and <= 1, got 0."),
        ("train.cudnn.benchmark=maybe", "must be true or false, got 'maybe'."),
        ("train.freeze=stem", "must be a list of texts, got 'stem'. Write [stem]."),
        ("wandb.name=1.10", 'must be text, got 1.1. Put it in quotes: "1.1".'),
        ("results_dir=[a]", "results_dir (override): must be text, got ['a']."),
        ("model.mask_ratio=1", "must be a number > 0 and < 1, got 1."),
        ("evaluate.batch_size=0", "must be -1 (automatic) or at least 1, got 0."),
        ("train.gpu_ids=[0,0]", "must name at least one GPU, each once, counted from 0, got [0, 0]."),
        ("train.optim.milestones=[9,3]", "must be epochs in ascending order, 1 or more, got [9, 3]."),
        ("dataset.augmentation.std=[0,1,1]", "must contain numbers > 0, got [0, 1, 1]."),
        ("dataset.augmentation.input_size=a", "must be a number of pixels, or [height, width], got 'a'."),
        ("dataset.augmentation.input_size=[]", "must be a number of pixels, or [height, width], got []."),
        ("dataset.augmentation.cutmix_minmax=[.8,.2]", "must be [min, max] with 0 <= min <= max <= 1"),
        (
            "dataset.augmentation.auto_aug=strong",
            "must be a timm policy such as rand-m9",
        ),
        (
            "dataset.augmentation.mean=[1,2]",
            "must have a number for each of the 3 channels of model.in_chans",
        ),
        ("dataset.augmentation.min_ratio=2", "must not be above max_ratio (1.33), got 2."),
        ("model.patch_size=8", "only ViT has a patch size to choose, and convnextv2_base is not a ViT, got 8."),
        ("train.gpu_ids=[0,1] train.num_gpus=3", "names 2 GPUs, [0, 1], but train.num_gpus is 3."),
        (
            "train.optim.lr=.1 train.optim.base_lr=.2",
            "lr (0.1) and base_lr (0.2) both set the learning rate.",
        ),
        (
            "train.distributed_strategy=fsdp train.stage=finetune train.ema_decay=.9 dataset.batch_size=2",
            "must be 0 with fsdp, which cannot average sharded weights, got 0.9. Set it to 0, or use train.distri",
        ),
        ("train.optim.monitor_name=val_loss", "val_loss needs validation images"),
        (
            "train.optim.monitor_name=ACC_all",
            "ACC_all is measured when fine-tuning, on dataset.val_data_sources. Use train_loss.",
        ),
        (
            "train.optim.monitor_name=ACC_all dataset.val_data_sources=photos",
            "ACC_all is measured when fine-tuning, on dataset.val_data_sources. Use train_loss, val_loss or probe_acc.",
        ),
        (
            "train.optim.monitor_name=probe_acc dataset.val_data_sources=x train.stage=finetune dataset.batch_size=2",
            "probe_acc is measured when pretraining, on dataset.val_data_sources. Use train_loss, val_loss or ACC_all.",
        ),
        (
            "train.optim.monitor_name=probe_acc",
            "probe_acc needs validation images with classes, but dataset.val_data_sources is not set. Set it, or use "
            "train_loss.",
        ),
        (
            "dataset.augmentation.input_size=225",
            "must be a multiple of 32, the side of convnextv2_base's mask "
            "units, got 225x225. The nearest sizes: 225 -> 224 or 256.",
        ),
        ("dataset.augmentation.input_size=[16,224]", "got 16x224. The nearest sizes: 16 -> 32."),
        (
            "model.arch=vit_huge_patch14 dataset.augmentation.input_size=[225,230]",
            "must be a multiple of 14, the side of vit_huge_patch14's patches, got 225x230. "
            "The nearest sizes: 225 -> 224 or 238, 230 -> 224 or 238.",
        ),
        (
            "model.mask_ratio=.99",
            "must leave some mask units visible and some masked, but 0.99 leaves 0 of 49 "
            "visible (224x224 pixels, 32 pixels a unit). Use a ratio from 0.0204 to 0.98, or a larger image.",
        ),
        ("dataset.augmentation.input_size=32", "leaves 0 of 1 visible"),
        (
            "train.mask_ratio=.5 model.mask_ratio=.6",
            "means the same as model.mask_ratio, but is 0.5 while that",
        ),
        (
            "encryption_key='***'",
            "encryption_key (override): *** stands for a key that was not recorded. Set encryption_key to env:NAME, ",
        ),
        (
            "results_dir=https://host/x",
            "results_dir (override): cannot be written to a web server. Give s3://BUCKET/path, gs://BUCKET/path or a",
        ),
        ("export.onnx_file=http://host/m.onnx", "export.onnx_file (override): cannot be written to a web server"),
        (
            "gen_trt_engine.timing_cache=s3://b/cache",
            "must be a local file, since it is read and written during the build. Give a path.",
        ),
        (
            "gen_trt_engine.tensorrt.min_batch_size=4",
            "min_batch_size <= opt_batch_size <= max_batch_size must",
        ),
        (
            "gen_trt_engine.batch_size=8 gen_trt_engine.tensorrt.max_batch_size=4",
            "gen_trt_engine.batch_size (override): 8 images per batch are not within "
            "gen_trt_engine.tensorrt.min_batch_size and max_batch_size, 1 and 4. Use -1 for all batches",
        ),
        ("gen_trt_engine.batch_size=1 gen_trt_engine.tensorrt.min_batch_size=2", "1 images per batch are not within"),
        (
            "gen_trt_engine.tensorrt.layers_precision=[head:fp16]",
            "each entry must be name:fp32, for nodes that stay in fp32, got 'head:fp16'. Example: *norm*:fp32,",
        ),
        ("gen_trt_engine.tensorrt.layers_precision=[head]", "each entry must be name:fp32"),
    ],
)
def test_each_mistake_by_its_text(override, message):
    text = mistakes({"train": {"recipe": "tao"}}, override.split(" "))
    assert message in text
    assert " a mistake:" in text


@pytest.mark.parametrize(
    "override",
    [
        *(
            "encryption_key=[hunter2]",
            "encryption_key=*hunter2",
            "encryption_key={a: hunter2}",
            "encryption_key:hunter2",
        ),
        *("encryption_key=${hunter2", "encryption_key=${hunter2}", "encryption_key=!hunter2 x"),
    ],
)
def test_a_secret_is_not_repeated(override):
    text = mistakes(None, [override])
    assert "encryption_key" in text
    assert "cannot be read; its value is not shown. Write env:NAME or file:PATH." in text
    assert "hunter2" not in text
    text = mistakes({"encryption_key": "hunter2"}, ["encryption_key.a=hunter3"])
    assert "hunter" not in text


@pytest.mark.parametrize("line", ["encryption_key: *hunter2", "encryption_key: !hunter2 x", "encryption_key: 'hunter2"])
def test_a_secret_in_invalid_yaml_is_not_repeated(tmp_path, line):
    (tmp_path / "spec.yaml").write_text(f"results_dir: a\n{line}\n")
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "spec.yaml")
    assert "hunter2" not in str(caught.value)
    assert "is not valid YAML: line " in caught.value.problem


def test_a_secret_is_not_shown():
    spec = load_spec({"encryption_key": "hunter2"})
    assert "hunter2" not in f"{spec!r} {spec} {to_yaml(spec)}"
    assert to_dict(spec)["encryption_key"] == "***"
    assert to_dict(load_spec({"encryption_key": "env:A"}))["encryption_key"] == "env:A"
    assert load_spec(spec).encryption_key == "hunter2", "the spec itself keeps it"


def test_mixup_needs_an_even_batch():
    for size, next_size in ((1, 2), (7, 8)):
        text = mistakes(None, [*FINETUNE, f"dataset.batch_size={size}", "dataset.augmentation.mixup=0.8"], "train")
        assert f"mix the images of a batch in pairs, so it must be even, got {size}. Use {next_size}, or" in text
    text = mistakes(None, [*TRAIN, "train.stage=finetune", "train.recipe=tao"], "train")
    assert "it is not set, and the default is 1. Set dataset.batch_size, for example to 16, or turn both off" in text
    off = ["dataset.augmentation.mixup=0", "dataset.augmentation.cutmix=0"]
    load_spec(None, [*FINETUNE, "dataset.batch_size=7", *off], "train")
    load_spec(None, [*FINETUNE, "dataset.batch_size=7", "dataset.augmentation.mixup_prob=0"], "train")
    load_spec(None, [*TRAIN, "dataset.batch_size=7"], "train")


def test_all_mistakes_are_reported_by_line(tmp_path):
    text = dedent("""\
        model: {arch: vit_base_patch16, patch: 8}
        train:
          num_epochs: -1
          optim: {lr: high}
        wandb.name: x
        """)
    path = tmp_path / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    lines = mistakes(path, ["train.seed=-7"], "train").split("\n")
    assert lines[0] == f"{path} and the overrides have 6 mistakes:"
    assert lines[1] == "  model.patch (line 1): there is no such key. Did you mean model.patch_size or model.arch?"
    assert lines[2] == "  train.num_epochs (line 3): must be an integer >= 1, got -1."
    assert lines[3] == "  train.optim.lr (line 4): must be a number > 0 and <= 1, got 'high'."
    assert lines[4].startswith("  wandb.name (line 5): a file has sections, not dotted keys. Write name: below")
    assert lines[5].startswith("  train.seed (override): must be an integer >= -1, got -7.")
    assert lines[6].startswith("  dataset.train_data_sources: `mae train` needs it, but it is not set.")


def test_mistakes_are_attributed_to_the_file_or_the_overrides(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("dataset: {train_data_sources: photos}\n", encoding="utf-8")
    wrong = ["train.num_epochs=0", "train.seed", "~train.seed", "model.arch={", "dataset.train_data_sources.x=3"]
    assert mistakes(path, wrong, "train").startswith("The overrides have 5 mistakes:")
    assert mistakes(path, wrong[:1], "train").startswith("The overrides have a mistake:")
    assert mistakes(None, wrong[:1]).startswith("The spec has a mistake:")
    path.write_text("train: {num_epochs: 0}\n", encoding="utf-8")
    assert mistakes(path, ["train.seed=1"]).startswith(f"{path} has a mistake:")
    assert mistakes(path, wrong[:1], "train").startswith(f"{path} and the overrides have 2 mistakes:")


@pytest.mark.parametrize(
    ("action", "keys"),
    [
        ("train", ["dataset.train_data_sources"]),
        ("evaluate", ["evaluate.checkpoint", "dataset.val_data_sources"]),
        ("inference", ["inference.checkpoint", "dataset.test_data_sources"]),
        ("export", ["export.checkpoint", "export.onnx_file"]),
        ("gen_trt_engine", ["gen_trt_engine.onnx_file", "gen_trt_engine.trt_engine"]),
    ],
)
def test_required_keys(action, keys):
    text = mistakes({action: {"results_dir": "???"}}, (), action)
    for key in keys:
        assert f"{key}: `mae {action}` needs it" in text
    load_spec(None, [f"{key}=file" for key in keys], action)
    load_spec(None)


def test_a_checkpoint_or_an_engine_but_not_both():
    overrides = ["dataset.val_data_sources=photos", "evaluate.trt_engine=model.engine"]
    load_spec(None, overrides, "evaluate")
    text = mistakes(None, [*overrides, "evaluate.checkpoint=model.pth"], "evaluate")
    assert "only one of evaluate.checkpoint and evaluate.trt_engine can be used" in text


def test_an_engine_for_one_batch_needs_no_range():
    given = ["gen_trt_engine.onnx_file=m.onnx", "gen_trt_engine.trt_engine=m.engine", "gen_trt_engine.batch_size=8"]
    load_spec(None, given, "gen_trt_engine")
    within = [f"gen_trt_engine.tensorrt.{name}_batch_size={size}" for name, size in (("min", 2), ("max", 8))]
    load_spec(None, [*given, *within], "gen_trt_engine")


def test_remote_inputs_and_outputs():
    given = ["dataset.train_data_sources=https://host/set.zip", "train.pretrained_model_path=https://x/y.pth"]
    assert (
        load_spec(None, [*given, "results_dir=s3://bucket/x"], "train").results_folder("train") == "s3://bucket/x/train"
    )
    given = ["export.checkpoint=gs://b/m.pth", "export.onnx_file=s3://b/m.onnx", "gen_trt_engine.timing_cache=s3://b/c"]
    load_spec(None, given, "export")


def test_problems_of_other_actions_are_ignored():
    overrides = ["dataset.val_data_sources=photos", "evaluate.checkpoint=m.pth", "train.stage=finetune"]
    overrides += ["dataset.train_data_sources=s3://b/x", "train.distributed_strategy=fsdp", "train.ema_decay=.9"]
    load_spec(None, overrides, "evaluate")


@pytest.mark.parametrize(("action", "spoken_of"), [("evaluate", True), ("inference", True), ("train", False)])
def test_decoder_targets_has_no_effect_outside_training(caplog, action, spoken_of):
    given = [f"dataset.{name}_data_sources=photos" for name in ("train", "val", "test")]
    given += ["evaluate.checkpoint=m.pth", "inference.checkpoint=m.pth"]
    said = f"model.decoder_targets has no effect on `mae {action}`: only a training step predicts a share of the units."
    assert (said in notices(caplog, [*given, "model.decoder_targets=0.5"], action)) == spoken_of
    assert not notices(caplog, given, action)


def test_geometry_of_a_trained_model():
    overrides = ["dataset.val_data_sources=photos", "evaluate.checkpoint=m.pth"]
    overrides += ["dataset.augmentation.input_size=72"]
    load_spec(None, overrides, "evaluate")
    load_spec(None, [*overrides, "model.arch=vit_tiny_patch16"], "evaluate")
    text = mistakes(None, [*overrides, "model.arch=vit_tiny_patch16", "model.patch_size=16"], "evaluate")
    assert "must be a multiple of 16" in text


def test_small_images_and_patches():
    spec = load_spec(
        None,
        [
            *TRAIN,
            "model.arch=vit_tiny_patch16",
            "model.patch_size=8",
            "dataset.augmentation.input_size=[32,48]",
        ],
        "train",
    )
    assert spec.model.mask_unit == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.augmentation.max_scale=2"], "max_scale 2 is used as 1"),
        (
            ["train.optim.layer_decay=.7", "dataset.augmentation.mixup=.8"],
            "dataset.augmentation.mixup and train.optim.layer_decay have no effect in the pretrain stage.",
        ),
        (["model.global_pool=false"], "model.global_pool has no effect in the pretrain stage."),
        (
            ["dataset.augmentation.interpolation=bilinear"],
            "dataset.augmentation.interpolation has no effect in the pretrain stage.",
        ),
        (
            ["train.stage=finetune", "model.mask_ratio=.5"],
            "model.mask_ratio has no effect in the finetune stage.",
        ),
        (
            ["train.optim.lr_scheduler=cosine", "train.optim.gamma=.5"],
            "train.optim.gamma has no effect without train.optim.lr_scheduler=MultiStep.",
        ),
        (["train.optim.milestones=[20]"], "[20] are all at or after the last of 10 epochs"),
        (
            ["train.optim.warmup_epochs=10"],
            "(10) is not below train.num_epochs (10): the learning rate only rises",
        ),
        (["train.cudnn.benchmark=true"], "picks kernels by timing"),
        (
            ["dataset.segment={num_classes: 3}"],
            "dataset.segment has no effect because it belongs to another task of TAO.",
        ),
        (["model_name=mae"], "model_name has no effect because the architecture is model.arch."),
        (["train.stage=finetune", "model.global_pool=false"], "convnextv2_base has no class token"),
    ],
)
def test_notices(caplog, overrides, message):
    found = notices(caplog, [*TRAIN, "dataset.batch_size=8", *overrides])
    assert len(found) == 1
    assert message in found[0]


def test_a_plain_spec_gives_no_notice(caplog):
    assert notices(caplog, TRAIN) == []
    assert notices(caplog, FINETUNE) == []
    assert load_spec(None, ["dataset.augmentation.max_scale=2"]).dataset.augmentation.max_scale == 1


def test_cross_attention_needs_a_decoder_with_attention() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(None, ["model.arch=convnextv2_atto", "model.decoder_attention=cross"])
    assert str(caught.value).endswith(
        "model.decoder_attention (override): cross needs a decoder with attention, but the decoder of "
        "convnextv2_atto is convolutional, got cross. Remove it, or choose a vit_ or hiera_ architecture."
    )
    for arch in ("vit_tiny_patch16", "hiera_tiny_224"):
        load_spec(None, [f"model.arch={arch}", "model.decoder_attention=cross"])
    said = ["inference.checkpoint=a.pth", "dataset.test_data_sources=x", "model.decoder_attention=cross"]
    load_spec(None, said, action="inference")  # the checkpoint says of which architecture


@pytest.mark.parametrize("value", [0, -0.5, 1.5])
def test_bounds_of_decoder_targets(value: float) -> None:
    with pytest.raises(SpecError, match=r"model\.decoder_targets .*must be a number > 0 and <= 1, got"):
        load_spec(None, [f"model.decoder_targets={value}"])


def test_width_of_a_transformer_decoder() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(None, ["model.arch=vit_tiny_patch16", "model.decoder_embed_dim=100"])
    assert "model.decoder_embed_dim" in str(caught.value)
    assert "must be a multiple of 32, the width of an attention head, got 100. Use 96." in str(caught.value)
    load_spec(None, ["model.arch=convnextv2_atto", "model.decoder_embed_dim=100"])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["dataset.augmentation.cutmix_minmax=[0.2, 0.8]", "dataset.augmentation.cutmix=1.0"],
            "cutmix has no effect with these",
        ),
        (
            ["dataset.augmentation.mixup=0", "dataset.augmentation.mixup_switch_prob=0.3"],
            "mixup_switch_prob has no effect",
        ),
        (
            [
                "dataset.augmentation.mixup=0",
                "dataset.augmentation.cutmix=0",
                "dataset.augmentation.mixup_mode=elem",
            ],
            "mixup_mode has no effect with",
        ),
        (["train.allow_partial_weights=true"], "has no effect without train.pretrained_model_path."),
        (["train.validation_interval=2"], "has no effect without dataset.val_data_sources."),
    ],
)
def test_options_without_effect(overrides: list[str], text: str, caplog: pytest.LogCaptureFixture) -> None:
    load_spec(None, ["train.stage=finetune", "dataset.batch_size=2", *overrides])
    assert text in caplog.text
