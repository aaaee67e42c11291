"""A timm backbone run over the visible units only, one file a family; ``base`` is the face they share."""

from openmae.models.encoders.base import MaskedEncoder
from openmae.models.encoders.convnextv2 import ConvNeXtV2Encoder
from openmae.models.encoders.hiera import HieraEncoder
from openmae.models.encoders.vit import ViTEncoder

__all__ = ["ConvNeXtV2Encoder", "HieraEncoder", "MaskedEncoder", "ViTEncoder"]
