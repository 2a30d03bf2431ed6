"""Sizes of a training, and which of them a picture is for."""

import numpy as np
import pytest
from PIL import Image

from vtp.config import ConfigError
from vtp.data.sizes import PictureSize, SizesConfig
from vtp.layers.images import cover_crop

PAPER = {"short_edges": [512, 256, 384], "ratios": [1.0, 0.5, 16 / 9, 0.75], "multiple": 16}


def sizes_of(**changes):
    return SizesConfig.parse(PAPER | changes, where="test")


def test_sizes_are_edges_at_ratios_rounded_to_the_multiple():
    sizes = sizes_of()
    assert sizes.edges == [256, 384, 512]
    assert sizes.sizes == [
        [(256, 256), (384, 384), (512, 512)],
        [(512, 256), (768, 384), (1024, 512)],
        [(256, 448), (384, 688), (512, 912)],
        [(336, 256), (512, 384), (688, 512)],  # height, width
    ]
    assert sizes.square == (256, 256)
    assert str(PictureSize(256, 448)) == "448x256"
    assert len(sizes.all) == 12


def test_a_picture_is_of_the_nearest_ratio_and_for_the_edges_up_to_its_own():
    """By logarithms: twice as wide as high is as far from a square as twice as high as wide."""
    sizes = sizes_of(ratios=[0.5, 1.0, 2.0])

    def of(width, height):
        ratio, edges = divmod(int(sizes.bucket_of(np.array([width]), np.array([height]))[0]), 3)
        return sizes.ratios[ratio], sizes.edges[: edges + 1]

    every = [256, 384, 512]
    assert of(512, 512) == (1.0, every)
    assert of(511, 4000) == (0.5, [256, 384])
    assert of(4000, 384) == (2.0, [256, 384])
    assert of(383, 383) == (1.0, [256])
    assert of(20, 30) == (0.5, [256])
    edge = np.sqrt(2)
    for wide in (1.40, 1.43):
        near = 2.0 if wide > edge else 1.0
        assert of(round(1000 * wide), 1000)[0] == near
        assert of(1000, round(1000 * wide))[0] == 1 / near
    pictures = np.random.default_rng(0).integers(1, 3000, (500, 2))
    ratios, edges = np.divmod(sizes.bucket_of(*pictures.T), 3)
    distance = np.abs(np.log(pictures[:, 0] / pictures[:, 1])[:, None] - np.log(sizes.ratios))
    assert (distance[np.arange(500), ratios] == distance.min(axis=1)).all()
    assert ((np.array(sizes.edges)[edges] <= pictures.min(axis=1)) | (edges == 0)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": [0.5, 2.0]}, "ratios lack 1.0"),
        ({"short_edges": [256, 300]}, "short_edges 300 is not a multiple of 16"),
        ({"ratios": [1.0, 1.02]}, r"ratios 1\.0 and 1\.02 are both 256x256 at the short edge 256; leave one out"),
        ({"ratios": [1.0, 1.0]}, "1.0 comes twice"),
        ({"ratios": [1.0, 9.0]}, "less than or equal to 8"),
        ({"short_edges": []}, "short_edges"),
    ],
)
def test_sizes_that_cannot_be_are_told(changes, message):
    with pytest.raises(ConfigError, match=message):
        sizes_of(**changes)


@pytest.mark.parametrize("whole", [(64, 48), (48, 64), (300, 200), (1023, 97), (97, 1023), (33, 32), (2000, 16)])
def test_a_crop_covers_its_rectangle_from_the_centre(whole):
    """Of a picture that is a horizontal and a vertical ramp: its scale and its middle show where the crop lies."""
    width, height = whole
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).round().astype(np.uint8))
    for size in ((32, 32), (24, 56), (56, 24), (16, 64)):
        crop = cover_crop(picture, *size)
        assert crop.size == size[::-1]
        shown, scale = np.asarray(crop).astype(float), max(size[1] / width, size[0] / height)
        assert shown[..., :2].mean(axis=(0, 1)) == pytest.approx([127.5, 127.5], abs=4 + 255 / min(size))
        for axis, side in ((1, width), (0, height)):
            span = np.ptp(shown[..., 1 - axis].mean(axis=1 - axis))
            assert span == pytest.approx(255 * min(1, size[axis] / (scale * side)), abs=6 + 255 / size[axis])
