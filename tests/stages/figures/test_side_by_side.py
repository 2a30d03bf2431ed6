"""What a study that compares runs ends with, beside its table: reconstructions side by side, distances along trainings."""

import numpy as np
import pytest
import torch
from PIL import Image

from stages.figures.convergence import convergence_of, draw_convergence
from stages.figures.reconstructions import write_pairs
from stages.figures.side_by_side import PAIRS, draw_side_by_side
from vtp.artefact import ArtefactError, write_json
from vtp.inference.grid import tile_of

SIDE, COUNT = 16, 3


def pictures(seed):
    return torch.randint(0, 256, (COUNT, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def write(plots, place, written, originals=None):
    folder = plots / place / "reconstructions"
    folder.mkdir(parents=True)
    write_pairs(pictures(0) if originals is None else originals, written, folder / PAIRS)


def shown(path, images):
    """Whether a picture holds these images next to each other, each enlarged."""
    canvas = np.asarray(Image.open(path).convert("RGB"))
    scale = tile_of(SIDE) // SIDE
    wanted = images[0].permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
    tall, wide = wanted.shape[:2]
    places = np.argwhere((canvas == wanted[0, 0]).all(-1))
    return any(np.array_equal(canvas[top : top + tall, left : left + wide], wanted) for top, left in places)


def test_the_same_pictures_through_every_tokenizer(tmp_path):
    """Of the last point, and of the first training where there are several."""
    plots = tmp_path / "plots"
    write(plots, "ae/1.000e+12", pictures(1))
    write(plots, "ae/end", pictures(2))
    write(plots, "vtp/1/9.000e+11", pictures(3))
    write(plots, "vtp/0/9.000e+11", pictures(4))
    write(plots, "vtp/0/1.000e+12", pictures(5))
    draw_side_by_side(plots, tmp_path / "side.png")
    found = {seed: shown(tmp_path / "side.png", pictures(seed)) for seed in range(6)}
    assert found == {0: True, 1: False, 2: True, 3: False, 4: False, 5: True}


def test_runs_that_reconstruct_other_pictures_do_not_compare(tmp_path):
    write(tmp_path / "plots", "ae/end", pictures(1))
    write(tmp_path / "plots", "vtp/end", pictures(1), originals=pictures(9))
    with pytest.raises(ArtefactError, match="other pictures than those of the runs before"):
        draw_side_by_side(tmp_path / "plots", tmp_path / "side.png")


def test_without_reconstructions_there_is_no_picture(tmp_path):
    (tmp_path / "plots/ae").mkdir(parents=True)
    draw_side_by_side(tmp_path / "plots", tmp_path / "side.png")
    assert not (tmp_path / "side.png").exists()


def test_distances_along_trainings_by_run(tmp_path):
    """Those that were watched, each by its name and tokenizer; other figures of the stage are none."""
    curve = {"epochs_0.5": 30.0, "epochs_1e-05": 80.0, "epochs_1": 20.0}
    watched = {"epochs": 1.0, "gfid_x_12_cfg1p5_balanced": curve, "epochs_to_reach": {"25": {"evaluated": 1.0}}}
    write_json(mkdir(tmp_path / "points/ae/end") / "train_generator.json", {"train_generator": watched})
    write_json(mkdir(tmp_path / "points/vtp/0/end") / "train_generator.json", {"train_generator": {"epochs": 1.0}})
    found = convergence_of(tmp_path / "points")
    assert found == {"gfid_x_12_cfg1p5_balanced": {"ae/end": {1e-05: 80.0, 0.5: 30.0, 1.0: 20.0}}}
    draw_convergence(found, tmp_path / "convergence.png")
    assert Image.open(tmp_path / "convergence.png").width > 400


def mkdir(folder):
    folder.mkdir(parents=True)
    return folder
