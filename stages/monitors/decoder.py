"""Validation metrics and image grids during decoder tuning, by the averaged weights."""

from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stages.monitors.snapshots import SnapshotStore
from vtp.config import Config
from vtp.data.dataset import ShardDataset
from vtp.distributed import gather_rows, own_rows, ranks
from vtp.evaluation.reconstruction import psnr
from vtp.host import Host
from vtp.inference.grid import grid
from vtp.layers.images import normalise, to_uint8
from vtp.losses.perceptual import PerceptualDistance
from vtp.models.base import Tokenizer
from vtp.step import UNINFORMED, Logs, StepContext


class DecoderMonitorConfig(Config):
    """Evaluations during decoder tuning."""

    evaluations: int = Field(ge=1, description="evaluations, evenly spaced over the run; the last is at its end")
    samples: int = Field(ge=1, description="validation images whose PSNR and perceptual distance are taken")
    pictures: int = Field(ge=1, description="validation images that are shown")
    batch_size: int = Field(ge=1, description="validation images of a forward pass")


class DecoderMonitor:
    """Evaluations at even intervals; ranks share the images. The decoder as it came is the reference of every figure."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        average: nn.Module,
        images: ShardDataset,
        config: DecoderMonitorConfig,
        *,
        perceptual: PerceptualDistance,
        host: Host,
    ) -> None:
        self._tokenizer = tokenizer
        self._average = average
        self._images = images
        self._config = config
        self._perceptual = perceptual
        self._snapshots = SnapshotStore(host.folder / "snapshots", config.evaluations)
        self._device = host.device
        self._shown = images.images(range(min(config.pictures, len(images))), tokenizer.image_size)
        self._before = self._figures(tokenizer.pixel_decoder)
        self._first = self._render(tokenizer.pixel_decoder)

    def due(self, context: StepContext) -> bool:
        return self._snapshots.due(context)

    @torch.no_grad()
    def evaluate(self, context: StepContext) -> Logs:
        if ranks().first:
            self._snapshots.save(context, self._render(self._average))
        before = {f"{name}{UNINFORMED}": value for name, value in self._before.items()}
        return self._figures(self._average) | before

    def draw(self, path: Path, *, steps: int) -> None:
        """Originals over the decoder as it came and the averaged one at every evaluation, as one PNG."""
        rows = {"original": self._shown, "before": self._first, **self._snapshots.rows(steps)}
        grid(list(rows.values()), list(rows), path, title="reconstructions while the decoder is tuned")

    @torch.no_grad()
    def _render(self, decoder: nn.Module) -> Tensor:
        """Uint8 reconstructions [n, 3, S, S] of the images that are shown."""
        parts = [self._reconstruct(decoder, images) for images in self._shown.split(self._config.batch_size)]
        return torch.cat(parts).cpu()

    @torch.no_grad()
    def _figures(self, decoder: nn.Module) -> dict[str, float]:
        """Means over the images, this rank's share of them and then everybody's."""
        own = np.asarray(own_rows(min(self._config.samples, len(self._images))))
        metrics = [torch.empty(0, 2)]
        for rows in np.array_split(own, max(1, -(-len(own) // self._config.batch_size))):
            if len(rows):
                originals = self._images.images(rows, self._tokenizer.image_size)
                written = self._reconstruct(decoder, originals) / 255
                originals = originals.to(self._device) / 255
                distance = self._perceptual(originals * 2 - 1, written * 2 - 1)
                metrics.append(torch.stack([psnr(originals, written), distance], 1).cpu())
        mean_psnr, mean_distance = gather_rows(torch.cat(metrics)).double().mean(0).tolist()
        return {"validation_psnr": mean_psnr, f"validation_lpips_{self._perceptual.name}": mean_distance}

    def _reconstruct(self, decoder: nn.Module, originals: Tensor) -> Tensor:
        return to_uint8(decoder(self._tokenizer.encode(normalise(originals.to(self._device)))))
