"""Reconstruction of the validation images, by the pre-trained decoder and a tuned one: PSNR, SSIM, LPIPS, rFID."""

import torch
from pydantic import Field

from stages._pictures import grid
from stages._runner import Input, OptionalInput, Output, Work, main
from vtp.artefact import write_json
from vtp.config import Config
from vtp.data.dataset import ShardDataset
from vtp.evaluation.features import FeaturesConfig, build_features, count_name
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.evaluation.reconstruction import ReconstructionMeans
from vtp.layers.images import normalise, to_uint8
from vtp.losses.perceptual import PerceptualConfig, build_perceptual
from vtp.models.loading import load_tokenizer


class EvaluateReconstruction(Config):
    """The section `evaluate_reconstruction`."""

    features: FeaturesConfig = Field(description="of rFID")
    perceptual: PerceptualConfig = Field(description="the distance under LPIPS's formula")
    batch_size: int = Field(ge=1)
    pictures: int = Field(ge=1, description="images in the comparison")


@torch.inference_mode()
def run(
    config: EvaluateReconstruction,
    *,
    shards: Input,
    tokenizer: Input,
    decoder: OptionalInput = None,
    metrics: Output,
    picture: Output,
    work: Work,
) -> None:
    images = ShardDataset(shards, "validation", cache=work.cache)
    extractor = build_features(config.features, weights=work.weights, device=work.device)
    perceptual = build_perceptual(config.perceptual, weights=work.weights).to(work.device)
    models = {"pretrained": load_tokenizer(tokenizer).to(work.device)}
    if decoder is not None:
        models["tuned"] = load_tokenizer(tokenizer, decoder).to(work.device)
    reference = GaussianStatistics(extractor.dim)
    statistics = {name: GaussianStatistics(extractor.dim) for name in models}
    means = {name: ReconstructionMeans(perceptual) for name in models}
    rows: list[torch.Tensor] = []
    with work.progress(total=len(images), description="reconstructing", unit="image") as bar:
        for indices in torch.arange(len(images)).split(config.batch_size):
            originals = images.images(indices.numpy(), models["pretrained"].image_size).to(work.device)
            reference.update(extractor(originals))
            latents = models["pretrained"].encode(normalise(originals))
            first = not rows
            rows += [originals] if first else []
            for name, model in models.items():
                written = to_uint8(model.decode(latents))
                statistics[name].update(extractor(written))
                means[name].update(originals / 255, written / 255)
                rows += [written] if first else []
            bar.update(len(indices))
    size = f"{extractor.name}_{count_name(len(images))}"
    table = {}
    for name, measured in means.items():
        values = measured.means()
        table[name] = {
            "psnr": values["psnr"],
            "ssim": values["ssim"],
            f"lpips_{perceptual.name}": values["perceptual"],
            f"rfid_{size}": frechet_distance(reference, statistics[name]),
        }
    write_json(metrics, {"reconstruction": table})
    grid([row[: config.pictures] for row in rows], ["original", *models], picture, title="Validation images")


if __name__ == "__main__":
    main(run)
