"""The cache on tiny shards: one decode, equal latents in any batches, files that resume, and what is told."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from generating import cache, write_inputs
from launching import on_two_ranks
from tiny import damage_file, tiny_params

from stages.runner.environment import Interrupted
from vtp import load_tokenizer
from vtp.artefact import ArtefactError, digest, load_tensors, read_json, save_tensors, write_json
from vtp.data.dataset import ShardDataset
from vtp.data.latents import LatentDataset, summarise
from vtp.finite import NotFiniteError
from vtp.layers.images import normalise
from vtp.models.tokenizer import VisualTokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def cached(inputs, tmp_path_factory):
    return cache(inputs, tmp_path_factory.mktemp("cached"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_are_the_pictures_and_their_mirror_images(inputs, cached, split):
    images, latents = ShardDataset(inputs / "shards", split), LatentDataset(cached, split)
    singles = images.singles()
    rows = np.arange(len(latents))
    pixels = normalise(images.images(singles.rows, 16))
    model = load_tokenizer(inputs / "tokenizer")
    with torch.no_grad():
        expected, mirrored = model.encode(pixels), model.encode(pixels.flip(3))
    torch.testing.assert_close(latents.rows(rows), expected, atol=1e-5, rtol=1e-5)
    flips = rows % 3 == 0
    mixed = torch.where(torch.from_numpy(flips).view(-1, 1, 1, 1), mirrored, expected)
    torch.testing.assert_close(latents.rows(rows, flips), mixed, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(latents.labels.numpy(), singles.labels)
    table = {"key": [], "caption": [], "label": []}
    for path in sorted(cached.glob(f"{split}-*.parquet")):
        table = {name: values + pq.read_table(path)[name].to_pylist() for name, values in table.items()}
    assert table["key"] == [images.key(int(row)) for row in singles.rows]
    assert table["caption"] == [images.caption(int(row)) for row in singles.rows]
    assert table["label"] == latents.labels.tolist()


def test_labels_are_those_that_the_data_say_a_generator_learns(inputs, cached, tmp_path):
    shutil.copytree(inputs / "shards", tmp_path / "shards")
    (tmp_path / "tokenizer").symlink_to(inputs / "tokenizer")
    manifest = read_json(tmp_path / "shards" / "manifest.json")
    write_json(tmp_path / "shards" / "manifest.json", manifest | {"learnt": "categories"})
    coarse, fine = LatentDataset(cache(tmp_path, tmp_path)), LatentDataset(cached)
    assert (fine.classes, coarse.classes) == (manifest["classes"], manifest["categories"])
    assert coarse.labels.tolist() == [manifest["category_of_class"][label] for label in fine.labels.tolist()]
    assert coarse.labels.tolist() != fine.labels.tolist()


@pytest.mark.parametrize("images", [None, 7])
def test_statistics_are_those_of_the_named_images_both_ways_round(inputs, tmp_path, images):
    latents = LatentDataset(cache(inputs, tmp_path, statistics={"images": images}))
    rows = np.arange(len(latents))
    if images is not None:
        from vtp.draws import numpy_draws

        rows = numpy_draws(0, "latent statistics").permutation(len(latents))[:images]
    both = torch.cat([latents.rows(rows), latents.rows(rows, np.ones(len(rows), dtype=bool))]).double()
    torch.testing.assert_close(latents.statistics.mean.double().flatten(), both.mean((0, 2, 3)), atol=1e-6, rtol=1e-5)
    std = both.std((0, 2, 3), correction=0)
    torch.testing.assert_close(latents.statistics.std.double().flatten(), std, atol=1e-6, rtol=1e-5)
    assert read_json(latents.folder / "config.json")["statistics_images"] == len(rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 1e-3)])
def test_half_the_bytes(inputs, cached, tmp_path, dtype, tolerance):
    small = LatentDataset(cache(inputs, tmp_path, dtype=dtype))
    rows = np.arange(len(small))
    torch.testing.assert_close(small.rows(rows), LatentDataset(cached).rows(rows), rtol=tolerance, atol=tolerance)
    name = "train-00000.safetensors"
    assert (small.folder / name).stat().st_size < 0.7 * (cached / name).stat().st_size


def test_without_flips(inputs, cached, tmp_path):
    plain = LatentDataset(cache(inputs, tmp_path, horizontal_flips=False))
    assert not plain.has_flipped
    rows = np.arange(len(plain))
    assert torch.equal(plain.rows(rows), LatentDataset(cached).rows(rows))
    with pytest.raises(ArtefactError, match="no latents of horizontal flips"):
        plain.rows(rows, np.ones(len(rows), dtype=bool))


@pytest.mark.parametrize("summarised", [True, False])
def test_a_stopped_run_goes_on_with_the_files_that_are_missing(inputs, cached, tmp_path, summarised):
    """Also where it was killed between a file and its summary."""
    with pytest.raises(Interrupted):
        cache(inputs, tmp_path, stop_after=1)
    folder = tmp_path / "scratch/folder/latents"
    summary = folder / "train-00000.summary.json"
    assert {path.name for path in folder.iterdir()} == {"train-00000.safetensors", "train-00000.parquet", summary.name}
    if not summarised:
        summary.unlink()
    done = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path != summary}
    latents = cache(inputs, tmp_path)
    assert {name: (latents / name).stat().st_mtime_ns for name in done} == done
    assert digest(latents) == digest(cached)


def test_no_file_is_read_again_for_the_statistics(inputs, tmp_path, monkeypatch):
    read = []

    def summary(folder, shard, rows):
        read.append(shard.name)
        return summarise(folder, shard, rows)

    monkeypatch.setattr("vtp.data.latents.summarise", summary)  # as `finish_cache` calls it
    latents = cache(inputs, tmp_path)
    assert not read
    assert not list(latents.glob("*.json"))[1:]


def test_ranks_share_the_files(inputs, cached, tmp_path):
    """Two real ones: every image once, equal bytes."""
    paths = {"shards": inputs / "shards", "tokenizer": inputs / "tokenizer", "latents": "latents"}
    on_two_ranks(tmp_path, "cache_latents", tiny_params()["cache_latents"], paths)
    assert json.loads((tmp_path / "provenance.json").read_text())["facts"]["samples"] == 72
    ours, alone = LatentDataset(tmp_path / "latents"), LatentDataset(cached)
    rows = np.arange(len(alone))
    torch.testing.assert_close(ours.rows(rows), alone.rows(rows), atol=1e-6, rtol=0)
    assert {path.name for path in ours.folder.iterdir()} == {path.name for path in cached.iterdir()}


@pytest.mark.parametrize("damage", ["exchange", "splits", "flip", "remove", "statistics"])
def test_files_of_latents_are_those_that_were_written(cached, tmp_path, damage):
    import shutil

    folder = tmp_path / "latents"
    shutil.copytree(cached, folder)
    first, second = sorted(folder.glob("train-*.safetensors"))[:2]
    if damage == "splits":
        damage_file(first, "exchange", next(folder.glob("validation-*.safetensors")))
    elif damage == "statistics":
        first = folder / "statistics.safetensors"
        save_tensors(first, {name: value + 1 for name, value in load_tensors(first).items()})
    else:
        damage_file(first, damage, second)
    with pytest.raises(
        ArtefactError, match=rf"not the files that were written there: {first.name} (has sha256|is missing)"
    ):
        LatentDataset(folder)


def test_what_is_not_finite_is_not_cached(inputs, tmp_path):
    tokenizer = VisualTokenizer.from_pretrained(inputs / "tokenizer")
    with torch.no_grad():
        next(tokenizer.trunk.feature_bottleneck.parameters()).mul_(1e6)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "shards").symlink_to(inputs / "shards")
    with pytest.raises(NotFiniteError, match="latents of a batch as float16 hold NaN or infinity.*cache_latents.dtype"):
        cache(tmp_path, tmp_path, dtype="float16")


def test_a_folder_that_is_not_whole(cached, tmp_path):
    import shutil

    shutil.copytree(cached, tmp_path / "latents")
    config = read_json(cached / "config.json")
    config["splits"]["train"]["samples"] += 1
    write_json(tmp_path / "latents/config.json", config)
    with pytest.raises(ArtefactError, match=r"48 latents, config\.json says 49; fetch the folder again"):
        LatentDataset(tmp_path / "latents")
    with pytest.raises(ArtefactError, match="no split 'test'; it has train, validation"):
        LatentDataset(cached, "test")
    with pytest.raises(
        ArtefactError, match="holds the latents of another encoder than that of here; run cache_latents"
    ):
        LatentDataset(cached).require_encoder("another", "here")


def test_a_collapsed_encoder_is_told(inputs, tmp_path):
    """Before hours of training on nothing."""
    model = load_tokenizer(inputs / "tokenizer")
    with torch.no_grad():
        model.trunk.feature_bottleneck.weight.zero_()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "shards").symlink_to(inputs / "shards")
    model.save_pretrained(broken / "tokenizer")
    with pytest.raises(ArtefactError, match="8 latent channels are constant .* the encoder has collapsed"):
        cache(broken, tmp_path)
