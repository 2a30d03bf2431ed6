"""Views: geometry, colours, and draws by address."""

from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from crops import CASES, assert_spread_as_torchvisions
from PIL import Image

from vtp.data.views import (
    CentreCropView,
    ClipViewConfig,
    RandomCropView,
    ScaledCropView,
    SslViewsConfig,
    _orders,
    _recolour,
    clip_batch,
    clip_crop,
    gaussian_blur,
    least_size,
    reconstruction_batch,
    reconstruction_crop,
    ssl_batch,
    ssl_crops,
)
from vtp.data.views import _Colours as Colours
from vtp.layers.colour import shift_hue
from vtp.layers.images import from_pil, normalise, to_uint8

PLAIN = {"global_scale_min": 1.0, "local_scale_min": 0.1, "local_scale_max": 0.3, "flip": 0.0, "jitter": 0.0}
PLAIN |= {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grey": 0.0}
PLAIN |= {"jitter_order": "fixed", "blur_sigma_max": 2.0, "solarize": 0.0}
PLAIN |= {"blur": {"name": "probabilities", "first": 0.0, "second": 0.0, "local": 0.0}}


def ssl_config(**changes) -> SslViewsConfig:
    values = {"global_size": 16, "local_size": 8, "local_views": 3} | PLAIN | changes
    return SslViewsConfig.parse(values, where="test")


def noise(count: int, side: int = 16) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def test_shapes_and_emptiness():
    global_views, local_views = ssl_batch(noise(5), ssl_config(), 0, np.arange(5))
    assert global_views.shape == (5, 2, 3, 16, 16)
    assert local_views.shape == (5, 3, 3, 8, 8)
    assert global_views.dtype == local_views.dtype == torch.uint8
    global_views, local_views = ssl_batch([], ssl_config(), 0, np.arange(0))
    assert global_views.shape == (0, 2, 3, 16, 16)
    assert local_views.shape == (0, 3, 3, 8, 8)
    assert ssl_batch(noise(2), ssl_config(local_views=0), 0, np.arange(2))[1].shape[:2] == (2, 0)
    assert clip_batch([], ClipViewConfig(size=8, scale_min=0.9), 0, np.arange(0)).shape == (0, 3, 8, 8)


def test_a_view_depends_on_its_address_alone():
    config = ssl_config(jitter=0.8, flip=0.5, grey=0.2, blur={"name": "as_trained"}, solarize=0.2)
    images = noise(6)
    together, _ = ssl_batch(images, config, 0, np.arange(6))
    for chosen in ([4], [5, 1]):
        alone, _ = ssl_batch([images[i] for i in chosen], config, 0, np.array(chosen))
        assert (alone.int() - together[chosen].int()).abs().max() <= 1  # a rounding of a blur
    other, _ = ssl_batch(images, config, 1, np.arange(6))
    assert not torch.equal(other, together)
    clip = ClipViewConfig(size=16, scale_min=0.5)
    assert torch.equal(clip_batch(images, clip, 0, np.arange(6))[3:4], clip_batch(images[3:4], clip, 0, np.array([3])))


def test_a_crop_of_everything_is_the_image():
    """Nothing but the square itself has its area and lies within it, so tries are in vain until there is no other."""
    images = noise(40)
    views, _ = ssl_batch(images, ssl_config(global_scale_min=1.0), 3, np.arange(40))
    for view in views.unbind(1):
        assert torch.equal(view, torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]))


def crops_of(name, position):
    """Every crop of a sample with the scale of a golden case."""
    low, high = CASES[name]["scale"]
    if high == 1.0:
        ssl = ssl_config(global_scale_min=low)
        yield clip_crop(ClipViewConfig(size=16, scale_min=low), 0, position)
        yield reconstruction_crop(RandomCropView(name="random_crop", scale_min=low), 16, 0, position)
        yield from ssl_crops(ssl, 0, position)[0][:2]
    else:
        yield from ssl_crops(ssl_config(local_scale_min=low, local_scale_max=high), 0, position)[0][2:]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["ratio"] == [3 / 4, 4 / 3]])
def test_crops_of_every_objective_are_random_resized_crops(name):
    """Areas, aspects, sides and places are spread as torchvision's; no crop but a fallback is below `scale_min`."""
    case = CASES[name]
    whole = (case["width"], case["height"])
    every = [[crop.box(whole) for crop in crops_of(name, position)] for position in range(2000)]
    for boxes in zip(*every, strict=True):
        assert_spread_as_torchvisions(boxes, name)
        shares = np.array([box.width * box.height / (whole[0] * whole[1]) for box in boxes])
        rounded = 2 / min(whole)  # a side may be half a pixel short
        assert np.mean(shares < case["scale"][0] - rounded) <= case["fallback_share"] + 0.06


def coordinates(width, height):
    """An image [1, 3, H, W] of the places of its pixels, in shares of the sides."""
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.zeros(height, width)])[None]


@pytest.mark.parametrize("whole", [(640, 480), (479, 641), (512, 512)])
def test_a_smaller_decode_is_cropped_in_the_same_place(whole):
    """Also where a try fits into one of the two sizes alone."""
    image, config = coordinates(*whole), ClipViewConfig(size=16, scale_min=0.8)
    small = F.interpolate(image, size=[-(-side // 4) for side in whole[::-1]], mode="area")
    others = 0
    for position in range(400):
        crop = clip_crop(config, 0, position)
        box, of_small = crop.box(whole), crop.box((small.shape[3], small.shape[2]))
        others += abs(box.width - 4 * of_small.width) > 8  # another try was taken
        assert (crop.of(image, whole) - crop.of(small, whole)).abs().max() < 0.01
        assert min(box.width, box.height) * least_size(whole, [crop])[0] / whole[0] >= 16
    assert others > 0


def colours(count: int, **changes) -> Colours:
    no, one = torch.zeros(count, dtype=torch.bool), torch.ones(count, 1, 1, 1)
    values = {"flip": no, "jitter": no, "brightness": one, "contrast": one, "saturation": one, "hue": 0 * one}
    values |= {"grey": no, "blur": no, "sigma": torch.ones(count), "solarize": no, "order": None}
    return Colours(**(values | changes))


@pytest.mark.parametrize("value", [0.6, 1.0, 1.4])
def test_jitter_is_torchvisions(value):
    from torchvision.transforms.v2 import functional as TF

    x = torch.rand(2, 3, 8, 8)
    on, factor = torch.ones(2, dtype=torch.bool), torch.full((2, 1, 1, 1), value)
    for name, function in (
        ("brightness", TF.adjust_brightness),
        ("contrast", TF.adjust_contrast),
        ("saturation", TF.adjust_saturation),
    ):
        ours = _recolour(x, colours(2, jitter=on, **{name: factor}), 4)
        torch.testing.assert_close(ours, function(x, value), atol=2e-3, rtol=0)
    torch.testing.assert_close(shift_hue(x, factor - 1), TF.adjust_hue(x, value - 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(shift_hue(x, 0 * factor), x, atol=1e-5, rtol=0)


def test_jitter_in_any_order_is_torchvisions():
    """Each of the 24 orders, one a picture, by torchvision's functions one after the other."""
    from torchvision.transforms.v2 import functional as TF

    every = list(permutations(range(4)))
    x, on = torch.rand(24, 3, 8, 8), torch.ones(24, dtype=torch.bool)
    factors = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.2, "hue": 0.1}
    wide = {name: torch.full((24, 1, 1, 1), value) for name, value in factors.items()}
    ours = _recolour(x.clone(), colours(24, jitter=on, order=torch.tensor(every), **wide), 4)
    for image, result, order in zip(x, ours, every, strict=True):
        expected = image
        for number in order:
            name = list(factors)[number]
            expected = getattr(TF, f"adjust_{name}")(expected, factors[name])
        torch.testing.assert_close(result, expected, atol=4e-3, rtol=0)
    fixed = _recolour(x.clone(), colours(24, jitter=on, **wide), 4)
    assert torch.equal(fixed[0], ours[0])
    assert not torch.equal(fixed[1], ours[1])


def test_orders_of_jitter_are_as_likely_and_change_nothing_else():
    orders = _orders((torch.arange(240) + 0.5) / 240)
    assert orders.unique(dim=0, return_counts=True)[1].tolist() == [10] * 24
    plain, ordered = (ssl_config(jitter=0.8, grey=0.2, jitter_order=order) for order in ("fixed", "random"))
    (crops, fixed), (again, drawn) = (ssl_crops(config, 0, 7) for config in (plain, ordered))
    assert all(a.box((20, 20)) == b.box((20, 20)) for a, b in zip(crops, again, strict=True))
    assert np.array_equal(drawn[:, :-1], fixed)
    images = noise(6)
    together, _ = ssl_batch(images, ordered, 0, np.arange(6))
    assert not torch.equal(together, ssl_batch(images, plain, 0, np.arange(6))[0])
    alone, _ = ssl_batch(images[4:], ordered, 0, np.array([4, 5]))
    assert torch.equal(alone, together[4:])


def test_blur_is_torchvisions_and_keeps_the_mean():
    from torchvision.transforms.v2 import functional as TF

    x = torch.rand(2, 3, 16, 16)
    ours = gaussian_blur(x, torch.tensor([2.0, 2.0]), 4)
    torch.testing.assert_close(ours, TF.gaussian_blur(x, [9, 9], [2.0, 2.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(gaussian_blur(torch.ones(1, 3, 8, 8), torch.tensor([1.0]), 2), torch.ones(1, 3, 8, 8))


def test_switches():
    x = torch.rand(2, 3, 8, 8)
    first = torch.tensor([True, False])
    assert torch.equal(_recolour(x, colours(2), 4), x)
    assert torch.equal(_recolour(x, colours(2, flip=first), 4), torch.stack([x[0].flip(2), x[1]]))
    grey = _recolour(x, colours(2, grey=first), 4)
    assert grey[0].std(0).max() < 1e-6
    assert torch.equal(grey[1], x[1])
    solar = _recolour(x, colours(2, solarize=first), 4)
    assert solar[0].max() <= 128 / 255
    assert torch.equal(solar[1], x[1])


def test_probabilities_are_effective():
    """A probability is the share of views that are changed."""
    flat = [Image.new("RGB", (8, 8), (200, 40, 40))] * 400
    config = ssl_config(grey=0.25, global_size=8, local_views=0)
    views, _ = ssl_batch(flat, config, 0, np.arange(400))
    share = (views.float().std(2).amax((2, 3)) < 1).float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.06)


def test_blur_presets():
    """DINOv2's code inverted what its configuration says."""
    for name, expected in (("as_trained", (0.0, 0.9, 0.5)), ("as_intended", (1.0, 0.1, 0.5))):
        blur = ssl_config(blur={"name": name}).blur
        assert (blur.first, blur.second, blur.local) == expected
    sharp = Image.fromarray((np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    views, _ = ssl_batch([sharp] * 60, ssl_config(blur={"name": "as_trained"}), 0, np.arange(60))
    contrast = views.float().std((2, 3, 4))
    assert contrast[:, 0].min() > contrast[:, 1].median()


def test_reconstruction_views():
    images = noise(3, side=20)
    centre = reconstruction_batch(images, CentreCropView(name="centre_crop"), 16, 0, np.arange(3))
    assert torch.equal(normalise(centre[0]), from_pil(images[0], 16))
    crop = RandomCropView(name="random_crop", scale_min=0.5)
    first, again = (reconstruction_batch(images, crop, 16, 0, np.arange(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, clip_batch(images, ClipViewConfig(size=16, scale_min=0.5), 0, np.arange(3)))


@pytest.mark.parametrize("whole", [(480, 640), (300, 200), (24, 24), (1, 9)])
def test_a_scaled_crop_is_rae_s(whole):
    """256 of a short side of 384: two thirds of the short side, anywhere, and nothing of another aspect."""
    view, short = ScaledCropView(name="scaled_crop", scale=1.5), min(whole)
    boxes = [reconstruction_crop(view, 16, 0, position).box(whole) for position in range(400)]
    assert {(box.width, box.height) for box in boxes} == {(max(1, round(short / 1.5)),) * 2}
    for side, starts in zip(whole, zip(*((box.left, box.top) for box in boxes), strict=True), strict=True):
        most = side - boxes[0].width
        assert (min(starts), max(starts)) == (pytest.approx(0, abs=0.02 * most), pytest.approx(most, abs=0.02 * most))
    image = coordinates(*whole)
    crop = reconstruction_crop(view, 16, 0, 0)
    assert crop.of(image, whole).shape == (1, 3, 16, 16)
    least = least_size(whole, [crop])
    assert all(1 <= side <= most for side, most in zip(least, whole, strict=True))


def test_normalise_inverts():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(to_uint8(normalise(pixels)), pixels)
