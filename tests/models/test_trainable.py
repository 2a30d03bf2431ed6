"""The convolutional tokenizer from fresh weights: the paper's counts, its record, its folder, its posterior."""

import warnings

import pytest
import torch
from tiny import CONVOLUTIONAL

from vtp import load_tokenizer
from vtp.config import Config, ConfigError
from vtp.losses.kl import kl_divergence
from vtp.models.diffusers_vae import ConvolutionalConfig, DiffusersVae
from vtp.models.loading import load_decoder, save_decoder
from vtp.models.trainable import AnyTokenizerConfig, build_tokenizer
from vtp.objectives.cost import convolution_flops, decoding_flops, encoding_flops


class Holder(Config):
    tokenizer: AnyTokenizerConfig


def record(**changes):
    return Holder.parse({"tokenizer": CONVOLUTIONAL | changes}, where="test").tokenizer


def test_the_papers_has_its_parameters_and_flops():
    """Table 1: 70.3M, 389.4G; counted from latent diffusion's configuration with 64 channels."""
    config = record(
        image_size=256,
        channels=[128, 128, 256, 256, 512],
        residual_blocks=2,
        attention_levels=1,
        norm_groups=32,
        latent_channels=64,
    )
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 70_293_955
    assert convolution_flops(config) == 389_426_446_336
    # Of 256 tokens with 512 channels, scores and sums: 2 x 2 in the encoder and 1 + 1 in the middle, 3 in the decoder.
    attention = 7 * 2 * 2 * 256**2 * 512
    assert encoding_flops(config) + decoding_flops(config) == 389_426_446_336 + attention
    assert config.latent_shape == tokenizer.latent_shape == (64, 16, 16)
    assert tokenizer.quant_conv.out_channels == 128  # a posterior's means and log-variances


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_levels": 4}, "attention_levels 4 are more than the 3 of channels"),
        ({"norm_groups": 8}, "channels 4 is not a multiple of norm_groups 8"),
        ({"image_size": 18}, "image_size 18 is not a multiple of 4, the pixels per latent"),
        ({"latent_channel": 3}, r"test.tokenizer.latent_channel: unknown key; did you mean 'latent_channels'"),
        ({"residual_blocks": 0}, r"test.tokenizer.residual_blocks: Input should be greater than or equal to 1"),
        ({"name": "convolution"}, "test.tokenizer: no such name 'convolution'; give convolutional, or none for a ViT"),
    ],
)
def test_a_record_that_cannot_be_built_says_what_is_wrong(changes, message):
    with pytest.raises(ConfigError, match=message):
        record(**changes)


def test_a_record_without_name_is_a_vit():
    with pytest.raises(ConfigError, match=r"test.tokenizer.vision: Field required"):
        Holder.parse({"tokenizer": {"image_size": 16}}, where="test")


def test_every_parameter_of_the_encoder_has_one_depth():
    tokenizer = build_tokenizer(record())
    layers = list(tokenizer.encoder_layers().parameters())
    assert len(layers) == len(set(layers))
    decoder = set(tokenizer.pixel_decoder.parameters())
    assert set(layers) == set(tokenizer.parameters()) - decoder
    blocks = [parameter for block in tokenizer.blocks() for parameter in block.parameters()]
    assert set(blocks) & set(layers)
    assert set(blocks) & decoder


@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(tmp_path):
    tokenizer = build_tokenizer(record())
    tokenizer.save_pretrained(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    assert isinstance(again, DiffusersVae)
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    images = torch.randn(2, 3, 16, 16)
    latents = again.encode(images)
    assert torch.equal(latents, tokenizer.encode(images))
    assert torch.equal(latents, again.posterior(images).mean)
    assert again.latent_shape == record().latent_shape == latents.shape[1:]
    assert again.encoder_digest() == tokenizer.encoder_digest()
    save_decoder(again, tmp_path / "decoder")
    tuned = load_tokenizer(tmp_path / "a", tmp_path / "decoder")
    torch.testing.assert_close(tuned.decode(latents), tokenizer.decode(latents))
    assert load_decoder(tmp_path / "decoder")[0].encoder == tokenizer.encoder_digest()


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    tokenizer, images = build_tokenizer(record()), torch.randn(2, 3, 16, 16)
    gradients = []
    for _ in range(2):
        tokenizer.zero_grad()
        tokenizer.decode(tokenizer.encode(images, grad=True), grad=True).square().mean().backward()
        gradients.append([p.grad.clone() for p in tokenizer.parameters()])
        tokenizer.recompute()
    assert tokenizer.encoder.gradient_checkpointing
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_the_divergence_is_torchs_in_double_precision():
    draws = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(2, 3, 4, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    theirs = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(torch.zeros_like(mean), 1.0))
    torch.testing.assert_close(kl_divergence(mean, log_variance), theirs.mean(), rtol=1e-12, atol=0)
    assert kl_divergence(torch.zeros(1), torch.zeros(1)) == 0
    assert kl_divergence(mean.bfloat16(), log_variance.bfloat16()).dtype == torch.float32


def test_the_record_is_written_and_read_again():
    holder = Holder(tokenizer=record())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydantic's, of a value that is not what its field says
        values = holder.model_dump(mode="json")
    assert Holder.parse(values, where="test") == holder


def test_record_is_the_librarys_arguments():
    config = record(attention_levels=2)
    assert isinstance(config, ConvolutionalConfig)
    assert config.autoencoder.down_block_types == ["DownEncoderBlock2D", *["AttnDownEncoderBlock2D"] * 2]
    assert config.autoencoder.up_block_types == [*["AttnUpDecoderBlock2D"] * 2, "UpDecoderBlock2D"]
