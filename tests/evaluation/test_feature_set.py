"""What is kept of features that stream."""

import pytest
import torch

from vtp.artefact import ArtefactError, load_tensors, save_tensors
from vtp.evaluation.feature_set import FeatureSet
from vtp.evaluation.networks import Extracted


def extracted(seed, count, *, spatial=True):
    draws = torch.Generator().manual_seed(seed)
    pooled, places = torch.randn(count, 6, generator=draws), torch.randn(count, 4, generator=draws)
    return Extracted(pooled, places if spatial else None)


def filled(parts, keep, *, spatial=True):
    found = FeatureSet(6, 4 if spatial else None)
    for part in parts:
        found.update(part, keep=keep - found.count)
    return found


def same(a, b):
    assert a.count == b.count
    assert torch.equal(a.features, b.features)
    assert (a.spatial is None) == (b.spatial is None)
    pairs = [(a.statistics, b.statistics), *([] if a.spatial is None else [(a.spatial, b.spatial)])]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=1e-12, atol=1e-14)


def test_the_first_features_are_kept():
    parts = [extracted(0, 5), extracted(1, 3), extracted(2, 4)]
    everything = torch.cat([part.pooled for part in parts])
    for keep in (0, 2, 5, 7, 12, 50):
        found = filled(parts, keep)
        assert found.count == 12
        assert torch.equal(found.features, everything[:keep])


@pytest.mark.parametrize("spatial", [True, False])
def test_merged_and_saved(tmp_path, spatial):
    parts = [extracted(seed, 5, spatial=spatial) for seed in range(4)]
    whole, merged, behind = (filled(p, 100, spatial=spatial) for p in (parts, parts[:1], parts[1:]))
    merged.merge(behind)
    same(whole, merged)
    save_tensors(tmp_path / "set.safetensors", whole.tensors())
    same(whole, FeatureSet.of_tensors(load_tensors(tmp_path / "set.safetensors"), where="here"))


def test_other_tensors_are_no_set():
    tensors = filled([extracted(0, 5)], 5).tensors()
    for wrong in ({}, {"features": torch.ones(3)}, tensors | {"spatial_mean": torch.ones(3)}):
        with pytest.raises(ArtefactError, match="here: holds .* not Gaussian statistics"):
            FeatureSet.of_tensors(wrong, where="here")
