"""Zero-shot classification."""

import pytest
import torch

from vtp.evaluation import zero_shot
from vtp.evaluation.zero_shot import build_classifier, top_k_accuracy

FEATURES = {
    "a cat": [3.0, 0.0, 0.0],
    "cat!": [0.0, 5.0, 0.0],
    "a dog": [0.0, 0.0, 2.0],
    "dog!": [0.0, 0.0, 7.0],
    "a {x}": [1.0, 1.0, 0.0],
    "{x}!": [1.0, 1.0, 0.0],
}


def encode(prompts):
    return torch.tensor([FEATURES[prompt] for prompt in prompts])


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_classifier_closed_form(batch, monkeypatch):
    """Lengths of text features do not weigh; class vectors are means of directions, in the order of the names."""
    monkeypatch.setattr(zero_shot, "BATCH", batch)
    classifier = build_classifier(encode, ["dog", "cat", "{x}"], ["a {}", "{}!"])
    half = 0.5**0.5
    torch.testing.assert_close(classifier, torch.tensor([[0, 0, 1], [half, half, 0], [half, half, 0]]))


def test_template_without_a_place_for_the_name():
    with pytest.raises(ValueError, match=r"template 'a photo': has no \{\}"):
        build_classifier(encode, ["cat"], ["a {}", "a photo"])


def test_top_k_accuracy():
    """Image i ranks the classes 0, 1, 2, 3 and belongs to the class i."""
    features = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(4, 4) * torch.tensor([1.0, 2.0, 10.0, 0.1])[:, None]
    accuracy = top_k_accuracy(features, torch.eye(4), torch.arange(4), ks=(1, 2, 3))
    assert accuracy == {1: 0.25, 2: 0.5, 3: 0.75}


def test_more_than_all_classes_are_all():
    accuracy = top_k_accuracy(torch.randn(6, 3), torch.eye(3), torch.arange(6) % 3)
    assert accuracy[5] == 1
    assert accuracy.keys() == {1, 5}
