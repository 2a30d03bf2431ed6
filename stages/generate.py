"""Draw latent samples with and without guidance; `evaluate_generator` decodes them.

A sample is a function of (seed, index): its noise and its label do not depend on the batch it is drawn in.
"""

import torch
from pydantic import Field
from torch import Tensor

from stages._runner import Input, Output, Work, main
from vtp.artefact import save_tensors, write_json
from vtp.config import Config
from vtp.data.latents import LatentDataset
from vtp.draws import torch_draws
from vtp.flow import SamplerConfig, sample
from vtp.models.lightningdit import LightningDiT


class Generate(Config):
    """The section `generate`."""

    seed: int
    samples: int = Field(ge=1, description="per setting; labels are balanced over the classes")
    batch_size: int = Field(ge=1)
    unguided: SamplerConfig
    guided: SamplerConfig


@torch.inference_mode()
def run(config: Generate, *, latents: Input, generator: Input, samples: Output, work: Work) -> None:
    data = LatentDataset(latents)
    model = LightningDiT.from_pretrained(generator).to(work.device).eval()
    labels = torch.arange(config.samples) % len(data.classes)
    samples.mkdir()
    settings = {"unguided": config.unguided, "guided": config.guided}
    with work.progress(total=len(settings) * config.samples, description="sampling", unit="sample") as bar:
        for name, sampler in settings.items():
            parts = []
            for indices in torch.arange(config.samples).split(config.batch_size):
                noise = torch.stack([sample_noise(config.seed, index, data.shape) for index in indices.tolist()])
                drawn = sample(model, noise.to(work.device), labels[indices].to(work.device), **sampler.arguments())
                parts.append(data.statistics.denormalise(drawn).cpu())
                bar.update(len(indices))
            save_tensors(samples / f"{name}.safetensors", {"latents": torch.cat(parts), "labels": labels})
    noise = torch.stack([sample_noise(config.seed, index, data.shape) for index in range(config.samples)])
    baseline = {"latents": data.statistics.denormalise(noise), "labels": labels}
    save_tensors(samples / "noise.safetensors", baseline)  # Gaussian noise with the latents' statistics
    write_json(
        samples / "config.json", {"format_version": 1, "classes": data.classes, **config.model_dump(mode="json")}
    )
    work.record(samples=len(settings) * config.samples)


def sample_noise(seed: int, index: int, shape: tuple[int, int, int]) -> Tensor:
    """The noise that sample `index` starts from."""
    return torch.randn(shape, generator=torch_draws(seed, "noise", index))


if __name__ == "__main__":
    main(run)
