"""The same pictures as every run reconstructs them, under each other (paper figure 9 a)."""

from pathlib import Path

import numpy as np

from vtp.artefact import ArtefactError
from vtp.inference.grid import grid
from vtp.layers.decode import read_rgb
from vtp.params import END

PAIRS = "pairs.png"  # the first images over a decoder's, pixel by pixel and without words


def draw_side_by_side(plots: Path, path: Path) -> None:
    """Originals, and below them what the last point of every run makes of them, with the PSNR of each, as one PNG.

    `plots` holds `<run>/.../<point>/reconstructions`, as `evaluate_reconstruction` writes them; of several trainings of a
    run the first counts. Nothing is written where there are none. Raises ArtefactError when runs reconstruct other pictures.
    """
    rows: dict[str, np.ndarray] = {}
    notes: list[list[str]] = []
    for name, pairs in last_point(plots, f"reconstructions/{PAIRS}").items():
        originals, written = _read(pairs)
        if not np.array_equal(rows.setdefault("original", originals), originals):
            raise ArtefactError(f"{pairs}: other pictures than those of the runs before; evaluate all on the same data")
        rows[name] = written
        notes.append([f"{value:.2f} dB" for value in _psnr(originals, written)])
    if rows:
        notes = [[""] * len(rows["original"]), *notes]
        grid(
            list(rows.values()),
            list(rows),
            path,
            title="The same pictures through every tokenizer; PSNR below",
            notes=notes,
        )


def last_point(plots: Path, file: str) -> dict[str, Path]:
    """A file in the folder of a point, by run: of its first training that has it the last point."""
    found: dict[str, Path] = {}
    for run in sorted(folder for folder in plots.iterdir() if folder.is_dir()):
        points = {path.relative_to(plots): path for path in run.rglob(file)}
        if points:
            found[run.name] = points[min(points, key=lambda path: _order(path, len(Path(file).parts)))]
    return found


def _order(path: Path, below: int) -> tuple[str, float]:
    """The first training of a run, and of that the last point; `below` parts of the path are within a point."""
    *of_run, point = path.parts[:-below]
    return "/".join(of_run), -float("inf" if point == END else point)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Uint8 images [n, 3, S, S] of the upper and of the lower row."""
    pixels = np.array(read_rgb(path))
    side = len(pixels) // 2
    upper, lower = (row.reshape(side, -1, side, 3).transpose(1, 3, 0, 2) for row in (pixels[:side], pixels[side:]))
    return upper, lower


def _psnr(originals: np.ndarray, written: np.ndarray) -> np.ndarray:
    """10 log10(255^2 / mean squared error) of each pair, in dB."""
    error = np.square(originals.astype(np.float64) - written).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)
