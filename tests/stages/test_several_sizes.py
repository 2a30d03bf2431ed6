"""Pictures of several sizes, from the cache or from shards to a generator: what is learnt, resumes, ranks, mistakes."""

import csv
import json

import numpy as np
import pytest
import torch
from data.small_shards import picture, write_shards
from generating import cache, draw, train, work_in
from launching import on_two_ranks
from PIL import Image
from tiny import merged, tiny_params

import vtp
from stages.evaluate_generator import EvaluateGenerator
from stages.evaluate_generator import run as evaluate
from stages.evaluate_reconstruction import EvaluateReconstruction
from stages.evaluate_reconstruction import run as reconstruct
from stages.pretrain import Pretrain
from stages.reference import ReferenceStatistics
from stages.reference import run as measure
from stages.runner.environment import Interrupted
from vtp import LightningDiT, VisualTokenizer, load_tokenizer
from vtp.artefact import ArtefactError, digest, load_tensors, read_json
from vtp.commands.sample import parsed_size, sample
from vtp.config import ConfigError
from vtp.data.buckets import ImageBuckets
from vtp.data.dataset import ShardDataset
from vtp.data.latents import LatentDataset, read_latents_config
from vtp.data.size_order import SizeOrder
from vtp.data.sized_latents import SizedLatents
from vtp.data.sizes import SizesConfig
from vtp.evaluation.samples import Samples
from vtp.evaluation.settings import NOISE
from vtp.flow import draw_noise
from vtp.layers.flops import TRAINING, forward_flops
from vtp.layers.images import normalise, to_uint8
from vtp.models.base import Encoding

SIDES = [(16, 16), (24, 24), (40, 24), (16, 32), (50, 25), (64, 31)]  # width, height
SIZES = {"short_edges": [16, 24], "ratios": [0.5, 1.0, 2.0], "multiple": 8}
IMAGES = {
    "sizes": SIZES,
    "labelled": True,
    "horizontal_flips": True,
    "precision": "float32",
    "window": 2,
    "decode": "full",
    "max_replaced": 0.1,
    "statistics_images": 30,
}
TRAINING_OF = {"batch_size": 4, "training": {"length": {"name": "samples", "samples": 40}, "log_every": 2}}
CACHED = TRAINING_OF | {"objective": {"timesteps": {"name": "auto", "sigma": 1.0}}}
ENCODED = CACHED | {"images": IMAGES}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Noise in pictures of all sides, and a tokenizer with its first weights."""
    root = tmp_path_factory.mktemp("inputs")

    def sample(number):
        width, height = SIDES[number % len(SIDES)]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return {"image": picture(pixels=pixels), "width": width, "height": height}

    write_shards(root / "shards", [40, 0, 50, 30], change=sample)
    torch.manual_seed(0)
    config = Pretrain.parse(tiny_params()["pretrain"], where="test")
    VisualTokenizer(config.architecture).save_pretrained(root / "tokenizer")
    cache(root, root, sizes=SIZES)
    return root


@pytest.fixture(scope="module")
def cached(inputs, tmp_path_factory):
    return train(inputs, tmp_path_factory.mktemp("cached"), CACHED)


@pytest.fixture(scope="module")
def encoded(inputs, tmp_path_factory):
    return train(inputs, tmp_path_factory.mktemp("encoded"), ENCODED, latents=None, shards=inputs / "shards")


def start(kind, inputs, root, **options):
    """A training of one of both kinds."""
    given = {} if kind == "cached" else {"latents": None, "shards": inputs / "shards"}
    return train(inputs, root, {"cached": CACHED, "encoded": ENCODED}[kind], **given, **options)


def rows(out):
    with (out / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_picture_is_cached_at_every_edge_up_to_its_own(inputs):
    images, latents, model = ShardDataset(inputs / "shards", "train"), SizedLatents(inputs / "latents"), None
    sizes, model = SizesConfig.parse(SIZES, where="test"), load_tokenizer(inputs / "tokenizer")
    buckets = np.concatenate([ImageBuckets(images, sizes, labelled=True).of_shard(shard) for shard in range(4)])
    for ratio, of_ratio in enumerate(sizes.sizes):
        for edge, size in enumerate(of_ratio):
            here = np.flatnonzero((buckets // 2 == ratio) & (buckets % 2 >= edge))
            if not len(here):
                assert f"train-{size}" not in read_latents_config(inputs / "latents").splits
                continue
            here = here[np.argsort(-(buckets[here] % 2), kind="stable")]
            found = latents.of_size(ratio, edge)
            expected = model.encode(normalise(images.images(here, size)))
            torch.testing.assert_close(found.rows(np.arange(len(found))), expected, atol=1e-5, rtol=1e-5)
            assert expected.shape[2:] == (size.height // 8, size.width // 8)
            assert found.labels.tolist() == [images.learnt_label(int(row)) for row in here]
            assert found.pixels_per_latent == 8
    assert len(latents) == 120
    counts = np.bincount(buckets, minlength=6).reshape(1, 3, 2)
    assert np.array_equal(latents.buckets.counts, counts)
    assert np.array_equal(np.sort(latents.buckets.of_shard(0)), np.sort(buckets))
    held = LatentDataset(inputs / "latents", "validation")
    assert held.shape == (8, 2, 2)
    assert len(held) == 120  # all of them, as squares


def test_pictures_of_a_batch_are_found_in_the_files_of_its_size(inputs):
    """By what their labels and their numbers say."""
    latents = SizedLatents(inputs / "latents")
    order = SizeOrder(latents.buckets, batch_size=4, seed=0, window=None)
    for step in range(40):
        batch = order.batch(step)
        small, own = latents.of_size(batch.ratio, 0), latents.of_size(batch.ratio, batch.edge)
        places = latents.rows(batch)
        assert torch.equal(small.labels[places], own.labels[places])


def test_statistics_are_those_of_all_sizes_that_are_stored(inputs):
    latents = SizedLatents(inputs / "latents")
    values = []
    for ratio, edge in np.argwhere(np.array([[part is not None for part in parts] for parts in latents._parts])):
        part = latents.of_size(ratio, edge)
        every = np.arange(len(part))
        for flipped in (None, every >= 0):
            values.append(part.rows(every, flipped).double().transpose(0, 1).flatten(1))
    joined = torch.cat(values, dim=1)
    count = read_json(inputs / "latents/config.json")["statistics_images"]
    assert count == 40  # of those, by chance
    mean = part.statistics.mean.flatten().double()
    assert ((mean - joined.mean(1)).abs() < 0.5 * joined.std(1)).all()


def test_a_stopped_cache_goes_on_with_the_files_that_are_missing(inputs, tmp_path):
    with pytest.raises(Interrupted):
        cache(inputs, tmp_path, stop_after=20, sizes=SIZES)
    assert digest(cache(inputs, tmp_path, sizes=SIZES)) == digest(inputs / "latents")


@pytest.mark.parametrize("kind", ["cached", "encoded"])
@pytest.mark.parametrize("stop_after", [1, 6])
def test_a_stopped_run_ends_with_the_same_bytes(inputs, request, tmp_path, kind, stop_after):
    whole = request.getfixturevalue(kind)
    with pytest.raises(Interrupted):
        start(kind, inputs, tmp_path, stop_after=stop_after, name="stopped")
    out = start(kind, inputs, tmp_path)
    assert digest(out / "generator") == digest(whole / "generator")
    for name in ("curves.csv", "picture.png", "metrics.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("kind", ["cached", "encoded"])
@pytest.mark.parametrize("layout", ["sharded", "micro-batches"])
@pytest.mark.slow
def test_ranks_and_micro_batches_train_the_same_generator(inputs, request, tmp_path, kind, layout):
    """Two real ranks, by the command line."""
    whole, out = request.getfixturevalue(kind), tmp_path
    files = {"metrics": "metrics.json", "curves": "curves.csv", "picture": "picture.png", "generator": "generator"}
    given = {"latents": inputs / "latents"} if kind == "cached" else {"shards": inputs / "shards"}
    changes = {"cached": CACHED, "encoded": ENCODED}[kind]
    settings = {"VTP_MICRO_BATCH": "1"} if layout == "micro-batches" else {"VTP_PARALLEL": "fsdp"}
    paths = {"tokenizer": inputs / "tokenizer"} | given | files
    on_two_ranks(tmp_path, "train_generator", merged(tiny_params()["train_generator"], changes), paths, **settings)
    for ours, theirs in zip(rows(out), rows(whole), strict=True):
        assert {name: float(value or 0) for name, value in ours.items()} == pytest.approx(
            {name: float(value or 0) for name, value in theirs.items()}, rel=2e-3
        )
    found, expected = (load_tensors(place / "generator/model.safetensors") for place in (out, whole))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=5e-4, rtol=0, msg=name)


@pytest.mark.parametrize("kind", ["cached", "encoded"])
def test_a_step_costs_what_is_expected_over_all_sizes(inputs, request, kind):
    """By hand: shares of pictures, each at any of its edges alike; encoding is part of the work."""
    out = request.getfixturevalue(kind)
    model, tokenizer = LightningDiT.from_pretrained(out / "generator"), load_tokenizer(inputs / "tokenizer")
    sizes, per_picture = SizesConfig.parse(SIZES, where="test"), 0.0
    for width, height in SIDES:
        ratio, edges = divmod(int(sizes.bucket_of(np.array([width]), np.array([height]))[0]), 2)
        for size in sizes.sizes[ratio][: edges + 1]:
            latent = torch.zeros(1, 8, size.height // 8, size.width // 8)
            flops = TRAINING * forward_flops(model, latent, torch.zeros(1), torch.zeros(1).long())
            if kind == "encoded":
                flops += forward_flops(Encoding(tokenizer), torch.zeros(1, 3, *size))
            per_picture += flops / (edges + 1) / len(SIDES)
    facts = json.loads((out / "metrics.json").read_text())["train_generator"]
    assert (facts["steps"], facts["samples"]) == (10, 40)
    assert facts["flops"] == pytest.approx(40 * per_picture, rel=1e-6)
    assert facts["epochs"] == pytest.approx(40 / 120)


def test_measured_statistics_are_those_of_the_first_batches(inputs, encoded, tmp_path):
    """And a cache may give its own instead."""
    space = LightningDiT.from_pretrained(encoded / "generator").space
    assert space.pixels_per_latent == 8
    cache_statistics = LatentDataset(inputs / "latents", "validation").statistics
    assert ((space.statistics.mean - cache_statistics.mean).abs() < 0.5 * cache_statistics.std).all()
    assert not torch.equal(space.statistics.mean, cache_statistics.mean)
    given = ENCODED | {"images": IMAGES | {"statistics_images": None}}
    out = train(inputs, tmp_path, given, shards=inputs / "shards")
    space = LightningDiT.from_pretrained(out / "generator").space
    assert torch.equal(space.statistics.mean, cache_statistics.mean)


def test_losses_are_of_all_sizes_and_nothing_was_replaced(encoded):
    assert {row["replaced_samples"] for row in rows(encoded)} == {"0"}
    assert all(0.5 < float(row["mse"]) < 4 for row in rows(encoded))


def test_squares_alone_are_sizes_too(inputs, tmp_path):
    """Larger than the tokenizer's: what the generator stores has their size."""
    squares = {"short_edges": [24], "ratios": [1.0], "multiple": 8}
    (tmp_path / "tokenizer").symlink_to(inputs / "tokenizer")
    (tmp_path / "shards").symlink_to(inputs / "shards")
    cache(tmp_path, tmp_path, sizes=squares)
    config = LightningDiT.from_pretrained(train(tmp_path, tmp_path, CACHED) / "generator").config
    assert config.input_size == 3


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"shards": "shards"}, r"images is null: give the command --latents alone"),
        ({}, {"latents": None}, r"images is null: give the command --latents alone"),
        ({"images": IMAGES}, {}, r"images needs --shards work/shards on the command"),
        ({"images": IMAGES}, {"shards": "shards"}, r"statistics_images: null takes those of the command's --latents"),
        (
            {"images": IMAGES | {"statistics_images": None}},
            {"shards": "shards", "latents": None},
            r"statistics_images: null takes those of the command's --latents",
        ),
        (
            {"images": IMAGES | {"sizes": {"short_edges": [12], "ratios": [1.0], "multiple": 4}}},
            {"shards": "shards", "latents": None},
            r"pictures of 12x12 pixels: sides must be multiples of 8, the pixels per latent, 8, times patch_size, 1",
        ),
        ({"model": {"patch_size": 2}}, {}, r"patch_size: 2, and some latents are 8 x 3 x 3; set .*sizes\.multiple"),
    ],
    ids=range(7),
)
def test_mistakes_are_told(inputs, tmp_path, changes, given, message):
    given = {name: inputs / place if place else None for name, place in given.items()}
    with pytest.raises((ConfigError, ValueError), match=message):
        train(inputs, tmp_path, TRAINING_OF | changes, **given)


@pytest.mark.parametrize("size", [(24, 16), (16, 40)])
def test_pictures_of_any_size_are_drawn(inputs, encoded, tmp_path, size):
    """Of sizes that were learnt or not: latents by the stage, pictures by Python and by the command line."""
    height, width = size
    drawn = draw(encoded / "generator", tmp_path, size={"height": height, "width": width}, samples=6)
    samples = Samples(drawn)
    shape = (8, height // 8, width // 8)
    assert samples.shape == shape
    statistics = LightningDiT.from_pretrained(encoded / "generator").space.statistics
    noise = samples.of(NOISE).latents(0, 6)
    torch.testing.assert_close(noise, statistics.denormalise(draw_noise(0, range(6), shape)))
    generator = vtp.load_generator(encoded / "generator", inputs / "tokenizer")
    sampler = tiny_params()["generate"]["settings"]["guided"]
    pictures = generator.draw([0, 1, 2], 2, size=size, **sampler)
    assert pictures.shape == (6, 3, height, width)
    theirs = to_uint8(generator.tokenizer.decode(samples.of("guided").latents(0, 3)))  # of the classes 0, 1, 2
    ours = torch.stack([generator.draw([label], label + 1, size=size, **sampler)[-1] for label in range(3)])
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert generator.sample(0, size=size)[0].size == (width, height)
    flags = {
        "steps": 2,
        "guidance": None,
        "tokenizer": inputs / "tokenizer",
        "decoder": None,
        "text_encoder": None,
        "device": "cpu",
    }
    sample(
        encoded / "generator",
        ["a"],
        None,
        None,
        count=2,
        size=f"{width}x{height}",
        seed=0,
        out=tmp_path / "a.png",
        **flags,
    )
    assert Image.open(tmp_path / "a.png").size[1] >= 96 // min(size) * height


def test_sizes_that_cannot_be_drawn_are_told(inputs, encoded, tmp_path):
    message = r"pictures of 16 x 20 pixels: sides must be multiples of 8, the pixels of a token of this generator"
    with pytest.raises(ConfigError, match=f"generate.size: {message}"):
        draw(encoded / "generator", tmp_path, size={"height": 20, "width": 16})
    with pytest.raises(ValueError, match=message):
        vtp.load_generator(encoded / "generator", inputs / "tokenizer").sample(0, size=(20, 16))
    for text in ("16", "16x", "0x16", "16X24", "-8x8"):
        with pytest.raises(ValueError, match=f"--size {text}: expected WIDTHxHEIGHT in pixels, such as 512x384"):
            parsed_size(text)
    assert parsed_size("512x384") == (384, 512)
    other = LightningDiT.from_pretrained(encoded / "generator")
    other.space = other.space._replace(pixels_per_latent=None)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="does not say how many pixels a latent has"):
        draw(tmp_path / "other", tmp_path, size={"height": 24, "width": 16})


def test_what_is_compared_has_the_size_of_what_is_drawn(inputs, encoded, tmp_path):
    """Squares of another side than the tokenizer's: samples, reconstructions and the real images beside them."""
    squares = {"short_edges": [24], "ratios": [1.0], "multiple": 8}
    latents = cache(inputs, tmp_path, sizes=squares)
    samples = draw(encoded / "generator", tmp_path, size={"height": 24, "width": 24})
    host = work_in(tmp_path)
    record = merged(tiny_params()["reference"], {"image_size": 24})
    measure(
        ReferenceStatistics.parse(record, where="test"),
        shards=inputs / "shards",
        reference=tmp_path / "reference",
        host=host,
    )
    files = {"metrics": "metrics.json", "curves": "curves.csv", "pictures": "pictures"}
    given = {"tokenizer": inputs / "tokenizer", "samples": samples, "reference": tmp_path / "reference"}
    config = EvaluateGenerator.parse(tiny_params()["evaluate_generator"] | {"class_probe": None}, where="test")
    outputs = {flag: tmp_path / name for flag, name in files.items()}
    evaluate(config, **given, latents=latents, **outputs, host=host)
    assert "reconstructed" in json.loads((tmp_path / "metrics.json").read_text())["generation"]
    with pytest.raises(ConfigError, match=r"latents: latents of squares of 16 pixels, the samples have 24"):
        evaluate(config, **given, latents=inputs / "latents", **outputs, host=host)
    flat = draw(encoded / "generator", tmp_path / "flat", size={"height": 16, "width": 24})
    with pytest.raises(ConfigError, match="latents of 2 x 3, and squares are compared"):
        evaluate(config, **given | {"samples": flat}, **outputs, host=host)
    config = EvaluateReconstruction.parse(tiny_params()["evaluate_reconstruction"], where="test")
    names = ("metrics", "images", "pictures", "diagnostics", "speed")
    outputs = {name: tmp_path / f"reconstruction_{name}" for name in names}
    given = {"shards": inputs / "shards", "tokenizer": inputs / "tokenizer", "reference": tmp_path / "reference"}
    reconstruct(config, **given, **outputs, host=host)
    figures = json.loads(outputs["metrics"].read_text())["reconstruction"]
    assert list(figures) == ["validation_centre24"]


def test_statistics_of_other_squares_are_refused(inputs, tmp_path):
    images = IMAGES | {"statistics_images": None, "sizes": SIZES | {"short_edges": [24]}}
    with pytest.raises(ArtefactError, match=r"latents: squares of 16 pixels of 3 classes, those of .* are of 24 and 3"):
        train(inputs, tmp_path, ENCODED | {"images": images}, shards=inputs / "shards")


def test_a_cache_of_squares_is_no_cache_of_sizes(inputs, tmp_path):
    with pytest.raises(ArtefactError, match=r"no split 'train'; it has train-16x32"):
        LatentDataset(inputs / "latents")
    with pytest.raises(ArtefactError, match=r"latents of squares alone; set cache_latents\.sizes"):
        SizedLatents(cache(inputs, tmp_path))


TOLD = {
    "model": {
        "condition": {
            "name": "captions",
            "encoder": {"name": "tokenizer"},
            "features": "encoded",
            "reading": "cross_attention",
        }
    }
}


@pytest.mark.parametrize("source", ["cached", "encoded"])
def test_captions_go_with_pictures_of_every_size(inputs, tmp_path, source):
    """Of cached latents and of pictures that are encoded as they come; a sample of any size is of its prompt."""
    given = {"text_encoder": inputs / "tokenizer"}
    if source == "cached":
        cache(inputs, tmp_path, of="captions", sizes=SIZES)
        out = train(inputs, tmp_path, CACHED | TOLD, **given, latents=tmp_path / "latents")
    else:
        changes = ENCODED | TOLD | {"images": IMAGES | {"labelled": False}}
        out = train(inputs, tmp_path, changes, **given, shards=inputs / "shards", latents=None)
    (tmp_path / "tokenizer").symlink_to(inputs / "tokenizer")
    generator = vtp.load_generator(out / "generator")
    assert generator.classes == []
    one, other = (np.asarray(generator.sample(text, size=(16, 32))[0]) for text in ("a frog", "a dog"))
    assert one.shape == (16, 32, 3)
    assert generator.model.config.text is not None
    with torch.no_grad():
        generator.model.blocks[0].cross_attn.proj.weight.normal_()
    assert not np.array_equal(one, np.asarray(generator.sample("a frog", size=(16, 32))[0]))
    assert other.shape == one.shape
