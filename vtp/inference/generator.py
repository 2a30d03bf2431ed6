"""A generator and the tokenizer of its latents, as one thing that draws pictures.

generator = vtp.load_generator("work/generator")
pictures = generator.sample("frog", count=8)  # one that is told captions: generator.sample("a frog left of a dog")
pictures[0].save("frog.png")
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from vtp.artefact import ArtefactError
from vtp.config import did_you_mean
from vtp.flow import SamplerConfig, draw_noise, sample
from vtp.inference.asked import Asked, plain_prompts, record_of, text_encoder_beside
from vtp.layers.captions import Condition
from vtp.layers.images import to_uint8
from vtp.models.base import Tokenizer
from vtp.models.generator_folder import SAMPLER_FILE
from vtp.models.lightningdit import LightningDiT
from vtp.models.loading import load_tokenizer
from vtp.models.text_encoder import TextEncoder, load_text_encoder, require_record

if TYPE_CHECKING:
    from PIL.Image import Image

    Class = str | SupportsIndex  # a name, or a label: an integer of Python, numpy or torch

SHOWN = 40  # names of classes that a message lists


def load_generator(
    folder: str | Path,
    tokenizer: str | Path | None = None,
    decoder: str | Path | None = None,
    text_encoder: str | Path | None = None,
    *,
    device: str = "cpu",
    weights: str | Path = "weights",
) -> "PictureGenerator":
    """What the stage train_generator wrote, with the tokenizer whose latents it learnt.

    Without `tokenizer` these are the folders `tokenizer` and, if there is one, `decoder` beside the generator's or one
    level above. A tokenizer that is given decodes with its own decoder, unless one is given too. A generator that is told
    captions needs their encoder: `text_encoder`, or the folder of that name beside it, or its tokenizer's own text tower;
    one of open_clip is a file in the folder `weights`. Raises ArtefactError when a folder is missing, or when the generator
    learnt the latents, or the features, of another encoder.
    """
    folder = Path(folder)
    model = LightningDiT.from_pretrained(folder)
    if model.space is None:
        raise ArtefactError(
            f"{folder}: config.json does not say which latents this generator learnt; one of the stage train_generator does"
        )
    given = Path(tokenizer) if tokenizer is not None else _beside(folder, "tokenizer")
    if given is None:
        raise ArtefactError(f"{folder}: no folder `tokenizer` beside it; name the one whose latents it learnt")
    if decoder is None and tokenizer is None:
        decoder = _beside(folder, "decoder")
    pixels = load_tokenizer(given, decoder)
    pixels.require_decoder(given)
    if pixels.encoder_digest() != model.space.encoder:
        raise ArtefactError(f"{folder} learnt the latents of another encoder than that of {given}; name its tokenizer")
    if model.sampler is None:
        raise ArtefactError(f"{folder}: no {SAMPLER_FILE} says how to draw from it; train_generator writes one")
    sampler = SamplerConfig.parse(model.sampler, where=str(folder / SAMPLER_FILE))
    encoder = None
    if model.config.text is not None:
        record = record_of(model, folder)
        path = None if text_encoder is None else Path(text_encoder)
        if path is None:
            places = [place for place in (_beside(folder, "text_encoder"), given) if place is not None]
            path = text_encoder_beside(folder, record, places)
        encoder = load_text_encoder(record.encoder, path, weights=Path(weights)).to(device)
        require_record(encoder, record, str(folder), path)
    return PictureGenerator(model.to(device), pixels.to(device).eval(), sampler, encoder)


class PictureGenerator:
    """Draws pictures of classes, or of prompts with a text encoder. `sampler` says how, unless a call says otherwise."""

    def __init__(
        self,
        model: LightningDiT,
        tokenizer: Tokenizer,
        sampler: SamplerConfig,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        assert model.space is not None
        self.model = model
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.text_encoder = text_encoder
        self.space = model.space

    @property
    def classes(self) -> list[str]:
        """Names, in the order of the labels; none of a generator that is told captions."""
        return self.space.classes

    def sample(
        self,
        asked: "Class | Iterable[Class]",
        count: int = 1,
        *,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        batch_size: int = 16,
        progress: "Callable[[int], object] | None" = None,
        **changes: Any,  # noqa: ANN401 - of the record
    ) -> "list[Image]":
        """`count` pictures of every class or prompt, one after the other.

        A class is a name or a label, an integer of any library; a prompt any text. `size` is height and width of the
        pictures in pixels, of whole tokens; None: the smallest squares that it learnt. Picture n of each begins with the
        noise of index n, which is that of the stage generate with this seed and size. `progress` is told how many more are
        done. `changes` are those of the sampler, such as `guidance_scale=2.0`. Raises ValueError for a class that there is
        not, an empty prompt and a size that cannot be, ConfigError for a sampler that cannot be.
        """
        from PIL import Image

        pixels = self.draw(asked, count, size=size, seed=seed, batch_size=batch_size, progress=progress, **changes)
        return [Image.fromarray(picture.numpy()) for picture in pixels.permute(0, 2, 3, 1)]

    def draw(
        self,
        asked: "Class | Iterable[Class]",
        count: int = 1,
        *,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        batch_size: int = 16,
        progress: "Callable[[int], object] | None" = None,
        **changes: Any,  # noqa: ANN401 - of the record
    ) -> Tensor:
        """What `sample` makes pictures of: uint8 [asked * count, 3, H, W], on the CPU."""
        several = isinstance(asked, Iterable) and not isinstance(asked, str) and getattr(asked, "ndim", 1) > 0
        given: list[Any] = list(asked) if several else [asked]  # pyright: ignore[reportArgumentType]
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; draw one picture at a time at least")
        if count < 1 or not given:
            raise ValueError(f"{count} pictures of {len(given)} classes are none; ask for one at least")
        known, places = self._asked(given)
        labels, indices = np.repeat(places, count), list(range(count)) * len(given)
        sampler = SamplerConfig.parse(self.sampler.model_dump() | changes, where="sampler")
        if sampler.guide == "generator":
            raise ValueError("guide: generator needs a weaker one beside this; the stage generate takes it by --guide")
        shape = self.model.latents_of(size, self.tokenizer.pixels_per_latent)
        parts = []
        for first in range(0, len(labels), batch_size):
            part = slice(first, first + batch_size)
            condition = known.conditions.of(labels[part], self._device)
            parts.append(self._draw(condition, indices[part], seed, shape, sampler))
            if progress is not None:
                progress(len(parts[-1]))
        return torch.cat(parts)

    def _asked(self, given: list[Any]) -> tuple[Asked, list[int]]:
        """What there is to be asked for, and where that which is given stands in it."""
        if self.text_encoder is None:
            return Asked.of_classes(self.classes, self.space.labels), [self.label(name) for name in given]
        return Asked.of_prompts(plain_prompts(given), self.text_encoder), list(range(len(given)))

    @property
    def _device(self) -> torch.device:
        return self.model.pos_embed.device

    def label(self, name: "Class") -> int:
        """That of a class. Raises ValueError for one that there is not, that was not trained, or whose name several have."""
        if not isinstance(name, str) or (name not in self.classes and name.isdecimal()):
            label = _integer(name)
            if not 0 <= label < len(self.classes):
                raise ValueError(f"no class {label}; labels are 0 to {len(self.classes) - 1}")
            return self._trained(label)
        labels = [label for label, known in enumerate(self.classes) if known == name]
        if not labels:
            shown = ", ".join(self.classes[:SHOWN]) + (", ..." if len(self.classes) > SHOWN else "")
            raise ValueError(f"no class {name!r}{did_you_mean(name, self.classes)}; known are {shown}")
        if len(labels) > 1:
            raise ValueError(f"several classes are called {name!r}; say which: {', '.join(map(str, labels))}")
        return self._trained(labels[0])

    def _trained(self, label: int) -> int:
        if label in self.space.untrained:
            raise ValueError(
                f"class {self.classes[label]!r} had no training picture: the generator knows nothing of it"
            )
        return label

    @torch.no_grad()
    def _draw(
        self,
        condition: Condition,
        indices: Sequence[int],
        seed: int,
        shape: tuple[int, int, int],
        sampler: SamplerConfig,
    ) -> Tensor:
        """uint8 [n, 3, H, W] on the CPU."""
        noise = draw_noise(seed, indices, shape)
        drawn = sample(self.model, noise.to(self._device), condition, **sampler.arguments())
        return to_uint8(self.tokenizer.decode(self.space.statistics.denormalise(drawn))).cpu()


def _integer(label: Any) -> int:  # noqa: ANN401 - whatever is given
    """Raises ValueError for what is no integer; a truth value is none."""
    if not (isinstance(label, bool) or str(getattr(label, "dtype", "")).endswith("bool")):
        with suppress(TypeError):
            return int(label) if isinstance(label, str) else index(label)
    raise ValueError(f"no class {label!r}; a class is a name or an integer, given is a {type(label).__name__}")


def _beside(folder: Path, name: str) -> Path | None:
    """The folder of that name beside `folder`, or beside the nearest folder above it that has one.

    One that cannot be read is found too: another decoder than the one that lies there would be drawn with in silence.
    """
    return next((parent / name for parent in folder.resolve().parents[:2] if (parent / name).exists()), None)
