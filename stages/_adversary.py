"""The adversary of `tune_decoder` and of joint pre-training, built from parameters."""

from pathlib import Path

import torch

from stages._runtime import Work
from vtp.artefact import verified_weights
from vtp.draws import address
from vtp.models.base import Tokenizer
from vtp.models.critic_features import TimmFeatures, TokenizerFeatures
from vtp.models.discriminator import (
    Critic,
    CriticConfig,
    FeatureCritic,
    PatchCritic,
    PatchCriticConfig,
    TimmFeaturesConfig,
)
from vtp.models.loading import load_tokenizer
from vtp.objectives.adversary import Adversary, AdversaryLossConfig
from vtp.training.optim import OptimConfig


class AdversaryConfig(AdversaryLossConfig):
    """A critic, its loss and its optimiser."""

    discriminator: CriticConfig
    optim: OptimConfig


def build_adversary(
    config: AdversaryConfig, work: Work, *, seed: int, tokenizer: Tokenizer, features: Path | None
) -> Adversary:
    """The adversary with the critic's first weights, equal on all ranks.

    The critic `features` of a tokenizer reads that in the folder `features`, or `tokenizer` when there is none. Raises
    ArtefactError or ValueError for weights, models and numbers of blocks that do not fit.
    """
    torch.manual_seed(address(seed, "critic"))
    return Adversary(_critic(config, work, tokenizer, features), config, seed=seed)


def _critic(config: AdversaryConfig, work: Work, tokenizer: Tokenizer, folder: Path | None) -> Critic:
    critic = config.discriminator
    if isinstance(critic, PatchCriticConfig):
        return PatchCritic(critic)
    network = critic.network
    if isinstance(network, TimmFeaturesConfig):
        path = verified_weights(
            work.weights / network.weights,
            network.sha256,
            f"timm's weights of {network.model}",
            instead="choose `discriminator: {name: patch, ...}` in params.yaml",
        )
        features = TimmFeatures(network, path).to(work.device)
    else:
        source = tokenizer if folder is None else load_tokenizer(folder).to(work.device).requires_grad_(False)
        features = TokenizerFeatures(source, blocks=network.blocks, size=network.image_size)
    return FeatureCritic(critic, features, dim=features.dim, heads=network.blocks)
