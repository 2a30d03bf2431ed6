"""A folder of odd pictures, through the stage: each is stored as it looks, or counted by name."""

import io

import numpy as np
import pillow_heif
import pillow_jxl
import pytest
from curation.ingest.test_hostile import listed
from curation.ingest.test_ingest import FOLDER, every, prepare
from oddities import HEIGHT, ODD, PIXELS, TURNED, WIDTH, encoded, with_exif
from PIL import Image

from vtp.data.dataset import ShardDataset

pillow_heif.register_heif_opener()
assert pillow_jxl.Encoder
SIDE = 16
MODERN = {"a.AVIF": "AVIF", "b.HEIC": "HEIF", "c.heif": "HEIF", "d.JXL": "JXL"}


def left_colour(pixels):
    return np.asarray(pixels).astype(int)[2:-2, 2:4].mean((0, 1))


# Pillow tells of what is odd about them, and goes on.
odd = pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Image appears to be a malformed MPO")


@odd
def test_no_picture_is_lost_to_metadata(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number, content in enumerate(ODD.values()):
        (source / f"odd-{number}.png").write_bytes(content)
    for number, block in enumerate(TURNED.values()):
        for kind, content in with_exif(block).items():
            (source / f"turned-{number}-{kind.replace(' ', '-')}.jpg").write_bytes(content)
    for name, form in MODERN.items():
        (source / name).write_bytes(encoded(Image.fromarray(PIXELS), form))
    host = prepare(tmp_path / "shards", FOLDER, source, samples_per_shard=500)
    assert (host.facts["unreadable"], host.facts["ignored_files"]) == (0, 0)
    rows = every(tmp_path / "shards")
    assert len(rows) == len(ODD) + 6 * len(TURNED) + len(MODERN)
    for row in rows:
        turned = row["key"].startswith("turned")
        picture = Image.open(io.BytesIO(row["image"])).convert("RGB")
        assert picture.size == (row["width"], row["height"]) == ((HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT))
        if not turned:
            assert np.abs(left_colour(picture) - (255, 0, 0)).max() < 20
    dataset = ShardDataset(tmp_path / "shards", "train")
    assert dataset.images(np.arange(20), SIDE).shape == (20, 3, SIDE, SIDE)


def test_what_is_no_picture_is_counted_and_named(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(9):
        grey = np.full((8, 8), number * 28, np.float32)
        (source / f"{number}.tif").write_bytes(encoded(Image.fromarray(grey), "TIFF"))
    (source / "range.tif").write_bytes(
        encoded(Image.fromarray(np.linspace(-20, 286, 64, dtype=np.float32)[None]), "TIFF")
    )
    (source / "cut.heic").write_bytes(encoded(Image.fromarray(PIXELS), "HEIF")[:-300])
    (source / "none.jxl").write_bytes(b"\xff\x0anone")
    host = prepare(tmp_path / "shards", FOLDER, source, max_unreadable=0.3)
    assert host.facts["unreadable"] == 3
    reasons = listed(tmp_path / "shards")
    assert "floats, which are 0 to 1 or 0 to 255; here they go from -20 to 286" in reasons["range.tif"]
    assert set(reasons) == {"range.tif", "cut.heic", "none.jxl"}
    found = sorted(int(np.asarray(Image.open(io.BytesIO(row["image"])))[0, 0, 0]) for row in every(tmp_path / "shards"))
    assert found == [number * 28 for number in range(9)]


@odd
def test_webdataset_reads_what_is_stored(tmp_path):
    import webdataset

    source = tmp_path / "source"
    source.mkdir()
    for number, content in enumerate(ODD.values()):
        (source / f"{number}.png").write_bytes(content)
    prepare(tmp_path / "shards", FOLDER, source, samples_per_shard=500)
    paths = sorted(map(str, (tmp_path / "shards").glob("*.tar")))
    read = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
    assert len(read) == len(ODD)
    for sample in read:
        (picture,) = (sample[kind] for kind in ("png", "jpg", "webp") if kind in sample)
        assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - PIXELS).max() <= 3
