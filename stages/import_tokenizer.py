"""Bring a tokenizer that was not trained here into the pipeline, as an artefact like those that were.

VTP as its authors publish it, an AutoencoderKL of the diffusers library, or a frozen backbone of timm whose decoder is
fresh and trained by `tune_decoder`: the baseline of representation autoencoders.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from stages.runner.run import Input, OptionalInput, Output, main
from vtp.artefact import ArtefactError, verified_weights
from vtp.config import Config
from vtp.draws import address
from vtp.host import Host
from vtp.models.diffusers_vae import DiffusersVae
from vtp.models.frozen_backbone import BackboneConfig, FrozenBackbone, load_backbone
from vtp.models.tokenizer import VisualTokenizer


class VtpSource(Config):
    """A folder as VTP's authors publish it, with or without a decoder: `config.json` and `model.safetensors`."""

    name: Literal["vtp"]


class AutoencoderKlSource(Config):
    """A folder of diffusers: `config.json` and `diffusion_pytorch_model.safetensors`."""

    name: Literal["autoencoder_kl"]
    image_size: int = Field(ge=1, description="side of the images that it is to encode; a multiple of its factor")


class BackboneSource(BackboneConfig):
    """A backbone of timm from a file under weights/, and a decoder with fresh weights."""

    name: Literal["backbone"]
    weights: str = Field(
        pattern=r"\.safetensors$", description="file under weights/: model.safetensors of timm's model"
    )
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="digest that the file must have")
    seed: int = Field(description="seed of the decoder's first weights")


class ImportTokenizer(Config):
    """The section `import_tokenizer`."""

    source: Annotated[VtpSource | AutoencoderKlSource | BackboneSource, Field(discriminator="name")]


def run(
    config: ImportTokenizer,
    *,
    source: Annotated[OptionalInput, "folder as published, of VTP or diffusers; a frozen backbone needs none"] = None,
    tokenizer: Annotated[Output, "folder for the tokenizer"],
    host: Host,
) -> None:
    model = _read(config.source, source, host)
    model.save_pretrained(tokenizer)
    host.record(encoder=model.encoder_digest())


def _read(
    config: VtpSource | AutoencoderKlSource | BackboneSource, folder: Input | None, host: Host
) -> VisualTokenizer | DiffusersVae | FrozenBackbone:
    if isinstance(config, BackboneSource):
        if folder is not None:
            raise ArtefactError(f"a backbone reads weights/{config.weights} alone; take --source {folder} away")
        return _backbone(config, host)
    if folder is None:
        raise ArtefactError(f"import_tokenizer.source is {config.name}: give its folder with --source")
    if isinstance(config, VtpSource):
        return VisualTokenizer.from_pretrained(folder)
    return DiffusersVae.from_diffusers(folder, image_size=config.image_size)


def _backbone(config: BackboneSource, host: Host) -> FrozenBackbone:
    with torch.device("meta"):  # names and sizes are wrong more often than weights, and these are quicker to check
        FrozenBackbone(_plain(config))
    what = f"the weights of timm's {config.model}"
    path = verified_weights(
        host.weights / config.weights, config.sha256, what, instead="name another file in params.yaml"
    )
    model = FrozenBackbone(_plain(config))
    load_backbone(model.backbone, config.model, path)
    torch.manual_seed(address(config.seed, "weights"))
    model.pixel_decoder = model.fresh_decoder()
    return model.eval()


def _plain(config: BackboneSource) -> BackboneConfig:
    return BackboneConfig(**{name: getattr(config, name) for name in BackboneConfig.model_fields})


if __name__ == "__main__":
    main(run)
