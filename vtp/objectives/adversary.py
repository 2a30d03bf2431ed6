"""A discriminator against a decoder: the adversarial half of decoder tuning, or of pre-training (paper 3.2).

The paper names no discriminator, weights or schedule; this follows the best-documented recipe, RAE's (Zheng et al. 2025):
hinge loss, adaptive weight, a head start for the discriminator, differentiable augmentation, fakes as 8-bit images.

Losses are differentiated down to the pixels once, and from there on together. The adaptive weight compares the two
gradients at the decoder's last layer, which pixels reach in one step; so neither the perceptual network nor the
discriminator is differentiated twice, and the weight is that of the global batch, whatever its split into ranks and
micro-batches.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vtp.config import Config
from vtp.distributed import ranks, total
from vtp.draws import address, torch_draws
from vtp.host import Host
from vtp.layers.augment import AugmentationConfig, augment, draw_augmentation
from vtp.layers.flops import FROZEN, TRAINING
from vtp.layers.images import denormalise
from vtp.losses.gan import balance, discriminator_loss, generator_loss, lecam_loss
from vtp.models.base import Tokenizer
from vtp.models.discriminator import Discriminator, DiscriminatorConfig
from vtp.models.discriminator_features import build_discriminator
from vtp.step import Logs, OptimConfig, ParameterGroup, StepContext, Term

DISCRIMINATOR = "discriminator"  # the phase that trains it


class LecamConfig(Config):
    """LeCam regularisation of the discriminator (Tseng et al. 2021)."""

    weight: float = Field(gt=0, description="weight of LeCam beside the discriminator's hinge loss; TiTok: 0.001")
    momentum: float = Field(
        ge=0, lt=1, description="momentum of the averages of logits, which begin at 0; TiTok: 0.999"
    )


class AdversaryConfig(Config):
    """The adversarial term and its schedule, the discriminator and its optimiser."""

    weight: float = Field(gt=0, description="weight of the adversarial term, times the adaptive weight")
    max_adaptive_weight: float = Field(
        gt=0, description="largest factor by which the ratio of gradients may scale the adversarial term"
    )
    discriminator_start: float = Field(ge=0, le=1, description="share of the run after which the discriminator trains")
    start: float = Field(ge=0, le=1, description="share of the run after which the decoder sees it")
    augmentation: AugmentationConfig
    discriminator: DiscriminatorConfig
    lecam: LecamConfig | None = Field(description="regularisation of the discriminator; null: none")
    optim: OptimConfig = Field(description="optimiser of the discriminator")
    schedule: Literal["run", "delayed", "own"] = Field(
        description="course of the discriminator's rates: that of the run; as long, but from discriminator_start on, which "
        "leaves its end out (RAE); or from there to the end of the run"
    )

    @property
    def course(self) -> tuple[float, float]:
        """Shares of the run at which the discriminator's rates begin and end their course."""
        start = self.discriminator_start
        return {"run": (0.0, 1.0), "delayed": (start, 1.0 + start), "own": (start, 1.0)}[self.schedule]

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.start < self.discriminator_start:
            raise ValueError(
                f"start {self.start} is before discriminator_start {self.discriminator_start}: the decoder would follow an "
                "untrained discriminator"
            )
        if self.optim.matrices.name == "muon":
            raise ValueError("optim.matrices is muon, and discriminators have no hidden matrices; choose {name: adamw}")
        return self


class ReconstructionStep(NamedTuple):
    """A step's reconstructions piece by piece, by number of the micro-batch. Images are ImageNet-normalised."""

    micro_batches: int
    images: Callable[[int], Tensor]  # the originals [B, 3, H, W]
    reconstruct: Callable[[int], Tensor]  # of them, with its graph; computed again when asked again
    loss: Callable[[int, Tensor], tuple[Tensor, Logs]]  # this rank's part at a reconstruction, and scalars
    last_layer: Tensor  # the weight of the decoder's last layer
    fake: Callable[[int], Tensor] | None = None  # what the discriminator sees, when that is not the reconstruction


class Adversary(nn.Module):
    """The discriminator and the loss that it gives to a decoder. Its state is the discriminator's, and LeCam's averages."""

    anchors: Tensor  # [2], mean logits of real and of fake images; only with LeCam

    def __init__(self, discriminator: Discriminator, config: AdversaryConfig, *, seed: int) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.config = config
        self.seed = seed
        self._pairs: list[tuple[Tensor, Tensor]] = []  # real and fake images of the micro-batches of this step
        if config.lecam is not None:
            self.register_buffer("anchors", torch.zeros(2))
            self._mean_logits = torch.zeros(2)  # this rank's part of this step's

    def phases(self) -> dict[str, Sequence[ParameterGroup]]:
        """The discriminator's phase, the last of a step."""
        return {DISCRIMINATOR: [ParameterGroup(self._trained(), course=self.config.course)]}

    def terms(
        self, name: str, step: ReconstructionStep, context: StepContext, *, apart: bool = False
    ) -> Iterator[Term]:
        """Reconstruction with the adversarial term, once that has started.

        With `apart` all of `name` come first, and then all of `adversarial`, so that their gradients can be compared with
        each other; that takes another pass through the decoder.
        """
        self._pairs = []
        if context.progress < self.config.start:
            for number in range(step.micro_batches):
                pixels = step.reconstruct(number)
                loss, logs = step.loss(number, pixels)
                self._remember(number, step, pixels, context)
                yield Term(name, loss, logs, (pixels,), number == step.micro_batches - 1)
            return
        parts = step.micro_batches * ranks().size
        reconstructions: list[Tensor] = []
        gradients: list[_PixelGradients] = []
        for number in range(step.micro_batches):
            pixels = step.reconstruct(number)
            gradients.append(self._pixel_gradients(number, pixels, step, context, parts))
            self._remember(number, step, pixels, context)
            reconstructions += [pixels] if step.micro_batches == 1 else []
        at_last_layer = total(torch.stack([gradient.at_last_layer for gradient in gradients]).sum(0))
        weight = balance(*at_last_layer, ceiling=self.config.max_adaptive_weight)
        factor = self.config.weight * weight
        for number, gradient in enumerate(gradients):
            pixels = reconstructions[number] if reconstructions else step.reconstruct(number)
            own = gradient.reconstruction if apart else gradient.reconstruction + factor * gradient.adversarial
            logs, last = {**gradient.logs, "adaptive_weight": weight / parts}, number == step.micro_batches - 1
            yield _surrogate(name, pixels, own, logs, last=last and not apart)
        if apart:
            for number, gradient in enumerate(gradients):
                own, last = factor * gradient.adversarial, number == step.micro_batches - 1
                yield _surrogate("adversarial", step.reconstruct(number), own, {}, last=last)

    def discriminator_terms(self, context: StepContext) -> Iterator[Term]:
        """The discriminator's own loss, on the images of the same step."""
        if context.progress < self.config.discriminator_start:
            return
        count, lecam = len(self._pairs), self.config.lecam
        parts = count * ranks().size
        if lecam is not None:
            self._mean_logits = torch.zeros_like(self.anchors)
        for number, (real, fake) in enumerate(self._pairs):
            real_logits = self.discriminator(self._augment(real, "real", context, number, count))
            fake_logits = self.discriminator(self._augment(fake, "fake", context, number, count))
            loss = discriminator_loss(real_logits, fake_logits) / parts
            accuracy = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
            logs = {"discriminator_loss": loss.detach(), "discriminator_accuracy": accuracy / parts}
            if lecam is not None:
                held = lecam_loss(real_logits, fake_logits, self.anchors) / parts
                logs["lecam"] = held.detach()
                loss = loss + lecam.weight * held
                means = torch.stack([logits.detach().float().mean() for logits in (real_logits, fake_logits)])
                self._mean_logits += means / parts
            yield Term(DISCRIMINATOR, loss, logs, (fake,), number == count - 1)

    def after_step(self, context: StepContext) -> None:
        """Follow the discriminator's new weights with its norms, and this step's logits with their averages."""
        if context.progress < self.config.discriminator_start:
            return
        self.discriminator.refine_norms()
        if self.config.lecam is not None:
            self.anchors.lerp_(total(self._mean_logits), 1 - self.config.lecam.momentum)

    def step_flops(self, side: int) -> float:
        """FLOPs per image of a step with all parts at work: once for the decoder, with real and fake for itself."""
        trained, frozen = self.discriminator.forward_flops(side)
        return FROZEN * (trained + frozen) + 2 * (TRAINING * trained + frozen)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]

    def _pixel_gradients(
        self, number: int, pixels: Tensor, step: ReconstructionStep, context: StepContext, parts: int
    ) -> "_PixelGradients":
        """Both losses of a micro-batch, differentiated down to its pixels and at the last layer."""
        leaf = pixels.detach().requires_grad_()
        loss, logs = step.loss(number, leaf)
        (of_reconstruction,) = torch.autograd.grad(loss, leaf)
        trained = self._trained()
        for parameter in trained:
            parameter.requires_grad_(False)
        fake = to_unit(leaf)
        logits = self.discriminator(self._augment(fake, "decoder", context, number, step.micro_batches))
        adversarial = generator_loss(logits) / parts
        (of_adversarial,) = torch.autograd.grad(adversarial, leaf)
        for parameter in trained:
            parameter.requires_grad_(True)
        at_last_layer = [
            torch.autograd.grad(pixels, step.last_layer, gradient.to(pixels), retain_graph=True)[0]
            for gradient in (of_reconstruction, of_adversarial)
        ]
        logs = {**logs, "adversarial": adversarial.detach()}
        return _PixelGradients(of_reconstruction, of_adversarial, torch.stack(at_last_layer).float(), logs)

    @torch.no_grad()
    def _remember(self, number: int, step: ReconstructionStep, pixels: Tensor, context: StepContext) -> None:
        """Keep what the discriminator will see; fakes as a file would hold them, or their fractions would tell."""
        if context.progress >= self.config.discriminator_start:
            fake = pixels if step.fake is None else step.fake(number)
            self._pairs.append((to_unit(step.images(number)), to_8_bits(to_unit(fake.detach()))))

    def _augment(self, images: Tensor, purpose: str, context: StepContext, number: int, count: int) -> Tensor:
        """What is done to an image belongs to its place in the global batch."""
        first = (ranks().rank * count + number) * len(images)

        def draws(index: int) -> torch.Generator:
            return torch_draws(self.seed, f"augmentation/{purpose}", context.step, index)

        indices = range(first, first + len(images))
        return augment(images, draw_augmentation(images.shape[2:], self.config.augmentation, indices, draws))


def build_adversary(
    config: AdversaryConfig, host: Host, *, seed: int, tokenizer: Tokenizer, features: Path | None
) -> Adversary:
    """The adversary with the discriminator's first weights, equal on all ranks.

    A discriminator on a tokenizer's features reads that in the folder `features`, or `tokenizer` when there is none.
    Raises ArtefactError or ValueError for weights, models and numbers of blocks that do not fit.
    """
    torch.manual_seed(address(seed, "critic"))  # by another name it would draw other weights
    network = build_discriminator(config.discriminator, host, tokenizer=tokenizer, folder=features)
    return Adversary(network, config, seed=seed)


class _PixelGradients(NamedTuple):
    """Of both losses of a micro-batch."""

    reconstruction: Tensor  # [B, 3, H, W], gradient of the reconstruction loss at the pixels
    adversarial: Tensor
    at_last_layer: Tensor  # [2, ...], both at the last layer's weight
    logs: Logs


def _surrogate(name: str, pixels: Tensor, gradient: Tensor, logs: Logs, *, last: bool) -> Term:
    """A scalar whose gradient at the pixels is `gradient`."""
    return Term(name, (pixels.float() * gradient.float()).sum(), logs, (pixels,), last)


def to_unit(images: Tensor) -> Tensor:
    """ImageNet-normalised images in [-1, 1], float32."""
    return denormalise(images.float()) * 2 - 1


def to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] as a file would hold them."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
