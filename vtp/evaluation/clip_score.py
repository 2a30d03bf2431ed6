"""CLIP score: the cosine between the embeddings of an image and of its caption (Hessel et al. 2021, without its factor)."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp.artefact import ArtefactError, digest, verified_weights
from vtp.config import ConfigError
from vtp.curation.filter.rules import OpenClipModel, TokenizerModel
from vtp.layers.decode import middle
from vtp.layers.images import centre_crop, normalise
from vtp.models.text import CaptionTokenizer
from vtp.models.tokenizer import VisualTokenizer, read_config

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipScorer:
    """Scores batches of images with their captions on one device."""

    def __init__(
        self,
        model: nn.Module,
        normalise: Callable[[Tensor], Tensor],
        prepare: Callable[["Image"], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        *,
        device: str,
    ) -> None:
        """`prepare` makes uint8 [3, S, S] of an RGB picture, `normalise` of many what the model takes.

        Both it and `tokenize`, whose ids are [B, L], are called in processes without a device.
        """
        self._model = model.eval().requires_grad_(False).to(device)
        self._normalise, self._device = normalise, device
        self.prepare, self.tokenize = prepare, tokenize

    @torch.inference_mode()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, E] float32 of images [B, 3, S, S] uint8, on the device."""
        pixels = self._normalise(images.to(self._device))
        return F.normalize(self._model.encode_image(pixels).float(), dim=-1)  # pyright: ignore[reportCallIssue]

    @torch.inference_mode()
    def embed_captions(self, tokens: Tensor) -> Tensor:
        """Unit vectors [B, E] float32 of the tokens [B, L] of captions, on the device."""
        ids = tokens.to(self._device)
        return F.normalize(self._model.encode_text(ids).float(), dim=-1)  # pyright: ignore[reportCallIssue]

    def score(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Cosines [B] float64 of images [B, 3, S, S] uint8 and the tokens [B, L] of their captions, on the device."""
        return (self.embed_images(images) * self.embed_captions(tokens)).sum(1).double()


def model_name(model: OpenClipModel | TokenizerModel) -> str:
    """A model's name in those of metrics."""
    return model.name if isinstance(model, TokenizerModel) else re.sub("[_.]", "-", model.architecture.lower())


def weights_digest(model: OpenClipModel | TokenizerModel, *, tokenizer: Path | None) -> str:
    """SHA-256 of the file that holds the weights. Raises ArtefactError when that of a tokenizer is missing."""
    if isinstance(model, OpenClipModel):
        return model.sha256
    assert tokenizer is not None
    return digest(tokenizer / "model.safetensors")


def check_model(
    model: OpenClipModel | TokenizerModel, *, weights: Path, tokenizer: Path | None, user: str = "rule clip_score"
) -> None:
    """Raises ArtefactError or ConfigError for weights or an architecture that cannot be used, without loading them.

    `user`: the parameter that asks for the model, for messages.
    """
    if isinstance(model, TokenizerModel):
        if tokenizer is None:
            raise ConfigError(f"{user} scores with a tokenizer: give the command --tokenizer FOLDER")
        if not read_config(tokenizer / "config.json").compares_captions:
            raise ConfigError(
                f"{tokenizer}: this tokenizer has no text tower, or one that does not pool; {user} needs one"
            )
        return
    from open_clip import get_model_config

    config = get_model_config(model.architecture)
    if config is None:
        raise ConfigError(f"open_clip has no architecture {model.architecture!r}; open_clip.list_models() names them")
    text = config.get("text_cfg", {})
    if text.get("hf_tokenizer_name") or text.get("hf_model_name"):
        raise ConfigError(
            f"{model.architecture}: its captions need a tokenizer from the Hugging Face hub, which no digest pins; "
            "choose an architecture with open_clip's own"
        )
    verified_weights(
        weights / model.weights,
        model.sha256,
        f"weights of {model.architecture}",
        instead=f"choose another model for {user}",
    )


def build_scorer(
    model: OpenClipModel | TokenizerModel, *, weights: Path, tokenizer: Path | None, device: str
) -> ClipScorer:
    """The scorer that the parameters name. Raises ArtefactError for weights that do not fit the architecture."""
    if isinstance(model, TokenizerModel):
        assert tokenizer is not None
        ours = VisualTokenizer.from_pretrained(tokenizer)
        size = ours.config.image_size
        assert ours.config.text is not None  # `check_model`
        tokenize = CaptionTokenizer(ours.config.text)
        tokenize([""])  # built here, for all worker processes

        def crop(image: "Image") -> Tensor:
            return torch.from_numpy(np.array(centre_crop(image, size))).permute(2, 0, 1)

        return ClipScorer(ours, normalise, crop, tokenize, device=device)
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose, PILToTensor

    network = open_clip.create_model(model.architecture, load_weights=False)
    path = weights / model.weights
    try:
        open_clip.load_checkpoint(network, str(path), weights_only=True)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, KeyError) as error:
        raise ArtefactError(f"{path} does not fit {model.architecture}: {str(error)[:300]}") from None
    settings = PreprocessCfg(**network.visual.preprocess_cfg)  # pyright: ignore[reportCallIssue,reportAttributeAccessIssue]
    transform: Any = image_transform_v2(settings, is_train=False)
    *steps, _, whiten = transform.transforms
    shape: Any = Compose([*steps, PILToTensor()])
    return ClipScorer(
        network,
        lambda images: whiten(images.float().div_(255)),
        lambda image: shape(middle(image)),
        open_clip.get_tokenizer(model.architecture),
        device=device,
    )
