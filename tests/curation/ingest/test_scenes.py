"""CaptionGrammar of scenes: what is written is read again, whatever is drawn, and nothing else is."""

import random
from itertools import product

import numpy as np
import pytest

from vtp.curation.ingest.compose import Composer, EmbeddedConfig
from vtp.curation.ingest.openmoji import all_names, catalogue
from vtp.curation.ingest.scenes import (
    BACKGROUNDS,
    INKS,
    LAYOUTS,
    PHRASES,
    PLACES,
    RELATIONS,
    CaptionGrammar,
    Scene,
    Thing,
    Word,
    pairs,
    plural,
    relations,
    relations_of_place,
    with_article,
)

NAMES = ["frog", "church", "face blowing a kiss", "fork and knife", "fork and knife with plate", "orange"]
CAPTIONS = CaptionGrammar(NAMES)
VALUES = {
    "name": "openmoji", "seed": 3, "image_size": 64, "aspect_ratios": [1.0], "classes": 40, "labels": "drawing",
    "captions": ["full", "short"], "train_samples": 50, "validation_samples": 20, "held_out": None,
    "scene_fraction": 0.8, "scenes": ["places", "counts", "relations", "words"],
    "words": {"letters": 8, "random": 0.5, "beside": 0.5}, "scale_min": 0.6, "scale_max": 0.9, "rotation": 10.0,
}  # fmt: skip


def config_of(**changes):
    return EmbeddedConfig.parse(VALUES | changes, where="source")


def random_scene(draw, kind, classes):
    """Any scene of a kind, and which of its captions."""
    labels, background = draw.sample(range(classes), 3), draw.choice(list(BACKGROUNDS))
    variant = draw.randrange(len(PHRASES[kind]["full"]))
    things, relation, word = [Thing(labels[0])], None, None
    if kind == "places":
        things = [Thing(label, place=place) for label, place in zip(labels, LAYOUTS[variant], strict=False)]
    elif kind == "counts":
        things = [Thing(labels[0], draw.randint(1, 4))]
    elif kind == "relations":
        things, relation = [Thing(labels[0]), Thing(labels[1])], draw.choice(list(RELATIONS))
    elif kind == "words":
        things, relation = (things, draw.choice(["above", "below"])) if variant else ([], None)
        word = Word("".join(draw.choices("abcdefgh", k=draw.randint(3, 8))), draw.choice(list(INKS)))
    return Scene(tuple(things), relation, background, word), variant


def said(scene, kind, style, variant):
    """What a caption leaves of a scene."""
    phrases = PHRASES[kind][style]
    if "{background}" not in (phrase := phrases[variant % len(phrases)]):
        scene = scene._replace(background=None)
    if scene.word is not None and "{ink}" not in phrase:
        scene = scene._replace(word=scene.word._replace(ink=None))
    return scene


@pytest.mark.parametrize("kind", PHRASES)
def test_every_caption_of_every_drawing_is_read_as_it_was_written(kind):
    """Of all names that there are: the longest begin, end and join like phrases do."""
    names = all_names()
    captions, draw = CaptionGrammar(names), random.Random(0)
    for _ in range(600):
        scene, variant = random_scene(draw, kind, len(names))
        for style in ("full", "short"):
            caption = captions.write(scene, style, variant)
            assert captions.parse(caption) == said(scene, kind, style, variant), caption


def test_what_composers_say_is_what_they_draw():
    composer = Composer(config_of())
    captions = CaptionGrammar([picture.name for picture in composer.pictures])
    kinds = set()
    for split, index in product(("train", "validation", "other"), range(200)):
        sample = composer.plan(split, index)
        scene, variant = sample.arrangement.scene, sample.arrangement.variant
        kinds.add(scene.kind)
        for style, caption in zip(("full", "short"), sample.captions, strict=True):
            assert captions.parse(caption) == said(scene, scene.kind, style, variant)
    assert kinds == set(PHRASES)


def test_captions_read_well():
    three, pair = Scene((Thing(0, 3),), background="pink"), Scene((Thing(5), Thing(3)), "left of", "white")
    assert CAPTIONS.write(three, "full", 0) == "three frogs on a pink background"
    assert CAPTIONS.write(three, "short", 0) == "three frogs"
    assert CAPTIONS.write(pair, "full", 0) == "an orange left of a fork and knife on a white background"
    word = Scene((Thing(1),), "above", "peach", Word("tree", "red"))
    assert CAPTIONS.write(word, "full", 1) == 'a church above the word "tree" in red on a peach background'
    assert CAPTIONS.write(word, "short", 1) == 'a church above the word "tree"'
    places = Scene((Thing(0, place="on the left"), Thing(5, place="on the right")), background="pink")
    assert CAPTIONS.write(places, "full", 0) == "a frog on the left and an orange on the right, on a pink background"


@pytest.mark.parametrize(
    "text",
    [
        "", "frog", "a photo of a frog", "a frog on a mauve background", "an frog", "a orange", "a toad",
        "one frogs", "two frog", "two fork and knives", "five frogs", "a frog left of a frog", "a frog near a church",
        "a frog on the left and a church at the bottom", 'the word "Tree"', "the word tree", "a frog\n", "A frog",
        "a frog on a pink background and more", "two frogs on the left", "a frog on a pink background.",
    ],
)  # fmt: skip
def test_other_texts_are_none(text):
    assert CAPTIONS.parse(text) is None


def test_names_of_several_are_told_apart():
    names = all_names()
    assert len({plural(name) for name in names}) == len(names) > 1500
    assert [plural(name) for name in NAMES] == [
        "frogs",
        "churches",
        "faces blowing a kiss",
        "sets of fork and knife",
        "sets of fork and knife with plate",
        "oranges",
    ]


def test_articles():
    assert with_article("a apple and a dog near a orange") == "an apple and a dog near an orange"


@pytest.mark.parametrize(
    ("offset", "sizes", "expected"),
    [
        ((-30, 0), 0, {"left of"}),
        ((30, 5), 40, {"right of"}),
        ((0, -20), 40, {"above"}),
        ((1, 20), 40, {"below"}),
        ((-20, -20), 0, {"left of", "above"}),
        ((-20, -20), 80, set()),  # 12 of each axis are left, of a distance of 28.3
        ((3, 3), 40, set()),
        ((0, 0), 0, set()),
    ],
)
def test_relations_are_genevals(offset, sizes, expected):
    holds = relations(np.array(offset, float), sizes)
    assert {name for name, each in zip(RELATIONS, holds, strict=True) if each} == expected


def test_places_say_which_relations_to_the_middle_they_are():
    found = {
        place: {r for r, each in zip(RELATIONS, relations_of_place(place), strict=True) if each} for place in PLACES
    }
    assert found == {
        "on the left": {"left of"},
        "on the right": {"right of"},
        "at the top": {"above"},
        "at the bottom": {"below"},
        "at the top left": {"left of", "above"},
        "at the top right": {"right of", "above"},
    }


def test_a_pair_is_the_same_by_whatever_it_is_said():
    expected = [(1, 0, "left of")]
    assert list(pairs(Scene((Thing(1), Thing(0)), "left of"))) == expected
    assert list(pairs(Scene((Thing(0), Thing(1)), "right of"))) == expected
    assert list(pairs(Scene((Thing(1, place="on the left"), Thing(0, place="on the right"))))) == expected
    three = Scene(tuple(Thing(label, place=place) for label, place in enumerate(LAYOUTS[2])))
    assert set(pairs(three)) == {(0, 1, "left of"), (0, 2, "above"), (1, 2, "above")}
    assert list(pairs(Scene((Thing(1, 2),)))) == []


def test_the_catalogue_is_a_part_of_all_names():
    names = all_names()
    assert {picture.name for picture in catalogue(100)} <= set(names)
    assert len(set(names)) == len(names)
