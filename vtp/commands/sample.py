"""`sample`: pictures of a generator."""

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
    seed: int,
    steps: int | None,
    guidance: float | None,
    tokenizer: Path | None,
    decoder: Path | None,
    device: str | None,
    out: Path,
) -> str:
    """Draw `count` pictures of every class into one PNG; where it is. Raises ValueError or OSError."""
    if count < 1:
        raise ValueError(f"--count {count}: at least 1")
    require_file(out, ".png", "PNG")
    generator = load_generator(folder, tokenizer, decoder, device=device_of(device))
    given = {"steps": steps, "guidance_scale": guidance}
    changes = {name: value for name, value in given.items() if value is not None}
    labels = [generator.label(name) for name in classes or generator.space.labels[:MOST_CLASSES]]
    pixels = generator.draw(labels, count, seed=seed, **changes)
    sampler = generator.sampler.model_copy(update=changes)
    title = f"{folder}, {sampler.solver}, {sampler.steps} steps, {sampler.guidance}, seed {seed}"
    grid(list(pixels.split(count)), [generator.classes[label] for label in labels], out, title=title)
    return str(out.resolve())
