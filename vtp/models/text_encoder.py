"""Frozen text encoders by name, whose token features a generator reads: CLIP's towers, and language models from a folder.

Which one it is, down to its weights, is a digest: features are those of one encoder, at training and at sampling.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp.artefact import ArtefactError, digest, verified_weights
from vtp.config import Config, ConfigError
from vtp.layers.captions import Captions
from vtp.models.base import state_digest
from vtp.models.text import CaptionTokenizer
from vtp.models.tokenizer import VisualTokenizer, read_config

LOADED = (".safetensors", ".json", ".model", ".txt")  # files of a folder of `transformers` that decide what it says


class TokenizerText(Config):
    """The text tower of a tokenizer, that in the folder of --text-encoder."""

    name: Literal["tokenizer"]


class OpenClipText(Config):
    """The text tower of a model of open_clip, with weights from a file."""

    name: Literal["open_clip"]
    architecture: str = Field(pattern=r"^[\w.-]+$", description="name of open_clip's model, such as ViT-L-14-quickgelu")
    weights: str = Field(pattern=r"^[\w.-]+$", description="file under weights/, .safetensors or .pt")
    sha256: str = Field(description="digest that the file must have")


class TransformersText(Config):
    """A text model of transformers (T5, Gemma and the like) in the folder of --text-encoder, as it was downloaded."""

    name: Literal["transformers"]
    length: int = Field(ge=1, description="tokens of a caption at most; longer ones are cut")
    width: int = Field(ge=1, description="numbers of a token's features, as its config.json has them (hidden_size)")
    layer: int = Field(le=-1, description="layer that is read, from the end: -1 is the last, norm included")


TextEncoderConfig = Annotated[TokenizerText | OpenClipText | TransformersText, Field(discriminator="name")]


class TextEncoderRecord(Config):
    """`text_encoder.json` of a generator, and of a folder of cached captions."""

    encoder: TextEncoderConfig
    digest: str


class CaptionTokens(NamedTuple):
    """Captions as ids, for a text encoder."""

    ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool, true for tokens


class TextEncoder(nn.Module, ABC):
    """Captions to features of their tokens, deterministic, in eval mode. `tokenize` may be called in worker processes."""

    def __init__(self, config: TextEncoderConfig, tokenize: Callable[[Sequence[str]], CaptionTokens]) -> None:
        super().__init__()
        self.config, self.tokenize = config, tokenize

    width: int
    length: int
    digest: str

    @property
    def record(self) -> TextEncoderRecord:
        """Which one it is."""
        return TextEncoderRecord(encoder=self.config, digest=self.digest)

    @torch.no_grad()
    def forward(self, tokens: CaptionTokens) -> Captions:
        """Features [B, L, w] of ids [B, L]."""
        return Captions(self._features(tokens), tokens.mask)

    @abstractmethod
    def _features(self, tokens: CaptionTokens) -> Tensor: ...


class ClipTower(TextEncoder):
    """All tokens behind the last norm, not projected, as Stable Diffusion 1 and U-ViT read them.

    The tower is causal: what stands behind a caption's end tells nothing new, and is masked.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        tower: Any,  # noqa: ANN401 - open_clip's TextTransformer
        ids: Callable[[list[str]], Tensor],
        key: str,
    ) -> None:
        super().__init__(config, _ClipTokens(ids))
        if getattr(tower, "pool_type", None) != "argmax" or getattr(tower, "cls_emb", None) is not None:
            raise ConfigError("a text encoder of CLIP pools at the end of a caption (argmax), and this tower does not")
        tower.output_tokens = True
        self.tower = tower.eval().requires_grad_(False)
        self.length, self.width = (int(each) for each in tower.positional_embedding.shape)
        self.digest = key

    def _features(self, tokens: CaptionTokens) -> Tensor:
        return self.tower(tokens.ids)[1]


class LanguageModel(TextEncoder):
    """Hidden states of an encoder (T5) or of a decoder (Gemma, Qwen) of transformers."""

    def __init__(self, config: TransformersText, model: nn.Module, tokenizer: Any, key: str) -> None:  # noqa: ANN401
        super().__init__(config, _ModelTokens(tokenizer, config.length))
        self.model = model.eval().requires_grad_(False)
        self.length, self.width, self.digest = config.length, config.width, key
        self._layer = config.layer

    def _features(self, tokens: CaptionTokens) -> Tensor:
        out = self.model(input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=True)
        return out.last_hidden_state if self._layer == -1 else out.hidden_states[self._layer]


class _ClipTokens:
    """Ids of open_clip; a caption ends with its largest id. (It pads with 0, which is a word's id too.)"""

    def __init__(self, ids: Callable[[list[str]], Tensor]) -> None:
        self._ids = ids

    def __call__(self, captions: Sequence[str]) -> CaptionTokens:
        ids = self._ids(list(captions))
        return CaptionTokens(ids, torch.arange(ids.shape[1]) <= ids.argmax(1, keepdim=True))


class _ModelTokens:
    """Ids of a tokenizer of transformers, cut and padded behind."""

    def __init__(self, tokenizer: Any, length: int) -> None:  # noqa: ANN401 - transformers' own
        self._tokenizer, self._length = tokenizer, length

    def __call__(self, captions: Sequence[str]) -> CaptionTokens:
        given = {"padding": "max_length", "truncation": True, "max_length": self._length, "padding_side": "right"}
        tokens = self._tokenizer(list(captions), return_tensors="pt", **given)
        return CaptionTokens(tokens["input_ids"], tokens["attention_mask"].bool())


def load_text_encoder(config: TextEncoderConfig, folder: Path | None, *, weights: Path) -> TextEncoder:
    """The encoder that the parameters name: of `folder`, or of a file in the folder `weights`.

    Raises ConfigError where a folder is missing or not needed, or nothing pins what it would load; ArtefactError for what
    does not fit.
    """
    if isinstance(config, OpenClipText):
        if folder is not None:
            raise ConfigError(
                f"--text-encoder {folder}: an encoder of open_clip is a file under weights/; leave it out"
            )
        return _open_clip(config, weights)
    if folder is None:
        raise ConfigError(f"text encoder {config.name!r}: give its folder by --text-encoder, and under the deps")
    return _tower_of(config, folder) if isinstance(config, TokenizerText) else _language_model(config, folder)


def require_record(encoder: TextEncoder, record: TextEncoderRecord, who: str, given: Path | None) -> None:
    """Raises ArtefactError when `who` reads the features of another encoder than this one."""
    if encoder.digest != record.digest:
        raise ArtefactError(
            f"{who} reads the features of another text encoder ({record.encoder.name}) than that of "
            f"{given or 'the parameters'}; name the folder of that one"
        )


def has_text_tower(folder: Path) -> bool:
    """Whether a tokenizer's folder holds a text tower that was trained with it."""
    return (folder / "config.json").exists() and read_config(folder / "config.json").compares_captions


def _tower_of(config: TokenizerText, folder: Path) -> TextEncoder:
    if not has_text_tower(folder):
        raise ArtefactError(
            f"{folder}: this tokenizer has no text tower, or one that does not pool; name one that CLIP trained, the same "
            "for all tokenizers that are compared"
        )
    tokenizer = VisualTokenizer.from_pretrained(folder)
    text = tokenizer.config.text
    assert text is not None  # `has_text_tower`
    key = state_digest({"name": config.name} | text.model_dump(mode="json"), tokenizer.text.state_dict())
    return ClipTower(config, tokenizer.text, CaptionTokenizer(text), key)


def _open_clip(config: OpenClipText, weights: Path) -> TextEncoder:
    import open_clip

    known = open_clip.get_model_config(config.architecture)
    if known is None:
        raise ConfigError(f"open_clip has no architecture {config.architecture!r}; open_clip.list_models() names them")
    text = known.get("text_cfg", {})
    if text.get("hf_tokenizer_name") or text.get("hf_model_name"):
        raise ConfigError(
            f"{config.architecture}: its captions need files of the Hugging Face hub, which no digest pins; choose an "
            "architecture with open_clip's own tokenizer, or the folder of a model by name: transformers"
        )
    path = verified_weights(
        weights / config.weights, config.sha256, f"weights of {config.architecture}", instead="choose another encoder"
    )
    network: Any = open_clip.create_model(config.architecture, load_weights=False, force_custom_text=True)
    try:
        open_clip.load_checkpoint(network, str(path), weights_only=True)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, KeyError) as error:
        raise ArtefactError(f"{path} does not fit {config.architecture}: {str(error)[:300]}") from None
    key = state_digest({"name": config.name, "architecture": config.architecture}, network.text.state_dict())
    return ClipTower(config, network.text, open_clip.get_tokenizer(config.architecture), key)


def _language_model(config: TransformersText, folder: Path) -> TextEncoder:
    """Of files alone: no code from the folder, no pickle, nothing from a hub."""
    try:
        from transformers import (  # pyright: ignore[reportMissingImports] - the extra `text`
            AutoConfig,
            AutoModel,
            AutoTokenizer,
            T5EncoderModel,
        )
    except ImportError:
        raise ConfigError(
            "text encoder 'transformers': the package is not installed; pip install -e '.[text]'"
        ) from None
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if not (folder / "config.json").is_file():
        raise ArtefactError(f"{folder}: no config.json; give the folder of a text model as it was downloaded")
    try:
        kind = T5EncoderModel if AutoConfig.from_pretrained(folder, **given).model_type == "t5" else AutoModel
        model: Any = kind.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **given)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **given)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArtefactError(f"{folder}: transformers cannot load it ({str(error)[:300]}); fetch it again") from None
    if model.config.hidden_size != config.width:
        raise ConfigError(f"{folder}: its features are {model.config.hidden_size} wide; set encoder.width to that")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    files = sorted(path for path in folder.iterdir() if path.suffix in LOADED)
    settings = {"files": {path.name: digest(path) for path in files}} | config.model_dump(mode="json")
    return LanguageModel(config, model, tokenizer, state_digest(settings, {}))
