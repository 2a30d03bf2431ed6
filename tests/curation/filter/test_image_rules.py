"""Image rules on pools of real pictures: copies that were resized and compressed again, and images that cannot be read."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sifting import removed, section, selected, sift, write_pool

from vtp.config import ConfigError
from vtp.curation.filter import measure_images
from vtp.curation.filter.engine import FilterError
from vtp.curation.filter.image_rules import ImageLocation, read_image
from vtp.curation.ingest.compose import Composer, EmbeddedConfig
from vtp.curation.rows import order_of
from vtp.layers.decode import DecodeError

NEAR = {"name": "perceptual_duplicates", "max_distance": 6}
SIZES = {"train_samples": 1, "validation_samples": 1, "image_size": 160}
COMPOSER = Composer(
    EmbeddedConfig(
        name="openmoji", seed=0, classes=24, labels="drawing", scene_fraction=0.5, scale_min=0.7, scale_max=0.9,
        rotation=10.0, aspect_ratios=[1.0], captions=["full"], scenes=["places"], words=None, held_out=None, **SIZES
    )
)  # fmt: skip


def picture(index):
    return COMPOSER.draw(COMPOSER.plan("train", index))


def encoded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def copies(image):
    yield encoded(image, quality=95)
    yield encoded(image.resize((100, 100)), quality=60)
    yield encoded(image.resize((401, 401)), "PNG")
    yield encoded(image, "WEBP", quality=30)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Forty pictures, the first ten of them four times, three that are none, and a failed download."""
    pictures = []
    for index in range(40):
        image = picture(index)
        contents = list(copies(image)) if index < 10 else [encoded(image)]
        pictures += [(f"{index}-{copy}", f"picture {index}", content) for copy, content in enumerate(contents)]
    bomb = encoded(picture(0), "PNG")
    bomb = bomb[:16] + (60000).to_bytes(4, "big") * 2 + bomb[24:]
    bad = [encoded(picture(40))[:900], b"<html>", bomb, None]
    pictures += [(f"bad-{index}", "no picture", content) for index, content in enumerate(bad)]
    return write_pool(tmp_path_factory.mktemp("data") / "pool", pictures)


def pool_section(*rules, **changes):
    return section(list(rules), columns={"name": "pool"}, keep_columns=[], **changes)


@pytest.mark.parametrize("processes", [0, 2])
def test_copies_are_removed_and_the_first_stays(pool, tmp_path, monkeypatch, processes):
    monkeypatch.setattr("vtp.curation.filter.engine.span_of", lambda rows: 20)
    monkeypatch.setattr("vtp.curation.filter.measure_images.PIECE", 7)
    folder = sift(pool_section({"name": "downloaded"}, NEAR), pool, tmp_path, processes=processes)
    lines = removed(folder)
    assert (lines["downloaded"], lines["unreadable_image"], lines["perceptual_duplicates"]) == (1, 3, 30)
    left = selected(folder)
    expected = {min((f"{index}-{copy}" for copy in range(4 if index < 10 else 1)), key=order) for index in range(40)}
    assert {row["key"] for row in left} == expected
    assert all(row["tar"] == "tars/0.tar" and row["status"] == "success" for row in left)
    assert "bad-" in (folder / "examples").read_text().split("unreadable_image\n")[1]


def order(key):
    return int(order_of([key])[0])


def test_equal_hashes_alone(pool, tmp_path):
    exact = removed(sift(pool_section(NEAR | {"max_distance": 0}), pool, tmp_path))
    assert 5 < exact["perceptual_duplicates"] < 30
    assert exact["unreadable_image"] == 4  # the failed download too


def test_unreadable_images_have_a_limit(pool, tmp_path):
    with pytest.raises(FilterError, match=r"4 of 74 images cannot be read .*`downloaded`.*max_unreadable 0.04.*bad-"):
        sift(pool_section(NEAR, max_unreadable=0.04), pool, tmp_path)


def test_places_stay_within_the_pool(pool, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    for tar in ("../secret", str(tmp_path / "secret"), "tars/../../secret"):
        with pytest.raises(DecodeError, match="outside of the pool"):
            read_image(tmp_path / "pool", ImageLocation(tar, 0, 6, None))
    size = (pool / "tars/0.tar").stat().st_size
    for offset, length in ((size - 3, 6), (-5, 6), (0, size + 1), (0, -1)):
        with pytest.raises(DecodeError, match="ends before it"):
            read_image(pool, ImageLocation("tars/0.tar", offset, length, None))
    with pytest.raises(DecodeError, match="cannot be opened"):
        read_image(pool, ImageLocation("tars/9.tar", 0, 1, None))
    with pytest.raises(DecodeError, match="not downloaded"):
        read_image(pool, ImageLocation(None, None, None, None))


@pytest.mark.parametrize(
    "change",
    [
        {"offset": -1},
        {"offset": 2**62, "size": 2**62},
        {"size": -1},
        {"tar": "tars/0.tar\0"},
        {"tar": "../pool/tars/0.tar"},
        {"tar": "tars"},
        {"tar": "more/link.tar"},
    ],
)
def test_rows_that_lead_nowhere_are_counted(tmp_path, change):
    folder = write_pool(tmp_path / "pool", [(f"k{n}", "a", encoded(picture(n))) for n in range(4)])
    (folder / "tars" / "0.tar").rename(tmp_path / "away.tar")
    (folder / "tars" / "0.tar").write_bytes((tmp_path / "away.tar").read_bytes())
    (folder / "more").mkdir()
    (folder / "more" / "link.tar").symlink_to(tmp_path / "away.tar")
    table = pq.read_table(folder / "part-00000.parquet")
    rows = table.to_pylist()
    rows[2] |= change
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "part-00000.parquet")
    done = sift(pool_section(NEAR | {"max_distance": 0}, max_unreadable=0.3), folder, tmp_path)
    assert removed(done)["unreadable_image"] == 1
    assert f"`{rows[2]['key']}`" in (done / "examples").read_text()
    if change == {"tar": "more/link.tar"}:
        columns = {"name": "pool", "outside_links": True}
        config = section([NEAR | {"max_distance": 0}], columns=columns, keep_columns=[])
        assert removed(sift(config, folder, tmp_path / "allowed"))["unreadable_image"] == 0


def test_a_tar_that_is_elsewhere_is_named_at_the_start(tmp_path):
    folder = write_pool(tmp_path / "pool", [("k", "a", encoded(picture(0)))])
    (folder / "tars" / "0.tar").rename(tmp_path / "away.tar")
    (folder / "tars" / "0.tar").symlink_to(tmp_path / "away.tar")
    with pytest.raises(ConfigError, match=r"0.tar: a link leads outside of the pool; .*`outside_links: true`"):
        sift(pool_section(NEAR), folder, tmp_path)


def test_columns_of_places_may_be_of_any_type(tmp_path):
    """Names as bytes, numbers as floats: what can be read is."""
    folder = write_pool(tmp_path / "pool", [(f"k{n}", "a", encoded(picture(n))) for n in range(4)])
    table = pq.read_table(folder / "part-00000.parquet")
    for name, kind in (("tar", pa.binary()), ("offset", pa.float64()), ("size", pa.float64())):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    offsets = table["offset"].to_pylist()
    offsets[1] = float("nan")
    table = table.set_column(table.schema.get_field_index("offset"), "offset", pa.array(offsets))
    pq.write_table(table, folder / "part-00000.parquet")
    done = sift(pool_section(NEAR | {"max_distance": 0}, max_unreadable=0.3), folder, tmp_path)
    assert removed(done)["unreadable_image"] == 1


def test_examples_hold_plain_text(tmp_path):
    folder = write_pool(
        tmp_path / "pool", [("k\x1b[31m`<b>", "\u202e`\n# heading\n=1", b"none"), ("k", "a", encoded(picture(0)))]
    )
    text = (sift(pool_section(NEAR, max_unreadable=0.6), folder, tmp_path) / "examples").read_text()
    assert not set(text) & set("\x1b\u202e")
    assert "\n# heading" not in text
    assert r"`k\x1b[31m'<b>`" in text


def test_hashing_goes_on_after_an_interruption(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_images, "PIECE", 10)
    calls, function = [], measure_images.hash_images

    def failing(job):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(job.done)
        function(job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measure_images, "hash_images", failing)
        sift(pool_section(NEAR), pool, tmp_path)
    calls.clear()
    monkeypatch.setattr(measure_images, "hash_images", lambda job: calls.append(job.done) or function(job))
    assert removed(sift(pool_section(NEAR), pool, tmp_path))["perceptual_duplicates"] == 30
    assert len(calls) == 4  # of the 8 pieces
    assert np.load(calls[0]).shape == (10, 2)
