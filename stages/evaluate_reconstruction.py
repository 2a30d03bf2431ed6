"""Reconstruction by the pre-trained decoder and a tuned one, and what the latents between are like.

PSNR, SSIM, LPIPS and rFID of ADM's centre crops of a split, as `<split>_centre<size>` says in the names of metrics. The
images are those of the reference statistics, which come from the same crops. Beside them stand figures of the latents,
what noise on them costs, and the speed of encoder and decoder (paper 4.4 and table 2).
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stages.figures.reconstructions import Comparison, write_diagnostics
from stages.runner.run import Input, OptionalInput, Output, main
from vtp.artefact import write_json
from vtp.config import Config, number_name
from vtp.data.dataset import ShardDataset
from vtp.data.remote import ShardCache
from vtp.distributed import gather_rows, ranks
from vtp.evaluation.features import FeatureExtractor, build_extractors, count_name, extract
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.evaluation.latents import LatentAccumulator, LatentNoise
from vtp.evaluation.reconstruction import Quality, psnr, quality
from vtp.evaluation.reference import Reference
from vtp.evaluation.speed import measure_speed
from vtp.host import Host
from vtp.layers.images import normalise
from vtp.losses.perceptual import PerceptualConfig, PerceptualDistance, build_perceptual
from vtp.models.loading import load_tokenizer


class NoiseRobustnessConfig(Config):
    """PSNR of what is decoded from latents with noise."""

    seed: int = Field(description="seed of the noise")
    levels: list[float] = Field(min_length=1, description="levels of the noise, in standard deviations of each channel")
    samples: int = Field(ge=1, description="the first so many images")

    @model_validator(mode="after")
    def _levels_rise(self) -> Self:
        if self.levels[0] < 0 or any(b <= a for a, b in pairwise(self.levels)):
            raise ValueError(f"levels must rise from 0 or above, given {self.levels}")
        return self


class SpeedConfig(Config):
    """How long encoder and decoder are timed."""

    warmup: int = Field(ge=0, description="batches before the clock starts")
    batches: int = Field(ge=1, description="batches that are timed")


class EvaluateReconstruction(Config):
    """The section `evaluate_reconstruction`."""

    split: str = Field(
        min_length=1, description="split of the shards that is reconstructed; the reference must have it"
    )
    perceptual: PerceptualConfig = Field(description="the distance under LPIPS's formula")
    batch_size: int = Field(ge=1, description="images of a forward pass")
    pictures: int = Field(ge=1, description="images in each of the comparisons")
    noise: NoiseRobustnessConfig
    speed: SpeedConfig


@torch.inference_mode()
def run(  # noqa: PLR0913 - one flag per output
    config: EvaluateReconstruction,
    *,
    shards: Annotated[Input, "folder of prepare_data, with the pictures to reconstruct"],
    tokenizer: Annotated[Input, "folder of the tokenizer"],
    decoder: Annotated[
        OptionalInput, "folder of a tuned decoder, to compare with the tokenizer's own; default: none"
    ] = None,
    reference: Annotated[Input, "folder of the stage reference, which rFID compares with"],
    metrics: Annotated[Output, "JSON file for rFID, PSNR, SSIM and LPIPS"],
    images: Annotated[Output, "parquet file for the figures of every image"],
    pictures: Annotated[Output, "folder for grids: first, worst and best reconstructions"],
    diagnostics: Annotated[Output, "folder for curves of what the latents are like"],
    speed: Annotated[Output, "JSON file for images per second and memory"],
    host: Host,
) -> None:
    torch.backends.cudnn.allow_tf32 = False  # figures are those of float32 convolutions
    models = {"pretrained": load_tokenizer(tokenizer).to(host.device)}
    if decoder is not None:
        models["tuned"] = load_tokenizer(tokenizer, decoder).to(host.device)
    for model in models.values():
        model.require_decoder(tokenizer)
    data = ShardDataset(shards, config.split, cache=ShardCache.of(host))
    statistics = Reference.load(reference)
    size = statistics.image_size
    statistics.require_data(data)
    models["pretrained"].require_sizes([(size, size)])
    real = statistics.of(config.split)
    comparison = Comparison(data, real.rows, models, size=size, batch_size=config.batch_size, host=host)
    extractors = build_extractors(statistics.features, weights=host.weights, device=host.device)
    perceptual = build_perceptual(config.perceptual, weights=host.weights).to(host.device)

    measured = _measure(comparison, extractors, perceptual, host)
    latents = measured.latents.diagnostics()
    noisy = _noise_curves(comparison, config.noise, latents.std, host)
    if not ranks().first:
        return

    protocol = f"{config.split}_centre{size}"
    fids = {
        name: {
            f"rfid_{network}_{count_name(real.count)}": frechet_distance(real.networks[network].statistics, of)
            for network, of in networks.items()
        }
        for name, networks in measured.features.items()
    }
    named = ("psnr", "ssim", f"lpips_{perceptual.name}")
    means = measured.quality.mean(0).tolist()  # of [N, models, 3]
    table = {
        name: dict(zip(named, values, strict=True)) | fids[name] for name, values in zip(models, means, strict=True)
    }
    tolerance = {
        name: {f"psnr_{number_name(level)}": value for level, value in zip(config.noise.levels, curve, strict=True)}
        for name, curve in noisy.items()
    }
    figures = latents.figures() | {"noise": tolerance}
    write_json(metrics, {"reconstruction": {protocol: table}, "latents": {protocol: figures}})
    comparison.write_images(measured.quality, named, images)
    comparison.draw(measured.quality, named, config.pictures, pictures)
    write_diagnostics(latents, config.noise.levels, noisy, diagnostics)
    batch = normalise(comparison.originals(comparison.rows[: config.batch_size]))
    timed = measure_speed(models["pretrained"], batch, warmup=config.speed.warmup, batches=config.speed.batches)
    write_json(speed, {"speed": timed.figures()})


class _Measured(NamedTuple):
    """Of all images, on every rank."""

    quality: Tensor  # [N, models, 3] float64, as in Quality, in the order of the images
    features: dict[str, dict[str, GaussianStatistics]]  # of the reconstructions, by decoder and network
    latents: LatentAccumulator


def _measure(
    comparison: Comparison, extractors: Mapping[str, FeatureExtractor], perceptual: PerceptualDistance, host: Host
) -> _Measured:
    """One pass over this rank's images, then all ranks together."""
    features = {
        name: {network: GaussianStatistics(extractor.dim) for network, extractor in extractors.items()}
        for name in comparison.models
    }
    latents = LatentAccumulator(comparison.latent_shape)
    values = [torch.empty(0, len(comparison.models), len(Quality._fields), dtype=torch.float64)]
    batches = comparison.own_batches()
    with host.progress(total=sum(map(len, batches)), description="reconstructing", unit="image") as bar:
        for rows, originals in comparison.all_originals(batches):
            encoded = comparison.encode(originals)
            latents.update(encoded)
            of_decoders = []
            for name, written in comparison.decode(encoded).items():
                for network, extracted in extract(extractors, written).items():
                    features[name][network].update(extracted.pooled)
                of_decoders.append(torch.stack(quality(originals, written, perceptual), 1).cpu().double())
            values.append(torch.stack(of_decoders, 1))  # [B, models, 3]
            bar.update(len(rows))
    together = {
        name: {network: statistics.over_ranks() for network, statistics in of.items()} for name, of in features.items()
    }
    return _Measured(gather_rows(torch.cat(values)), together, latents.over_ranks())


def _noise_curves(
    comparison: Comparison, config: NoiseRobustnessConfig, std: Tensor, host: Host
) -> dict[str, list[float]]:
    """Mean PSNR at every level, by decoder, against the original images."""
    noise = LatentNoise(config.seed, std)
    values = [torch.empty(0, len(comparison.models), len(config.levels), dtype=torch.float64)]
    batches = comparison.own_batches(config.samples)
    with host.progress(total=sum(map(len, batches)), description="noise on latents", unit="image") as bar:
        for rows, originals in comparison.all_originals(batches):
            encoded = comparison.encode(originals)
            drawn = noise.of(rows.tolist(), encoded)
            of_levels = []
            for level in config.levels:
                written = comparison.decode(encoded + level * drawn)
                of_decoders = [psnr(originals / 255, image / 255).cpu().double() for image in written.values()]
                of_levels.append(torch.stack(of_decoders, 1))  # [B, models]
            values.append(torch.stack(of_levels, 2))
            bar.update(len(rows))
    means = gather_rows(torch.cat(values)).mean(0).tolist()  # [models, levels]
    return dict(zip(comparison.models, means, strict=True))


if __name__ == "__main__":
    main(run, distributed=True)
