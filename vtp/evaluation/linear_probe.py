"""What frozen features know of labels, linearly: a convex problem, solved to its optimum (paper 4.1).

There is no learning rate to tune, and the one hyper-parameter is chosen on held-out training samples. (Picking the best head
and epoch on the validation set, as is common, flatters; `sgd_probe` has that protocol too, under its own name.)
"""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from vtp.config import Config, Distinct
from vtp.draws import torch_draws
from vtp.evaluation.scale import BLOCK, Scale


class LbfgsConfig(Config):
    """Multinomial logistic regression on standardised features, solved in float64 by L-BFGS."""

    name: Literal["lbfgs"]
    l2: Annotated[list[Annotated[float, Field(gt=0)]], Distinct] = Field(
        min_length=1, description="candidates for l in mean cross-entropy + l/2 |W|^2 on standardised features"
    )
    max_iterations: int = Field(ge=1, description="most iterations of L-BFGS")


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
    if held >= count:
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
    held: Tensor,
) -> ProbeResult:
    """Fit on features [N, D] with labels [N], report on others; the work is done on the device of the features.

    The penalty that serves the `held` samples [N] best then serves all. Features may be of half precision.
    """
    scale, device = Scale.of(train_features), train_features.device
    labels, held = train_labels.to(device), held.to(device)
    classes = int(labels.max()) + 1
    known, known_labels, asked, asked_labels = train_features[~held], labels[~held], train_features[held], labels[held]
    accuracies = {}
    for l2 in sorted(config.l2, reverse=True):
        head = fit_logistic(known, known_labels, classes, l2=l2, max_iterations=config.max_iterations, scale=scale)
        accuracies[l2] = accuracy(head, asked, asked_labels, scale)
    del known  # a copy of nearly all
    best = max(accuracies, key=accuracies.__getitem__)  # the strongest of equals
    head = fit_logistic(train_features, labels, classes, l2=best, max_iterations=config.max_iterations, scale=scale)
    right = accuracy(head, test_features, test_labels.to(device), scale)
    return ProbeResult(right, accuracy(head, train_features, labels, scale), best, accuracies)


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, *, l2: float, max_iterations: int, scale: Scale
) -> Tensor:
    """Weights [D + 1, classes], the bias in the last row, that minimise mean cross-entropy + l2/2 |W|^2 (bias free).

    In float64 the accuracy at the optimum does not depend on devices and threads. Features become float64 a block at a
    time: with their logits, those of ImageNet would fill 30 GB.
    """
    with torch.inference_mode(False), torch.no_grad():  # the optimiser writes into what inference mode would lock
        weight = torch.zeros(features.shape[1] + 1, classes, dtype=torch.float64, device=features.device)
        weight.requires_grad_(True)
        weight.grad = torch.zeros_like(weight)
        optimiser = torch.optim.LBFGS(
            [weight],
            max_iter=max_iterations,
            max_eval=2 * max_iterations,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        @torch.no_grad()
        def closure() -> Tensor:
            loss = l2 / 2 * weight[:-1].square().sum()
            gradient = torch.cat([l2 * weight[:-1], torch.zeros_like(weight[-1:])])
            for block, truth in zip(features.split(BLOCK), labels.split(BLOCK), strict=True):
                x = scale.standardise(block)
                log_shares = _logits(weight, x).log_softmax(1)
                loss -= log_shares.gather(1, truth[:, None]).sum() / len(features)
                # d mean cross-entropy / d logits = (softmax - onehot) / N
                excess = log_shares.exp_().scatter_add_(1, truth[:, None], -torch.ones_like(log_shares[:, :1]))
                gradient[:-1] += x.T @ excess / len(features)
                gradient[-1] += excess.sum(0) / len(features)
            assert weight.grad is not None
            weight.grad.copy_(gradient)
            return loss

        optimiser.step(closure)  # pyright: ignore[reportArgumentType] - it asks for the loss as a number
        return weight.detach()


def _logits(weight: Tensor, features: Tensor) -> Tensor:
    return torch.addmm(weight[-1], features, weight[:-1])


@torch.no_grad()
def accuracy(weight: Tensor, features: Tensor, labels: Tensor, scale: Scale) -> float:
    """Share of features [N, D] that a head [D + 1, classes] puts into the class of their labels [N]."""
    hits = 0
    for block, truth in zip(features.split(BLOCK), labels.split(BLOCK), strict=True):
        hits += int((_logits(weight, scale.standardise(block)).argmax(1) == truth).sum())
    return hits / len(features)
