"""How the page lays out figures and pictures."""

import re

import pytest
import torch
from PIL import Image

from stages.figures.drawing import Panel, panels
from stages.figures.paper_table import HEAD, TABLE_2, RunFigures, headline_figures, own_row
from stages.figures.tables import markdown
from stages.report import Section, _page, flatten
from vtp.inference.grid import grid

FIGURES = [("gfid", "", 2.6), ("is", "", 197.0), ("precision", "_vs10k", 0.79), ("recall", "_vs10k", 0.62)]
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


def test_names_are_plain_text_on_the_page_and_in_tables():
    name = "<script>alert(1)</script>|`x`\x1b[31m\u202e\n"
    page = _page(name, [Section(name, {name: {name: 1.0, "nested": {name: {name: name}}}}, [])])
    assert "<script>" not in page
    assert not set(page) & set("\x1b\u202e")
    table = markdown([name, "value"], [[name, "1"]])
    assert table.count("\n") == 3
    assert "<" not in table
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table.splitlines())


def test_dollars_are_no_formula(tmp_path):
    panels([Panel("$x_{", "$", [0.0, 1.0], {"$\\frac": [1.0, 2.0], "b": [0.0, 1.0]})], tmp_path / "a.png")
    rows = [torch.zeros(1, 3, 16, 16, dtype=torch.uint8)]
    grid(rows, ["a\nb\udce9\x1b"], tmp_path / "b.png", title="x\ny", notes=[["\ud800\x1b"]])
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "b.png").exists()


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


def test_a_run_has_a_row_in_the_papers_table():
    """Its best settings, of most samples; the baseline is none; what was not measured stays empty."""
    generation = {
        "unguided": {
            f"{name}_inception_{count}{real}_unguided_random": value
            for count in ("10k", "50k")
            for name, real, value in FIGURES
        },
        "weak": {"gfid_inception_50k_cfg1p2_random": 2.0, "is_inception_50k_cfg1p2_random": 250.0},
        "strong": {"gfid_inception_50k_cfg4_random": 9.0},
        "noise": {"gfid_inception_50k_noise_random": 0.1},
    }
    generation["unguided"]["gfid_inception_10k_unguided_random"] = 1.0
    figures = RunFigures(
        reconstruction={"psnr": 30.0, "rfid_inception_50k": 0.4},
        understanding={"zero_shot_top1_squash": 0.75, "knn20_last": 0.7},
        generator={"parameters": 675_000_000, "epochs": 80.0},
        generation=generation,
    )
    row = own_row(figures)
    name, *cells = row
    assert name == "this run (inception, 50k samples); unguided; guided: weak"
    assert cells == [0.4, 75.0, None, "675M", 80.0, 2.6, 197.0, 0.79, 0.62, 2.0, 250.0, None, None]
    assert all(len(line) == len(HEAD) for line in (row, *TABLE_2))
    assert headline_figures(figures) == {
        "zero_shot_top1_squash": 0.75,
        "psnr": 30.0,
        "rfid_inception_50k": 0.4,
        **{f"{name}_inception_50k{real}_unguided_random": value for name, real, value in FIGURES},
        "gfid_inception_50k_cfg1p2_random": 2.0,
        "is_inception_50k_cfg1p2_random": 250.0,
    }
