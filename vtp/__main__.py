"""Finished artefacts from the command line; `python -m vtp COMMAND --help` says what each takes.

python -m vtp sample work/generator --class frog "snow-capped mountain" --count 8
python -m vtp sample work/generator --prompt "a frog left of a dog"
python -m vtp reconstruct photo.jpg --tokenizer work/tokenizer --decoder work/decoder
python -m vtp encode photo.jpg --tokenizer work/tokenizer --out photo.safetensors
python -m vtp decode photo.safetensors --tokenizer work/tokenizer --decoder work/decoder --out photo.png
python -m vtp info work/latents
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vtp.texts import message, shown
from vtp.version import __version__

WRONG, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """Says mistakes in a line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, shown(f"error: {message}; see {self.prog} --help") + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exits with 2 and a line when what is asked for cannot be."""
    given = _parser().parse_args(arguments)
    try:
        print(message(given.run(given), indent=""))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ValueError, MemoryError) as error:  # ours
        _refuse(str(error) or "not enough memory")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; nothing else is expected
            raise
        _refuse(str(error))


def _refuse(problem: str) -> NoReturn:
    print(message(f"error: {'; '.join(problem.splitlines())}"), file=sys.stderr)
    sys.exit(WRONG)


# Bodies are imported when they are called: help needs no torch.


def _sample(given: argparse.Namespace) -> str:
    from vtp.commands.sample import sample

    return sample(
        given.generator,
        given.classes,
        given.prompt,
        given.prompts,
        count=given.count,
        size=given.size,
        seed=given.seed,
        steps=given.steps,
        guidance=given.guidance,
        tokenizer=given.tokenizer,
        decoder=given.decoder,
        text_encoder=given.text_encoder,
        device=given.device,
        out=given.out,
    )


def _encode(given: argparse.Namespace) -> str:
    from vtp.commands.pictures import encode

    return encode(given.pictures, given.tokenizer, size=given.size, device=given.device, out=given.out)


def _decode(given: argparse.Namespace) -> str:
    from vtp.commands.pictures import decode

    return decode(given.latents, given.tokenizer, given.decoder, device=given.device, out=given.out)


def _reconstruct(given: argparse.Namespace) -> str:
    from vtp.commands.pictures import reconstruct

    return reconstruct(
        given.pictures, given.tokenizer, given.decoder, size=given.size, device=given.device, out=given.out
    )


def _info(given: argparse.Namespace) -> str:
    from vtp.commands.info import info

    return info(given.folder)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m vtp", description="Use and describe finished artefacts.")
    parser.add_argument("--version", action="version", version=__version__, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help: str, description: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}. {description}")
        added.set_defaults(run=run)
        return added

    sample = command("sample", _sample, "draw pictures of classes or prompts, as one PNG")
    sample.add_argument("generator", type=Path, help="folder of train_generator, such as work/generator")
    sample.add_argument(
        "--class",
        dest="classes",
        metavar="CLASS",
        nargs="+",
        help="names or labels; default: the first 8",
    )
    sample.add_argument("--prompt", metavar="TEXT", nargs="+", help="of a generator that is told captions")
    sample.add_argument("--prompts", type=Path, metavar="FILE", help="the same, a prompt a line")
    sample.add_argument("--count", type=int, default=8, help="pictures of every class or prompt; default: 8")
    sample.add_argument(
        "--size",
        metavar="WIDTHxHEIGHT",
        help="of the pictures in pixels, such as 512x384; default: the smallest squares that the generator learnt",
    )
    sample.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    sample.add_argument("--steps", type=int, help="of the sampler; default: those of its sampler.json")
    sample.add_argument("--guidance", type=float, metavar="SCALE", help="classifier-free guidance; 1 is none")
    sample.add_argument("--tokenizer", type=Path, help="folder; default: `tokenizer` beside the generator")
    sample.add_argument("--decoder", type=Path, help="folder of a tuned decoder; default: `decoder` beside it, if any")
    sample.add_argument(
        "--text-encoder", type=Path, help="folder; default: `text_encoder` beside it, or its tokenizer's"
    )
    sample.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG to write; default: samples.png")

    prepared = (
        "Pictures are turned upright, made 8-bit RGB (transparency lies on white), and cropped: the short side is "
        "scaled to --size, and the centre square is taken, as training sees them."
    )
    encode = command("encode", _encode, "write the latents of pictures as one file of safetensors", prepared)
    reconstruct = command(
        "reconstruct", _reconstruct, "write pictures beside their reconstructions as one PNG; print the PSNR", prepared
    )
    decode = command("decode", _decode, "write the pictures of latents as PNG")
    for added in (encode, reconstruct):
        added.add_argument("pictures", type=Path, metavar="IMAGE", nargs="+", help="file of a picture")
    decode.add_argument(
        "latents",
        type=Path,
        metavar="LATENTS",
        help="file of `encode`, or one of those in a folder of cached latents or samples",
    )
    for added in (encode, reconstruct, decode):
        added.add_argument(
            "--tokenizer",
            required=True,
            metavar="FOLDER",
            help="folder such as work/tokenizer, or the hub id of a published one",
        )
    for added in (reconstruct, decode):
        added.add_argument(
            "--decoder", type=Path, metavar="FOLDER", help="folder of a tuned decoder; default: the tokenizer's own"
        )
    for added in (encode, reconstruct):
        added.add_argument(
            "--size",
            type=int,
            help="side of the square in pixels, a multiple of the patch; default: that of the tokenizer's training",
        )
    encode.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="file to write")
    reconstruct.add_argument(
        "--out", type=Path, default=Path("reconstructions.png"), help="PNG to write; default: reconstructions.png"
    )
    decode.add_argument(
        "--out", type=Path, required=True, help="PNG to write, of one latent; or a new folder, for 000000.png and so on"
    )
    for added in (sample, encode, reconstruct, decode):
        added.add_argument("--device", help="such as cuda or cpu; default: a GPU when there is one")

    info = command("info", _info, "say what the folder of an artefact is")
    info.add_argument(
        "folder", type=Path, metavar="FOLDER", help="any artefact, such as work/tokenizer, or a file of latents"
    )
    return parser


if __name__ == "__main__":
    main()
