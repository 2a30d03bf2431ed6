"""The AutoencoderKL of the diffusers library as a tokenizer: Stable Diffusion's, SDXL's, FLUX's and their kin.

From fresh weights it is the convolutional autoencoder of latent diffusion (Rombach et al. 2022), which the paper's table 1
has beside its ViTs; pre-training takes its record, a `ConvolutionalConfig`.

Its latents are posterior means, as the encoder gives them: neither scaled nor shifted, because statistics of the cached
latents do that here. The reference LightningDiT samples the posterior instead when it caches those of a VAE; the mean is a
function of the image, and what is drawn around it has a small share of the variance.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from vtp.models.base import LARGEST_SIDE, EncoderLayers, LatentDecoder, TrainableTokenizer, gradients, require_batch

FORMAT_VERSION = 1
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
LOG_VARIANCES = (-30.0, 20.0)  # beyond, they are cut, as the library does


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


class ConvolutionalConfig(Config):
    """Architecture of the convolutional autoencoder of latent diffusion. Convolutions lie on both sides of the latents."""

    name: Literal["convolutional"]
    image_size: int = Field(ge=1, le=LARGEST_SIDE, description="side of the training images in pixels")
    channels: list[int] = Field(
        min_length=1,
        description="channels of every level, that of the pixels first; from one to the next the side halves",
    )
    residual_blocks: int = Field(ge=1, description="residual blocks of a level; the decoder has one more")
    attention_levels: int = Field(
        ge=0, description="levels, from the latents on, in which attention follows every residual block"
    )
    norm_groups: int = Field(ge=1, description="groups of channels that group norm normalises together")
    latent_channels: int = Field(ge=1, description="latent channels d")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.attention_levels > len(self.channels):
            raise ValueError(
                f"attention_levels {self.attention_levels} are more than the {len(self.channels)} of channels"
            )
        if uneven := [width for width in self.channels if width < 1 or width % self.norm_groups]:
            raise ValueError(f"channels {uneven[0]} is not a multiple of norm_groups {self.norm_groups}")
        if self.image_size % self.pixels_per_latent:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {self.pixels_per_latent}, the pixels per latent of "
                f"{len(self.channels)} channels"
            )
        return self

    @property
    def pixels_per_latent(self) -> int:
        """Along a side."""
        return self.autoencoder.factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(d, h, w) at the training image size."""
        side = self.image_size // self.pixels_per_latent
        return (self.latent_channels, side, side)

    @property
    def autoencoder(self) -> AutoencoderKlConfig:
        """The library's arguments."""
        attention = [level >= len(self.channels) - self.attention_levels for level in range(len(self.channels))]
        down, up = {False: "Down", True: "AttnDown"}, {False: "Up", True: "AttnUp"}
        return AutoencoderKlConfig(
            down_block_types=[f"{down[has]}EncoderBlock2D" for has in attention],
            up_block_types=[f"{up[has]}DecoderBlock2D" for has in reversed(attention)],
            block_out_channels=self.channels,
            layers_per_block=self.residual_blocks,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_groups,
        )


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


class Posterior(NamedTuple):
    """What an encoder says of latents: independent normal distributions."""

    mean: Tensor  # [B, d, h, w]
    log_variance: Tensor  # likewise


class DiffusersVae(TrainableTokenizer):
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
        return self._posterior(images).mean

    def posterior(self, images: Tensor, *, grad: bool = False) -> Posterior:
        """Of the latents [B, d, H/f, W/f] of images, as `encode` takes them, which gives the means."""
        with gradients(grad):
            return self._posterior(images)

    def _posterior(self, images: Tensor) -> Posterior:
        require_batch(images, 3, "images", "preprocess")
        if images.shape[2] % self.config.factor or images.shape[3] % self.config.factor:
            given = "x".join(map(str, images.shape[2:]))
            raise ValueError(f"image size {given} is not a multiple of {self.config.factor}, the pixels per latent")
        mean, log_variance = self.quant_conv(self.encoder(denormalise(images) * 2 - 1)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCES))

    def encoder_layers(self) -> EncoderLayers:
        encoder = self.encoder
        top = [encoder.mid_block, encoder.conv_norm_out, encoder.conv_out, self.quant_conv]
        return EncoderLayers(encoder.conv_in, [], [], list(encoder.down_blocks), nn.ModuleList(top))

    def blocks(self) -> Iterator[nn.Module]:
        encoder, decoder = self._halves
        yield from (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks)

    def sharded_units(self) -> Iterator[Sequence[nn.Module]]:
        encoder, decoder = self._halves
        yield [*encoder.down_blocks, encoder.mid_block, encoder]
        yield [decoder.mid_block, *decoder.up_blocks, decoder]

    def recompute(self) -> None:
        for half in self._halves:
            half.gradient_checkpointing = True
            half._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

    @property
    def _halves(self) -> tuple[Any, Any]:
        """The library's encoder and decoder."""
        return self.encoder, self.pixel_decoder.decoder

    def architecture(self) -> Mapping[str, Any]:
        return AutoencoderKlArtefact(
            format_version=FORMAT_VERSION,
            model_type="autoencoder_kl",
            image_size=self._image_size,
            autoencoder=self.config,
        ).model_dump()

    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        return {"autoencoder": self.config.model_dump()}

    def encoder_state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        settings = self.config.model_dump(exclude=_OF_DECODER)
        tensors = {key: value for key, value in self.state_dict().items() if not key.startswith("pixel_decoder.")}
        return {"model": "autoencoder_kl", **settings}, tensors

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` reads; equal weights give equal bytes."""
        self.save(Path(folder), self.state_dict())

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        with whole_folder(folder) as temporary:
            write_json(temporary / "config.json", self.architecture())
            save_tensors(temporary / "model.safetensors", weights, {"format": "pt"})

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
    return AutoencoderKL(**config.model_dump())


# The names that the library's attention had before 2023, in files of that time.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _our_key(key: str) -> str:
    if ".attentions." in key:
        for old, new in _RENAMED.items():
            key = key.replace(f".{old}.", f".{new}.")
    return f"pixel_decoder.{key}" if key.startswith(("decoder.", "post_quant_conv.")) else key
