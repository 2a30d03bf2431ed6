"""NaN and infinity are refused by whose they are and how many."""

import math

import pytest
import torch
from torch import nn

from vtp.artefact import ArtefactError, assign_weights
from vtp.finite import NotFiniteError, require_finite
from vtp.layers.images import to_uint8
from vtp.layers.latent_space import LatentStatistics


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_message_counts(value, dtype):
    values = torch.zeros(5, 2, 3, dtype=dtype)
    require_finite(values, "samples", "look")
    values[3, 1, 1] = values[4, 0, 0] = value
    with pytest.raises(NotFiniteError, match=r"^2 of 5 samples hold NaN or infinity, the first is number 3; look$"):
        require_finite(values, "samples", "look")


def test_no_pixel_is_made_of_nan():
    images = torch.zeros(3, 3, 2, 2)
    images[1, 0, 0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="1 of 3 images of the tuned decoder hold NaN or infinity"):
        to_uint8(images, "images of the tuned decoder")


def test_weights_are_numbers(tmp_path):
    module = nn.Linear(2, 2)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    weights["bias"][1] = math.inf
    with pytest.raises(ArtefactError, match=r"w: tensors hold NaN or infinity: bias; fetch it again"):
        assign_weights(module, weights, where=tmp_path / "w")


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.full((1, 2, 1, 1), math.nan), torch.ones(1, 2, 1, 1), "is no number"),
        (torch.zeros(1, 2, 1, 1), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), "not above 0"),
        (torch.zeros(1, 2, 1, 1), -torch.ones(1, 2, 1, 1), "not above 0"),
        (torch.zeros(3), torch.ones(3), r"expected \[1, channels, 1, 1\]"),
        (torch.zeros(1, 2, 1, 1), torch.ones(1, 3, 1, 1), r"expected \[1, channels, 1, 1\]"),
        (torch.zeros(()), torch.ones(()), r"expected \[1, channels, 1, 1\]"),
    ],
)
def test_statistics_are_numbers(tmp_path, mean, std, message):
    LatentStatistics(mean, std).save(tmp_path / "s.safetensors")
    with pytest.raises(ArtefactError, match=message):
        LatentStatistics.load(tmp_path / "s.safetensors")
