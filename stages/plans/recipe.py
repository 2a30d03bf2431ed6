"""What rules look at: the sections of a pipeline, and the flags of the commands that read them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

from stages.generate import Generate
from stages.train_generator import TrainGenerator
from vtp.config import Config
from vtp.flow import SamplerConfig

C = TypeVar("C", bound=Config)
D = TypeVar("D", bound=Config)


class Sampling(NamedTuple):
    """A setting that draws samples, and where it stands."""

    place: str
    sampler: SamplerConfig


class Recipe:
    """The sections of a pipeline by the kind of their record, and the flags of the commands that read them."""

    def __init__(self, configs: Mapping[str, Config], flags: Mapping[str, frozenset[str]]) -> None:
        self._configs = configs
        self._flags = flags

    def of(self, kind: type[C]) -> Iterator[tuple[str, C]]:
        """Names and records of this kind."""
        for name, config in self._configs.items():
            if isinstance(config, kind):
                yield name, config

    def pairs(self, kind: type[C], other: type[D]) -> Iterator[tuple[str, C, str, D]]:
        """Every record of the one kind beside every one of the other, each behind its name."""
        for name, config in self.of(kind):
            for own, beside in self.of(other):
                yield name, config, own, beside

    def given(self, section: str, flag: str) -> bool:
        """Whether a command that reads the section has the flag."""
        return flag in self._flags.get(section, ())

    @property
    def samplers(self) -> Iterator[Sampling]:
        """All settings that draw samples."""
        for name, generate in self.of(Generate):
            for setting, sampler in generate.settings.items():
                yield Sampling(f"{name}.settings.{setting}", sampler)
        for name, training in self.of(TrainGenerator):
            yield Sampling(f"{name}.monitor.sampler", training.monitor.sampler)
