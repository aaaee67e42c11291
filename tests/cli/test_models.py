"""``mae models``: the table of architectures."""

import json

import pytest

from openmae.cli.main import main
from openmae.spec.architectures import ARCHITECTURES
from openmae.spec.costs import COSTS


def test_the_table_has_a_row_per_architecture(capsys):
    assert main(["models"]) == 0
    table, notes = capsys.readouterr().out.split("\n\n")
    rows = {line.split()[0]: line.split(maxsplit=8) for line in table.splitlines()[2:]}
    assert list(rows) == list(ARCHITECTURES)
    assert rows["vit_base_patch16"][1:8] == ["vit", "85.8", "35.1", "57.4", "16", "1.7", "79"]
    assert rows["vit_base_patch16"][8].strip() == "GPU, 8 GB"
    assert max(map(len, table.splitlines())) <= 120
    for title in ("parameters", "forward", "step", "mask unit", "state", "image", "trains on"):
        assert f"\n{title} " in notes, "a column is not explained"


@pytest.mark.parametrize("name", ["convnextv2_atto", "hiera_huge_224"])
def test_json(name, capsys):
    assert main(["models", "--json"]) == 0
    row = {row["arch"]: row for row in json.loads(capsys.readouterr().out)}[name]
    cost = COSTS[name]
    assert row == {
        "arch": name,
        "family": ARCHITECTURES[name].family,
        "parameters_m": cost.parameters_m,
        "forward_gflop": cost.forward_gflop,
        "step_gflop": cost.step_gflop,
        "mask_unit_px": 32,
        "state_gib": round(cost.state_gib, 2),
        "image_mib": cost.image_mib,
        "machine": cost.machine,
    }
