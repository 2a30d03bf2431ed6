"""What is right in a picture, by its prompt, when a detector is never wrong."""

import numpy as np
import pytest
import torch
from detecting import NAMES, KnownScenes, arrangement_of, scenes_of

from vtp.curation.ingest.compose import Composer
from vtp.curation.ingest.scenes import BACKGROUNDS, CaptionGrammar
from vtp.evaluation import scene_measure
from vtp.evaluation.scene_measure import SceneMeasure, backgrounds, judge
from vtp.models.scene_detector import Detection

CAPTIONS = CaptionGrammar(NAMES)
FROG, CHURCH, ORANGE = 0, 1, 2
LEFT, RIGHT, TOP = (0.25, 0.5), (0.75, 0.5), (0.5, 0.25)


def at(label, centre, size=0.3, score=0.9):
    return Detection(label, score, centre, size)


@pytest.mark.parametrize(
    ("prompt", "found", "expected"),
    [
        ("a frog on a pink background", [at(FROG, LEFT)], {"object": 1, "background": 1, "scene": 1}),
        ("a frog on a white background", [at(FROG, LEFT)], {"object": 1, "background": 0, "scene": 0}),
        ("an emoji of a frog", [at(CHURCH, LEFT)], {"object": 0, "scene": 0}),
        ("a frog", [at(FROG, LEFT), at(FROG, RIGHT)], {"object": 1, "scene": 0}),  # one too many
        ("a frog", [], {"object": 0, "scene": 0}),
        ("two frogs", [at(FROG, LEFT), at(FROG, RIGHT)], {"object": 1, "count": 1, "scene": 1}),
        ("two frogs", [at(FROG, LEFT)], {"object": 1, "count": 0, "scene": 0}),
        ("two frogs", [], {"object": 0, "count": 0, "scene": 0}),
        ("one frog", [at(FROG, LEFT), at(CHURCH, TOP)], {"object": 1, "count": 1, "scene": 0}),
        ("a frog left of a church", [at(FROG, LEFT), at(CHURCH, RIGHT)], {"object": 1, "position": 1, "scene": 1}),
        ("a frog left of a church", [at(FROG, RIGHT), at(CHURCH, LEFT)], {"object": 1, "position": 0, "scene": 0}),
        ("a frog left of a church", [at(FROG, LEFT)], {"object": 0, "position": 0, "scene": 0}),
        ("a frog above a church", [at(FROG, (0.5, 0.2)), at(CHURCH, (0.5, 0.8))], {"object": 1, "position": 1, "scene": 1}),
        # The surest of a class counts.
        (
            "a frog left of a church",
            [at(FROG, RIGHT, score=0.4), at(FROG, LEFT), at(CHURCH, (0.6, 0.5))],
            {"object": 1, "position": 1, "scene": 0},
        ),
        (
            "a frog on the left and a church on the right, on a pink background",
            [at(FROG, (0.3, 0.4)), at(CHURCH, (0.7, 0.6))],
            {"object": 1, "position": 1, "background": 1, "scene": 1},
        ),
        (
            "a frog on the left and a church on the right",
            [at(FROG, LEFT), at(CHURCH, (0.6, 0.8))],  # below, and hardly right
            {"object": 1, "position": 0, "scene": 0},
        ),
        (
            "a frog at the top left, a church at the top right and an orange at the bottom",
            [at(FROG, (0.27, 0.27)), at(CHURCH, (0.73, 0.27)), at(ORANGE, (0.5, 0.74))],
            {"object": 1, "position": 1, "scene": 1},
        ),
        ('the word "tree" in red on a pink background', [], {"background": 1}),
        ('a frog above the word "tree"', [at(FROG, TOP)], {"object": 1}),
    ],
)  # fmt: skip
def test_a_picture_is_right_where_it_does_what_is_asked(prompt, found, expected):
    answers = judge(CAPTIONS.parse(prompt), found, "pink", (32, 32))
    assert {name: int(right) for name, right in answers.items()} == expected


def test_relations_are_those_of_pixels_and_places_those_of_the_picture():
    """In a picture twice as wide as high."""
    relation = CAPTIONS.parse("a frog left of a church")
    place = CAPTIONS.parse("a frog at the top left, a church at the top right and an orange at the bottom")
    found = [at(FROG, (0.3, 0.2)), at(CHURCH, (0.7, 0.8))]  # 26 pixels left, 19 above
    assert judge(relation, found, "pink", (64, 32))["position"]
    assert not judge(CAPTIONS.parse("a frog below a church"), found, "pink", (64, 32))["position"]
    corners = [at(FROG, (0.27, 0.27)), at(CHURCH, (0.73, 0.27)), at(ORANGE, (0.5, 0.74))]
    assert judge(place, corners, "pink", (64, 32))["position"]


@pytest.mark.parametrize("ratios", [[1.0], [0.5], [1.5]])
def test_composed_pictures_are_what_their_captions_ask_for(ratios):
    """All of them, when the detector is never wrong: rules and phrases fit each other."""
    config = scenes_of(
        aspect_ratios=ratios, image_size=48, scenes=["places", "counts", "relations", "words"],
        words={"letters": 6, "random": 0.5, "beside": 0.5},
    )  # fmt: skip
    composer = Composer(config)
    samples = [composer.plan("validation", index) for index in range(160)]
    names = [picture.name for picture in composer.pictures]
    measure = SceneMeasure(KnownScenes([s.arrangement for s in samples], stride=2, image_size=48, names=names))
    images = torch.from_numpy(np.stack([np.asarray(composer.draw(sample)) for sample in samples])).permute(0, 3, 1, 2)
    for style in range(2):
        measure.add(images[style * 80 :][:80], [s.captions[style] for s in samples[style * 80 :][:80]])
    figures = measure.figures()
    accuracies = {name: value for name, value in figures.items() if name.endswith("_accuracy")}
    assert accuracies == {f"{name}_accuracy": 1.0 for name in ("object", "count", "position", "background", "scene")}
    assert figures["foreign_prompts"] == 0
    kinds = [sample.arrangement.scene.kind for sample in samples]
    assert figures["count_prompts"] == kinds.count("counts")
    assert figures["position_prompts"] == kinds.count("places") + kinds.count("relations")
    assert figures["scene_prompts"] == len(kinds) - kinds.count("words")
    assert figures["background_prompts"] < 80  # short captions ask for none


def test_shares_are_over_the_prompts_that_ask():
    pink = torch.tensor(BACKGROUNDS["pink"], dtype=torch.uint8)[None, :, None, None].expand(3, 3, 32, 32)
    arrangements = [arrangement_of((FROG, (8, 16), 12))] * 3
    measure = SceneMeasure(KnownScenes(arrangements))
    measure.add(pink, ["a frog on a pink background", "two frogs", "a photo of a frog"])
    assert measure.figures() == {
        "object_accuracy": 1.0, "object_prompts": 2, "count_accuracy": 0.0, "count_prompts": 1, "position_prompts": 0,
        "background_accuracy": 1.0, "background_prompts": 1, "scene_accuracy": 0.5, "scene_prompts": 2,
        "foreign_prompts": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="3 images and 1 prompts"):
        measure.add(pink, ["a frog"])


def test_figures_are_those_of_all_ranks(monkeypatch):
    """Counts are summed, not shares: another rank has seen four prompts, one of them right."""
    measure = SceneMeasure(KnownScenes([arrangement_of((FROG, (8, 16), 12))]))
    measure.add(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["an emoji of a frog"])
    others = torch.tensor([1, 0, 0, 0, 1, 4, 0, 0, 0, 4, 2])
    monkeypatch.setattr(scene_measure, "total", lambda counts: counts + others)
    figures = measure.figures()
    assert (figures["object_accuracy"], figures["object_prompts"], figures["foreign_prompts"]) == (2 / 5, 5, 2)


@pytest.mark.parametrize("side", [32, 64])
def test_backgrounds_of_real_pictures_are_named(side):
    """Large pictures at the border too."""
    composer = Composer(scenes_of(image_size=side, classes=32, scale_min=0.85, scale_max=0.95))
    samples = [composer.plan("validation", index) for index in range(150)]
    images = torch.from_numpy(np.stack([np.asarray(composer.draw(sample)) for sample in samples])).permute(0, 3, 1, 2)
    found = backgrounds(images)
    right = [name == sample.arrangement.scene.background for name, sample in zip(found, samples, strict=True)]
    assert sum(right) >= 149
