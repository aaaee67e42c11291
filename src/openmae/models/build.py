"""Build models from a ``ModelConfig``, which is stored in checkpoints."""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

import timm
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from openmae.models.attention import use_fastest_attention
from openmae.models.decoders import ConvNeXtDecoder, CrossAttentionDecoder, Decoder, TransformerDecoder
from openmae.models.encoders import ConvNeXtV2Encoder, HieraEncoder, MaskedEncoder, ViTEncoder
from openmae.models.mae import MaskedAutoencoder
from openmae.spec.architectures import Architecture, Family, get_architecture

_HIERA_Q_POOL = 2  # pooling steps in pretraining; see encoders/hiera.py
_T = TypeVar("_T")
Count = Annotated[int, Field(strict=True, ge=1, le=2**24)]
Fraction = Annotated[float, Field(ge=0, le=1)]
_HEAD_STD = 2e-5  # of a new classifier: MAE's and ConvNeXt V2's main_finetune.py, Hiera's .02 * head_init_scale


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a model, stored in checkpoints as a plain dict.

    Attributes:
        arch: a name of the architecture table.
        input_size: (height, width) of the images in pixels.
        patch_size: side of a ViT's patch in pixels; None keeps the architecture's.
        mask_ratio: share of units that are masked in pretraining.
        norm_pix_loss: predict normalised pixels in pretraining.
        decoder_attention: masked tokens attend to all tokens (self) or to the visible ones only (cross); not used by
            ConvNeXt V2.
        global_pool: a ViT classifier pools the patch tokens (True) or uses the class token (False).
        final_norm: a ViT classifier normalises before its head; False for one that NVIDIA TAO has fine-tuned.
        num_classes: outputs of the classifier; 0 for pretraining.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    arch: str
    input_size: tuple[Count, Count] = (224, 224)
    in_chans: Count = 3
    patch_size: Count | None = None
    drop_path_rate: Fraction = 0.0
    mask_ratio: Fraction = 0.75
    norm_pix_loss: bool = True
    decoder_depth: Count = 8
    decoder_embed_dim: Count = 512
    decoder_attention: Literal["self", "cross"] = "self"
    global_pool: bool = True
    final_norm: bool = True
    num_classes: Annotated[int, Field(strict=True, ge=0, le=2**24)] = 0

    @property
    def architecture(self) -> Architecture:
        """Row of the architecture table."""
        return get_architecture(self.arch)

    @property
    def unit(self) -> int:
        """Side of a mask unit in pixels."""
        return self.patch_size or self.architecture.mask_unit

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        values = asdict(self) | {"input_size": list(self.input_size)}
        if self.final_norm:
            del values["final_norm"]  # the default; earlier versions do not know this key
        return values


def validate(kind: type[_T], values: Any) -> _T:
    """Create a dataclass from plain values in a file, checking types and bounds.

    Raises:
        ValueError: A value is missing, unknown or invalid; the message names the first one.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(map(str, fault["loc"])) or kind.__name__
        faults = {"missing": "missing", "unexpected_keyword_argument": "unknown"}
        raise ValueError(f"{name} is {faults.get(fault['type']) or reprlib.repr(fault['input'])}") from None


def build_model(config: ModelConfig) -> nn.Module:
    """Build the model that a configuration is trained as: a classifier if it has classes, else an autoencoder."""
    return build_classifier(config) if config.num_classes else build_autoencoder(config)


def build_autoencoder(config: ModelConfig) -> MaskedAutoencoder:
    """Build a newly initialised masked autoencoder for pretraining."""
    encoder = build_encoder(config)
    encoder.init_weights()
    return MaskedAutoencoder(encoder, _build_decoder(config, encoder), config.norm_pix_loss)


def build_encoder(config: ModelConfig) -> MaskedEncoder:
    """Build the family's encoder around a timm backbone without a classifier."""
    family = config.architecture.family
    if family == "vit":
        encoder = ViTEncoder(_create(config, num_classes=0, global_pool="token"))
        encoder.backbone.pos_embed.requires_grad_(False)  # the paper's sine-cosine positions stay fixed
        return encoder
    if family == "hiera":
        return HieraEncoder(_create(config, num_classes=0, q_pool=_HIERA_Q_POOL), config.input_size)
    return ConvNeXtV2Encoder(_create(config, num_classes=0), config.input_size)


def build_classifier(config: ModelConfig) -> nn.Module:
    """Build a timm model with a classifier of ``config.num_classes`` outputs for fine-tuning.

    A ViT that pools patch tokens normalises after pooling (``fc_norm``), as in the paper's fine-tuning. The head is
    initialised as in the official code: weights from a truncated normal distribution of std 2e-5, and a zero bias
    (Hiera: 2e-5).
    """
    options: dict[str, Any] = {}
    if config.architecture.family == "vit":
        options["global_pool"] = "avg" if config.global_pool else "token"
        if not config.final_norm:
            options["final_norm"] = False
    model: Any = _create(config, num_classes=config.num_classes, **options)
    if config.num_classes:
        head = model.get_classifier()
        nn.init.trunc_normal_(head.weight, std=_HEAD_STD)
        nn.init.constant_(head.bias, _HEAD_STD if config.architecture.family == "hiera" else 0.0)
    classifier: nn.Module = model
    return classifier


def build_feature_extractor(config: ModelConfig) -> nn.Module:
    """Build a timm model that returns one embedding per image, ``[B, D]``, from a pretrained backbone.

    For ViT, this is the mean of the patch tokens after the pretrained final norm; for Hiera (with the two pooling steps
    of pretraining) and ConvNeXt V2, timm's pooled features after ``head.norm``.
    """
    options: dict[Family, dict[str, Any]] = {
        "vit": {"global_pool": "avg", "fc_norm": False, "final_norm": config.final_norm},
        "hiera": {"q_pool": _HIERA_Q_POOL},
        "convnextv2": {},
    }
    return _create(config, num_classes=0, **options[config.architecture.family])


def _create(config: ModelConfig, **options: Any) -> nn.Module:
    row = config.architecture
    options |= {"in_chans": config.in_chans, "drop_path_rate": config.drop_path_rate}
    if row.family != "convnextv2":
        options["img_size"] = config.input_size
    if row.family == "vit" and config.patch_size:
        options["patch_size"] = config.patch_size
    model: nn.Module = timm.create_model(row.timm_name, pretrained=False, **options)
    use_fastest_attention(model)
    return model


def _build_decoder(config: ModelConfig, encoder: MaskedEncoder) -> Decoder:
    width, depth = config.decoder_embed_dim, config.decoder_depth
    token_values = encoder.token_size**2 * config.in_chans
    if config.architecture.family == "convnextv2":
        return ConvNeXtDecoder(encoder.dim, width, depth, encoder.token_grid, token_values)
    kind = CrossAttentionDecoder if config.decoder_attention == "cross" else TransformerDecoder
    decoder = kind(
        encoder.dim,
        width,
        depth,
        encoder.token_grid,
        encoder.num_prefix_tokens,
        token_values,
        learned_positions=config.architecture.family == "hiera",
    )
    use_fastest_attention(decoder)
    return decoder
