"""`python -m vtp`: pictures through a tokenizer and back, and what any folder is."""

import json
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from foreign import BACKBONE, DECODER, GOLDEN, autoencoder
from generating import cache, draw, train, write_inputs
from PIL import Image
from safetensors import safe_open
from test_stages import QuietHost
from tiny import ROOT, tiny_params

import vtp
from stages.reference import ReferenceStatistics
from stages.reference import run as reference
from stages.runner.environment import Runtime
from vtp.__main__ import main
from vtp.artefact import digest, load_tensors, read_json, save_tensors, write_json
from vtp.evaluation.reconstruction import psnr
from vtp.layers.images import to_uint8
from vtp.models.decoder import DecoderConfig
from vtp.models.frozen_backbone import BackboneConfig, FrozenBackbone
from vtp.models.loading import save_decoder
from vtp.training.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
COMMANDS = ("sample", "encode", "decode", "reconstruct", "info")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Artefacts of every kind, as a recipe leaves them."""
    root = tmp_path_factory.mktemp("project") / "work"
    write_inputs(root)
    cache(root, root)
    (train(root, root / "training", {}) / "generator").rename(root / "generator")
    draw(root / "generator", root)
    host = QuietHost(root / "reference-scratch" / "folder", root, Runtime(device="cpu"))
    host.folder.mkdir(parents=True)
    config = ReferenceStatistics.parse(tiny_params()["reference"], where="test")
    reference(config, shards=root / "shards", reference=root / "reference", host=host)
    tokenizer = vtp.load_tokenizer(root / "tokenizer")
    torch.manual_seed(1)
    for parameter in tokenizer.pixel_decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_decoder(tokenizer, root / "decoder")
    write_json(root / "provenance/pretrain.json", {"stage": "pretrain", "facts": {"steps": 12, "samples": 96}})
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Of several kinds, none of them square at the tokenizer's size."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = np.random.default_rng(0).integers(0, 256, (50, 37, 4), dtype=np.uint8)
    Image.fromarray(drawn).save(folder / "clear.png")
    Image.fromarray(drawn[..., :3]).save(folder / "photo.jpg", quality=90)
    Image.fromarray(drawn[..., 0].astype(np.uint16) * 257).save(folder / "wide.png")
    return [folder / name for name in ("clear.png", "photo.jpg", "wide.png")]


@pytest.fixture
def run(capsys):
    """Runs a command in this process: what it said, or of one that is refused the line."""

    def run_command(*arguments, refused=False):
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        assert status == (2 if refused else 0), said.err
        if refused:
            assert said.out == ""
            assert len(said.err.splitlines()) == 1
            assert said.err.startswith("error: ")
            return said.err
        return said.out.removesuffix("\n")

    return run_command


def test_latents_of_pictures_in_a_file(work, pictures, run, tmp_path):
    tokenizer = vtp.load_tokenizer(work / "tokenizer")
    out = tmp_path / "a/latents.safetensors"
    assert run("encode", *pictures, "--tokenizer", work / "tokenizer", "--out", out) == str(out)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    latents = load_tensors(out)["latents"]
    assert torch.equal(latents, tokenizer.encode(tokenizer.preprocess(pictures)))
    with safe_open(out, framework="pt") as file:
        said = json.loads(file.metadata()["vtp"])
    names = [path.name for path in pictures]
    assert said == {"format_version": 1, "encoder": tokenizer.encoder_digest(), "size": 16, "pictures": names}
    run("encode", *pictures, "--tokenizer", work / "tokenizer", "--out", tmp_path / "b.safetensors")
    assert digest(out) == digest(tmp_path / "b.safetensors")
    run("encode", pictures[0], "--tokenizer", work / "tokenizer", "--size", "24", "--out", tmp_path / "c.safetensors")
    assert load_tensors(tmp_path / "c.safetensors")["latents"].shape == (1, 8, 3, 3)


def test_latents_become_pictures_again(work, pictures, run, tmp_path):
    tuned = vtp.load_tokenizer(work / "tokenizer", work / "decoder")
    many, one = tmp_path / "many.safetensors", tmp_path / "one.safetensors"
    run("encode", *(pictures * 7), "--tokenizer", work / "tokenizer", "--out", many)  # more than a batch
    run("encode", pictures[1], "--tokenizer", work / "tokenizer", "--out", one)
    decoders = ("--tokenizer", work / "tokenizer", "--decoder", work / "decoder")
    assert run("decode", many, *decoders, "--out", tmp_path / "folder") == str(tmp_path / "folder")
    written = sorted((tmp_path / "folder").iterdir())
    assert [path.name for path in written] == [f"{number:06d}.png" for number in range(21)]
    expected = to_uint8(tuned.decode(load_tensors(many)["latents"])).permute(0, 2, 3, 1).numpy()
    for path, pixels in zip(written, expected, strict=True):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - pixels).max() <= 1  # of another batch size
    run("decode", one, *decoders, "--out", tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size == (16, 16)
    own = tmp_path / "own.png"
    run("decode", one, "--tokenizer", work / "tokenizer", "--out", own)
    assert digest(own) != digest(tmp_path / "one.png")
    for folder in ("latents/train-00000.safetensors", "samples/noise-00000.safetensors"):  # what the stages write
        run("decode", work / folder, *decoders, "--out", tmp_path / folder.split("/")[0])
        assert len(list((tmp_path / folder.split("/")[0]).iterdir())) == len(load_tensors(work / folder)["latents"])


def test_pictures_beside_their_reconstructions(work, pictures, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = vtp.load_tokenizer(work / "tokenizer", work / "decoder")
    *lines, place = run(
        "reconstruct", *pictures, "--tokenizer", work / "tokenizer", "--decoder", work / "decoder"
    ).splitlines()
    assert place == str(tmp_path / "reconstructions.png")
    images = tokenizer.preprocess(pictures)
    originals, written = to_uint8(images), to_uint8(tokenizer.decode(tokenizer.encode(images)))
    pixels = torch.from_numpy(np.array(Image.open(place)))
    assert pixels.shape == (48, 32, 3)
    left, right = (part.unflatten(0, (3, 16)).permute(0, 3, 1, 2) for part in pixels.split(16, 1))
    assert torch.equal(left, originals)
    assert torch.equal(right, written)
    distances = psnr(originals / 255, written / 255)
    said = [f"{path}: PSNR {value:.2f} dB" for path, value in zip(pictures, distances.tolist(), strict=True)]
    assert lines == [*said, f"mean of 3: PSNR {distances.mean():.2f} dB"]
    alone = run("reconstruct", pictures[0], "--tokenizer", work / "tokenizer", "--size", "24", "--out", "one.png")
    assert re.fullmatch(rf"{re.escape(str(pictures[0]))}: PSNR [\d.]+ dB\n{tmp_path}/one.png", alone)
    assert Image.open("one.png").size == (48, 24)


def refusals():
    yield ["encode", "nowhere.png"], "nowhere.png: No such file or directory"
    yield ["encode", "."], ".: Is a directory"
    yield ["encode", "words.png"], "words.png: not an image"
    yield ["encode", "photo.jpg", "cut.png"], "cut.png: not a readable image"
    yield ["encode", "photo.jpg", "--size", "20"], "size is 20; it must be a multiple of 8"
    yield ["encode", "photo.jpg", "--size", "-8"], "size is -8"
    yield ["encode", "photo.jpg", "--size", "x"], "argument --size: invalid int value: 'x'; see python -m vtp encode"
    yield ["encode", "photo.jpg", "--device", "tpu"], "--device tpu: not on this machine"
    yield ["encode", "photo.jpg", "--device", ""], "--device : not on this machine"
    yield ["encode", "photo.jpg", "--out", "a.pt"], "--out a.pt: the name of a safetensors file"
    yield ["encode", "photo.jpg", "--out", "photo.jpg/a.safetensors"], "photo.jpg: Not a directory"
    yield ["encode", "photo.jpg", "--tokenizer", "nowhere"], "nowhere/config.json: no such file"
    yield ["encode", "photo.jpg", "--tokenizer", "WORK/generator"], "describes no tokenizer"
    yield ["decode", "nowhere.safetensors"], "nowhere.safetensors: no such file"
    yield ["decode", "photo.jpg"], "photo.jpg: not a complete safetensors file"
    yield ["decode", "WORK/latents"], "a folder; name one file of latents, such as WORK/latents/train-00000.safetensors"
    yield ["decode", "WORK/tokenizer/model.safetensors"], "expected floating-point `latents` [N, d, h, w]"
    yield ["decode", "bare.safetensors"], "bare.safetensors: does not say whose latents these are"
    yield ["decode", "nan.safetensors"], "1 of 2 latents in nan.safetensors hold NaN or infinity"
    yield ["decode", "other.safetensors"], "latents of another encoder than that of"
    yield ["decode", "WORK/latents/train-00000.safetensors", "--out", "a.png"], "holds 20 latents; name a folder"
    yield ["decode", "WORK/latents/train-00000.safetensors", "--out", "a.jpg"], "--out a.jpg: the name of a PNG file"
    yield ["decode", "WORK/latents/train-00000.safetensors", "--out", "full"], "--out full: this folder holds something"
    yield ["decode", "WORK/latents/train-00000.safetensors", "--out", "words.png/a"], "words.png: Not a directory"
    yield ["decode", "WORK/latents/train-00000.safetensors", "--decoder", "full"], "full/config.json: no such file"
    yield ["reconstruct", "photo.jpg", "words.png"], "words.png: not an image"
    yield ["reconstruct", "picture.png", "--out", "./picture.png"], "this is what is read; name another file"
    yield ["reconstruct", "photo.jpg", "--out", "a.jpg"], "--out a.jpg: the name of a PNG file"
    yield ["reconstruct"], "the following arguments are required: IMAGE"
    yield ["info", "nowhere"], "nowhere: no such folder"
    yield ["info", "full"], "full: no artefact: neither config.json nor manifest.json is there; it holds a"
    yield ["info", "WORK"], "; its folders decoder, generator, latents, reference, samples, ... are; name one"
    yield ["info", "photo.jpg"], "photo.jpg: a file; name the folder of an artefact"
    yield ["nothing"], "invalid choice: 'nothing'"


@pytest.mark.parametrize(("arguments", "message"), [pytest.param(*each, id=" ".join(each[0])) for each in refusals()])
def test_mistakes_are_said_in_a_line_and_leave_nothing(work, pictures, run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures[1], "photo.jpg")
    shutil.copy(pictures[0], "picture.png")
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:-2000])
    (tmp_path / "words.png").write_text("words")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("mine")
    latents = torch.zeros(2, 8, 2, 2)
    save_tensors(tmp_path / "bare.safetensors", {"latents": latents})
    save_tensors(tmp_path / "nan.safetensors", {"latents": latents.index_fill(0, torch.tensor(1), torch.nan)})
    said = {"format_version": 1, "encoder": "another", "size": 16, "pictures": ["a", "b"]}
    save_tensors(tmp_path / "other.safetensors", {"latents": latents}, {"vtp": json.dumps(said)})
    before = {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    command, *rest = [argument.replace("WORK", str(work)) for argument in arguments]
    defaults = {"encode": "out.safetensors", "decode": "out", "reconstruct": "out.png"}
    if command in defaults:
        rest += [] if "--out" in rest else ["--out", defaults[command]]
        rest += [] if "--tokenizer" in rest else ["--tokenizer", str(work / "tokenizer")]
    assert message.replace("WORK", str(work)) in run(command, *rest, refused=True)
    assert {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["full"]


def test_a_full_disk_is_said_in_a_line(work, pictures, run, tmp_path, monkeypatch):
    """No half of an output stays, nor the file that it would replace goes."""
    out = tmp_path / "a.png"
    out.write_text("before")

    def full(self, path, format):
        path.write_text("half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left on device" in run(
        "reconstruct", pictures[0], "--tokenizer", work / "tokenizer", "--out", out, refused=True
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
    save_tensors(tmp_path / "x/b.safetensors", {"latents": torch.zeros(3, 8, 2, 2)})
    latents = work / "latents/train-00000.safetensors"
    run("decode", latents, "--tokenizer", work / "tokenizer", "--out", tmp_path / "folder", refused=True)
    assert not (tmp_path / "folder").exists()
    assert not list(tmp_path.glob(".*"))


def described(text):
    return dict(
        line.split(maxsplit=1) if "  " not in line else re.split(r"  +", line, maxsplit=1) for line in text.splitlines()
    )


def test_what_a_folder_is(work, run):
    encoder = vtp.load_tokenizer(work / "tokenizer").encoder_digest()
    kinds = ("tokenizer", "decoder", "generator", "latents", "samples", "shards", "reference")
    said = {kind: described(run("info", work / kind)) for kind in kinds}
    for kind, lines in said.items():
        assert lines["path"] == str(work / kind)
        assert lines["kind"] == kind
        assert re.fullmatch(r"[\d.,]+ (MB|bytes) in \d+ files?", lines["size"])
        assert "provenance" in lines
        if kind not in ("shards", "reference"):
            assert lines["encoder"] == encoder
    tokenizer = said["tokenizer"]
    assert tokenizer["model"] == "VTP, with a text tower"
    assert tokenizer["format"] == "1, in the official layout"
    assert tokenizer["images"] == "16 x 16 pixels"
    assert tokenizer["latents"] == "8 x 2 x 2, 8 pixels along a side each"
    assert tokenizer["compression"].startswith("24 numbers of an image")
    count = sum(parameter.numel() for parameter in vtp.load_tokenizer(work / "tokenizer").parameters())
    assert tokenizer["parameters"].startswith(f"{count:,} (")
    assert tokenizer["provenance"] == f"{work}/provenance/pretrain.json: stage pretrain, steps 12, samples 96"
    assert said["latents"]["latents"] == "8 x 2 x 2 in float32, with those of flipped images"
    assert said["latents"]["split train"] == "48 in 3 files"
    assert said["latents"]["classes"].startswith("6: ")
    assert said["generator"]["also there"].split(", ") == sorted(
        path.parent.name for path in (work / "generator").glob("*/config.json")
    )
    assert said["generator"]["latents"] == "8 x 2 x 2, tokens of 1 x 1"
    assert said["shards"]["split train"].startswith("64 in 2 shards, ")
    assert said["reference"]["split train"] == "40 labelled images, features of 30 kept"
    assert "noise" in said["samples"]["settings"]
    assert described(run("info", work / "generator/at-0.2"))["kind"] == "generator"


def test_what_others_and_trainings_leave(work, run, pictures, tmp_path):
    official = described(run("info", GOLDEN / "vtp-tiny-ae"))
    assert (official["kind"], official["format"]) == ("tokenizer", "official layout")
    assert official["model"] == "VTP, without a text tower"
    assert described(run("info", GOLDEN / "lightningdit-tiny"))["classes"].endswith("without names")
    autoencoder().save_pretrained(tmp_path / "vae")
    vae = described(run("info", tmp_path / "vae"))
    assert (vae["model"], vae["format"], vae["features"]) == (
        "AutoencoderKL",
        "of diffusers",
        "none beside its latents",
    )
    decoder = DecoderConfig.parse(DECODER, where="test")
    config = BackboneConfig(model=BACKBONE, input_size=32, image_size=16, decoder=decoder)
    FrozenBackbone(config).save_pretrained(tmp_path / "backbone")
    assert described(run("info", tmp_path / "backbone"))["model"] == f"frozen backbone {BACKBONE}"
    checkpoints = Checkpoints(tmp_path / "checkpoints", kept=2)
    checkpoints.save(120, {"weight": torch.ones(3)}, {"samples": 7})
    checkpoints.wait()
    assert "step-000000120" in described(run("info", tmp_path / "checkpoints"))
    one = described(run("info", tmp_path / "checkpoints/step-000000120"))
    assert (one["kind"], one["step"], one["counters"]) == ("checkpoint", "120", "samples 7")
    shutil.copytree(work / "tokenizer", tmp_path / "milestones/at-1")
    write_json(tmp_path / "milestones/index.json", {"milestones": ["at-1"]})
    assert described(run("info", tmp_path / "milestones"))["tokenizers"] == "at-1"
    write_json(tmp_path / "state/config.json", {"kind": "pretrain_state", "state_format_version": 1, "tokenizer": {}})
    for name in ("model", "optimizer"):
        save_tensors(tmp_path / f"state/{name}.safetensors", {"a": torch.zeros(2, 3)})
    assert described(run("info", tmp_path / "state"))["kind"] == "training state"
    run("encode", *pictures, "--tokenizer", work / "tokenizer", "--out", tmp_path / "a.safetensors")
    lines = described(run("info", tmp_path / "a.safetensors"))
    assert (lines["kind"], lines["latents"]) == ("file of latents", "3 x 8 x 2 x 2")
    assert lines["pictures"] == "clear.png, photo.jpg, wide.png"


def damaged():
    def drop(name):
        return lambda folder: (folder / name).unlink()

    def cut(name):
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])

    def change(**values):
        return lambda folder: write_json(folder / "config.json", read_json(folder / "config.json") | values)

    yield "tokenizer", cut("model.safetensors"), "model.safetensors: not a complete safetensors file"
    yield "tokenizer", drop("model.safetensors"), "model.safetensors: no such file"
    yield "tokenizer", change(model_type="bert"), "describes no tokenizer (model_type 'bert')"
    yield "tokenizer", change(vision_depth=3), "does not fit its config.json: missing"
    yield "tokenizer", lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"
    yield "tokenizer", drop("config.json"), "neither config.json nor manifest.json is there; it holds model.safetensors"
    yield "decoder", change(format_version=1), "a decoder of format 1, this code reads 2"
    yield "generator", change(depth=9), "does not fit its config.json: missing"
    yield "generator", drop("statistics.safetensors"), "statistics.safetensors: no such file"
    yield "latents", change(format_version=2), "latents of format 2, this code reads 3"
    yield "latents", change(splits={}), "has no split"
    yield "latents", drop("train-00001.safetensors"), "train-00001.safetensors: no such file"
    yield "latents", cut("train-00000.safetensors"), "train-00000.safetensors: not a complete safetensors file"
    yield "samples", drop("noise-00000.safetensors"), "noise-00000.safetensors: no such file"
    yield "samples", change(samples=0), "samples: Input should be greater than or equal to 1"
    yield "reference", drop("train.safetensors"), "train.safetensors: no such file"
    yield "shards", drop("train-00001.tar"), "train-00001.tar: no such file"
    yield "shards", drop("train-00001.parquet"), "train-00001.parquet: no such file"
    yield "shards", cut("train-00000.tar"), "bytes, manifest.json says"
    yield "shards", lambda folder: (folder / "manifest.json").write_text("[]"), "expected a JSON object, found list"
    yield "samples", lambda folder: (folder / "config.json").write_text('{"a": 1}'), "has a, and is that of no artefact"


@pytest.mark.parametrize(("kind", "damage", "message"), [pytest.param(*each, id=each[2]) for each in damaged()])
def test_what_is_wrong_with_a_folder(work, run, tmp_path, kind, damage, message):
    shutil.copytree(work / kind, tmp_path / kind)
    damage(tmp_path / kind)
    assert message in run("info", tmp_path / kind, refused=True)


def command(*arguments, cwd):
    own = {"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, *map(str, arguments)]
    return subprocess.run(run, cwd=cwd, env=own, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_takes_no_second(tmp_path, name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = command("-m", "vtp", *name, "--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "usage: python -m vtp" in shown.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    code = f"""
import sys
from vtp.__main__ import main
try:
    main([*{name!r}, "--help"])
except SystemExit:
    print(sorted({{"torch", "numpy", "PIL", "pydantic"}} & sys.modules.keys()))
"""
    assert command("-c", code, cwd=tmp_path).stdout.splitlines()[-1] == "[]"


def test_a_real_process_ends_as_it_should(work, pictures, tmp_path):
    done = command("-m", "vtp", "encode", pictures[0], "--tokenizer", work / "tokenizer", "--out", "a.pt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --out a.pt: the name of a safetensors file, ending in .safetensors\n"
    done = command("-m", "vtp", "info", work / "tokenizer", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_that_of_the_package(tmp_path):
    """From the metadata where it is installed, and from a source tree as it lies there."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vtp.version.__version__"}
    from importlib.metadata import version

    assert vtp.__version__ == version("vtp")
    (tmp_path / "vtp").mkdir()
    for name in ("__init__.py", "__main__.py", "texts.py", "version.py"):
        shutil.copy(ROOT / "vtp" / name, tmp_path / "vtp")
    shown = subprocess.run(
        [sys.executable, "-S", "-m", "vtp", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == vtp.__version__


def test_no_stage_depends_on_the_version():
    from stages.runner.fingerprint import closure

    assert "vtp" in closure("stages.pretrain")
    assert "vtp.version" not in closure("stages.pretrain")
