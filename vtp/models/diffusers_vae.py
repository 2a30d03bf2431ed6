"""The AutoencoderKL of the diffusers library as a tokenizer: Stable Diffusion's, SDXL's, FLUX's and their kin.

Its latents are posterior means, as the encoder gives them: neither scaled nor shifted, because statistics of the cached
latents do that here. The reference LightningDiT samples the posterior instead when it caches those of a VAE; the mean is a
function of the image, and what is drawn around it has a small share of the variance.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp.artefact import (
    ArtefactError,
    load_module,
    load_tensors,
    read_json,
    save_tensors,
    siblings,
    whole_folder,
    write_json,
)
from vtp.config import Config
from vtp.layers.images import denormalise, normalise
from vtp.models.base import LARGEST_SIDE, LatentDecoder, Tokenizer, require_batch

FORMAT_VERSION = 1
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


class AutoencoderKlConfig(Config):
    """The library's arguments that decide what is computed; files may leave out those with its defaults."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: list[str] = Field(["DownEncoderBlock2D"], min_length=1)
    up_block_types: list[str] = Field(["UpDecoderBlock2D"], min_length=1)
    block_out_channels: list[int] = Field([64], min_length=1)
    layers_per_block: int = Field(1, ge=1)
    act_fn: str = "silu"
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


# What else a file holds: its origin, the scale that pipelines give to latents, how memory is saved.
_NO_MATTER = {"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}
_OF_DECODER = {"out_channels", "up_block_types", "use_post_quant_conv"}


class AutoencoderKlDecoderArchitecture(Config):
    """All that a `VaeDecoder` is built from."""

    name: Literal["autoencoder_kl"] = "autoencoder_kl"
    autoencoder: AutoencoderKlConfig


class AutoencoderKlArtefact(Config):
    """`config.json` of a tokenizer's folder."""

    format_version: Literal[1]
    model_type: Literal["autoencoder_kl"]
    image_size: int = Field(ge=1, le=LARGEST_SIDE)
    autoencoder: AutoencoderKlConfig


class VaeDecoder(LatentDecoder):
    """The half behind the latents. The library's images lie in [-1, 1]."""

    def __init__(self, config: AutoencoderKlConfig, *, post_quant_conv: nn.Module | None, decoder: nn.Module) -> None:
        super().__init__()
        self._config = config
        self.post_quant_conv = post_quant_conv or nn.Identity()
        self.decoder: Any = decoder

    @classmethod
    def of(cls, architecture: AutoencoderKlDecoderArchitecture) -> Self:
        """As its `architecture` says."""
        whole = _build(architecture.autoencoder)
        return cls(architecture.autoencoder, post_quant_conv=whole.post_quant_conv, decoder=whole.decoder)

    @property
    def last_layer(self) -> nn.Module:
        return self.decoder.conv_out

    @property
    def upscale(self) -> int:
        return self._config.factor

    def architecture(self) -> Mapping[str, Any]:
        return AutoencoderKlDecoderArchitecture(autoencoder=self._config).model_dump()

    def forward(self, latents: Tensor) -> Tensor:
        return normalise((self.decoder(self.post_quant_conv(latents)) + 1) / 2)


class DiffusersVae(Tokenizer):
    """Images [B, 3, H, W] in ImageNet-normalised space to posterior means [B, d, H/f, W/f] and back; it has no features."""

    pixel_decoder: LatentDecoder
    has_features = False

    def __init__(self, config: AutoencoderKlConfig, *, image_size: int) -> None:
        super().__init__()
        if image_size % config.factor:
            raise ArtefactError(
                f"image_size {image_size} is not a multiple of {config.factor}, the pixels per latent of this autoencoder"
            )
        self.config = config
        self._image_size = image_size
        whole = _build(config)
        self.encoder = whole.encoder
        self.quant_conv = whole.quant_conv or nn.Identity()
        self.pixel_decoder = VaeDecoder(config, post_quant_conv=whole.post_quant_conv, decoder=whole.decoder)

    @property
    def image_size(self) -> int:
        return self._image_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self._image_size // self.config.factor
        return (self.config.latent_channels, side, side)

    def _encode(self, images: Tensor) -> Tensor:
        """Means of the posterior [B, d, H/f, W/f]. Raises ValueError for sides that are no multiple of f."""
        require_batch(images, 3, "images", "preprocess")
        if images.shape[2] % self.config.factor or images.shape[3] % self.config.factor:
            given = "x".join(map(str, images.shape[2:]))
            raise ValueError(f"image size {given} is not a multiple of {self.config.factor}, the pixels per latent")
        mean, _ = self.quant_conv(self.encoder(denormalise(images) * 2 - 1)).chunk(2, dim=1)
        return mean

    def encoder_state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        settings = self.config.model_dump(exclude=_OF_DECODER)
        tensors = {key: value for key, value in self.state_dict().items() if not key.startswith("pixel_decoder.")}
        return {"model": "autoencoder_kl", **settings}, tensors

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` reads; equal weights give equal bytes."""
        config = AutoencoderKlArtefact(
            format_version=FORMAT_VERSION,
            model_type="autoencoder_kl",
            image_size=self._image_size,
            autoencoder=self.config,
        )
        with whole_folder(Path(folder)) as temporary:
            write_json(temporary / "config.json", config.model_dump())
            save_tensors(temporary / "model.safetensors", self.state_dict(), {"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote. Raises ArtefactError naming what is missing or does not fit."""
        folder = Path(folder)
        config = AutoencoderKlArtefact.parse(read_json(folder / "config.json"), where=str(folder / "config.json"))
        path = folder / "model.safetensors"
        build = partial(cls, config.autoencoder, image_size=config.image_size)
        return load_module(build, load_tensors(path), where=path).eval()

    @classmethod
    def from_diffusers(cls, folder: str | Path, *, image_size: int | None = None) -> Self:
        """Read a folder as the library writes it; `image_size` None: the size that it was trained for.

        Weights come from `diffusion_pytorch_model.safetensors` alone and are kept in float32. Raises ArtefactError.
        """
        folder = Path(folder)
        values = read_json(folder / "config.json")
        if values.get("_class_name") != "AutoencoderKL":
            raise ArtefactError(
                f"{folder}/config.json: _class_name is {values.get('_class_name')!r}, expected 'AutoencoderKL'; "
                "is this the right folder? In a pipeline of diffusers it is called vae"
            )
        given = {key: value for key, value in values.items() if not key.startswith("_") and key not in _NO_MATTER}
        config = AutoencoderKlConfig.parse(given, where=f"{folder}/config.json")
        side = values.get("sample_size") if image_size is None else image_size
        if not isinstance(side, int) or not 1 <= side <= LARGEST_SIDE:
            raise ArtefactError(
                f"{folder}/config.json: no sample_size of one number up to {LARGEST_SIDE}; import it with an image_size"
            )
        path = folder / DIFFUSERS_WEIGHTS
        if not path.is_file():
            raise ArtefactError(f"{path}: no such file, and pickled weights are not read; {siblings(path)}")
        tensors = {_our_key(key): value.float() for key, value in load_tensors(path).items()}
        return load_module(partial(cls, config, image_size=side), tensors, where=path).eval()


def _build(config: AutoencoderKlConfig) -> Any:  # noqa: ANN401 - diffusers.AutoencoderKL
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise ArtefactError(
            f"an AutoencoderKL needs the library diffusers: pip install 'vtp[diffusers]' ({error})"
        ) from None
    with torch.device("meta"):
        return AutoencoderKL(**config.model_dump())


# The names that the library's attention had before 2023, in files of that time.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _our_key(key: str) -> str:
    if ".attentions." in key:
        for old, new in _RENAMED.items():
            key = key.replace(f".{old}.", f".{new}.")
    return f"pixel_decoder.{key}" if key.startswith(("decoder.", "post_quant_conv.")) else key
