"""The joint pre-training objective: CLIP, self-supervision and reconstruction on one encoder (paper 3.3 to 3.6).

    L = w_clip L_clip + w_ssl (L_dino + L_ibot + koleo) + w_rec (L1 + perceptual)

Each objective sees its own share of the batch and is back-propagated before the next begins, so the step's memory is
that of the largest and not of the sum. A term is this rank's part of the loss of the global batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vtp.config import Config
from vtp.data.batches import PretrainBatch
from vtp.distributed import ranks
from vtp.draws import torch_draws
from vtp.layers.block import Block
from vtp.layers.images import denormalise, normalise
from vtp.losses.clip import ContrastConfig, clip_loss, siglip_loss
from vtp.losses.perceptual import PerceptualConfig, PerceptualDistance
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.adversary import Adversary, Rendering, plain_terms
from vtp.objectives.gradient_cache import GradientCache
from vtp.objectives.rates import RatesConfig, groups
from vtp.objectives.self_distillation import Keeps, SelfDistillation, SslConfig
from vtp.step import Logs, Moment, ParameterGroup, Term

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


class ReconstructionConfig(Config):
    """L1 and a perceptual distance (paper eq. 1: 1 and 1)."""

    l1_space: Literal["normalised", "unit"] = Field(description="ImageNet-normalised pixels, or pixels in [-1, 1]")
    perceptual: PerceptualConfig
    perceptual_weight: float = Field(ge=0, description="of the perceptual distance beside L1")


class DropPathConfig(Config):
    """Share of the samples that each residual branch leaves out, per objective (stochastic depth)."""

    clip: float = Field(ge=0, lt=1)
    ssl: float = Field(ge=0, lt=1)
    reconstruction: float = Field(ge=0, lt=1)
    blocks: int = Field(ge=1, description="blocks of the batch that share a draw, so that counts are exact")


class PretrainObjectiveConfig(Config):
    """The loss."""

    weights: WeightsConfig
    contrast: ContrastConfig
    ssl: SslConfig
    reconstruction: ReconstructionConfig
    drop_path: DropPathConfig


Part = Literal["clip", "ssl", "reconstruction"]


class PretrainObjective(nn.Module):
    """One phase; its terms come in the order clip, ssl, reconstruction. An adversary adds the phase `critic`."""

    def __init__(
        self,
        tokenizer: VisualTokenizer,
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
        self.ssl = SelfDistillation(tokenizer, config.ssl) if config.weights.ssl else None

    def phases(self) -> Mapping[str, Sequence[ParameterGroup]]:
        critic = {"critic": [ParameterGroup(self.adversary.parameters_of_critic())]} if self.adversary else {}
        return {"model": list(groups(self.tokenizer, self.ssl and self.ssl.heads, self.rates)), **critic}

    def watched(self) -> Sequence[nn.Parameter]:
        """The parameters that all objectives share, whose gradients are compared."""
        return list(self.tokenizer.trunk.blocks.parameters())

    def sharded_units(self) -> Iterator[Sequence[nn.Module]]:
        """What FSDP gathers together, parts first; the rest is small and stays replicated."""
        trunks = [self.tokenizer.trunk, *([self.ssl.teacher.trunk] if self.ssl else [])]
        for model in (*trunks, self.tokenizer.pixel_decoder):
            yield [*model.blocks, model]
        if self.tokenizer.config.text is not None:
            text: Any = self.tokenizer.text  # open_clip's
            yield [*text.transformer.resblocks, text]

    def compiled_units(self) -> Iterator[nn.Module]:
        """What is compiled, one by one."""
        yield from (module for module in self.modules() if isinstance(module, Block))

    def recompute(self) -> None:
        """Keep no activations inside of blocks; the backward pass computes them again."""
        for model in (self.tokenizer.trunk, self.tokenizer.pixel_decoder):
            model.blocks.recompute = True
        if self.tokenizer.config.text is not None:
            text: Any = self.tokenizer.text  # open_clip's
            text.set_grad_checkpointing(True)

    def terms(self, phase: str, micros: Sequence[PretrainBatch], moment: Moment) -> Iterator[Term]:
        if phase == "critic":
            assert self.adversary is not None
            yield from self.adversary.critic_terms(moment)
            return
        if self.config.weights.clip:
            yield from self._clip(micros, moment)
        if self.ssl is not None:
            keeps = [self._keeps(micro, number, len(micros), moment.step) for number, micro in enumerate(micros)]
            yield from self.ssl.terms(self.tokenizer, micros, keeps, moment, weight=self.config.weights.ssl)
        yield from self._reconstruction(micros, moment)

    @torch.no_grad()
    def after_step(self, moment: Moment) -> Logs:
        """Move the teacher; clamp the logit scale."""
        logs: dict[str, Tensor | float] = {}
        if self.config.weights.clip:
            self.tokenizer.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            logs["logit_scale"] = self.tokenizer.logit_scale.exp()
        if self.ssl is not None:
            self.ssl.after_step(self.tokenizer, moment.progress)
            logs["teacher_temperature"] = self.ssl.teacher_temperature(moment.progress)
            logs["teacher_momentum"] = self.ssl.momentum(moment.progress)
            logs["dino_loss_uninformed"] = math.log(self.config.ssl.head.prototypes)
        if self.adversary is not None:
            self.adversary.after_step(moment)
        return logs

    def _clip(self, micros: Sequence[PretrainBatch], moment: Moment) -> Iterator[Term]:
        tokenizer = self.tokenizer

        def represent(micro: PretrainBatch, number: int) -> Sequence[Tensor]:
            images = normalise(micro.clip_images)
            keep = self._keep("clip", len(images), len(micro.rec_images), number, len(micros), moment.step)
            return tokenizer.encode_image(images, keep=keep), tokenizer.encode_text(micro.tokens)

        cache = GradientCache(represent, micros)
        image, text = cache.features
        if self.config.contrast.name == "softmax":
            loss = clip_loss(image, text, tokenizer.logit_scale.exp())
        else:
            loss = siglip_loss(image, text, tokenizer.logit_scale.exp(), tokenizer.logit_bias)
        logs: dict[str, Tensor | float] = {"clip_loss": loss.detach()}
        if self.config.contrast.name == "softmax":
            logs["clip_loss_uninformed"] = math.log(ranks().size * len(image)) / ranks().size
        yield Term("clip", self.config.weights.clip * loss, logs, (image, text))
        for surrogate in cache.surrogates():
            yield Term("clip", surrogate, {}, (image, text))

    def _reconstruction(self, micros: Sequence[PretrainBatch], moment: Moment) -> Iterator[Term]:
        config, parts = self.config.reconstruction, len(micros) * ranks().size
        images = [normalise(micro.rec_images) for micro in micros]

        def render(number: int) -> Tensor:
            count = len(images[number])
            keep = self._keep("reconstruction", count, count, number, len(micros), moment.step)
            return self.tokenizer.decode(self.tokenizer.encode(images[number], keep=keep))

        def distance(number: int, pixels: Tensor) -> tuple[Tensor, Logs]:
            found = reconstruction_distance(self._perceptual[0], pixels, images[number], l1_space=config.l1_space)
            l1, perceptual = found.l1 / parts, found.perceptual / parts
            logs = {"l1": l1.detach(), "perceptual": perceptual.detach()}
            logs["replaced_samples"] = micros[number].replaced.sum()
            return self.config.weights.reconstruction * (l1 + config.perceptual_weight * perceptual), logs

        last_layer = self.tokenizer.pixel_decoder.proj_out.weight
        rendering = Rendering(len(micros), images.__getitem__, render, distance, last_layer)
        if self.adversary is None:
            yield from plain_terms("reconstruction", rendering)
        else:
            yield from self.adversary.terms("reconstruction", rendering, moment, apart=moment.watched)

    def _keeps(self, micro: PretrainBatch, number: int, count: int, step: int) -> Keeps:
        blocks, samples = len(micro.rec_images), len(micro.global_views)
        views = self._keep("ssl", 2 * samples, blocks, number, count, step)
        local_views = self._keep("ssl", micro.local_views.shape[1] * samples, blocks, number, count, step, part=1)
        return Keeps(views, local_views)

    def _keep(
        self, term: Part, crops: int, blocks: int, number: int, count: int, step: int, part: int = 0
    ) -> Tensor | None:
        """Crops [depth, 2, K] of micro-batch `number` of `count` that each residual branch computes; None for all.

        Draws belong to groups of blocks of the global batch, each with an exact count: shapes are static, and who
        is left out does not depend on ranks or micro-batches.
        """
        rate, group = getattr(self.config.drop_path, term), self.config.drop_path.blocks
        if not rate or not crops:
            return None
        if blocks % group:
            raise ValueError(
                f"a micro-batch of {blocks} blocks holds no whole number of groups of {group} blocks, which share a "
                "draw of stochastic depth; set drop_path.blocks to a divisor, or use larger micro-batches"
            )
        first, size = (ranks().rank * count + number) * blocks // group, crops // (blocks // group)
        kept = max(1, round(size * (1 - rate)))
        depth = self.tokenizer.config.vision.depth
        picks = []
        for index in range(blocks // group):
            draws = torch_draws(self.seed, f"drop_path/{term}", step, part, first + index)
            picks.append(torch.rand(depth, 2, size, generator=draws).argsort(-1)[..., :kept] + index * size)
        return torch.cat(picks, dim=-1).to(self.tokenizer.trunk.cls_token.device, non_blocking=True)


class Distance(NamedTuple):
    """Batch means."""

    l1: Tensor
    perceptual: Tensor


def reconstruction_distance(
    perceptual: PerceptualDistance, reconstructions: Tensor, images: Tensor, *, l1_space: str = "normalised"
) -> Distance:
    """L1 and the perceptual distance of ImageNet-normalised images, in float32 (paper eq. 1).

    The perceptual distance is taken in [-1, 1], L1 there (`unit`) or in normalised space.
    """
    reconstructions, images = reconstructions.float(), images.float()
    ours, theirs = denormalise(reconstructions) * 2 - 1, denormalise(images) * 2 - 1
    pair = (reconstructions, images) if l1_space == "normalised" else (ours, theirs)
    return Distance((pair[0] - pair[1]).abs().mean(), perceptual(ours, theirs).mean())
