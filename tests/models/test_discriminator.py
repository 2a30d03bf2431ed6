"""Discriminators: what they judge, what they read, and norms that do not depend on how often they are asked."""

import pytest
import timm
import torch
from foreign import GOLDEN
from safetensors.torch import load_file, save_file
from tiny import tiny_params

from stages.pretrain import Pretrain
from vtp.artefact import ArtefactError
from vtp.config import ConfigError
from vtp.losses.gan import discriminator_loss
from vtp.models.discriminator import (
    FeatureDiscriminator,
    FeatureDiscriminatorConfig,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    TimmFeaturesConfig,
    TokenHead,
    TokenizerFeaturesConfig,
)
from vtp.models.discriminator_features import TimmFeatures, TokenizerFeatures, spread
from vtp.models.tokenizer import VisualTokenizer


def patch(width=4, depth=2):
    return PatchDiscriminator(PatchDiscriminatorConfig(name="patch", width=width, depth=depth))


def of_tokenizer(blocks=2, size=None):
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(Pretrain.parse(tiny_params()["pretrain"], where="test").tokenizer).eval()
    tokenizer.requires_grad_(False)
    network = TokenizerFeaturesConfig(name="tokenizer", image_size=size, blocks=blocks)
    features = TokenizerFeatures(tokenizer, blocks=blocks, size=size)
    config = FeatureDiscriminatorConfig(name="features", network=network, kernel=3)
    return FeatureDiscriminator(config, features, dim=features.dim, heads=blocks)


def learns(discriminator, real, steps, lr=2e-3):
    optimizer = torch.optim.Adam([p for p in discriminator.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        fake = 0.3 * torch.randn_like(real)
        loss = discriminator_loss(discriminator(real + 0.3 * torch.randn_like(real)), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        discriminator.refine_norms()
    return loss.item()


@pytest.mark.parametrize("discriminator", [patch(8), of_tokenizer()], ids=["patch", "features"])
def test_separates_two_distributions(discriminator):
    torch.manual_seed(0)
    stripes = torch.linspace(-1, 1, 32).sign().expand(8, 3, 32, 32)
    assert learns(discriminator, stripes, 200, lr=5e-3) < 0.6


def test_depth_sets_the_patch_grid():
    for depth, side in ((2, 6), (3, 2)):
        assert patch(depth=depth)(torch.zeros(1, 3, 32, 32)).shape == (1, 1, side, side)


def test_a_sample_is_judged_alone():
    for discriminator in (patch(), of_tokenizer()):
        images = torch.randn(4, 3, 16, 16)
        torch.testing.assert_close(discriminator(images)[2:], discriminator(images[2:]), atol=1e-5, rtol=1e-4)


def test_frozen_features_are_no_part_of_the_state_and_pass_gradients():
    discriminator = of_tokenizer()
    assert {name.split(".")[0] for name in discriminator.state_dict()} == {"heads"}
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    logits = discriminator(images)
    assert logits.shape == (2, 2 * 4)  # heads x tokens
    logits.sum().backward()
    assert images.grad.abs().max() > 0


def test_flops_of_heads_and_of_frozen_features():
    trained, frozen = of_tokenizer().forward_flops(16)
    tokens, dim = 4, 16
    assert trained == 2 * 2 * tokens * (dim * dim + 3 * dim * dim + dim)  # two heads, kernel 3
    assert frozen > trained
    convolutions, nothing = patch().forward_flops(16)
    assert nothing == 0
    assert convolutions > 0


def test_norms_move_once_a_step_and_not_in_forward_passes():
    discriminator = patch()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(3).add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 16, 16)
    first = discriminator(images)
    assert torch.equal(first, discriminator(images))
    for _ in range(50):
        discriminator.refine_norms()
    assert not torch.equal(first, discriminator(images))
    for layer in (discriminator.layers[0], discriminator.layers[-1]):
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_heads_keep_the_tokens():
    head = TokenHead(6, 9)
    assert head(torch.randn(2, 6, 12)).shape == (2, 1, 12)
    with pytest.raises(ConfigError, match="kernel: a convolution over neighbours on both sides needs an odd one"):
        FeatureDiscriminatorConfig.parse(
            {"name": "features", "network": {"name": "tokenizer", "image_size": None, "blocks": 1}, "kernel": 4},
            where="t",
        )
    with pytest.raises(ValueError, match="have 8 tokens, fewer than discriminator.kernel 9"):
        head(torch.randn(2, 6, 8))


def test_a_head_is_rae_s():
    """`golden/rae-decoder-losses`. The biases before its normalisations change nothing, and ours has none.

    A power iteration there takes v and then u, as torch's older spectral norm does, and comes before a forward pass; torch's
    newer one, which is ours, takes u and then v: half an iteration later its vectors are the same.
    """
    official = load_file(GOLDEN / "rae-decoder-losses" / "io.safetensors")
    head = TokenHead(12, 9).eval()
    layers = {"0.0": head.point, "1.fn.0": head.near, "2": head.out}
    norms = {"0.1": head.point_norm, "1.fn.1": head.near_norm}
    spectral = {name: layer.parametrizations.weight[0] for name, layer in layers.items()}

    def begin(where):
        for name, norm in spectral.items():
            for vector in ("u", "v"):
                getattr(norm, f"_{vector}").copy_(official[f"head.{where}.{name}.weight_{vector}"])

    with torch.no_grad():
        for name, layer in layers.items():
            layer.parametrizations.weight.original.copy_(official[f"head.weights.{name}.weight_orig"])
        head.out.bias.copy_(official["head.weights.2.bias"])
        for name, norm in norms.items():
            norm.weight.copy_(official[f"head.weights.{name}.weight"])
            norm.bias.copy_(official[f"head.weights.{name}.bias"])
    begin("weights")
    features = official["head.features"].requires_grad_()
    logits = head(features)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    close(logits.detach(), official["head.logits"])
    close(features.grad, official["head.grad_features"])
    for vector in ("v", "u"):
        PatchDiscriminator.refine_norms(head)
        for name, norm in spectral.items():
            expected = official[f"head.after_one_training_forward.{name}.weight_{vector}"]
            close(getattr(norm, f"_{vector}"), expected)
    begin("after_one_training_forward")
    close(head(features).detach(), official["head.logits_in_training"])


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_blocks_are_spread_over_the_depth():
    assert spread(4, 12) == [2, 5, 8, 11]
    assert spread(2, 2) == [0, 1]
    with pytest.raises(ValueError, match="have 2 blocks"):
        spread(3, 2)


def timm_config(**changes):
    values = {
        "name": "timm",
        "model": "vit_tiny_patch16_224",
        "weights": "w",
        "sha256": "0",
        "image_size": 32,
        "blocks": 3,
        "antialias": True,
        "layer_norm": True,
    }
    return TimmFeaturesConfig(**(values | changes))


def test_timm_features_are_those_of_its_blocks(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    features = TimmFeatures(timm_config(), tmp_path / "w.safetensors")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    maps = features(images)
    assert [x.shape for x in maps] == [(2, 192, 4)] * 3
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    tokens = model.patch_embed(((images + 1) / 2 - mean) / std)
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(tokens)))
    for index, block in enumerate(model.blocks):
        tokens = block(tokens)
        if index == 3:  # the first of 3, 7, 11
            expected = torch.nn.functional.layer_norm(tokens[:, 1:], (192,)).transpose(1, 2)
            plain = tokens[:, 1:].transpose(1, 2)
    torch.testing.assert_close(maps[0], expected, atol=1e-4, rtol=1e-4)
    of_rae = TimmFeatures(timm_config(layer_norm=False, antialias=False), tmp_path / "w.safetensors")
    torch.testing.assert_close(of_rae(images)[0], plain, atol=1e-4, rtol=1e-4)
    large = torch.rand(2, 3, 64, 64) * 2 - 1
    for reads, antialias in ((of_rae, False), (features, True)):
        scaled = torch.nn.functional.interpolate(large, (32, 32), mode="bilinear", antialias=antialias)
        torch.testing.assert_close(reads(large)[0], reads(scaled)[0], atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_unknown_models_and_wrong_weights_are_named(tmp_path):
    with pytest.raises(ArtefactError, match="did you mean"):
        TimmFeatures(timm_config(model="vit_tinny_patch16_224"), tmp_path / "w.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ArtefactError, match="missing"):
        TimmFeatures(timm_config(), tmp_path / "w.safetensors")
