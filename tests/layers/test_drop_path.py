"""Stochastic depth: who is left out, for any split of a batch into ranks and micro-batches."""

import math
from functools import partial

import pytest
import torch

from vtp.draws import torch_draws
from vtp.layers.drop_path import draw_drop_path

BLOCKS, CROPS, DEPTH = 16, 4, 3


def drawn(rate, blocks, *, step=0, crops=CROPS):
    draws = partial(torch_draws, 0, "drop_path", step)
    return draw_drop_path(rate, crops=crops, blocks=blocks, depth=DEPTH, draws=draws)


def computed(drop_path, crops):
    """Whether each branch computes each of so many crops, [depth, 2, crops]."""
    table = torch.zeros(DEPTH, 2, crops)
    return table.scatter(2, drop_path.indices, drop_path.weights) > 0


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_every_split_leaves_out_the_same(rate, ranks):
    """Of 16 blocks on up to 16 ranks, each with a static number that is its share, rounded up."""
    whole = computed(drawn(rate, range(BLOCKS)), BLOCKS * CROPS)
    own = BLOCKS // ranks
    parts = [drawn(rate, range(rank * own, (rank + 1) * own)) for rank in range(ranks)]
    assert torch.equal(torch.cat([computed(part, own * CROPS) for part in parts], dim=2), whole)
    for part in parts:
        share = math.ceil(round(own * CROPS * (1 - rate), 6))
        assert part.indices.shape == part.weights.shape == (DEPTH, 2, share)
        assert all(len(branch.unique()) == len(branch) for branch in part.indices.flatten(0, 1))
        torch.testing.assert_close(part.weights, (part.weights > 0) / (1 - rate))


@pytest.mark.parametrize("crops", [1, 4])
def test_every_sample_is_left_out_at_the_rate(crops):
    """Over steps each crop of each block by itself; in each step the share of the whole batch within one."""
    found = torch.stack(
        [computed(drawn(0.3, range(5), step=step, crops=crops), 5 * crops) for step in range(2000)]
    ).float()
    of_crop = found.mean((0, 1, 2))
    assert (of_crop - 0.7).abs().max() < 5 * (0.21 / (2000 * 2 * DEPTH)) ** 0.5
    assert ((found.sum(3) - 5 * crops * 0.7).abs() < 1).all()


def test_layers_and_steps_are_drawn_apart():
    first, other = (drawn(0.5, range(BLOCKS), step=step).indices for step in (0, 1))
    assert not torch.equal(first, other)
    branches = first.flatten(0, 1).tolist()
    assert len({tuple(branch) for branch in branches}) == len(branches)


def test_nothing_is_drawn_where_nothing_is_left_out():
    assert drawn(0.0, range(BLOCKS)) is None
    assert drawn(0.5, range(BLOCKS), crops=0) is None
