"""From heatmaps to pictures, and the folder of a detector."""

import json

import pytest
import torch
from detecting import NAMES, KnownScenes, arrangement_of

from vtp.artefact import ArtefactError, digest, load_tensors, save_tensors
from vtp.models.scene_detector import DetectorConfig, SceneDetector

SCENES = [
    arrangement_of((0, (8.0, 16.2), 14), (1, (24.0, 15.0), 14)),
    arrangement_of((2, (16.0, 16.0), 30)),
    arrangement_of(),
    arrangement_of((3, (6, 6), 10), (3, (16.5, 5), 10), (3, (7, 17), 10), (3, (26, 26), 10)),
]


def blank(count, height=32, width=32):
    return torch.zeros(count, 3, height, width, dtype=torch.uint8)


def found_in(arrangements, stride=2, **options):
    width, height = arrangements[0].canvas
    return KnownScenes(arrangements, stride=stride, **options).detect(blank(len(arrangements), height, width))


@pytest.mark.parametrize("stride", [2, 4])
def test_peaks_are_pictures(stride):
    """To less than half a cell, sizes and classes exactly; nothing where nothing is."""
    for arrangement, detections in zip(SCENES, found_in(SCENES, stride), strict=True):
        left = list(arrangement.places)
        assert len(detections) == len(left)
        assert [each.score for each in detections] == sorted((each.score for each in detections), reverse=True)
        for each in detections:
            x, y = each.centre[0] * 32, each.centre[1] * 32
            nearest = min(left, key=lambda place: abs(place.centre[0] - x) + abs(place.centre[1] - y))
            left.remove(nearest)
            assert each.label == nearest.label
            assert each.size * 32 == pytest.approx(nearest.size)
            assert max(abs(nearest.centre[0] - x), abs(nearest.centre[1] - y)) <= 0.4 * stride


def test_centres_are_shares_of_width_and_height_and_sizes_of_the_short_edge():
    (detections,) = found_in([arrangement_of((1, (48, 8), 12), canvas=(64, 32))])
    (found,) = detections
    assert found.centre == pytest.approx((0.75, 0.25), abs=0.02)
    assert found.size == pytest.approx(12 / 32)


def test_what_would_overlap_is_one():
    """Two peaks in one picture; pictures that touch are two."""
    (detections,) = found_in([arrangement_of((0, (10, 16), 20), (1, (18, 16), 20))])
    assert len(detections) == 1
    (detections,) = found_in([arrangement_of((0, (8, 16), 12), (1, (20, 16), 12))])
    assert len(detections) == 2


def test_other_sizes_are_resized_and_other_types_refused():
    arrangement = arrangement_of((0, (8, 24), 12))
    model = KnownScenes([arrangement, arrangement])
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    (large,), (same,) = model.detect(blank(1, 64, 64)), model.detect(blank(1))
    assert large == same
    assert seen == [(1, 3, 32, 32)] * 2
    with pytest.raises(TypeError, match="uint8 images, given torch.float32"):
        model.detect(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("shape", [(32, 32), (32, 48), (50, 37)])
@pytest.mark.parametrize("stride", [2, 4])
def test_images_of_any_shape_have_heatmaps(shape, stride):
    torch.manual_seed(0)
    model = SceneDetector(DetectorConfig(width=8, stride=stride), classes=NAMES, image_size=32)
    maps = model(torch.randn(2, 3, *shape))
    cells = (shape[0] // stride, shape[1] // stride)
    assert [tuple(each.shape) for each in maps] == [(2, *cells), (2, 4, *cells), (2, *cells)]
    assert torch.equal(maps.centres, torch.full_like(maps.centres, -4.0))  # nothing is there at first


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = SceneDetector(DetectorConfig(width=8, stride=2), classes=NAMES, image_size=32)
    torch.nn.init.normal_(model.head.weight)
    model.save(tmp_path / "detector")
    return tmp_path / "detector", model


def test_a_folder_gives_the_same_detector(folder, tmp_path):
    path, model = folder
    loaded, images = SceneDetector.from_pretrained(path), torch.randn(2, 3, 32, 48)
    assert (loaded.classes, loaded.image_size, loaded.config) == (NAMES, 32, model.config)
    assert not loaded.training
    for ours, theirs in zip(model.eval()(images), loaded(images), strict=True):
        assert torch.equal(ours, theirs)
    loaded.save(tmp_path / "again")
    assert digest(tmp_path / "again") == digest(path)


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing; fetch the folder again"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "not the files that were written there"),
        (lambda f: change(f, files={}), "not the files that were written there"),
        (lambda f: change(f, format_version=9), "no detector of format 1; name a folder of train_detector"),
        (lambda f: change(f, classes=["frog"]), "does not fit its config.json"),
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder, damage, message):
    damage(folder[0])
    with pytest.raises(ArtefactError) as raised:
        SceneDetector.from_pretrained(folder[0])
    assert message in str(raised.value)


def test_weights_that_were_exchanged_are_found(folder):
    path = folder[0] / "model.safetensors"
    save_tensors(path, {name: values + 1 for name, values in load_tensors(path).items()})
    with pytest.raises(ArtefactError, match="model.safetensors has sha256"):
        SceneDetector.from_pretrained(folder[0])
