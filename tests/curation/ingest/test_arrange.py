"""Where pictures and words lie: in the canvas, apart, as they are said to; and what validation alone shows."""

from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from curation.ingest.test_embedded import write
from curation.ingest.test_scenes import config_of

from vtp.config import ConfigError
from vtp.curation.ingest import words
from vtp.curation.ingest.compose import Composer
from vtp.curation.ingest.openmoji import all_names
from vtp.curation.ingest.scenes import BACKGROUNDS, RELATIONS, pairs, relations
from vtp.curation.ingest.words import LEAST_SIZE, Vocabulary, WordsConfig, width
from vtp.data.dataset import ShardDataset

HELD_OUT = {"backgrounds": 0.125, "counts": 0.25, "pairs": 0.1, "words": 0.1}


def planned(config, split="train", count=120):
    composer = Composer(config)
    return [composer.plan(split, index) for index in range(count)]


def scenes(kind, **changes):
    more = {} if kind == "words" else {"words": None}
    found = planned(config_of(scenes=[kind], scene_fraction=1.0, **more, **changes))
    assert {sample.arrangement.scene.kind for sample in found} == {kind}
    return [sample.arrangement for sample in found]


def within(place, canvas):
    return all(
        place.size / 2 - 1e-9 <= c <= side - place.size / 2 + 1e-9 for c, side in zip(place.centre, canvas, strict=True)
    )


def apart(one, other):
    return max(np.abs(np.subtract(one.centre, other.centre))) >= (one.size + other.size) / 2 - 1e-9


@pytest.mark.parametrize("ratios", [[1.0], [0.5, 1.5]])
def test_equal_pictures_are_as_many_as_said(ratios):
    found = scenes("counts", aspect_ratios=ratios)
    for arrangement in found:
        (thing,) = arrangement.scene.things
        assert len(arrangement.places) == thing.number
        assert {(place.label, place.size) for place in arrangement.places} == {
            (thing.label, arrangement.places[0].size)
        }
        assert all(within(place, arrangement.canvas) for place in arrangement.places)
        assert all(apart(*pair) for pair in combinations(arrangement.places, 2))
    assert {arrangement.scene.things[0].number for arrangement in found} == {1, 2, 3, 4}


@pytest.mark.parametrize("ratios", [[1.0], [0.5, 1.5]])
def test_one_relation_holds_and_no_other(ratios):
    found = scenes("relations", aspect_ratios=ratios)
    for arrangement in found:
        first, second = arrangement.places
        assert first.label != second.label
        assert within(first, arrangement.canvas)
        assert within(second, arrangement.canvas)
        assert apart(first, second)
        holds = relations(np.subtract(first.centre, second.centre), first.size + second.size)
        assert [name for name, each in zip(RELATIONS, holds, strict=True) if each] == [arrangement.scene.relation]
    assert {arrangement.scene.relation for arrangement in found} == set(RELATIONS)


@pytest.mark.parametrize(("side", "letters"), [(32, 5), (64, 8)])
def test_words_are_read_where_they_are_said_to_be(side, letters):
    """Dark pixels of the ink lie inside of the picture, above or below what is beside them, in letters of 8 pixels."""
    config = config_of(
        scenes=["words"],
        scene_fraction=1.0,
        image_size=side,
        words=config_of().words.model_dump() | {"letters": letters},
    )
    composer, alone = Composer(config), 0
    for index in range(60):
        sample = composer.plan("train", index)
        arrangement = sample.arrangement
        lettering, word = arrangement.lettering, arrangement.scene.word
        assert (lettering.text, lettering.ink) == word
        assert 3 <= len(word.text) <= letters
        assert lettering.size >= LEAST_SIZE
        assert f'"{word.text}" in {word.ink}' in sample.captions[0]
        blank = composer.draw(sample._replace(arrangement=arrangement._replace(lettering=None)))
        written = np.abs(np.asarray(composer.draw(sample), int) - np.asarray(blank, int)).sum(2) > 60
        rows, columns = np.nonzero(written)
        assert 0 < columns.min() < columns.max() < side - 1
        assert columns.max() - columns.min() + 1 == pytest.approx(
            width(word.text) * lettering.size, abs=0.3 * lettering.size
        )
        assert abs(rows.mean() - lettering.centre[1]) < lettering.size / 3
        if not arrangement.places:
            alone += 1
            continue
        above = arrangement.places[0].centre[1] < rows.mean()
        assert above == (arrangement.scene.relation == "above")
    assert 10 < alone < 50


def test_words_are_those_of_names_and_random_letters():
    config = WordsConfig(letters=6, random=0.5, beside=0.0)
    vocabulary, draws = Vocabulary(config, all_names()), np.random.default_rng(0)
    known = set(vocabulary.dictionary)
    assert {"frog", "bread", "church"} < known
    assert "butterfly" not in known
    found = [vocabulary.draw(draws) for _ in range(400)]
    strange = [word for word in found if word not in known]
    assert 150 < len(strange) < 250
    assert not {letter for word in strange for letter in word} & set("lio")
    assert {len(word) for word in found} == {3, 4, 5, 6}
    assert max(width(word) / len(word) for word in (*found, *known)) <= words.WIDEST


def test_a_font_without_a_letter_is_refused(monkeypatch, tmp_path):
    words._advances.cache_clear()
    monkeypatch.setattr(words, "ascii_lowercase", "ab\u4e00")
    with pytest.raises(ValueError, match="DejaVuSans.ttf: has no letter \u4e00; install matplotlib again"):
        width("ab")
    words._advances.cache_clear()
    monkeypatch.setattr(words, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="no such font; install matplotlib"):
        words.font_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 32}, "words.letters 8: so many letters of 8 pixels need an image_size of 50, given 32"),
        ({"words": None}, "scenes have words, and words is null; set both or none"),
        ({"scenes": ["places"]}, "words are given, scenes have none; set both or none"),
        ({"scenes": []}, "source.scenes: List should have at least 1 item"),
        ({"captions": ["full", "full"]}, "'full' comes twice"),
        ({"aspect_ratios": [9.0]}, "source.aspect_ratios.0: Input should be less than or equal to 4"),
        ({"held_out": HELD_OUT | {"pairs": 0.5}}, "source.held_out.pairs: Input should be less than or equal to 0.25"),
        ({"scenes": ["place"]}, "source.scenes.0: Input should be 'places', 'counts', 'relations' or 'words'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, message):
    with pytest.raises(ConfigError) as raised:
        config_of(**changes)
    assert message in str(raised.value)


def test_pictures_have_the_ratios_that_are_asked_for():
    found = planned(config_of(aspect_ratios=[0.5, 1.0, 1.5], image_size=50), count=200)
    shapes = Counter(sample.arrangement.canvas for sample in found)
    assert shapes.keys() == {(50, 100), (50, 50), (75, 50)}
    assert min(shapes.values()) > 45
    composer = Composer(config_of(aspect_ratios=[1.5], image_size=50))
    assert composer.draw(composer.plan("train", 0)).size == (75, 50)


def held(config):
    """Combinations by split, and what the scenes of each are about."""
    found = {}
    for split in ("train", "validation", "other"):
        backgrounds, counts, of_pairs, of_words = set(), set(), set(), set()
        for sample in planned(config, split, 500):
            scene = sample.arrangement.scene
            backgrounds |= {(thing.label, scene.background) for thing in scene.things}
            counts |= {(thing.label, thing.number) for thing in scene.things if thing.number}
            of_pairs |= set(pairs(scene))
            of_words |= {scene.word.text} if scene.word else set()
        found[split] = [backgrounds, counts, of_pairs, of_words]
    return found


def test_validation_alone_shows_what_is_held_out():
    config = config_of(classes=6, held_out=HELD_OUT)
    found = held(config)
    for train, other in zip(found["train"], found["other"], strict=True):
        assert train
        assert other - train
    of_train = found["train"]
    for sample in planned(config, "validation", 300):
        scene = sample.arrangement.scene
        about = {
            "single": {(thing.label, scene.background) for thing in scene.things} & of_train[0],
            "counts": {(thing.label, thing.number) for thing in scene.things} & of_train[1],
            "words": {scene.word.text if scene.word else None} & of_train[3],
        }
        if scene.kind in about:
            assert not about[scene.kind]
        else:
            assert set(pairs(scene)) - of_train[2]
    labels = [sample.label for sample in planned(config, "validation", 60) if sample.kind == "single"]
    assert set(labels) == set(range(6))


def test_of_every_object_a_background_is_held_out_and_most_are_not():
    composer = Composer(
        config_of(classes=6, held_out=HELD_OUT | {"words": 0.0}, scene_fraction=0.0, scenes=["counts"], words=None)
    )
    by_label = {split: {label: set() for label in range(6)} for split in ("train", "validation")}
    for split, index in product(by_label, range(600)):
        sample = composer.plan(split, index)
        by_label[split][sample.label].add(sample.arrangement.scene.background)
    for label in range(6):
        train, validation = (by_label[split][label] for split in ("train", "validation"))
        assert len(validation) == 1
        assert train | validation == set(BACKGROUNDS)
        assert not train & validation


def test_words_of_which_none_is_held_out_are_refused():
    with pytest.raises(ConfigError, match=r"held_out.words 1e-09: none of \d+ words is; raise the share"):
        Composer(config_of(held_out=HELD_OUT | {"words": 1e-9}))


def test_every_composition_stands_once_for_each_caption(tmp_path):
    config = config_of(classes=6, image_size=50, train_samples=21, validation_samples=10)
    write(tmp_path / "both", config)
    write(tmp_path / "full", config.model_copy(update={"captions": ["full"]}))
    both, full = (ShardDataset(tmp_path / name, "train") for name in ("both", "full"))
    assert (len(both), len(full), len(ShardDataset(tmp_path / "both", "validation"))) == (42, 21, 20)
    composer = Composer(config)
    for index in range(21):
        assert both.image(2 * index).tobytes() == both.image(2 * index + 1).tobytes() == full.image(index).tobytes()
        assert (both.caption(2 * index), both.caption(2 * index + 1)) == composer.plan("train", index).captions
        assert both.caption(2 * index) == full.caption(index)
    assert [both.key(row) for row in (0, 1)] == ["train-000000000", "train-000000000-short"]
