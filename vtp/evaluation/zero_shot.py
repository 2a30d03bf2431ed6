"""Zero-shot classification: images against the text features of prompts about every class (Radford et al. 2021)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 256  # prompts per call of the text encoder


@torch.no_grad()
def build_classifier(
    encode_text: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Unit-norm class vectors [C, E]: the mean over templates of unit-norm text features, normalised again.

    `encode_text` maps prompts to features [n, E]; `{}` in a template stands for the class name. Raises ValueError for a
    template without it.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r}: has no {{}} to put the class name in")
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = [encode_text(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
    unit = F.normalize(torch.cat(features).float(), dim=1)
    return F.normalize(unit.unflatten(0, (len(class_names), len(templates))).mean(1), dim=1)


@torch.no_grad()
def top_k_accuracy(
    image_features: Tensor, classifier: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Share of images [N, E] whose label [N] is among the k classes [C, E] of largest inner product, for every k."""
    scores = image_features.float() @ classifier.float().T
    best = scores.topk(min(max(ks), len(classifier)), dim=1).indices
    hits = best == labels[:, None]  # [N, k], at most one in a row
    return {k: hits[:, :k].any(1).double().mean().item() for k in ks}
