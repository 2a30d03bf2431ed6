"""Zero-shot classification: images against the text features of prompts about every class (Radford et al. 2021)."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from vtp.artefact import ArtefactError
from vtp.config import Config
from vtp.data.imagenet import imagenet_classes, openai_templates
from vtp.data.shards import Manifest

BATCH = 256  # prompts per call of the text encoder


def _with_place(template: str) -> str:
    if "{}" not in template:
        raise ValueError("every template must hold {} for the class")
    return template


class DataSetPrompts(Config):
    """Class names and templates that the data set came with; without templates the names alone."""

    name: Literal["data_set"]


class OpenaiPrompts(Config):
    """The class names and 80 templates of CLIP's authors, as open_clip has them, for ImageNet's 1,000 classes."""

    name: Literal["openai"]


class GivenPrompts(Config):
    """The data set's class names in other templates."""

    name: Literal["given"]
    templates: list[Annotated[str, AfterValidator(_with_place)]] = Field(
        min_length=1, description="prompts of zero-shot classification; {} stands for the class"
    )


PromptsConfig = Annotated[DataSetPrompts | OpenaiPrompts | GivenPrompts, Field(discriminator="name")]


class Prompts(NamedTuple):
    """What a class is called, and in which sentences."""

    classes: list[str]
    templates: list[str]


def prompts_of(config: DataSetPrompts | OpenaiPrompts | GivenPrompts, manifest: Manifest) -> Prompts:
    """For the classes of a data set, in their order.

    Raises ArtefactError when `openai` is asked and they are not ImageNet's 1,000, in its order.
    """
    if isinstance(config, GivenPrompts):
        return Prompts(manifest.classes, config.templates)
    if isinstance(config, DataSetPrompts):
        return Prompts(manifest.classes, manifest.templates or ["{}"])
    synsets, names = imagenet_classes()
    if manifest.class_ids != synsets:
        raise ArtefactError(
            f"prompts {{name: openai}} are for ImageNet's 1,000 classes in its order, and {_other(manifest, synsets)}; "
            "take {name: data_set}, whose prompts are the same where the shards hold a part of ImageNet, or {name: given}"
        )
    return Prompts([names[synset] for synset in synsets], openai_templates())


def _other(manifest: Manifest, synsets: Sequence[str]) -> str:
    """How the classes of a data set differ from ImageNet's."""
    ids, source = manifest.class_ids, f"these shards (source {manifest.source})"
    if len(ids) != len(synsets):
        return f"{source} have {len(ids)}"
    place = next(place for place, synset in enumerate(synsets) if ids[place] != synset)
    return f"class {place} of {source} is {ids[place]!r}, not {synsets[place]!r}"


@torch.no_grad()
def build_classifier(
    encode_text: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Unit-norm class vectors [C, E]: the mean over templates of unit-norm text features, normalised again.

    `encode_text` maps prompts to features [n, E]; `{}` in a template stands for the class name. Raises ValueError for a
    template without it.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r}: has no {{}} to put the class name in")
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = [encode_text(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
    unit = F.normalize(torch.cat(features).float(), dim=1)
    return F.normalize(unit.unflatten(0, (len(class_names), len(templates))).mean(1), dim=1)


@torch.no_grad()
def top_k_accuracy(
    image_features: Tensor, classifier: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Share of images [N, E] whose label [N] is among the k classes [C, E] of largest inner product, for every k."""
    scores = image_features.float() @ classifier.float().T
    best = scores.topk(min(max(ks), len(classifier)), dim=1).indices
    hits = best == labels[:, None]  # [N, k], at most one in a row
    return {k: hits[:, :k].any(1).double().mean().item() for k in ks}
