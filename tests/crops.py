"""Random boxes beside those of torchvision: `golden/random-resized-crop`."""

import json

import numpy as np
from safetensors.numpy import load_file
from tiny import ROOT

FOLDER = ROOT / "tests" / "golden" / "random-resized-crop"
CONFIG = json.loads((FOLDER / "config.json").read_text())
CASES = CONFIG["cases"]  # size of the picture, scale and ratio, by name
DRAWN = load_file(FOLDER / "io.safetensors")


def assert_spread_as_torchvisions(boxes, name):
    """2,000 boxes of one's own: distribution functions within 0.06 at its quantiles (Kolmogorov-Smirnov, 99.9 %)."""
    height, width = (CASES[name][side] for side in ("height", "width"))
    left, top, w, h = np.array(boxes, dtype=np.float64).T
    assert len(left) == 2000
    free = (width > w) & (height > h)
    found = {"area": w * h / (width * height), "aspect": w / h, "height": h / height, "width": w / width}
    found |= {"top": (top / np.maximum(height - h, 1))[free], "left": (left / np.maximum(width - w, 1))[free]}
    for what, values in found.items():
        quantiles = DRAWN[f"{name}.{what}"].astype(np.float64)
        for level, quantile in zip(CONFIG["quantiles"], quantiles, strict=True):
            if np.isnan(quantile):  # hardly any crop could move
                assert what in ("top", "left")
                continue
            below, up_to = np.mean(values < quantile - 1e-6), np.mean(values < quantile + 1e-6)
            assert below - 0.06 <= level <= up_to + 0.06, (name, what, level)
