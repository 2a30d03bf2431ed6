"""Inception score (Salimans et al. 2016): exp of the mean KL divergence between a sample's classes and all samples'."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtp.finite import require_finite


class InceptionScore(NamedTuple):
    """Mean and standard deviation (of the population) over the splits."""

    mean: float
    std: float


@torch.no_grad()
def inception_score(logits: Tensor, *, split_size: int, seed: int | None = None) -> InceptionScore:
    """Of logits [N, classes] without biases. Raises ValueError for no samples, NotFiniteError for NaN and infinity.

    Splits are consecutive runs of `split_size` samples (5000 in ADM's evaluation); the last one may be shorter, and counts
    like the others. With a `seed` the samples are shuffled first, as in torch-fidelity (whose seed is 2020), which matters
    when they are sorted by class.
    """
    count = len(logits)
    if not count:
        raise ValueError("no samples to score")
    require_finite(logits, "rows of logits", "check the features that they were made of")
    if seed is not None:
        # The legacy generator, so that a seed means what it means in torch-fidelity.
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(count)).to(logits.device)]
    log_p = logits.cpu().double().log_softmax(1)
    scores = torch.stack([_score(part) for part in log_p.split(split_size)])
    return InceptionScore(scores.mean().item(), scores.std(correction=0).item())


def _score(log_p: Tensor) -> Tensor:
    # The marginal stays in log space: a class of zero probability must not make 0 * inf.
    log_q = log_p.logsumexp(0) - np.log(len(log_p))
    return (log_p.exp() * (log_p - log_q)).sum(1).mean().exp()
