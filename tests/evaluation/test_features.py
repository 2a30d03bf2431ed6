"""Feature extractors."""

import hashlib
import pickle

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from vtp.artefact import ArtefactError
from vtp.evaluation.features import (
    FeaturesConfig,
    InceptionFeaturesConfig,
    RandomVggFeaturesConfig,
    build_features,
    count_name,
)

RANDOM = RandomVggFeaturesConfig(name="random_vgg16", seed=0)


def images(seed, count=4, side=32):
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def inception(path):
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return InceptionFeaturesConfig(name="inception", splits=10, weights=path.name, sha256=sha256)


def test_random_vgg_features(tmp_path):
    extractor = build_features(RANDOM, weights=tmp_path, device="cpu")
    features = extractor(images(0))
    assert (extractor.name, extractor.dim, extractor.has_logits) == ("random-vgg16", 512, False)
    assert features.shape == (4, 512)
    assert features.dtype == torch.float32
    assert torch.equal(features, build_features(RANDOM, weights=tmp_path, device="cpu")(images(0)))
    other = build_features(RANDOM.model_copy(update={"seed": 1}), weights=tmp_path, device="cpu")
    assert not torch.allclose(features, other(images(0)))
    with pytest.raises(TypeError, match="no classes"):
        extractor.logits(features)


def test_batching_does_not_matter(tmp_path):
    extractor = build_features(RANDOM, weights=tmp_path, device="cpu")
    seen = []
    parts = extractor.all(images(0, 5).split(2), seen.append)
    torch.testing.assert_close(parts, extractor(images(0, 5)), rtol=1e-4, atol=1e-5)
    assert seen == [2, 2, 1]


def test_autocast_does_not_matter(tmp_path):
    extractor = build_features(RANDOM, weights=tmp_path, device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extractor(images(0))
    assert torch.equal(inside, extractor(images(0)))


def test_only_uint8(tmp_path):
    with pytest.raises(TypeError, match=r"uint8 images, given torch\.float32"):
        build_features(RANDOM, weights=tmp_path, device="cpu")(images(0).float())


def test_inception_equals_torch_fidelity(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as reference

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(reference.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = reference.FeatureExtractorInceptionV3("any", ["2048", "logits_unbiased"])
    for parameter in network.parameters():
        if parameter.dim() == 4:  # the default initialisation lets the signal vanish
            parameter.data.mul_(6**0.5)
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    extractor = build_features(inception(path), weights=tmp_path, device="cpu")
    expected, logits = network(images(0, 2))
    features = extractor(images(0, 2))
    assert (extractor.name, extractor.dim, extractor.has_logits) == ("inception", 2048, True)
    assert expected.std() > 1e-3
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(extractor.logits(features), logits)


def test_inception_file_is_checked(tmp_path):
    config = InceptionFeaturesConfig(name="inception", splits=10, weights="inception.pth", sha256="00")
    with pytest.raises(ArtefactError, match=r"inception\.pth: no such weights; put .* there"):
        build_features(config, weights=tmp_path, device="cpu")
    (tmp_path / "inception.pth").write_bytes(b"something else")
    with pytest.raises(ArtefactError, match=r"params\.yaml expects 00"):
        build_features(config, weights=tmp_path, device="cpu")


class Intruder:
    def __reduce__(self):
        return pytest.fail, ("code in the weights file was run",)


def test_inception_file_cannot_run_code(tmp_path):
    path = tmp_path / "inception.pth"
    torch.save({"Conv2d_1a_3x3.conv.weight": Intruder()}, path)
    with pytest.raises(pickle.UnpicklingError):
        build_features(inception(path), weights=tmp_path, device="cpu")


def test_config_names_the_choice():
    parse = TypeAdapter(FeaturesConfig).validate_python
    assert parse({"name": "random_vgg16", "seed": 0}) == RANDOM
    with pytest.raises(ValidationError):
        parse({"name": "clip"})


def test_count_name():
    assert [count_name(count) for count in (0, 999, 1000, 1234, 50_000)] == ["0", "999", "1k", "1234", "50k"]
