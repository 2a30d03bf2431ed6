"""`sample`: pictures of a generator, of classes or of prompts."""

import re
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from vtp.commands.places import device_of, require_file
from vtp.data.prompt_files import read_prompts
from vtp.inference.generator import PictureGenerator, load_generator
from vtp.inference.grid import grid

MOST_CLASSES = 8  # that are drawn when none is named


def sample(  # noqa: PLR0913 - flags of the command
    folder: Path,
    classes: Sequence[str] | None,
    prompts: Sequence[str] | None,
    prompt_file: Path | None,
    *,
    count: int,
    size: str | None,
    seed: int,
    steps: int | None,
    guidance: float | None,
    tokenizer: Path | None,
    decoder: Path | None,
    text_encoder: Path | None,
    device: str | None,
    out: Path,
) -> str:
    """Draw `count` pictures of every class or prompt, of a `size` WIDTHxHEIGHT, into one PNG; where it is.

    Raises ValueError or OSError.
    """
    if count < 1:
        raise ValueError(f"--count {count}: at least 1")
    shape = None if size is None else parsed_size(size)
    require_file(out, ".png", "PNG")
    texts = [*(prompts or []), *(prompt.text for prompt in (read_prompts(prompt_file, "lines") if prompt_file else []))]
    generator = load_generator(folder, tokenizer, decoder, text_encoder, device=device_of(device))
    names = _asked(generator, classes, texts)
    given = {"steps": steps, "guidance_scale": guidance}
    changes = {name: value for name, value in given.items() if value is not None}
    with tqdm(total=count * len(names), desc="sampling", unit="picture", leave=False, disable=None) as bar:
        pixels = generator.draw(names, count, size=shape, seed=seed, progress=bar.update, **changes)
    sampler = generator.sampler.model_copy(update=changes)
    of_size = "" if size is None else f"{size}, "
    title = f"{folder}, {of_size}{sampler.solver}, {sampler.steps} steps, {sampler.guidance}, seed {seed}"
    shown = [name if isinstance(name, str) else generator.classes[name] for name in names]
    grid(list(pixels.split(count)), shown, out, title=title)
    return str(out.resolve())


def _asked(generator: PictureGenerator, classes: Sequence[str] | None, prompts: Sequence[str]) -> Sequence[str | int]:
    """Prompts, or labels. Raises ValueError for what this generator is not told."""
    if generator.text_encoder is not None:
        if classes or not prompts:
            raise ValueError("this generator is told captions: ask by --prompt TEXT or --prompts FILE, without --class")
        return prompts
    if prompts:
        raise ValueError("this generator is told classes: ask by --class, without --prompt and --prompts")
    return [generator.label(name) for name in classes or generator.space.labels[:MOST_CLASSES]]


def parsed_size(text: str) -> tuple[int, int]:
    """Height and width of a text WIDTHxHEIGHT. Raises ValueError for another."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise ValueError(f"--size {text}: expected WIDTHxHEIGHT in pixels, such as 512x384")
    return int(found[2]), int(found[1])
