"""The metadata of a deployed model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from openmae.engines.metadata import ModelCard, file_sha256
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig

CARD = ModelCard(
    "finetune",
    ModelConfig("vit_tiny_patch16", (32, 48), 1, patch_size=8, num_classes=2),
    mean=(0.5,),
    std=(0.25,),
    class_names=("süß", 'a "quoted" name'),
    interpolation="bicubic",
    preprocessing=True,
    batch_size=4,
    precision="int8",
    checkpoint_sha256="ab",
)


def test_metadata_round_trip():
    assert ModelCard.from_metadata(CARD.to_metadata()) == CARD
    assert ModelCard.from_dict(json.loads(json.dumps(CARD.to_dict()))) == CARD


def test_metadata_is_readable_without_openmae():
    metadata = CARD.to_metadata()
    assert {"arch", "class_names", "mean", "std", "model", "checkpoint_sha256", "interpolation"} <= metadata.keys()
    assert json.loads(metadata["arch"]) == "vit_tiny_patch16"
    assert json.loads(metadata["class_names"]) == ["süß", 'a "quoted" name']
    assert json.loads(metadata["model"])["input_size"] == [32, 48]


def test_other_metadata_is_ignored():
    assert ModelCard.from_metadata({**CARD.to_metadata(), "author": '"me"', "note": "no JSON"}) == CARD
    assert ModelCard.from_metadata({"author": "me"}) is None
    assert ModelCard.from_metadata({}) is None


def test_the_outputs_follow_from_the_stage():
    assert CARD.outputs == ("logits",)
    assert replace(CARD, stage="pretrain").outputs == ("features", "tokens")
    assert CARD.info.class_names == CARD.class_names
    assert CARD.info.spec["dataset"]["augmentation"]["interpolation"] == "bicubic"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 2, "version": "9.0"}, "metadata has format 2 (OpenMAE 9.0)"),
        ({"mean": 3}, "metadata (of OpenMAE 0.1.0) is damaged"),
        ({"model": {}}, "is damaged or of another version: model.arch is missing."),
        ({"surplus": 1}, "is damaged or of another version: surplus is unknown."),
        ({"model": [1]}, "is damaged or of another version: model is [1]."),
        ({"model": {**CARD.model.to_dict(), "arch": "vit_old"}}, "'vit_old'"),
        ({"precision": "fp8"}, "precision is 'fp8'."),
        ({"model": {**CARD.model.to_dict(), "num_classes": 10**30}}, "model.num_classes is 10000"),
    ],
)
def test_a_damaged_card_is_an_error(change, text):
    with pytest.raises(CheckpointError) as error:
        ModelCard.from_dict(CARD.to_dict() | change)
    assert text in str(error.value)
    assert "Export the model again with mae export" in str(error.value)


def test_metadata_that_is_not_json_is_an_error():
    with pytest.raises(CheckpointError, match="metadata is damaged: Expecting"):
        ModelCard.from_metadata({**CARD.to_metadata(), "mean": "[0.5"})


def test_deeply_nested_metadata_is_an_error():
    with pytest.raises(CheckpointError, match="metadata is damaged"):
        ModelCard.from_metadata({**CARD.to_metadata(), "mean": "[" * 100_000})
    with pytest.raises(CheckpointError, match="metadata is not a mapping"):
        ModelCard.from_dict([1])


def test_file_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
