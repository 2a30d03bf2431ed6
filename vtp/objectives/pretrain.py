"""The joint pre-training objective: CLIP, self-supervision and reconstruction on one encoder (paper 3.3 to 3.6).

    L = w_rec (L1 + perceptual) + w_clip L_clip + w_ssl (L_dino + L_ibot + koleo)

Each term sees its own share of the batch. The teacher is a moving average of the encoder and the DINO head; it never
sees the text tower or the decoder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from vtp.config import Config
from vtp.data.batches import PretrainBatch
from vtp.draws import torch_draws
from vtp.layers.average import frozen_copy, update_average
from vtp.layers.flops import FROZEN, TRAINING, forward_flops
from vtp.layers.images import denormalise
from vtp.losses.clip import clip_loss
from vtp.losses.dino import TargetsConfig, build_targets, dino_loss, ibot_loss, target_diagnostics
from vtp.losses.koleo import koleo_loss
from vtp.losses.perceptual import PerceptualConfig, PerceptualDistance
from vtp.models.heads import DinoHead, DinoHeadConfig
from vtp.models.tokenizer import VisualTokenizer
from vtp.models.vit import Features

MAX_LOGIT_SCALE = 4.6052  # ln 100, as CLIP clamps it


class WeightsConfig(Config):
    """Weights of the three objectives (paper 3.5: 0.1, 1, 1). Zero switches an objective and its cost off."""

    reconstruction: float = Field(ge=0, description="L1 and perceptual distance")
    clip: float = Field(ge=0, description="image-text contrast")
    ssl: float = Field(ge=0, description="self-distillation and masked image modelling")

    @model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if not self.reconstruction:
            raise ValueError("reconstruction must be above 0: without it there is no decoder, hence no tokenizer")
        return self


class SslConfig(Config):
    """Self-distillation after DINOv2."""

    head: DinoHeadConfig
    targets: TargetsConfig
    student_temperature: float = Field(gt=0)
    teacher_temperature_start: float = Field(gt=0)
    teacher_temperature_end: float = Field(gt=0)
    teacher_temperature_warmup: float = Field(ge=0, le=1, description="share of the run from start to end")
    momentum: float = Field(ge=0, le=1, description="of the teacher, constant: see docs/decisions.md")
    koleo: float = Field(ge=0, description="weight of the KoLeo spread of class tokens")


class DropPathConfig(Config):
    """Share of the samples that each residual branch leaves out, per objective (stochastic depth)."""

    clip: float = Field(ge=0, lt=1)
    ssl: float = Field(ge=0, lt=1)
    reconstruction: float = Field(ge=0, lt=1)


class PretrainObjectiveConfig(Config):
    """The loss."""

    weights: WeightsConfig
    perceptual: PerceptualConfig
    perceptual_weight: float = Field(ge=0, description="of the perceptual distance beside L1 (paper eq. 1: 1)")
    ssl: SslConfig
    drop_path: DropPathConfig


Part = Literal["clip", "ssl", "reconstruction"]
Term = tuple[Tensor, dict[str, Tensor]]  # a loss, and the scalars to log


class PretrainObjective(nn.Module):
    """One phase; its losses come in the order clip, ssl, reconstruction."""

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        config: PretrainObjectiveConfig,
        *,
        perceptual: PerceptualDistance,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.tokenizer = tokenizer
        self._perceptual = [perceptual]  # in a list: frozen, so no part of the state
        self._terms: dict[Part, Callable[[PretrainBatch, int, float], Term]] = {}
        if config.weights.clip:
            self._terms["clip"] = self._clip
        if config.weights.ssl:
            vision = tokenizer.config.vision
            width = vision.embed_dim if vision.bottleneck_ae_only else vision.feature_bottleneck
            self.head = DinoHead(width, config.ssl.head)
            self.teacher = frozen_copy(tokenizer.trunk)
            self.teacher_head = frozen_copy(self.head)
            self.cls_targets = build_targets(config.ssl.targets, config.ssl.head.prototypes)
            self.patch_targets = build_targets(config.ssl.targets, config.ssl.head.prototypes)
            self._terms["ssl"] = self._ssl
        self._terms["reconstruction"] = self._reconstruction

    def phases(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"model": [self.tokenizer, *([self.head] if self.config.weights.ssl else [])]}

    def losses(self, phase: str, batch: PretrainBatch, step: int, progress: float) -> Iterator[Term]:
        assert phase == "model"
        for name, term in self._terms.items():
            loss, logs = term(batch, step, progress)
            yield getattr(self.config.weights, name) * loss, {f"{name}_loss": loss.detach(), **logs}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher; clamp the logit scale."""
        if self.config.weights.clip:
            self.tokenizer.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if self.config.weights.ssl:
            update_average(self.teacher, self.tokenizer.trunk, self.config.ssl.momentum)
            update_average(self.teacher_head, self.head, self.config.ssl.momentum)

    def teacher_temperature(self, progress: float) -> float:
        """Linear from start to end over the warm-up, then constant; `progress` is the share of the run behind us."""
        config = self.config.ssl
        share = min(1.0, progress / config.teacher_temperature_warmup) if config.teacher_temperature_warmup else 1.0
        rise = config.teacher_temperature_end - config.teacher_temperature_start
        return config.teacher_temperature_start + share * rise

    def step_flops(self, batch: PretrainBatch) -> float:
        """Training FLOPs of one step: matrix products of models and perceptual network, not of the losses."""
        flops, trunk = 0.0, self.tokenizer.trunk
        if "clip" in self._terms:
            flops += TRAINING * forward_flops(trunk, batch.clip_images)
            flops += TRAINING * forward_flops(self.tokenizer.text, batch.tokens)
        if "ssl" in self._terms:
            views, local_views = batch.global_views.flatten(0, 1), batch.local_views.flatten(0, 1)
            seen, masked = forward_flops(trunk, views), int(batch.masks.sum())
            width = self.head.in_dim
            of_teacher = forward_flops(self.head, torch.empty(len(views) + masked, width))
            of_student = forward_flops(self.head, torch.empty(len(views) + masked + len(local_views), width))
            flops += seen + of_teacher + TRAINING * (seen + forward_flops(trunk, local_views) + of_student)
        images = batch.rec_images
        flops += TRAINING * (
            forward_flops(trunk, images) + forward_flops(self.tokenizer.pixel_decoder, self._latents(images))
        )
        # The perceptual network sees target and reconstruction, and passes gradients through the latter only.
        return flops + (1 + FROZEN) / 2 * forward_flops(self._perceptual[0].network, images, images)

    def _latents(self, images: Tensor) -> Tensor:
        patch_size = self.tokenizer.config.vision.patch_size
        height, width = images.shape[2] // patch_size, images.shape[3] // patch_size
        return torch.empty(len(images), self.tokenizer.config.vision.feature_bottleneck, height, width)

    def _clip(self, batch: PretrainBatch, step: int, progress: float) -> Term:
        images = batch.clip_images
        keep = self._keep("clip", images.shape[0], step)
        image_embedding = self.tokenizer.project_image(self.tokenizer.trunk(images, keep=keep))
        text_embedding = self.tokenizer.encode_text(batch.tokens)
        scale = self.tokenizer.logit_scale.exp()
        loss = clip_loss(image_embedding, text_embedding, scale)
        return loss, {"logit_scale": scale.detach()}

    def _ssl(self, batch: PretrainBatch, step: int, progress: float) -> Term:
        config = self.config.ssl
        targets, patch_targets = self._teach(batch, self.teacher_temperature(progress))
        views, masks = batch.global_views.flatten(0, 1), batch.masks
        local_views = batch.local_views.flatten(0, 1)
        student = self.tokenizer.trunk
        seen = self._ssl_features(student, views, masks, self._keep("ssl", views.shape[0], step))
        local = self._ssl_features(student, local_views, None, self._keep("ssl", local_views.shape[0], step, 1))
        count, masked = views.shape[0], seen.patches[masks]
        # One pass through the head, the widest product of the step.
        logits = self.head(torch.cat([seen.cls, local.cls, masked]))
        of_global, of_local, of_masked = logits.split([count, local.cls.shape[0], masked.shape[0]])
        dino = dino_loss(
            of_global.unflatten(0, (2, -1)),
            of_local.unflatten(0, (batch.local_views.shape[0], -1)),
            targets.unflatten(0, (2, -1)),
            temperature=config.student_temperature,
        )
        ibot = ibot_loss(of_masked, patch_targets, masks, temperature=config.student_temperature)
        loss = dino.between_globals + dino.local_to_global + ibot
        logs = {"dino_loss": (dino.between_globals + dino.local_to_global).detach(), "ibot_loss": ibot.detach()}
        if config.koleo:
            koleo = sum((koleo_loss(view) for view in seen.cls.chunk(2)), start=loss.new_zeros(()))
            loss = loss + config.koleo * koleo
            logs["koleo_loss"] = koleo.detach()
        diagnostics = target_diagnostics(targets)
        return loss, logs | {"teacher_entropy": diagnostics.entropy, "teacher_kl_to_uniform": diagnostics.kl_to_uniform}

    @torch.no_grad()
    def _teach(self, batch: PretrainBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Targets for the class tokens [2 * B_ssl, K] and the masked patches [M, K]."""
        seen = self._ssl_features(self.teacher, batch.global_views.flatten(0, 1), None, None)
        masked = seen.patches[batch.masks]
        logits = self.teacher_head(torch.cat([seen.cls, masked]))
        of_cls, of_masked = logits.split([seen.cls.shape[0], masked.shape[0]])
        return self.cls_targets(of_cls, temperature), self.patch_targets(of_masked, temperature)

    def _ssl_features(self, trunk: nn.Module, images: Tensor, masks: Tensor | None, keep: Tensor | None) -> Features:
        features: Features = trunk(images, masks, keep=keep)
        if self.tokenizer.config.vision.bottleneck_ae_only:
            return features
        bottleneck: Any = trunk.feature_bottleneck
        return Features(bottleneck(features.cls), bottleneck(features.patches))

    def _reconstruction(self, batch: PretrainBatch, step: int, progress: float) -> Term:
        images = batch.rec_images
        keep = self._keep("reconstruction", images.shape[0], step)
        reconstructions = self.tokenizer.decode(self.tokenizer.encode(images, keep=keep))
        distance = reconstruction_distance(self._perceptual[0], reconstructions, images)
        return distance.l1 + self.config.perceptual_weight * distance.perceptual, {
            "l1": distance.l1.detach(),
            "perceptual": distance.perceptual.detach(),
        }

    def _keep(self, term: Part, batch_size: int, step: int, part: int = 0) -> Tensor | None:
        """Samples [depth, 2, K] that each residual branch computes; None for all."""
        rate = getattr(self.config.drop_path, term)
        if not rate or not batch_size:
            return None
        kept = max(1, int(batch_size * (1 - rate)))
        draws = torch_draws(self.seed, f"drop_path/{term}", step, part)
        depth = self.tokenizer.config.vision.depth
        noise = torch.rand(depth, 2, batch_size, generator=draws)
        keep = noise.argsort(-1)[..., :kept]
        return keep.to(self.tokenizer.trunk.cls_token.device, non_blocking=True)


class Distance(NamedTuple):
    """Batch means."""

    l1: Tensor
    perceptual: Tensor


def reconstruction_distance(perceptual: PerceptualDistance, reconstructions: Tensor, images: Tensor) -> Distance:
    """L1 in ImageNet-normalised space and the perceptual distance in [-1, 1], both in float32 (paper eq. 1)."""
    reconstructions, images = reconstructions.float(), images.float()
    distance = perceptual(denormalise(reconstructions) * 2 - 1, denormalise(images) * 2 - 1)
    return Distance(F.l1_loss(reconstructions, images), distance.mean())
