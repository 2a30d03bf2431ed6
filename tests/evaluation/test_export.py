"""Samples in the layouts that the scorers of GenEval and DPG-Bench read."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from prompted import SAMPLES, SIDE, numbered, samples_of, work

from vtp.config import ConfigError
from vtp.data.prompt_files import Prompt
from vtp.evaluation.export import DpgExport, GenevalExport, PngExport, build_writer


def value(path):
    """The number that a picture of one colour shows."""
    (colour,) = {tuple(pixel) for pixel in np.asarray(Image.open(path)).reshape(-1, 3).tolist()}
    return colour[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    work(folder)
    return folder


def test_geneval_finds_the_samples_of_a_prompt_beside_its_metadata(folder):
    found = sorted(path.name for path in (folder / "geneval" / "plain").iterdir())
    assert found == [f"{number:05d}" for number in range(6)]
    for number, name in enumerate(found):
        place = folder / "geneval" / "plain" / name
        assert json.loads((place / "metadata.jsonl").read_text()) == {"tag": "two", "prompt": "x"}
        samples = sorted((place / "samples").iterdir())
        assert [path.name for path in samples] == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert [value(path) for path in samples] == list(range(number, SAMPLES, 6))


def test_dpg_finds_four_samples_in_a_grid(folder):
    found = sorted((folder / "dpg" / "plain").iterdir())
    assert [path.name for path in found] == [f"{number:05d}.png" for number in range(6)]
    for number, path in enumerate(found):
        grid = np.asarray(Image.open(path))
        assert grid.shape == (2 * SIDE, 2 * SIDE, 3)
        expected = np.array(range(number, SAMPLES, 6)).reshape(2, 2).repeat(SIDE, 0).repeat(SIDE, 1)
        assert (grid == expected[:, :, None]).all()


def test_metadata_are_the_line_of_the_file(tmp_path):
    metadata = {"tag": "color_attr", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a red büs"}
    prompt = Prompt(text="a red büs", name="00007", metadata=metadata)
    writer = build_writer(
        GenevalExport(name="geneval"), tmp_path, "w2", image_size=4, scratch=tmp_path, prompts=[prompt]
    )
    writer.add(0, numbered([3], 4))
    writer.finish(torch.zeros(1))
    assert json.loads((tmp_path / "w2" / "00007" / "metadata.jsonl").read_text()) == metadata
    assert value(tmp_path / "w2" / "00007" / "samples" / "0000.png") == 3


@pytest.mark.parametrize(
    ("form", "prompts", "message"),
    [
        (GenevalExport(name="geneval"), None, "samples of GenEval's prompts; draw some, or choose {name: png}"),
        (DpgExport(name="dpg"), None, "samples of DPG-Bench's prompts"),
        (GenevalExport(name="geneval"), [Prompt(text="a", name="1", metadata={})], "samples of GenEval's prompts"),
        (DpgExport(name="dpg"), samples_of(["a"] * 4 + ["b"] * 3), "4 samples of every prompt, and b has 3"),
    ],
)
def test_samples_of_other_prompts_are_refused(form, prompts, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        build_writer(form, tmp_path, "plain", image_size=4, scratch=tmp_path, prompts=prompts)
    assert not list(tmp_path.iterdir())


def test_pictures_need_no_prompts(tmp_path):
    writer = build_writer(PngExport(name="png"), tmp_path, "plain", image_size=4, scratch=tmp_path)
    writer.add(2, numbered([8, 9], 4))
    writer.finish(torch.zeros(4))
    assert Counter(value(path) for path in (tmp_path / "plain").iterdir()) == {8: 1, 9: 1}
