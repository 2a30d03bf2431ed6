"""One training step of a decoder and its adversary, against RAE's own (`golden/rae-decoder-losses`)."""

import pytest
import torch
import torch.nn.functional as F
from foreign import GOLDEN, golden_perceptual
from safetensors.torch import load_file
from tiny import ROOT, tiny_params
from torch import nn

from stages.tune_decoder import TuneDecoder
from vtp.layers.augment import AugmentationConfig
from vtp.layers.images import normalise
from vtp.losses.reconstruction import reconstruction_distance
from vtp.models.discriminator import Discriminator
from vtp.objectives.adversary import Adversary, ReconstructionStep
from vtp.params import load
from vtp.step import OptimConfig, ParameterGroup, StepContext
from vtp.training.optim import build_optimizer
from vtp.training.update import Update

OFFICIAL = load_file(GOLDEN / "rae-decoder-losses" / "io.safetensors")
RAE = load(f"{ROOT / 'pipelines/overlays/presets/rae.yaml'}:tune_decoder", TuneDecoder)
STEP = StepContext(0, 1, log_step=False)
OPTIM = OptimConfig.parse(tiny_params()["tune_decoder"]["optim"] | {"clip_norm": None}, where="test")


class Critic(Discriminator):
    """The stand-in for the discriminator."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(OFFICIAL["step.critic_weight"].clone())
        self.bias = nn.Parameter(OFFICIAL["step.critic_bias"].clone())
        self.seen = []

    def forward(self, images):
        self.seen.append(images.detach())
        return F.conv2d(images, self.weight, self.bias, stride=4)


def close(ours, name, tolerance=1e-4):
    expected = OFFICIAL[name]
    torch.testing.assert_close(torch.as_tensor(ours), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory):
    return golden_perceptual(tmp_path_factory.mktemp("lpips"))


def updated(phase, terms, parameters):
    """The gradients with which an update steps, and the scalars of the step."""
    optimizer, gradients = build_optimizer([ParameterGroup(parameters)], OPTIM), []
    optimizer.parts[0].register_step_pre_hook(
        lambda *_: gradients.extend(parameter.grad.clone() for parameter in parameters)
    )
    return gradients, Update(phase, optimizer, OPTIM, ()).apply(terms, STEP).logs


@pytest.mark.parametrize(
    ("case", "perceptual_weight", "ceiling"),
    [("step", 1.0, 1e4), ("step_no_lpips", 0.0, 1e4), ("step_ceiling", 1.0, 0.02)],
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_is_rae_s(case, perceptual_weight, ceiling, micro_batches, perceptual):
    """Without augmentation, which has no identity in RAE's draws; `tests/layers/test_augment.py` has it.

    L1's space and the adversary's numbers are those of the preset `rae`. Two things differ, and neither in a gradient. RAE's
    accuracy compares the logits of a real image with those of its fake, place by place; ours counts right signs, 1/2 for a
    discriminator that knows nothing. And RAE's adaptive weight is that of a rank and its micro-batch; ours is that of the
    global batch, in any split.
    """
    images, hidden = normalise(OFFICIAL["images"]).chunk(micro_batches), OFFICIAL["step.hidden"].chunk(micro_batches)
    weight, bias = (nn.Parameter(OFFICIAL[f"step.last_{name}"].clone()) for name in ("weight", "bias"))

    def reconstruct(number):
        return normalise((hidden[number] @ weight.T + bias).permute(0, 3, 1, 2))

    def loss(number, pixels):
        distance = reconstruction_distance(perceptual, pixels, images[number], l1_space=RAE.objective.l1_space)
        l1, lpips = distance.l1 / micro_batches, distance.perceptual / micro_batches
        return l1 + perceptual_weight * lpips, {"l1": l1.detach(), "perceptual": lpips.detach()}

    assert RAE.adversary.max_adaptive_weight == 1e4
    assert RAE.objective.perceptual_weight == 1.0
    none = AugmentationConfig(translation=0.0, brightness=0.0, saturation=0.0, contrast=0.0)
    changes = {"max_adaptive_weight": ceiling, "discriminator_start": 0.0, "start": 0.0, "augmentation": none}
    critic = Critic()
    adversary = Adversary(critic, RAE.adversary.model_copy(update=changes), seed=0)
    step = ReconstructionStep(micro_batches, images.__getitem__, reconstruct, loss, weight)

    (of_decoder, _), logs = updated("decoder", adversary.terms("decoder", step, STEP), [weight, bias])
    close(of_decoder, f"{case}.grad_last_weight")
    close(logs["l1"], f"{case}.rec_loss")
    if perceptual_weight:
        close(logs["perceptual"], f"{case}.lpips_loss")
    close(logs["adversarial"], f"{case}.gan_loss")
    close(logs["adaptive_weight"], f"{case}.adaptive_weight")
    total = logs["l1"] + perceptual_weight * logs["perceptual"]
    close(total + RAE.adversary.weight * logs["adaptive_weight"] * logs["adversarial"], f"{case}.total_loss")

    critic.seen.clear()
    (of_critic, _), logs = updated("discriminator", adversary.discriminator_terms(STEP), [critic.weight, critic.bias])
    close(of_critic, f"{case}.critic_grad_weight")
    close(logs["discriminator_loss"], f"{case}.d_loss")
    close(torch.cat(critic.seen[1::2]), "step.critic_sees_fake", tolerance=1e-5)
    real, fake = OFFICIAL["step.logits_real"], OFFICIAL["step.logits_fake"]
    signs = torch.cat([real > 0, fake < 0]).float().mean()
    assert float(logs["discriminator_accuracy"]) == pytest.approx(float(signs))
