"""Of a picture that is a line, what is needed is computed and no more."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
from oddities import encoded
from PIL import Image

from vtp.curation.ingest.encode import CentreCrop, store
from vtp.layers.decode import decode_rgb, middle
from vtp.layers.images import centre_crop, from_pil
from vtp.layers.preprocess import RandomView, resize_and_crop, squash

PEAK = 60e6  # bytes above what the process had; the largest line alone has 16 MB, and as much again to be turned

WORK = {
    "centre crop, wide": lambda wide, tall: centre_crop(decode_rgb(wide), 256),
    "centre crop, tall": lambda wide, tall: centre_crop(decode_rgb(tall), 256),
    "resized and cropped, wide": lambda wide, tall: resize_and_crop(decode_rgb(wide), resize=256, size=224),
    "resized and cropped, tall": lambda wide, tall: resize_and_crop(decode_rgb(tall), resize=256, size=224),
    "squashed, wide": lambda wide, tall: squash(decode_rgb(wide), 224),
    "squashed, tall": lambda wide, tall: squash(decode_rgb(tall), 224),
    "stored, wide": lambda wide, tall: store(wide, CentreCrop(name="centre_crop", size=256)),
    "stored, tall": lambda wide, tall: store(tall, CentreCrop(name="centre_crop", size=256)),
    "a tensor": lambda wide, tall: from_pil(decode_rgb(tall), 256),
    "a random view": lambda wide, tall: RandomView(224, 0.3, 0.5, 0, 0).of(decode_rgb(tall), 0),
}


def measured(function):
    """The bytes by which the memory of a process grew at most, in a fork of this one that gave back what was freed."""

    def resident(kind):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else what is freed is used again, and nothing grows
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = resident("VmRSS")
            function()
            os.write(write, str(resident("VmHWM") - before).encode())
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    os.close(write)
    said = os.read(read, 99)
    os.close(read)
    return int(said)


@pytest.mark.parametrize("side", [4000, 1_000_000])
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_a_line_takes_little_memory(work, side):
    wide, tall = (encoded(Image.new("RGB", size, (9, 8, 7)), "PNG") for size in ((side, 1), (1, side)))
    assert measured(lambda: work(wide, tall)) < PEAK


def test_the_measure_sees_memory():
    assert measured(lambda: np.ones(10_000_000)) > 79e6


def whole_crop(image, size, rounded):
    """As it is defined: all of the picture is scaled."""
    scale = size / min(image.size)
    image = image.resize((rounded(image.width * scale), rounded(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = ((side - size) / 2 for side in image.size)
    box = (int(left), int(top)) if rounded is round else (round(left), round(top))
    return image.crop((*box, box[0] + size, box[1] + size))


@pytest.mark.parametrize("shape", [(1, 4000), (2, 333), (7, 1001), (3, 4001), (9, 600), (1, 35), (1, 34)])
def test_the_crop_is_that_of_the_whole(shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for image in (Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2))):
        for size in (16, 31):
            for found, rounded in (
                (centre_crop(image, size), round),
                (resize_and_crop(image, resize=size, size=size), int),
            ):
                difference = np.asarray(whole_crop(image, size, rounded)).astype(int) - np.asarray(found)
                assert np.abs(difference).max() <= 3, rounded


def test_other_pictures_are_taken_whole():
    for size in ((32, 1), (1, 33), (640, 20), (20, 640), (5, 5)):
        picture = Image.new("RGB", size)
        assert middle(picture) is picture
    assert middle(Image.new("RGB", (36, 1))).size == (32, 1)
    assert middle(Image.new("RGB", (3, 4000))).size == (3, 100)


def test_a_line_is_stored_as_a_square():
    stored = store(
        encoded(Image.new("RGB", (60_000, 1), (50, 60, 70)), "PNG"), CentreCrop(name="centre_crop", size=256)
    )
    assert (stored.width, stored.height) == (256, 256)
