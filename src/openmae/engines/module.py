"""A trained backbone for deployment: images in, logits or features out, without masking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openmae.checkpoints.format import Checkpoint
from openmae.checkpoints.weights import load_into
from openmae.engines.metadata import ModelCard
from openmae.models.build import build_classifier, build_feature_extractor


class DeployedModel(nn.Module):
    """A timm classifier or, for pretraining, feature extractor in eval mode, with the card's inputs and outputs."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Any, card: ModelCard) -> None:
        super().__init__()
        self.backbone, self.card = backbone, card
        for name, values in (("mean", card.mean), ("std", card.std)):
            self.register_buffer(name, 255 * torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of ``ModelCard.outputs``.

        ``images`` are normalised float32 ``[N, C, H, W]``, or uint8 ``[N, H, W, C]`` if preprocessing is included.
        """
        if self.card.preprocessing:
            images = (images.float().permute(0, 3, 1, 2) - self.mean) / self.std  # TensorRT cannot transpose uint8
        return (self.backbone(images),) if self.card.stage == "finetune" else self._features(images)

    def _features(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled embedding ``[B, D]`` and the last feature map ``[B, D, rows, columns]``."""
        backbone, family = self.backbone, self.card.model.architecture.family
        x = backbone.forward_features(images_BCHW)
        if family == "vit":
            patches_BLD = x[:, backbone.num_prefix_tokens :]
            rows, columns = backbone.patch_embed.grid_size
            return patches_BLD.mean(dim=1), patches_BLD.transpose(1, 2).unflatten(2, (rows, columns))
        features = backbone.forward_head(x, pre_logits=True)
        if family == "hiera":  # its tokens are ordered by pooling steps
            x = backbone.reroll(x, len(backbone.blocks) - 1).permute(0, 3, 1, 2)
        return features, x


def build_deployed(checkpoint: Checkpoint, card: ModelCard) -> DeployedModel:
    """Build the backbone of a checkpoint with all its weights, in eval mode.

    Raises:
        CheckpointError: the weights do not fit.
    """
    build = build_classifier if card.stage == "finetune" else build_feature_extractor
    backbone = build(card.model)
    load_into(backbone, checkpoint, part="everything")
    return DeployedModel(backbone, card).eval()


def example_input(card: ModelCard, batch: int, seed: int = 0) -> Tensor:
    """Return random images in the form of the model's input."""
    config = card.model
    generator = torch.Generator().manual_seed(seed)
    if card.preprocessing:
        return torch.randint(
            0, 256, (batch, *config.input_size, config.in_chans), dtype=torch.uint8, generator=generator
        )
    return torch.randn(batch, config.in_chans, *config.input_size, generator=generator)
