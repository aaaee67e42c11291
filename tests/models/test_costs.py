"""The table of costs is what the models have: parameters, operations and memory are counted without computing them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import count_visible, mask_from_noise
from openmae.spec.architectures import ARCHITECTURES
from openmae.spec.costs import BATCH, COSTS, CPU_GFLOP, Cost

SMALL = ("convnextv2_atto", "hiera_tiny_224", "vit_tiny_patch16")
ARCHS = [name if name in SMALL else pytest.param(name, marks=pytest.mark.integration) for name in ARCHITECTURES]


class FusedAttention(torch.autograd.Function):
    """A stand-in for a GPU's fused kernel, which keeps no attention matrix; the meta device has only the plain one."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1]))
        return out


def loss_of(model: MaskedAutoencoder, mask_ratio: float, images: int) -> Tensor:
    mask = mask_from_noise(torch.rand(images, model.num_units), count_visible(model.num_units, mask_ratio))
    return model(torch.zeros(images, 3, 224, 224), mask).loss


def kept_bytes(model: MaskedAutoencoder, mask_ratio: float, images: int) -> int:
    """Return the bytes of all tensors that a forward pass keeps, except parameters and buffers."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, mask_ratio, images)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def count(arch: str, monkeypatch: pytest.MonkeyPatch) -> Cost:
    row = ARCHITECTURES[arch]
    config = ModelConfig(
        arch,
        mask_ratio=row.mask_ratio,
        decoder_depth=row.decoder_depth,
        decoder_embed_dim=row.decoder_embed_dim,
    )
    with torch.device("meta"):
        backbone, model = build_classifier(config).eval(), build_autoencoder(config)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
            backbone(torch.zeros(1, 3, 224, 224))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as masked:
            loss_of(model, row.mask_ratio, 1)
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: FusedAttention.apply(q, k, v))
            one, two = (kept_bytes(model, row.mask_ratio, images) for images in (1, 2))
    return Cost(
        sum(parameter.numel() for parameter in backbone.parameters()) / 1e6,
        forward.get_total_flops() / 1e9,
        3 * masked.get_total_flops() / 1e9,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        (two - one) / 2**20,  # what does not depend on the images cancels
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_the_table_is_what_the_model_has(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, listed = count(arch, monkeypatch), COSTS[arch]
    assert abs(found.image_mib - listed.image_mib) <= 0.5, found
    for name in ("parameters_m", "forward_gflop", "step_gflop", "trained_m"):
        assert abs(getattr(found, name) - getattr(listed, name)) <= 0.051, (name, found)


def test_every_architecture_has_costs() -> None:
    assert list(COSTS) == list(ARCHITECTURES)


def test_the_machine_follows_from_operations_and_memory() -> None:
    cpu, gpu = Cost(1, 1, CPU_GFLOP, 10, 100), Cost(1, 1, CPU_GFLOP + 0.1, 10, 100)
    assert (cpu.machine, gpu.machine) == ("CPU", "GPU, 8 GB")
    assert gpu.state_gib == pytest.approx(0.149, abs=0.001)
    full = Cost(1, 1, 50, 0, 0.9 * 8 * 1024 / BATCH)
    above = Cost(1, 1, 50, 0, 0.9 * 8 * 1024 / BATCH + 0.1)
    assert (full.machine, above.machine) == ("GPU, 8 GB", "GPU, 12 GB")
