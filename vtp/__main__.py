"""Finished artefacts from the command line.

python -m vtp sample work/generator --class frog "snow-capped mountain" --count 8
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtp.inference.generator import PictureGenerator

MOST_CLASSES = 8  # that are drawn when none is named


def main() -> None:
    """Command line; exits with 1 and a message when what is asked for cannot be."""
    parser = argparse.ArgumentParser("python -m vtp", description="Draw from finished artefacts.")
    sample = parser.add_subparsers(required=True).add_parser("sample", help="pictures of classes, as one PNG")
    sample.add_argument("generator", type=Path, help="folder of train_generator, such as work/generator")
    sample.add_argument(
        "--class",
        dest="classes",
        metavar="CLASS",
        nargs="+",
        help=f"names or labels; default: the first {MOST_CLASSES}",
    )
    sample.add_argument("--count", type=int, default=8, help="pictures of every class; default: 8")
    sample.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    sample.add_argument("--steps", type=int, help="of the sampler; default: those of its sampler.json")
    sample.add_argument("--guidance", type=float, metavar="SCALE", help="classifier-free guidance; 1 is none")
    sample.add_argument("--tokenizer", type=Path, help="folder; default: `tokenizer` beside the generator")
    sample.add_argument("--decoder", type=Path, help="folder of a tuned decoder; default: `decoder` beside it, if any")
    sample.add_argument("--device", help="such as cuda or cpu; default: a GPU when there is one")
    sample.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG to write; default: samples.png")
    arguments = parser.parse_args()
    try:
        print(_sample(arguments))
    except ValueError as error:  # ours, all of them
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or arguments.out}: {error.strerror}")


def _sample(arguments: argparse.Namespace) -> Path:
    """Where the pictures are."""
    import torch

    from vtp.inference.generator import load_generator
    from vtp.inference.grid import grid

    if arguments.count < 1:
        raise ValueError(f"--count {arguments.count}: at least 1")
    if arguments.out.suffix != ".png" or arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out}: the name of a PNG file, ending in .png")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"--device {device}: not on this machine ({str(error).splitlines()[0]})") from None
    generator = load_generator(arguments.generator, arguments.tokenizer, arguments.decoder, device=device)
    names = arguments.classes or generator.classes[:MOST_CLASSES]
    given = {"steps": arguments.steps, "guidance_scale": arguments.guidance}
    changes = {name: value for name, value in given.items() if value is not None}
    pixels = generator.draw(names, arguments.count, seed=arguments.seed, **changes)
    rows = list(pixels.split(arguments.count))
    grid(rows, [_name(generator, name) for name in names], arguments.out, title=_title(generator, arguments, changes))
    return arguments.out.resolve()


def _name(generator: "PictureGenerator", name: str) -> str:
    return generator.classes[generator.label(name)]


def _title(generator: "PictureGenerator", arguments: argparse.Namespace, changes: dict[str, float]) -> str:
    sampler = generator.sampler.model_copy(update=changes)
    return f"{arguments.generator}, {sampler.solver}, {sampler.steps} steps, {sampler.guidance}, seed {arguments.seed}"


if __name__ == "__main__":
    main()
