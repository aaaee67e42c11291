from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openmae.models.decoders import ConvNeXtDecoder, CrossAttentionDecoder, TransformerDecoder
from openmae.models.positions import sincos_position_embedding

GRID = (2, 3)
LATENT, TOKEN_VALUES = 20, 12


def filled(visible: Tensor, mask, token: Tensor) -> Tensor:
    """Fill in every token, one by one."""
    rows = []
    for sample in range(len(visible)):
        tokens = [token.flatten()] * (GRID[0] * GRID[1])
        for place, index in enumerate(mask.visible_BV[sample].tolist()):
            tokens[index] = visible[sample, place]
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def chosen(values: Tensor, mask) -> Tensor:
    return torch.stack([row[index] for row, index in zip(values, mask.masked_BM, strict=True)])


def assert_same_gradients(actual: Tensor, expected: Tensor, wanted: list[Tensor], assert_near) -> None:
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, wanted, cotangent)
    for one, other in zip(gradients, torch.autograd.grad(expected, wanted, cotangent), strict=True):
        assert_near(one, other, 1e-10)


@pytest.mark.parametrize(("prefix", "learned"), [(1, False), (0, True)], ids=["vit", "hiera"])
def test_transformer_equals_decoding_every_token(prefix, learned, randomise, draw_mask, assert_near) -> None:
    decoder = TransformerDecoder(LATENT, 64, 2, GRID, prefix, TOKEN_VALUES, learned_positions=learned).double()
    randomise(decoder)
    mask = draw_mask(3, 6, 2)
    latent = torch.randn(3, prefix + 2, LATENT).double().requires_grad_(True)
    x = decoder.embed(latent)
    x = torch.cat([x[:, :prefix], filled(x[:, prefix:], mask, decoder.mask_token)], dim=1) + decoder.pos_embed
    expected = decoder.predict(decoder.norm(decoder.blocks(x)))[:, prefix:]
    actual = decoder(latent, mask)
    assert actual.shape == (3, 4, TOKEN_VALUES)
    assert_near(actual, chosen(expected, mask), 1e-12)
    trained = [p for p in decoder.parameters() if p.requires_grad]
    assert_same_gradients(actual, chosen(expected, mask), [latent, *trained], assert_near)


def test_convnext_equals_decoding_every_token(randomise, draw_mask, assert_near) -> None:
    decoder = ConvNeXtDecoder(LATENT, 16, 2, GRID, TOKEN_VALUES).double()
    randomise(decoder)
    mask = draw_mask(3, 6, 2)
    latent = torch.randn(3, 2, LATENT).double().requires_grad_(True)
    x = filled(decoder.embed(latent), mask, decoder.mask_token).view(3, *GRID, 16).permute(0, 3, 1, 2)
    expected = decoder.predict(decoder.blocks(x.contiguous()).permute(0, 2, 3, 1).reshape(3, 6, 16))
    actual = decoder(latent, mask)
    assert actual.shape == (3, 4, TOKEN_VALUES)
    assert_near(actual, chosen(expected, mask), 1e-12)
    assert_same_gradients(actual, chosen(expected, mask), [latent, *decoder.parameters()], assert_near)


def normed(x: Tensor, norm: torch.nn.Module) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * norm.weight + norm.bias


def decoded_one_by_one(decoder: CrossAttentionDecoder, latent: Tensor, token: int) -> Tensor:
    """Predict one token of one image, head by head, from its latent ``[T, D]``."""
    x = decoder.mask_token.flatten() + decoder.pos_embed[0, decoder.num_prefix_tokens + token]
    for block in decoder.cross_blocks:
        query = block.query.weight @ normed(x, block.norm1) + block.query.bias
        keys, values = (latent @ block.key_value.weight.T + block.key_value.bias).split(len(x), dim=-1)
        heads = []
        for start in range(0, len(x), 32):
            own = slice(start, start + 32)
            weights = (keys[:, own] @ query[own] / math.sqrt(32)).exp()
            heads.append(weights @ values[:, own] / weights.sum())
        x = x + block.project.weight @ torch.cat(heads) + block.project.bias
        hidden = F.gelu(block.mlp.fc1.weight @ normed(x, block.norm2) + block.mlp.fc1.bias)
        x = x + block.mlp.fc2.weight @ hidden + block.mlp.fc2.bias
    return decoder.predict.weight @ normed(x, decoder.norm) + decoder.predict.bias


@pytest.mark.parametrize(("prefix", "learned"), [(1, False), (0, True)], ids=["vit", "hiera"])
def test_cross_attention_equals_decoding_token_by_token(prefix, learned, randomise, draw_mask, assert_near) -> None:
    decoder = CrossAttentionDecoder(LATENT, 64, 2, GRID, prefix, TOKEN_VALUES, learned_positions=learned).double()
    randomise(decoder)
    mask = draw_mask(3, 6, 2)
    latent = torch.randn(3, prefix + 2, LATENT).double().requires_grad_(True)
    expected = torch.stack(
        [
            torch.stack([decoded_one_by_one(decoder, one, token) for token in tokens])
            for one, tokens in zip(latent, mask.masked_BM.tolist(), strict=True)
        ]
    )
    actual = decoder(latent, mask)
    assert actual.shape == (3, 4, TOKEN_VALUES)
    assert_near(actual, expected, 1e-12)
    trained = [p for p in decoder.parameters() if p.requires_grad]
    assert_same_gradients(actual, expected, [latent, *trained], assert_near)


@pytest.mark.parametrize("seed", range(3))
def test_cross_attention_predicts_each_token_independently(seed, randomise, draw_mask, assert_near):
    decoder = CrossAttentionDecoder(LATENT, 64, 3, GRID, 1, TOKEN_VALUES, learned_positions=False)
    randomise(decoder, seed)
    mask, latent = draw_mask(3, 6, 2, seed), torch.randn(3, 3, LATENT)
    whole = decoder(latent, mask)
    for chosen_ones in ([0], [3], [1, 2], [2, 0, 3]):
        some = mask._replace(masked_BM=mask.masked_BM[:, chosen_ones])
        assert_near(decoder(latent, some), whole[:, chosen_ones], 1e-5)


@pytest.mark.parametrize("kind", [TransformerDecoder, CrossAttentionDecoder])
def test_positions_are_fixed_for_vit_and_learned_for_hiera(kind) -> None:
    fixed = kind(LATENT, 64, 1, GRID, 1, TOKEN_VALUES, learned_positions=False)
    assert not fixed.pos_embed.requires_grad
    assert torch.equal(fixed.pos_embed, sincos_position_embedding(64, GRID, 1))
    learned = kind(LATENT, 64, 1, GRID, 0, TOKEN_VALUES, learned_positions=True)
    assert learned.pos_embed.requires_grad
    assert learned.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)


def test_depth_and_width_have_an_effect() -> None:
    decoder = TransformerDecoder(LATENT, 96, 3, GRID, 1, TOKEN_VALUES, learned_positions=False)
    assert len(decoder.blocks) == 3
    assert decoder.predict.in_features == 96
    assert decoder.blocks[0].attn.num_heads == 3
    assert len(ConvNeXtDecoder(LATENT, 96, 3, GRID, TOKEN_VALUES).blocks) == 3
    cross = CrossAttentionDecoder(LATENT, 96, 3, GRID, 1, TOKEN_VALUES, learned_positions=False)
    assert len(cross.cross_blocks) == 3
    assert cross.predict.in_features == 96


@pytest.mark.parametrize(("prefix", "learned"), [(1, False), (0, True)], ids=["vit", "hiera"])
def test_transformer_drops_tokens_neither_visible_nor_predicted(
    prefix, learned, randomise, draw_mask, assert_near
) -> None:
    decoder = TransformerDecoder(LATENT, 64, 2, GRID, prefix, TOKEN_VALUES, learned_positions=learned).double()
    randomise(decoder)
    whole = draw_mask(3, 6, 2)
    mask = whole._replace(masked_BM=whole.masked_BM[:, 1:3])
    latent = torch.randn(3, prefix + 2, LATENT).double()
    x = decoder.embed(latent)
    x = torch.cat([x[:, :prefix], filled(x[:, prefix:], mask, decoder.mask_token)], dim=1) + decoder.pos_embed
    for sample, row in enumerate(x):
        seen, predicted = mask.visible_BV[sample] + prefix, mask.masked_BM[sample] + prefix
        kept = torch.cat([torch.arange(prefix), predicted, seen])
        expected = decoder.predict(decoder.norm(decoder.blocks(row[kept][None])))[0, prefix : prefix + 2]
        assert_near(decoder(latent, mask)[sample], expected, 1e-12)


def test_convnext_predicts_some_tokens_as_it_predicts_all(randomise, draw_mask, assert_near) -> None:
    decoder = ConvNeXtDecoder(LATENT, 16, 2, GRID, TOKEN_VALUES).double()
    randomise(decoder)
    mask, latent = draw_mask(3, 6, 2), torch.randn(3, 2, LATENT).double()
    some = mask._replace(masked_BM=mask.masked_BM[:, 1:3])
    assert_near(decoder(latent, some), decoder(latent, mask)[:, 1:3], 1e-12)
