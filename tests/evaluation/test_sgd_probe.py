"""Heads of the grid: trained together as if alone, chosen without a look at the validation images."""

import pytest
import torch
import torch.nn.functional as F

from vtp.evaluation.linear_probe import draw_holdout
from vtp.evaluation.sgd_probe import SgdConfig, SgdProbe, Sight, Split, count_batches, epoch_batches, sgd_probe

CONFIG = SgdConfig(learning_rates=[0.01, 0.1, 1.0, 300.0], epochs=3, batch_size=16)


def blobs(seed, count, classes=3, dim=6, spread=0.6):
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draws)
    return torch.eye(dim)[labels] + spread * torch.randn(count, dim, generator=draws), labels


def run(sets, labels, test, config=CONFIG, holdout=0.25, truth=None):
    """A probe on feature sets [N, D] by name, with the sets of the test samples."""
    held = draw_holdout(len(labels), holdout, 0)

    def sights():
        for epoch in range(config.epochs):
            batches = [torch.from_numpy(b) for b in epoch_batches(len(labels), config, seed=0, epoch=epoch)]
            yield [Sight({name: x[rows] for name, x in sets.items()}, labels[rows], held[rows]) for rows in batches]

    probe = SgdProbe({name: x.shape[1] for name, x in sets.items()}, 3, config, seed=0, device="cpu")
    judged = Split({name: x[held] for name, x in sets.items()}, labels[held])
    result = sgd_probe(sights(), judged, Split(*test), probe=probe, samples=len(labels))
    return result, probe, held


def test_heads_trained_together_are_those_trained_alone():
    (features, labels), (test, truth) = blobs(0, 100), blobs(1, 60)
    sets, others = {"a": features, "b": features[:, :4]}, {"a": test, "b": test[:, :4]}
    together, probe, _ = run(sets, labels, (others, truth))
    for name, x in sets.items():
        for index, rate in enumerate(CONFIG.learning_rates):
            config = CONFIG.model_copy(update={"learning_rates": [rate]})
            alone, single, _ = run({name: x}, labels, ({name: others[name]}, truth), config)
            assert alone.by_rate[name, rate] == together.by_rate[name, rate]
            both = probe._weights[name][[index, index + len(CONFIG.learning_rates)]]
            torch.testing.assert_close(single._weights[name], both)


def test_a_head_is_torchs_sgd():
    """The one that sees all, against torch.optim.SGD and autograd; the one that does not, on the rest of each batch."""
    features, labels = blobs(0, 64)
    config = SgdConfig(learning_rates=[0.5], epochs=2, batch_size=16)
    _, probe, held = run({"a": features}, labels, ({"a": features}, labels), config)
    for number, seen in enumerate((~held, torch.ones_like(held))):
        start = SgdProbe({"a": 6}, 3, config, seed=0, device="cpu")._weights["a"][0]
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=0.5 * 16 / 256, momentum=0.9)
        steps = config.epochs * count_batches(64, config)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(config.epochs):
            for batch in epoch_batches(64, config, seed=0, epoch=epoch):
                rows = torch.from_numpy(batch)[seen[torch.from_numpy(batch)]]
                x = torch.cat([features[rows], torch.ones(len(rows), 1)], 1)
                optimizer.zero_grad()
                F.cross_entropy(x @ weight, labels[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(probe._weights["a"][number], weight.detach(), rtol=1e-4, atol=1e-6)


def test_the_choice_does_not_see_the_test_samples():
    (features, labels), (test, truth) = blobs(0, 200), blobs(1, 90)
    right, *_ = run({"a": features}, labels, ({"a": test}, truth))
    wrong, *_ = run({"a": features}, labels, ({"a": test}, (truth + 1) % 3))
    assert right.chosen == wrong.chosen
    assert right.accuracy > 0.7
    assert wrong.accuracy < 0.4
    assert wrong.best_on_test >= wrong.accuracy
    assert right.best_on_test >= max(of_test for _, of_test in right.by_rate.values())
    best = max(of_held for of_held, _ in right.by_rate.values())
    assert right.by_rate[right.chosen][0] == best


def test_batches_hold_every_sample_at_most_once_and_fill_themselves():
    batches = epoch_batches(50, CONFIG, seed=3, epoch=0)
    assert [len(batch) for batch in batches] == [16, 16, 16]
    assert len({int(i) for batch in batches for i in batch}) == 48
    assert [len(batch) for batch in epoch_batches(5, CONFIG, seed=3, epoch=0)] == [5]
    assert not (epoch_batches(50, CONFIG, seed=3, epoch=1)[0] == batches[0]).all()


def test_holdout_is_a_share():
    assert draw_holdout(100, 0.1, 0).sum() == 10
    assert not torch.equal(draw_holdout(100, 0.1, 0), draw_holdout(100, 0.1, 1))
    with pytest.raises(ValueError, match="leaves none to fit"):
        draw_holdout(2, 0.9, 0)
