"""Words in pictures: definitions against closed forms, and the engine on words that Pillow draws."""

import socket
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from vtp.artefact import ArtefactError, digest
from vtp.config import ConfigError
from vtp.evaluation import prompt_text
from vtp.evaluation.prompt_text import (
    WEIGHTS,
    RapidOcr,
    TextMeasure,
    character_accuracy,
    edit_distance,
    engine_facts,
    nearest_reading,
    quoted_words,
)

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
ENGINE = "rapidocr3p10"


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("kitten", "sitting", 3),
        ("saturday", "sunday", 3),
        ("intention", "execution", 5),
        ("flaw", "lawn", 2),
        ("abc", "abc", 0),
        ("", "abc", 3),
        ("", "", 0),
    ],
)
def test_distances_are_those_of_textbooks(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance
    longest = max(len(first), len(second), 1)
    assert character_accuracy(first, second) == pytest.approx(1 - distance / longest)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('a sign that says "Open 24/7"', ["open247"]),
        ("the words 'to' and \"go\", \u201cnow\u201d or \u2018later\u2019.", ["to", "go", "now", "later"]),
        ("a dog's bone, the boys' toys and it's 5\" by 6\"", []),
        ("'don't stop'", ["dontstop"]),
        ('"你好" and "..." are no words', []),
        ("nothing", []),
    ],
)
def test_words_stand_in_quotes(prompt, words):
    assert quoted_words(prompt) == words


@pytest.mark.parametrize(
    ("lines", "reading"),
    [
        (["OWL"], "owl"),
        (["o w", "l"], "owl"),
        (["a barn", "owl."], "owl"),
        (["barn owls"], "owls"),
        (["● . -"], ""),
        ([], ""),
    ],
)
def test_the_nearest_pieces_are_the_reading(lines, reading):
    assert nearest_reading("owl", lines) == reading


def test_every_word_counts():
    class Reader:
        name = "given"
        lines = iter([["owl cat"], ["OWLS"], []])

        def read(self, picture):
            return next(self.lines)

    measure = TextMeasure(Reader())
    blank = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    measure.add(blank, ['"Owl" and "cat"', "an owl without quotes"])
    measure.add(blank, ['an "owl"', 'another "owl"'])
    assert measure.figures() == {
        "word_accuracy_given": pytest.approx((1 + 1 + 0 + 0) / 4),
        "character_accuracy_given": pytest.approx((1 + 1 + 3 / 4 + 0) / 4),
        "prompts_with_words": 3.0,
    }
    measure.add(blank, ["no word"] * 2)
    assert measure.figures() == {"prompts_with_words": 0.0}


def drawn(word, side):
    """A picture with a word on 80 % of its width, drawn large and shrunk."""
    canvas = Image.new("RGB", (4 * side, 4 * side), (252, 240, 170))
    draw, font = ImageDraw.Draw(canvas), ImageFont.truetype(FONT, 100)
    font = ImageFont.truetype(FONT, int(100 * 3.2 * side / draw.textlength(word, font)))
    draw.text((2 * side, 2 * side), word, (20, 20, 90), font, anchor="mm")
    return torch.from_numpy(np.array(canvas.resize((side, side), Image.Resampling.LANCZOS))).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def reader():
    return RapidOcr()


@pytest.mark.parametrize("side", [48, 128, 200])
def test_words_are_read(reader, side, monkeypatch):
    def refuse(*_):
        raise AssertionError("the engine asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    measure = TextMeasure(reader)
    for word in ("Frog", "zebra"):
        measure.add(drawn(word, side), [f'the word "{word}"'])
    assert measure.figures() == {
        f"word_accuracy_{ENGINE}": 1,
        f"character_accuracy_{ENGINE}": 1,
        "prompts_with_words": 2,
    }
    measure.add(drawn("frog", side), ['the word "frogs"'])
    measure.add(torch.full((1, 3, side, side), 200, dtype=torch.uint8), ['the word "frog"'])  # nothing to read
    measured = {f"word_accuracy_{ENGINE}": 0, f"character_accuracy_{ENGINE}": 0.4, "prompts_with_words": 2}
    assert measure.figures() == pytest.approx(measured)


def test_facts_have_the_version_and_the_digests():
    import rapidocr

    (name, facts), *more = engine_facts().items()
    assert (name, more) == (ENGINE, [])
    assert facts.startswith("rapidocr 3.10.")
    for file, sha256 in WEIGHTS.values():
        assert digest(Path(rapidocr.__path__[0]) / "models" / file) == sha256
        assert f"{file} {sha256}" in facts


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_named_with_its_remedy(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=rf"{package} is not installed: pip install .* '\.\[ocr\]', or set `ocr` to null"
    ):
        RapidOcr()


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setitem(prompt_text.WEIGHTS, "Det", ("PP-OCRv6_det_small.onnx", "0" * 64))
    with pytest.raises(ArtefactError, match=r"det_small\.onnx: not the weights that rapidocr 3\.10 ships"):
        RapidOcr()
