"""What a pre-training step takes, counted from shapes: floating-point operations of any configuration.

Two per multiply-add of every matrix product and convolution, attention scores included; norms and activations are left
out, as is usual. These are model FLOPs: what is computed a second time to save memory does not count, nor do the
residual branches that stochastic depth leaves out, which nobody computes. (The paper's table 1 counts otherwise: 2 x
parameters x 256 tokens, see `paper_flops`.)
"""

from typing import NamedTuple

import torch

from vtp.data.pretrain_batches import ActiveBatch, PretrainDataConfig
from vtp.layers.block import FfnName, ffn_width
from vtp.layers.flops import FROZEN, TRAINING, forward_flops
from vtp.losses.perceptual import AnyPerceptualConfig, perceptual_shapes
from vtp.models.base import Encoding
from vtp.models.decoder import DecoderConfig
from vtp.models.diffusers_vae import ConvolutionalConfig, DiffusersVae
from vtp.models.heads import DinoHeadConfig
from vtp.models.text import TextConfig
from vtp.models.tokenizer import TokenizerConfig
from vtp.models.vit import VisionConfig
from vtp.objectives.pretrain import PretrainObjectiveConfig
from vtp.objectives.self_distillation import SslConfig
from vtp.step import StepCost

PAPER_TOKENS = 256  # of a 256-pixel image at patch 16
FIRST_LAYER = 2  # forward, and backward through weights: pixels take no gradient


class Item(NamedTuple):
    """One part of a step over the global batch, in FLOPs."""

    name: str
    forward: float
    training: float  # forward and backward


def pretrain_cost(
    tokenizer: TokenizerConfig | ConvolutionalConfig,
    data: PretrainDataConfig,
    objective: PretrainObjectiveConfig,
    active: ActiveBatch,
) -> StepCost:
    """A global step's FLOPs, samples and encoder tokens (of convolutions: latents)."""
    flops = sum(item.training for item in items(tokenizer, data, objective, active))
    if isinstance(tokenizer, ConvolutionalConfig):
        _, height, width = tokenizer.latent_shape
        return StepCost(flops, active._asdict(), active.reconstruction * height * width)
    vision, views = tokenizer.vision, data.ssl_views
    clip, whole = _tokens(vision, data.clip_view.size), _tokens(vision, tokenizer.image_size)
    if data.reconstruction_view.name == "shared":
        whole = clip
    of_views = 4 * _tokens(vision, views.global_size) + views.local_views * _tokens(vision, views.local_size)
    tokens = active.clip * clip + active.ssl * of_views + active.reconstruction * whole
    return StepCost(flops, active._asdict(), tokens)


def items(
    tokenizer: TokenizerConfig | ConvolutionalConfig,
    data: PretrainDataConfig,
    objective: PretrainObjectiveConfig,
    active: ActiveBatch,
) -> list[Item]:
    """The parts of a global step, those of absent objectives left out."""
    # A shared view has the size of the tokenizer when there is one.
    size, count = tokenizer.image_size, active.reconstruction
    items = (
        [_convolutional_encoder(tokenizer, count)]
        if isinstance(tokenizer, ConvolutionalConfig)
        else _vit_items(tokenizer, data, objective, active)
    )
    if not count:
        return items
    decoding = count * decoding_flops(tokenizer)
    items.append(Item("reconstruction: decoder", decoding, TRAINING * decoding))
    network = count * perceptual_flops(objective.reconstruction.perceptual, size)
    # Of the two images only the reconstruction passes a gradient on.
    items.append(Item("reconstruction: perceptual network", 2 * network, (1 + FROZEN) * network))
    return items


def encoding_flops(tokenizer: TokenizerConfig | ConvolutionalConfig) -> float:
    """Forward FLOPs of the latents of one image."""
    if isinstance(tokenizer, ConvolutionalConfig):
        return forward_flops(Encoding(_shapes(tokenizer)), _image(tokenizer))
    return encoder_flops(tokenizer.vision, tokenizer.image_size, bottleneck=True)


def decoding_flops(tokenizer: TokenizerConfig | ConvolutionalConfig) -> float:
    """Forward FLOPs of one image by the decoder as training has it; 0 without one."""
    if isinstance(tokenizer, ConvolutionalConfig):
        return forward_flops(_shapes(tokenizer).pixel_decoder, torch.empty(1, *tokenizer.latent_shape, device="meta"))
    return decoder_flops(tokenizer.decoder, tokenizer.vision, tokenizer.image_size)


def _convolutional_encoder(tokenizer: ConvolutionalConfig, count: int) -> Item:
    forward, shapes = encoding_flops(tokenizer), _shapes(tokenizer)
    first = forward_flops(shapes.encoder.conv_in, _image(tokenizer))
    training = TRAINING * forward - (TRAINING - FIRST_LAYER) * first
    return Item("reconstruction: encoder", count * forward, count * training)


def _shapes(tokenizer: ConvolutionalConfig) -> DiffusersVae:
    with torch.device("meta"):
        return DiffusersVae(tokenizer.autoencoder, image_size=tokenizer.image_size)


def _image(tokenizer: ConvolutionalConfig) -> torch.Tensor:
    return torch.empty(1, 3, tokenizer.image_size, tokenizer.image_size, device="meta")


def _vit_items(
    tokenizer: TokenizerConfig, data: PretrainDataConfig, objective: PretrainObjectiveConfig, active: ActiveBatch
) -> list[Item]:
    """All but decoder and perceptual network."""
    vision, rates = tokenizer.vision, objective.drop_path
    items: list[Item] = []

    def student(name: str, rate: float, size: int, count: int, *, bottleneck: bool) -> Item:
        """The encoder, of whose `count` images each residual branch leaves out the share `rate`."""
        return _encoder(name, vision, size, count, count * (1 - rate), bottleneck=bottleneck)

    if active.clip:
        assert tokenizer.text is not None
        text, bottleneck = tokenizer.text, not vision.bottleneck_ae_only
        items.append(student("clip: encoder", rates.clip, data.clip_view.size, active.clip, bottleneck=bottleneck))
        width = vision.latent_channels if bottleneck else vision.embed_dim
        per_pair = text_flops(text) + 2 * width * text.embed_dim + 2 * active.clip * text.embed_dim
        items.append(Item("clip: text tower and contrast", active.clip * per_pair, TRAINING * active.clip * per_pair))
    if active.ssl:
        views, count, latent = data.ssl_views, active.ssl, objective.ssl.features == "latent"
        seen = student("", rates.ssl, views.global_size, 2 * count, bottleneck=latent)
        local = student("", rates.ssl, views.local_size, views.local_views * count, bottleneck=latent)
        items.append(Item("ssl: student", seen.forward + local.forward, seen.training + local.training))
        taught = 2 * count * encoder_flops(vision, views.global_size, bottleneck=latent)
        items.append(Item("ssl: teacher", taught, taught))
        items.append(_ssl_heads(vision, data, objective.ssl, count))
    if not active.reconstruction:
        return items
    size, count = tokenizer.image_size, active.reconstruction
    items.append(student("reconstruction: encoder", rates.reconstruction, size, count, bottleneck=True))
    return items


def _ssl_heads(vision: VisionConfig, data: PretrainDataConfig, config: SslConfig, count: int) -> Item:
    views = data.ssl_views
    patches = _tokens(vision, views.global_size) - 1
    masked = count * 2 * data.masks.probability * patches * (data.masks.ratio_min + data.masks.ratio_max) / 2
    width = config.width(vision)
    of_patch = head_flops(config.patch_head or config.head, width)
    taught = 2 * count * head_flops(config.head, width) + masked * of_patch
    learnt = taught + views.local_views * count * head_flops(config.head, width)
    neighbours = 2 * 2 * count**2 * width if config.koleo else 0
    return Item("ssl: heads", learnt + taught + neighbours, TRAINING * learnt + taught + neighbours)


def encoder_flops(config: VisionConfig, image_size: int, *, bottleneck: bool) -> float:
    """Forward FLOPs of one image, nothing left out."""
    flops = _patch_embed(config, image_size) + _encoder_blocks(config, image_size)
    behind = 2 * _tokens(config, image_size) * config.embed_dim * config.latent_channels
    return flops + (behind if bottleneck and config.has_bottleneck else 0)


def decoder_flops(config: DecoderConfig | None, vision: VisionConfig, image_size: int) -> float:
    """Forward FLOPs of one image by a decoder as training has it; 0 without one."""
    if config is None:
        return 0.0
    tokens, dim = _tokens(vision, image_size) - 1, config.embed_dim
    flops = _transformer(tokens, dim, config.depth, 4 * dim, config.ffn_layer)
    return flops + 2 * tokens * dim * (vision.latent_channels + 3 * vision.patch_size**2)


def text_flops(config: TextConfig) -> float:
    """Forward FLOPs of one caption; causal attention is counted in full, as libraries count it."""
    length, dim = config.context_length, config.embed_dim
    flops = _transformer(length, dim, config.depth, int(dim * config.mlp_ratio), "mlp")
    return flops + 2 * dim * dim


def head_flops(config: DinoHeadConfig, width: int) -> float:
    """Forward FLOPs of one row."""
    hidden, bottleneck = config.hidden_dim, config.bottleneck_dim
    return 2 * (width * hidden + hidden * hidden + hidden * bottleneck + bottleneck * config.prototypes)


def perceptual_flops(config: AnyPerceptualConfig, image_size: int) -> float:
    """Forward FLOPs of the network for one image."""
    return forward_flops(perceptual_shapes(config), torch.empty(1, 3, image_size, image_size, device="meta"))


def paper_flops(parameters: int) -> float:
    """FLOPs as table 1 of the paper counts those of a ViT for a 256-pixel image."""
    return 2.0 * parameters * PAPER_TOKENS


def convolution_flops(tokenizer: ConvolutionalConfig) -> float:
    """Forward FLOPs of an image through encoder and decoder as table 1 counts them: without attention's scores."""
    shapes, latents = _shapes(tokenizer), torch.empty(1, *tokenizer.latent_shape, device="meta")
    encoding = forward_flops(Encoding(shapes), _image(tokenizer), attention=False)
    return encoding + forward_flops(shapes.pixel_decoder, latents, attention=False)


def _encoder(
    name: str, config: VisionConfig, image_size: int, count: int, computed: float, *, bottleneck: bool
) -> Item:
    """Of `count` images, each residual branch on `computed` of them."""
    whole = count * encoder_flops(config, image_size, bottleneck=bottleneck)
    forward = whole - (count - computed) * _encoder_blocks(config, image_size)
    training = TRAINING * forward - (TRAINING - FIRST_LAYER) * count * _patch_embed(config, image_size)
    return Item(name, forward, training)


def _encoder_blocks(config: VisionConfig, image_size: int) -> float:
    hidden = int(config.embed_dim * config.mlp_ratio)
    return _transformer(_tokens(config, image_size), config.embed_dim, config.depth, hidden, config.ffn_layer)


def _patch_embed(config: VisionConfig, image_size: int) -> float:
    return 2.0 * (_tokens(config, image_size) - 1) * 3 * config.patch_size**2 * config.embed_dim


def _transformer(tokens: int, dim: int, depth: int, hidden: int, ffn: FfnName) -> float:
    per_token = 4 * dim**2 + (2 if ffn == "mlp" else 3) * dim * ffn_width(ffn, hidden) + 2 * tokens * dim
    return 2.0 * depth * tokens * per_token


def _tokens(config: VisionConfig, image_size: int) -> int:
    """Patches and the class token."""
    return (image_size // config.patch_size) ** 2 + 1
