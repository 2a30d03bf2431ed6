"""Files of ADM's evaluation (Dhariwal and Nichol 2021): its reference batches are read, sample batches are written.

Both are npz, a zip of arrays. A reference batch holds `mu` and `sigma` of Inception's pooled features over all images,
`mu_s` and `sigma_s` of the spatial ones, and 10,000 images `arr_0` for precision and recall; a sample batch images
`arr_0` [N, H, W, 3] uint8 and perhaps labels `arr_1` [N]. Nothing is unpickled, nothing is decompressed before its size
is known to be right, and images stream.
"""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

from vtp.artefact import ArtefactError, siblings, whole_file
from vtp.evaluation.frechet import Moments
from vtp.evaluation.networks import Inception

POOLED, SPATIAL, IMAGES, LABELS = ("mu", "sigma"), ("mu_s", "sigma_s"), "arr_0", "arr_1"
DIMS = {POOLED: Inception.DIM, SPATIAL: Inception.CHANNELS * Inception.SIDE**2}
LONGEST_HEADER = 1 << 12  # bytes before an array; numpy writes 128
REMEDY = "is it an npz of ADM's layout? If so, fetch it again"


class _Header(NamedTuple):
    """What an array says of itself before its values."""

    shape: tuple[int, ...]
    dtype: np.dtype


class SampleBatch:
    """A sample batch. Raises ArtefactError for a file that is none, before anything large is read."""

    needed: tuple[str, ...] = (IMAGES,)
    prompts = None  # nobody says

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as archive:
            names = archive.namelist()
            if missing := [name for name in self.needed if f"{name}.npy" not in names]:
                raise ArtefactError(f"{path}: no {missing[0]}.npy among {', '.join(sorted(names)[:8])}; {REMEDY}")
            with self._array(archive, IMAGES) as (_, header):
                shape = header.shape
        if header.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or shape[1] != shape[2]:
            raise ArtefactError(
                f"{path}: {IMAGES} holds {header.dtype} {list(shape)}, not uint8 [N, S, S, 3]; {REMEDY}"
            )
        self.count, self.image_size = shape[0], shape[1]
        self.labels = None  # [N] int64, where there are some
        if f"{LABELS}.npy" in names:
            with _opened(path) as archive:
                self.labels = self._values(archive, LABELS, (self.count,), np.integer).long()

    def __len__(self) -> int:
        """Number of images."""
        return self.count

    def batches(self, size: int, numbers: Iterable[int]) -> Iterator[Tensor]:
        """The batches with these `numbers`, ascending, of `size` images: [B, 3, S, S] uint8."""
        image = self.image_size**2 * 3  # bytes
        with _opened(self.path) as archive, self._array(archive, IMAGES) as (file, _):
            start = file.tell()
            for number in numbers:
                first = number * size
                count = min(size, self.count - first)
                file.seek(start + first * image)  # forwards: what lies between is read and forgotten
                pixels = torch.frombuffer(bytearray(_read(file, count * image)), dtype=torch.uint8)
                yield pixels.view(count, self.image_size, self.image_size, 3).permute(0, 3, 1, 2)

    def _values(self, archive: ZipFile, name: str, shape: tuple[int, ...], kind: type[np.generic]) -> Tensor:
        with self._array(archive, name) as (file, header):
            if header.shape != shape or not np.issubdtype(header.dtype, kind):
                raise ArtefactError(
                    f"{self.path}: {name} holds {header.dtype} {list(header.shape)}, not {kind.__name__} {list(shape)}; "
                    f"{REMEDY}"
                )
            content = _read(file, int(np.prod(shape)) * header.dtype.itemsize)
        return torch.from_numpy(np.frombuffer(content, header.dtype).reshape(shape).astype(np.float64))

    @contextmanager
    def _array(self, archive: ZipFile, name: str) -> Iterator[tuple[IO[bytes], _Header]]:
        """The values of an array, once what it claims to be agrees with its size."""
        info = archive.getinfo(f"{name}.npy")
        if info.flag_bits & 1:
            raise ArtefactError(f"{self.path}: {name} is encrypted; {REMEDY}")
        with archive.open(info) as file:
            header = self._header(file, info, name)
            yield file, header

    def _header(self, file: IO[bytes], info: ZipInfo, name: str) -> _Header:
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):  # whose header cannot be long
                raise ValueError(f"numpy format {version}")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=LONGEST_HEADER)
            if fortran or dtype.hasobject:
                raise ValueError("columns first" if fortran else "Python objects")
            claimed = file.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
            if claimed != info.file_size:
                raise ValueError(f"{info.file_size} bytes where {dtype} {list(shape)} takes {claimed}")
        except ValueError as error:
            raise ArtefactError(f"{self.path}: {name} cannot be read ({error}); {REMEDY}") from None
        return _Header(shape, dtype)


class AdmReference(SampleBatch):
    """A reference batch, such as VIRTUAL_imagenet256_labeled.npz. Raises ArtefactError for a file that is none."""

    needed = (*POOLED, *SPATIAL, IMAGES)

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with _opened(path) as archive:
            self.statistics = self._moments(archive, POOLED)
            self.spatial = self._moments(archive, SPATIAL)

    def _moments(self, archive: ZipFile, names: tuple[str, str]) -> Moments:
        dim = DIMS[names]
        mean, covariance = (
            self._values(archive, name, shape, np.floating)
            for name, shape in zip(names, ((dim,), (dim, dim)), strict=True)
        )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ArtefactError(f"{self.path}: {names[0]} or {names[1]} holds NaN or infinity; {REMEDY}")
        scale = covariance.diagonal().max()
        if covariance.diagonal().min() < 0 or (covariance - covariance.T).abs().max() > 1e-4 * scale:
            raise ArtefactError(f"{self.path}: {names[1]} is no covariance; {REMEDY}")
        return Moments(mean, (covariance + covariance.T) / 2)


def write_batch(path: Path, images: Iterable[Tensor], labels: Tensor | None, *, count: int, image_size: int) -> None:
    """A sample batch of `count` images, from uint8 batches [B, 3, S, S] that stream; whole or not at all.

    Equal images give equal bytes. Raises ValueError when they are others than announced.
    """
    with whole_file(path) as temporary, ZipFile(temporary, "w") as archive:
        shape, written = (count, image_size, image_size, 3), 0
        with archive.open(ZipInfo(f"{IMAGES}.npy"), "w", force_zip64=True) as file:
            file.write(_header_of(shape, "|u1"))
            for batch in images:
                if batch.dtype != torch.uint8 or batch.shape[1:] != (3, image_size, image_size):
                    raise ValueError(
                        f"{path}: a batch of {batch.dtype} {list(batch.shape)} among uint8 images [B, 3, {image_size}, "
                        f"{image_size}]"
                    )
                file.write(batch.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
                written += len(batch)
        if written != count or (labels is not None and len(labels) != count):
            raise ValueError(
                f"{path}: {written} images and {None if labels is None else len(labels)} labels, announced were {count}"
            )
        if labels is not None:
            with archive.open(ZipInfo(f"{LABELS}.npy"), "w") as file:
                file.write(_header_of((count,), "<i8"))
                file.write(labels.to(torch.int64).cpu().numpy().tobytes())


def _header_of(shape: tuple[int, ...], dtype: str) -> bytes:
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": dtype})
    return header.getvalue()


def _read(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise BadZipFile(f"an array ends after {len(content)} of {size} bytes")
    return content


@contextmanager
def _opened(path: Path) -> Iterator[ZipFile]:
    try:
        with ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; {siblings(path)}") from None
    except (BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise ArtefactError(f"{path}: not a whole npz file ({error}); {REMEDY}") from None
