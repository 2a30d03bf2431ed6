"""Tokenizers from elsewhere become artefacts: whole, equal, and refused for a reason."""

import subprocess
import sys

import pytest
import torch
from foreign import DECODER, GOLDEN, autoencoder, backbone_source, backbone_weights
from tiny import ROOT, write_params

from stages.import_tokenizer import ImportTokenizer, run
from stages.runner.environment import LocalHost, Runtime
from vtp import load_tokenizer
from vtp.artefact import ArtefactError, digest
from vtp.config import ConfigError

VAE = {"name": "autoencoder_kl", "image_size": 32}


@pytest.fixture
def root(tmp_path):
    """A project with an AutoencoderKL and a backbone's weights."""
    autoencoder().save_pretrained(tmp_path / "vae")
    (tmp_path / "weights").mkdir()
    return tmp_path


def imported(root, source, folder=None, name="tokenizer"):
    host = LocalHost(root / "scratch" / name / "folder", root, Runtime())
    host.folder.mkdir(parents=True, exist_ok=True)
    config = ImportTokenizer.parse({"source": source}, where="test")
    run(config, source=folder, tokenizer=root / name, host=host)
    assert host.recorded() == {"encoder": load_tokenizer(root / name).encoder_digest()}
    return load_tokenizer(root / name)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vtp", "autoencoder_kl", "backbone"])
def test_every_kind_is_an_artefact(kind, root):
    """Self-describing, equal for equal parameters, and what it was."""
    if kind == "backbone":
        source, folder = backbone_source(backbone_weights(root / "weights")), None
    else:
        source, folder = ({"name": "vtp"}, GOLDEN / "vtp-tiny") if kind == "vtp" else (VAE, root / "vae")
    tokenizer = imported(root, source, folder)
    again = imported(root, source, folder, name="again")
    assert sorted(path.name for path in (root / "tokenizer").iterdir()) == ["config.json", "model.safetensors"]
    assert digest(root / "tokenizer") == digest(root / "again")
    images = torch.randn(2, 3, tokenizer.image_size, tokenizer.image_size)
    latents = tokenizer.encode(images)
    assert latents.shape[1:] == tokenizer.latent_shape
    assert tokenizer.decode(latents).shape == images.shape
    assert torch.equal(again.decode(latents), tokenizer.decode(latents))
    if folder is not None:
        assert torch.equal(load_tokenizer(folder).encode(images), latents)


def test_the_seed_is_that_of_a_backbones_decoder(root):
    weights = backbone_weights(root / "weights")
    one = imported(root, backbone_source(weights))
    other = imported(root, backbone_source(weights, seed=1), name="other")
    assert one.encoder_digest() == other.encoder_digest()
    assert not torch.equal(one.pixel_decoder.proj_in.weight, other.pixel_decoder.proj_in.weight)


def test_says_what_does_not_fit(root):
    weights = backbone_weights(root / "weights")
    with pytest.raises(ArtefactError, match="import_tokenizer.source is vtp: give its folder with --source"):
        imported(root, {"name": "vtp"})
    with pytest.raises(ArtefactError, match="expected 'vtp'; is this the right folder"):
        imported(root, {"name": "vtp"}, root / "vae")
    with pytest.raises(ArtefactError, match="expected 'AutoencoderKL'; is this the right folder"):
        imported(root, VAE, GOLDEN / "vtp-tiny")
    with pytest.raises(ArtefactError, match="not a multiple of 4"):
        imported(root, VAE | {"image_size": 30}, root / "vae")
    with pytest.raises(ArtefactError, match="take --source"):
        imported(root, backbone_source(weights), root / "vae")
    with pytest.raises(ArtefactError, match="no such weights; put the weights of timm's test_vit"):
        imported(root, backbone_source(weights | {"weights": "absent.safetensors"}))
    for changes, said in (
        ({"weights": "model.pth"}, "weights: String should match pattern"),
        ({"sha256": "0"}, "sha256: String should match pattern"),
        ({"decoder": DECODER | {"depths": 3}}, "depths: unknown key"),
    ):
        with pytest.raises(ConfigError, match=said):
            imported(root, backbone_source(weights | changes))
    assert not (root / "tokenizer").exists()


def test_sizes_are_checked_before_weights(root):
    """No file of gigabytes is read for a size that cannot be."""
    source = backbone_source({"weights": "absent.safetensors", "sha256": "0" * 64}, input_size=40)
    with pytest.raises(ArtefactError, match="input_size 40 is not a multiple of the patch size 16"):
        imported(root, source)


def test_from_the_command_line(root):
    """Other bytes than expected: one line, no traceback, no folder."""
    weights = backbone_weights(root / "weights") | {"sha256": "0" * 64}
    (root / ".dvc").mkdir()
    write_params({"import_tokenizer": {"source": backbone_source(weights)}}, root / "params.yaml")
    command = [
        "-m",
        "stages.import_tokenizer",
        "params.yaml:import_tokenizer",
        "--tokenizer",
        "t",
        "--provenance",
        "p.json",
    ]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "params.yaml expects 000000" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (root / "t").exists()
