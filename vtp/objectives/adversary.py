"""A critic against a decoder: the adversarial half of decoder tuning, and of pre-training when it is joint (paper 3.2).

The paper names no discriminator, weights or schedule; this follows the best-documented recipe, RAE's (Zheng et al. 2025):
hinge loss, adaptive weight, a head start for the critic, differentiable augmentation, fakes as 8-bit images.

Losses are differentiated down to the pixels once, and from there on together. The adaptive weight compares the two
gradients at the decoder's last layer, which pixels reach in one step; so neither the perceptual network nor the critic is
differentiated twice, and the weight is that of the global batch, whatever its split into ranks and micro-batches.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vtp.config import Config
from vtp.distributed import ranks, total
from vtp.draws import torch_draws
from vtp.layers.augment import AugmentationConfig, augment, draw_augmentation
from vtp.layers.flops import FROZEN, TRAINING
from vtp.layers.images import denormalise
from vtp.losses.gan import balance, discriminator_loss, generator_loss
from vtp.models.discriminator import Critic
from vtp.step import Logs, Moment, Term


class AdversaryLossConfig(Config):
    """The adversarial term and its schedule."""

    weight: float = Field(gt=0, description="of the adversarial term, times the adaptive weight")
    max_adaptive_weight: float = Field(gt=0)
    critic_start: float = Field(ge=0, le=1, description="share of the run after which the critic trains")
    start: float = Field(ge=0, le=1, description="share of the run after which the decoder sees it")
    augmentation: AugmentationConfig

    @model_validator(mode="after")
    def _head_start(self) -> Self:
        if self.start < self.critic_start:
            raise ValueError("start is before critic_start: the decoder would follow an untrained critic")
        return self


class Rendering(NamedTuple):
    """How a step's reconstructions come about, by number of the micro-batch. Images are ImageNet-normalised."""

    micros: int
    target: Callable[[int], Tensor]  # [B, 3, H, W]
    render: Callable[[int], Tensor]  # the reconstruction, with its graph; computed again when asked again
    distance: Callable[[int, Tensor], tuple[Tensor, Logs]]  # this rank's part of the loss at a reconstruction
    last_layer: Tensor  # the weight of the decoder's last layer
    fake: Callable[[int], Tensor] | None = None  # what the critic sees, when that is not the reconstruction


def plain_terms(name: str, rendering: Rendering) -> Iterator[Term]:
    """Reconstruction alone."""
    for number in range(rendering.micros):
        pixels = rendering.render(number)
        loss, logs = rendering.distance(number, pixels)
        yield Term(name, loss, logs, (pixels,))


class Adversary(nn.Module):
    """The critic and the loss that it gives to a decoder. Its state is the critic's."""

    def __init__(self, critic: Critic, config: AdversaryLossConfig, *, seed: int) -> None:
        super().__init__()
        self.critic = critic
        self.config = config
        self.seed = seed
        self._pairs: list[tuple[Tensor, Tensor]] = []  # real and fake images of the micro-batches of this step

    def terms(self, name: str, rendering: Rendering, moment: Moment, *, apart: bool = False) -> Iterator[Term]:
        """Reconstruction with the adversarial term, once that has started.

        With `apart` all of `name` come first, and then all of `adversarial`, so that their gradients can be told from each
        other; that takes another rendering.
        """
        self._pairs = []
        if moment.progress < self.config.start:
            for number, term in enumerate(plain_terms(name, rendering)):
                self._remember(number, rendering, term.own[0], moment)
                yield term
            return
        parts = rendering.micros * ranks().size
        kept: list[Tensor] = []
        pulls: list[_Pull] = []
        for number in range(rendering.micros):
            pixels = rendering.render(number)
            pulls.append(self._pull(number, pixels, rendering, moment, parts))
            self._remember(number, rendering, pixels, moment)
            kept += [pixels] if rendering.micros == 1 else []
        of_reconstruction, of_adversarial = total(torch.stack([pull.at_last_layer for pull in pulls]).sum(0))
        weight = balance(of_reconstruction, of_adversarial, ceiling=self.config.max_adaptive_weight)
        factor = self.config.weight * weight
        for number, pull in enumerate(pulls):
            pixels = kept[number] if kept else rendering.render(number)
            gradient = pull.reconstruction if apart else pull.reconstruction + factor * pull.adversarial
            yield _surrogate(name, pixels, gradient, {**pull.logs, "adaptive_weight": weight / parts})
        if apart:
            for number, pull in enumerate(pulls):
                yield _surrogate("adversarial", rendering.render(number), factor * pull.adversarial, {})

    def critic_terms(self, moment: Moment) -> Iterator[Term]:
        """The critic's own loss, on the images of the same step."""
        if moment.progress < self.config.critic_start:
            return
        micros = len(self._pairs)
        parts = micros * ranks().size
        for number, (real, fake) in enumerate(self._pairs):
            of_real = self.critic(self._augment(real, "real", moment, number, micros))
            of_fake = self.critic(self._augment(fake, "fake", moment, number, micros))
            loss = discriminator_loss(of_real, of_fake) / parts
            accuracy = ((of_real > 0).float().mean() + (of_fake < 0).float().mean()) / 2
            yield Term("critic", loss, {"critic_loss": loss.detach(), "critic_accuracy": accuracy / parts}, (fake,))

    def after_step(self, moment: Moment) -> None:
        """Follow the critic's new weights with its norms."""
        if moment.progress >= self.config.critic_start:
            self.critic.refine_norms()

    def step_flops(self, side: int) -> float:
        """FLOPs per image of a step with all parts at work: once for the decoder, with real and fake for the critic."""
        trained, frozen = self.critic.forward_flops(side)
        return FROZEN * (trained + frozen) + 2 * (TRAINING * trained + frozen)

    def parameters_of_critic(self) -> list[nn.Parameter]:
        """What the critic's phase trains."""
        return [parameter for parameter in self.critic.parameters() if parameter.requires_grad]

    def _pull(self, number: int, pixels: Tensor, rendering: Rendering, moment: Moment, parts: int) -> "_Pull":
        """Both losses of a micro-batch, differentiated down to its pixels and at the last layer."""
        leaf = pixels.detach().requires_grad_()
        loss, logs = rendering.distance(number, leaf)
        (of_reconstruction,) = torch.autograd.grad(loss, leaf)
        trained = self.parameters_of_critic()
        for parameter in trained:
            parameter.requires_grad_(False)
        fake = to_unit(leaf)
        judged = self.critic(self._augment(fake, "decoder", moment, number, rendering.micros))
        adversarial = generator_loss(judged) / parts
        (of_adversarial,) = torch.autograd.grad(adversarial, leaf)
        for parameter in trained:
            parameter.requires_grad_(True)
        at_last_layer = [
            torch.autograd.grad(pixels, rendering.last_layer, gradient.to(pixels), retain_graph=True)[0]
            for gradient in (of_reconstruction, of_adversarial)
        ]
        logs = {**logs, "adversarial": adversarial.detach()}
        return _Pull(of_reconstruction, of_adversarial, torch.stack(at_last_layer).float(), logs)

    @torch.no_grad()
    def _remember(self, number: int, rendering: Rendering, pixels: Tensor, moment: Moment) -> None:
        """Keep what the critic will see; fakes as a file would hold them, so that their fractions do not tell."""
        if moment.progress >= self.config.critic_start:
            fake = pixels if rendering.fake is None else rendering.fake(number)
            self._pairs.append((to_unit(rendering.target(number)), to_8_bits(to_unit(fake.detach()))))

    def _augment(self, images: Tensor, purpose: str, moment: Moment, number: int, micros: int) -> Tensor:
        """What is done to an image belongs to its place in the global batch."""
        first = (ranks().rank * micros + number) * len(images)

        def draws(index: int) -> torch.Generator:
            return torch_draws(self.seed, f"augmentation/{purpose}", moment.step, index)

        indices = range(first, first + len(images))
        return augment(images, draw_augmentation(images.shape[2:], self.config.augmentation, indices, draws))


class _Pull(NamedTuple):
    """Of a micro-batch."""

    reconstruction: Tensor  # [B, 3, H, W], gradient of the reconstruction loss at the pixels
    adversarial: Tensor
    at_last_layer: Tensor  # [2, ...], both at the last layer's weight
    logs: Logs


def _surrogate(name: str, pixels: Tensor, gradient: Tensor, logs: Logs) -> Term:
    """A scalar whose gradient at the pixels is `gradient`."""
    return Term(name, (pixels.float() * gradient.float()).sum(), logs, (pixels,))


def to_unit(images: Tensor) -> Tensor:
    """ImageNet-normalised images in [-1, 1], float32."""
    return denormalise(images.float()) * 2 - 1


def to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] as a file would hold them."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
