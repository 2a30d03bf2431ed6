"""What tokenizers of every kind do alike: latents and images without a graph, unless a training asks for one."""

import pytest
import torch
from foreign import BACKBONE, DECODER, GOLDEN, autoencoder

from vtp import VisualTokenizer, load_tokenizer
from vtp.models.decoder import DecoderConfig
from vtp.models.frozen_backbone import BackboneConfig, FrozenBackbone

SIDE = 32
KINDS = ("vtp", "backbone", "vae")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    if request.param == "vtp":
        return VisualTokenizer.from_pretrained(GOLDEN / "vtp-tiny")
    if request.param == "vae":
        folder = tmp_path_factory.mktemp("vae")
        autoencoder().save_pretrained(folder)
        return load_tokenizer(folder)
    torch.manual_seed(0)
    decoder = DecoderConfig.parse(DECODER, where="test")
    return FrozenBackbone(BackboneConfig(model=BACKBONE, input_size=SIDE, image_size=SIDE, decoder=decoder)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def test_nothing_is_recorded_unless_asked(tokenizer, images):
    latents = tokenizer.encode(images.requires_grad_())
    pixels = tokenizer.decode(latents.clone().requires_grad_())
    assert not latents.requires_grad
    assert not pixels.requires_grad
    assert torch.is_grad_enabled()
    assert not latents.is_inference()  # so that a training may begin from them
    recorded = tokenizer.decode(tokenizer.encode(images, grad=True), grad=True)
    assert torch.equal(recorded, pixels)
    recorded.square().mean().backward()
    assert images.grad.abs().sum() > 0
    assert tokenizer.last_layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not tokenizer.decode(tokenizer.encode(images, grad=True), grad=True).requires_grad


def test_modes_change_nothing(tokenizer, images):
    """No dropout, no statistics of batches: a tokenizer may be used while it is trained.

    diffusers lays tensors out otherwise in training, which rounds otherwise.
    """
    evaluated = tokenizer.decode(tokenizer.encode(images))
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokenizer.train()
    try:
        torch.testing.assert_close(tokenizer.decode(tokenizer.encode(images)), evaluated, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    finally:
        tokenizer.eval()


def test_batches_of_another_kind_are_refused(tokenizer, images):
    for wrong in (images[0], images[:, :1], images.byte()):
        with pytest.raises(
            ValueError, match=r"images are .*must be floating-point \[B, 3, H, W\], as `preprocess` gives"
        ):
            tokenizer.encode(wrong)
    latents = tokenizer.encode(images)
    channels = tokenizer.latent_shape[0]
    for wrong in (latents[0], latents[:, 1:], latents.int()):
        with pytest.raises(
            ValueError, match=rf"latents are .*floating-point \[B, {channels}, H, W\], as `encode` gives"
        ):
            tokenizer.decode(wrong)
    with pytest.raises(ValueError, match="33x32"):
        tokenizer.encode(torch.zeros(1, 3, 33, 32))
