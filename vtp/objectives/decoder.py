"""Tuning of the pixel decoder; encoder and bottleneck stay as they are (paper 3.2, second stage).

L1 and a perceptual distance, with an adversary if there is one (`vtp.objectives.adversary`), and an averaged decoder.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp.config import Config
from vtp.data.batches import ImageBatch
from vtp.device import send
from vtp.distributed import ranks
from vtp.draws import torch_draws
from vtp.layers.average import EMA_WARMUP, frozen_copy, update_average, warm_momentum
from vtp.layers.block import Block, Blocks
from vtp.layers.flops import FROZEN, TRAINING, forward_flops
from vtp.layers.images import normalise
from vtp.losses.perceptual import PerceptualConfig, PerceptualDistance
from vtp.losses.reconstruction import L1Space, reconstruction_distance
from vtp.models.base import Encoding, Tokenizer
from vtp.objectives.adversary import DISCRIMINATOR, Adversary, ReconstructionStep
from vtp.step import Logs, ParameterGroup, StepContext, StepCost, Term, hidden_matrices


class LatentNoiseConfig(Config):
    """Gaussian noise on the latents in training, after RAE: a generator's samples are not exact latents either."""

    std: float = Field(
        ge=0, description="each sample's noise is uniform below this, in standard deviations of the channel; 0: none"
    )
    samples: int = Field(ge=2, description="training images behind the standard deviations")


class DecoderObjectiveConfig(Config):
    """The loss of the second stage, without the adversary."""

    l1_space: L1Space = Field(
        description="where L1 is taken: ImageNet-normalised pixels, `unit` in [-1, 1], or `pixels` in [0, 1] (RAE)"
    )
    perceptual: PerceptualConfig
    perceptual_weight: float = Field(ge=0, description="weight of the perceptual distance beside L1")
    noise: LatentNoiseConfig
    ema: float = Field(ge=0, lt=1, description="momentum of the averaged decoder, which is the result")
    ema_warmup: bool = Field(description=EMA_WARMUP)


class DecoderObjective(nn.Module):
    """Two phases within a step: the decoder, then the discriminator. A term is this rank's part of the global batch's loss.

    `channel_std` [d] scales the noise on latents and is not needed without.
    """

    _noise: Tensor | None

    def __init__(
        self,
        tokenizer: Tokenizer,
        adversary: Adversary | None,
        config: DecoderObjectiveConfig,
        *,
        perceptual: PerceptualDistance,
        channel_std: Tensor | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self._frozen = _Frozen(tokenizer.eval(), perceptual)  # in a tuple: no part of the state
        noise = config.noise.std * channel_std[:, None, None] if channel_std is not None else None
        self.register_buffer("_noise", noise, persistent=False)
        self.decoder: nn.Module = tokenizer.pixel_decoder
        self.average = frozen_copy(self.decoder)
        self.adversary = adversary

    @property
    def perceptual(self) -> PerceptualDistance:
        """The frozen network of the perceptual distance."""
        return self._frozen.perceptual

    def phases(self) -> dict[str, Sequence[ParameterGroup]]:
        hidden = hidden_matrices(module for module in self.decoder.modules() if isinstance(module, Block))
        group = ParameterGroup(list(self.decoder.parameters()), hidden=hidden)
        phases: dict[str, Sequence[ParameterGroup]] = {"decoder": [group]}
        return phases | (self.adversary.phases() if self.adversary else {})

    def shared_parameters(self) -> Sequence[nn.Parameter]:
        return ()

    def compiled_units(self) -> Iterator[nn.Module]:
        """What is compiled, one by one: the blocks of encoder and decoder."""
        for part in (self._frozen.tokenizer, self.average):
            yield from (module for module in part.modules() if isinstance(module, Block))

    def recompute(self) -> None:
        """Keep no activations inside of the decoder's blocks; the backward pass computes them again."""
        for module in self.decoder.modules():
            if isinstance(module, Blocks):
                module.recompute = True

    def sharded_units(self) -> Iterator[Sequence[nn.Module]]:
        """None: weights stay whole."""
        return iter(())

    def terms(self, phase: str, micro_batches: Sequence[ImageBatch], context: StepContext) -> Iterator[Term]:
        if phase == DISCRIMINATOR:
            assert self.adversary is not None
            yield from self.adversary.discriminator_terms(context)
            return
        step = self._reconstruction_step(micro_batches, context)
        if self.adversary is not None:
            yield from self.adversary.terms("decoder", step, context)
            return
        for number in range(step.micro_batches):
            reconstructions = step.reconstruct(number)
            loss, logs = step.loss(number, reconstructions)
            yield Term("decoder", loss, logs, (reconstructions,), number == step.micro_batches - 1)

    def after_step(self, context: StepContext) -> Logs:
        """Move the averaged decoder."""
        momentum = warm_momentum(self.config.ema, context.step) if self.config.ema_warmup else self.config.ema
        update_average(self.average, self.decoder, momentum)
        if self.adversary is not None:
            self.adversary.after_step(context)
        return {}

    def step_cost(self, batch_size: int) -> StepCost:
        """Training FLOPs of a step of `batch_size` images, with all parts at work."""
        tokenizer, perceptual = self._frozen
        image = torch.empty(1, 3, tokenizer.image_size, tokenizer.image_size)
        latent = torch.empty(1, *tokenizer.latent_shape)
        of_decoder = forward_flops(self.decoder, latent)
        flops = forward_flops(Encoding(tokenizer), image) + TRAINING * of_decoder
        flops += (1 + FROZEN) / 2 * forward_flops(perceptual.network, image, image)
        if self.adversary is not None:
            flops += self.adversary.step_flops(tokenizer.image_size)
            flops += of_decoder if self._noise is not None else 0.0  # the discriminator's fakes have none
        _, height, width = tokenizer.latent_shape
        return StepCost(flops * batch_size, {"decoder": batch_size}, batch_size * height * width)

    def _reconstruction_step(self, micro_batches: Sequence[ImageBatch], context: StepContext) -> ReconstructionStep:
        tokenizer, perceptual = self._frozen
        count = len(micro_batches)
        parts = count * ranks().size
        images = [normalise(batch.images) for batch in micro_batches]
        with torch.no_grad():
            latents = [tokenizer.encode(batch) for batch in images]

        def reconstruct(number: int) -> Tensor:
            return self.decoder(self._noisy(latents[number], context.step, number, count))

        def loss(number: int, pixels: Tensor) -> tuple[Tensor, Logs]:
            distance = reconstruction_distance(perceptual, pixels, images[number], l1_space=self.config.l1_space)
            l1, of_features = distance.l1 / parts, distance.perceptual / parts
            logs = {"l1": l1.detach(), "perceptual": of_features.detach()}
            logs["replaced_samples"] = micro_batches[number].replaced.sum()
            return l1 + self.config.perceptual_weight * of_features, logs

        last_layer: Tensor = tokenizer.last_layer.weight  # pyright: ignore[reportAssignmentType]
        clean = None if self._noise is None else lambda number: self.decoder(latents[number])
        return ReconstructionStep(count, images.__getitem__, reconstruct, loss, last_layer, clean)

    def _noisy(self, latents: Tensor, step: int, number: int, count: int) -> Tensor:
        """Latents with noise, which belongs to a sample's place in the global batch."""
        if self._noise is None:
            return latents
        first = (ranks().rank * count + number) * len(latents)
        noise = []
        for index in range(first, first + len(latents)):
            draws = torch_draws(self.seed, "latent_noise", step, index)
            noise.append(torch.rand(1, 1, 1, generator=draws) * torch.randn(latents.shape[1:], generator=draws))
        return latents + send(torch.stack(noise).to(latents.dtype), latents.device) * self._noise.to(latents.dtype)


class _Frozen(NamedTuple):
    """What is used and not trained."""

    tokenizer: Tokenizer
    perceptual: PerceptualDistance
