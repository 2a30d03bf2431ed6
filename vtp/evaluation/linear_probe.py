"""What frozen features know of labels: multinomial logistic regression and weighted nearest neighbours (paper 4.1).

The probe here is a convex problem solved to its optimum, so there is no learning rate to tune, and its one
hyper-parameter is chosen on held-out training samples; `sgd_probe` is for data sets that do not fit into memory. (Picking
the best head and epoch on the validation set, as is common, flatters.)
"""

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vtp.config import Config
from vtp.draws import torch_draws

BLOCK = 1024  # queries at a time in the nearest-neighbour search


class LbfgsConfig(Config):
    """The convex problem, solved to its optimum on standardised features: no learning rate, and all samples in memory."""

    name: Literal["lbfgs"]
    l2: list[Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="candidates for l in mean cross-entropy + l/2 |W|^2 on standardised features"
    )
    max_iterations: int = Field(ge=1, description="of L-BFGS")


class ProbeResult(NamedTuple):
    """Accuracies in [0, 1]; `holdout_accuracy` belongs to each candidate of l2, in falling order."""

    accuracy: float
    train_accuracy: float
    l2: float
    holdout_accuracy: dict[float, float]


def draw_holdout(count: int, share: float, seed: int) -> Tensor:
    """Which of `count` training samples choose hyper-parameters [count] bool, at least one.

    Raises ValueError when none would be left to fit.
    """
    held = max(1, round(share * count))
    if held == count:
        raise ValueError(f"holdout {share} of {count} training samples leaves none to fit")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=torch_draws(seed, "linear_probe"))[:held]] = True
    return mask


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    config: LbfgsConfig,
    holdout: float,
    seed: int,
) -> ProbeResult:
    """Fit on features [N, D] with labels [N], report on others; the work is done on the device of the features."""
    # float64: at the optimum, the accuracy does not depend on devices and threads. Inference mode would bar gradients.
    with torch.inference_mode(False):
        mean, std = statistics_of(train_features)
        train, test = ((x.double() - mean) / std for x in (train_features, test_features))
        labels = train_labels.to(train.device, copy=True)
        classes = int(labels.max()) + 1
        asked = draw_holdout(len(train), holdout, seed).to(train.device)
        known = ~asked
        accuracies = {}
        for l2 in sorted(config.l2, reverse=True):
            head = fit_logistic(train[known], labels[known], classes, l2=l2, max_iterations=config.max_iterations)
            accuracies[l2] = _accuracy(head, train[asked], labels[asked])
        best = max(accuracies, key=accuracies.__getitem__)  # the strongest of equals
        head = fit_logistic(train, labels, classes, l2=best, max_iterations=config.max_iterations)
        accuracy = _accuracy(head, test, test_labels.to(test.device))
        return ProbeResult(accuracy, _accuracy(head, train, labels), best, accuracies)


def fit_logistic(features: Tensor, labels: Tensor, classes: int, *, l2: float, max_iterations: int) -> Tensor:
    """Weights [D + 1, classes], the bias in the last row, that minimise mean cross-entropy + l2/2 |W|^2 (bias free)."""
    weight = features.new_zeros(features.shape[1] + 1, classes, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(_logits(weight, features), labels) + l2 / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach()


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int,
    temperature: float = 0.07,
) -> float:
    """Share of test samples for whose label the k most similar training samples vote.

    A vote weighs exp(cosine / temperature): the classifier of Wu et al. (2018) and DINO. Raises ValueError when there
    are fewer training samples than k.
    """
    if k > len(train_features):
        raise ValueError(f"k is {k}, the training set has {len(train_features)} samples; lower k or take more samples")
    train, test = (F.normalize(x.float(), dim=1) for x in (train_features, test_features))
    classes = int(train_labels.max()) + 1
    hits = 0
    for queries, labels in zip(test.split(BLOCK), test_labels.split(BLOCK), strict=True):
        similarity, nearest = (queries @ train.T).topk(k, dim=1)  # [n, k]
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(queries), classes).scatter_add_(1, train_labels[nearest], weights)
        hits += int((votes.argmax(1) == labels).sum())
    return hits / len(test)


def statistics_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of features [N, D], in float64."""
    std, mean = torch.std_mean(features.double(), dim=0, correction=0)
    return mean, std.clamp(min=1e-8)


def _logits(weight: Tensor, features: Tensor) -> Tensor:
    return torch.addmm(weight[-1], features, weight[:-1])


def _accuracy(weight: Tensor, features: Tensor, labels: Tensor) -> float:
    return (_logits(weight, features).argmax(1) == labels).double().mean().item()
