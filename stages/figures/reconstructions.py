"""Images beside what decoders make of their latents, and what `evaluate_reconstruction` writes down of that."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.figures.drawing import Panel, panels
from stages.figures.side_by_side import PAIRS
from vtp.artefact import whole_file
from vtp.data.crops import cropped
from vtp.data.dataset import ShardDataset
from vtp.distributed import own_rows
from vtp.evaluation.latents import LatentDiagnostics
from vtp.host import Host
from vtp.inference.grid import grid
from vtp.layers.images import normalise, to_uint8
from vtp.models.base import Tokenizer
from vtp.texts import write_csv

ORIGINAL = "original"


class Comparison:
    """The images `rows` of a split as squares of `size` pixels, and tokenizers that share an encoder, by their decoders."""

    def __init__(
        self,
        data: ShardDataset,
        rows: np.ndarray,
        models: Mapping[str, Tokenizer],
        *,
        size: int,
        batch_size: int,
        host: Host,
    ) -> None:
        self.data = data
        self.rows = rows
        self.models = models
        self.size = size
        self._first = next(iter(models.values()))
        self._batch_size = batch_size
        self._host = host

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(d, h, w)."""
        side = self.size // self._first.pixels_per_latent
        return self._first.latent_shape[0], side, side

    def own_batches(self, most: int | None = None) -> list[np.ndarray]:
        """This rank's share of the rows, or of the first `most`.

        Ranks share whole batches: what an image is computed with, and so its rounding, depends on no number of ranks.
        """
        rows = self.rows[:most]
        batches = np.split(rows, range(self._batch_size, len(rows), self._batch_size))
        return [batches[index] for index in own_rows(len(batches))]

    def all_originals(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Rows and their images of batches, decoded by worker processes."""
        with closing(cropped(self.data, batches, self.size, self._host)) as stream:
            yield from zip(batches, stream, strict=True)

    def originals(self, rows: np.ndarray) -> Tensor:
        """Centre-cropped images [B, 3, S, S] uint8."""
        return self.data.images(rows, self.size).to(self._host.device)

    def encode(self, originals: Tensor) -> Tensor:
        """Latents [B, d, h, w] of uint8 images."""
        return self._first.encode(normalise(originals))

    def decode(self, latents: Tensor) -> dict[str, Tensor]:
        """What every decoder makes of latents, as a file would hold it: uint8 [B, 3, S, S]."""
        return {
            name: to_uint8(model.decode(latents), f"images of the {name} decoder")
            for name, model in self.models.items()
        }

    def write_images(self, values: Tensor, names: Sequence[str], path: Path) -> None:
        """A row per image: shard, key, and `values` [N, models, 3] under `<decoder>_<name>`. Equal bytes for equals."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Sequence[str] | np.ndarray] = {
            "shard": [self.data.shards[self.data.shard_of(int(row))].name for row in self.rows],
            "key": [self.data.key(int(row)) for row in self.rows],
        }
        for position, model in enumerate(self.models):
            for column, name in enumerate(names):
                columns[f"{model}_{name}"] = values[:, position, column].numpy()
        with whole_file(path) as temporary:
            pq.write_table(pa.table(columns), temporary, compression="zstd")

    def draw(self, values: Tensor, names: Sequence[str], count: int, folder: Path) -> None:
        """Pictures of the first, worst, median and best `count` images, each over what the decoders make of it.

        Ordered by the perceptual distance of the last decoder, the tuned one where there is one: PSNR would call all
        fine textures bad.
        """
        folder.mkdir()
        order = np.argsort(values[:, -1, -1].numpy(), kind="stable")
        count = min(count, len(order))
        middle = (len(order) - count) // 2
        chosen = {
            "first": np.arange(count),
            "worst": order[::-1][:count],
            "median": order[middle : middle + count],
            "best": order[:count],
        }
        by = f"by {names[-1]} of the {list(self.models)[-1]} decoder"
        titles = {"first": "First images", **{name: f"{name.capitalize()} images {by}" for name in list(chosen)[1:]}}
        for name, positions in chosen.items():
            originals = self.originals(self.rows[positions])
            pictures = {ORIGINAL: originals, **self.decode(self.encode(originals))}
            notes = [[self.data.key(int(row)) for row in self.rows[positions]]]
            notes += [
                [f"{psnr:.2f} dB\n{ssim:.3f}  {distance:.4f}" for psnr, ssim, distance in of_model.tolist()]
                for of_model in values[positions.copy()].unbind(1)
            ]
            title = f"{titles[name]}; below each PSNR, SSIM, {names[-1]}"
            grid(list(pictures.values()), list(pictures), folder / f"{name}.png", title=title, notes=notes)
            if name == "first":
                write_pairs(originals, list(pictures.values())[-1], folder / PAIRS)


def write_pairs(originals: Tensor, written: Tensor, path: Path) -> None:
    """Uint8 images [n, 3, S, S] over what a decoder makes of them, S pixels each, as `stages.figures.side_by_side` reads."""
    from PIL import Image

    rows = [images.permute(2, 0, 3, 1).flatten(1, 2) for images in (originals, written)]  # [S, n * S, 3]
    Image.fromarray(torch.cat(rows).cpu().numpy()).save(path, format="PNG")


def write_diagnostics(
    latents: LatentDiagnostics, levels: Sequence[float], noisy: Mapping[str, Sequence[float]], folder: Path
) -> None:
    """Curves as CSV and as pictures: channels, spectrum of the covariance, spatial power, PSNR under noise."""
    folder.mkdir()
    channels = range(len(latents.mean))
    share = latents.spectrum / latents.spectrum.sum()
    curves: dict[str, dict[str, Sequence[float]]] = {
        "channels": {"channel": channels, "mean": latents.mean.tolist(), "std": latents.std.tolist()},
        "spectrum": {
            "component": range(1, len(share) + 1),
            "eigenvalue": latents.spectrum.tolist(),
            "share": share.tolist(),
            "cumulative_share": share.cumsum(0).tolist(),
        },
        "power": {"cycles_per_token": latents.power.frequency.tolist(), "power": latents.power.power.tolist()},
        "noise": {"level": levels, **noisy},
    }
    for name, columns in curves.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            write_csv(file, [columns])
            write_csv(file, ([f"{value:.9g}" for value in row] for row in zip(*columns.values(), strict=True)))
    channel, spectrum, power = (curves[name] for name in ("channels", "spectrum", "power"))
    panels(
        [
            Panel("channels", "channel", channel["channel"], {name: channel[name] for name in ("mean", "std")}),
            Panel(
                "spectrum of the covariance", "component", spectrum["component"], {"share": spectrum["share"]}, log=True
            ),
            Panel(
                "spatial power (white noise: 1)",
                "cycles per token",
                power["cycles_per_token"],
                {"power": power["power"]},
                log=True,
            ),
            Panel("PSNR of noisy latents in dB", "noise, in deviations of the channel", levels, noisy),
        ],
        folder / "latents.png",
    )
