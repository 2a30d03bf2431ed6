"""The protocols of preprocessing, pixel for pixel those of torchvision and open_clip; what is drawn is drawn by address."""

import numpy as np
import pytest
import torch
from crops import CASES, DRAWN, assert_spread_as_torchvisions
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomResizedCrop, Resize
from torchvision.transforms import functional as F

from vtp.draws import numpy_draws
from vtp.layers.preprocess import (
    TRIES,
    Box,
    CentreView,
    RandomView,
    Squash,
    random_box,
    resize_and_crop,
    resized_box,
    squash,
)

SIZES = [(64, 64), (61, 97), (97, 61), (33, 240), (240, 33), (32, 47), (32, 32), (500, 333)]


def picture(width, height):
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def same(ours, theirs):
    assert ours.size == theirs.size
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("size", [32, 33])
def test_squash_is_torchvisions(shape, size):
    image = picture(*shape)
    same(squash(image, size), Resize((size, size))(image))  # bilinear by default, as VTP's script has it
    same(Squash(size).of(image, 0), squash(image, size))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("resize", "size"), [(32, 32), (37, 32), (36, 31), (48, 33)])
def test_resize_and_crop_is_torchvisions(shape, resize, size):
    image = picture(*shape)
    theirs = Compose([Resize(resize, interpolation=InterpolationMode.BICUBIC), CenterCrop(size)])
    same(resize_and_crop(image, resize=resize, size=size), theirs(image))
    same(CentreView(resize, size).of(image, 0), theirs(image))


@pytest.mark.parametrize("shape", SIZES)
def test_the_centre_view_is_open_clips(shape):
    from open_clip.transform import image_transform

    ours = np.asarray(CentreView(32, 32).of(picture(*shape), 0))
    theirs = image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(picture(*shape))
    assert np.array_equal(ours, (theirs * 255).round().permute(1, 2, 0).numpy().astype(np.uint8))


@pytest.mark.parametrize("shape", SIZES)
def test_resized_box_is_torchvisions(shape):
    image, (width, height) = picture(*shape), shape
    for box in (Box(0, 0, width, height), Box(3, 5, 20, 17), Box(1, 0, 32, 32), Box(0, 0, 1, 9)):
        theirs = F.resized_crop(
            image, box.top, box.left, box.height, box.width, [32, 32], interpolation=InterpolationMode.BICUBIC
        )
        same(resized_box(image, box, 32), theirs)


class Fed:
    """torch's draws of RandomResizedCrop, from given uniform numbers."""

    def __init__(self, uniform):
        self.numbers = iter(uniform)

    def uniform_(self, low, high):
        return torch.tensor([float(low) + (float(high) - float(low)) * next(self.numbers)], dtype=torch.float64)

    def randint(self, low, high, size):
        return torch.tensor([int(next(self.numbers) * (high - low))])


@pytest.mark.parametrize("shape", [*SIZES, (10, 400), (400, 10), (1, 7)])
def test_random_box_is_torchvisions(shape, monkeypatch):
    """The same box from the same numbers, however many tries are in vain."""
    width, height = shape
    for seed in range(40):
        uniform, numbers = numpy_draws(seed, "test").random((TRIES, 4)), []
        for area, aspect, left, top in uniform:
            numbers += [area, aspect]
            if fits(width, height, area, aspect):  # a place is drawn for a size that fits, top before left
                numbers += [top, left]
                break
        fed = Fed(numbers)
        monkeypatch.setattr(torch, "empty", lambda count, fed=fed: fed)
        monkeypatch.setattr(torch, "randint", fed.randint)
        top, left, h, w = RandomResizedCrop.get_params(Image.new("RGB", shape), [0.08, 1.0], [3 / 4, 4 / 3])
        monkeypatch.undo()
        assert random_box(width, height, uniform, scale=(0.08, 1.0)) == Box(left, top, w, h)


@pytest.mark.parametrize("name", CASES)
def test_random_box_has_the_sides_that_torchvision_drew(name):
    """`golden/random-resized-crop`: from what it drew, try by try; a fallback has its place too."""
    case = CASES[name]
    (low, high), (least, largest) = case["scale"], np.log(case["ratio"])
    shares, aspects = (DRAWN[f"{name}.drawn_{what}"].astype(np.float64) for what in ("share", "log_aspect"))
    fallbacks = 0
    for (top, left, h, w), share, aspect in zip(DRAWN[f"{name}.crop"].tolist(), shares, aspects, strict=True):
        tries = np.count_nonzero(~np.isnan(share))  # nothing was drawn behind the first that fits
        uniform = np.full((TRIES, 4), np.nan)
        uniform[:tries, 0] = (share[:tries] - low) / (high - low)
        uniform[:tries, 1] = (aspect[:tries] - least) / (largest - least)
        uniform[:tries, 2:] = 0  # places are not known
        box = random_box(case["width"], case["height"], uniform, scale=(low, high), aspects=tuple(case["ratio"]))
        assert (box.width, box.height) == (w, h)
        if box[:2] != (0, 0):
            assert box[:2] == (left, top)
            fallbacks += 1
    assert fallbacks > 0 or name not in ("imagenet_224x900", "tall_1200x300")  # those of the others begin at 0, 0


@pytest.mark.parametrize("name", CASES)
def test_random_boxes_are_spread_as_torchvisions(name):
    case = CASES[name]
    ranges = {"scale": tuple(case["scale"]), "aspects": tuple(case["ratio"])}
    draws = (numpy_draws(0, name, number).random((TRIES, 4)) for number in range(2000))
    boxes = [random_box(case["width"], case["height"], uniform, **ranges) for uniform in draws]
    assert_spread_as_torchvisions(boxes, name)


def fits(width, height, area, aspect):
    pixels = width * height * (0.08 + 0.92 * area)
    ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * aspect)
    w, h = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
    return 0 < w <= width and 0 < h <= height


def test_random_views_are_drawn_by_address():
    image = picture(97, 61)
    view = RandomView(32, 0.08, 0.5, 0, 3)
    same(view.of(image, 5), view.of(image, 5))
    others = [view._replace(seed=1).of(image, 5), view._replace(epoch=4).of(image, 5), view.of(image, 6)]
    assert all(not np.array_equal(np.asarray(other), np.asarray(view.of(image, 5))) for other in others)


def test_a_flip_mirrors_the_same_box():
    image = picture(97, 61)
    never, always = (RandomView(32, 0.08, flip, 0, 0).of(image, 7) for flip in (0.0, 1.0))
    same(always, F.hflip(never))
    half = [np.asarray(RandomView(32, 0.08, 0.5, 0, 0).of(image, row)) for row in range(200)]
    mirrored = [np.array_equal(x, RandomView(32, 0.08, 1.0, 0, 0).of(image, row)) for row, x in enumerate(half)]
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.1)
