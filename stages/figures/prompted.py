"""Prompts beside what the generators of several runs draw for them (paper figure 8 b)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.figures.side_by_side import last_point
from vtp.artefact import ArtefactError, read_json, whole_file, write_json
from vtp.inference.grid import grid
from vtp.layers.decode import read_rgb

if TYPE_CHECKING:
    from torch import Tensor

STRIP, TEXTS = "strip.png", "prompts.json"  # a picture of each prompt, side by side and without words; the prompts
FOLDER = "prompted"  # of the pictures of evaluate_generator; in it a folder per setting


def write_strip(pictures: "Sequence[Tensor]", prompts: Sequence[str], folder: Path) -> None:
    """The first of the uint8 samples [n, 3, S, S] of every prompt, in a new folder, as `draw_prompted` reads them."""
    from PIL import Image

    pixels = np.concatenate([np.moveaxis(of_prompt[0].cpu().numpy(), 0, 2) for of_prompt in pictures], axis=1)
    folder.mkdir(parents=True)
    with whole_file(folder / STRIP) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
    write_json(folder / TEXTS, {"prompts": list(prompts)})


def settings_of(plots: Path) -> list[str]:
    """Names of the settings whose samples are of prompts."""
    return sorted({path.parent.name for path in plots.rglob(f"samples/{FOLDER}/*/{TEXTS}")})


def draw_prompted(plots: Path, setting: str, path: Path) -> None:
    """A row per prompt, a column per run, the last point of its first training, as one PNG; nothing without such samples.

    `plots` holds `<run>/.../<point>/samples/prompted/<setting>`, as `evaluate_generator` writes them. Raises ArtefactError
    when runs were asked for other prompts.
    """
    found = last_point(plots, f"samples/{FOLDER}/{setting}/{TEXTS}")
    if not found:
        return
    columns = {name: _read(texts) for name, texts in found.items()}
    prompts = next(iter(columns.values()))[0]
    for name, (texts, _) in columns.items():
        if texts != prompts:
            raise ArtefactError(f"{found[name]}: other prompts than those of the runs before; ask all for the same")
    rows = [np.stack([pictures[number] for _, pictures in columns.values()]) for number in range(len(prompts))]
    notes = [[""] * len(columns)] * (len(rows) - 1) + [list(columns)]
    grid(rows, prompts, path, title=f"Prompts through the generator of every tokenizer, {setting}", notes=notes)


def _read(texts: Path) -> tuple[list[str], np.ndarray]:
    """Prompts, and their pictures [n, 3, S, S]."""
    prompts = read_json(texts)["prompts"]
    pixels = np.array(read_rgb(texts.with_name(STRIP)))
    return prompts, pixels.reshape(len(pixels), len(prompts), -1, 3).transpose(1, 3, 0, 2)
