"""The joint pre-training objective: CLIP, self-supervision and reconstruction on one encoder (paper 3.3 to 3.6).

    L = w_clip L_clip + w_ssl (L_dino + L_ibot + koleo) + w_rec (L1 + perceptual + kl)

Each objective sees its own share of the batch and is back-propagated before the next begins, so the step's memory is
that of the largest and not of the sum. A term is this rank's part of the loss of the global batch. Such a step as one
would first write it, with one sum and one backward pass, is `PlainStep` in `benchmarks/_plain.py`.

A convolutional tokenizer learns by reconstruction alone; `kl` is of its posterior, and 0 for a ViT, which has none.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vtp.config import Config
from vtp.data.pretrain_batches import PretrainBatch
from vtp.device import send
from vtp.distributed import ranks
from vtp.draws import torch_draws
from vtp.layers.drop_path import DropPath, draw_drop_path
from vtp.layers.images import normalise
from vtp.losses.clip import ContrastConfig, clip_loss, siglip_loss
from vtp.losses.kl import kl_divergence
from vtp.losses.perceptual import PerceptualConfig, PerceptualDistance
from vtp.losses.reconstruction import L1Space, reconstruction_distance
from vtp.models.base import TrainableTokenizer
from vtp.models.diffusers_vae import DiffusersVae, Posterior
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.adversary import DISCRIMINATOR, Adversary, ReconstructionStep
from vtp.objectives.gradient_cache import GradientCache
from vtp.objectives.rates import RatesConfig, groups
from vtp.objectives.self_distillation import SelfDistillation, SslConfig, SslDropPath
from vtp.step import UNINFORMED, Logs, ParameterGroup, StepContext, Term

MAX_LOGIT_SCALE = 4.6052  # ln 100, as CLIP clamps it


class WeightsConfig(Config):
    """Weights of the three objectives (paper 3.5: 0.1, 1, 1). Zero switches an objective and its cost off."""

    reconstruction: float = Field(
        ge=0,
        description="weight of L1 and perceptual distance together; 0 switches them and their cost off, and leaves the "
        "decoder to tune_decoder, as RAE does",
    )
    clip: float = Field(ge=0, description="weight of the image-text contrast; 0 switches it and its cost off")
    ssl: float = Field(
        ge=0, description="weight of self-distillation and masked image modelling; 0 switches them and their cost off"
    )

    @model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if not (self.reconstruction or self.clip or self.ssl):
            raise ValueError(
                "reconstruction, clip and ssl are all 0: nothing is left to train; give one of them a weight"
            )
        return self


class ReconstructionConfig(Config):
    """L1 and a perceptual distance (paper eq. 1: 1 and 1), and the divergence of a posterior."""

    l1_space: L1Space = Field(
        description="where L1 is taken: ImageNet-normalised pixels, `unit` in [-1, 1], or `pixels` in [0, 1] (RAE)"
    )
    perceptual: PerceptualConfig
    perceptual_weight: float = Field(ge=0, description="weight of the perceptual distance beside L1")
    kl: float = Field(
        ge=0,
        description="weight beside L1 of the divergence from N(0, 1), a mean over latent numbers, of a convolutional "
        "tokenizer's posterior, which the decoder then sees samples of; 0: it sees means",
    )


class DropPathConfig(Config):
    """Share of the samples that each residual branch leaves out, per objective (stochastic depth)."""

    clip: float = Field(ge=0, lt=1, description="share of samples that a residual branch leaves out under CLIP")
    ssl: float = Field(
        ge=0,
        lt=1,
        description="share of samples that a residual branch leaves out under self-supervision, in the student",
    )
    reconstruction: float = Field(
        ge=0, lt=1, description="share of samples that a residual branch leaves out under reconstruction"
    )


class PretrainObjectiveConfig(Config):
    """The loss."""

    weights: WeightsConfig
    contrast: ContrastConfig
    ssl: SslConfig
    reconstruction: ReconstructionConfig
    drop_path: DropPathConfig


class PretrainObjective(nn.Module):
    """One phase; its terms come in the order clip, ssl, reconstruction. An adversary adds a phase for its discriminator."""

    def __init__(
        self,
        tokenizer: TrainableTokenizer,
        config: PretrainObjectiveConfig,
        rates: RatesConfig,
        *,
        perceptual: PerceptualDistance,
        seed: int,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.rates = rates
        self.seed = seed
        self.tokenizer = tokenizer
        self.adversary = adversary  # the paper has none: it keeps adversarial gradients out of pre-training
        self._perceptual = [perceptual]  # in a list: frozen, so no part of the state
        self.ssl = SelfDistillation(self.vit, config.ssl) if config.weights.ssl else None
        if not config.weights.reconstruction:
            tokenizer.pixel_decoder.requires_grad_(False)

    @property
    def vit(self) -> VisualTokenizer:
        """The tokenizer where features and captions take part."""
        assert isinstance(self.tokenizer, VisualTokenizer)
        return self.tokenizer

    def phases(self) -> dict[str, Sequence[ParameterGroup]]:
        model = list(groups(self.tokenizer, self.ssl and self.ssl.heads, self.rates))
        phases: dict[str, Sequence[ParameterGroup]] = {"model": model}
        return phases | (self.adversary.phases() if self.adversary else {})

    def shared_parameters(self) -> Sequence[nn.Parameter]:
        """The parameters that all objectives share, whose gradients are compared."""
        return [parameter for block in self.tokenizer.encoder_layers().blocks for parameter in block.parameters()]

    def sharded_units(self) -> Iterator[Sequence[nn.Module]]:
        """What FSDP gathers together, parts first; the rest is small and stays replicated."""
        yield from self.tokenizer.sharded_units()
        if self.ssl is not None:
            yield [*self.ssl.teacher.trunk.blocks, self.ssl.teacher.trunk]

    def compiled_units(self) -> Iterator[nn.Module]:
        """What is compiled, one by one."""
        yield from self.tokenizer.blocks()
        if self.ssl is not None:
            yield from self.ssl.teacher.trunk.blocks

    def recompute(self) -> None:
        """Keep no activations inside of blocks; the backward pass computes them again."""
        self.tokenizer.recompute()

    def terms(self, phase: str, micro_batches: Sequence[PretrainBatch], context: StepContext) -> Iterator[Term]:
        """The joint loss of a step. No line adds it up: the loop back-propagates every term before it asks for the next."""
        if phase == DISCRIMINATOR:
            assert self.adversary is not None
            yield from self.adversary.discriminator_terms(context)
            return
        if self.config.weights.clip:
            yield from self._clip(micro_batches, context)
        if self.ssl is not None:
            drop_path = [
                self._ssl_drop_path(batch, number, len(micro_batches), context.step)
                for number, batch in enumerate(micro_batches)
            ]
            weight = self.config.weights.ssl
            yield from self.ssl.terms(self.vit, micro_batches, drop_path, context, weight=weight)
        if self.adversary is not None:
            step = self._reconstruction_step(micro_batches, context)
            yield from self.adversary.terms("reconstruction", step, context, apart=context.log_step)
        elif self.config.weights.reconstruction:
            yield from self._reconstruction(micro_batches, context)
        else:
            yield Term("data", None, {"replaced_samples": sum(batch.replaced.sum() for batch in micro_batches)}, ())

    @torch.no_grad()
    def after_step(self, context: StepContext) -> Logs:
        """Move the teacher; clamp the logit scale."""
        logs: dict[str, Tensor | float] = {}
        if self.config.weights.clip:
            self.vit.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            logs["logit_scale"] = self.vit.logit_scale.exp()
        if self.ssl is not None:
            self.ssl.after_step(self.vit, context.progress)
            logs["teacher_temperature"] = self.ssl.teacher_temperature(context.progress)
            logs["teacher_momentum"] = self.ssl.momentum(context.progress)
            logs[f"dino_loss{UNINFORMED}"] = math.log(self.config.ssl.head.prototypes)
        if self.adversary is not None:
            self.adversary.after_step(context)
        return logs

    def _clip(self, micro_batches: Sequence[PretrainBatch], context: StepContext) -> Iterator[Term]:
        tokenizer = self.vit

        def represent(batch: PretrainBatch, number: int) -> Sequence[Tensor]:
            images, place = normalise(batch.clip_images), (number, len(micro_batches), context.step)
            drop_path = self._drop_path("clip", batch, len(images), *place)
            return tokenizer.encode_image(images, drop_path=drop_path), tokenizer.encode_text(batch.tokens)

        cache = GradientCache(represent, micro_batches)
        image, text = cache.features
        if self.config.contrast.name == "softmax":
            loss = clip_loss(image, text, tokenizer.logit_scale.exp())
        else:
            loss = siglip_loss(image, text, tokenizer.logit_scale.exp(), tokenizer.logit_bias)
        logs: dict[str, Tensor | float] = {"clip_loss": loss.detach()}
        if self.config.contrast.name == "softmax":
            logs[f"clip_loss{UNINFORMED}"] = math.log(ranks().size * len(image)) / ranks().size
        yield Term("clip", self.config.weights.clip * loss, logs, (image, text))
        for surrogate in cache.surrogates():
            yield Term("clip", surrogate, {}, (image, text))

    def _reconstruction(self, micro_batches: Sequence[PretrainBatch], context: StepContext) -> Iterator[Term]:
        for number, batch in enumerate(micro_batches):
            images, place = normalise(batch.rec_images), (number, len(micro_batches), context.step)
            if self.config.reconstruction.kl:
                reconstructions, posterior = self._reconstruct_a_sample(images, *place)
            else:
                reconstructions, posterior = self._reconstruct(batch, images, *place), None
            loss, logs = self._reconstruction_loss(batch, images, reconstructions, len(micro_batches))
            if posterior is not None:
                divergence = kl_divergence(*posterior) / (len(micro_batches) * ranks().size)
                loss = loss + self.config.weights.reconstruction * self.config.reconstruction.kl * divergence
                logs = {**logs, "kl": divergence.detach()}
            yield Term("reconstruction", loss, logs, (reconstructions,), number == len(micro_batches) - 1)

    def _reconstruction_step(self, micro_batches: Sequence[PretrainBatch], context: StepContext) -> ReconstructionStep:
        """The same as the adversary needs it: piece by piece."""
        images, count = [normalise(batch.rec_images) for batch in micro_batches], len(micro_batches)
        last_layer: Any = self.tokenizer.last_layer
        return ReconstructionStep(
            count,
            images.__getitem__,
            lambda number: self._reconstruct(micro_batches[number], images[number], number, count, context.step),
            lambda number, pixels: self._reconstruction_loss(micro_batches[number], images[number], pixels, count),
            last_layer.weight,
        )

    def _reconstruct(self, batch: PretrainBatch, images: Tensor, number: int, count: int, step: int) -> Tensor:
        drop_path = self._drop_path("reconstruction", batch, len(images), number, count, step)
        if drop_path is None:
            return self.tokenizer.decode(self.tokenizer.encode(images, grad=True), grad=True)
        return self.vit.decode(self.vit.encode(images, grad=True, drop_path=drop_path), grad=True)

    def _reconstruct_a_sample(self, images: Tensor, number: int, count: int, step: int) -> tuple[Tensor, Posterior]:
        """What the decoder makes of latents drawn from the posterior; what is drawn belongs to the place in the batch."""
        assert isinstance(self.tokenizer, DiffusersVae)
        posterior = self.tokenizer.posterior(images, grad=True)
        first, shape = (ranks().rank * count + number) * len(images), posterior.mean.shape[1:]
        draws = [torch_draws(self.seed, "posterior", step, first + index) for index in range(len(images))]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in draws])
        noise = send(noise.to(posterior.mean.dtype), posterior.mean.device)
        latents = posterior.mean + (posterior.log_variance / 2).exp() * noise
        return self.tokenizer.decode(latents, grad=True), posterior

    def _reconstruction_loss(
        self, batch: PretrainBatch, images: Tensor, reconstructions: Tensor, count: int
    ) -> tuple[Tensor, Logs]:
        """This rank's part, of one of `count` micro-batches, and its scalars."""
        config, parts = self.config.reconstruction, count * ranks().size
        distance = reconstruction_distance(self._perceptual[0], reconstructions, images, l1_space=config.l1_space)
        l1, perceptual = distance.l1 / parts, distance.perceptual / parts
        logs = {"l1": l1.detach(), "perceptual": perceptual.detach(), "replaced_samples": batch.replaced.sum()}
        return self.config.weights.reconstruction * (l1 + config.perceptual_weight * perceptual), logs

    def _ssl_drop_path(self, batch: PretrainBatch, number: int, count: int, step: int) -> SslDropPath:
        samples, place = len(batch.global_views), (number, count, step)
        views = self._drop_path("ssl", batch, 2 * samples, *place)
        local_views = self._drop_path("ssl", batch, batch.local_views.shape[1] * samples, *place, part=1)
        return SslDropPath(views, local_views)

    def _drop_path(
        self, objective: str, batch: PretrainBatch, crops: int, number: int, count: int, step: int, *, part: int = 0
    ) -> DropPath | None:
        """Of micro-batch `number` of `count`, which has so many `crops`; see `vtp.layers.drop_path`."""
        blocks = len(batch.replaced)
        first = (ranks().rank * count + number) * blocks
        drawn = draw_drop_path(
            getattr(self.config.drop_path, objective),
            crops=crops // blocks,
            blocks=range(first, first + blocks),
            depth=self.tokenizer.num_blocks,
            draws=partial(torch_draws, self.seed, f"drop_path/{objective}", step, part),
        )
        return drawn and drawn.to(batch.rec_images.device)
