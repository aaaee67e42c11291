"""From the keys of a spec to indexed images."""

from __future__ import annotations

import pytest

from openmae.actions.sources import class_count, open_images
from openmae.errors import DataError, SpecError
from openmae.spec.load import load_spec


def images(folder, labelled):
    return open_images(
        load_spec(None, [f"dataset.val_data_sources={folder}"]), "dataset.val_data_sources", labelled=labelled
    )


def test_errors_name_the_key(tmp_path):
    with pytest.raises(DataError) as caught:
        images(tmp_path / "none", None)
    assert caught.value.problem.startswith("dataset.val_data_sources: There is no file or folder")
    assert caught.value.fix


def test_labelled(photos):
    assert images(photos.train, True).class_names == ("blue", "green", "red")
    assert images(photos.train, None).class_names == ("blue", "green", "red")
    assert images(photos.train, False).labels is None
    assert images(photos.plain, None).labels is None


def test_the_number_of_classes_comes_from_the_data(photos, caplog):
    index = images(photos.train, True)
    with caplog.at_level("INFO", logger="openmae"):
        assert class_count(load_spec(None), index) == 3
    assert "model.num_classes=3, from the data: blue, green, red" in caplog.text
    assert class_count(load_spec(None, ["model.num_classes=3"]), index) == 3
    with pytest.raises(SpecError, match=r"model.num_classes is 4, but the data has 3 classes"):
        class_count(load_spec(None, ["model.num_classes=4"]), index)
    with pytest.raises(DataError, match=r"two classes or more, but .* has one: red"):
        class_count(load_spec(None), images(photos.one_class, True))
