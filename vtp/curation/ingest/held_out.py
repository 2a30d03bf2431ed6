"""Combinations that validation alone shows: captions whose parts a model has seen, and which it never saw together.

Hashes of the seed and the combination decide, and no draw of a picture: more samples change nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple

from pydantic import Field

from vtp.config import Config, ConfigError
from vtp.curation.ingest.scenes import BACKGROUNDS, NUMBERS, Kind, Scene, pairs
from vtp.draws import address

OfObject = Literal["backgrounds", "counts", "pairs"]
LARGEST_SHARE = 0.25  # so that three objects always have a background in common that is held out for none of them
ADDRESSES = 1 << 63
# What a scene is about: the combination that is held out where validation shows it.
ABOUT: Mapping[Kind, OfObject | Literal["words"]] = {
    "single": "backgrounds",
    "places": "pairs",
    "counts": "counts",
    "relations": "pairs",
    "words": "words",
}


class HeldOutConfig(Config):
    """Shares of combinations that training never shows, of those of an object at least one; 0: none."""

    backgrounds: float = Field(ge=0, le=LARGEST_SHARE, description="share of the backgrounds of each object")
    counts: float = Field(ge=0, le=LARGEST_SHARE, description="share of the numbers, 1 to 4, of each object")
    pairs: float = Field(
        ge=0,
        le=LARGEST_SHARE,
        description="share of what each object lies left of, or above; by a relation and by places alike",
    )
    words: float = Field(ge=0, le=LARGEST_SHARE, description="share of all words that could be written")


class Combination(NamedTuple):
    """Something of an object, by its number among all that there is."""

    kind: OfObject
    label: int
    option: int


class HeldOutCombinations:
    """Which scenes of so many classes a split may show."""

    def __init__(self, config: HeldOutConfig, *, seed: int, classes: int) -> None:
        self._config, self._seed, self._classes = config, seed, classes

    def admits(self, split: str, scene: Scene) -> bool:
        """Whether training shows nothing that is held out, and validation what the scene is about held out.

        Any other split may show every scene.
        """
        if split not in ("train", "validation"):
            return True
        held = {each.kind for each in _combinations(scene) if each.option in self._held(each.kind, each.label)}
        words = {"words"} if scene.word is not None and self.holds_word(scene.word.text) else set()
        if split == "train":
            return not held | words
        return ABOUT[scene.kind] in held | words or not getattr(self._config, ABOUT[scene.kind])

    def holds_word(self, word: str) -> bool:
        """Whether a word is held out."""
        number = int.from_bytes(word.encode(), "big")
        return address(self._seed, "held_out/words", number) < self._config.words * ADDRESSES

    def require_words(self, words: Sequence[str]) -> None:
        """Raises ConfigError where none of several words is held out, and validation would wait for one in vain."""
        if words and self._config.words and not any(map(self.holds_word, words)):
            raise ConfigError(f"held_out.words {self._config.words}: none of {len(words)} words is; raise the share")

    def _held(self, kind: OfObject, label: int) -> frozenset[int]:
        return _held_options(kind, label, getattr(self._config, kind), self._seed, self._classes)


@cache
def _held_options(kind: OfObject, label: int, share: float, seed: int, classes: int) -> frozenset[int]:
    """Those of an object that are held out: the first by their hashes."""
    options = {
        "backgrounds": range(len(BACKGROUNDS)),
        "counts": range(len(NUMBERS)),
        "pairs": [option for option in range(2 * classes) if option // 2 != label],
    }[kind]
    ranked = sorted(options, key=lambda option: address(seed, f"held_out/{kind}", label, option))
    return frozenset(ranked[: max(1, round(share * len(options)))] if share else ())


def _combinations(scene: Scene) -> Iterator[Combination]:
    """All of a scene that is drawn."""
    for thing in scene.things:
        yield Combination("backgrounds", thing.label, list(BACKGROUNDS).index(str(scene.background)))
        if thing.number is not None:
            yield Combination("counts", thing.label, thing.number - 1)
    for first, second, relation in pairs(scene):
        yield Combination("pairs", first, 2 * second + (relation == "above"))
