"""The form of attention that is used, and that both forms compute the same."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmae.engines.rewriting import rewritten
from openmae.models import attention
from openmae.models.attention import attend, use_fastest_attention
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.masking import random_mask

VIT = ModelConfig("vit_tiny_patch16", (32, 32), patch_size=8, num_classes=3)
HIERA = ModelConfig("hiera_tiny_224", (64, 64), num_classes=3)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of keys with which torch's fused function is called."""
    shapes: list[tuple[int, ...]] = []
    original = F.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        shapes.append(tuple(key.shape))
        return original(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return shapes


@pytest.mark.parametrize("config", [VIT, HIERA], ids=lambda config: config.arch)
def test_bf16_on_a_cpu_is_not_fused(config: ModelConfig, fused_calls: list) -> None:
    model = build_classifier(config).eval()
    images = torch.randn(2, 3, *config.input_size)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert not fused_calls, "the slow form was used"
    with torch.no_grad():
        model(images)
    assert fused_calls, "in fp32 the fused form is faster"


def test_pretraining_uses_the_same_rule(fused_calls: list) -> None:
    for decoder in ("self", "cross"):
        model = build_autoencoder(ModelConfig("vit_tiny_patch16", (32, 32), patch_size=8, decoder_attention=decoder))
        mask = random_mask(torch.arange(2), seed=0, epoch=0, num_units=16, mask_ratio=0.5, targets=1.0)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 32, 32), mask).loss.backward()
    assert not fused_calls


def test_long_sequences_stay_fused(fused_calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_TOKENS", 16)
    model = build_classifier(VIT).eval()  # 17 tokens
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 32, 32))
    assert len(fused_calls) == 12, "the weights of long sequences would take much memory"


def test_a_window_counts_its_own_tokens(fused_calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hiera's first stages attend within mask units of 64 tokens; its third to all 16 tokens of 64 x 64 pixels."""
    monkeypatch.setattr(attention, "MOST_TOKENS", 63)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        build_classifier(HIERA).eval()(torch.randn(1, 3, 64, 64))
    assert {shape[-2] for shape in fused_calls} == {64}


@pytest.mark.parametrize("shape", [(2, 3, 17, 64), (2, 3, 4, 17, 32)])
def test_both_forms_compute_the_same(shape: tuple[int, ...]) -> None:
    query, keys, values = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
    exact = F.scaled_dot_product_attention(query.double(), keys.double(), values.double())
    (wanted,) = torch.autograd.grad(exact.square().sum(), query)
    plain = attend(query, keys, values)
    (found,) = torch.autograd.grad(plain.square().sum(), query)
    torch.testing.assert_close(plain.double(), exact, atol=0.02, rtol=0.02)
    torch.testing.assert_close(found.double(), wanted.double(), atol=0.05, rtol=0.05)


def test_a_model_for_export_stays_plain(fused_calls: list) -> None:
    model = build_classifier(VIT).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images)
        fused_calls.clear()
        found = rewritten(model, opset=20)(images)
    assert not fused_calls, "the exporter does not support the fused form"
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_what_the_user_has_switched_off_stays_off(fused_calls: list) -> None:
    """With TIMM_FUSED_ATTN=0, or set_fused_attn(False), timm fuses nothing."""
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    use_fastest_attention(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert not fused_calls
