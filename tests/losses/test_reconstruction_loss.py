"""What a reconstruction lacks, against RAE's terms (`golden/rae-decoder-losses`)."""

import torch
from foreign import GOLDEN, golden_perceptual
from safetensors.torch import load_file

from vtp.layers.images import IMAGENET_STD, normalise
from vtp.losses.reconstruction import reconstruction_distance

OFFICIAL = load_file(GOLDEN / "rae-decoder-losses" / "io.safetensors")


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_distances_are_rae_s(tmp_path):
    """RAE takes L1 in [0, 1] (`pixels`), so ours of [-1, 1] (`unit`) is twice that; LPIPS is that of [-1, 1] in all.

    The L1 that recipes choose is that of normalised space, where the decoder's numbers are: what a colour is off by weighs
    one over the standard deviation of its channel, 4.4 times as much as in [0, 1].
    """
    reconstruction = OFFICIAL["recon"].requires_grad_()
    pair = normalise(reconstruction), normalise(OFFICIAL["images"])
    network = golden_perceptual(tmp_path)
    unit, pixels = (reconstruction_distance(network, *pair, l1_space=space) for space in ("unit", "pixels"))
    assert torch.equal(unit.l1 / 2, pixels.l1)
    close(pixels.l1.detach(), OFFICIAL["l1.value"])
    close(unit.perceptual.detach(), OFFICIAL["lpips.pm1"].mean())
    for term, expected in ((pixels.l1, "l1.grad_recon"), (unit.perceptual, "lpips.grad_recon")):
        (gradient,) = torch.autograd.grad(term, reconstruction, retain_graph=True)
        close(gradient, OFFICIAL[expected])
    normalised = reconstruction_distance(lambda a, b: (a - b)[:, 0, 0, 0], *pair)
    (gradient,) = torch.autograd.grad(normalised.l1, reconstruction)
    close(gradient * torch.tensor(IMAGENET_STD).view(3, 1, 1), OFFICIAL["l1.grad_recon"])
