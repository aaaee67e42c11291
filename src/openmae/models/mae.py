"""The masked autoencoder: encoder + decoder + loss, the same for every family.

Masks are drawn over *units*. The encoder gives one latent *token* a unit, but Hiera four; the decoder predicts a
token's square of pixels. Shapes: B batch, C channels, M masked tokens, P values of a token's square.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmae.models.decoders import Decoder
from openmae.models.encoders import MaskedEncoder
from openmae.models.masking import Mask, split_units
from openmae.models.patches import denormalise_units, normalise_units, patchify, select_units, unpatchify


class Reconstruction(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: scalar float32, mean squared error over the masked tokens' pixels.
        predicted_BMP: float32 predictions in the loss's own space (normalised where norm_pix_loss is on).
    """

    loss: Tensor
    predicted_BMP: Tensor


class MaskedAutoencoder(nn.Module):
    """Predicts the pixels of masked units from the visible ones.

    Args:
        encoder, decoder: of one family; see ``models.build``.
        norm_pix_loss: predict each token's pixels normalised by their own mean and deviation.
    """

    def __init__(self, encoder: MaskedEncoder, decoder: Decoder, norm_pix_loss: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.norm_pix_loss = norm_pix_loss

    @property
    def num_units(self) -> int:
        """Units of an image."""
        return self.encoder.grid[0] * self.encoder.grid[1]

    def forward(self, images_BCHW: Tensor, mask: Mask) -> Reconstruction:
        """Loss and predictions for normalised images of the encoder's size, and a mask of units."""
        rows, columns = self.encoder.grid
        assert images_BCHW.shape[2:] == (rows * self.encoder.unit, columns * self.encoder.unit), images_BCHW.shape
        tokens = split_units(mask, self.encoder.grid, self.encoder.split)
        latent_BTD = self.encoder(images_BCHW, mask.visible_BV)
        predicted_BMP = self.decoder(latent_BTD, tokens).float()
        target_BMP = self.targets(images_BCHW, tokens)
        return Reconstruction(F.mse_loss(predicted_BMP, target_BMP), predicted_BMP)

    def targets(self, images_BCHW: Tensor, tokens: Mask) -> Tensor:
        """What the masked tokens should be predicted as, ``[B, M, P]`` in float32."""
        pixels_BMP = select_units(images_BCHW, tokens.masked_BM, self.encoder.token_size).flatten(2).float()
        return normalise_units(pixels_BMP) if self.norm_pix_loss else pixels_BMP

    def paint(self, images_BCHW: Tensor, mask: Mask, predicted_BMP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of a reconstruction, pixel normalisation undone.

        Returns:
            ``(masked, reconstructed, pasted)`` like ``images_BCHW``: the visible units, the predicted ones
            (the other units are zero in both), and the two together.
        """
        unit, size = self.encoder.token_size, (images_BCHW.shape[2], images_BCHW.shape[3])
        units_BLP = patchify(images_BCHW.float(), unit)
        index = (
            split_units(mask, self.encoder.grid, self.encoder.split)
            .masked_BM.unsqueeze(-1)
            .expand(-1, -1, units_BLP.shape[-1])
        )
        if self.norm_pix_loss:
            predicted_BMP = denormalise_units(predicted_BMP, units_BLP.gather(1, index))
        masked = unpatchify(units_BLP.scatter(1, index, 0.0), unit, size)
        predicted_BLP = torch.zeros_like(units_BLP).scatter(1, index, predicted_BMP)
        reconstructed = unpatchify(predicted_BLP, unit, size)
        return masked, reconstructed, masked + reconstructed
