"""The masked autoencoder: encoder, decoder and loss, the same for every family.

Masks are drawn over *units*. The encoder returns one latent *token* per unit (Hiera: four), and the decoder predicts
the square of pixels of each masked token. Shapes: B batch, C channels, M masked tokens, P pixel values of a token.
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
    """The result of a forward pass.

    Attributes:
        loss: scalar float32, mean squared error over the masked tokens' pixels.
        predicted_BMP: float32 predictions (of normalised pixels if norm_pix_loss is set).
    """

    loss: Tensor
    predicted_BMP: Tensor


class MaskedAutoencoder(nn.Module):
    """A model that predicts the pixels of masked units from the visible ones.

    With ``norm_pix_loss``, each token's pixels are normalised by their mean and standard deviation.
    """

    def __init__(self, encoder: MaskedEncoder, decoder: Decoder, norm_pix_loss: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.norm_pix_loss = norm_pix_loss

    @property
    def num_units(self) -> int:
        """Number of units of an image."""
        return self.encoder.grid[0] * self.encoder.grid[1]

    def forward(self, images_BCHW: Tensor, mask: Mask) -> Reconstruction:
        """Return loss and predictions for normalised images of the encoder's size and a mask of units."""
        rows, columns = self.encoder.grid
        assert images_BCHW.shape[2:] == (rows * self.encoder.unit, columns * self.encoder.unit), images_BCHW.shape
        tokens = split_units(mask, self.encoder.grid, self.encoder.split)
        latent_BTD = self.encoder(images_BCHW, mask.visible_BV)
        predicted_BMP = self.decoder(latent_BTD, tokens).float()
        target_BMP = self.targets(images_BCHW, tokens)
        return Reconstruction(F.mse_loss(predicted_BMP, target_BMP), predicted_BMP)

    def targets(self, images_BCHW: Tensor, tokens: Mask) -> Tensor:
        """Return the target pixels of the masked tokens, ``[B, M, P]`` in float32."""
        pixels_BMP = select_units(images_BCHW, tokens.masked_BM, self.encoder.token_size).flatten(2).float()
        return normalise_units(pixels_BMP) if self.norm_pix_loss else pixels_BMP

    def render(self, images_BCHW: Tensor, mask: Mask, predicted_BMP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Render a reconstruction as images, with pixel normalisation undone.

        Returns:
            ``(masked, reconstructed, pasted)`` in the shape of ``images_BCHW``: only the visible units, only the
            predicted ones (zero elsewhere), and their sum.
        """
        unit, size = self.encoder.token_size, (images_BCHW.shape[2], images_BCHW.shape[3])
        units_BLP = patchify(images_BCHW.float(), unit)
        tokens = split_units(mask, self.encoder.grid, self.encoder.split)
        index_BMP = tokens.masked_BM.unsqueeze(-1).expand_as(predicted_BMP)
        if self.norm_pix_loss:
            predicted_BMP = denormalise_units(predicted_BMP, units_BLP.gather(1, index_BMP))
        masked = unpatchify(units_BLP.scatter(1, index_BMP, 0.0), unit, size)
        predicted_BLP = torch.zeros_like(units_BLP).scatter(1, index_BMP, predicted_BMP)
        reconstructed = unpatchify(predicted_BLP, unit, size)
        return masked, reconstructed, masked + reconstructed
