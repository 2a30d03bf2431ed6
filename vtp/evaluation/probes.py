"""Probes of tables of features: three linear variants and nearest neighbours, with the names that metrics have.

bottleneck    mean of the latents, d channels: the paper's figures 2, 5 and 6
last          class token and mean patch of the last block
multi         class tokens of the last blocks with the mean patch, a grid of learning rates: the paper's table 2
"""

from collections.abc import Mapping
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtp.artefact import load_tensors, save_tensors
from vtp.config import Config, Distinct, number_name
from vtp.distributed import gather_objects, ranks, total
from vtp.evaluation.extraction import Extraction, LabelledSplit, Views
from vtp.evaluation.linear_probe import LbfgsConfig, draw_holdout, linear_probe
from vtp.evaluation.neighbours import knn_accuracy
from vtp.evaluation.scale import Scale
from vtp.evaluation.sgd_probe import Choice, ProbeFeatures, SgdConfig, SgdProbe, SgdSolverConfig
from vtp.host import Host
from vtp.layers.preprocess import CentreView, RandomView
from vtp.models.base import Tokenizer

FLIP = 0.5


class AugmentConfig(Config):
    """Random crops with mirror images, as the official probe trains."""

    scale_min: float = Field(gt=0, le=1, description="least area of a crop; torchvision's default is 0.08")


class ProbesConfig(Config):
    """Linear probes on frozen features."""

    seed: int = Field(description="seed of the held-out share, of heads and of batches")
    holdout: float = Field(gt=0, lt=1, description="share of the training samples that chooses hyper-parameters")
    resize: int = Field(ge=1, description="the short side of an image before its centre is cut; official: 256")
    size: int = Field(ge=1, description="side of that centre, also for k-NN; official: 224")
    single: Annotated[LbfgsConfig | SgdSolverConfig, Field(discriminator="name")] = Field(
        description="how `bottleneck` and `last` are fitted, on standardised features"
    )
    blocks: Annotated[list[Annotated[int, Field(ge=1)]], Distinct] = Field(
        min_length=1,
        description="feature sets of `multi`: class tokens of the last so many blocks; official: 1, 4",
    )
    multi: SgdConfig
    augment: AugmentConfig | None = Field(
        description="random crops for `multi`, encoded anew in every epoch; null: cached features"
    )

    @model_validator(mode="after")
    def _the_centre_is_inside(self) -> Self:
        if self.resize < self.size:
            raise ValueError(f"resize {self.resize} is below size {self.size}: the centre would not be filled")
        return self

    @property
    def view(self) -> CentreView:
        """What probes and neighbours see."""
        return CentreView(self.resize, self.size)


class Tables(NamedTuple):
    """Features by name, as `Extraction` calls them; empty on other ranks than the first."""

    train: Mapping[str, Tensor]
    validation: Mapping[str, Tensor]


class Row(NamedTuple):
    """Of the curves: one candidate of one probe."""

    probe: str
    candidate: float  # penalty or learning rate
    holdout: float
    validation: float | None  # None: not computed


class ProbeResults(NamedTuple):
    """What probes say."""

    accuracies: dict[str, float]  # on validation, by metric
    rows: list[Row]
    chosen: dict[str, str]  # by metric


class _Variant(NamedTuple):
    """What a probe reads."""

    name: str
    table: str
    width: int  # last columns of the table


class Probing:
    """All probes of one tokenizer. `groupings` are labels of classes, by what follows a variant in a metric's name."""

    def __init__(
        self,
        config: ProbesConfig,
        extraction: Extraction,
        *,
        train: LabelledSplit,
        validation: LabelledSplit,
        groupings: Mapping[str, Tensor],
        host: Host,
    ) -> None:
        self._config = config
        self._extraction = extraction
        self._train, self._validation = train, validation
        self._groupings = groupings
        self._host = host
        self._held = draw_holdout(len(train.rows), config.holdout, config.seed)

    def multi(self, tables: Tables) -> ProbeResults:
        """Table 2's probe, by the first rank; nothing where there are no features. All ranks must ask."""
        model = self._extraction.model
        if not model.has_features:
            return ProbeResults({}, [], {})
        sets = [
            ProbeFeatures(
                f"multi{suffix}, last {n}", f"multi{suffix}", "tokens", (n + 1) * model.feature_dim, of_class, None
            )
            for suffix, of_class in self._groupings.items()
            for n in sorted(self._config.blocks)
        ]
        return self._by_sgd("multi", sets, self._config.multi, tables, augment=self._config.augment)

    def single(self, tables: Tables) -> ProbeResults:
        """The bottleneck's probe and, where there are features, the last block's, by the first rank. All must ask."""
        solver, results, variants = (
            self._config.single,
            ProbeResults({}, [], {}),
            _single_variants(self._extraction.model),
        )
        if not ranks().first:
            variants = []
        if isinstance(solver, SgdSolverConfig):
            sets = []
            for one in variants:
                scale = Scale.of(tables.train[one.table][:, -one.width :])
                sets += [
                    ProbeFeatures(one.name + suffix, one.name + suffix, one.table, one.width, of_class, scale)
                    for suffix, of_class in self._groupings.items()
                ]
            return self._by_sgd("single", sets, solver, tables, augment=None)
        for one in variants:
            for suffix, of_class in self._groupings.items():
                name = f"linear_probe_{one.name}{suffix}"
                result = linear_probe(
                    *(self._features(tables.train, one), of_class[self._train.labels]),
                    *(self._features(tables.validation, one), of_class[self._validation.labels]),
                    config=solver,
                    held=self._held,
                )
                results.accuracies[name] = result.accuracy
                results.chosen[name] = f"l2 {number_name(result.l2)}"
                results.rows.extend(Row(one.name + suffix, l2, of, None) for l2, of in result.holdout_accuracy.items())
        return results

    def neighbours(self, tables: Tables, k: int) -> dict[str, float]:
        """Accuracies of nearest neighbours on what single probes read, by metric."""
        accuracies = {}
        for one in _single_variants(self._extraction.model):
            seen, asked = (table[one.table][:, -one.width :] for table in tables)
            accuracies[f"knn{k}_{one.name}"] = knn_accuracy(
                seen, self._train.labels, asked, self._validation.labels, k=k, device=self._host.device
            )
        return accuracies

    def _features(self, table: Mapping[str, Tensor], variant: _Variant) -> Tensor:
        return table[variant.table][:, -variant.width :].to(self._host.device)

    def _by_sgd(
        self, name: str, sets: list[ProbeFeatures], config: SgdConfig, tables: Tables, *, augment: AugmentConfig | None
    ) -> ProbeResults:
        """The first rank trains heads, and keeps what every epoch made of them; all take features of augmented images."""
        probe, path = None, self._host.folder / f"{name}.safetensors"
        if ranks().first:
            probe = SgdProbe(sets, config, seed=self._config.seed, device=self._host.device)
            if path.exists():
                probe.load(load_tensors(path))
        done = gather_objects(0 if probe is None else probe.epochs_done)[0]
        with self._host.progress(total=config.epochs, description=f"{name} probe", unit="epoch", done=done) as bar:
            for epoch in range(done, config.epochs):
                images, seen = f"{name} epoch {epoch + 1}", tables.train
                if augment is not None:
                    view = RandomView(self._config.size, augment.scale_min, FLIP, self._config.seed, epoch)
                    seen = self._extraction.table(images, self._train, Views(view))
                if probe is not None:
                    self._learn(probe, seen, tables)
                    save_tensors(path, probe.state())
                    self._extraction.forget(images)
                bar.update(1)
                if total(torch.tensor(int(self._host.stop_requested))):
                    self._host.stop()
        return ProbeResults({}, [], {}) if probe is None else _judged(probe)

    def _learn(self, probe: SgdProbe, seen: Mapping[str, Tensor], tables: Tables) -> None:
        """One epoch, from features `seen` of all training images."""
        held, labels = self._held, self._train.labels
        probe.train(seen, labels, held)
        on_held = probe.judge({name: table[held] for name, table in tables.train.items()}, labels[held])
        probe.end_epoch(holdout=on_held, validation=probe.judge(tables.validation, self._validation.labels))


def _single_variants(model: Tokenizer) -> list[_Variant]:
    bottleneck = _Variant("bottleneck", "latent", model.latent_shape[0])
    return [bottleneck, _Variant("last", "tokens", 2 * model.feature_dim)] if model.has_features else [bottleneck]


def _judged(probe: SgdProbe) -> ProbeResults:
    results = ProbeResults({}, [], {})
    for name in dict.fromkeys(one.probe for one in probe.sets):
        for metric, choice in ((name, probe.chosen(name)), (f"{name}_best_on_val", probe.best_on_val(name))):
            results.accuracies[f"linear_probe_{metric}"] = choice.accuracy
            results.chosen[f"linear_probe_{metric}"] = _words(choice)
        results.rows.extend(Row(*candidate) for candidate in probe.candidates(name))
    return results


def _words(choice: Choice) -> str:
    return f"{choice.features}, learning rate {number_name(choice.learning_rate)}, epoch {choice.epoch}"
