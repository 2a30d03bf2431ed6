"""Prompts beside what runs draw for them."""

import numpy as np
import pytest
import torch
from PIL import Image

from stages.figures.prompted import draw_prompted, settings_of, write_strip
from vtp.artefact import ArtefactError
from vtp.inference.grid import GAP, LINE, MARGIN, tile_of

PROMPTS = ["a frog", "a dog left of a cat"]


def samples(values):
    """Two samples of every prompt, the first of one colour."""
    return [torch.stack([torch.full((3, 8, 8), value), torch.zeros(3, 8, 8)]).to(torch.uint8) for value in values]


def place(plots, run, point, values, prompts=PROMPTS, seed="0"):
    write_strip(samples(values), prompts, plots / run / seed / point / "samples" / "prompted" / "guided")


def test_a_row_per_prompt_and_a_column_per_run(tmp_path):
    """Of its first seed the last point."""
    place(tmp_path / "plots", "ae", "0.5", (1, 2))
    place(tmp_path / "plots", "ae", "end", (60, 70))
    place(tmp_path / "plots", "ae", "end", (3, 4), seed="1")
    place(tmp_path / "plots", "joint", "end", (80, 90))
    assert settings_of(tmp_path / "plots") == ["guided"]
    draw_prompted(tmp_path / "plots", "guided", tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))[..., 0]
    tile = tile_of(8)
    tops = [MARGIN + LINE + number * (tile + GAP) + tile // 2 for number in range(2)]
    for top, row in zip(tops, ((60, 80), (70, 90)), strict=True):
        found = [value for value in pixels[top] if value in (60, 70, 80, 90)]
        assert found == [row[0]] * tile + [row[1]] * tile


def test_other_prompts_are_no_comparison(tmp_path):
    place(tmp_path / "plots", "ae", "end", (1, 2))
    place(tmp_path / "plots", "joint", "end", (1, 2), prompts=["a frog", "a cow"])
    with pytest.raises(ArtefactError, match="other prompts than those of the runs before"):
        draw_prompted(tmp_path / "plots", "guided", tmp_path / "grid.png")


def test_samples_of_classes_have_no_prompts(tmp_path):
    (tmp_path / "plots" / "ae").mkdir(parents=True)
    assert settings_of(tmp_path / "plots") == []
