"""Precision and recall."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT

from vtp.evaluation.manifold import _radii, precision_recall


def samples(seed, count, dim=8, scale=1.0, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


def brute_force(centres, points, neighbours):
    """Share of points in a ball, by loops over float64 norms."""
    centres, points = centres.double(), points.double()
    radii = [sorted((centres - centre).norm(dim=1).tolist())[neighbours] for centre in centres]
    inside = [any((point - c).norm() <= r for c, r in zip(centres, radii, strict=True)) for point in points]
    return sum(inside) / len(inside)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_equals_brute_force(neighbours):
    real, fake = samples(0, 40), samples(1, 30, scale=0.7, shift=0.3)
    result = precision_recall(real, fake, neighbours=neighbours, block=7)
    assert result == (brute_force(real, fake, neighbours), brute_force(fake, real, neighbours))
    assert 0 < result.recall < result.precision < 1


@pytest.mark.parametrize("block", [2, 64, 4096])
def test_equals_torch_fidelity(block):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = samples(0, 300), samples(1, 200, scale=0.8)
    expected = prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True)
    result = precision_recall(real, fake, neighbours=3, block=block)
    assert result == pytest.approx((expected["precision"], expected["recall"]))


def test_extremes():
    """A sample of two modes: leaving one out costs recall, leaving the data costs both."""
    modes = torch.cat([samples(0, 50), samples(1, 50, shift=100.0)])
    assert precision_recall(modes, modes) == (1, 1)
    assert precision_recall(modes, modes[:50]) == (1, 0.5)
    assert precision_recall(modes[:50], modes) == (0.5, 1)
    assert precision_recall(modes[:50], modes[50:]) == (0, 0)


def test_far_from_the_origin():
    """Features with a large common mean, as after a ReLU, keep their distances."""
    real, fake = samples(0, 100), samples(1, 100, scale=0.8)
    assert precision_recall(real + 1000, fake + 1000) == pytest.approx(precision_recall(real, fake), abs=0.02)


def test_needs_more_points_than_neighbours():
    with pytest.raises(ValueError, match="3 neighbours need more points than 10 real and 3 generated"):
        precision_recall(samples(0, 10), samples(1, 3), neighbours=3)


def test_bad_features():
    bad = samples(0, 20)
    bad[3, 1] = torch.inf
    for real, fake, message in (
        (bad, samples(1, 20), "1 of 20 real features hold NaN or infinity"),
        (samples(1, 20), bad, "1 of 20 generated features hold NaN or infinity"),
        (samples(0, 20, dim=4), samples(1, 20), "features of 4 and of 8 dimensions"),
        (samples(0, 20)[:, 0], samples(1, 20), r"real features are \[20\], not \[N, D\]"),
    ):
        with pytest.raises(ValueError, match=message):
            precision_recall(real, fake)


def test_order_does_not_matter():
    real, fake = samples(0, 120), samples(1, 90, scale=0.8)
    shuffled = fake[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    assert precision_recall(real, fake, block=32) == precision_recall(real.flip(0), shuffled, block=50)


@pytest.mark.parametrize("name", ["pr", "pr_float32"])
@pytest.mark.parametrize("block", [50, 4096])
def test_equals_the_evaluator_of_adm(name, block):
    """`golden/adm-metrics`: sets on which its float16 distances are exact; every point is decided alike."""
    golden = load_file(ROOT / "tests/golden/adm-metrics/io.safetensors")
    real, fake = golden[f"{name}.ref"], golden[f"{name}.sample"]
    found = precision_recall(real, fake, neighbours=3, block=block)
    assert found.precision == pytest.approx(float(golden[f"{name}.precision"]), abs=1e-12)
    assert found.recall == pytest.approx(float(golden[f"{name}.recall"]), abs=1e-12)
    for points, radii in ((real, "radii_ref"), (fake, "radii_sample")):
        torch.testing.assert_close(_radii(points, 3, block).square(), golden[f"{name}.{radii}"], rtol=1e-4, atol=1e-6)
