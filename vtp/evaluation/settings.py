"""Names of rows of figures beside those of the settings that samples are drawn with; no setting may have one."""

NOISE = "noise"  # the baseline: Gaussian noise through the decoder
RECONSTRUCTED = "reconstructed"  # latents of real images through it: the floor
REAL = "real"  # held-out real images
BEST = "best"  # the best of the settings again
RESERVED = (NOISE, RECONSTRUCTED, REAL, BEST)
