"""The tokenizers that pre-training makes of fresh weights, by the record that parameters give."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import WrapValidator

from vtp.models.base import TrainableTokenizer
from vtp.models.diffusers_vae import ConvolutionalConfig, DiffusersVae
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer


def _record(values: Any) -> TokenizerConfig | ConvolutionalConfig:  # noqa: ANN401 - whatever YAML holds
    """The record of a ViT has no `name`: it is VTP's own layout."""
    name = values.get("name") if isinstance(values, Mapping) else None
    if name not in (None, "convolutional"):
        raise ValueError(f"no such name {name!r}; give convolutional, or none for a ViT")
    kind = ConvolutionalConfig if name or isinstance(values, ConvolutionalConfig) else TokenizerConfig
    return kind.model_validate(values)


AnyTokenizerConfig = Annotated[
    TokenizerConfig | ConvolutionalConfig, WrapValidator(lambda values, _of_either: _record(values))
]


def build_tokenizer(config: TokenizerConfig | ConvolutionalConfig) -> TrainableTokenizer:
    """With fresh weights. Raises ArtefactError when a library is missing."""
    if isinstance(config, ConvolutionalConfig):
        return DiffusersVae(config.autoencoder, image_size=config.image_size)
    return VisualTokenizer(config)
