"""Tokenizers and decoders from folders, whatever their kind."""

from pathlib import Path

from vtp.artefact import ArtefactError, assign_weights, load_tensors, read_json, save_tensors, whole_folder, write_json
from vtp.models.base import Tokenizer
from vtp.models.tokenizer import VisualTokenizer, build_decoder, official_config, read_config


def load_tokenizer(folder: str | Path, decoder: str | Path | None = None) -> Tokenizer:
    """A tokenizer, with the tuned decoder of folder `decoder` in place of its own.

    Raises ArtefactError when the decoder was made for other latents.
    """
    tokenizer = VisualTokenizer.from_pretrained(folder)
    if decoder is not None:
        attach_decoder(tokenizer, Path(decoder), where=folder)
    return tokenizer


def attach_decoder(tokenizer: VisualTokenizer, folder: Path, *, where: str | Path) -> None:
    """Put the decoder of a folder in the place of the tokenizer's own."""
    encoder = read_json(folder / "config.json").get("vtp_pipeline", {}).get("encoder")
    if encoder != tokenizer.encoder_digest():
        raise ArtefactError(
            f"{folder} decodes the latents of another encoder than that of {where}; tune a decoder for this tokenizer"
        )
    tuned, path = build_decoder(read_config(folder / "config.json")), folder / "decoder.safetensors"
    weights = {key.removeprefix("pixel_decoder."): value for key, value in load_tensors(path).items()}
    assign_weights(tuned, weights, where=path)
    tokenizer.pixel_decoder = tuned.eval()


def save_decoder(tokenizer: VisualTokenizer, folder: Path) -> None:
    """Write the pixel decoder alone, with the architecture that it belongs to and the digest of its latents' encoder."""
    with whole_folder(folder) as temporary:
        config = official_config(tokenizer.config)
        config["vtp_pipeline"]["encoder"] = tokenizer.encoder_digest()
        write_json(temporary / "config.json", config)
        weights = {f"pixel_decoder.{key}": value for key, value in tokenizer.pixel_decoder.state_dict().items()}
        save_tensors(temporary / "decoder.safetensors", weights, {"format": "pt"})
