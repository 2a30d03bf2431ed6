"""Texts in pictures: glyphs and no boxes, in every script that an installed font has."""
# ruff: noqa: RUF001 - letters of all scripts

import numpy as np
import pytest
import torch
from PIL import Image

from stages.figures.drawing import Panel, panels
from vtp.inference import lettering
from vtp.inference.grid import grid
from vtp.inference.lettering import draw_text, drawable

SIZE = 24
TEXTS = {
    "latin": "Frösche",
    "cyrillic": "лягушка",
    "greek": "βάτραχος",
    "chinese": "青蛙",
    "japanese": "かえる",
    "korean": "개구리",
    "arabic": "ضفدع",
    "hebrew": "צפרדע",
    "persian": "می\u200cتوان",
    "hindi": "मेंढक",
    "tamil": "தமிழ்",
    "thai": "กบ",
    "bengali": "ব্যাঙ",
    "emoji": "🐸",
    "family": "👨\u200d👩\u200d👧",
}


def pixels(image):
    return np.asarray(image.getchannel("A")).astype(int)


def test_what_is_needed_is_installed():
    """Else: pip install -c constraints.txt -e ."""
    packages = {path.parent.name for path in lettering.font_files()}
    assert packages == {"ttf", "manimgx_fonts", "manimgx_fonts_cjk"}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_script_has_glyphs(text):
    """No letter looks like what its font draws for a code point that it does not have."""
    (part,) = lettering._parts(text)
    assert drawable(text) == text
    box = pixels(lettering._draw(part._replace(text="\U000f0000"), SIZE, "black"))
    for letter in filter(str.isalpha, text):
        drawn = pixels(lettering._draw(part._replace(text=letter), SIZE, "black"))
        assert drawn.any()
        assert drawn.shape != box.shape or np.abs(drawn - box).mean() > 1
    assert pixels(draw_text(text, SIZE, "black")).any()


@pytest.mark.parametrize("text", ["\U00010330x", "a\ue000", "猫\uffff", "\x1b[31m", "\u202eabc", "\udce9"])
def test_what_no_font_has_is_escaped(text):
    shown = drawable(text)
    assert shown.count("\\") == 1
    assert shown.encode("ascii", "ignore").decode().isprintable()
    drawn, written = (draw_text(each, SIZE, "black").width for each in (text, shown))
    assert abs(drawn - written) < SIZE  # a word in one font, or in two


@pytest.mark.parametrize(("wide", "narrow"), [("ששש", "׀ ׀"), ("ش", "ا ا")])
def test_words_from_right_to_left_begin_on_the_right(wide, narrow):
    for text, heavy in ((wide + " " + narrow, 1), (narrow + " " + wide, 0)):
        columns = pixels(draw_text(text, SIZE, "black")).sum(0)
        halves = [half.sum() for half in np.array_split(columns, 2)]
        assert halves[heavy] > 1.3 * halves[1 - heavy], text


def test_parts_from_right_to_left_stand_in_their_order():
    """Each in a font of its own: what is read first is on the right."""
    first, second = "ضضضض", "ࢠ"
    fonts = [part.font.path.name for part in lettering._parts(f"{first} {second}")]
    assert len(fonts) == 2
    line, alone = (pixels(draw_text(text, SIZE, "black")) for text in (f"{first} {second}", first))
    assert np.array_equal(line[:, -alone.shape[1] :], alone)


def test_arabic_letters_are_joined():
    joined, apart = (draw_text(text, SIZE, "black").width for text in ("ضفدع", "ض ف د ع".replace(" ", "\u200c")))
    assert joined < apart


def test_marks_stand_on_their_letters():
    composed, combined = (draw_text(text, SIZE, "black") for text in ("é", "e\u0301"))
    assert np.array_equal(pixels(composed), pixels(combined))
    assert draw_text("q\u0301", SIZE, "black").width <= draw_text("q", SIZE, "black").width + 2


def test_parts_in_several_fonts_stand_beside_each_other():
    text = "cat 猫 เเมว कुत्ता"
    fonts = [part.font.family for part in lettering._parts(text)]
    assert fonts == ["DejaVu Sans", "Noto Sans CJK JP", "Noto Sans Thai", "Noto Sans Devanagari"]
    assert draw_text(text, SIZE, "black").width > sum(draw_text(word, SIZE, "black").width for word in text.split())


def test_spaces_and_markup_are_texts():
    assert draw_text("a   b", SIZE, "black").width > draw_text("a b", SIZE, "black").width
    assert draw_text("<b>&amp;</b>", SIZE, "black").width > draw_text("&", SIZE, "black").width * 4
    assert draw_text("", SIZE, "black").size == draw_text(" "[:0], SIZE, "black").size


def test_grids_of_any_classes_are_drawn_and_equal(tmp_path):
    rows = [torch.zeros(2, 3, 16, 16, dtype=torch.uint8)] * len(TEXTS)
    for name in ("a", "b"):
        notes = [["猫の鍵はこの画像の幅よりもずっとずっと長い", "犬"]] * len(TEXTS)
        grid(rows, list(TEXTS.values()), tmp_path / f"{name}.png", title="動物 حيوانات", notes=notes)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    grid(rows, [""] * len(TEXTS), tmp_path / "bare.png", title="")
    named, bare = (Image.open(tmp_path / f"{name}.png") for name in ("a", "bare"))
    assert named.width > bare.width


def test_figures_have_no_boxes_and_no_warnings(tmp_path, recwarn, caplog):
    title = drawable("青蛙 개구리 मेंढक ضفدع \U00010330")
    panels([Panel(title, "x", [0.0, 1.0], {"a": [1.0, 2.0]})], tmp_path / "a.png")
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]
    assert "font" not in caplog.text


def test_a_package_without_fonts_leaves_escapes(monkeypatch):
    """A drawing does not end a training that took days."""
    place = lettering.FOLDERS["matplotlib"]
    monkeypatch.setattr(lettering, "FOLDERS", {"matplotlib": place, "no_such_package": ("", "*.ttf")})
    monkeypatch.setattr(lettering, "EMOJI", ("no_such_package", "", "*.ttf"))
    assert drawable("cat 猫") == "cat \\u732b"
