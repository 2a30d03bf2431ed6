"""Joint batches: blocks, subsets, and draws that depend neither on ranks nor on micro-batches."""

import pytest
import torch
from tiny import merged, tiny_params, write_shards

from stages.pretrain import Pretrain, build_batches
from stages.tune_decoder import TuneDecoder
from vtp.data.batches import ImageBatch, ImageBatches, RankSlice, count_micro_batches
from vtp.data.dataset import ShardDataset
from vtp.data.pretrain_batches import PretrainBatch
from vtp.data.stream import Stream, StreamConfig

BATCH = {"clip": 16, "ssl": 8, "reconstruction": 4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(folder)
    config = StreamConfig(samples=None, window=None, groups=1, mixture=None, decode="full", max_replaced=0.0)
    return Stream([ShardDataset(folder, "train")], config, seed=0)


def config_of(changes=None):
    values = merged(tiny_params()["pretrain"], {"data": {"batch": BATCH}})
    return Pretrain.parse(merged(values, changes or {}), where="test")


def step_of(config, shards, step, ranks, micro_batches):
    """A step's global batch, put together from the micro-batches of all ranks."""
    parts = []
    for rank in range(ranks):
        batches = build_batches(config, shards, RankSlice(rank, ranks, micro_batches))
        parts += [batches[step * micro_batches + micro] for micro in range(micro_batches)]
    masks = torch.cat([part.masks for part in parts])
    joined = PretrainBatch(*map(torch.cat, zip(*parts, strict=True)))
    return joined._replace(masked=masks.flatten().nonzero()[:, 0])


@pytest.mark.parametrize("subsets", ["independent", "nested", "disjoint", "contiguous"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_the_global_batch_is_the_same_for_all(shards, subsets, ranks, micro_batches):
    config = config_of({"data": {"subsets": subsets}})
    for step in (0, 5):
        whole = step_of(config, shards, step, 1, 1)
        for ours, theirs in zip(whole, step_of(config, shards, step, ranks, micro_batches), strict=True):
            assert torch.equal(ours, theirs)


def test_shapes_are_static(shards):
    config = config_of()
    batches = build_batches(config, shards, RankSlice(0, 2, 2))
    shapes = {tuple(tuple(part.shape) for part in batches[index]) for index in range(20)}
    assert len(shapes) == 1
    assert batches[0].clip_images.shape == (4, 3, 16, 16)
    assert batches[0].global_views.shape == (2, 2, 3, 16, 16)
    assert batches[0].rec_images.dtype == torch.uint8


@pytest.mark.parametrize(("subsets", "shared"), [("independent", None), ("nested", 4), ("disjoint", 0)])
def test_subsets_are_what_their_name_says(shards, subsets, shared):
    """In every block of four: two for self-supervision, one to reconstruct; overlap as named."""
    config = config_of({"data": {"subsets": subsets}})
    batches = build_batches(config, shards, RankSlice(0, 1, 1))
    overlaps = []
    for step in range(12):
        drawn = [batches._subsets(step, block, 4) for block in range(4)]
        assert all(len(subset.ssl) == 2 and len(subset.reconstruction) == 1 for subset in drawn)
        overlaps.append(sum(int(subset.reconstruction[0] in subset.ssl) for subset in drawn))
    if shared is None:
        assert 0.2 < sum(overlaps) / 48 < 0.8
    else:
        assert set(overlaps) == {shared}
    contiguous = build_batches(config_of({"data": {"subsets": "contiguous"}}), shards, RankSlice(0, 1, 1))
    assert contiguous._subsets(3, 2, 4).ssl.tolist() == [0, 1]


def test_reconstructions_are_views_of_the_batch(shards):
    batch = build_batches(config_of(), shards, RankSlice(0, 1, 1))[3]
    for block, image in zip(batch.clip_images.split(4), batch.rec_images, strict=True):
        assert any(torch.equal(image, other) for other in block)
    own = {"data": {"reconstruction_view": {"name": "centre_crop"}, "clip_view": {"size": 8}}}
    apart = build_batches(config_of(own), shards, RankSlice(0, 1, 1))[3]
    assert apart.clip_images.shape[-1] == 8
    assert apart.rec_images.shape[-1] == 16


@pytest.mark.parametrize("subsets", ["independent", "disjoint", "contiguous"])
@pytest.mark.parametrize("view", [{"name": "shared"}, {"name": "centre_crop"}])
def test_without_reconstruction_self_supervision_sees_the_same(shards, subsets, view):
    data = {
        "data": {"subsets": subsets, "reconstruction_view": view},
        "tokenizer": {"vision": {"feature_bottleneck": None}},
    }
    both, alone = (
        build_batches(
            config_of(data | {"objective": {"weights": {"reconstruction": weight}}}), shards, RankSlice(0, 1, 1)
        )[2]
        for weight in (0.1, 0.0)
    )
    assert len(both.rec_images) == 4
    assert len(alone.rec_images) == 0
    for name in ("clip_images", "global_views", "local_views", "masks"):
        assert torch.equal(getattr(alone, name), getattr(both, name)), name
    assert alone.replaced.shape == (4, 4)


@pytest.mark.parametrize("weights", [{"clip": 0.0}, {"ssl": 0.0}, {"clip": 0.0, "ssl": 0.0}])
def test_absent_objectives_have_no_data(shards, weights):
    config = config_of({"objective": {"weights": weights}})
    batch = build_batches(config, shards, RankSlice(0, 1, 1))[0]
    assert len(batch.clip_images) == len(batch.tokens) == config.active.clip
    assert len(batch.global_views) == config.active.ssl
    assert len(batch.rec_images) == 4


def test_an_image_is_decoded_once(shards, monkeypatch):
    batches = build_batches(config_of(), shards, RankSlice(0, 1, 1))
    seen = []
    plain = Stream.read
    monkeypatch.setattr(
        Stream, "read", lambda self, number, *a, **k: seen.append(number) or plain(self, number, *a, **k)
    )
    batches[0]
    assert len(seen) == len(set(seen)) == 16


def test_micro_batches():
    for blocks, ranks, largest, expected in ((2048, 256, 8, 1), (2048, 8, 8, 32), (6, 1, 4, 2), (7, 1, 4, 7)):
        assert count_micro_batches(blocks, ranks, largest, named="batch_size") == expected
    with pytest.raises(ValueError, match=r"tune_decoder\.batch_size 16 is not a multiple of the 3 ranks"):
        count_micro_batches(16, 3, 8, named="tune_decoder.batch_size")


@pytest.mark.parametrize("view", [{"name": "centre_crop"}, {"name": "random_crop", "scale_min": 0.5}])
def test_plain_images_are_the_same_for_all(shards, view):
    """Of a step, over ranks and micro-batches; a crop belongs to the position in the stream."""
    config = TuneDecoder.parse(merged(tiny_params()["tune_decoder"], {"view": view}), where="test")

    def of_step(step, ranks, micro_batches):
        found = []
        for rank in range(ranks):
            rank_slice = RankSlice(rank, ranks, micro_batches)
            batches = ImageBatches(shards, config.view, size=16, batch_size=8, rank_slice=rank_slice)
            found += [batches[step * micro_batches + micro] for micro in range(micro_batches)]
        return ImageBatch(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    alone = [of_step(step, 1, 1) for step in range(20)]
    for ranks, micro_batches in ((1, 4), (2, 1), (2, 2), (4, 2)):
        for step in (0, 7, 19):  # the second is in the first epoch, the last beyond it
            assert torch.equal(of_step(step, ranks, micro_batches).images, alone[step].images)
    assert not any(batch.replaced.any() for batch in alone)
    if view["name"] == "centre_crop":  # an epoch shows every image once
        originals = shards.sources[0].images(range(64), 16).flatten(1)
        shown = torch.cat([batch.images for batch in alone[:8]]).flatten(1)
        assert torch.equal(shown.unique(dim=0), originals.unique(dim=0))
    with pytest.raises(ValueError, match="hold 64 samples and a batch takes 65"):
        ImageBatches(shards, config.view, size=16, batch_size=65, rank_slice=RankSlice(0, 1, 1))


def test_colours_may_wait_for_the_device(shards):
    """The batch is the same whether a worker or `finish` changes them."""
    config = config_of()
    now = build_batches(config, shards, RankSlice(0, 1, 1))
    later = build_batches(config, shards, RankSlice(0, 1, 1), colour_later=True)
    raw, done = later[2], later.finish(later[2])
    assert raw.colours.shape == (8, 4, 10)
    assert not torch.equal(raw.global_views, done.global_views)
    for ours, theirs in zip(done, now.finish(now[2]), strict=True):
        assert torch.equal(ours, theirs)
