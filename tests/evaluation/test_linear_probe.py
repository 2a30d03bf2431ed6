"""Linear probe by a convex problem."""

import pytest
import torch
import torch.nn.functional as F

from vtp.config import ConfigError
from vtp.evaluation import linear_probe as module
from vtp.evaluation import scale
from vtp.evaluation.linear_probe import LbfgsConfig, draw_holdout, fit_logistic, linear_probe
from vtp.evaluation.scale import Scale

CONFIG = LbfgsConfig(name="lbfgs", l2=[1e-4, 1e-2, 1.0], max_iterations=200)


def probe(*data, config=CONFIG, holdout=0.2):
    return linear_probe(*data, config=config, held=draw_holdout(len(data[0]), holdout, 0))


def plain(dim):
    """Features as they are."""
    return Scale(torch.zeros(dim).double(), torch.ones(dim).double())


def blobs(seed, count, *, classes=3, dim=6, spread=1.0):
    """Classes around fixed centres of unit length."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draws)
    return torch.eye(dim)[labels] + spread * torch.randn(count, dim, generator=draws), labels


def newton(features, labels, classes, l2):
    """Newton's method on the same objective, with the exact Hessian."""
    x = torch.cat([features, torch.ones(len(features), 1).double()], dim=1)
    ridge = torch.full((x.shape[1], 1), l2).double()
    ridge[-1] = 0

    def loss(flat):
        weight = flat.view(-1, classes)
        return F.cross_entropy(x @ weight, labels) + (ridge * weight**2).sum() / 2

    flat = torch.zeros(x.shape[1] * classes).double()
    for _ in range(20):
        gradient = torch.func.grad(loss)(flat)
        # The bias is free along one direction, hence the least-squares step.
        flat = flat - torch.linalg.pinv(torch.func.hessian(loss)(flat), hermitian=True, rtol=1e-10) @ gradient
    return flat.view(-1, classes)


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_reaches_the_optimum(l2):
    features, labels = blobs(0, 200)
    ours = fit_logistic(features, labels, 3, l2=l2, max_iterations=500, scale=plain(6))
    torch.testing.assert_close(ours, newton(features.double(), labels, 3, l2), rtol=0, atol=1e-5)


def test_intercept_closed_form():
    """Without informative features, the probabilities are the class frequencies, whatever the penalty."""
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weight = fit_logistic(torch.zeros(10, 4).double(), labels, 3, l2=10.0, max_iterations=100, scale=plain(4))
    torch.testing.assert_close(weight[-1].softmax(0), torch.tensor([0.6, 0.3, 0.1]).double(), atol=1e-6, rtol=0)


def test_separable():
    result = probe(*blobs(0, 300, spread=0.05), *blobs(1, 100, spread=0.05))
    assert result.accuracy == result.train_accuracy == 1
    assert result.l2 == 1.0  # all candidates are right on the held-out samples: the strongest


def test_random_labels():
    """Nothing to learn: near chance on others, whatever was memorised, and a strong penalty is chosen."""
    (train, _), (test, _) = blobs(0, 400, dim=100), blobs(1, 1000, dim=100)
    draws = torch.Generator().manual_seed(2)
    known, truth = torch.randint(4, (400,), generator=draws), torch.randint(4, (1000,), generator=draws)
    result = probe(train, known, test, truth)
    assert abs(result.accuracy - 0.25) < 0.06
    assert result.train_accuracy > 0.4


def test_penalty_is_chosen_for_generalisation():
    """Many noisy dimensions and wrong labels: held-out samples want a penalty, the fitted ones want none."""
    (features, labels), test = blobs(0, 400, dim=150, spread=0.3), blobs(1, 500, dim=150, spread=0.3)
    draws = torch.Generator().manual_seed(2)
    wrong = torch.rand(400, generator=draws) < 0.4
    train = features, torch.where(wrong, torch.randint(3, (400,), generator=draws), labels)
    results = {l2: probe(*train, *test, config=CONFIG.model_copy(update={"l2": [l2]})) for l2 in CONFIG.l2}
    chosen = probe(*train, *test)
    assert chosen.l2 == 1.0
    assert chosen.accuracy == results[1.0].accuracy > results[1e-4].accuracy + 0.1
    assert results[1e-4].train_accuracy == 1
    assert chosen.holdout_accuracy == {l2: results[l2].holdout_accuracy[l2] for l2 in (1.0, 1e-2, 1e-4)}


def test_scale_and_dead_features_do_not_matter():
    train, test = blobs(0, 200), blobs(1, 200)
    expected = probe(*train, *test)

    def disguise(features):
        dead = torch.full((len(features), 2), 3.3)
        return torch.cat([features * torch.tensor([1e-3, 1, 1, 1, 1, 1e3]) - 50, dead], dim=1)

    disguised = probe(disguise(train[0]), train[1], disguise(test[0]), test[1])
    assert disguised.accuracy == pytest.approx(expected.accuracy, abs=0.011)
    assert disguised.l2 == expected.l2


def test_repeats_itself_and_works_in_inference_mode():
    train, test = blobs(0, 100), blobs(1, 100)
    expected = probe(*train, *test)
    torch.manual_seed(5)
    with torch.inference_mode():
        inside = probe(*(x.clone() for x in (*train, *test)))
    assert inside == expected


def test_holdout_must_leave_something():
    with pytest.raises(ValueError, match=r"holdout 0\.9 of 2 training samples leaves none to fit"):
        probe(*blobs(0, 2), *blobs(1, 2), holdout=0.9)


def test_config_refuses_nonsense():
    for change in ({"l2": []}, {"l2": [0.0]}, {"max_iterations": 0}):
        with pytest.raises(ConfigError, match=r"params\.yaml:probe"):
            LbfgsConfig.parse(CONFIG.model_dump() | change, where="params.yaml:probe")


def test_blocks_do_not_matter(monkeypatch):
    """Half precision too: what is standardised and summed a block at a time is what all samples are."""
    train, test = blobs(0, 210), blobs(1, 100)
    half = train[0].half()
    whole, of_half = probe(*train, *test), probe(half, train[1], *test)
    for file in (module, scale):
        monkeypatch.setattr(file, "BLOCK", 16)
    assert probe(*train, *test) == whole
    assert probe(half, train[1], *test) == of_half
    assert of_half.accuracy == pytest.approx(whole.accuracy, abs=0.011)
    torch.testing.assert_close(Scale.of(train[0]).std, train[0].double().std(0, correction=0))


def test_holdout_is_a_share():
    assert draw_holdout(100, 0.1, 0).sum() == 10
    assert not torch.equal(draw_holdout(100, 0.1, 0), draw_holdout(100, 0.1, 1))
    assert draw_holdout(5, 0.01, 0).sum() == 1
