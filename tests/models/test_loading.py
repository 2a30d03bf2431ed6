"""Folders of every kind, and decoders that belong to latents."""

import json

import pytest
import torch
from foreign import DECODER, GOLDEN, autoencoder

from vtp import VisualTokenizer, load_tokenizer
from vtp.artefact import ArtefactError, read_json, write_json
from vtp.models.decoder import DecoderConfig, PixelDecoder
from vtp.models.loading import save_decoder


@pytest.fixture
def vae(tmp_path):
    autoencoder().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def changed(decoder):
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vtp", "vae"])
def test_a_decoder_comes_back_and_leaves_the_latents(kind, vae, tmp_path):
    folder = vae if kind == "vae" else GOLDEN / "vtp-tiny"
    tuned = load_tokenizer(folder)
    changed(tuned.pixel_decoder)
    save_decoder(tuned, tmp_path / "decoder")
    save_decoder(tuned, tmp_path / "again")
    for name in ("config.json", "decoder.safetensors"):
        assert (tmp_path / "decoder" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    plain, attached = load_tokenizer(folder), load_tokenizer(folder, tmp_path / "decoder")
    images = torch.randn(1, 3, 64, 64)
    latents = plain.encode(images)
    assert torch.equal(latents, attached.encode(images))
    assert torch.equal(tuned.decode(latents), attached.decode(latents))
    assert not torch.equal(plain.decode(latents), attached.decode(latents))
    assert attached.encoder_digest() == plain.encoder_digest()
    assert attached.last_layer.weight.shape == tuned.last_layer.weight.shape


@torch.no_grad()
def test_a_decoder_of_another_kind_can_read_the_same_latents(vae, tmp_path):
    tokenizer = load_tokenizer(vae)
    blocks = DecoderConfig.parse(DECODER, where="test")
    tokenizer.pixel_decoder = PixelDecoder(blocks, latent_channels=4, patch_size=4, rope_dtype="float32")
    save_decoder(tokenizer, tmp_path / "decoder")
    attached = load_tokenizer(vae, tmp_path / "decoder")
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(attached.decode(latents), tokenizer.decode(latents))
    assert attached.last_layer is attached.pixel_decoder.proj_out


def test_a_decoder_of_other_latents_is_refused(vae, tmp_path):
    save_decoder(load_tokenizer(vae), tmp_path / "decoder")
    with pytest.raises(
        ArtefactError, match="decodes the latents of another encoder than that of .*vtp-tiny; tune a decoder"
    ):
        load_tokenizer(GOLDEN / "vtp-tiny", tmp_path / "decoder")
    with pytest.raises(ArtefactError, match="a decoder of format None, this code reads 2"):
        load_tokenizer(vae, GOLDEN / "vtp-tiny")
    values = read_json(tmp_path / "decoder/config.json")
    values["decoder"]["autoencoder"]["block_out_channels"] = [8, 8, 32]
    write_json(tmp_path / "decoder/config.json", values)
    with pytest.raises(ArtefactError, match=r"decoder\.safetensors does not fit its config\.json"):
        load_tokenizer(vae, tmp_path / "decoder")


def test_a_vtp_decoder_belongs_to_every_tokenizer_of_its_encoder(tmp_path):
    """What CLIP adds does not touch latents."""
    whole = VisualTokenizer.from_pretrained(GOLDEN / "vtp-tiny")
    with torch.no_grad():
        whole.logit_scale.add_(1)
    whole.save_pretrained(tmp_path / "other")
    save_decoder(load_tokenizer(GOLDEN / "vtp-tiny"), tmp_path / "decoder")
    load_tokenizer(tmp_path / "other", tmp_path / "decoder")


def test_says_what_a_folder_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        ArtefactError, match=r"describes no tokenizer \(model_type 'bert'\); known are vtp, frozen_backbone"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(ArtefactError, match="no such file; there is no folder"):
        load_tokenizer(tmp_path / "config.json")
