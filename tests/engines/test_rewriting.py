"""The copy of a model that is traced for export: it has the same outputs, and the model itself is not changed."""

from __future__ import annotations

import pytest
import torch

from openmae.engines.module import example_input
from openmae.engines.rewriting import rewritten


@pytest.mark.parametrize("arch", ["vit_tiny_patch16", "convnextv2_atto", "hiera_tiny_224"])
@pytest.mark.parametrize("opset", [17, 20])
def test_outputs_do_not_change(deployed, arch, opset):
    model, card = deployed(arch, "finetune")
    images = example_input(card, 2)
    before = [type(module) for module in model.modules()]
    fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    copy = rewritten(model, opset)
    with torch.no_grad():
        expected, found = model(images)[0], copy(images)[0]
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert [type(module) for module in model.modules()] == before, "the model itself was changed"
    assert [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")] == fused
    gelus = [module for module in copy.modules() if type(module).__name__ == "_GELU"]
    blocks = [name for name, _ in model.named_modules() if name.endswith(".mlp.act")]
    assert len(gelus) == (len(blocks) if opset == 17 else 0), "a GELU was overlooked"


def test_the_parameters_are_shared(deployed):
    model, _ = deployed("convnextv2_atto", "pretrain")
    copy = rewritten(model, 17)
    blocks = [block for stage in model.backbone.stages for block in stage.blocks]
    assert {parameter.data_ptr() for parameter in copy.parameters()} == {
        parameter.data_ptr() for parameter in model.parameters()
    }
    assert sum(type(module).__name__ == "_GlobalResponseNorm" for module in copy.modules()) == len(blocks)
