"""AutoencoderKLs against the library itself."""

import json

import pytest
import torch
from foreign import autoencoder
from safetensors.torch import load_file, save_file

from vtp import load_tokenizer
from vtp.artefact import ArtefactError
from vtp.layers.images import denormalise, normalise
from vtp.models.diffusers_vae import DIFFUSERS_WEIGHTS, DiffusersVae


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    model, folder = autoencoder(), tmp_path_factory.mktemp("vae") / "vae"
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
@pytest.mark.parametrize("convolutions", [True, False])
def test_encodes_means_and_decodes_as_the_library_does(convolutions, tmp_path):
    """FLUX's autoencoder has no convolutions around the latents."""
    model = autoencoder(use_quant_conv=convolutions, use_post_quant_conv=convolutions)
    model.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    pixels = torch.rand(2, 3, 32, 48)
    latents = tokenizer.encode(normalise(pixels))
    torch.testing.assert_close(latents, model.encode(pixels * 2 - 1).latent_dist.mean, atol=1e-5, rtol=1e-5)
    decoded = denormalise(tokenizer.decode(latents))
    torch.testing.assert_close(decoded, (model.decode(latents).sample + 1) / 2, atol=1e-5, rtol=1e-5)
    assert tokenizer.latent_shape == (4, 8, 8)
    assert tokenizer.image_size == 32
    assert tokenizer.last_layer.weight.shape[0] == 3
    assert not tokenizer.has_features
    with pytest.raises(ValueError, match="DiffusersVae has no features"):
        tokenizer.features(normalise(pixels))


def test_takes_and_gives_pil_images(published):
    from PIL import Image

    tokenizer = load_tokenizer(published[1])
    batch = tokenizer.preprocess(Image.new("RGB", (50, 40), (255, 0, 0)))
    assert batch.shape == (1, 3, 32, 32)
    assert tokenizer.to_pil(batch)[0].getpixel((0, 0)) == (255, 0, 0)


def test_artefact_is_equal_and_byte_stable(published, tmp_path):
    _, folder = published
    first = DiffusersVae.from_diffusers(folder, image_size=64)
    first.save_pretrained(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.encoder_digest() == first.encoder_digest() == load_tokenizer(folder).encoder_digest()
    assert again.image_size == 64


def test_the_digest_is_that_of_the_encoder(published):
    _, folder = published
    tokenizer = load_tokenizer(folder)
    before = tokenizer.encoder_digest()
    with torch.no_grad():
        next(tokenizer.pixel_decoder.parameters()).add_(1)
        assert tokenizer.encoder_digest() == before
        next(tokenizer.quant_conv.parameters()).add_(1)
    assert tokenizer.encoder_digest() != before


def rewritten(source, folder, *, config=None, rename=None, drop=None):
    folder.mkdir()
    values = json.loads((source / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {(rename or str)(key): value for key, value in load_file(source / DIFFUSERS_WEIGHTS).items()}
    save_file({key: value for key, value in tensors.items() if key != drop}, folder / DIFFUSERS_WEIGHTS)
    return folder


def test_reads_names_of_old_and_half_precision(published, tmp_path):
    """sd-vae-ft-mse still has the attention's names of 2022; SDXL's file is in half precision."""
    _, source = published
    new, old = ("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")

    def rename(key):
        for mine, theirs in zip(new, old, strict=True):
            key = key.replace(f".{mine}.", f".{theirs}.")
        return key

    aged = rewritten(source, tmp_path / "old", rename=rename)
    assert any(".proj_attn." in key for key in load_file(aged / DIFFUSERS_WEIGHTS))
    assert load_tokenizer(aged).encoder_digest() == load_tokenizer(source).encoder_digest()
    half = rewritten(source, tmp_path / "half")
    save_file({k: v.half() for k, v in load_file(half / DIFFUSERS_WEIGHTS).items()}, half / DIFFUSERS_WEIGHTS)
    assert {parameter.dtype for parameter in load_tokenizer(half).parameters()} == {torch.float32}


def test_says_what_does_not_fit(published, tmp_path):
    _, source = published
    with pytest.raises(ArtefactError, match="image_size 30 is not a multiple of 4"):
        DiffusersVae.from_diffusers(source, image_size=30)
    with pytest.raises(ArtefactError, match=r"missing quant_conv\.bias"):
        load_tokenizer(rewritten(source, tmp_path / "a", drop="quant_conv.bias"))
    with pytest.raises(ValueError, match="groups: unknown key"):
        load_tokenizer(rewritten(source, tmp_path / "b", config={"groups": 3}))
    with pytest.raises(ValueError, match=r"in_channels: Input should be 3"):
        load_tokenizer(rewritten(source, tmp_path / "c", config={"in_channels": 4}))
    with pytest.raises(ArtefactError, match="_class_name is 'UNet2DConditionModel'"):
        DiffusersVae.from_diffusers(rewritten(source, tmp_path / "d", config={"_class_name": "UNet2DConditionModel"}))
    pickled = rewritten(source, tmp_path / "e")
    (pickled / DIFFUSERS_WEIGHTS).rename(pickled / "diffusion_pytorch_model.bin")
    with pytest.raises(
        ArtefactError, match=r"pickled weights are not read; .* holds config.json, diffusion_pytorch_mod"
    ):
        load_tokenizer(pickled)
    with pytest.raises(ArtefactError, match="import it with an image_size"):
        load_tokenizer(rewritten(source, tmp_path / "f", config={"sample_size": [32, 32]}))
