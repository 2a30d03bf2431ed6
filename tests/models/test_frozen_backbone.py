"""Frozen backbones against timm."""

import pytest
import timm
import torch
import torch.nn.functional as F
from foreign import BACKBONE, DECODER, backbone_weights
from safetensors.torch import load_file, save_file

from vtp import load_tokenizer
from vtp.artefact import ArtefactError
from vtp.layers.images import normalise
from vtp.models.decoder import DecoderConfig
from vtp.models.frozen_backbone import BackboneConfig, FrozenBackbone, load_backbone


def config_of(name=BACKBONE, *, input_size=32, image_size=64):
    decoder = DecoderConfig.parse(DECODER, where="test")
    return BackboneConfig(model=name, input_size=input_size, image_size=image_size, decoder=decoder)


def tokenizer_of(folder, name=BACKBONE, **sizes):
    path = folder / backbone_weights(folder, name)["weights"]
    torch.manual_seed(1)
    tokenizer = FrozenBackbone(config_of(name, **sizes))
    load_backbone(tokenizer.backbone, tokenizer.config.model, path)
    return tokenizer.eval(), path


def reference(name, path, size):
    """timm's own way to weights in a file for another image size; its last norm without what it learned."""
    overlay = {"file": str(path)}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size, num_classes=0)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size", "token"),  # what stands for the image: the class token before registers, or the mean patch
    [(BACKBONE, 48, True), ("test_vit2", 48, False), ("vit_small_patch14_reg4_dinov2.lvd142m", 42, True)],
)
def test_latents_are_timms_patch_tokens(name, size, token, tmp_path):
    tokenizer, path = tokenizer_of(tmp_path, name, input_size=size, image_size=size)
    model = reference(name, path, size)
    pixels = torch.rand(2, 3, size, size)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    ((patches, prefix),) = model.forward_intermediates(
        (pixels - mean) / std, indices=1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    width = patches.shape[2]
    wanted = F.layer_norm(patches, (width,), eps=1e-6)
    latents = tokenizer.encode(normalise(pixels))
    torch.testing.assert_close(latents, wanted.transpose(1, 2).reshape(2, width, 3, 3), atol=1e-4, rtol=1e-4)
    features = tokenizer.features(normalise(pixels))
    cls = F.layer_norm(prefix[:, 0], (width,), eps=1e-6) if token else wanted.mean(1)
    torch.testing.assert_close(features.cls, cls, atol=1e-4, rtol=1e-4)
    assert tokenizer.latent_shape == (width, 3, 3)
    several = tokenizer.intermediate_features(normalise(pixels), 3)
    assert len(several) == 3
    assert torch.equal(several[-1].patches, features.patches)
    assert not torch.equal(several[0].patches, features.patches)


@torch.no_grad()
def test_images_are_scaled_and_come_back_at_their_size(tmp_path):
    tokenizer, _ = tokenizer_of(tmp_path, input_size=32, image_size=64)
    images = normalise(torch.rand(2, 3, 64, 64))
    latents = tokenizer.encode(images)
    assert latents.shape[1:] == tokenizer.latent_shape == (64, 2, 2)
    assert tokenizer.decode(latents).shape == images.shape
    small = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        tokenizer.features(small).patches, tokenizer.features(images).patches, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(latents.var(1, correction=0), torch.ones(2, 2, 2), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="images are 32x32, this tokenizer encodes those of 64x64"):
        tokenizer.encode(small)
    with pytest.raises(ValueError, match="hides no patches"):
        tokenizer.features(images, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="between 1 and 6"):
        tokenizer.intermediate_features(images, 7)


def test_artefact_is_equal_and_byte_stable(tmp_path):
    tokenizer, _ = tokenizer_of(tmp_path)
    tokenizer.save_pretrained(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), again.decode(again.encode(images)))
    assert not any(parameter.requires_grad for parameter in again.backbone.parameters())
    assert all(parameter.requires_grad for parameter in again.pixel_decoder.parameters())


def test_the_digest_is_that_of_the_encoder(tmp_path):
    tokenizer, _ = tokenizer_of(tmp_path)
    before = tokenizer.encoder_digest()
    tokenizer.pixel_decoder = tokenizer.fresh_decoder()
    assert tokenizer.encoder_digest() == before
    assert tokenizer_of(tmp_path, input_size=64)[0].encoder_digest() != before
    with torch.no_grad():
        tokenizer.backbone.blocks[5].mlp.fc2.bias.add_(1)
    assert tokenizer.encoder_digest() != before


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("vit_tiny_patch16_2244", {}, "no model 'vit_tiny_patch16_2244'; did you mean 'vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_224.nobodys", {}, r"Invalid pretrained tag \(nobodys\)"),
        ("resnet18", {}, "timm cannot build resnet18"),
        ("swin_tiny_patch4_window7_224", {"input_size": 224}, "not a vision transformer"),
        (BACKBONE, {"input_size": 40}, "input_size 40 is not a multiple of the patch size 16"),
        (BACKBONE, {"image_size": 33}, "image_size 33 is not a multiple of 2, the side of the latents"),
    ],
)
def test_models_and_sizes_that_do_not_fit(name, sizes, said):
    with torch.device("meta"), pytest.raises(ArtefactError, match=said):
        FrozenBackbone(config_of(name, **sizes))


def test_weights_of_another_model(tmp_path):
    tokenizer, path = tokenizer_of(tmp_path)
    tensors = load_file(path)
    for changes, said in (
        ({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, r"blocks\.0\.attn\.qkv\.weight has shape \[3, 3\]"),
        (
            {"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)},
            r"\[64, 3, 8, 8\].*\[64, 3, 16, 16\]; fetch the weights",
        ),
        ({"blocks.6.norm1.weight": torch.zeros(64)}, r"unknown blocks\.6\.norm1\.weight"),
    ):
        save_file(tensors | changes, path)
        with pytest.raises(ArtefactError, match=said):
            load_backbone(tokenizer.backbone, tokenizer.config.model, path)
    del tensors["cls_token"]
    save_file(tensors, path)
    with pytest.raises(ArtefactError, match="missing cls_token"):
        load_backbone(tokenizer.backbone, tokenizer.config.model, path)
