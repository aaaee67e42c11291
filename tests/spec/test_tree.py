"""Nested sections and dotted keys."""

from types import SimpleNamespace

import pytest

from openmae.spec.tree import NotASectionError, flatten, get, has, merge, nest, put, remove, value_of

NESTED = {"model": {"arch": "vit"}, "train": {"optim": {"lr": 1, "lrs": [1, 2]}, "freeze": None}}
DOTTED = {"model.arch": "vit", "train.optim.lr": 1, "train.optim.lrs": [1, 2], "train.freeze": None}


def test_the_two_forms_convert_into_each_other() -> None:
    assert flatten(NESTED) == DOTTED
    assert nest(DOTTED) == NESTED
    assert flatten({"a": {}, "b": {"c": {}}}) == {}


def test_get_and_has() -> None:
    assert get(NESTED, "train.optim.lr") == 1
    assert get(NESTED, "train.optim.lr.x", "none") == "none"
    assert get({"a": {"b.c": 3}}, ("a", "b.c")) == 3
    assert has(NESTED, "train.freeze")
    assert not has(NESTED, "model.freeze")
    assert value_of(SimpleNamespace(a=SimpleNamespace(b=1)), "a.b") == 1


def test_put_and_remove() -> None:
    tree: dict = {"model": 5}
    with pytest.raises(NotASectionError, match=r"^model is 5 and not a section$"):
        put(tree, "model.arch", "vit")
    put(tree, "train.optim.lr", 1)
    remove(tree, "train.optim.lr")
    remove(tree, "train.optim.lr")
    remove(tree, "model")
    assert tree == {"train": {"optim": {}}}


def test_merge_copies_and_keeps_sections() -> None:
    target, source = {"a": {"b": 1, "c": [1]}, "d": {"e": 1}}, {"a": {"c": [2]}, "d": None}
    merge(target, source)
    assert target == {"a": {"b": 1, "c": [2]}, "d": {"e": 1}}
    target["a"]["c"].append(3)
    assert source["a"] == {"c": [2]}
