"""How the page lays out figures and pictures."""

import pytest
import torch
from PIL import Image

from stages._pictures import Panel, grid, panels
from stages.report import Section, _page, flatten

METRICS = {
    "device": "cpu",
    "plain": 3,
    "at_one_protocol": {"pretrained": {"psnr": 20.123456, "only_here": 1.0}, "tuned": {"psnr": 2.5e7}},
}


def test_records_of_one_kind_stand_beside_each_other():
    page = _page("A & B", [Section("Reconstruction", {"reconstruction": METRICS}, [])])
    assert "<h1>A &amp; B</h1><h2>Reconstruction</h2>" in page
    assert "<tr><th>reconstruction<th><tr><td>device<td>cpu<tr><td>plain<td>3</table>" in page
    assert "<th>reconstruction.at_one_protocol<th>pretrained<th>tuned" in page
    assert "<tr><td>psnr<td>20.12<td>2.500e+07<tr><td>only_here<td>1<td></table>" in page
    assert page.count("<table>") == 2


def test_flat_names_are_whole_and_texts_are_left_out():
    assert flatten({"a": METRICS}) == {
        "a.plain": 3,
        "a.at_one_protocol.pretrained.psnr": 20.123456,
        "a.at_one_protocol.pretrained.only_here": 1.0,
        "a.at_one_protocol.tuned.psnr": 2.5e7,
    }


@pytest.mark.parametrize("side", [16, 120])
def test_notes_make_room_for_themselves(tmp_path, side):
    rows = [torch.zeros(3, 3, side, side, dtype=torch.uint8)] * 2
    notes = [["a key that is much too long for the width of its image"] * 3, ["20 dB\n0.9"] * 3]
    grid(rows, ["a", "b"], tmp_path / "plain.png", title="t")
    grid(rows, ["a", "b"], tmp_path / "noted.png", title="t", notes=notes)
    plain, noted = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "noted"))
    assert noted.width == plain.width  # notes are cut
    assert noted.height == plain.height + 3 * 15


def test_panels_are_the_same_bytes_again(tmp_path):
    drawn = [Panel("one", "x", [0, 1], {"a": [1, 2], "b": [2, 3]}), Panel("two", "x", [1, 2], {"c": [1, 10]}, log=True)]
    for name in ("first", "second"):
        panels(drawn, tmp_path / f"{name}.png")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
