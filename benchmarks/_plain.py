"""A joint step as one would first write it, on one page: the reference of benchmarks/pretrain.py.

Three forwards, one sum, one backward. Losses after their papers, on whole matrices; AdamW without fusion; the teacher
updated parameter by parameter; every scalar read at once. It takes as much computing as the step of the stage, and is
not the same training: temperatures and the teacher's momentum are fixed, all parameters have one rate, nothing is left
out by stochastic depth, and the logit scale is not clamped.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.pretrain import Pretrain
from vtp.data.pretrain_batches import PretrainBatch
from vtp.layers.images import denormalise, normalise
from vtp.models.heads import DinoHead
from vtp.models.tokenizer import VisualTokenizer


def contrast(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Radford et al. 2021, figure 3."""
    logits = image @ text.T * scale
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Caron et al. 2020, in the linear domain."""
    scores = (logits.float() / temperature).exp().T
    scores /= scores.sum()
    for _ in range(iterations):
        scores /= scores.sum(1, keepdim=True) * scores.shape[0]
        scores /= scores.sum(0, keepdim=True) * scores.shape[1]
    return (scores * scores.shape[1]).T


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    return -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1)


def reconstruct(tokenizer: VisualTokenizer, perceptual: nn.Module, images: Tensor) -> Tensor:
    """L1 and the perceptual distance."""
    output = tokenizer.decode(tokenizer.encode(images, grad=True), grad=True)
    distance = perceptual(denormalise(output.float()) * 2 - 1, denormalise(images) * 2 - 1)
    return (output.float() - images).abs().mean() + distance.mean()


class PlainSsl(nn.Module):
    """Self-distillation with one head pass per kind of token."""

    def __init__(self, tokenizer: VisualTokenizer, config: Pretrain) -> None:
        super().__init__()
        self.config = config.objective.ssl
        self.head = DinoHead(config.vit.vision.embed_dim, self.config.head)
        self.teacher = copy.deepcopy(tokenizer.trunk).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)

    def forward(self, trunk: nn.Module, batch: PretrainBatch) -> Tensor:
        config, views = self.config, normalise(batch.global_views)
        images, count = len(views), views.shape[1]
        masks = batch.masks.flatten(0, 1)
        views = views.flatten(0, 1)
        local_views = normalise(batch.local_views).flatten(0, 1)
        with torch.no_grad():
            taught = self.teacher(views)
            of_cls = sinkhorn(self.teacher_head(taught.cls), config.teacher_temperature_end, 3)
            of_patches = sinkhorn(self.teacher_head(taught.patches[masks]), config.teacher_temperature_end, 3)
        seen, local = trunk(views, masks), trunk(local_views)
        of_cls = of_cls.unflatten(0, (images, count))
        from_global = self.head(seen.cls).unflatten(0, (images, count))
        from_local = self.head(local.cls).unflatten(0, (images, -1))
        loss, pairs = torch.zeros((), device=views.device), 0
        for target in range(count):
            for view in range(count):
                if view != target:
                    loss = loss + cross_entropy(of_cls[:, target], from_global[:, view], 0.1).mean()
                    pairs += 1
            for view in range(from_local.shape[1]):
                loss = loss + cross_entropy(of_cls[:, target], from_local[:, view], 0.1).mean()
                pairs += 1
        loss = loss / pairs
        weights = (1 / masks.sum(1, keepdim=True).clamp_min(1)).expand_as(masks)[masks]
        from_patches = self.head(seen.patches[masks])
        loss = loss + (weights * cross_entropy(of_patches, from_patches, 0.1)).sum() / len(masks)
        for view in seen.cls.unflatten(0, (images, count)).unbind(1):
            unit = F.normalize(view.float(), dim=-1)
            similarity = unit @ unit.T - 2 * torch.eye(len(unit), device=unit.device)
            nearest = unit[similarity.argmax(1)]
            loss = loss - config.koleo * (F.pairwise_distance(unit, nearest) + 1e-8).log().mean()
        return loss

    @torch.no_grad()
    def follow(self, trunk: nn.Module, momentum: float) -> None:
        """Parameter by parameter."""
        for average, module in ((self.teacher, trunk), (self.teacher_head, self.head)):
            for kept, current in zip(average.parameters(), module.parameters(), strict=True):
                kept.data = kept.data * momentum + current.data * (1 - momentum)


class PlainStep:
    """The joint step. A batch goes in; the weights move."""

    def __init__(self, tokenizer: VisualTokenizer, perceptual: nn.Module, config: Pretrain) -> None:
        self.tokenizer, self.perceptual, self.config = tokenizer, perceptual, config
        self.ssl = PlainSsl(tokenizer, config).to(tokenizer.logit_scale.device)
        self.optimizer = adamw([tokenizer, self.ssl.head], config)

    def __call__(self, batch: PretrainBatch) -> list[float]:
        """The loss, and its three parts."""
        tokenizer, weights = self.tokenizer, self.config.objective.weights
        reduced = self.config.training.precision == "bfloat16"
        with torch.autocast(tokenizer.logit_scale.device.type, torch.bfloat16, enabled=reduced):
            image = tokenizer.encode_image(normalise(batch.clip_images))
            clip = contrast(image, tokenizer.encode_text(batch.tokens), tokenizer.logit_scale.exp())
            ssl = self.ssl(tokenizer.trunk, batch)
            reconstruction = reconstruct(tokenizer, self.perceptual, normalise(batch.rec_images))
            loss = weights.clip * clip + weights.ssl * ssl + weights.reconstruction * reconstruction
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        self.optimizer.step()
        self.ssl.follow(tokenizer.trunk, 0.99)
        return [value.item() for value in (loss, clip, ssl, reconstruction)]


def adamw(modules: list[nn.Module], config: Pretrain) -> torch.optim.AdamW:
    """Without fusion, one group."""
    optim = config.optim
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        foreach=False,
        fused=False,
    )
