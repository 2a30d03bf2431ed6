"""Encode the labelled training images once: sharded latents and their statistics per channel (paper 4.1)."""

from typing import Literal

import torch
from pydantic import Field

from stages._runner import Input, Output, Work, main
from vtp.config import Config
from vtp.data.dataset import ShardDataset
from vtp.data.latents import LatentWriter
from vtp.layers.images import normalise
from vtp.models.loading import load_tokenizer


class CacheLatents(Config):
    """The section `cache_latents`."""

    dtype: Literal["float32", "bfloat16"] = Field(description="of the stored latents")
    batch_size: int = Field(ge=1, description="images per forward pass")
    shard_size: int = Field(ge=1, description="latents per file")


@torch.inference_mode()
def run(config: CacheLatents, *, shards: Input, tokenizer: Input, latents: Output, work: Work) -> None:
    images = ShardDataset(shards, "train", cache=work.cache)
    model = load_tokenizer(tokenizer).to(work.device)
    singles = images.singles()  # scenes have no class
    writer = LatentWriter(work.folder / "latents", shard_size=config.shard_size)
    with work.progress(total=len(singles.rows), description="encoding", unit="image") as bar:
        for path, rows in writer.missing(len(singles.rows)):
            parts = []
            for first in range(rows.start, rows.stop, config.batch_size):
                chosen = singles.rows[first : min(first + config.batch_size, rows.stop)]
                pixels = images.images(chosen, model.image_size).to(work.device)
                parts.append(model.encode(normalise(pixels)).cpu())
                bar.update(len(chosen))
            labels = torch.from_numpy(singles.labels[rows.start : rows.stop])
            writer.write(path, torch.cat(parts).to(getattr(torch, config.dtype)), labels)
            if work.stop_requested:
                work.stop()
    writer.finish(len(singles.rows), {"classes": images.manifest.classes, "encoder": model.encoder_digest()})
    writer.folder.rename(latents)
    work.record(samples=len(singles.rows))


if __name__ == "__main__":
    main(run)
