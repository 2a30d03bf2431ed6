"""Zero-shot classification."""

import pytest
import torch
from foreign import GOLDEN
from safetensors.torch import load_file

from vtp.artefact import ArtefactError
from vtp.config import ConfigError
from vtp.data.imagenet import imagenet_classes
from vtp.data.shards import Manifest
from vtp.evaluation import zero_shot
from vtp.evaluation.zero_shot import (
    DataSetPrompts,
    GivenPrompts,
    OpenaiPrompts,
    build_classifier,
    prompts_of,
    top_k_accuracy,
)

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


@pytest.mark.parametrize(("query", "class_"), [("image", "text"), ("text", "image")])
def test_top_k_of_pairs_is_open_clip_s_recall(query, class_):
    """`golden/probe-and-clipscore`: where every image is a class of its own, top-k accuracy is retrieval's R@k."""
    official = load_file(GOLDEN / "probe-and-clipscore" / "io.safetensors")
    pairs = [official[f"retrieval.{name}"] for name in (query, class_)]
    accuracy = top_k_accuracy(*pairs, torch.arange(60), ks=(1, 5, 10))
    expected = {k: float(official[f"retrieval.{query}_to_{class_}_R@{k}"]) for k in (1, 5, 10)}
    assert accuracy == pytest.approx(expected, abs=1e-6)


def test_more_than_all_classes_are_all():
    accuracy = top_k_accuracy(torch.randn(6, 3), torch.eye(3), torch.arange(6) % 3)
    assert accuracy[5] == 1
    assert accuracy.keys() == {1, 5}


def test_a_constructed_case(monkeypatch):
    """Classes lie on the axes, prompts beside them in ways that cancel; images are counted by hand."""
    monkeypatch.setattr(zero_shot, "BATCH", 2)
    axes = {"cat": 0, "dog": 1, "owl": 2}

    def beside(prompts):
        rows = []
        for prompt in prompts:
            row = 5 * torch.eye(4)[axes[prompt[-3:]]]
            row[3] = 4.0 if prompt.startswith("a ") else -4.0
            rows.append(row)
        return torch.stack(rows)

    classifier = build_classifier(beside, ["cat", "dog", "owl"], ["a {}", "no {}"])
    torch.testing.assert_close(classifier, torch.eye(4)[:3])
    images = torch.tensor([[1.0, 0.5, 0.0, 9.0], [0.9, 1.0, 0.0, 9.0], [0.5, 0.4, 0.1, 9.0], [0.0, 0.0, 1.0, 9.0]])
    assert top_k_accuracy(images, classifier, torch.tensor([0, 0, 2, 2]), ks=(1, 2)) == {1: 0.5, 2: 0.75}


def manifest_of(ids, templates=(), source="folder"):
    names = [f"name of {one}" for one in ids]
    values = {"format_version": 3, "source": source, "image_size": None, "classes": names, "class_ids": list(ids)}
    values |= {"templates": list(templates), "categories": [], "category_of_class": [], "location": None}
    return Manifest.parse(values | {"attribution": "", "splits": {}}, where="test")


def test_prompts_of_the_data_set_and_given_ones():
    manifest = manifest_of(["a", "b"], ["an emoji of a {}"])
    assert prompts_of(DataSetPrompts(name="data_set"), manifest) == (manifest.classes, ["an emoji of a {}"])
    assert prompts_of(DataSetPrompts(name="data_set"), manifest_of(["a"])).templates == ["{}"]  # the bare name
    given = GivenPrompts(name="given", templates=["{}!"])
    assert prompts_of(given, manifest) == (manifest.classes, ["{}!"])
    with pytest.raises(ConfigError, match=r"every template must hold \{\} for the class"):
        GivenPrompts.parse({"name": "given", "templates": ["{}", "a photo"]}, where="test")


def test_openai_prompts_are_those_of_open_clip():
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    classes, templates = prompts_of(OpenaiPrompts(name="openai"), manifest_of(imagenet_classes().synsets))
    assert classes == list(IMAGENET_CLASSNAMES)
    assert len(templates) == 80
    assert [t.replace("{}", "tench") for t in templates] == [f("tench") for f in OPENAI_IMAGENET_TEMPLATES]


def test_openai_prompts_are_refused_for_other_classes():
    """A part of ImageNet, another order, other names: a label would stand for another class than its name."""
    synsets = imagenet_classes().synsets
    swapped = [synsets[1], synsets[0], *synsets[2:]]
    cases = [
        (synsets[:100], r"these shards \(source folder\) have 100"),
        ([], "have 0"),
        (swapped, "class 0 of these shards .* is 'n01443537', not 'n01440764'"),
        ([str(number) for number in range(1000)], "class 0 .* is '0', not 'n01440764'"),
    ]
    for ids, problem in cases:
        with pytest.raises(ArtefactError, match=f"1,000 classes in its order, and .*{problem}.*data_set"):
            prompts_of(OpenaiPrompts(name="openai"), manifest_of(ids))
