"""Specs that NVIDIA publishes for its MAE task load as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from openmae.cli.main import main

PUBLISHED = Path(__file__).parent / "published"
CASES = (
    ("pretrain.yaml", "train", ()),
    ("finetune.yaml", "train", ()),
    ("finetune.yaml", "evaluate", ("evaluate.checkpoint=/models/model.pth",)),
    ("finetune.yaml", "inference", ("inference.checkpoint=/models/model.pth",)),
    ("export.yaml", "export", ()),
    ("gen_trt_engine.yaml", "gen_trt_engine", ()),
    ("gen_trt_engine_docs.yaml", "gen_trt_engine", ()),
)


def test_every_file_is_tried():
    tried = {case[0] for case in CASES}
    assert tried == {path.name for path in PUBLISHED.iterdir()}


@pytest.mark.parametrize(("name", "action", "overrides"), CASES)
def test_published_specs_resolve_to_their_values(name, action, overrides, capsys):
    code = main(["spec", "check", "-e", str(PUBLISHED / name), "--action", action, *overrides])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    resolved = yaml.safe_load(printed.out)
    given = yaml.safe_load((PUBLISHED / name).read_text())
    for section, values in given.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, str | int | float) and not str(value).startswith(("$", "???")):
                found = resolved[section].get(key)
                assert found == value, f"{section}.{key} is {value} in the published spec and became {found}"
    if action in ("export", "gen_trt_engine") and "export" in given:
        assert resolved["export"]["checkpoint"] == "/models/model.pt"
        assert resolved["export"]["onnx_file"] == "/results/mae/export/model.onnx"
    if "docs" not in name and action == "gen_trt_engine":
        assert resolved["gen_trt_engine"]["onnx_file"] == "/results/mae/export/model.onnx"
        assert resolved["gen_trt_engine"]["trt_engine"] == "/results/mae/gen_trt_engine/model.engine"


def test_a_missing_value_of_an_example_is_reported(capsys):
    assert main(["spec", "check", "-e", str(PUBLISHED / "finetune.yaml"), "--action", "evaluate"]) == 2
    assert "evaluate.checkpoint (line 19): `mae evaluate` needs it" in capsys.readouterr().err
