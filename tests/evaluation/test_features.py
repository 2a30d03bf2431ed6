"""Feature extractors: the networks of torch-fidelity, from files that give tensors and nothing else."""

import hashlib
import math
import pickle
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from tiny import ROOT
from torch import nn

from vtp.artefact import ArtefactError, save_tensors
from vtp.evaluation.features import (
    ClipFeaturesConfig,
    DinoV2FeaturesConfig,
    EfficientNetFeaturesConfig,
    FeatureExtractor,
    FeaturesConfig,
    InceptionFeaturesConfig,
    RandomVggFeaturesConfig,
    TimmNetworkConfig,
    build_features,
    count_name,
    distinct_networks,
)
from vtp.evaluation.networks import Extracted, TimmNetwork
from vtp.layers.efficientnet_lite import EfficientNetLite0

RANDOM = RandomVggFeaturesConfig(name="random_vgg16", seed=0)


def images(seed, count=4, side=32):
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def of_file(config, path, **more):
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return config(name=config.model_fields["name"].annotation.__args__[0], weights=path.name, sha256=sha256, **more)


def random_vgg(tmp_path, seed=0):
    return build_features(RANDOM.model_copy(update={"seed": seed}), weights=tmp_path, device="cpu")


def test_random_vgg_features(tmp_path):
    extractor = random_vgg(tmp_path)
    features = extractor(images(0))
    assert (extractor.name, extractor.dim, extractor.spatial_dim) == ("random-vgg16", 512, 448)
    assert not extractor.has_logits
    assert (features.pooled.shape, features.spatial.shape) == ((4, 512), (4, 448))
    assert features.pooled.dtype == features.spatial.dtype == torch.float32
    assert torch.equal(features.pooled, random_vgg(tmp_path)(images(0)).pooled)
    assert not torch.allclose(features.pooled, random_vgg(tmp_path, seed=1)(images(0)).pooled)
    with pytest.raises(TypeError, match="no classes"):
        extractor.logits(features.pooled)


def lite(side):
    config = EfficientNetFeaturesConfig(name="efficientnet_lite0", side=side)
    return build_features(config, weights=ROOT / "none", device="cpu")


@torch.no_grad()
def test_efficientnet_features():
    """Those that its classes are told by; classes from 128 pixels on, when they mean something."""
    small, large = lite(64), lite(128)
    features = small(images(0))
    assert (small.name, small.dim, small.spatial_dim) == ("efficientnet-lite0-64", 1280, 448)
    assert (features.pooled.shape, features.spatial.shape) == ((4, 1280), (4, 448))
    assert features.pooled.dtype == features.spatial.dtype == torch.float32
    assert (small.has_logits, large.has_logits) == (False, True)
    with pytest.raises(TypeError, match="efficientnet-lite0-64 features have no classes"):
        small.logits(features.pooled)
    network = EfficientNetLite0(128)
    pictures = images(0, side=128)
    pooled = large(pictures).pooled
    expected = network.classifier(network.last(network(pictures / 255)[-1])) - network.classifier.bias
    torch.testing.assert_close(large.logits(pooled), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(lite(64)(images(0)).pooled, features.pooled)
    with pytest.raises(ValidationError, match="greater than or equal to 64"):
        EfficientNetFeaturesConfig(name="efficientnet_lite0", side=32)
    with pytest.raises(ValidationError, match="multiple of 32"):
        EfficientNetFeaturesConfig(name="efficientnet_lite0", side=100)


@pytest.mark.parametrize("extractor_of", [random_vgg, lambda folder: lite(64)])
def test_spatial_features_know_places(tmp_path, extractor_of):
    """Pictures whose halves are exchanged: pooled features hardly move, spatial ones do."""
    extractor = extractor_of(tmp_path)
    picture = F.interpolate(images(0, 8, 4).float(), size=32, mode="bilinear").to(torch.uint8)
    before, after, other = extractor(picture), extractor(picture.roll(16, 3)), extractor(picture.flip(0))
    moved = [(a - b).norm() / (a - c).norm() for a, b, c in zip(before, after, other, strict=True)]
    assert moved[0] < 0.85 * moved[1]


def test_autocast_does_not_matter(tmp_path):
    extractor = random_vgg(tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extractor(images(0))
    assert torch.equal(inside.pooled, extractor(images(0)).pooled)


def test_bad_images(tmp_path):
    extractor = random_vgg(tmp_path)
    with pytest.raises(TypeError, match=r"uint8 images, given torch\.float32"):
        extractor(images(0).float())
    for wrong in (images(0)[:, :1], images(0)[0], images(0).permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"RGB images \[B, 3, H, W\], given"):
            extractor(wrong)
    with pytest.raises(ValueError, match="no images to take features of"):
        extractor(images(0)[:0])
    with pytest.raises(ValueError, match="random_vgg16 needs images of 16 x 16 pixels or more, given 15 x 15"):
        random_vgg(tmp_path)(images(0, side=15))
    extractor(images(0))
    with pytest.raises(ValueError, match="images of 16 x 16 pixels after some of 32 x 32: .* crop all to one size"):
        extractor(images(0, side=16))


def test_features_that_are_not_finite():
    class Broken(nn.Module):
        def forward(self, x):
            return Extracted(torch.full((len(x), 2), torch.nan), None)

    with pytest.raises(ValueError, match="broken features hold NaN or infinity"):
        FeatureExtractor("broken", Broken(), dim=2, device="cpu")(images(0))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's network with random weights, and its file."""
    from torch_fidelity import feature_extractor_inceptionv3 as reference

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(reference.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = reference.FeatureExtractorInceptionV3("any", ["2048", "logits_unbiased"])
    for parameter in network.parameters():
        if parameter.dim() == 4:  # the default initialisation lets the signal vanish
            parameter.data.mul_(6**0.5)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_inception_equals_torch_fidelity(inception):
    network, path = inception
    extractor = build_features(of_file(InceptionFeaturesConfig, path), weights=path.parent, device="cpu")
    expected, logits = network(images(0, 2))
    features = extractor(images(0, 2))
    assert (extractor.name, extractor.dim, extractor.spatial_dim) == ("inception", 2048, 2023)
    assert extractor.has_logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(features.pooled, expected)
    torch.testing.assert_close(extractor.logits(features.pooled), logits)


def test_inception_equals_the_port_of_openai(tmp_path):
    """`golden/inception-spatial`: weights by a rule of names; the spatial tensor behind batch norm and ReLU."""
    from torch_fidelity import feature_extractor_inceptionv3 as reference

    golden = load_file(ROOT / "tests/golden/inception-spatial/io.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(reference.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        shapes = reference.FeatureExtractorInceptionV3("any", ["2048"]).state_dict()
    weights = {name: _by_rule(name, value) for name, value in shapes.items()}
    for name, first in golden.items():
        if name.startswith("check."):
            torch.testing.assert_close(weights[name.removeprefix("check.")].flatten()[:8], first)
    torch.save(weights, tmp_path / "inception.pth")
    path = tmp_path / "inception.pth"
    extractor = build_features(of_file(InceptionFeaturesConfig, path), weights=tmp_path, device="cpu")
    features = extractor(golden["images"])
    torch.testing.assert_close(features.spatial, golden["spatial"], rtol=0, atol=1e-4)
    torch.testing.assert_close(features.pooled, golden["pooled"], rtol=0, atol=1e-4)
    probabilities = extractor.logits(features.pooled).softmax(1)
    torch.testing.assert_close(probabilities, golden["probabilities"], rtol=0, atol=1e-5)


def _by_rule(name, value):
    if value.dim() == 0:
        return value
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(value.shape))
    if name.endswith("conv.weight"):
        drawn *= math.sqrt(2 / math.prod(value.shape[1:]))
    elif name.endswith("bn.weight"):
        drawn = np.ones(value.shape)
    elif name.endswith("running_var"):
        drawn = np.exp(0.3 * drawn)
    else:
        drawn *= {"bn.bias": 0.2, "running_mean": 0.3, "fc.weight": 0.05, "fc.bias": 0.1}[
            next(end for end in ("bn.bias", "running_mean", "fc.weight", "fc.bias") if name.endswith(end))
        ]
    return torch.from_numpy(drawn).float()


def test_weights_are_checked(tmp_path):
    config = InceptionFeaturesConfig(name="inception", weights="inception.pth", sha256="00")
    with pytest.raises(ArtefactError, match=r"inception\.pth: no such weights; put .* there"):
        build_features(config, weights=tmp_path, device="cpu")
    (tmp_path / "inception.pth").write_bytes(b"something else")
    with pytest.raises(ArtefactError, match=r"params\.yaml expects 00"):
        build_features(config, weights=tmp_path, device="cpu")


class Intruder:
    def __reduce__(self):
        return pytest.fail, ("code in the weights file was run",)


@pytest.mark.filterwarnings("ignore:.*torch.(jit|load)")
@pytest.mark.parametrize("content", ["pickle", "state dict", "TorchScript", "number", "truncated", "other network"])
@pytest.mark.parametrize(
    ("config", "more"),
    [
        (InceptionFeaturesConfig, {}),
        (DinoV2FeaturesConfig, {"architecture": "vit-s-14"}),
        (ClipFeaturesConfig, {"architecture": "vit-b-32"}),
    ],
)
def test_a_weights_file_gives_tensors_and_nothing_else(tmp_path, content, config, more):
    path = tmp_path / "weights.pth"
    if content == "pickle":
        path.write_bytes(pickle.dumps(Intruder(), protocol=2))
    elif content == "TorchScript":
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
    else:
        values = {"state dict": {"a": Intruder()}, "number": {"a": 1}}.get(content, {"a": torch.zeros(3)})
        torch.save(values, path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ArtefactError, match=r"weights\.pth"):
        build_features(of_file(config, path, **more), weights=tmp_path, device="cpu")


def dino(tmp_path):
    """A DINOv2 of random weights as its authors publish one: positions of 37 x 37 patches, a mask token."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    tensors = {name: torch.randn_like(value) * 0.05 for name, value in network.state_dict().items()}
    tensors |= {name: 1 + value for name, value in tensors.items() if "norm" in name and "weight" in name}
    tensors |= {name: torch.rand_like(value) for name, value in tensors.items() if "ls" in name}
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(tensors | {"mask_token": torch.zeros(1, 384)}, path)
    save_tensors(tmp_path / "timm.safetensors", tensors)
    return path, tensors


def plain_dino(tensors, x):
    """The published network in plain operations, as its code computes it at 224 pixels; class token [B, 384]."""
    patches = F.conv2d(x, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=14)
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), patches.flatten(2).mT], dim=1)
    table = tensors["pos_embed"]
    grid = table[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    scale = 16.1 / 37
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    x = x + torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, -1)], dim=1)

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-6)

    for number in range(12):
        block = f"blocks.{number}"
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(2, (3, 6, 64)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT) / 8).softmax(-1) @ v
        x = x + tensors[f"{block}.ls1.gamma"] * linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + tensors[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_dinov2_is_the_published_network(tmp_path):
    path, tensors = dino(tmp_path)
    more = {"architecture": "vit-s-14"}
    extractor = build_features(of_file(DinoV2FeaturesConfig, path, **more), weights=tmp_path, device="cpu")
    features = extractor(images(0, 2, 224))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = plain_dino(tensors, (images(0, 2, 224) / 255 - mean) / std)
    assert (extractor.name, extractor.dim, extractor.spatial_dim) == ("dinov2-vit-s-14", 384, None)
    assert features.spatial is None
    torch.testing.assert_close(features.pooled, expected, rtol=1e-3, atol=1e-4)
    other = of_file(DinoV2FeaturesConfig, tmp_path / "timm.safetensors", **more)
    same = build_features(other, weights=tmp_path, device="cpu")
    assert torch.equal(same(images(0, 2, 224)).pooled, features.pooled)


def test_clip_equals_torch_fidelity(tmp_path, monkeypatch):
    """The whole extractor of torch-fidelity, that would read a TorchScript archive."""
    from torch_fidelity import feature_extractor_clip as reference

    torch.manual_seed(0)
    tower = reference.VisionTransformer(224, 32, 768, 12, 12, 512)
    tensors = {f"visual.{name}": value.half().float() for name, value in tower.state_dict().items()}
    tensors |= {"text_projection": torch.zeros(512, 512), "logit_scale": torch.ones(())}
    path = tmp_path / "open_clip_model.safetensors"
    save_tensors(path, tensors | {"transformer.resblocks.0.ln_1.weight": torch.ones(512)})

    class Archive:
        def state_dict(self):
            return dict(tensors)

    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: Archive())
    expected = reference.FeatureExtractorCLIP("clip-vit-b-32", ["clip"], "archive.pt")(images(0, 2, 40))[0]
    monkeypatch.undo()
    config = of_file(ClipFeaturesConfig, path, architecture="vit-b-32")
    extractor = build_features(config, weights=tmp_path, device="cpu")
    assert (extractor.name, extractor.dim, extractor.spatial_dim) == ("clip-vit-b-32", 512, None)
    assert expected.std() > 1e-3
    torch.testing.assert_close(extractor(images(0, 2, 40)).pooled, expected)
    with pytest.raises(ArtefactError, match=r"patch, width and resolution are \(32, 768, 224\), not \(16, 768, 224\)"):
        build_features(config.model_copy(update={"architecture": "vit-b-16"}), weights=tmp_path, device="cpu")


def of_timm(model, path, side, reading):
    return of_file(TimmNetworkConfig, path, model=model, side=side, reading=reading)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "reading", "dim"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "class_token", 192),
        ("vit_tiny_patch16_224.augreg_in21k", "spatial_mean", 192),
        ("convnextv2_atto.fcmae_ft_in1k", "spatial_mean", 320),
        ("convnextv2_atto.fcmae_ft_in1k", "pooled", 320),
    ],
)
def test_a_network_of_timm(tmp_path, model, reading, dim):
    """From a file with classes, which are left out; in the network's own normalisation."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(model).eval()
    save_tensors(tmp_path / "weights.safetensors", network.state_dict())
    config = of_timm(model, tmp_path / "weights.safetensors", 224, reading)
    extractor = build_features(config, weights=tmp_path, device="cpu")
    assert (extractor.name, extractor.dim) == (f"{model.replace('_', '-').replace('.', '-')}-224", dim)
    assert (extractor.spatial_dim, extractor.has_logits) == (None, False)
    pictures = images(0, 2, 224)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    seen = network.forward_features((pictures / 255 - mean) / std)
    expected = {
        "class_token": lambda: seen[:, 0],
        "spatial_mean": lambda: seen.mean((2, 3)) if seen.ndim == 4 else seen[:, 1:].mean(1),
        "pooled": lambda: network.head.norm(seen.mean((2, 3), keepdim=True)).flatten(1),
    }[reading]()
    torch.testing.assert_close(extractor(pictures).pooled, expected, rtol=1e-4, atol=1e-5)


def test_sides_and_files_of_timms_networks(tmp_path):
    """A vision transformer takes any side, padded to whole patches; what cannot be is said before anything is read."""
    import timm

    path = tmp_path / "weights.safetensors"
    save_tensors(path, timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict())
    any_side = build_features(of_timm("vit_tiny_patch16_224", path, 70, "class_token"), weights=tmp_path, device="cpu")
    assert any_side(images(0, 2)).pooled.shape == (2, 192)
    for model, side, reading, message in (
        (
            "vit_tiny_patch16_225",
            224,
            "class_token",
            "timm has no model 'vit_tiny_patch16_225'; did you mean 'vit_tiny_",
        ),
        ("convnextv2_atto", 224, "class_token", "convnextv2_atto has no class token; read spatial_mean or pooled"),
        ("deit_tiny_patch16_224", 128, "class_token", "deit_tiny_patch16_224 takes no pictures of 128 pixels"),
        ("vit_small_patch16_224", 224, "class_token", r"weights\.safetensors"),
        ("convnextv2_atto", 224, "pooled", r"weights\.safetensors"),
    ):
        with pytest.raises(ArtefactError, match=message):
            build_features(of_timm(model, path, side, reading), weights=tmp_path, device="cpu")


def test_the_six_networks_of_fdr6_can_be_named():
    """As RAEv2's evaluation has them; each with a name of its own."""
    file = {"weights": "a.safetensors", "sha256": "ab"}
    six = [
        {"name": "inception", "weights": "a.pth", "sha256": "ab"},
        *(
            {"name": "timm", "model": model, "side": side, "reading": reading} | file
            for model, side, reading in (
                ("convnextv2_base.fcmae_ft_in22k_in1k", 224, "spatial_mean"),
                ("vit_large_patch14_dinov2.lvd142m", 256, "class_token"),
                ("vit_large_patch16_224.mae", 224, "class_token"),
                ("vit_so400m_patch16_siglip_256.v2_webli", 256, "pooled"),
                ("vit_large_patch14_clip_224.openai", 256, "class_token"),
            )
        ),
    ]
    networks = distinct_networks([TypeAdapter(FeaturesConfig).validate_python(each) for each in six])
    dims = [TimmNetwork(each.model, each.side, each.reading, None).dim for each in networks[1:]]
    assert dims == [1024, 1024, 1024, 1152, 1024]


def test_networks_are_imported_when_they_are_built():
    """This test's file may import what it likes; a fresh Python may not."""
    import subprocess

    heavy = ("timm", "torch_fidelity", "torchvision")
    code = f"import sys, vtp.evaluation.reference; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_names_the_choice():
    parse = TypeAdapter(FeaturesConfig).validate_python
    assert parse({"name": "random_vgg16", "seed": 0}) == RANDOM
    with pytest.raises(ValidationError):
        parse({"name": "clip"})


def test_count_name():
    assert [count_name(count) for count in (0, 999, 1000, 1234, 50_000)] == ["0", "999", "1k", "1234", "50k"]
