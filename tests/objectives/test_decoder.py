"""Adversarial tuning: phases, head start, what stays frozen."""

from pathlib import Path

import pytest
import torch
from tiny import merged, tiny_params

from stages.pretrain import Pretrain
from stages.tune_decoder import TuneDecoder
from vtp.data.batches import ImageBatch
from vtp.losses.perceptual import build_perceptual
from vtp.models.discriminator import PatchDiscriminator
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.decoder import DecoderObjective, to_8_bits
from vtp.step import Moment


def setup(changes=None):
    config = TuneDecoder.parse(merged(tiny_params()["tune_decoder"], changes or {}), where="test")
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(Pretrain.parse(tiny_params()["pretrain"], where="test").tokenizer)
    perceptual = build_perceptual(config.objective.perceptual, weights=Path())
    critic = PatchDiscriminator(config.discriminator)
    objective = DecoderObjective(tokenizer, critic, config.objective, perceptual=perceptual, seed=0)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    return objective, tokenizer, ImageBatch(images)


def step(objective, batch, progress):
    logs = {}
    objective.zero_grad()
    for phase in objective.phases():
        for term in objective.terms(phase, [batch], Moment(int(100 * progress), 100, watched=False)):
            term.loss.backward()
            logs |= term.parts
        if phase == "decoder":
            assert all(p.grad is None for p in objective.critic.parameters())
    return logs


def test_head_start():
    objective, _, batch = setup()
    assert set(step(objective, batch, 0.0)) == {"l1", "perceptual"}
    assert {"critic_loss", "critic_accuracy"} <= set(step(objective, batch, 0.2)) - {"adversarial"}
    assert {"adversarial", "adaptive_weight", "critic_loss"} <= set(step(objective, batch, 0.5))


def test_only_decoder_and_critic_take_gradients():
    objective, tokenizer, batch = setup()
    step(objective, batch, 0.9)
    assert all(p.grad is None for p in tokenizer.trunk.parameters())
    assert all(p.grad is not None for p in objective.decoder.parameters())
    assert all(p.grad is not None for p in objective.critic.parameters())
    state = objective.state_dict()
    assert {key.split(".")[0] for key in state} == {"decoder", "average", "critic"}


def test_without_a_discriminator():
    objective, _, batch = setup({"objective": {"adversarial_weight": 0.0}})
    assert list(objective.phases()) == ["decoder"]
    assert set(step(objective, batch, 0.9)) == {"l1", "perceptual"}


def test_average_follows():
    objective, _, _ = setup()
    before = objective.average.proj_out.bias.clone()
    with torch.no_grad():
        objective.decoder.proj_out.bias.add_(1.0)
    objective.after_step(Moment(0, 10, watched=False))  # momentum 1/10 at the first step
    torch.testing.assert_close(objective.average.proj_out.bias, before + 0.9)


def test_fakes_are_what_a_file_would_hold():
    x = torch.linspace(-1.2, 1.2, 1000)
    rounded = to_8_bits(x)
    steps = (rounded + 1) * 127.5
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert rounded.abs().max() <= 1


def test_an_untrained_critic_is_refused():
    with pytest.raises(ValueError, match="untrained critic"):
        setup({"objective": {"critic_start": 0.5, "adversarial_start": 0.2}})
