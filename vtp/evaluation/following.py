"""How far samples show what their prompts say, beside reconstructions and real pictures of held-out captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vtp.config import ConfigError
from vtp.curation.filter.rules import OpenClipModel, TokenizerModel
from vtp.data.dataset import ShardDataset
from vtp.distributed import own_rows
from vtp.evaluation.image_sets import CaptionedPictures, ImageSet
from vtp.evaluation.prompt_measures import PromptFollowing, PromptMeasure, build_measures, measure_facts
from vtp.evaluation.samples import Samples
from vtp.evaluation.scene_measure import SceneMeasure
from vtp.host import Host
from vtp.models.scene_detector import SceneDetector
from vtp.models.text_encoder import OpenClipText, TextEncoderRecord, TokenizerText, load_text_encoder

HELD_OUT = "validation"  # split of the real pictures


class JudgePlaces(NamedTuple):
    """Folders of the command."""

    shards: Path | None
    clip: Path | None
    detector: Path | None


class Following:
    """All measures, which are asked of one set of images after another."""

    def __init__(
        self, measures: Sequence[PromptMeasure], real: CaptionedPictures | None, facts: Mapping[str, str]
    ) -> None:
        self._measures, self._real = measures, real
        self.facts = facts  # what measured, for provenance

    def of(self, images: ImageSet) -> Sequence[PromptMeasure]:
        """Those that images are shown to; none where nobody says what was asked."""
        return self._measures if self._measures and images.prompts is not None else ()

    def figures(self, images: ImageSet) -> dict[str, float]:
        """Of the images that were shown since the last call; every rank must ask."""
        return {name: value for measure in self.of(images) for name, value in measure.figures().items()}

    def of_real(self, batch_size: int) -> dict[str, float]:
        """Of real pictures, the ceiling; nothing without them."""
        real = self._real
        if real is None or not self._measures:
            return {}
        numbers = own_rows(-(-len(real) // batch_size))
        for number, images in zip(numbers, real.batches(batch_size, numbers), strict=True):
            asked = real.prompts[number * batch_size : (number + 1) * batch_size]
            for measure in self._measures:
                measure.add(images, asked)
        return self.figures(real)


def build_following(
    config: PromptFollowing | None,
    drawn: Samples | None,
    sets: Sequence[ImageSet],
    places: JudgePlaces,
    *,
    count: int,
    side: int,
    host: Host,
) -> Following:
    """The measures that the parameters name, for all that `sets` were asked; `count` real pictures of `side` pixels.

    Raises ConfigError where samples were asked for classes, or a folder is given in vain.
    """
    if config is None:
        if any(places):
            raise ConfigError("--shards, --clip and --detector are of evaluate_generator.prompts, which is null")
        return Following((), None, {})
    if drawn is None or drawn.config.prompts is None:
        raise ConfigError(
            "evaluate_generator.prompts is for samples of prompts, and these are of classes; set it to null"
        )
    real = None
    if places.shards is not None:
        real = CaptionedPictures(ShardDataset(places.shards, HELD_OUT), count, size=side)
    asked = [text for images in (*sets, *([real] if real else [])) for text in images.prompts or ()]
    measures = build_measures(
        config,
        prompts=asked,
        weights=host.weights,
        tokenizer=places.clip,
        own=lambda model: _conditions(model, drawn, places.clip),
        device=host.device,
        scenes=_scenes(places.detector, host),
    )
    return Following(measures, real, measure_facts(config, tokenizer=places.clip))


def _scenes(detector: Path | None, host: Host) -> SceneMeasure | None:
    return None if detector is None else SceneMeasure(SceneDetector.from_pretrained(detector).to(host.device))


def _conditions(model: OpenClipModel | TokenizerModel, drawn: Samples, clip: Path | None) -> bool:
    """Whether the CLIP that judges is the one whose text tower conditioned the generator."""
    record = TextEncoderRecord.parse(drawn.config.text_encoder, where=str(drawn.folder / "config.json"))
    if isinstance(model, OpenClipModel):
        return isinstance(record.encoder, OpenClipText) and record.encoder.sha256 == model.sha256
    if not isinstance(record.encoder, TokenizerText):
        return False
    with torch.device("cpu"):
        return load_text_encoder(record.encoder, clip, weights=Path()).digest == record.digest
