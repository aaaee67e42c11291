"""Encoders that run a timm backbone on visible units only: an interface, and one module per family."""

from openmae.models.encoders.convnextv2 import ConvNeXtV2Encoder
from openmae.models.encoders.hiera import HieraEncoder
from openmae.models.encoders.interface import MaskedEncoder
from openmae.models.encoders.vit import ViTEncoder

__all__ = ["ConvNeXtV2Encoder", "HieraEncoder", "MaskedEncoder", "ViTEncoder"]
