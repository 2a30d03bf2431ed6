"""What a user's picture becomes is what training makes of the same file, however it is given."""

import io

import numpy as np
import pytest
import torch
from foreign import GOLDEN
from PIL import Image

from vtp import VisualTokenizer
from vtp.curation.ingest.encode import Keep, store
from vtp.data.dataset import ShardDataset
from vtp.data.shards import FORMAT_VERSION, NO_LABEL, Manifest, SampleRecord, describe_split, write_shard
from vtp.layers.decode import DecodeError
from vtp.layers.images import normalise, to_uint8

WIDTH, HEIGHT, SIDE = 90, 70, 64


@pytest.fixture(scope="module")
def tokenizer():
    return VisualTokenizer.from_pretrained(GOLDEN / "vtp-tiny-ae")


def noise(channels, dtype=np.uint8):
    drawn = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (HEIGHT, WIDTH, channels), dtype=dtype)
    return drawn[:, :, 0] if channels == 1 else drawn


def file_of(picture, kind, **options):
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif.tobytes(), "quality": 95}


def files():
    colours = Image.fromarray(noise(3))
    frames = [colours.rotate(angle) for angle in (90, 180)]
    yield "rgb.png", file_of(colours, "PNG")
    yield "rgba.png", file_of(Image.fromarray(noise(4)), "PNG")
    yield "grey.png", file_of(Image.fromarray(noise(1)), "PNG")
    yield "grey-alpha.png", file_of(Image.fromarray(noise(4)).convert("LA"), "PNG")
    yield "bits.png", file_of(Image.fromarray(noise(1)).convert("1"), "PNG")
    yield "wide.png", file_of(Image.fromarray(noise(1, np.uint16)), "PNG")
    yield "wide.tif", file_of(Image.fromarray(noise(1, np.uint16)), "TIFF")
    yield "integers.tif", file_of(Image.fromarray(noise(1, np.uint16).astype(np.int32)), "TIFF")
    yield "float.tif", file_of(Image.fromarray(noise(1).astype(np.float32) / 255), "TIFF")
    yield "palette.png", file_of(colours.quantize(32), "PNG")
    yield "palette-transparent.png", file_of(colours.quantize(32), "PNG", transparency=3)
    yield "key-transparent.png", file_of(Image.new("RGB", (WIDTH, HEIGHT), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    yield "cmyk.jpg", file_of(Image.fromarray(noise(4), "CMYK"), "JPEG", quality=95)
    yield "ycc.tif", file_of(colours.convert("YCbCr"), "TIFF")
    yield "lab.tif", file_of(Image.fromarray(noise(3), "LAB"), "TIFF")
    yield "animated.gif", file_of(colours, "GIF", save_all=True, append_images=frames)
    yield "transparent.webp", file_of(Image.fromarray(noise(4)), "WEBP", lossless=True)
    for orientation in range(2, 9):
        yield f"turned-{orientation}.jpg", file_of(colours, "JPEG", **turned(orientation))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What training reads of every file once prepare_data has stored it, by name: uint8 [3, S, S]."""
    folder = tmp_path_factory.mktemp("shards")
    records = []
    for number, (_, content) in enumerate(files()):
        stored = store(content, Keep(name="keep"))
        records.append(SampleRecord(f"{number:02d}", *stored, "", NO_LABEL, NO_LABEL, "image"))
    split = describe_split([write_shard(folder / "train-00000.tar", records, classes=0)])
    empty = {key: [] for key in ("classes", "class_ids", "templates", "categories", "category_of_class")}
    values = {"format_version": FORMAT_VERSION, "source": "test", "image_size": None, "location": None}
    Manifest.parse(values | empty | {"attribution": "", "splits": {"train": split}}, where="test").save(folder)
    pixels = ShardDataset(folder, "train").images(np.arange(len(records)), SIDE)
    return {name: each for (name, _), each in zip(files(), pixels, strict=True)}


@pytest.mark.parametrize(("name", "content"), [pytest.param(*each, id=each[0]) for each in files()])
def test_a_file_is_what_training_sees_of_it(trained, tokenizer, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    expected = normalise(trained[name])[None]
    for given in (path, str(path), content, Image.open(path)):
        assert torch.equal(tokenizer.preprocess(given), expected)


def test_the_traps_of_collections(tokenizer):
    """The values themselves: white behind transparency, the high byte of 16 bits, upright, the first frame."""

    def corner(picture, place=(0, 0)):
        return to_uint8(tokenizer.preprocess(picture))[0, :, place[1], place[0]].tolist()

    assert corner(Image.new("RGBA", (80, 80), (10, 200, 30, 0))) == [255, 255, 255]
    assert corner(Image.new("RGBa", (80, 80), (0, 0, 0, 0))) == [255, 255, 255]
    assert corner(Image.new("LA", (80, 80), (0, 255))) == corner(Image.new("La", (80, 80), (0, 255))) == [0, 0, 0]
    assert corner(Image.fromarray(np.full((80, 80), 0x8123, np.uint16))) == [0x81] * 3
    halves = Image.new("RGB", (SIDE, SIDE), "red")
    halves.paste("blue", (0, SIDE // 2, SIDE, SIDE))
    upside_down = file_of(halves, "PNG", exif=turned(3)["exif"])
    assert corner(upside_down) == corner(Image.open(io.BytesIO(upside_down))) == [0, 0, 255]
    assert corner(upside_down, (0, SIDE - 1)) == [255, 0, 0]
    frames = file_of(Image.new("RGB", (80, 80), "lime"), "GIF", save_all=True, append_images=[halves.resize((80, 80))])
    assert corner(frames) == [0, 255, 0]


def test_pixels_may_be_given_as_they_are(tokenizer):
    pixels = noise(3)
    expected = tokenizer.preprocess(Image.fromarray(pixels))
    assert torch.equal(tokenizer.preprocess(pixels), expected)
    assert torch.equal(tokenizer.preprocess(torch.from_numpy(pixels)), expected)
    flipped = tokenizer.preprocess(Image.fromarray(np.ascontiguousarray(pixels[:, ::-1])))
    assert torch.equal(tokenizer.preprocess(pixels[:, ::-1]), flipped)
    transposed = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(tokenizer.preprocess(transposed), expected)


def test_a_list_is_a_batch(tokenizer, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.new("RGBA", (200, 100), (1, 2, 3, 255)).save(paths[0])
    Image.new("L", (30, 99), 7).save(paths[1])
    several = [paths[0], str(paths[1]), noise(3), Image.open(paths[0]), paths[1].read_bytes()]
    batch = tokenizer.preprocess(several)
    assert batch.shape == (5, 3, SIDE, SIDE)
    assert torch.equal(batch, torch.cat([tokenizer.preprocess(each) for each in several]))
    assert torch.equal(batch, tokenizer.preprocess(tuple(several)))


def test_another_size(tokenizer):
    assert tokenizer.preprocess(noise(3), 32).shape == (1, 3, 32, 32)
    assert tokenizer.encode(tokenizer.preprocess(noise(3), 96)).shape[2:] == (6, 6)
    for size in (0, -16, 40):
        with pytest.raises(ValueError, match=f"size is {size}; it must be a multiple of 16, the pixels per latent"):
            tokenizer.preprocess(noise(3), size)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (noise(3).astype(np.float32) / 255, r"ndarray of float32 \[70, 90, 3\]"),
        (noise(3).astype(np.int64), r"ndarray of int64"),
        (noise(1), r"ndarray of uint8 \[70, 90\]"),
        (noise(4), r"ndarray of uint8 \[70, 90, 4\]"),
        (noise(3).transpose(2, 0, 1), r"ndarray of uint8 \[3, 70, 90\]"),
        (noise(3)[None], r"several are a list; given is a ndarray of uint8 \[1, 70, 90, 3\]"),
        (noise(3)[:0], r"ndarray of uint8 \[0, 90, 3\]"),
        (torch.rand(3, 8, 8), r"Tensor of float32 \[3, 8, 8\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"Tensor of uint8 \[3, 8, 8\]"),
    ],
    ids=range(9),
)
def test_arrays_of_another_kind_are_refused_by_name(tokenizer, given, named):
    with pytest.raises(ValueError, match=named) as refused:
        tokenizer.preprocess(given)
    assert "uint8 [height, width, 3]" in str(refused.value)


@pytest.mark.parametrize(
    ("given", "named"),
    [(None, "NoneType"), (3, "int"), ({"a": 1}, "dict"), ([[noise(3)]], "list"), (io.BytesIO(), "BytesIO")],
)
def test_other_things_are_refused_by_name(tokenizer, given, named):
    with pytest.raises(TypeError, match=f"a picture is the path of an image file, .*given is a {named}"):
        tokenizer.preprocess(given)


def test_what_cannot_be_read(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no picture is given; a picture is"):
        tokenizer.preprocess([])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        tokenizer.preprocess(tmp_path / "nowhere.png")
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(DecodeError, match=r"words\.png: not an image"):
        tokenizer.preprocess(tmp_path / "words.png")
    cut = file_of(Image.fromarray(noise(3)), "PNG")[:-4000]
    with pytest.raises(DecodeError, match="not a readable image"):
        tokenizer.preprocess(cut)
    with pytest.raises(DecodeError, match="not a readable image"):
        tokenizer.preprocess(Image.open(io.BytesIO(cut)))
    assert tokenizer.preprocess(Image.new("RGB", (1, 99999))).shape == (1, 3, SIDE, SIDE)
    with pytest.raises(DecodeError, match="0 x 5"):
        tokenizer.preprocess(Image.new("RGB", (0, 5)))
