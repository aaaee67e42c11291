"""``train.compile``: the same names, the same checkpoints, whether it is on or off."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from openmae.errors import RunError
from openmae.training import compiling

CROSS = {"train.num_epochs": 1, "model.decoder_attention": "cross", "model.decoder_targets": 0.5}
FINETUNE = {
    "train.stage": "finetune",
    "model.decoder_depth": None,
    "model.decoder_embed_dim": None,
    "train.ema_decay": 0.9,
    "train.num_epochs": 1,
}
NOTICE = "train.compile is meant for GPUs"


@pytest.fixture
def backend(monkeypatch):
    """``backend(x)``: torch.compile with another backend; inductor takes minutes here, and is tested once, slowly."""
    torch._dynamo.reset()
    return lambda x: monkeypatch.setattr(compiling.torch, "compile", partial(torch.compile, backend=x))


@pytest.mark.parametrize("changes", [{"train.num_epochs": 1}, CROSS, FINETUNE], ids=["pretrain", "cross", "finetune"])
def test_a_compiled_run_is_the_run(changes, backend, train, payload_of, assert_same_run, caplog, tmp_path):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    train(tmp_path / "plain", changes)
    backend(count)
    with caplog.at_level(logging.WARNING, "openmae"):
        train(tmp_path / "compiled", {**changes, "train.compile": True})
    assert graphs, "nothing was compiled"
    assert sum(NOTICE in text for text in caplog.messages) == 1
    assert not any("_orig_mod" in name for name in payload_of(tmp_path / "compiled")["state_dict"])
    assert_same_run(tmp_path / "plain", tmp_path / "compiled")  # these graphs run the same operations


def test_a_run_goes_on_with_compilation_on_and_off(backend, train, assert_same_run, caplog, tmp_path):
    changes = {**FINETUNE, "train.num_epochs": 3}
    train(tmp_path / "plain", changes)
    backend("eager")
    with caplog.at_level(logging.WARNING, "openmae"):
        for last, on in ((1, True), (2, False), (3, True)):
            train(tmp_path / "mixed", {**changes, "train.compile": on, "train.stop_after_epoch": last})
    assert not any("other settings" in text for text in caplog.messages)
    assert_same_run(tmp_path / "plain", tmp_path / "mixed")


def test_a_model_that_cannot_be_compiled_is_told(backend, train, tmp_path):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    backend(broken)
    with pytest.raises(RunError) as caught:
        train(tmp_path, {"train.num_epochs": 1, "train.compile": True})
    assert "torch.compile could not compile the model" in caught.value.problem
    assert "no compiler here" in caught.value.problem
    assert "train.compile=false" in caught.value.fix


@pytest.mark.slow  # inductor compiles C++ for two minutes
@pytest.mark.parametrize("changes", [{"train.num_epochs": 1}, FINETUNE], ids=["pretrain", "finetune"])
def test_what_inductor_compiles_learns_the_same(changes, train, payload_of, tmp_path):
    torch._dynamo.reset()
    for on in (False, True):
        train(tmp_path / f"{on}", {**changes, "train.compile": on, "model.drop_path_rate": 0})
    plain, compiled = (payload_of(tmp_path / name)["state_dict"] for name in ("False", "True"))
    assert plain.keys() == compiled.keys()
    torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-3)  # AdamW shows rounding of small gradients in full
