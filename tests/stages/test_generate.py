"""Sampling: what a sample depends on, files that resume, ranks, guidance by another generator, and what is told."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from generating import cache, draw, train, write_inputs
from launching import on_two_ranks, ranks_of
from tiny import damage_file, merged, tiny_params

from stages.generate import Generate
from stages.runner.environment import Interrupted
from vtp import LightningDiT
from vtp.artefact import ArtefactError, digest, load_tensors, read_json, save_tensors, write_json
from vtp.config import ConfigError
from vtp.data.latents import LatentDataset
from vtp.data.shared_parts import SharedParts
from vtp.evaluation.samples import Samples, draw_labels
from vtp.evaluation.settings import NOISE
from vtp.finite import NotFiniteError
from vtp.flow import draw_noise

COUNT = 24
PATIENCE = 6  # seconds that a collective may take
SETTINGS = {"unguided": {"solver": "heun"}, "guided": {}}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A generator of some steps, and the one of its first steps beside it."""
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    cache(root, root)
    longer = {"length": {"name": "samples", "samples": 1600}, "log_every": 20}
    out = train(root, root / "training", {"optim": {"lr": 1e-2}, "training": longer})
    (out / "generator").rename(root / "generator")
    return root


@pytest.fixture(scope="module")
def drawn(inputs, tmp_path_factory):
    return Samples(draw(inputs / "generator", tmp_path_factory.mktemp("drawn"), settings=SETTINGS))


def latents(samples, setting, first=0, count=COUNT):
    return samples.of(setting).latents(first, count)


def test_settings_differ_and_start_from_the_same_noise(inputs, drawn):
    data = LatentDataset(inputs / "latents")
    noise = draw_noise(0, range(COUNT), data.shape)
    torch.testing.assert_close(latents(drawn, NOISE), data.statistics.denormalise(noise))
    assert not torch.allclose(latents(drawn, "guided"), latents(drawn, "unguided"), atol=1e-3)
    assert drawn.settings == ["unguided", "guided", NOISE]
    assert [drawn.guidance(name) for name in drawn.settings] == ["unguided", "cfg2", NOISE]
    assert torch.equal(drawn.of("guided").labels, torch.arange(COUNT) % 6)
    assert torch.equal(latents(drawn, "guided")[17:22], latents(drawn, "guided", 17, 5))  # over the end of a file


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_sample_does_not_depend_on_its_batch(inputs, drawn, tmp_path, batch_size):
    other = Samples(draw(inputs / "generator", tmp_path, settings=SETTINGS, batch_size=batch_size))
    assert torch.equal(latents(other, NOISE), latents(drawn, NOISE))  # the noise, bit for bit
    for setting in SETTINGS:
        torch.testing.assert_close(latents(other, setting), latents(drawn, setting), atol=1e-4, rtol=0)
        assert torch.equal(other.of(setting).labels, drawn.of(setting).labels)


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_more_samples_begin_with_the_same(inputs, tmp_path, labels):
    few, many = (
        Samples(
            draw(inputs / "generator", tmp_path / str(count), samples=count, labels=labels, batch_size=8, shard_size=16)
        )
        for count in (11, 24)
    )
    assert torch.equal(latents(few, "guided", 0, 11), latents(many, "guided", 0, 11))
    assert torch.equal(few.of("guided").labels, many.of("guided").labels[:11])


def test_labels_by_chance():
    drawn = draw_labels("random", 0, range(3000), range(6))
    counts = torch.bincount(drawn, minlength=6)
    assert counts.min() > 400
    assert len(set(counts.tolist())) > 1
    assert torch.equal(drawn[100:200], draw_labels("random", 0, range(100, 200), range(6)))
    assert not torch.equal(drawn, draw_labels("random", 1, range(3000), range(6)))


def test_a_stopped_run_goes_on_with_the_batches_that_are_missing(inputs, drawn, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        draw(inputs / "generator", tmp_path, settings=SETTINGS, stop_after=1)
    done = [path.name for path in (tmp_path / "scratch/folder/samples.parts").glob("*.safetensors")]
    assert done == ["unguided-000000000.safetensors"]
    drawn_now = []
    write = SharedParts.write
    monkeypatch.setattr(
        SharedParts, "write", lambda own, part, rows: (drawn_now.append(part.name), write(own, part, rows))
    )
    samples = draw(inputs / "generator", tmp_path, settings=SETTINGS)
    assert done[0] not in drawn_now
    assert len(drawn_now) == 3 * 3 - 1  # of three settings 10, 10 and 4 samples
    assert digest(samples) == digest(drawn.folder)
    assert not (tmp_path / "scratch/folder/samples.parts").exists()


def test_ranks_share_the_batches_of_one_file_and_wait_longer_than_a_collective_may(inputs, tmp_path):
    """One of two stands still for twice as long as a collective may take; the other has nothing left to draw then."""
    settings = {"samples": 40, "batch_size": 5, "shard_size": 1000, "settings": SETTINGS}
    alone = draw(inputs / "generator", tmp_path / "alone", **settings)
    (tmp_path / "ranks").mkdir()
    stalled = []

    def stall():
        while len(found := ranks_of(tmp_path / "ranks")) < 2 or not parts():
            time.sleep(0.05)
        os.kill(found[1], signal.SIGSTOP)
        stalled.append(parts())
        time.sleep(2 * PATIENCE)
        stalled.append(parts())
        os.kill(found[1], signal.SIGCONT)

    def parts():
        return len(list((tmp_path / "ranks").glob(".scratch/generate/*/*/samples.parts/*.safetensors")))

    thread = threading.Thread(target=stall)
    thread.start()
    params = merged(tiny_params()["generate"], settings)
    paths = {"generator": inputs / "generator", "samples": "samples"}
    on_two_ranks(tmp_path / "ranks", "generate", params, paths, VTP_TIMEOUT_SECONDS=str(PATIENCE))
    thread.join()
    assert stalled[0] < stalled[1] < 3 * 8  # the other went on, and waited
    assert digest(tmp_path / "ranks/samples") == digest(alone)


def test_ranks_draw_the_same_bytes(inputs, drawn, tmp_path):
    """Two real ones, by the command line."""
    params = merged(tiny_params()["generate"], {"settings": SETTINGS})
    paths = {"generator": inputs / "generator", "samples": "samples"}
    on_two_ranks(tmp_path, "generate", params, paths)
    assert json.loads((tmp_path / "provenance.json").read_text())["facts"]["samples"] == 3 * COUNT
    assert digest(tmp_path / "samples") == digest(drawn.folder)


def test_guided_by_an_earlier_generator(inputs, drawn, tmp_path):
    """Scale 1 is the generator itself, scale 0 the other one."""
    settings = {"unguided": SETTINGS["unguided"], "guided": {"guide": "generator", "guidance_interval": [0.0, 1.0]}}
    early = inputs / "generator" / "at-0.2"
    samples = Samples(draw(inputs / "generator", tmp_path, given={"guide": early}, settings=settings))
    assert samples.guidance("guided") == "auto2"
    assert not torch.allclose(latents(samples, "guided"), latents(drawn, "guided"), atol=1e-3)
    settings["guided"]["guidance_scale"] = 0.0
    weak = Samples(draw(inputs / "generator", tmp_path / "weak", given={"guide": early}, settings=settings))
    plain = Samples(draw(early, tmp_path / "alone", settings={"unguided": {"solver": "euler"}}))
    torch.testing.assert_close(latents(weak, "guided"), latents(plain, "unguided"), atol=1e-5, rtol=1e-5)


def test_a_sweep_is_all_combinations(inputs, tmp_path):
    sweep = {"setting": "guided", "scales": [1.0, 2.5], "intervals": [[0.0, 1.0], [0.25, 0.75]], "shifts": [0.5, 1.0]}
    samples = Samples(draw(inputs / "generator", tmp_path, sweep=sweep, samples=4))
    assert len(samples.settings) == 2 + 2 + 4 + 1  # a scale of 1 has no interval
    plain, guided = (latents(samples, name, 0, 4) for name in ("w1_s0p5", "w2p5_t0-1_s0p5"))
    assert torch.equal(plain, latents(samples, "unguided", 0, 4))
    assert not torch.allclose(guided, plain, atol=1e-3)
    assert not torch.allclose(guided, latents(samples, "w2p5_t0p25-0p75_s0p5", 0, 4), atol=1e-4)


def test_names_of_a_sweep_tell_all_its_numbers_apart():
    values = tiny_params()["generate"]
    sweep = {"setting": "guided", "scales": [1.5, 1.5000001], "shifts": [0.3, 0.30000001]}
    sweep |= {"intervals": [[0.0, 1.0], [1e-9, 1.0], [0.0, 0.99999999]]}
    settings = Generate.parse(values | {"sweep": sweep}, where="test").all_settings
    assert len(settings) == 2 + 2 * 3 * 2
    assert {"w1p5_t0-1_s0p3", "w1p5000001_t1e-09-1_s0p30000001", "w1p5_t0-0p99999999_s0p3"} < settings.keys()
    taken = values["settings"] | {"w1p5_t0-1_s0p3": values["settings"]["guided"]}
    with pytest.raises(
        ConfigError, match="'w1p5_t0-1_s0p3' is what the sweep calls one of its own; choose another name"
    ):
        Generate.parse(values | {"sweep": sweep, "settings": taken}, where="test")
    for part, value in (("scales", 2.0), ("shifts", 0.5), ("intervals", [0.1, 1.0])):
        with pytest.raises(ConfigError, match=rf"sweep\.{part}: .* comes twice"):
            Generate.parse(values | {"sweep": sweep | {part: [value, value]}}, where="test")
    for part, value in (("scales", 1e9), ("shifts", -1.0)):
        with pytest.raises(ConfigError, match=rf"test: sweep\.{part}: Input should be"):
            Generate.parse(values | {"sweep": sweep | {part: [value]}}, where="test")


def test_half_precision_is_near(inputs, drawn, tmp_path):
    other = Samples(draw(inputs / "generator", tmp_path, settings=SETTINGS, precision="bfloat16"))
    assert latents(other, "guided").dtype == torch.float32
    assert not torch.equal(latents(other, "guided"), latents(drawn, "guided"))
    torch.testing.assert_close(latents(other, "guided"), latents(drawn, "guided"), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"guided": {"guide": "generator"}}}, r"guided\.guide is `generator`: .* by --guide FOLDER"),
        (
            {"sweep": {"setting": "guide", "scales": [1.0], "intervals": [[0.0, 1.0]], "shifts": [1.0]}},
            "none of settings",
        ),
        ({"sweep": {"setting": "guided", "scales": [1.0], "intervals": [[1.0, 0.0]], "shifts": [1.0]}}, "start < end"),
        ({"settings": {"guided": {"guidance_channels": 9}}}, "guidance_channels is 9, the latents have 8"),
    ],
)
def test_mistakes_are_told(inputs, tmp_path, changes, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        draw(inputs / "generator", tmp_path, **changes)
    assert not (tmp_path / "samples").exists()


def test_a_guide_that_nothing_asks_for(inputs, tmp_path):
    with pytest.raises(ConfigError, match="no setting has `guide: generator`"):
        draw(inputs / "generator", tmp_path, given={"guide": inputs / "generator"})


def test_the_baseline_keeps_its_name():
    values = tiny_params()["generate"]
    values["settings"] = {NOISE: values["settings"]["guided"]}
    with pytest.raises(ConfigError, match="'noise' is the name of other rows of figures"):
        Generate.parse(values, where="test")


def test_a_generator_from_elsewhere_needs_its_latents(inputs, drawn, tmp_path):
    """Its folder does not say what they mean; ours does, and takes no second word for it."""
    other = LightningDiT.from_pretrained(inputs / "generator")
    other.space = None
    other.save_pretrained(tmp_path / "generator")
    with pytest.raises(ConfigError, match=r"a generator from elsewhere, .* give them by --latents FOLDER"):
        draw(tmp_path / "generator", tmp_path)
    samples = draw(tmp_path / "generator", tmp_path, given={"latents": inputs / "latents"}, settings=SETTINGS)
    assert digest(samples) == digest(drawn.folder)
    with pytest.raises(ConfigError, match=r"--latents .*generator says itself which latents it learnt"):
        draw(inputs / "generator", tmp_path, given={"latents": inputs / "latents"})


def test_a_guide_of_other_latents(inputs, tmp_path):
    other = LightningDiT.from_pretrained(inputs / "generator")
    other.space = other.space._replace(encoder="another")
    other.save_pretrained(tmp_path / "other")
    settings = {"guided": {"guide": "generator"}}
    with pytest.raises(ArtefactError, match=r"--guide .*other learnt the latents of another encoder"):
        draw(inputs / "generator", tmp_path, given={"guide": tmp_path / "other"}, settings=settings)


def test_what_is_not_finite_is_not_written(inputs, tmp_path):
    settings = {"guided": {"guidance_scale": 1.0e3, "steps": 50, "guidance_interval": [0.0, 1.0]}}
    model = LightningDiT.from_pretrained(inputs / "generator")
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(3e38)
    model.save_pretrained(tmp_path / "loud")
    with pytest.raises(NotFiniteError, match=r"of \d+ samples of setting guided from number 0 on hold NaN or infinity"):
        draw(tmp_path / "loud", tmp_path, settings=settings)
    assert not (tmp_path / "samples").exists()
    with pytest.raises(
        ConfigError, match=r"guidance_scale: Input should be less than or equal to 1000 \(given: 1e\+308\)"
    ):
        draw(inputs / "generator", tmp_path, settings={"guided": {"guidance_scale": 1.0e308}})


@pytest.mark.parametrize("damage", ["exchange", "truncate", "flip", "remove", "extra rows", "label"])
def test_files_of_samples_are_those_that_were_written(drawn, tmp_path, damage):
    import shutil

    folder = tmp_path / "samples"
    shutil.copytree(drawn.folder, folder)
    first, second = sorted(folder.glob("guided-*.safetensors"))[:2]
    if damage in ("extra rows", "label"):
        tensors = load_tensors(first)
        if damage == "label":
            tensors["labels"][0] = 99
        else:
            tensors = {name: torch.cat([value, value]) for name, value in tensors.items()}
        save_tensors(first, tensors)
    else:
        damage_file(first, damage, second)
    with pytest.raises(
        ArtefactError, match=rf"not the files that were written there: {first.name} (has sha256|is missing)"
    ):
        Samples(folder).of("guided")
    if damage in ("extra rows", "label"):  # and when somebody writes the digest too
        values = read_json(folder / "config.json")
        values["files"][first.name] = digest(first)
        write_json(folder / "config.json", values)
        message = (
            "not .* latents and labels" if damage == "extra rows" else "1 labels are none of 6 classes, the first is 99"
        )
        with pytest.raises(ArtefactError, match=message):
            Samples(folder).of("guided")
    Samples(folder).of("unguided")


def test_a_folder_that_is_not_whole(drawn, tmp_path):
    import shutil

    shutil.copytree(drawn.folder, tmp_path / "samples")
    values = read_json(drawn.folder / "config.json")
    write_json(tmp_path / "samples/config.json", values | {"samples": COUNT - 1})
    with pytest.raises(
        ArtefactError, match=r"guided-0000\d\.safetensors: not \d+ latents and labels; fetch the folder"
    ):
        Samples(tmp_path / "samples").of("guided")
    write_json(tmp_path / "samples/config.json", values | {"format_version": 1})
    with pytest.raises(ArtefactError, match="samples of format 1, this code reads 4"):
        Samples(tmp_path / "samples")
    with pytest.raises(ArtefactError, match="latent space of another encoder"):
        drawn.require_encoder("another", tmp_path)
