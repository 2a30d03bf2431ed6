"""ImageNet's classes: synsets in the official order, the names and the prompts that CLIP uses for them."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from vtp.texts import listed, shown

SYNSET = re.compile(r"n\d{8}(?!\d)")


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


@cache
def synset_names() -> dict[str, str]:
    """What a class is called, by its synset: CLIP's names for the 1,000, the first of WordNet's for the rest of ImageNet."""
    from timm.data import ImageNetInfo

    all_classes = ImageNetInfo("imagenet-22k")
    first = {
        synset: all_classes.label_name_to_description(synset).split(",")[0] for synset in all_classes.label_names()
    }
    return first | imagenet_classes().names


def synsets_of(names: Sequence[str]) -> list[str]:
    """The synsets of some of the 1,000 classes, called by their synset, by WordNet's names or one of them, or by CLIP's.

    Raises ValueError that lists the names that mean no class, or several, or one that another name means too.
    """
    official, meanings, complete = imagenet_classes().synsets, _meanings(), _complete_names()
    known = [meanings.get(_folded(name), frozenset()) for name in names]
    if len(names) == len(official) and all(map(frozenset.__contains__, known, official)):
        return official  # names that two classes share are no question in the official order
    # Lists of complete names tell of classes whose complete name is one of those of another class, such as "maillot".
    if all(name in complete for name in names) and any("," in name for name in names):
        known = [complete[name] for name in names]
    wrong = [
        f"{name!r} ({' or '.join(sorted(found)) or 'none'})"
        for name, found in zip(names, known, strict=True)
        if len(found) != 1
    ]
    synsets = [synset for found in known for synset in found]
    wrong += [
        f"{name!r} (as another name)"
        for name, found in zip(names, known, strict=True)
        if len(found) == 1 and synsets.count(*found) > 1
    ]
    if wrong:
        raise ValueError(f"{listed(list(map(shown, wrong)))} of ImageNet's 1,000 classes")
    return synsets


@cache
def _complete_names() -> dict[str, frozenset[str]]:
    """Synsets by all of WordNet's names in one text, such as `tench, Tinca tinca`."""
    from timm.data import ImageNetInfo

    classes = ImageNetInfo("imagenet-1k")
    return _gathered((classes.label_name_to_description(synset), synset) for synset in classes.label_names())


@cache
def _meanings() -> dict[str, frozenset[str]]:
    """Synsets by any text that may mean them, folded."""
    pairs = [(synset, synset) for synset in imagenet_classes().synsets]
    pairs += [(name, synset) for synset, name in imagenet_classes().names.items()]
    for complete, synsets in _complete_names().items():
        pairs += [(name, synset) for synset in synsets for name in (complete, *complete.split(","))]
    return _gathered((_folded(name), synset) for name, synset in pairs)


def _gathered(pairs: Iterable[tuple[str, str]]) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for name, synset in pairs:
        found[name] = found.get(name, frozenset()) | {synset}
    return found


def _folded(name: str) -> str:
    """A name without what writers of lists change; the synset alone where it stands in front."""
    synset = SYNSET.match(name.strip())
    return synset[0] if synset else " ".join(name.replace("_", " ").lower().split())


def openai_templates() -> list[str]:
    """The 80 prompts of Radford et al. (2021), {} stands for the class."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
