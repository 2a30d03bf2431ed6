"""Tokenizers and decoders from folders, whatever their kind."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vtp.artefact import ArtefactError, load_module, load_tensors, read_json, save_tensors, whole_folder, write_json
from vtp.config import Config
from vtp.models.base import LatentDecoder, Tokenizer
from vtp.models.decoder import PixelDecoder, VitDecoderArchitecture
from vtp.models.diffusers_vae import AutoencoderKlDecoderArchitecture, DiffusersVae, VaeDecoder
from vtp.models.frozen_backbone import FrozenBackbone
from vtp.models.hub import checkpoint_folder
from vtp.models.tokenizer import VisualTokenizer

DECODER_VERSION = 2


class DecoderArtefact(Config):
    """`config.json` of a decoder's folder."""

    format_version: Literal[2]
    encoder: str = Field(description="digest of the encoder whose latents it reads")
    decoder: Annotated[VitDecoderArchitecture | AutoencoderKlDecoderArchitecture, Field(discriminator="name")]


def load_tokenizer(folder: str | Path, decoder: str | Path | None = None) -> Tokenizer:
    """A tokenizer, with the tuned decoder of folder `decoder` in place of its own.

    It may be ours, VTP's as published (a hub id too), a frozen backbone, or an AutoencoderKL of diffusers. Raises
    ArtefactError when the folder is none of these, or when the decoder was made for other latents.
    """
    tokenizer = _tokenizer(checkpoint_folder(folder))
    if decoder is not None:
        attach_decoder(tokenizer, Path(decoder), where=folder)
    return tokenizer


def attach_decoder(tokenizer: Tokenizer, folder: Path, *, where: str | Path) -> None:
    """Put the decoder of a folder in the place of the tokenizer's own."""
    config = _read_decoder_config(folder)
    if config.encoder != tokenizer.encoder_digest():
        raise ArtefactError(
            f"{folder} decodes the latents of another encoder than that of {where}; tune a decoder for this tokenizer"
        )
    tokenizer.pixel_decoder = _decoder(config, folder)


def load_decoder(folder: Path) -> tuple[DecoderArtefact, LatentDecoder]:
    """What a decoder's folder says, and the decoder. Raises ArtefactError when it is another folder or damaged."""
    config = _read_decoder_config(folder)
    return config, _decoder(config, folder)


def save_decoder(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the pixel decoder alone, with what it is built from and the digest of its latents' encoder."""
    config = {
        "format_version": DECODER_VERSION,
        "encoder": tokenizer.encoder_digest(),
        "decoder": tokenizer.pixel_decoder.architecture(),
    }
    with whole_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        save_tensors(temporary / "decoder.safetensors", tokenizer.pixel_decoder.state_dict(), {"format": "pt"})


def _tokenizer(folder: Path) -> Tokenizer:
    config = read_json(folder / "config.json")
    kind = config.get("model_type", config.get("_class_name"))
    if kind == "vtp":
        return VisualTokenizer.from_pretrained(folder)
    if kind == "frozen_backbone":
        return FrozenBackbone.from_pretrained(folder)
    if kind == "autoencoder_kl":
        return DiffusersVae.from_pretrained(folder)
    if kind == "AutoencoderKL":
        return DiffusersVae.from_diffusers(folder)
    raise ArtefactError(
        f"{folder}/config.json describes no tokenizer (model_type {kind!r}); known are vtp, frozen_backbone, "
        "autoencoder_kl, and AutoencoderKL of diffusers"
    )


def _read_decoder_config(folder: Path) -> DecoderArtefact:
    values = read_json(folder / "config.json")
    if values.get("format_version") != DECODER_VERSION:
        raise ArtefactError(
            f"{folder}: a decoder of format {values.get('format_version')!r}, this code reads {DECODER_VERSION}; "
            "is this the right folder? If so, tune it again"
        )
    return DecoderArtefact.parse(values, where=str(folder / "config.json"))


def _decoder(config: DecoderArtefact, folder: Path) -> LatentDecoder:
    path, of = folder / "decoder.safetensors", config.decoder

    def build() -> LatentDecoder:
        return PixelDecoder.of(of) if isinstance(of, VitDecoderArchitecture) else VaeDecoder.of(of)

    return load_module(build, load_tensors(path), where=path).eval()
