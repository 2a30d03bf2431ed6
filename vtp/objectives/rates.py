"""Who learns how fast: factors on the optimiser's learning rate and weight decay, by module and by depth."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field
from torch import nn

from vtp.config import Config
from vtp.models.base import EncoderLayers, TrainableTokenizer
from vtp.models.heads import DinoHead
from vtp.models.tokenizer import VisualTokenizer
from vtp.step import ParameterGroup, hidden_matrices


class ModuleRates(Config):
    """Factors for one module."""

    lr: float = Field(ge=0, description="factor on the learning rate")
    weight_decay: float = Field(ge=0, description="factor on the weight decay")


class RatesConfig(Config):
    """Factors on `optim.lr` and `optim.weight_decay`."""

    encoder: ModuleRates = Field(description="rates of the encoder: trunk and bottleneck, or convolutions")
    decoder: ModuleRates = Field(description="rates of the pixel decoder")
    text: ModuleRates = Field(description="rates of text tower, CLIP's projection, logit scale and bias")
    heads: ModuleRates = Field(description="rates of the heads of self-supervision")
    layer_decay: float = Field(gt=0, le=1, description="factor on the rate per block below the top of the encoder")
    patch_embed: float = Field(
        ge=0, description="further factor on the rate of the layer that reads the pixels (DINOv2: 0.2)"
    )
    decay_scales: bool = Field(description="let the scales of prototypes decay as matrices do (DINOv2), not only these")
    frozen_prototypes: float = Field(ge=0, le=1, description="share of the run in which prototypes do not learn")


def groups(tokenizer: TrainableTokenizer, heads: nn.Module | None, config: RatesConfig) -> Iterator[ParameterGroup]:
    """Every trainable parameter, in exactly one group; each knows its module and the matrices of hidden layers."""
    hidden = hidden_matrices(tokenizer.blocks())
    for group in _encoder(tokenizer.encoder_layers(), config):
        yield group._replace(module="encoder", hidden=hidden)
    yield _group(tokenizer.pixel_decoder, config.decoder)._replace(module="decoder", hidden=hidden)
    if isinstance(tokenizer, VisualTokenizer) and tokenizer.config.text is not None:
        text: Any = tokenizer.text  # open_clip's
        modules = nn.ModuleList([text, tokenizer.visual_proj])
        scalars = [p for name, p in tokenizer.named_parameters(recurse=False) if name.startswith("logit_")]
        group = _group(modules, config.text)
        yield group._replace(
            parameters=[*group.parameters, *scalars],
            module="text",
            last_term="clip",
            hidden=hidden_matrices(text.transformer.resblocks),
        )
    if heads is not None:
        yield from _heads(heads, config)


def _heads(heads: nn.Module, config: RatesConfig) -> Iterator[ParameterGroup]:
    """Each is a module of its own; prototypes have a group of their own."""
    rates = config.heads
    for name, head in heads.named_children():
        prototypes = [p for m in head.modules() if isinstance(m, DinoHead) for p in m.parameters(recurse=False)]
        known = {id(p) for p in prototypes}
        others = ParameterGroup([p for p in head.parameters() if id(p) not in known], rates.lr, rates.weight_decay)
        last = ParameterGroup(prototypes, rates.lr, rates.weight_decay, config.frozen_prototypes)
        yield others._replace(module=f"{name}_head", last_term="ssl")
        yield last._replace(module=f"{name}_head", last_term="ssl", vectors_decay=config.decay_scales)


def _encoder(layers: EncoderLayers, config: RatesConfig) -> Iterator[ParameterGroup]:
    rates, depth = config.encoder, len(layers.blocks)
    bottom = config.layer_decay ** (depth + 1)
    yield _group(layers.embed, rates, bottom * config.patch_embed)
    for tokens, term in ((layers.tokens, ""), (layers.mask_tokens, "ssl")):
        if tokens:
            yield ParameterGroup(tokens, rates.lr * bottom, rates.weight_decay, last_term=term)
    for index, block in enumerate(layers.blocks):
        yield _group(block, rates, config.layer_decay ** (depth - index))
    yield _group(layers.top, rates)


def _group(module: nn.Module, rates: ModuleRates, factor: float = 1.0) -> ParameterGroup:
    return ParameterGroup(list(module.parameters()), rates.lr * factor, rates.weight_decay)
