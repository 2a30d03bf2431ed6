"""Pictures of several sizes: a batch is of one, the same for any ranks and workers, and holds what it says."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data.small_shards import picture, write_shards
from tiny import merged

from stages.runner.environment import LocalHost, Runtime
from vtp.artefact import read_json, write_json
from vtp.config import ConfigError
from vtp.data.batches import RankSlice
from vtp.data.buckets import ImageBuckets
from vtp.data.conditions import ImageConditions
from vtp.data.dataset import DataError, ShardDataset
from vtp.data.loader import load_batches
from vtp.data.size_order import SizeOrder
from vtp.data.sized_batches import EncodedImagesConfig, PictureBatch, PictureBatches
from vtp.draws import torch_draws

SIDES = [(16, 16), (24, 24), (40, 24), (16, 32), (17, 9), (64, 31)]  # width, height
CONFIG = {
    "sizes": {"short_edges": [16, 24], "ratios": [0.5, 1.0, 2.0], "multiple": 8},
    "labelled": True,
    "horizontal_flips": False,
    "precision": "float32",
    "window": None,
    "decode": "full",
    "max_replaced": 0.5,
    "statistics_images": None,
}
BATCH, PIXELS = 4, 8


def sample(number, **changes):
    """Whose picture's colour tells its number."""
    width, height = SIDES[number % len(SIDES)]
    return {"image": picture(number, (width, height)), "width": width, "height": height, **changes}


def batches_of(folder, tmp_path, rank=0, ranks=1, micro_batches=1, **changes):
    config = EncodedImagesConfig.parse(merged(CONFIG, changes), where="test")
    images = ShardDataset(folder, "train")
    kept = tmp_path / f"{config.labelled}-{len(config.sizes.ratios)}.safetensors"
    buckets = ImageBuckets(images, config.sizes, labelled=config.labelled).samples(kept)
    order = SizeOrder(buckets, batch_size=BATCH, seed=0, window=config.window)
    rank_slice = RankSlice(rank, ranks, micro_batches)
    return PictureBatches(
        images, ImageConditions(images), order, config, latent=(3, PIXELS), seed=0, rank_slice=rank_slice
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", [50, 0, 70, 30], change=sample)


def shown(batch):
    """Numbers by the colour in the middle of every picture."""
    middle = batch.images[:, :, batch.images.shape[2] // 2, batch.images.shape[3] // 2].int()
    return middle[:, 0] + 256 * middle[:, 1]


@pytest.mark.parametrize("window", [None, 2])
def test_a_batch_holds_pictures_of_one_size(shards, tmp_path, window):
    batches = batches_of(shards, tmp_path, window=window)
    sizes = set()
    for step in range(80):
        batch = batches[step]
        _, _, height, width = batch.images.shape
        sizes.add((width, height))
        assert torch.equal(shown(batch).long(), batch.numbers)
        assert torch.equal(batch.told, batch.numbers % 3)
        assert batch.noise.shape == (BATCH, 3, height // PIXELS, width // PIXELS)
        for number in batch.numbers.tolist():
            whole = SIDES[number % len(SIDES)]
            assert min(width, height) <= max(16, min(whole))
            near = min((0.5, 1.0, 2.0), key=lambda ratio: abs(np.log(whole[0] / whole[1]) - np.log(ratio)))
            assert (width > height) - (width < height) == (near > 1) - (near < 1)
    assert sizes == {(16, 16), (24, 24), (16, 32), (32, 16), (48, 24)}  # none is tall and large


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_tile_the_same_batches(shards, tmp_path, ranks, micro_batches):
    whole = batches_of(shards, tmp_path)
    for step in (0, 7, 40):
        parts = [
            batches_of(shards, tmp_path, rank, ranks, micro_batches)[step * micro_batches + micro]
            for rank in range(ranks)
            for micro in range(micro_batches)
        ]
        for ours, theirs in zip(map(torch.cat, zip(*parts, strict=True)), whole[step], strict=True):
            assert torch.equal(ours, theirs)


def test_workers_read_the_same(shards, tmp_path):
    batches = batches_of(shards, tmp_path, window=2)
    host = LocalHost(Path(), Path(), Runtime.of({"VTP_DEVICE": "cpu", "VTP_WORKERS": "2"}))
    for found, step in zip(load_batches(batches, range(3, 9), host), range(3, 9), strict=True):
        for ours, theirs in zip(found, batches[step], strict=True):
            assert torch.equal(ours, theirs)


def test_draws_belong_to_places_in_the_stream(shards, tmp_path):
    batch = batches_of(shards, tmp_path)[5]
    for row in range(BATCH):
        draws = torch_draws(0, "flow", 5 * BATCH + row)
        assert torch.equal(batch.noise[row], torch.randn(batch.noise.shape[1:], generator=draws))
        assert batch.normal[row] == torch.randn((), generator=draws)
        assert torch.equal(batch.uniform[row], torch.rand(3, generator=draws)[:2])


def test_half_of_the_pictures_are_mirrored(tmp_path):
    """Those whose third uniform draw says so."""
    ramps = [np.tile(np.arange(16, dtype=np.uint8)[None, :, None] * 15, (16, 1, 3)) for _ in range(8)]
    folder = write_shards(
        tmp_path / "ramps", [8], change=lambda n: {"image": picture(pixels=ramps[n]), "width": 16, "height": 16}
    )
    plain, mirrored = (batches_of(folder, tmp_path, horizontal_flips=flips)[1] for flips in (False, True))
    for row in range(BATCH):
        draws = torch_draws(0, "flow", BATCH + row)
        torch.randn(plain.noise.shape[1:], generator=draws), torch.randn((), generator=draws)
        flip = bool(torch.rand(3, generator=draws)[2] < 0.5)
        assert torch.equal(mirrored.images[row], plain.images[row].flip(2) if flip else plain.images[row])


def test_pictures_without_a_class_are_left_out_or_train_the_null_class(tmp_path):
    folder = write_shards(
        tmp_path / "shards", [96], change=lambda n: sample(n, **({"label": -1} if n % 12 < 6 else {}))
    )
    labelled, every = (batches_of(folder, tmp_path, labelled=labelled) for labelled in (True, False))
    assert len(labelled.order) == 48
    assert len(every.order) == 96
    labels = torch.cat([every[step].told for step in range(20)])
    numbers = torch.cat([every[step].numbers for step in range(20)])
    assert torch.equal(labels, torch.where(numbers % 12 < 6, 3, numbers % 3))
    assert all((labelled[step].numbers % 12 >= 6).all() for step in range(20))


def test_pictures_that_cannot_be_read_give_way_to_others_of_their_batch(tmp_path, caplog):
    folder = write_shards(
        tmp_path / "shards", [96], change=lambda n: sample(n, **({"image": b"none"} if n in (5, 14) else {}))
    )
    batches, found = batches_of(folder, tmp_path), 0
    for step in range(20):
        batch = batches[step]
        assert torch.equal(shown(batch).long(), batch.numbers)
        assert set(batch.numbers.tolist()) <= set(batches.order.batch(step).numbers.tolist()) - {5, 14}
        found += int(batch.replaced.sum())
        assert torch.equal(torch.cat([batches_of(folder, tmp_path, r, 2)[step].numbers for r in (0, 1)]), batch.numbers)
    assert found >= 2
    assert "not an image" in caplog.text
    few = batches_of(folder, tmp_path, max_replaced=1e-5)
    with pytest.raises(DataError, match=r"1 of \d+ samples cannot be used, train_generator\.images\.max_replaced is"):
        for step in range(20):
            few[step]


def test_large_jpegs_may_be_decoded_as_far_as_a_batch_needs(tmp_path):
    """From the same place: of ramps, every pixel tells it."""
    ramp = np.stack(np.broadcast_arrays(np.arange(640) * 0.4, np.arange(320)[:, None] * 0.8, 0.0), axis=-1)
    content = picture(pixels=ramp.astype(np.uint8), format="JPEG", quality=95)
    folder = write_shards(
        tmp_path / "shards", [8], change=lambda n: {"image": content, "extension": "jpg", "width": 640, "height": 320}
    )
    full, reduced = (batches_of(folder, tmp_path, decode=decode)[0] for decode in ("full", "reduced"))
    assert not torch.equal(full.images, reduced.images)
    assert full.images.shape == reduced.images.shape
    assert (full.images.int() - reduced.images.int()).abs().max() <= 4


def test_counts_are_read_once(shards, tmp_path):
    """And tables of other windows are not looked at again."""
    batches_of(shards, tmp_path)
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in shards.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    order = batches_of(copied, tmp_path, window=1).order
    now, later = order.shards_around(0)
    gone = set(range(4)) - {*now, *later}
    for shard in gone:
        (copied / f"train-{shard:05d}.parquet").unlink()
    assert len(batches_of(copied, tmp_path, window=1)[0].numbers) == BATCH


def test_a_ratio_with_too_few_pictures_is_told(tmp_path):
    folder = write_shards(tmp_path / "shards", [40], change=lambda n: sample(0 if n > 2 else 3))
    with pytest.raises(ConfigError, match=r"of one ratio, and of some ratios never so many come together: 0\.5 has 3"):
        batches_of(folder, tmp_path)
    fewer = {"short_edges": [16], "ratios": [1.0], "multiple": 8}
    assert len(batches_of(folder, tmp_path, sizes=fewer).order) == 40


def test_a_window_that_does_not_fit_is_told(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("vtp.data.stream.TOGETHER", 60)
    with pytest.raises(ConfigError, match=r"train_generator\.images\.window null shuffles 150 samples together"):
        batches_of(shards, tmp_path)


def test_labels_may_be_coarser_than_classes(tmp_path):
    folder = write_shards(tmp_path / "shards", [24], change=sample)
    manifest = read_json(folder / "manifest.json")
    coarse = {"learnt": "categories", "categories": ["x", "y"], "category_of_class": [1, 0, 1]}
    write_json(folder / "manifest.json", manifest | coarse)
    batch: PictureBatch = batches_of(folder, tmp_path)[0]
    assert batch.told.tolist() == [[1, 0, 1][number % 3] for number in batch.numbers.tolist()]


def test_shards_from_elsewhere_are_fetched_ahead(shards, tmp_path, monkeypatch):
    """Those of the window of a step and of the next; a folder that cannot hold a window is told."""
    room, asked = SimpleNamespace(capacity=1e9), []
    monkeypatch.setattr(ShardDataset, "cache", property(lambda self: room))
    monkeypatch.setattr(ShardDataset, "settle", lambda self, now, later: asked.append((now, later)))
    batches = batches_of(shards, tmp_path, window=2)
    for step in (0, 9, 25):
        assert batches[step].images.shape[0] == BATCH
    assert asked == [batches.order.shards_around(step) for step in (0, 9, 25)]
    room.capacity = 1.0
    with pytest.raises(ConfigError, match=r"train_generator\.images\.window 2 reads .* GB of fetched shards together"):
        batches_of(shards, tmp_path, window=2)
