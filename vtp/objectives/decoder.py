"""Adversarial tuning of the pixel decoder; encoder and bottleneck stay as they are (paper 3.2, second stage).

The paper names no discriminator, weights or schedule; this follows the best-documented recipe, RAE's: hinge loss,
adaptive weight, a head start for the discriminator, differentiable augmentation, an averaged decoder.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vtp.config import Config
from vtp.data.batches import ImageBatch
from vtp.draws import torch_draws
from vtp.layers.average import frozen_copy, update_average, warm_momentum
from vtp.layers.flops import FROZEN, TRAINING, forward_flops
from vtp.layers.images import denormalise, normalise
from vtp.losses.gan import adaptive_weight, discriminator_loss, generator_loss
from vtp.losses.perceptual import PerceptualConfig, PerceptualDistance
from vtp.models.discriminator import AugmentationConfig, PatchDiscriminator, augment, draw_augmentation
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.pretrain import reconstruction_distance
from vtp.step import Logs, Moment, ParameterGroup, StepCost, Term


class DecoderObjectiveConfig(Config):
    """The loss of the second stage."""

    perceptual: PerceptualConfig
    perceptual_weight: float = Field(ge=0)
    adversarial_weight: float = Field(ge=0, description="times the adaptive weight; 0 tunes without a discriminator")
    max_adaptive_weight: float = Field(gt=0)
    critic_start: float = Field(ge=0, le=1, description="share of the run after which the discriminator trains")
    adversarial_start: float = Field(ge=0, le=1, description="share of the run after which the decoder sees it")
    augmentation: AugmentationConfig
    ema: float = Field(ge=0, lt=1, description="momentum of the averaged decoder, which is the result")

    @model_validator(mode="after")
    def _head_start(self) -> Self:
        if self.adversarial_start < self.critic_start:
            raise ValueError("adversarial_start is before critic_start: the decoder would follow an untrained critic")
        return self


class DecoderObjective(nn.Module):
    """Two phases within a step: the decoder, then the critic on the decoder's output rounded to 8 bits."""

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        critic: PatchDiscriminator,
        config: DecoderObjectiveConfig,
        *,
        perceptual: PerceptualDistance,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self._frozen = (tokenizer, perceptual)  # in a tuple: no part of the state
        self.decoder = tokenizer.pixel_decoder
        self.average = frozen_copy(self.decoder)
        self.critic = critic
        self._pair: tuple[Tensor, Tensor] | None = None

    def phases(self) -> Mapping[str, Sequence[ParameterGroup]]:
        adversarial = {"critic": [ParameterGroup(list(self.critic.parameters()))]}
        return {
            "decoder": [ParameterGroup(list(self.decoder.parameters()))],
            **(adversarial if self.config.adversarial_weight else {}),
        }

    def watched(self) -> Sequence[nn.Parameter]:
        return ()

    def terms(self, phase: str, micros: Sequence[ImageBatch], moment: Moment) -> Iterator[Term]:
        (batch,) = micros
        yield from self._decoder(batch, moment) if phase == "decoder" else self._critic(moment)

    def after_step(self, moment: Moment) -> Logs:
        """Move the averaged decoder."""
        update_average(self.average, self.decoder, warm_momentum(self.config.ema, moment.step))
        return {}

    def step_cost(self, batch: ImageBatch) -> StepCost:
        """Training FLOPs of a step with both phases at work."""
        tokenizer, perceptual = self._frozen
        images = batch.images.float()
        height, width = (size // tokenizer.config.vision.patch_size for size in images.shape[2:])
        latents = torch.empty(len(images), tokenizer.config.vision.feature_bottleneck, height, width)
        flops = forward_flops(tokenizer.trunk, images) + TRAINING * forward_flops(self.decoder, latents)
        flops += (1 + FROZEN) / 2 * forward_flops(perceptual.network, images, images)
        if self.config.adversarial_weight:
            flops += (FROZEN + 2 * TRAINING) * forward_flops(self.critic, images)
        return StepCost(flops, {"decoder": len(images)}, len(images) * height * width)

    def _decoder(self, batch: ImageBatch, moment: Moment) -> Iterator[Term]:
        tokenizer, perceptual = self._frozen
        images = normalise(batch.images)
        with torch.no_grad():
            latents = tokenizer.encode(images)
        reconstructions = self.decoder(latents)
        distance = reconstruction_distance(perceptual, reconstructions, images)
        loss = distance.l1 + self.config.perceptual_weight * distance.perceptual
        logs = {"l1": distance.l1.detach(), "perceptual": distance.perceptual.detach()}
        fake, real = denormalise(reconstructions.float()) * 2 - 1, denormalise(images) * 2 - 1
        if self._started(self.config.adversarial_start, moment):
            self.critic.requires_grad_(False)
            adversarial = generator_loss(self.critic(self._augment(fake, "decoder", moment.step)))
            self.critic.requires_grad_(True)
            weight = adaptive_weight(
                loss, adversarial, self.decoder.proj_out.weight, ceiling=self.config.max_adaptive_weight
            )
            loss = loss + self.config.adversarial_weight * weight * adversarial
            logs |= {"adversarial": adversarial.detach(), "adaptive_weight": weight}
        self._pair = (real, to_8_bits(fake.detach()))
        yield Term("decoder", loss, logs, (reconstructions,))

    def _critic(self, moment: Moment) -> Iterator[Term]:
        assert self._pair is not None
        real, fake = self._pair
        if not self._started(self.config.critic_start, moment):
            return
        of_real = self.critic(self._augment(real, "real", moment.step))
        of_fake = self.critic(self._augment(fake, "fake", moment.step))
        loss = discriminator_loss(of_real, of_fake)
        accuracy = ((of_real > 0).float().mean() + (of_fake < 0).float().mean()) / 2
        yield Term("critic", loss, {"critic_loss": loss.detach(), "critic_accuracy": accuracy}, (fake,))

    def _augment(self, images: Tensor, purpose: str, step: int) -> Tensor:
        draws = torch_draws(self.seed, f"augmentation/{purpose}", step)
        return augment(images, draw_augmentation(images.shape, self.config.augmentation, draws))

    def _started(self, share: float, moment: Moment) -> bool:
        return bool(self.config.adversarial_weight) and moment.progress >= share


def to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] as a file would hold them: the critic must not tell fakes by their fractions."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
