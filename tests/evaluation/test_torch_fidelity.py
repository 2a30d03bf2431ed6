"""All metrics against torch-fidelity, from the same images through the same network, as its users call it."""

import pytest
import torch
from torch.utils.data import Dataset

from vtp.evaluation.feature_set import FeatureSet
from vtp.evaluation.features import FeatureExtractor
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.evaluation.inception_score import inception_score
from vtp.evaluation.kernel_distance import kernel_distance
from vtp.evaluation.manifold import precision_recall
from vtp.evaluation.networks import RandomVgg

NETWORK = RandomVgg(0)
HEAD = torch.randn(10, 512, generator=torch.Generator().manual_seed(0))


class Pictures(Dataset):
    """Smooth colours: a different spread for real and generated ones."""

    def __init__(self, seed, count, contrast):
        draws = torch.Generator().manual_seed(seed)
        small = 127 + contrast * torch.randn(count, 3, 4, 4, generator=draws)
        large = torch.nn.functional.interpolate(small, size=32, mode="bicubic")
        self.images = large.clamp(0, 255).to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


GENERATED, REAL = Pictures(0, 90, 40), Pictures(1, 120, 50)


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def reference():
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Custom(FeatureExtractorBase):
        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)
            self.network = NETWORK

        def forward(self, images):
            pooled = self.network(images).pooled
            found = {"pooled": pooled, "logits": pooled @ HEAD.T}
            return tuple(found[name] for name in self.features_list)

        get_provided_features_list = staticmethod(lambda: ("pooled", "logits"))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "logits" if metric == "isc" else "pooled")
        can_be_compiled = staticmethod(lambda: False)
        get_dummy_input_for_compile = staticmethod(lambda: torch.zeros(1, 3, 4, 4, dtype=torch.uint8))

    torch_fidelity.register_feature_extractor("random-vgg16", Custom)
    return torch_fidelity.calculate_metrics(
        input1=GENERATED,
        input2=REAL,
        feature_extractor="random-vgg16",
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        isc_splits=5,
        kid_subsets=10,
        kid_subset_size=60,
        batch_size=25,
        cuda=False,
        verbose=False,
        cache=False,
    )


@pytest.fixture(scope="module", params=[1, 25, 64])
def ours(request):
    """Of both sets, in batches of some size."""
    extractor = FeatureExtractor("custom", NETWORK, dim=512, spatial_dim=448, head=HEAD, device="cpu")
    sets = []
    for pictures in (GENERATED, REAL):
        found = FeatureSet.of(extractor)
        for images in pictures.images.split(request.param):
            found.update(extractor(images), keep=len(images))
        sets.append(found)
    return extractor, *sets


def test_all_metrics_agree(reference, ours):
    extractor, generated, real = ours
    kernel = kernel_distance(generated.features, real.features, subsets=10, subset_size=60, seed=2020)
    score = inception_score(extractor.logits(generated.features), split_size=generated.count // 5, seed=2020)
    manifold = precision_recall(real.features, generated.features)
    found = {
        "frechet_inception_distance": frechet_distance(generated.statistics, real.statistics),
        "kernel_inception_distance_mean": kernel.mean,
        "kernel_inception_distance_std": kernel.std,
        "inception_score_mean": score.mean,
        "inception_score_std": score.std,
        "precision": manifold.precision,
        "recall": manifold.recall,
    }
    # Its kernels are in float32, and a kernel distance is what is left of means near 1.
    assert found == pytest.approx({name: reference[name] for name in found}, rel=1e-4, abs=5e-7)
    assert 0 < found["recall"] < 1
    assert found["frechet_inception_distance"] > 1e-3


def test_fewer_samples_than_dimensions():
    """200 features of 2048 dimensions, as pooled Inception's of a small set: positive, correlated, of falling spread."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    draws = torch.Generator().manual_seed(0)
    mix = torch.randn(300, 2048, generator=draws) * 0.97 ** torch.arange(300)[:, None]
    a, b = (torch.relu(torch.randn(200, 300, generator=draws) @ mix * spread) for spread in (0.3, 0.35))
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
    ours = frechet_distance(GaussianStatistics.of(a), GaussianStatistics.of(b))
    assert ours == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
