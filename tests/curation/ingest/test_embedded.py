"""The embedded data set: composition, shards, reading back."""

import hashlib
import json
import shutil
from importlib.metadata import version
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import reseal

from vtp.artefact import ArtefactError, digest
from vtp.config import ConfigError
from vtp.curation.ingest.compose import Composer, EmbeddedConfig, is_scene
from vtp.curation.ingest.embedded import ComposedPictures
from vtp.curation.ingest.encode import Keep
from vtp.curation.ingest.ingest import Ingest, IngestConfig
from vtp.curation.ingest.openmoji import FIRST_CATEGORIES, attribution, catalogue, render
from vtp.curation.ingest.scenes import BACKGROUNDS
from vtp.data.dataset import DataError, ShardDataset
from vtp.data.order import epoch_order, sample_indices
from vtp.data.shards import SampleRecord, write_shard
from vtp.evaluation.reference import SplitConfig, choose

CONFIG = EmbeddedConfig(
    name="openmoji",
    seed=0,
    image_size=24,
    aspect_ratios=[1.0],
    classes=12,
    labels="drawing",
    captions=["full"],
    train_samples=50,
    validation_samples=26,
    held_out=None,
    scene_fraction=0.25,
    scenes=["places"],
    words=None,
    scale_min=0.6,
    scale_max=0.9,
    rotation=15.0,
)
PLAN = IngestConfig(samples_per_shard=20, max_unreadable=0, location=None)


def write(folder, config=CONFIG, processes=0):
    source = ComposedPictures(config, Keep(name="keep"))
    ingest = Ingest(source, PLAN, folder, folder.with_name(f"{folder.name}_state"))
    ingest.run(processes=processes, progress=lambda count: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shards"
    write(path)
    return path


def test_catalogue_is_named_categorised_and_spread():
    pictures = catalogue(32)
    assert len({picture.code for picture in pictures}) == 32
    counts = {name: sum(picture.category == name for picture in pictures) for name in FIRST_CATEGORIES}
    assert min(counts.values()) >= 5
    assert catalogue(12) == pictures[:12]
    assert "CC BY-SA 4.0" in attribution()
    with pytest.raises(ValueError, match="99999 pictures asked for"):
        catalogue(99999)


def test_render_fills_the_square():
    drawing = render(catalogue(1)[0], 40)
    assert drawing.size == (40, 40)
    left, top, right, bottom = drawing.getchannel("A").getbbox()
    assert max(right - left, bottom - top) >= 39


def test_equal_bytes_whatever_the_workers(folder, tmp_path):
    write(tmp_path / "a", processes=2)
    assert digest(tmp_path / "a") == digest(folder)
    other = CONFIG.model_copy(update={"seed": 1})
    write(tmp_path / "b", other)
    assert digest(tmp_path / "b") != digest(folder)


def test_goes_on_where_it_was_killed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    shutil.copytree(folder.with_name("shards_state"), tmp_path / "a_state")
    for name in ("train-00001.tar", "manifest.json"):
        (tmp_path / "a" / name).unlink()
    (tmp_path / "a_state" / "validation-00000.json").unlink()
    kept = (tmp_path / "a" / "train-00000.tar").stat().st_mtime_ns
    write(tmp_path / "a")
    assert digest(tmp_path / "a") == digest(folder)
    assert (tmp_path / "a" / "train-00000.tar").stat().st_mtime_ns == kept


def test_more_samples_extend_the_same_set():
    longer = Composer(CONFIG.model_copy(update={"train_samples": 1_000_000}))
    assert [longer.plan("train", i) for i in range(20)] == [Composer(CONFIG).plan("train", i) for i in range(20)]
    assert longer.plan("train", 999_999).captions


def test_validation_is_held_out(folder):
    train, validation = ShardDataset(folder, "train"), ShardDataset(folder, "validation")
    seen = {train.image(i).tobytes() for i in range(len(train))}
    assert not any(validation.image(i).tobytes() in seen for i in range(len(validation)))
    assert set(validation.singles().labels) == set(range(12))


def test_labels_of_categories_leave_pictures_captions_and_classes_as_they_were(folder, tmp_path):
    """What a generator learns and is judged by is coarser; probes and prompts ask for the drawing and its category."""
    write(tmp_path / "coarse", CONFIG.model_copy(update={"labels": "category"}))
    for tar in folder.glob("*.tar"):
        assert digest(tmp_path / "coarse" / tar.name) == digest(tar)
    coarse, fine = ShardDataset(tmp_path / "coarse", "train"), ShardDataset(folder, "train")
    manifest, drawings = coarse.manifest, fine.singles(20)
    assert manifest == fine.manifest.model_copy(update={"learnt": "categories"})
    assert fine.learnt(20).labels.tolist() == drawings.labels.tolist()
    assert fine.manifest.learnt_classes == fine.manifest.classes
    labels = SplitConfig(samples=20, labelled=True, kept=0)
    chosen = choose(coarse, labels)
    assert chosen.rows.tolist() == drawings.rows.tolist()
    of_drawing = {picture.name: picture.category for picture in catalogue(12)}
    names = [fine.manifest.classes[label] for label in drawings.labels]
    assert [manifest.learnt_classes[label] for label in chosen.labels] == [of_drawing[name] for name in names]
    assert len(set(chosen.labels.tolist())) == len(manifest.learnt_classes) == 6
    assert all(name in coarse.caption(row) for name, row in zip(names, chosen.rows.tolist(), strict=True))
    with pytest.raises(ConfigError, match=r"labels: Input should be 'drawing' or 'category' \(given: 'kind'\)"):
        EmbeddedConfig.parse(CONFIG.model_dump() | {"labels": "kind"}, where="source")


def test_captions_say_what_is_where():
    composer = Composer(CONFIG)
    regions = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
    scenes = [composer.plan("train", i) for i in range(200) if is_scene(i, CONFIG.scene_fraction)]
    assert len(scenes) == 50
    for scene in scenes:
        (caption,), places = scene.captions, scene.arrangement.places
        said = caption.replace(", on ", "| on ").replace(" and ", ", ").split("|")[0].split(", ")
        assert len(said) == len(places) >= 2
        for text, place in zip(said, places, strict=True):
            assert composer.pictures[place.label].name in text
            where = text.removeprefix(composer.pictures[place.label].name)
            for word, (axis, sign) in regions.items():
                if where.endswith(word) or f"the {word} " in where:
                    assert (place.centre[axis] - CONFIG.image_size / 2) * sign > 0, scene
        assert scene.arrangement.scene.background in caption


def test_singles_show_their_picture_inside_the_frame():
    composer = Composer(CONFIG)
    for index in range(40):
        sample = composer.plan("train", index)
        if sample.kind == "single":
            (place,) = sample.arrangement.places
            assert place.size / 2 - 1e-6 <= min(place.centre) <= max(place.centre) <= 24 - place.size / 2 + 1e-6
            assert composer.pictures[sample.label].name in sample.captions[0]
        background = np.array(BACKGROUNDS[sample.arrangement.scene.background])
        share = (np.asarray(composer.draw(sample)) != background).any(-1).mean()
        assert 0.05 < share < 0.95


PLANNED = "78bed334da15c3efc649cb07af986265004e06aac3bc0dce252859af34ab4054"
DRAWN = "1f89805608ec5d00e739753b53e220694a4dea7f5e53ff2490bab4773580dc99"
DRAWN_BY = {"pillow": "13.0.0", "resvg_py": "0.5.0"}  # pixels are those of these versions


def test_squares_with_named_places_are_those_of_before_there_were_other_scenes():
    """Digests were recorded then: of what was planned and said, and of pixels."""
    composer = Composer(CONFIG.model_copy(update={"scene_fraction": 0.4}))
    planned, drawn = hashlib.sha256(), hashlib.sha256()
    for split, index in product(("train", "validation"), range(64)):
        sample = composer.plan(split, index)
        scene, places = sample.arrangement.scene, [[p.label, [*p.centre], *p[2:]] for p in sample.arrangement.places]
        planned.update(json.dumps([sample.kind, sample.label, scene.background, places, *sample.captions]).encode())
        if index < 32:
            drawn.update(composer.draw(sample).tobytes())
    assert planned.hexdigest() == PLANNED
    assert drawn.hexdigest() == DRAWN or {name: version(name) for name in DRAWN_BY} != DRAWN_BY


def test_reads_back_and_webdataset_agrees(folder):
    import webdataset

    data = ShardDataset(folder, "train")
    paths = sorted(map(str, folder.glob("train-*.tar")))
    table = pa.concat_tables(pq.read_table(folder / shard.name.replace(".tar", ".parquet")) for shard in data.shards)
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
    assert len(samples) == len(data) == 50
    for index, sample in enumerate(samples):
        assert sample["txt"] == data.caption(index)
        assert sample["json"]["label"] == table["label"][index].as_py()
        assert sample["json"]["category"] == table["category"][index].as_py()
        assert sample["png"].convert("RGB").tobytes() == data.image(index).tobytes()
    assert data.images([3, 4], 24).shape == (2, 3, 24, 24)
    singles = data.singles()
    assert np.bincount(singles.labels).tolist() == data.manifest.splits["train"].class_counts
    assert [table["label"][row].as_py() for row in singles.rows.tolist()] == singles.labels.tolist()
    assert (np.array(table["label"]) >= 0).sum() == len(singles.rows)


def test_damage_is_named(folder, tmp_path):
    def damaged(name):
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    truncated = damaged("truncated")
    tar = truncated / "train-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1000])
    with pytest.raises(ArtefactError, match=r"train-00001\.tar: \d+ bytes, manifest\.json says"):
        ShardDataset(truncated, "train")
    missing = damaged("missing")
    (missing / "train-00002.tar").unlink()
    with pytest.raises(ArtefactError, match=r"train-00002\.tar: this shard is in manifest"):
        ShardDataset(missing, "train")
    with pytest.raises(ArtefactError, match="no split 'test'; it has train, validation"):
        ShardDataset(folder, "test")
    with pytest.raises(ArtefactError, match=r"manifest\.json: no such file"):
        ShardDataset(tmp_path / "nowhere", "train")
    old = damaged("old")
    (old / "manifest.json").write_text(json.dumps({"format_version": 0}))
    with pytest.raises(ArtefactError, match="format 0"):
        ShardDataset(old, "train")


def test_corrupt_image_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    data = ShardDataset(tmp_path / "a", "train")
    tar = tmp_path / "a" / "train-00000.tar"
    content = bytearray(tar.read_bytes())
    offset = pq.read_table(tar.with_suffix(".parquet"))["offset"][5].as_py()
    content[offset : offset + 40] = bytes(40)
    tar.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"train-00000\.tar has sha256"):
        data.image(5)
    reseal(tmp_path / "a")
    data = ShardDataset(tmp_path / "a", "train")
    with pytest.raises(DataError, match=r"train-00000\.tar, train-000000005"):
        data.image(5)
    assert data.image(6).size == (24, 24)


def test_shards_are_whole_or_absent(tmp_path):
    def failing():
        yield SampleRecord("a", b"png", "png", 1, 1, "caption", 0, 0, "single")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "train-00000.tar", failing(), classes=1)
    assert list(tmp_path.iterdir()) == []


def test_stream_covers_every_epoch_in_its_own_order():
    stream = sample_indices(0, 30, 10, seed=3)
    epochs = stream.reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(sample_indices(7, 8, 10, seed=3), stream[7:15])
    assert np.array_equal(epochs[1], epoch_order(10, 3, 1))
    assert torch.from_numpy(stream).dtype == torch.int64
    assert Image.MAX_IMAGE_PIXELS is not None  # the library's own proxy stays on
