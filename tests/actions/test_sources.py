"""From the keys of a spec to indexed images."""

from __future__ import annotations

import pytest

from openmae.actions.sources import class_count, open_images
from openmae.errors import DataError, SpecError
from openmae.spec.load import load_spec


def test_errors_name_the_key(tmp_path):
    with pytest.raises(DataError) as caught:
        open_images(str(tmp_path / "none"), "dataset.val_data_sources", labelled=None)
    assert caught.value.problem.startswith("dataset.val_data_sources: There is no file or folder")
    assert caught.value.fix


def test_labelled(photos):
    assert open_images(str(photos.train), "k", labelled=True).class_names == ("blue", "green", "red")
    assert open_images(str(photos.train), "k", labelled=None).class_names == ("blue", "green", "red")
    assert open_images(str(photos.train), "k", labelled=False).labels is None
    assert open_images(str(photos.plain), "k", labelled=None).labels is None


def test_the_number_of_classes_comes_from_the_data(photos, caplog):
    index = open_images(str(photos.train), "k", labelled=True)
    with caplog.at_level("INFO", logger="openmae"):
        assert class_count(load_spec(None), index) == 3
    assert "model.num_classes=3, from the data: blue, green, red" in caplog.text
    assert class_count(load_spec(None, ["model.num_classes=3"]), index) == 3
    with pytest.raises(SpecError, match=r"model.num_classes is 4, but the data has 3 classes"):
        class_count(load_spec(None, ["model.num_classes=4"]), index)
    with pytest.raises(DataError, match=r"two classes or more, but .* has one: red"):
        class_count(load_spec(None), open_images(str(photos.one_class), "k", labelled=True))
