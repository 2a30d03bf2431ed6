"""The stream: exact over ranks, workers, shards and resumes; samples that cannot be used; shards that cannot be read."""

import io
import itertools
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data.small_shards import picture, write_shards
from PIL import Image
from tiny import merged, tiny_params

from stages.pretrain import Pretrain
from stages.runner.environment import LocalHost, Runtime
from vtp.artefact import ArtefactError, digest, read_json, write_json
from vtp.config import ConfigError
from vtp.data.batches import RankSlice
from vtp.data.dataset import DataError, ShardDataset
from vtp.data.loader import load_batches
from vtp.data.pretrain_batches import PretrainBatches
from vtp.data.stream import Stream, StreamConfig

POOL = 8  # samples of a step
SPLITS = {"one shard": [96], "few": [40, 0, 31, 25], "many": [1, 2, 3] * 16}


def stream_of(*folders, **changes) -> Stream:
    values = {
        "samples": None,
        "window": None,
        "groups": 1,
        "mixture": None,
        "decode": "full",
        "max_replaced": 0.5,
    } | changes
    return Stream(
        [ShardDataset(folder, "train") for folder in folders], StreamConfig.parse(values, where="test"), seed=0
    )


def numbers_in(captions):
    return torch.tensor([[int(caption)] for caption in captions])


def batches_of(stream, rank=0, ranks=1, *, ssl=0.0, **changes):
    """Batches whose tokens are the numbers of their samples."""
    data = {"batch": {"clip": POOL, "ssl": 4, "reconstruction": 4}, "clip_view": {"size": 8}}
    values = {"data": data | changes, "tokenizer": {"image_size": 8}, "objective": {"weights": {"ssl": ssl}}}
    config = Pretrain.parse(merged(tiny_params()["pretrain"], values), where="test")
    return PretrainBatches(
        stream,
        config.data.model_copy(update={"stream": stream.config}),
        active=config.active,
        image_size=8,
        patch_size=8,
        tokenize=numbers_in,
        rank_slice=RankSlice(rank, ranks, 1),
    )


def seen(stream, steps: range, ranks=1, workers=0):
    """Numbers of the samples of every step, by real loaders of every rank; each batch shows what it says."""
    host = LocalHost(Path(), Path(), Runtime.of({"VTP_DEVICE": "cpu", "VTP_WORKERS": str(workers)}))
    loaders = [load_batches(batches_of(stream, rank, ranks), steps, host) for rank in range(ranks)]
    rows = []
    for parts in zip(*loaders, strict=True):
        rows.append(torch.cat([part.tokens[:, 0] for part in parts]))
        shown = torch.cat([part.clip_images[:, :2, 4, 4].int() for part in parts])
        assert torch.equal(shown[:, 0] + 256 * shown[:, 1], rows[-1].int())
    return torch.stack(rows)


@pytest.mark.parametrize("shards", SPLITS)
@pytest.mark.parametrize("window", [None, 2])
def test_an_epoch_is_exact_whoever_reads_it(tmp_path, shards, window):
    """Any ranks and workers before a stop at any step, any others after it. Workers are processes, and slow to start."""
    stream = stream_of(write_shards(tmp_path / "shards", SPLITS[shards]), window=window)
    steps = len(stream) // POOL
    whole = seen(stream, range(2 * steps))
    for epoch in whole.split(steps):
        assert sorted(epoch.flatten().tolist()) == list(range(96))
    alone = zip(range(1, steps, 2), itertools.permutations([(1, 0), (2, 0), (4, 0)], 2), strict=True)
    among_workers = zip((2, 5, 8, 11), itertools.pairwise([(1, 0), (2, 2), (4, 1), (1, 2), (1, 0)]), strict=True)
    for stop, (first, then) in itertools.chain(alone, among_workers):
        before = seen(stream, range(stop), *first)
        after = seen(stream, range(stop, steps), *then)
        assert torch.equal(torch.cat([before, after]), whole[:steps])


def test_a_batch_that_is_larger_than_the_data_is_refused(tmp_path):
    stream = stream_of(write_shards(tmp_path / "shards", [POOL - 1]))
    with pytest.raises(ValueError, match=r"hold 7 samples and a batch takes 8; use more data or a smaller data\.batch"):
        batches_of(stream)


def test_sources_are_mixed_by_weight(tmp_path):
    folders = [write_shards(tmp_path / name, [64], first=first) for name, first in (("a", 0), ("b", 1000))]
    stream = stream_of(*folders, mixture={"b": 0.25, "a": 0.75})
    drawn = seen(stream, range(256))
    assert int((drawn < 1000).sum()) == 3 * int((drawn >= 1000).sum()) == 1536
    # 1,536 places are 24 epochs of the one, 512 are 8 of the other.
    for values, times in ((range(64), 24), (range(1000, 1064), 8)):
        assert torch.bincount(drawn.flatten(), minlength=1064)[list(values)].tolist() == [times] * 64
    assert torch.equal(seen(stream, range(100, 120), ranks=2, workers=2), drawn[100:120])
    together = stream_of(*folders)
    assert sorted(seen(together, range(16)).flatten().tolist()) == [*range(64), *range(1000, 1064)]
    with pytest.raises(ConfigError, match=r"weights for a, c; the shards given are a, b"):
        stream_of(*folders, mixture={"a": 1.0, "c": 1.0})


@pytest.mark.parametrize("shards", SPLITS)
def test_a_subset_is_the_first_so_many_samples(tmp_path, shards):
    """Whatever shards hold them; smaller ones lie in larger ones, and every epoch has each of their samples once."""
    folder = write_shards(tmp_path / "shards", SPLITS[shards])
    for count in (8, 40, 64, 96):
        stream = stream_of(folder, samples=count)
        assert len(stream) == count
        drawn = seen(stream, range(2 * count // POOL), ranks=2)
        for epoch in drawn.split(count // POOL):
            assert sorted(epoch.flatten().tolist()) == list(range(count))
    assert torch.equal(seen(stream, range(12)), seen(stream_of(folder), range(12)))  # all are no subset
    with pytest.raises(ConfigError, match=r"data\.stream\.samples is 97, .*shards has 96"):
        stream_of(folder, samples=97)


def test_a_subset_is_of_every_source(tmp_path):
    folders = [write_shards(tmp_path / name, [64], first=first) for name, first in (("a", 0), ("b", 1000))]
    together = seen(stream_of(*folders, samples=16), range(4))
    assert sorted(together.flatten().tolist()) == [*range(16), *range(1000, 1016)]
    mixed = seen(stream_of(*folders, samples=16, mixture={"a": 0.5, "b": 0.5}), range(4))
    assert set(mixed.flatten().tolist()) == {*range(16), *range(1000, 1016)}


def test_what_takes_the_place_of_a_sample_is_in_the_subset(tmp_path):
    folder = write_shards(tmp_path / "shards", [48], change=lambda n: {"caption": ""} if n in (2, 5) else {})
    drawn = seen(stream_of(folder, samples=8), range(12))
    assert set(drawn.flatten().tolist()) == set(range(8)) - {2, 5}


BOMB = (
    bytes.fromhex("89504e470d0a1a0a0000000d49484452")
    + (60000).to_bytes(4, "big") * 2
    + b"\x08\x02\x00\x00\x00"
    + b"\0" * 60
)
AWKWARD = {
    3: {"image": picture(3)[:-30]},  # cut off
    17: {"image": BOMB},
    20: {"image": b"<html>no picture</html>"},
    33: {"caption": ""},
    40: {"caption": " \n"},
    41: {"image": b""},
}


def test_samples_that_cannot_be_used_are_replaced_and_counted(tmp_path):
    """By others of the same shard, the same ones for every number of workers; the batch keeps its size."""
    folder = write_shards(tmp_path / "shards", [48, 48], change=lambda number: AWKWARD.get(number, {}))
    stream = stream_of(folder)
    whole, again = seen(stream, range(12)), seen(stream, range(12), ranks=2, workers=2)
    assert torch.equal(whole, again)
    drawn = whole.flatten().tolist()
    assert not set(drawn) & set(AWKWARD)
    assert set(range(96)) - set(drawn) == set(AWKWARD)
    counts = torch.bincount(whole.flatten(), minlength=96)
    assert counts[:48].sum() == counts[48:].sum() == 48
    batches = batches_of(stream)
    assert sum(int(batches[step].replaced.sum()) for step in range(12)) == len(AWKWARD)
    assert sum(int(batches_of(stream, rank, 2)[step].replaced.sum()) for step in range(12) for rank in (0, 1)) == len(
        AWKWARD
    )


def test_too_many_replaced_samples_end_the_run(tmp_path, caplog):
    """The message names the first ones; without CLIP nobody needs captions."""
    folder = write_shards(tmp_path / "shards", [48], change=lambda n: {"caption": ""} if n % 2 else {})
    batches = batches_of(stream_of(folder, max_replaced=0.0004))
    with pytest.raises(
        DataError, match=r"5 of \d+ samples cannot be used.*max_replaced is 0\.0004: .*train-00000\.tar, k0"
    ):
        for step in range(6):
            batches[step]
    assert "the caption is empty; another sample takes its place" in caplog.text
    stream = stream_of(folder)
    drawn = [stream.read(n, n, decode=lambda image: image.copy(), captioned=False) for n in range(48)]
    assert not any(each.replaced for each in drawn)


def test_a_shard_without_any_usable_sample_is_an_error(tmp_path):
    folder = write_shards(tmp_path / "shards", [8], change=lambda number: {"image": b"nothing"})
    with pytest.raises(DataError, match=r"not an image .*; nor can any of 20 that were tried: fetch the shard again"):
        batches_of(stream_of(folder))[0]


def test_a_caption_that_is_not_utf8_is_replaced(tmp_path):
    folder = write_shards(tmp_path / "shards", [16])
    path = folder / "train-00000.parquet"
    table = pq.read_table(path)
    captions = [caption.encode() for caption in table["caption"].to_pylist()]
    captions[5] = b"caf\xe9"
    broken = pa.array(captions, pa.binary()).view(pa.string())
    index = table.schema.get_field_index("caption")
    pq.write_table(table.set_column(index, table.schema.field(index), broken), path)
    manifest = read_json(folder / "manifest.json")
    for split in manifest["splits"].values():
        split["shards"][0]["table_sha256"] = digest(path)
    write_json(folder / "manifest.json", manifest)
    drawn = seen(stream_of(folder), range(2)).flatten().tolist()
    assert 5 not in drawn
    assert len(drawn) == 16
    with pytest.raises(DataError, match=r"caption of .*train-00000\.tar, k000005 is not UTF-8"):
        ShardDataset(folder, "train").caption(5)


def test_a_shard_that_vanishes_or_shrinks_is_an_error_at_once(tmp_path):
    folder = write_shards(tmp_path / "shards", [24, 24])
    stream = stream_of(folder)
    (folder / "train-00001.tar").rename(folder / "elsewhere.tar")
    with pytest.raises(ArtefactError, match=r"train-00001\.tar: this shard is in manifest\.json and not in the folder"):
        seen(stream, range(6))
    with pytest.raises(ArtefactError, match="dvc checkout"):
        ShardDataset(folder, "train")
    content = (folder / "elsewhere.tar").read_bytes()
    (folder / "train-00001.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtefactError, match=r"bytes, manifest\.json says"):
        seen(stream, range(6))
    (folder / "train-00001.tar").write_bytes(content)
    open_stream = stream_of(folder)
    seen(open_stream, range(6))
    (folder / "train-00001.tar").write_bytes(content[:2000])  # cut off while it is open
    with pytest.raises(DataError, match="the shard ends before it"):
        seen(open_stream, range(6))
    (folder / "train-00001.tar").write_bytes(content)
    shutil.copy(folder / "train-00000.parquet", folder / "train-00001.parquet")
    (folder / "train-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtefactError, match=r"train-00001\.parquet"):
        seen(stream_of(folder), range(6))


def test_an_error_in_a_worker_ends_the_run(tmp_path):
    """It does not hang, it says what a process of its own would have said, and its workers end at once."""
    folder = write_shards(tmp_path / "shards", [24, 24])
    stream = stream_of(folder)
    (folder / "train-00000.tar").unlink()
    with pytest.raises(ArtefactError, match=r"train-00000\.tar: this shard is in manifest") as raised:
        seen(stream, range(6), workers=2)
    assert str(raised.value).startswith(f"{folder}/train-00000.tar: this shard")
    assert not multiprocessing.active_children()


def test_no_more_shards_are_looked_at_than_have_the_labels_that_are_asked_for(tmp_path):
    folder = write_shards(tmp_path / "shards", [5, 0, 4, 6], change=lambda n: {"label": -1} if n % 2 else {})
    train = ShardDataset(folder, "train")
    assert train.singles().rows.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert train.singles().labels.tolist() == [0, 2, 1, 0, 2, 1, 0, 2]
    (folder / "train-00003.parquet").write_bytes(b"PAR1")
    few = train.singles(4)
    assert (few.rows.tolist(), few.labels.tolist()) == ([0, 2, 4, 6], [0, 2, 1, 0])
    with pytest.raises(ArtefactError, match=r"train-00003\.parquet"):
        train.singles(6)
    other = write_shards(tmp_path / "other", [3], change=lambda n: {"label": -1})
    (other / "train-00000.parquet").unlink()
    with pytest.raises(ArtefactError, match="3 classes, and none of the 3 samples of split 'train' has one"):
        ShardDataset(other, "train").singles()


@pytest.mark.parametrize("most", [None, 4])
def test_data_without_classes_are_one_class(tmp_path, most):
    folder = write_shards(tmp_path / "shards", [5, 2], change=lambda n: {"label": -1})
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", manifest | {"classes": [], "class_ids": [], "category_of_class": []})
    train = ShardDataset(folder, "train")
    assert train.singles(most).rows.tolist() == list(range(most or 7))
    assert set(train.singles(most).labels.tolist()) == {0}
    assert train.manifest.learnt_classes == ["all"]


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="split 'train' has no samples"):
        ShardDataset(write_shards(tmp_path / "shards", [0]), "train")


def test_a_window_that_no_memory_holds_is_refused(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "shards", [5, 9, 7])
    monkeypatch.setattr("vtp.data.stream.TOGETHER", 16)
    stream_of(folder, window=2)
    with pytest.raises(ConfigError, match=r"window null shuffles 21 samples together.* at most 16"):
        stream_of(folder)
    with pytest.raises(ConfigError, match=r"window 3 shuffles 25"):
        stream_of(folder, folder, window=3)


def test_tables_are_kept_up_to_a_size(tmp_path, monkeypatch):
    """Those used last; more are read again, and give the same."""
    monkeypatch.setattr("vtp.data.dataset.TABLES", 3 * 4500)
    dataset = ShardDataset(write_shards(tmp_path / "shards", [2] * 12), "train")
    for index in (*range(24), *range(0, 24, 5)):
        assert dataset.caption(index) == str(index)
    assert 1 < len(dataset._tables._held) <= 3
    assert dataset._tables._size == sum(table.bytes for table, _ in dataset._tables._held.values()) <= 3 * 4500


def test_large_jpegs_are_decoded_no_larger_than_their_views(tmp_path):
    """An eighth of the side is decoded, the crops stay in place, and a centre crop still sees every pixel."""
    folder = write_shards(
        tmp_path / "shards", [16], change=lambda n: {"image": picture(n, 320, format="JPEG"), "extension": "jpg"}
    )
    stream = stream_of(folder, decode="reduced", max_replaced=0.0)
    sizes = []
    read = stream.read
    stream.read = lambda *a, **k: sizes.append((drawn := read(*a, **k)).image.size) or drawn
    batch = batches_of(stream, ssl=1.0, ssl_views={"global_size": 16, "local_size": 8, "local_views": 1})[0]
    assert max(max(size) for size in sizes) <= 80
    assert any(size == (40, 40) for size in sizes)
    full = batches_of(stream_of(folder), ssl=1.0)[0]
    assert torch.equal(batch.tokens, full.tokens)
    assert (batch.clip_images.int() - full.clip_images.int()).abs().max() <= 2
    sizes.clear()
    batches_of(stream, reconstruction_view={"name": "centre_crop"})[0]
    assert sorted(sizes)[-4:] == [(320, 320)] * 4


def test_crops_of_a_large_jpeg_on_its_side_lie_in_the_same_place(tmp_path):
    """The size that a crop needs is that of the picture upright."""
    ramp = np.indices((160, 480)).transpose(1, 2, 0) * (255 / 160, 255 / 480)
    pixels = np.concatenate([ramp, np.full((160, 480, 1), 128)], axis=2).round().astype(np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95, exif=exif)
    jpeg = {"image": buffer.getvalue(), "extension": "jpg"}
    folder = write_shards(tmp_path / "shards", [16], change=lambda number: jpeg)
    views = {"global_size": 16, "local_size": 8, "local_views": 1, "jitter": 0.0, "grey": 0.0, "solarize": 0.0}
    stream = stream_of(folder, decode="reduced", max_replaced=0.0)
    drawn, read = [], stream.read
    stream.read = lambda *a, **k: drawn.append(read(*a, **k)) or drawn[-1]
    for step in range(4):
        reduced, full = (batches_of(s, ssl=1.0, ssl_views=views)[step] for s in (stream, stream_of(folder)))
        for name in ("clip_images", "global_views", "local_views"):
            assert (getattr(reduced, name).int() - getattr(full, name).int()).abs().max() <= 12, name
    assert {one.whole for one in drawn} == {(160, 480)}
    assert {one.image.size for one in drawn} <= {(20, 60), (40, 120)}


@pytest.mark.parametrize("shards", SPLITS)
def test_groups_are_exact_whoever_reads_them(tmp_path, shards):
    """The same samples at the same places for any ranks and workers, and an epoch holds each once."""
    stream = stream_of(write_shards(tmp_path / "shards", SPLITS[shards]), window=4, groups=2)
    whole = seen(stream, range(24))
    for epoch in whole.split(12):
        assert sorted(epoch.flatten().tolist()) == list(range(96))
    assert torch.equal(seen(stream, range(3, 15), ranks=4), whole[3:15])
    assert torch.equal(seen(stream, range(5), ranks=2, workers=1), whole[:5])


@pytest.mark.parametrize(
    ("changes", "words"), [({"window": None}, "window null has no 2 equal parts"), ({"window": 3}, "window 3 has no 2")]
)
def test_groups_that_cut_no_window_are_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        stream_of(write_shards(tmp_path / "shards", [4]), groups=2, **changes)


def test_groups_that_cut_no_batch_are_refused():
    values = {"data": {"stream": {"window": 6, "groups": 3}, "batch": {"clip": 8, "ssl": 4, "reconstruction": 4}}}
    with pytest.raises(ConfigError, match=r"batch\.reconstruction 4 is not a multiple of stream\.groups 3"):
        Pretrain.parse(merged(tiny_params()["pretrain"], values), where="test")


def test_one_rank_of_a_machine_looks_at_the_shards(tmp_path, monkeypatch):
    """The others meet what is wrong when they read it."""
    folder = write_shards(tmp_path / "shards", [4, 4])
    (folder / "train-00001.tar").unlink()
    monkeypatch.setattr("vtp.data.dataset.is_first_of_machine", lambda: False)
    dataset = ShardDataset(folder, "train")
    with pytest.raises(ArtefactError, match=r"train-00001\.tar: this shard is in manifest\.json and not in the folder"):
        dataset.content(5)
