"""How far a normal posterior of latents is from the standard normal distribution (Kingma and Welling 2014, appendix B)."""

from torch import Tensor


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats of N(mean, exp(log_variance)) from N(0, 1), a mean over elements.

    Latent diffusion sums over latents and pixels instead: its weight of 1e-6 at 64 x 16 x 16 latents of 3 x 256 x 256 pixels
    is 8.3e-8 here, beside a mean over pixels.
    """
    if not mean.is_floating_point() or mean.itemsize < 4:
        mean, log_variance = mean.float(), log_variance.float()
    return (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
