"""What the pictures of the embedded data show, and the captions that say it: one table of phrases writes and reads them.

A scene holds things (pictures with a name), each perhaps counted or at a named place, one relation, a background and a
written word. A caption says all of it or a part, and `CaptionGrammar.parse` gives back what it says.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

SceneKind = Literal["places", "counts", "relations", "words"]
Kind = Literal["single", SceneKind]
CaptionStyle = Literal["full", "short"]

BACKGROUNDS = {
    "white": (255, 255, 255),
    "light grey": (214, 217, 222),
    "sky blue": (165, 212, 245),
    "mint green": (178, 232, 200),
    "pale yellow": (252, 240, 170),
    "peach": (252, 211, 180),
    "pink": (248, 190, 208),
    "lavender": (212, 196, 240),
}
INKS = {  # of words; dark, so that they are read on every background
    "black": (20, 20, 24),
    "red": (196, 24, 32),
    "blue": (24, 64, 176),
    "green": (0, 104, 48),
    "purple": (112, 32, 144),
    "brown": (112, 64, 24),
}
NUMBERS = ("one", "two", "three", "four")
# Directions in which the first thing lies from the second, right and down.
RELATIONS = {"left of": (-1.0, 0.0), "right of": (1.0, 0.0), "above": (0.0, -1.0), "below": (0.0, 1.0)}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Centres of named places, in shares of width and height.
PLACES = {
    "on the left": (0.26, 0.5),
    "on the right": (0.74, 0.5),
    "at the top": (0.5, 0.26),
    "at the bottom": (0.5, 0.74),
    "at the top left": (0.27, 0.27),
    "at the top right": (0.73, 0.27),
}
LAYOUTS = (
    ("on the left", "on the right"),
    ("at the top", "at the bottom"),
    ("at the top left", "at the top right", "at the bottom"),
)


def _at_places(layout: Sequence[str]) -> str:
    parts = [f"a {{{number}}} {place}" for number, place in enumerate(layout)]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


# Captions by what is drawn and by style. {0}, {1}, {2} are names of things; those of places stand in the order of LAYOUTS.
PHRASES: Mapping[Kind, Mapping[CaptionStyle, tuple[str, ...]]] = {
    "single": {
        "full": (
            "a {0} on a {background} background",
            "a picture of a {0} in front of {background}",
            "{0}, {background} background",
            "an emoji of a {0}",
        ),
        "short": ("a {0}",),
    },
    "places": {
        "full": tuple(f"{_at_places(layout)}, on a {{background}} background" for layout in LAYOUTS),
        "short": tuple(_at_places(layout) for layout in LAYOUTS),
    },
    "counts": {"full": ("{counted} on a {background} background",), "short": ("{counted}",)},
    "relations": {
        "full": ("a {0} {relation} a {1} on a {background} background",),
        "short": ("a {0} {relation} a {1}",),
    },
    "words": {
        "full": (
            'the word "{word}" in {ink} on a {background} background',
            'a {0} {relation} the word "{word}" in {ink} on a {background} background',
        ),
        "short": ('the word "{word}"', 'a {0} {relation} the word "{word}"'),
    },
}
# A name's head is what becomes several: of "face blowing a kiss" the face.
TAIL = re.compile(r" (?:with|without|of|in|on|over|from|for|showing|blowing|savoring|holding|pointing|lifting) .*$")
# Endings of one and of several; the first that fits counts.
PLURALS = {
    "man": "men",
    "person": "people",
    "child": "children",
    "tooth": "teeth",
    "foot": "feet",
    "goose": "geese",
    "mouse": "mice",
    "leaf": "leaves",
    "knife": "knives",
    "wolf": "wolves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "volcano": "volcanoes",
    **{ending: f"{ending}es" for ending in ("s", "x", "z", "ch", "sh")},
    **{ending: f"{ending}s" for ending in ("ay", "ey", "oy", "uy")},
    "y": "ies",
    "": "s",
}
SLACK = 0.1  # GenEval: what of an offset does not count, a share of both sizes
DECIDED = 0.5  # and how much of its length a direction has for the relation to hold


class Thing(NamedTuple):
    """Equal pictures; what is None is not said, or not so."""

    label: int
    number: int | None = None  # None: at least one
    place: str | None = None  # of PLACES


class Word(NamedTuple):
    """A written word."""

    text: str
    ink: str | None = None  # of INKS


class Scene(NamedTuple):
    """What is drawn, or what a caption says of it; what is None is not said, or not so."""

    things: tuple[Thing, ...] = ()
    relation: str | None = None  # of RELATIONS: of the first thing to the second, or to the word
    background: str | None = None  # of BACKGROUNDS
    word: Word | None = None

    @property
    def kind(self) -> Kind:
        """Which captions it has."""
        if self.word is not None:
            return "words"
        if self.relation is not None:
            return "relations"
        if self.things[0].place is not None:
            return "places"
        return "single" if self.things[0].number is None else "counts"


def leanings(offset: np.ndarray, sizes: np.ndarray | float = 0.0) -> np.ndarray:
    """How much offsets [..., 2] right and down, from the second centre to the first, are in each of RELATIONS [..., 4].

    `sizes` [...] are the sizes of both together. It is GenEval's (Ghosh et al. 2023): what an offset has beyond a tenth of
    the sizes, along an axis, over its length.
    """
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - SLACK * np.asarray(sizes)[..., None], 0)
    direction = beyond / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1e-9)
    return direction @ np.array(list(RELATIONS.values())).T


def relations(offset: np.ndarray, sizes: np.ndarray | float = 0.0) -> np.ndarray:
    """Which of RELATIONS hold [..., 4] for `leanings`: two along a diagonal, none without an offset."""
    return leanings(offset, sizes) > DECIDED


def relations_of_place(place: str) -> np.ndarray:
    """Which of RELATIONS [4] a thing at a place has to the middle of the picture, a point."""
    return relations(np.array(PLACES[place]) - 0.5)


def pairs(scene: Scene) -> Iterator[tuple[int, int, str]]:
    """Labels of what lies left of or above what, whether it is said by a relation or by places."""
    if scene.kind == "relations":
        first, second = (thing.label for thing in scene.things)
        assert scene.relation is not None
        yield _in_order(first, second, scene.relation)
    if scene.kind == "places":
        for number, thing in enumerate(scene.things):
            for other in scene.things[:number]:
                offset = np.subtract(PLACES[str(thing.place)], PLACES[str(other.place)])
                for relation, holds in zip(RELATIONS, relations(offset), strict=True):
                    if holds:
                        yield _in_order(thing.label, other.label, relation)


def _in_order(first: int, second: int, relation: str) -> tuple[int, int, str]:
    return (first, second, relation) if relation in ("left of", "above") else (second, first, INVERSE[relation])


class CaptionGrammar:
    """CaptionGrammar of scenes whose things have these names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._labels = {name: label for label, name in enumerate(names)}
        self._labels_of_plurals = {plural(name): label for label, name in enumerate(names)}
        one, several = _any(names), _any(self._labels_of_plurals)
        slots = {"counted": f"(?:{NUMBERS[0]} (?P<one>{one})|(?P<number>{_any(NUMBERS[1:])}) (?P<several>{several}))"}
        slots |= {f"{number}": f"(?P<name{number}>{_any(names)})" for number in range(max(map(len, LAYOUTS)))}
        known = {"background": BACKGROUNDS, "relation": RELATIONS, "ink": INKS}
        slots |= {name: f"(?P<{name}>{_any(values)})" for name, values in known.items()}
        slots["word"] = "(?P<word>[a-z]+)"
        self._patterns: list[tuple[Kind, CaptionStyle, int, re.Pattern[str]]] = [
            (kind, style, variant, _pattern(phrase, slots))
            for kind, styles in PHRASES.items()
            for style, phrases in styles.items()
            for variant, phrase in enumerate(phrases)
        ]

    def write(self, scene: Scene, style: CaptionStyle, variant: int) -> str:
        """One of the captions of a scene: of `PHRASES[scene.kind][style]`, counted from 0 and around."""
        phrases = PHRASES[scene.kind][style]
        slots = {"background": scene.background, "relation": scene.relation}
        if scene.word is not None:
            slots |= scene.word._asdict() | {"word": scene.word.text}
        if scene.kind == "counts":
            slots["counted"] = self._counted(scene.things[0])
        names = [self.names[thing.label] for thing in scene.things]
        return with_article(phrases[variant % len(phrases)].format(*names, **slots))

    def parse(self, caption: str) -> Scene | None:
        """What a caption says; None for a text that `write` gives of no scene."""
        for kind, style, variant, pattern in self._patterns:
            if (match := pattern.fullmatch(caption)) is not None:
                scene = self._scene(kind, variant, match.groupdict())
                distinct = len({thing.label for thing in scene.things}) == len(scene.things)
                if distinct and self.write(scene, style, variant) == caption:  # with its articles and plurals
                    return scene
        return None

    def _counted(self, thing: Thing) -> str:
        assert thing.number is not None
        name = self.names[thing.label]
        return f"{NUMBERS[thing.number - 1]} {name if thing.number == 1 else plural(name)}"

    def _scene(self, kind: Kind, variant: int, found: Mapping[str, str]) -> Scene:
        things = [Thing(self._labels[found[name]]) for name in ("name0", "name1", "name2") if name in found]
        if kind == "places":
            things = [thing._replace(place=place) for thing, place in zip(things, LAYOUTS[variant], strict=True)]
        if kind == "counts":
            several = found["several"] is not None
            label = self._labels_of_plurals[found["several"]] if several else self._labels[found["one"]]
            things = [Thing(label, NUMBERS.index(found["number"]) + 1 if several else 1)]
        word = Word(found["word"], found.get("ink")) if "word" in found else None
        return Scene(tuple(things), found.get("relation"), found.get("background"), word)


def plural(name: str) -> str:
    """The name of several; those of a name that is a plural already, or of two things, are sets of them."""
    tail = match.group() if (match := TAIL.search(name)) else ""
    head = name.removesuffix(tail)
    if " and " in head or re.search(r"[^siu]s$", head):
        return f"sets of {name}"
    ending = next(ending for ending in PLURALS if head.endswith(ending))
    return head.removesuffix(ending) + PLURALS[ending] + tail


def with_article(text: str) -> str:
    """`an` before vowels."""
    words = text.split(" ")
    following = [*words[1:], ""]
    return " ".join(
        "an" if word == "a" and after[:1] in tuple("aeiou") else word
        for word, after in zip(words, following, strict=True)
    )


def _pattern(phrase: str, slots: Mapping[str, str]) -> re.Pattern[str]:
    """What a phrase comes to, with either article before a name."""
    parts = re.split(r"\{(\w+)\}", phrase)  # texts and names of slots in turn
    texts = [re.sub(r"\ba\b", "an?", re.escape(text)) for text in parts[::2]]
    inside = [slots[name] for name in parts[1::2]]
    return re.compile("".join(text + slot for text, slot in zip(texts, [*inside, ""], strict=True)))


def _any(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, texts))
