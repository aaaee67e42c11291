import pytest

from openmae.errors import SpecError
from openmae.spec.architectures import ARCHITECTURES, get_architecture


def test_there_are_nineteen_architectures():
    assert len(ARCHITECTURES) == 19
    families = [row.family for row in ARCHITECTURES.values()]
    assert {family: families.count(family) for family in families} == {"convnextv2": 8, "hiera": 6, "vit": 5}
    assert all(name == row.name for name, row in ARCHITECTURES.items())


def test_mask_ratios_and_decoders_are_those_of_the_papers():
    for row in ARCHITECTURES.values():
        assert row.mask_ratio == (0.75 if row.family == "vit" else 0.6)
        assert (row.decoder_depth, row.decoder_embed_dim) == (1 if row.family == "convnextv2" else 8, 512)
        assert row.mask_unit == {"vit_huge_patch14": 14}.get(row.name, 16 if row.family == "vit" else 32)


def test_unknown_architecture_lists_similar_names():
    with pytest.raises(SpecError, match=r"no architecture is called 'vit_bse_patch16'.\n  Fix: .*vit_base_patch16"):
        get_architecture("vit_bse_patch16")
