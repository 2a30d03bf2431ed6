"""ImageNet's classes: synsets in the official order, the names and the prompts that CLIP uses for them."""

from collections.abc import Sequence
from typing import NamedTuple


class Classes(NamedTuple):
    """All 1,000."""

    synsets: list[str]
    names: dict[str, str]  # of each synset, for people and prompts


def imagenet_classes() -> Classes:
    """Synsets in the official order, which is that of their names, with the names that CLIP uses."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo("imagenet-1k").label_names()
    return Classes(synsets, dict(zip(synsets, IMAGENET_CLASSNAMES, strict=True)))


def is_imagenet(class_ids: Sequence[str]) -> bool:
    """Whether these are all 1,000 synsets in the official order."""
    return len(class_ids) == 1000 and list(class_ids) == imagenet_classes().synsets


def openai_templates() -> list[str]:
    """The 80 prompts of Radford et al. (2021), {} stands for the class."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
