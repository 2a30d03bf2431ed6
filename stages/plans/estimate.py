"""`python -m stages.<stage> --plan`: what a run takes, before anything is bought or allocated.

What the plans of all stages share: options, what the parameters say of inputs that do not exist yet, memory, and the
record that is printed. Parameters and FLOPs come from shapes. Activation memory is counted by running one sample through
the real modules with tensors that have shapes and no contents, and adding up what autograd would keep.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from stages.prepare_data import PrepareData
from stages.pretrain import Pretrain
from vtp.config import ConfigError
from vtp.curation.ingest.compose import EmbeddedConfig, categories
from vtp.curation.ingest.openmoji import catalogue
from vtp.data.batches import count_micro_batches
from vtp.data.sizes import PictureSize
from vtp.layers.captions import Condition
from vtp.layers.flops import forward_flops
from vtp.models.base import EncoderLayers, Encoding
from vtp.models.diffusers_vae import ConvolutionalConfig
from vtp.models.text import TextConfig
from vtp.models.tokenizer import TokenizerConfig
from vtp.models.trainable import build_tokenizer
from vtp.objectives.cost import decoding_flops, encoding_flops
from vtp.params import load, read_parameters, split_address
from vtp.step import OptimConfig

FLOAT = 4  # bytes
LABEL = 8  # bytes
GIGA = 1e9
PEAKS = {"bfloat16": 9.89e14, "tf32": 4.95e14, "float32": 6.7e13}  # FLOP/s of an H100, dense, float32 without TF32
_counted: dict[tuple[object, ...], float] = {}
IMAGENET = {"images": 1_281_167, "validation_images": 50_000, "classes": 1000}


class Figure(NamedTuple):
    """One figure of a plan."""

    value: float  # in its own unit: parameters, FLOPs, bytes, seconds, or a count; NaN where nothing is known
    text: str  # as it is printed


class Estimate:
    """What a run takes: figures by section and name, in the order in which they are printed."""

    def __init__(self) -> None:
        self.sections: dict[str, dict[str, Figure]] = {}

    def section(self, title: str) -> dict[str, Figure]:
        """A new section, to be filled."""
        return self.sections.setdefault(title, {})

    def __getitem__(self, name: str) -> Figure:
        """The figure of that name, in whichever section."""
        return next(figures[name] for figures in self.sections.values() if name in figures)

    def text(self) -> str:
        """As it is printed."""
        lines = []
        for title, figures in self.sections.items():
            lines += ["", title, *(f"  {name:36}{figure.text}" for name, figure in figures.items())]
        return "\n".join(lines)


class SplitSize(NamedTuple):
    """Samples of a split."""

    samples: int
    labelled: int  # of which have a class


class PlannedInputs(NamedTuple):
    """What a stage behind pre-training reads, as far as a plan needs it."""

    tokenizer: TokenizerConfig | ConvolutionalConfig
    splits: Mapping[str, SplitSize]
    classes: int  # that prompts ask for
    labels: int  # that a generator learns
    text: TextConfig | None  # of the text tower that parameters describe, whether this run trains it or not

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(d, h, w)."""
        return self.tokenizer.latent_shape

    @property
    def latent_numbers(self) -> int:
        """Numbers of a latent."""
        channels, height, width = self.latent_shape
        return channels * height * width

    @property
    def encoder_flops(self) -> float:
        """Of the latents of one image."""
        return encoding_flops(self.tokenizer)

    @property
    def decoder_flops(self) -> float:
        """Of one image."""
        return decoding_flops(self.tokenizer)

    def at(self, side: int) -> Self:
        """For squares of another side."""
        return self._replace(tokenizer=self.tokenizer.model_copy(update={"image_size": side}))

    def latents_of(self, sizes: Sequence[PictureSize]) -> list[tuple[int, int, int]]:
        """Shapes (d, h, w) of the latents of pictures."""
        channels, pixels = self.latent_shape[0], self.tokenizer.pixels_per_latent
        return [(channels, size.height // pixels, size.width // pixels) for size in sizes]

    def encoding_flops(self, sizes: Sequence[PictureSize]) -> list[float]:
        """Of the latents of one picture of each size."""
        with torch.device("meta"):
            encoder = Encoding(build_tokenizer(self.tokenizer))
        record = self.tokenizer.model_dump_json()
        return [counted_once((record, *sorted(size)), encoder, torch.empty(1, 3, *size)) for size in sizes]

    def split(self, name: str) -> SplitSize:
        """Raises ConfigError for a split whose size nothing says."""
        if name not in self.splits:
            raise ConfigError(f"a plan knows the sizes of {', '.join(self.splits)}, and not of the split {name!r}")
        return self.splits[name]


def options_for(stage: str, section: str | None = None) -> argparse.ArgumentParser:
    """Options of all plans; `section` of the parameters, if it is not called as the stage."""
    parser = argparse.ArgumentParser(f"python -m stages.{stage} --plan", description="What a run would take.")
    default = f"params.yaml:{section or stage}"
    parser.add_argument("address", metavar="FILE:SECTION", nargs="?", default=default, help=f"default: {default}")
    parser.add_argument("--gpus", type=int, default=1, help="devices in all; default: 1")
    peaks = ", ".join(f"{peak:g} in {precision}" for precision, peak in PEAKS.items())
    parser.add_argument("--peak", type=float, help=f"FLOP/s of a device; an H100, dense: {peaks}")
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the peak that is reached; default: 0.4"
    )
    return parser


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Those of stages that train."""
    parser.add_argument("--micro-batch", type=int, help="most samples of a GPU in one pass")
    parser.add_argument("--fsdp", action="store_true", help="weights and optimiser state sharded over the GPUs")
    parser.add_argument("--checkpoints-kept", type=int, default=2, help="checkpoints on disk at a time; default: 2")


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Those of stages behind pre-training; what is not given comes from the sections of the same file."""
    parser.add_argument("--tokenizer", metavar="FILE:SECTION", help="parameters of pretrain; default: FILE:pretrain")
    parser.add_argument("--images", type=int, help="labelled training images; default: prepare_data's, or ImageNet's")
    parser.add_argument("--validation-images", type=int, help="those of validation, likewise")
    parser.add_argument("--classes", type=int, help="classes, and labels of a generator, likewise")


def inputs_of(options: argparse.Namespace) -> PlannedInputs:
    """Tokenizer, images and classes, from the options and the parameter file. Raises ConfigError."""
    file, _ = split_address(options.address)
    sections = read_parameters(file).values
    if options.tokenizer is None and "pretrain" not in sections:
        raise ConfigError(
            f"{file}: no section 'pretrain', whose tokenizer a plan takes; name one by --tokenizer FILE:SECTION, such as "
            "pipelines/overlays/sizes/L.yaml:pretrain"
        )
    trained = load(options.tokenizer or f"{file}:pretrain", Pretrain)
    tokenizer, text = trained.architecture, getattr(trained.tokenizer, "text", None)
    train, validation = (SplitSize(IMAGENET[name], IMAGENET[name]) for name in ("images", "validation_images"))
    classes = labels = IMAGENET["classes"]
    if "prepare_data" in sections:
        source = load(f"{file}:prepare_data", PrepareData).source
        if isinstance(source, EmbeddedConfig):
            train, validation = (
                SplitSize(count, round(count * (1 - source.scene_fraction)))  # scenes have no class
                for count in (source.samples["train"], source.samples["validation"])
            )
            classes = labels = source.classes
            if source.labels == "category":
                labels = len(categories(catalogue(classes)))
    if options.images is not None:
        train = SplitSize(options.images, options.images)
    if options.validation_images is not None:
        validation = SplitSize(options.validation_images, options.validation_images)
    splits = {"train": train, "validation": validation}
    return PlannedInputs(tokenizer, splits, options.classes or classes, options.classes or labels, text)


def beside(options: argparse.Namespace, section: str) -> str:
    """The address of another section of the same file."""
    return f"{split_address(options.address)[0]}:{section}"


def per_gpu(options: argparse.Namespace, count: int, *, named: str) -> tuple[int, int]:
    """Samples of a GPU in one pass, and passes per step. Raises ValueError where they do not split."""
    passes = count_micro_batches(count, options.gpus, options.micro_batch or count, named=named)
    return count // options.gpus // passes, passes


def counted_once(key: tuple[object, ...], module: nn.Module, *inputs: Condition) -> float:
    """FLOPs of a forward pass; what has the same `key` costs the same, and runs of a study share many."""
    if key not in _counted:
        _counted[key] = forward_flops(module, *inputs)
    return _counted[key]


def kept_per_sample(forward: Callable[[int], list[Tensor]]) -> float:
    """Bytes per sample that autograd keeps, without recomputing, under the FakeTensorMode of the caller."""
    # The difference of two counts leaves out what does not grow with the batch, such as cast weights.
    return (_kept(forward, 4) - _kept(forward, 2)) / 2


def autocast(precision: str) -> AbstractContextManager[object]:
    """What a training run computes in."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def _kept(forward: Callable[[int], list[Tensor]], count: int) -> int:
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = forward(count)  # alive until the count is done, so that no storage's number is used again
    del outputs
    return sum(sizes.values())


def count_of(module: nn.Module | EncoderLayers) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def kept_moments(trained: int, hidden: Set[nn.Parameter], optim: OptimConfig) -> int:
    """Numbers that the optimiser keeps of so many parameters: two of each, and one of the `hidden` that Muon moves."""
    by_muon = sum(parameter.numel() for parameter in hidden) if optim.matrices.name == "muon" else 0
    return 2 * trained - by_muon


def millions(parameters: int, digits: int = 2) -> Figure:
    """A number of parameters."""
    return Figure(parameters, f"{parameters / 1e6:,.{digits}f} M")


def gigabytes(size: float, note: str = "") -> Figure:
    """Bytes."""
    return Figure(size, f"{size / GIGA:,.2f} GB{note}")


def add_time(estimate: dict[str, Figure], options: argparse.Namespace, flops: float, *, precision: str) -> float:
    """Add GPU hours and wall-clock time to a section; the seconds of the latter."""
    peak = peak_of(options, precision)
    seconds = flops / (peak * options.utilisation * options.gpus)
    hours = seconds * options.gpus / 3600
    estimate["GPU hours"] = Figure(hours, f"{rounded(hours)} at {options.utilisation:.0%} of {peak:.3g} FLOP/s")
    estimate["wall clock"] = Figure(seconds, f"{rounded(seconds / 3600)} h on {options.gpus} GPUs")
    return seconds


def peak_of(options: argparse.Namespace, precision: str) -> float:
    """FLOP/s of a device."""
    return options.peak or PEAKS[precision]


def rounded(value: float) -> str:
    """Three digits, all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
