"""`encode`, `decode`, `reconstruct`: pictures through a tokenizer.

A file of latents holds `latents` [N, d, h, w] float32, and says under `vtp` in its metadata what they are (`LatentsFile`).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vtp.artefact import ArtefactError, load_tensors, read_json, reading_tensors, save_tensors, whole_file, whole_folder
from vtp.commands.places import device_of, require_file, require_new_folder
from vtp.config import Config
from vtp.evaluation.reconstruction import psnr
from vtp.finite import require_finite
from vtp.layers.decode import DecodeError, open_header
from vtp.layers.images import to_uint8
from vtp.models.base import Tokenizer
from vtp.models.loading import load_tokenizer

if TYPE_CHECKING:
    from numpy import ndarray

BATCH = 16  # pictures at a time
METADATA = "vtp"
SUFFIX = ".safetensors"
LIKE_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class LatentsFile(Config):
    """What a file of latents says of itself."""

    format_version: Literal[1] = 1
    encoder: str  # digest of that whose latents these are
    size: int  # side of the pictures that were encoded
    pictures: list[str]  # names of their files, in the order of the latents


class Latents(NamedTuple):
    """Latents of a file, and whose they are."""

    latents: Tensor  # [N, d, h, w]
    encoder: str  # digest


def encode(pictures: Sequence[Path], tokenizer: str, *, size: int | None, device: str | None, out: Path) -> str:
    """Write the latents of pictures as one file; where it is. Raises ValueError or OSError before it is written."""
    require_file(out, SUFFIX, "safetensors")
    require_pictures(pictures)
    device = device_of(device)
    model = load_tokenizer(tokenizer).to(device)
    latents = torch.cat([model.encode(batch.to(device)).float().cpu() for batch in _batches(model, pictures, size)])
    require_finite(latents, f"latents of {tokenizer}", "fetch the tokenizer again")
    said = LatentsFile(
        encoder=model.encoder_digest(), size=size or model.image_size, pictures=[path.name for path in pictures]
    )
    save_tensors(out, {"latents": latents}, {METADATA: json.dumps(said.model_dump())})
    return str(out.resolve())


def decode(path: Path, tokenizer: str, decoder: Path | None, *, device: str | None, out: Path) -> str:
    """Write the pictures of a file of latents: one as a PNG, or 000000.png and so on in a folder; where they are.

    Raises ValueError or OSError, before anything is written.
    """
    held = read_latents(path)
    count = len(held.latents)
    if out.suffix.lower() in LIKE_PICTURES:
        raise ValueError(f"--out {out}: the name of a PNG file, ending in .png, or of a folder")
    alone = out.suffix == ".png"
    if alone and count != 1:
        raise ValueError(f"--out {out}: {path} holds {count} latents; name a folder for their pictures")
    if alone:
        require_file(out, ".png", "PNG")
    else:
        require_new_folder(out)
    device = device_of(device)
    model = load_tokenizer(tokenizer, decoder).to(device)
    if model.encoder_digest() != held.encoder:
        raise ArtefactError(
            f"{path}: latents of another encoder than that of {tokenizer}; name the tokenizer they are of"
        )
    if alone:
        with whole_file(out) as temporary:
            _save(_decoded(model, held.latents, path)[0], temporary)
    else:
        with whole_folder(out) as temporary:
            for first in range(0, count, BATCH):
                for number, pixels in enumerate(_decoded(model, held.latents[first : first + BATCH], path), first):
                    _save(pixels, temporary / f"{number:06d}.png")
    return str(out.resolve())


def reconstruct(
    pictures: Sequence[Path], tokenizer: str, decoder: Path | None, *, size: int | None, device: str | None, out: Path
) -> str:
    """Write pictures and beside each its reconstruction as one PNG; a line each with its PSNR, and where the PNG is.

    What is written is what is compared: uint8 crops [S, S], originals on the left. Raises ValueError or OSError.
    """
    require_file(out, ".png", "PNG", pictures)
    require_pictures(pictures)
    device = device_of(device)
    model = load_tokenizer(tokenizer, decoder).to(device)
    rows, distances = [], []
    for batch in _batches(model, pictures, size):
        latents = model.encode(batch.to(device))
        originals, written = to_uint8(batch), _decoded(model, latents, tokenizer)
        distances += psnr(originals / 255, written / 255).tolist()
        rows.append(torch.cat([originals, written], dim=3))  # [B, 3, S, 2 S]
    with whole_file(out) as temporary:
        _save(torch.cat(list(torch.cat(rows)), dim=1), temporary)
    lines = [f"{path}: PSNR {distance:.2f} dB" for path, distance in zip(pictures, distances, strict=True)]
    if len(lines) > 1:
        lines.append(f"mean of {len(lines)}: PSNR {sum(distances) / len(distances):.2f} dB")
    return "\n".join([*lines, str(out.resolve())])


def require_pictures(pictures: Sequence[Path]) -> None:
    """Raises DecodeError or OSError for the first that is no file of a picture; pixels are not decoded yet."""
    for path in pictures:
        try:
            open_header(path.read_bytes())
        except DecodeError as error:
            raise DecodeError(f"{path}: {error}") from None


def read_latents(path: Path) -> Latents:
    """Of `encode`, or a file of a folder of cached latents or samples. Raises ArtefactError for another one."""
    if path.is_dir():
        inside = next((each.name for each in sorted(path.glob(f"*-*{SUFFIX}"))), None)
        raise ArtefactError(
            f"{path}: a folder; name one file of latents{f', such as {path / inside}' if inside else ''}"
        )
    tensors = load_tensors(path)
    latents = tensors.get("latents")
    if latents is None or latents.ndim != 4 or not latents.is_floating_point() or not latents.numel():
        held = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:4])
        raise ArtefactError(f"{path}: holds {held or 'nothing'}; expected floating-point `latents` [N, d, h, w]")
    require_finite(latents, f"latents in {path}", "make the file again")
    return Latents(latents, _encoder_of(path))


def describe_latents(path: Path) -> LatentsFile | None:
    """What a file says of itself; None: nothing. Raises ArtefactError when it cannot be read, ConfigError for others."""
    from safetensors import safe_open

    with reading_tensors(path), safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get(METADATA)
    try:
        return None if said is None else LatentsFile.parse(json.loads(said), where=f"{path}: metadata")
    except json.JSONDecodeError as error:
        raise ArtefactError(f"{path}: its metadata are not valid JSON ({error}); make it again") from None


def _encoder_of(path: Path) -> str:
    """Digest of the encoder that a file names, or the folder in which it lies."""
    said = describe_latents(path)
    if said is not None:
        return said.encoder
    beside = path.parent / "config.json"
    encoder = read_json(beside).get("encoder") if beside.is_file() else None
    if not isinstance(encoder, str):
        raise ArtefactError(
            f"{path}: does not say whose latents these are; `python -m vtp encode` writes files that do"
        )
    return encoder


def _batches(model: Tokenizer, pictures: Sequence[Path], size: int | None) -> Iterator[Tensor]:
    """Normalised [B, 3, S, S]."""
    for first in range(0, len(pictures), BATCH):
        yield model.preprocess(pictures[first : first + BATCH], size)


def _decoded(model: Tokenizer, latents: Tensor, where: str | Path) -> Tensor:
    """uint8 [B, 3, H, W] on the CPU."""
    device = next(model.parameters()).device
    return to_uint8(model.decode(latents.float().to(device)), f"images of latents of {where}").cpu()


def _save(pixels: Tensor, path: Path) -> None:
    """uint8 [3, H, W] as a PNG."""
    array: ndarray = pixels.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(array).save(path, format="PNG")
