from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from openmae.models.build import ModelConfig, build_autoencoder
from openmae.models.decoders import TransformerDecoder
from openmae.models.encoders import ViTEncoder
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import Mask, mask_from_noise, split_units
from openmae.models.patches import normalise_units, patchify

pytestmark = pytest.mark.integration

SIZE = (64, 96)
ARCHS = ["vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto"]
CROSS = [("vit_tiny_patch16", "cross"), ("hiera_tiny_224", "cross")]


@pytest.fixture(params=[*((arch, "self") for arch in ARCHS), *CROSS], ids="-".join)
def model(request) -> MaskedAutoencoder:
    torch.manual_seed(0)
    arch, attention = request.param
    config = ModelConfig(arch, SIZE, decoder_depth=1, decoder_embed_dim=64, decoder_attention=attention)
    return build_autoencoder(config)


@pytest.fixture
def mask(model, draw_mask):
    return draw_mask(2, model.num_units, model.num_units // 3)


@pytest.fixture
def tokens(model, mask) -> Mask:
    return split_units(mask, model.encoder.grid, model.encoder.split)


# Hugging Face's ViTMAE with the same weights and noise


def official_vit_mae(norm_pix_loss: bool) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=256,
        layer_norm_eps=1e-6,  # the official code's; transformers' own default is 1e-12
        mask_ratio=0.75,
        norm_pix_loss=norm_pix_loss,
    )
    return transformers.ViTMAEForPreTraining(config)


def our_vit_mae(norm_pix_loss: bool) -> MaskedAutoencoder:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    encoder = ViTEncoder(timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="token", **size))
    decoder = TransformerDecoder(48, 64, 2, (4, 4), 1, 8 * 8 * 3, learned_positions=False)
    return MaskedAutoencoder(encoder, decoder, norm_pix_loss)


def converted(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert Hugging Face's names to OpenMAE's; query, key and value become one matrix."""
    renames = {
        "vit.embeddings.position_embeddings": "encoder.backbone.pos_embed",
        "vit.embeddings.patch_embeddings.projection": "encoder.backbone.patch_embed.proj",
        "vit.embeddings.cls_token": "encoder.backbone.cls_token",
        "vit.layers": "encoder.backbone.blocks",
        "vit.layernorm": "encoder.backbone.norm",
        "decoder.decoder_layers": "decoder.blocks",
        "decoder.decoder_pred": "decoder.predict",
        "decoder.decoder_": "decoder.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
    }
    ours = {}
    for name, value in official.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            value = torch.cat([official[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        for theirs, our in renames.items():
            name = name.replace(theirs, our)
        ours[name] = value
    return ours


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_vit_loss_and_gradients_equal_transformers(norm_pix_loss, seed, randomise, assert_near) -> None:
    official, ours = official_vit_mae(norm_pix_loss), our_vit_mae(norm_pix_loss)
    randomise(official, seed)
    ours.load_state_dict(converted(official.state_dict()))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)

    expected = official(images, noise=noise)
    mask = mask_from_noise(noise, num_visible=4)
    actual = ours(images, mask)
    assert_near(actual.loss, expected.loss, 1e-5)
    for sample in range(2):
        masked = expected.mask[sample].bool()
        assert torch.equal(masked.nonzero().flatten(), mask.masked_BM[sample])
        assert_near(actual.predicted_BMP[sample], expected.logits[sample, masked], 1e-5)

    actual.loss.backward()
    expected.loss.backward()
    gradients = converted({name: p.grad for name, p in official.named_parameters() if p.grad is not None})
    trained = {name: p.grad for name, p in ours.named_parameters() if name in gradients}
    assert len(trained) == len(gradients) == len(list(ours.parameters())) - 2  # all but the fixed positions
    for name, gradient in trained.items():
        assert_near(gradient, gradients[name], 3e-5)


# Shared by all families


def test_loss_is_the_mean_squared_error_of_masked_units(model, mask, tokens, assert_near) -> None:
    images = torch.randn(2, 3, *SIZE)
    result = model(images, mask)
    assert result.loss.dtype == result.predicted_BMP.dtype == torch.float32
    errors = []
    for sample in range(2):
        truth = normalise_units(patchify(images, model.encoder.token_size))[sample, tokens.masked_BM[sample]]
        errors.append((result.predicted_BMP[sample] - truth).square().mean(dim=-1))
    assert_near(result.loss, torch.stack(errors).mean(), 1e-5)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_targets_are_pixels_or_normalised_pixels(model, tokens, norm_pix_loss) -> None:
    model.norm_pix_loss = norm_pix_loss
    images = 3 * torch.randn(2, 3, *SIZE) + 1
    targets = model.targets(images, tokens)
    expected = patchify(images, model.encoder.token_size)
    expected = torch.stack([expected[b, tokens.masked_BM[b]] for b in range(2)])
    torch.testing.assert_close(targets, normalise_units(expected) if norm_pix_loss else expected)
    assert targets.mean(dim=-1).abs().max().item() < (1e-5 if norm_pix_loss else 10)


def test_float16_images_have_float32_targets(model, tokens) -> None:
    targets = model.targets((100 * torch.randn(2, 3, *SIZE)).half(), tokens)
    assert targets.dtype == torch.float32
    assert targets.isfinite().all()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_render_keeps_visible_pixels_and_restores_a_perfect_prediction(model, mask, tokens, norm_pix_loss) -> None:
    model.norm_pix_loss = norm_pix_loss
    images = 2 * torch.randn(2, 3, *SIZE) + 0.5
    *_, pasted = model.render(images, mask, model.targets(images, tokens))
    torch.testing.assert_close(pasted, images)

    predicted = torch.randn_like(model.targets(images, tokens))
    painted = [
        patchify(picture, model.encoder.token_size) for picture in (images, *model.render(images, mask, predicted))
    ]
    for sample in range(2):
        visible, covered = tokens.visible_BV[sample], tokens.masked_BM[sample]
        original, masked, reconstructed, pasted = (units[sample] for units in painted)
        truth, expected = original[covered], predicted[sample]
        if norm_pix_loss:
            expected = expected * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True)
        assert torch.equal(masked[visible], original[visible])
        assert not masked[covered].any()
        assert torch.equal(pasted[visible], original[visible])
        assert not reconstructed[visible].any()
        torch.testing.assert_close(pasted[covered], expected)
        torch.testing.assert_close(reconstructed[covered], expected)


def test_bfloat16_autocast_keeps_the_loss_in_float32(model, mask) -> None:
    images = torch.randn(2, 3, *SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(images, mask)
    assert result.loss.dtype == result.predicted_BMP.dtype == torch.float32
    result.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())

    model.zero_grad()
    expected = model(images, mask)
    expected.loss.backward()
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=0.01)
    for name, parameter in model.named_parameters():
        if name in gradients and parameter.ndim > 1:
            assert torch.cosine_similarity(gradients[name].flatten(), parameter.grad.flatten(), dim=0) > 0.95, name


# A part of the masked units is predicted


def some_of(mask: Mask) -> Mask:
    return mask._replace(masked_BM=mask.masked_BM[:, 1:3])


def test_predicting_some_units_equals_the_full_path(model, mask, randomise, assert_near) -> None:
    """Compare for all decoders except self-attention, where each token depends on which others are present."""
    if isinstance(model.decoder, TransformerDecoder):
        pytest.skip("its own test is the next one")
    model, images = model.double(), torch.randn(2, 3, *SIZE).double()
    randomise(model)
    result, whole, count = model(images, some_of(mask)), model(images, mask), model.encoder.split**2
    assert result.predicted_BMP.shape[1] == 2 * count
    here = slice(count, 3 * count)  # split units keep their order
    assert_near(result.predicted_BMP, whole.predicted_BMP[:, here], 1e-6)
    tokens = split_units(mask, model.encoder.grid, model.encoder.split)
    errors = (whole.predicted_BMP - model.targets(images, tokens)).square().mean(dim=-1)
    assert_near(result.loss, errors[:, here].mean(), 1e-6)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16", "hiera_tiny_224"])
def test_self_attention_uses_visible_and_predicted_units_only(arch, randomise, draw_mask, assert_near) -> None:
    model = build_autoencoder(ModelConfig(arch, SIZE, decoder_depth=2, decoder_embed_dim=64)).double()
    randomise(model)
    images, units = torch.randn(2, 3, *SIZE).double(), model.num_units
    mask = some_of(draw_mask(2, units, units // 3))
    encoder, decoder = model.encoder, model.decoder
    side, columns = encoder.split, encoder.grid[1]
    latent = decoder.embed(encoder(images, mask.visible_BV))
    prefix, positions = encoder.num_prefix_tokens, decoder.pos_embed[0]
    predicted, truths = [], []
    for sample in range(2):
        places = [
            [
                (unit // columns * side + row) * columns * side + unit % columns * side + column
                for unit in part[sample].tolist()
                for row in range(side)
                for column in range(side)
            ]
            for part in mask
        ]
        seen, hidden = (positions[[prefix + place for place in part]] for part in places)
        kept = [latent[sample, :prefix] + positions[:prefix], latent[sample, prefix:] + seen]
        kept.append(decoder.mask_token[0] + hidden)
        out = decoder.predict(decoder.norm(decoder.blocks(torch.cat(kept)[None])))[0]
        predicted.append(out[-len(hidden) :])
        truths.append(normalise_units(patchify(images.float(), encoder.token_size))[sample, places[1]])
    result = model(images, mask)
    assert_near(result.predicted_BMP, torch.stack(predicted).float(), 1e-6)
    assert_near(result.loss, (torch.stack(predicted) - torch.stack(truths)).square().mean().float(), 1e-5)
