"""Pictures from finished artefacts: what the stages would draw, from three lines of Python and from the command line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from generating import cache, draw, train, write_inputs
from PIL import Image
from tiny import ROOT

import vtp
from vtp.artefact import ArtefactError, digest, load_tensors, read_json, save_tensors, write_json
from vtp.config import ConfigError
from vtp.evaluation.samples import Samples
from vtp.layers.images import to_uint8
from vtp.models.lightningdit import LightningDiT
from vtp.models.loading import save_decoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folders of a finished recipe: tokenizer, generator, and a decoder that is not the tokenizer's own."""
    root = tmp_path_factory.mktemp("work")
    write_inputs(root)
    cache(root, root)
    out = train(root, root / "training", {"optim": {"lr": 1e-2}})
    (out / "generator").rename(root / "generator")
    tokenizer = vtp.load_tokenizer(root / "tokenizer")
    torch.manual_seed(1)
    for parameter in tokenizer.pixel_decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_decoder(tokenizer, root / "decoder")
    return root


@pytest.fixture(scope="module")
def generator(work):
    return vtp.load_generator(work / "generator")


def arrays(pictures):
    return [np.asarray(picture) for picture in pictures]


def test_pictures_are_those_of_the_stages(work, generator, tmp_path):
    """The same noise for the same seed and index, and the same sampler: `generate`, then a decoder."""
    sampler = read_json(work / "generator/sampler.json")
    samples = Samples(draw(work / "generator", tmp_path, seed=3, samples=12, settings={"unguided": sampler}))
    assert generator.sampler.model_dump(mode="json") == sampler
    for index in (0, 7, 11):  # sample n is of class n % 6
        own = generator.sample(index % 6, count=index + 1, seed=3)[-1]
        pixels = generator.tokenizer.decode(samples.of("unguided").latents(index, 1))
        theirs = to_uint8(pixels)[0].permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(own).astype(int) - theirs.astype(int)).max() <= 1
        assert theirs.std() > 10


def test_classes_have_names_and_labels(generator):
    first, third = generator.classes[0], generator.classes[2]
    both = arrays(generator.sample([first, third], count=2, batch_size=3))
    assert len(both) == 4
    assert [picture.shape for picture in both] == [(16, 16, 3)] * 4
    for same in (generator.sample([0, "2"], count=2), generator.sample(first, 2) + generator.sample(2, 2)):
        assert np.array_equal(both, arrays(same))
    assert not np.array_equal(both[0], both[2])
    again, other = (arrays(generator.sample(first, seed=seed)) for seed in (0, 1))
    assert np.array_equal(again[0], both[0])
    assert not np.array_equal(other[0], both[0])


def test_labels_may_be_integers_of_any_library(generator):
    expected = arrays(generator.sample([2, 0, 2]))
    for same in (np.array([2, 0, 2]), np.array([2, 0, 2], np.uint8), torch.tensor([2, 0, 2]), [np.int64(2), 0, "2"]):
        assert np.array_equal(expected, arrays(generator.sample(same)))
    for one in (np.int64(2), np.array(2), torch.tensor(2)):
        assert np.array_equal(expected[:1], arrays(generator.sample(one, seed=np.int64(0), count=np.int64(1))))
    with pytest.raises(ValueError, match="no class 6; labels are 0 to 5"):
        generator.sample(np.array([6]))
    for wrong in (np.array([0.5]), [True], np.array([False]), torch.tensor([True]), [None], np.zeros((2, 2), int), 1.0):
        with pytest.raises(ValueError, match="a class is a name or an integer, given is a "):
            generator.sample(wrong)


def test_a_call_may_change_the_sampler(generator):
    plain, guided = (arrays(generator.sample(0, guidance_scale=scale))[0] for scale in (1.0, 6.0))
    assert not np.array_equal(plain, guided)
    with pytest.raises(ConfigError, match=r"sampler\.stepz: unknown key; did you mean 'steps'"):
        generator.sample(0, stepz=3)
    with pytest.raises(ValueError, match="guide: generator needs a weaker one beside this"):
        generator.sample(0, guide="generator")


def test_classes_that_are_not_there(generator):
    wrong = generator.classes[3][:-1] + "x"
    with pytest.raises(ValueError, match=f"no class '{wrong}'; did you mean '{generator.classes[3]}'"):
        generator.sample(wrong)
    with pytest.raises(ValueError, match="no class 6; labels are 0 to 5"):
        generator.sample(["6"])
    for wrong in ({"count": 0}, {"count": -1}):
        with pytest.raises(ValueError, match="are none; ask for one at least"):
            generator.sample(0, **wrong)
    with pytest.raises(ValueError, match="0 classes are none"):
        generator.sample([])
    twice = generator.space._replace(classes=["crane"] * 2 + generator.classes[2:])
    generator.space, kept = twice, generator.space
    try:
        with pytest.raises(ValueError, match="several classes are called 'crane'; say which: 0, 1"):
            generator.sample("crane")
    finally:
        generator.space = kept


def test_what_belongs_together_is_found_and_verified(work, generator, tmp_path):
    """The tuned decoder beside the generator is used; a generator that was kept on the way has all it takes."""
    own = vtp.load_generator(work / "generator", work / "tokenizer")
    assert not np.array_equal(arrays(own.sample(0))[0], arrays(generator.sample(0))[0])
    early = vtp.load_generator(work / "generator/at-0.2")
    assert early.classes == generator.classes
    for name, parameter in generator.tokenizer.pixel_decoder.state_dict().items():
        assert torch.equal(early.tokenizer.pixel_decoder.state_dict()[name], parameter)
    shutil.copytree(work / "generator", tmp_path / "generator")
    with pytest.raises(ArtefactError, match="no folder `tokenizer` beside it"):
        vtp.load_generator(tmp_path / "generator")
    copied = LightningDiT.from_pretrained(work / "generator")
    copied.save_pretrained(tmp_path / "copy")
    copy = vtp.load_generator(tmp_path / "copy", work / "tokenizer", work / "decoder")
    assert np.array_equal(arrays(copy.sample(0))[0], arrays(generator.sample(0))[0])
    copied.sampler = None
    copied.save_pretrained(tmp_path / "mute")
    with pytest.raises(ArtefactError, match=r"mute: no sampler\.json says how to draw from it"):
        vtp.load_generator(tmp_path / "mute", work / "tokenizer")
    other = LightningDiT.from_pretrained(work / "generator")
    other.space = other.space._replace(encoder="another")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ArtefactError, match="learnt the latents of another encoder than that of .*tokenizer"):
        vtp.load_generator(tmp_path / "other", work / "tokenizer")
    other.space = None
    other.save_pretrained(tmp_path / "foreign")
    with pytest.raises(ArtefactError, match="does not say which latents this generator learnt"):
        vtp.load_generator(tmp_path / "foreign", work / "tokenizer")


def test_a_folder_that_does_not_fit_itself(work, tmp_path):
    shutil.copytree(work / "generator", tmp_path / "generator")
    values = read_json(tmp_path / "generator/config.json")
    values["vtp_pipeline"]["classes"].pop()
    write_json(tmp_path / "generator/config.json", values)
    with pytest.raises(
        ArtefactError, match="5 names and statistics of shape .1, 8, 1, 1., config.json has 6 classes and 8"
    ):
        LightningDiT.from_pretrained(tmp_path / "generator")
    values["vtp_pipeline"]["format_version"] = 1
    write_json(tmp_path / "generator/config.json", values)
    with pytest.raises(ArtefactError, match="format 1, this code reads 2; train the generator again"):
        LightningDiT.from_pretrained(tmp_path / "generator")
    for wrong in (None, {"format_version": 2, "classes": "abcdef"}, {"format_version": 2, "clases": []}):
        write_json(tmp_path / "generator/config.json", values | {"vtp_pipeline": wrong})
        with pytest.raises(ValueError, match=r"config\.json"):
            LightningDiT.from_pretrained(tmp_path / "generator")
    with pytest.raises(ArtefactError, match="model_type is 'vtp'; this is no generator's folder"):
        LightningDiT.from_pretrained(work / "tokenizer")
    (tmp_path / "generator/statistics.safetensors").unlink()
    values = read_json(work / "generator/config.json")
    write_json(tmp_path / "generator/config.json", values)
    with pytest.raises(ArtefactError, match=r"statistics\.safetensors: no such file"):
        LightningDiT.from_pretrained(tmp_path / "generator")


def test_weights_are_taken_in_the_precision_of_the_model(work, generator, tmp_path):
    shutil.copytree(work / "generator", tmp_path / "generator")
    path = tmp_path / "generator/model.safetensors"
    tensors = load_tensors(path)
    save_tensors(path, {name: value.double() for name, value in tensors.items()})
    double = vtp.load_generator(tmp_path / "generator", work / "tokenizer", work / "decoder")
    assert np.array_equal(arrays(double.sample(0))[0], arrays(generator.sample(0))[0])
    save_tensors(path, {name: value.int() for name, value in tensors.items()})
    with pytest.raises(ArtefactError, match="is torch.int32"):
        LightningDiT.from_pretrained(tmp_path / "generator")


def test_a_damaged_decoder_is_not_passed_over(work, tmp_path):
    shutil.copytree(work, tmp_path / "work")
    (tmp_path / "work/decoder/config.json").unlink()
    with pytest.raises(ArtefactError, match="decoder"):
        vtp.load_generator(tmp_path / "work/generator")


def command(*arguments, cwd):
    run = subprocess.run(
        [sys.executable, "-m", "vtp", "sample", *map(str, arguments)],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stdout.strip(), run.stderr.strip()


def test_the_command_says_where_the_picture_is(work, generator, tmp_path):
    name = generator.classes[4]
    status, said, errors = command(work / "generator", "--class", name, "0", "--count", "5", cwd=tmp_path)
    assert (status, errors) == (0, "")
    assert said == str(tmp_path / "samples.png")
    picture = Image.open(said)
    assert picture.width > 5 * 96
    assert picture.height > 2 * 96
    again = command(work / "generator", "--class", name, "0", "--count", "5", "--out", "a/b.png", cwd=tmp_path)[1]
    assert digest(tmp_path / "samples.png") == digest(tmp_path / "a/b.png")
    assert again == str(tmp_path / "a/b.png")
    changed = command(work / "generator", "--guidance", "4", "--steps", "3", "--seed", "2", cwd=tmp_path)
    assert changed[0] == 0
    assert digest(tmp_path / "samples.png") != digest(tmp_path / "a/b.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "no such thing"], "error: no class 'no such thing'"),
        (["--count", "0"], "error: --count 0: at least 1"),
        (["--steps", "0"], "error: sampler.steps: Input should be greater than or equal to 1 (given: 0)"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--out", "picture.jpg"], "error: --out picture.jpg: the name of a PNG file, ending in .png"),
        (["--device", "tpu"], "error: --device tpu: not on this machine"),
        (["--out", "/dev/null/a.png"], "error: /dev/null"),
    ],
)
def test_mistakes_are_said_in_a_line(work, tmp_path, arguments, message):
    status, said, errors = command(work / "generator", *arguments, cwd=tmp_path)
    assert (status, said) == (2, "")
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_drawing_starts_without_what_it_does_not_use(work, tmp_path):
    """Libraries of training and evaluation take seconds to import."""
    code = (
        "import sys, json; sys.argv = ['vtp', 'sample', sys.argv[1], '--count', '1']\n"
        "from vtp.__main__ import main; main(); print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(work / "generator")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"matplotlib", "pyarrow", "lpips", "scipy", "dvc"}  # open_clip builds the text tower
