"""Figures of generated images that have a closed form."""

import pytest
import torch

from vtp.evaluation.feature_set import FeatureSet, FeatureSets
from vtp.evaluation.generation import Ratio
from vtp.evaluation.networks import Extracted


def shifted(**shifts):
    """The same points for each network, all of them moved so far: a Fréchet distance of the square of that."""
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    sets = FeatureSets()
    for name, shift in shifts.items():
        sets[name] = FeatureSet(3, None)
        sets[name].update(Extracted(points + torch.tensor([shift, 0.0, 0.0]), None), keep=0)
    return sets


def test_the_ratio_is_the_mean_over_networks_of_distances_over_those_of_held_out_images():
    """FDr: (3 / 2)^2 in one network, (1 / 4)^2 in the other."""
    ratio = Ratio.of(shifted(a=2.0, b=4.0), shifted(a=0.0, b=0.0))
    assert ratio.real == pytest.approx({"fid_a_40_real": 4.0, "fid_b_40_real": 16.0}, rel=1e-5)
    table = {"gfid_a_40_cfg2_random": 9.0, "gfid_b_40_cfg2_random": 1.0, "gfid_a_5_cfg2_random": 7.0}
    found = ratio.figures(shifted(a=3.0, b=1.0), table, "gfid", "cfg2_random")
    assert found == pytest.approx({"fdr2_40_vs40_cfg2_random": (9 / 4 + 1 / 16) / 2}, rel=1e-5)


def test_held_out_images_score_one():
    ratio = Ratio.of(shifted(a=2.0), shifted(a=0.0))
    assert ratio.figures(shifted(a=2.0), {"rfid_a_40_given": ratio.units["a"]}, "rfid", "given") == {
        "fdr1_40_vs40_given": 1.0
    }
