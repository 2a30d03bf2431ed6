"""`sample`: pictures of a generator."""

import re
from collections.abc import Sequence
from pathlib import Path

from vtp.commands.places import device_of, require_file
from vtp.inference.generator import load_generator
from vtp.inference.grid import grid

MOST_CLASSES = 8  # that are drawn when none is named


def sample(  # noqa: PLR0913 - flags of the command
    folder: Path,
    classes: Sequence[str] | None,
    *,
    count: int,
    size: str | None,
    seed: int,
    steps: int | None,
    guidance: float | None,
    tokenizer: Path | None,
    decoder: Path | None,
    device: str | None,
    out: Path,
) -> str:
    """Draw `count` pictures of every class, of a `size` WIDTHxHEIGHT, into one PNG; where it is.

    Raises ValueError or OSError.
    """
    if count < 1:
        raise ValueError(f"--count {count}: at least 1")
    shape = None if size is None else parsed_size(size)
    require_file(out, ".png", "PNG")
    generator = load_generator(folder, tokenizer, decoder, device=device_of(device))
    given = {"steps": steps, "guidance_scale": guidance}
    changes = {name: value for name, value in given.items() if value is not None}
    labels = [generator.label(name) for name in classes or generator.space.labels[:MOST_CLASSES]]
    pixels = generator.draw(labels, count, size=shape, seed=seed, **changes)
    sampler = generator.sampler.model_copy(update=changes)
    of_size = "" if size is None else f"{size}, "
    title = f"{folder}, {of_size}{sampler.solver}, {sampler.steps} steps, {sampler.guidance}, seed {seed}"
    grid(list(pixels.split(count)), [generator.classes[label] for label in labels], out, title=title)
    return str(out.resolve())


def parsed_size(text: str) -> tuple[int, int]:
    """Height and width of a text WIDTHxHEIGHT. Raises ValueError for another."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise ValueError(f"--size {text}: expected WIDTHxHEIGHT in pixels, such as 512x384")
    return int(found[2]), int(found[1])
