"""Self-supervision after DINOv2: a student learns from its moving average, across views and behind masks (paper 3.3).

    L_ssl = L_dino + L_ibot + koleo

Exact for a global batch over any number of ranks and micro-batches: head inputs are cached, prototype logits are made
in chunks, the potentials that balance them and the nearest neighbours of KoLeo come from all ranks.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp.config import Config
from vtp.data.pretrain_batches import PretrainBatch
from vtp.distributed import ranks, total
from vtp.layers.average import frozen_copy, update_average
from vtp.layers.drop_path import DropPath
from vtp.layers.images import normalise
from vtp.losses.dino import (
    TargetDiagnostics,
    TargetsConfig,
    build_targets,
    dino_loss,
    ibot_loss,
    target_of,
)
from vtp.losses.koleo import koleo_loss
from vtp.models.heads import DinoHead, DinoHeadConfig
from vtp.models.tokenizer import VisualTokenizer
from vtp.models.vit import Features, VisionConfig, VisionTransformer
from vtp.objectives.gradient_cache import GradientCache
from vtp.step import StepContext, Term

CHUNK = 1 << 26  # logits at a time: 256 MB


class ConstantMomentum(Config):
    """The same throughout: the teacher keeps following the other objectives (SILC, DINOv3)."""

    name: Literal["constant"]
    value: float = Field(ge=0, le=1, description="momentum of the teacher in every step")


class CosineMomentum(Config):
    """From start to end along half a cosine (DINOv2: 0.992 or 0.994 to 1)."""

    name: Literal["cosine"]
    start: float = Field(ge=0, le=1, description="momentum of the teacher at the start")
    end: float = Field(ge=0, le=1, description="momentum of the teacher at the end")


class SslConfig(Config):
    """Self-distillation."""

    features: Literal["trunk", "latent"] = Field(description="what the head reads: the encoder's width, or d channels")
    pooling: Literal["cls", "pooled"] = Field(description="DINO and KoLeo: class token, or mean of the patches")
    head: DinoHeadConfig
    patch_head: DinoHeadConfig | None = Field(description="head of iBOT on patches; null: shared with DINO")
    targets: TargetsConfig
    student_temperature: float = Field(gt=0, description="temperature of the student's softmax")
    teacher_temperature_start: float = Field(gt=0, description="temperature of the teacher's softmax at the start")
    teacher_temperature_end: float = Field(gt=0, description="temperature of the teacher's softmax after its warm-up")
    teacher_temperature_warmup: float = Field(ge=0, le=1, description="share of the run from start to end")
    momentum: Annotated[ConstantMomentum | CosineMomentum, Field(discriminator="name")]
    teacher_projection: bool = Field(description="the teacher keeps CLIP's image projection too")
    koleo: float = Field(ge=0, description="weight of the KoLeo spread of class tokens")
    koleo_group: int | None = Field(
        ge=2,
        description="consecutive images of a batch among which KoLeo seeks the nearest; null: all (DINOv2: those of a GPU)",
    )

    def width(self, vision: VisionConfig) -> int:
        """Channels that the heads read."""
        return vision.embed_dim if self.features == "trunk" else vision.latent_channels


class Teacher(nn.Module):
    """Moving averages of what the student shows: never of the text tower or the decoder."""

    def __init__(self, trunk: VisionTransformer, heads: nn.ModuleDict, projection: nn.Module | None) -> None:
        super().__init__()
        self.trunk = frozen_copy(trunk)
        self.heads = frozen_copy(heads)
        self.visual_proj = None if projection is None else frozen_copy(projection)


class _HeadInputs(NamedTuple):
    """What the heads see of a micro-batch, samples first."""

    views: Tensor  # [B, V, D]
    patches: Tensor  # [M, D]


class SelfDistillation(nn.Module):
    """Heads, teacher and targets. The student is the tokenizer's trunk, which lives outside of this module."""

    def __init__(self, tokenizer: VisualTokenizer, config: SslConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width(tokenizer.config.vision)
        self.heads = nn.ModuleDict({"dino": DinoHead(width, config.head)})
        if config.patch_head is not None:
            self.heads["ibot"] = DinoHead(width, config.patch_head)
        projection = tokenizer.visual_proj if config.teacher_projection and tokenizer.config.text else None
        self.teacher = Teacher(tokenizer.trunk, self.heads, projection)
        prototypes = {"views": config.head.prototypes, "patches": (config.patch_head or config.head).prototypes}
        self.targets = build_targets(config.targets, prototypes)

    def terms(
        self,
        tokenizer: VisualTokenizer,
        micro_batches: Sequence[PretrainBatch],
        drop_path: Sequence["SslDropPath"],
        context: StepContext,
        *,
        weight: float,
    ) -> Iterator[Term]:
        """Parts of the loss of this rank, each to be back-propagated before the next is asked for."""
        config = self.config
        taught = self._teach(micro_batches)

        def represent(batch: PretrainBatch, number: int) -> Sequence[Tensor]:
            return self._student(tokenizer.trunk, batch, drop_path[number])

        cache = GradientCache(represent, micro_batches)
        seen, local, patches = cache.features  # [B, 2, D], [B, L, D], [M, D]
        own = (seen, patches)
        images = len(seen) * ranks().size
        if config.koleo:
            first, second = (koleo_loss(view, group=config.koleo_group) for view in seen.unbind(1))
            loss, duplicates = first.loss + second.loss, (first.duplicates + second.duplicates) / 2
            logs = {"koleo_loss": loss.detach(), "koleo_duplicates": duplicates}
            yield Term("ssl", weight * config.koleo * loss, logs, own)
        temperature = self.teacher_temperature(context.progress)
        diagnostics = TargetDiagnostics(config.head.prototypes, seen.device)
        potentials = self._potentials(taught, temperature)
        head, teacher_head = self._heads("dino")
        per_image = (4 + local.shape[1]) * config.head.prototypes
        for rows in _chunks(len(seen), per_image):
            targets = target_of(teacher_head.logits(taught.views[rows]), potentials["views"], temperature)
            logits = head(torch.cat([seen[rows], local[rows]], dim=1))
            global_logits, local_logits = logits.split([2, local.shape[1]], dim=1)
            parts = dino_loss(global_logits, local_logits, targets, temperature=config.student_temperature)
            loss = (parts.between_globals + parts.local_to_global) / images
            if context.log_step:
                diagnostics.add(targets)
            yield Term("ssl", weight * loss, {"dino_loss": loss.detach()}, own)
        head, teacher_head = self._heads("ibot")
        weights = torch.cat([batch.mask_weights for batch in micro_batches])
        for rows in _chunks(len(patches), 2 * len(head.directions)):
            targets = target_of(teacher_head.logits(taught.patches[rows]), potentials["patches"], temperature)
            loss = ibot_loss(head(patches[rows]), targets, weights[rows], temperature=config.student_temperature)
            loss = loss / (2 * images)
            yield Term("ssl", weight * loss, {"ibot_loss": loss.detach()}, own)
        if context.log_step:
            yield Term("ssl", None, diagnostics.parts() | {"feature_std": _spread(seen.detach().flatten(0, 1))}, own)
        for surrogate in cache.surrogates():
            yield Term("ssl", surrogate, {}, own)

    @torch.no_grad()
    def after_step(self, tokenizer: VisualTokenizer, progress: float) -> None:
        """Move the teacher and what the targets keep."""
        momentum = self.momentum(progress)
        update_average(self.teacher.trunk, tokenizer.trunk, momentum)
        update_average(self.teacher.heads, self.heads, momentum)
        if self.teacher.visual_proj is not None:
            update_average(self.teacher.visual_proj, tokenizer.visual_proj, momentum)
        self.targets.after_step()

    def momentum(self, progress: float) -> float:
        """Of the teacher, when `progress` is the share of the run behind us."""
        config = self.config.momentum
        if isinstance(config, ConstantMomentum):
            return config.value
        return config.end - (config.end - config.start) * (math.cos(math.pi * progress) + 1) / 2

    def teacher_temperature(self, progress: float) -> float:
        """Linear from start to end over the warm-up, then constant."""
        config = self.config
        share = min(1.0, progress / config.teacher_temperature_warmup) if config.teacher_temperature_warmup else 1.0
        rise = config.teacher_temperature_end - config.teacher_temperature_start
        return config.teacher_temperature_start + share * rise

    def _heads(self, name: str) -> tuple[DinoHead, DinoHead]:
        """Student's and teacher's; iBOT's is DINO's when there is no other."""
        name = name if name in self.heads else "dino"
        student, teacher = self.heads[name], self.teacher.heads[name]
        assert isinstance(student, DinoHead)
        assert isinstance(teacher, DinoHead)
        return student, teacher

    @torch.no_grad()
    def _teach(self, micro_batches: Sequence[PretrainBatch]) -> _HeadInputs:
        """The teacher's embeddings [B, 2, E] and [M, E] of unmasked global views, before the prototypes."""
        (_, view_head), (_, patch_head) = self._heads("dino"), self._heads("ibot")
        parts = []
        for batch in micro_batches:
            views = normalise(batch.global_views)
            features: Features = self.teacher.trunk(views.flatten(0, 1), latent=self.config.features == "latent")
            patches = features.patches.flatten(0, 1)[batch.masked]
            pooled = self._pool(features).unflatten(0, views.shape[:2])
            parts.append(_HeadInputs(view_head.embed(pooled), patch_head.embed(patches)))
        return _HeadInputs(*map(torch.cat, zip(*parts, strict=True)))

    def _student(self, trunk: nn.Module, batch: PretrainBatch, drop_path: "SslDropPath") -> Sequence[Tensor]:
        latent = self.config.features == "latent"
        views, local_views = normalise(batch.global_views), normalise(batch.local_views)
        masks = batch.masks.flatten(0, 1)
        seen: Features = trunk(views.flatten(0, 1), masks, drop_path=drop_path.views, latent=latent)
        pooled = self._pool(seen).unflatten(0, views.shape[:2])
        pooled_local = pooled[:, :0]
        if local_views.shape[1]:
            local: Features = trunk(local_views.flatten(0, 1), drop_path=drop_path.local_views, latent=latent)
            pooled_local = self._pool(local).unflatten(0, local_views.shape[:2])
        return pooled, pooled_local, seen.patches.flatten(0, 1)[batch.masked]

    def _pool(self, features: Features) -> Tensor:
        return features.cls if self.config.pooling == "cls" else features.patches.mean(1)

    @torch.no_grad()
    def _potentials(self, taught: _HeadInputs, temperature: float) -> dict[str, Tensor]:
        """Of views, and of patches where any is masked."""
        sets = {"views": ("dino", taught.views.flatten(0, 1)), "patches": ("ibot", taught.patches)}

        def logits(name: str, embeddings: Tensor) -> Iterator[Tensor]:
            _, head = self._heads(name)
            return (head.logits(embeddings[rows]) for rows in _chunks(len(embeddings), len(head.directions)))

        chunks = {which: partial(logits, *of_set) for which, of_set in sets.items() if len(of_set[1])}
        return self.targets(chunks, temperature)


class SslDropPath(NamedTuple):
    """Of a micro-batch's views: what each residual branch computes, or None for all."""

    views: DropPath | None
    local_views: DropPath | None


def _spread(features: Tensor) -> Tensor:
    """This rank's part of the standard deviation of unit-norm features over the global batch, mean over channels.

    It falls to 0 when features collapse; for features spread evenly over the sphere it is 1 / sqrt(D).
    """
    size = ranks().size
    unit = F.normalize(features.float(), dim=-1)
    mean, square = total(torch.stack([unit.sum(0), unit.square().sum(0)])) / (size * len(unit))
    return (square - mean.square()).clamp_min(0).sqrt().mean() / size


def _chunks(count: int, per_row: int) -> Iterator[slice]:
    """Slices of `count` rows, so that a slice of `per_row` numbers a row stays below the limit."""
    rows = max(1, CHUNK // per_row)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
