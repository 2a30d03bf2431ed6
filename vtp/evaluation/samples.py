"""Sampled latents: what `generate` writes and `evaluate_generator` reads.

    config.json                    encoder of the latents, classes, how each setting was drawn, digests of all files
    <setting>-00000.safetensors    latents [n, d, h, w] in the tokenizer's own scale, labels [n]

A label is the place of a class, or of a prompt where the generator is told captions.

The setting `noise` is where all others begin: Gaussian noise with the latents' own statistics, a baseline.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtp.artefact import ArtefactError, digest, load_tensors, read_json, verify_files, write_json
from vtp.config import Config, ConfigError
from vtp.data.latents import LatentShard, plan_shards, require_labels
from vtp.data.prompt_files import Prompt
from vtp.draws import torch_draws
from vtp.evaluation.settings import NOISE
from vtp.finite import require_finite
from vtp.flow import SamplerConfig

FORMAT_VERSION = 4
REMEDY = "fetch the folder again (dvc checkout), or run the stage generate again"
SettingName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # names files
Labels = Literal["balanced", "random"]


class SamplesArtefact(Config):
    """`config.json` of a folder of samples."""

    format_version: Literal[4]
    encoder: str  # digest of that whose latents these are
    classes: list[str]  # names; none of a generator that is told captions
    prompts: list[Prompt] | None  # those of one that is
    text_encoder: dict[str, Any] | None  # whose features it reads
    samples: int = Field(ge=1)  # per setting
    shard_size: int = Field(ge=1)
    labels: Labels
    settings: dict[SettingName, SamplerConfig]
    files: dict[str, str] = Field(default={})  # SHA-256 of every file of samples; `write` takes them

    @property
    def names(self) -> list[str]:
        """Of the labels: classes or prompts."""
        return self.classes if self.prompts is None else [prompt.text for prompt in self.prompts]

    @property
    def shards(self) -> list[LatentShard]:
        """All files."""
        return plan_shards(dict.fromkeys((*self.settings, NOISE), self.samples), self.shard_size)

    def write(self, folder: Path) -> None:
        """With the digests of all files, which ends a folder of samples."""
        written = {shard.name: digest(shard.path(folder)) for shard in self.shards}
        write_json(folder / "config.json", self.model_dump(mode="json") | {"files": written})


class Samples:
    """A folder of samples. Raises ArtefactError when it is another folder or incomplete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        values = read_json(folder / "config.json")
        if values.get("format_version") != FORMAT_VERSION:
            raise ArtefactError(
                f"{folder}: samples of format {values.get('format_version')!r}, this code reads {FORMAT_VERSION}; is this "
                "the right folder? If so, run the stage generate again"
            )
        try:
            self.config = SamplesArtefact.parse(values, where=str(folder / "config.json"))
        except ConfigError as error:
            raise ArtefactError(f"{error}; {REMEDY}") from None
        if {shard.name for shard in self.config.shards} != self.config.files.keys():
            raise ArtefactError(f"{folder / 'config.json'}: its files are not those of its settings; {REMEDY}")

    def __len__(self) -> int:
        """Of each setting."""
        return self.config.samples

    @property
    def settings(self) -> list[str]:
        """Names, the baseline among them."""
        return [*self.config.settings, NOISE]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d, h, w) of every sample."""
        channels, height, width = load_tensors(self.config.shards[0].path(self.folder))["latents"].shape[1:]
        return channels, height, width

    def guidance(self, setting: str) -> str:
        """How a setting was guided, for names of metrics."""
        return NOISE if setting == NOISE else self.config.settings[setting].guidance

    def require_encoder(self, digest: str, who: Path) -> None:
        """Raises ArtefactError when another encoder than that with `digest` gave the latents that were learnt."""
        if self.config.encoder != digest:
            raise ArtefactError(
                f"{self.folder}: samples in the latent space of another encoder than that of {who}; give the tokenizer "
                "whose latents were cached, or run cache_latents and what follows again"
            )

    def of(self, setting: str) -> "SettingSamples":
        """The samples of one setting."""
        return SettingSamples(self, [shard for shard in self.config.shards if shard.split == setting])


class SettingSamples:
    """Latents and labels of one setting; files are verified and mapped, not read.

    Raises ArtefactError when a file is not the one that was written.
    """

    def __init__(self, samples: Samples, shards: list[LatentShard]) -> None:
        self.folder, self.setting = samples.folder, shards[0].split
        verify_files(self.folder, {shard.name: samples.config.files[shard.name] for shard in shards}, remedy=REMEDY)
        tensors = [load_tensors(shard.path(self.folder)) for shard in shards]
        for shard, each in zip(shards, tensors, strict=True):
            if {len(each.get(name, ())) for name in ("latents", "labels")} != {len(shard.rows)}:
                raise ArtefactError(f"{shard.path(self.folder)}: not {len(shard.rows)} latents and labels; {REMEDY}")
            require_labels(each["labels"], len(samples.config.names), shard.path(self.folder))
        self._latents = [each["latents"] for each in tensors]
        self.labels = torch.cat([each["labels"] for each in tensors])  # [N]
        self._shard_size = samples.config.shard_size
        self._prompts = samples.config.prompts

    @property
    def asked(self) -> list[Prompt] | None:
        """The prompt of each [N]; None for classes."""
        return None if self._prompts is None else [self._prompts[label] for label in self.labels.tolist()]

    def latents(self, first: int, count: int) -> Tensor:
        """[count, d, h, w] float32, those from `first` on. Raises NotFiniteError for NaN and infinity."""
        parts, place = [], first
        while place < first + count:
            shard, start = divmod(place, self._shard_size)
            parts.append(self._latents[shard][start : start + first + count - place].float())
            place += len(parts[-1])
        latents = torch.cat(parts)
        require_finite(latents, f"samples of {self.setting} in {self.folder} from number {first} on", REMEDY)
        return latents


def draw_labels(mode: Labels, seed: int, rows: range, labels: Sequence[int]) -> Tensor:
    """Classes of the samples `rows`, of `labels`: in turn, so that all are as frequent, or each by chance."""
    if mode == "balanced":
        return torch.tensor(labels)[torch.arange(rows.start, rows.stop) % len(labels)]
    drawn = [torch.randint(len(labels), (), generator=torch_draws(seed, "label", index)) for index in rows]
    return torch.tensor(labels)[torch.stack(drawn)]
