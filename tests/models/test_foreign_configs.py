"""What a config.json says is held against the weights beside it before time or memory is spent on it."""

import resource
import shutil
import time
import tracemalloc

import pytest
import torch
from foreign import BACKBONE, DECODER, GOLDEN, autoencoder

from vtp import LightningDiT, VisualTokenizer, load_tokenizer
from vtp.artefact import ArtefactError, load_module, read_json, write_json
from vtp.models.diffusers_vae import DiffusersVae
from vtp.models.frozen_backbone import BackboneConfig, FrozenBackbone
from vtp.models.loading import save_decoder

HUGE = (10**6, 10**9, 2**62, 10**30)
SECONDS, MEGABYTES = 0.9, 100
# Numbers that weights do not tell of: they size nothing that is allocated when a folder is read.
FREE = {"init_logit_scale", "init_logit_bias", "text_pad_id", "scaling_factor", "shift_factor", "mean", "std"}
FREE |= {"latents_mean", "latents_std"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of every kind, by name, each with what reads it; each was read once, so that libraries are loaded."""
    root = tmp_path_factory.mktemp("foreign")
    shutil.copytree(GOLDEN / "vtp-tiny", root / "official")
    shutil.copytree(GOLDEN / "lightningdit-tiny", root / "published generator")
    LightningDiT.from_pretrained(root / "published generator").save_pretrained(root / "generator")
    autoencoder().save_pretrained(root / "diffusers")
    backbone = {"model": BACKBONE, "input_size": 32, "image_size": 16, "decoder": DECODER}
    tokenizers = {
        "tokenizer": VisualTokenizer.from_pretrained(root / "official"),
        "autoencoder_kl": DiffusersVae.from_diffusers(root / "diffusers"),
        "backbone": FrozenBackbone(BackboneConfig.parse(backbone, where="test")),
    }
    readers = {"official": load_tokenizer, "diffusers": load_tokenizer}
    readers |= dict.fromkeys(("generator", "published generator"), LightningDiT.from_pretrained)
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(root / name)
        save_decoder(tokenizer, root / f"decoder of {name}")
        readers |= {name: load_tokenizer}
        readers[f"decoder of {name}"] = lambda folder, of=root / name: load_tokenizer(of, folder)
    for name, read in readers.items():
        read(root / name)
    return {name: (root / name, read) for name, read in readers.items()}


def numbers(values, path=()):
    """Paths to all sizes: integers, and places that may hold one."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            yield from numbers(value, (*path, key))
        elif (value is None or isinstance(value, int | float)) and not isinstance(value, bool):
            yield (*path, key)


def with_value(folder, path, value, where):
    """The folder with another number in its config."""
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(folder, where, copy_function=lambda one, other: where.joinpath(other).symlink_to(one))
    values = here = read_json(folder / "config.json")
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    (where / "config.json").unlink()
    write_json(where / "config.json", values)
    return where


KINDS = ["official", "tokenizer", "decoder of tokenizer", "diffusers", "autoencoder_kl", "decoder of autoencoder_kl"]
KINDS += ["backbone", "decoder of backbone", "generator", "published generator"]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_another_order_are_refused_at_once(kind, folders, tmp_path):
    folder, read = folders[kind]
    tried = 0
    for path in numbers(read_json(folder / "config.json")):
        if FREE & {*path}:
            continue
        for value in HUGE:
            changed = with_value(folder, path, value, tmp_path / "changed")
            peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            with pytest.raises(ValueError, match=".") as caught:
                read(changed)
            assert str(tmp_path) in str(caught.value), path
            assert time.process_time() - start < SECONDS, (path, value)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES * 1024, (path, value)
            tried += 1
    assert tried >= 5 * len(HUGE)


@pytest.mark.parametrize(
    ("kind", "path", "value", "said"),
    [
        ("official", ("vision_depth",), 5, r"missing trunk\.blocks\.3"),
        (
            "official",
            ("vision_depth",),
            10**6,
            r"config\.json: asks for more than \d+ tensors, model\.safetensors holds \d+; fetch both",
        ),
        ("official", ("text_depth",), 10**6, r"model\.safetensors holds \d+;"),
        ("decoder of backbone", ("decoder", "blocks", "depth"), 10**6, r"decoder\.safetensors holds \d+;"),
        ("generator", ("num_classes",), 10**9, r"y_embedder.* has shape .*config\.json asks for \[1000000001"),
        ("diffusers", ("layers_per_block",), 10**6, r"diffusion_pytorch_model\.safetensors holds \d+;"),
        ("official", ("vision_embed_dim",), 2**62, r"config\.json: describes no model that can be built \(\w+Error: "),
        (
            "official",
            ("vision_mlp_ratio",),
            1e308,
            "vision_mlp_ratio: Input should be less than or equal to 100",
        ),
        ("diffusers", ("norm_num_groups",), 7, r"config\.json: describes no model that can be built \(\w+Error: "),
        ("diffusers", ("norm_num_groups",), 0, "norm_num_groups: .*greater than or equal to 1"),
        ("diffusers", ("act_fn",), "sin", r"config\.json: describes no model that can be built \(\w+Error: "),
        (
            "decoder of tokenizer",
            ("decoder", "blocks", "num_heads"),
            5,
            r"can be built \(ValueError: .* head dimension divisible by 4",
        ),
        ("backbone", ("backbone", "input_size"), 64, r"backbone\.pos_embed has shape"),
        ("backbone", ("backbone", "input_size"), 16384, r"config\.json: image_size 16 is not a multiple of 1024"),
        ("backbone", ("std", 1), 0, "std.1: .*greater than 0"),
    ],
)
def test_what_is_wrong_is_named(kind, path, value, said, folders, tmp_path):
    folder, read = folders[kind]
    with pytest.raises(ValueError, match=said):
        read(with_value(folder, path, value, tmp_path / "changed"))


def test_the_weights_are_read_again_after_a_refusal(folders, tmp_path):
    """Nothing of the watch over a refused model stays behind."""
    folder, read = folders["official"]
    with pytest.raises(ArtefactError):
        read(with_value(folder, ("vision_depth",), 10**6, tmp_path / "changed"))
    read(folder)
    assert len(torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2000))) == 2000


def test_a_model_that_is_built_with_more_than_it_keeps_is_read(tmp_path):
    """As a decoder comes of a whole autoencoder."""
    given = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}

    def build():
        return torch.nn.ModuleList(torch.nn.Linear(3, 2) for _ in range(150))[7]

    module = load_module(build, given, where=tmp_path / "model.safetensors")
    assert torch.equal(module.weight, given["weight"])
    tracemalloc.start()
    with pytest.raises(ArtefactError, match=r"config\.json: asks for more than 400 tensors, m\.safetensors holds 2;"):
        load_module(lambda: torch.nn.ModuleList(build() for _ in range(10**9)), given, where=tmp_path / "m.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize("text", ['{"depth": ' + "9" * 5000 + "}", "[" * 100_000, '{"depth": \ud800}'])
def test_numbers_and_depths_that_no_json_has(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ArtefactError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path / "config.json")
