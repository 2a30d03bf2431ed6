"""Encode every distinct caption once by a frozen text encoder, for a generator that is told captions (paper 5).

Files are shared by ranks, and a killed run goes on with those that are missing.
"""

from typing import Annotated

import torch
from pydantic import Field

from stages.runner.run import Input, OptionalInput, Output, main
from vtp.artefact import ArtefactError, save_tensors
from vtp.config import Config
from vtp.data.captions import distinct_captions, finish_captions, ragged
from vtp.data.dataset import ShardDataset
from vtp.data.latents import plan_shards, row_count
from vtp.data.shared_files import SharedFiles
from vtp.device import Precision, computing
from vtp.distributed import ranks
from vtp.finite import require_finite
from vtp.host import Host
from vtp.layers.captions import Captions
from vtp.models.text_encoder import CaptionTokens, TextEncoder, TextEncoderConfig, load_text_encoder

SPLITS = ("train", "validation")


class CacheCaptions(Config):
    """The section `cache_captions`."""

    encoder: TextEncoderConfig
    precision: Precision = Field(description="precision of the text encoder's forward pass")
    batch_size: int = Field(ge=1, description="captions per forward pass")
    shard_size: int = Field(ge=1, description="captions per file")


@torch.inference_mode()
def run(
    config: CacheCaptions,
    *,
    shards: Annotated[Input, "folder of prepare_data, whose captions are encoded"],
    text_encoder: Annotated[
        OptionalInput, "folder of the text encoder: a tokenizer with a text tower, or a model of transformers"
    ] = None,
    captions: Annotated[Output, "folder for the features of captions"],
    host: Host,
) -> None:
    encoder = load_text_encoder(config.encoder, text_encoder, weights=host.weights).to(host.device)
    texts = distinct_captions(ShardDataset(shards, split) for split in SPLITS)
    if not texts:
        raise ArtefactError(f"{shards}: no picture has a caption; give the source some, or train on classes")
    files = plan_shards({"captions": len(texts)}, config.shard_size)
    shared = SharedFiles(host.folder / "captions", files)
    done, total = shared.done, shared.done + row_count(shared.own)
    with host.progress(total=total, description="encoding", unit="caption", done=done) as bar:
        for shard in shared.own:
            parts = []
            for first in range(shard.rows.start, shard.rows.stop, config.batch_size):
                batch = texts[first : min(first + config.batch_size, shard.rows.stop)]
                parts.append(_encode(encoder, batch, config, host))
                bar.update(len(batch))
            features, mask = (torch.cat(each) for each in zip(*parts, strict=True))
            save_tensors(shard.path(shared.folder), ragged(features, mask))
            if host.stop_seen:
                break
    shared.end(host)
    if not ranks().first:
        return
    values = {
        "text_encoder": encoder.record.model_dump(mode="json"),
        "width": encoder.width,
        "length": encoder.length,
    }
    finish_captions(shared.folder, files, texts, values)
    shared.folder.rename(captions)
    host.record(captions=len(texts))


def _encode(encoder: TextEncoder, batch: list[str], config: CacheCaptions, host: Host) -> Captions:
    """On the CPU."""
    tokens = CaptionTokens(*(each.to(host.device) for each in encoder.tokenize(batch)))
    with computing(config.precision, host.device):
        features, mask = encoder(tokens)
    require_finite(features[mask], "tokens of a batch of captions", "set cache_captions.precision to float32")
    return Captions(features.float().cpu(), mask.cpu())


if __name__ == "__main__":
    main(run, distributed=True)
