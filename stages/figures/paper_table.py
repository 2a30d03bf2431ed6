"""Table 2 of the paper, generation on ImageNet at 256 x 256, and what of a run compares with it.

A figure stands in a column of the table when it was measured as the column's figures were; every other one is shown under
its own name, with what differs.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vtp.evaluation.settings import RECONSTRUCTED

RFID = re.compile(r"rfid_(?P<features>.+)_(?P<number>\d+k?)")
FIGURE = re.compile(r"gfid_(?P<end>(?P<features>.+)_(?P<count>\d+)(?P<thousand>k?)_(?P<guidance>[^_]+)_[^_]+)")
REAL = re.compile(r"_vs(\d+k?)(?=_)")  # of how many real images a figure's name tells, where it depends on them
HEAD = (
    "method",
    "rFID",
    "zero-shot",
    "linear probe",
    "parameters",
    "epochs",
    "gFID",
    "IS",
    "precision",
    "recall",
    "guided: gFID",
    "guided: IS",
    "guided: precision",
    "guided: recall",
)
# FID of 50,000 samples in Inception's features; accuracies in %. None: not reported.
TABLE_2: list[tuple[str | float | None, ...]] = [
    ("REPA", 0.61, None, None, "675M", 80, 7.90, 122.6, 0.70, 0.65, None, None, None, None),
    ("DDT", 0.61, None, None, "675M", 80, 6.62, 135.2, 0.69, 0.67, 1.52, 263.7, 0.78, 0.63),
    ("VA-VAE", 0.28, None, None, "675M", 80, 4.29, None, None, None, None, None, None, None),
    ("REPA-E", 0.28, None, None, "675M", 80, 3.46, 159.8, 0.77, 0.63, 1.67, 266.3, 0.80, 0.63),
    ("RAE", 0.57, None, 84.5, "675M", 80, 4.28, None, None, None, None, None, None, None),
    ("RAE", 0.57, None, 84.5, "835M", 80, 2.16, 214.8, 0.82, 0.59, None, None, None, None),
    ("VTP-L", 0.36, 78.2, 85.7, "675M", 80, 2.62, 197.8, 0.79, 0.62, 1.44, 238.2, 0.80, 0.63),
    ("VTP-L", 0.36, 78.2, 85.7, "1.0B", 80, 2.03, 219.4, 0.80, 0.62, None, None, None, None),
    ("DiT", None, None, None, "675M", 1400, 9.62, 121.5, 0.67, 0.67, 2.27, 278.2, 0.83, 0.57),
    ("SiT", None, None, None, "675M", 1400, 8.61, 131.7, 0.68, 0.67, 2.06, 270.3, 0.82, 0.59),
    ("VA-VAE", 0.28, None, None, "675M", 800, 2.17, 205.6, 0.77, 0.65, 1.35, 295.3, 0.79, 0.65),
    ("REPA", 0.61, None, None, "675M", 800, 5.78, 158.3, 0.70, 0.68, 1.29, 306.3, 0.79, 0.64),
    ("DDT", 0.61, None, None, "675M", 400, 6.27, 154.7, 0.68, 0.69, 1.26, 310.6, 0.79, 0.65),
    ("REPA-E", 0.28, None, None, "675M", 800, 1.70, 217.3, 0.77, 0.66, 1.15, 304.0, 0.79, 0.66),
    ("RAE", 0.57, None, 84.5, "676M", 800, 1.87, 209.7, 0.80, 0.63, 1.41, 309.4, 0.80, 0.63),
    ("RAE*", 0.57, None, 84.5, "839M", 800, 1.51, 242.9, 0.79, 0.63, 1.13, 262.6, 0.78, 0.67),
    ("VTP-L", 0.36, 78.2, 85.7, "675M", 600, 1.85, 232.3, 0.79, 0.63, 1.11, 279.5, 0.79, 0.67),
]


OWN_HEAD = ("column of the table", "in this run", "value", "what differs from the table")
GENERATION = {"gfid": "gFID", "is": "IS", "precision": "precision", "recall": "recall"}  # columns by kinds of figures
SIDE, IMAGES, TRAIN_IMAGES = 256, "50k", 1_281_167  # pixels, images of a Fréchet distance, ImageNet's training images
REAL_IMAGES = "10k"  # those of ADM's batch, which precision and recall look at
NOT_IMAGENET = "not on ImageNet"


class Sampled(NamedTuple):
    """The figures of one setting, of its largest number of samples."""

    setting: str
    end: str  # of the names of its figures
    features: str
    number: str
    guidance: str
    gfid: float


class Conditions(NamedTuple):
    """How a run was measured, as the provenance of its stages says."""

    imagenet: bool  # the images of rFID and gFID
    image_size: int  # pixels, of these
    probed_imagenet: bool  # the images of zero-shot and probes
    validation_samples: int  # of these
    understanding: Mapping[str, Any]  # parameters of the stage

    @classmethod
    def of(cls, records: Mapping[str, Mapping[str, Any]]) -> "Conditions":
        """From provenances by stage, `reference` and `evaluate_understanding`; what they do not say is not ImageNet."""
        reference, understanding = records["reference"], records["evaluate_understanding"]
        return cls(
            bool(reference["facts"].get("imagenet")),
            int(reference["config"]["image_size"]),
            bool(understanding["facts"].get("imagenet")),
            int(understanding["facts"].get("validation_samples", 0)),
            understanding["config"],
        )


class RunFigures(NamedTuple):
    """What was measured of a run."""

    reconstruction: Mapping[str, Any]  # by the decoder of the samples
    understanding: Mapping[str, float]
    generator: Mapping[str, float]
    generation: Mapping[str, Mapping[str, float]]  # by setting
    conditions: Conditions

    @property
    def best(self) -> tuple["Sampled | None", "Sampled | None"]:
        """The setting of the lowest gFID without guidance, and with."""
        every = [one for setting, figures in self.generation.items() if (one := _sampled(setting, figures)) is not None]
        plain = min((s for s in every if s.guidance == "unguided"), key=lambda s: s.gfid, default=None)
        return plain, min((s for s in every if s.guidance != "unguided"), key=lambda s: s.gfid, default=None)

    @property
    def shown(self) -> "Sampled | None":
        """The setting that a run is shown by: the best guided one, where one is."""
        plain, guided = self.best
        return guided or plain


class ColumnFigure(NamedTuple):
    """A figure of the run beside a column of the table."""

    column: str
    name: str
    value: float
    differs: Sequence[str]  # from what the column's figures are; empty: it stands there


def headline_figures(run: RunFigures) -> dict[str, float]:
    """The columns of the paper's tables under their full names, each of which says what was measured; beside them how many
    samples show their class, and the decoder's floor.
    """
    accuracies = ("zero_shot_top1_squash", "linear_probe_bottleneck", "linear_probe_multi")
    figures = {name: run.understanding[name] for name in accuracies if name in run.understanding}
    figures |= {name: v for name, v in run.reconstruction.items() if name == "psnr" or name.startswith("rfid_")}
    for sampled in filter(None, run.best):
        own = run.generation[sampled.setting]
        figures |= {name: own[name] for name in _names(own, sampled.end).values()}
    if (shown := run.shown) is not None:
        beside = {**run.generation[shown.setting], **floor(run, shown)}
        names = f"class_accuracy_{shown.end}", floor_names(shown)[0]
        figures |= {name: beside[name] for name in names if name in beside}
    return figures


def floor(run: RunFigures, sampled: Sampled) -> dict[str, float]:
    """Fréchet distance and class accuracy of reconstructions, in the features and number of samples; by name."""
    own = run.generation.get(RECONSTRUCTED, {})
    return {name: own[name] for name in floor_names(sampled) if name in own}


def floor_names(sampled: Sampled) -> tuple[str, str]:
    """What distance and class accuracy of reconstructions are called beside a setting's."""
    end = f"{sampled.features}_{sampled.number}_{RECONSTRUCTED}"
    return f"rfid_{end}", f"class_accuracy_{end}"


def entries(run: RunFigures) -> list[ColumnFigure]:
    """Every figure of the run that is of a column's kind."""
    conditions = run.conditions
    found = [
        ColumnFigure("rFID", name, value, _of_images(conditions, match["features"], match["number"]))
        for name, value in run.reconstruction.items()
        if (match := RFID.fullmatch(name))
    ]
    understood = {"zero_shot_top1_squash": ("zero-shot", _of_zero_shot(conditions))}
    understood |= {f"linear_probe_{name}": ("linear probe", _of_probe(conditions, name)) for name in PROBES}
    found += [
        ColumnFigure(column, name, run.understanding[name], differs)
        for name, (column, differs) in understood.items()
        if name in run.understanding
    ]
    for sampled, prefix in zip(run.best, ("", "guided: "), strict=True):
        own = run.generation[sampled.setting] if sampled else {}
        for of in _networks(sampled.setting, own) if sampled else ():
            differs = _of_images(conditions, of.features, of.number)
            found += [
                ColumnFigure(f"{prefix}{GENERATION[kind]}", name, own[name], [*differs, *_of_real(name)])
                for kind, name in _names(own, of.end).items()
            ]
    return found


def own_row(run: RunFigures) -> tuple[str | float | None, ...]:
    """The run in the columns of `HEAD`: what compares with them, of its best setting without guidance, and with."""
    stands = {entry.column: entry for entry in entries(run) if not entry.differs}
    of_shares = ("zero-shot", "linear probe")
    cells: dict[str, str | float] = {
        column: 100 * entry.value if column in of_shares else entry.value for column, entry in stands.items()
    }
    cells["parameters"] = f"{run.generator['parameters'] / 1e6:.3g}M"
    cells["epochs"] = run.generator["epochs"]
    settings = [
        f"{words}{sampled.setting}"
        for words, sampled in zip(("", "guided: "), run.best, strict=True)
        if sampled is not None and f"{words}gFID" in stands
    ]
    return ("; ".join(["this run", *settings]), *(cells.get(column) for column in HEAD[1:]))


def own_names(run: RunFigures) -> list[tuple[str | float, ...]]:
    """Rows under `OWN_HEAD`: figures that do not compare with their column, under their own names."""
    return [(e.column, e.name, e.value, "; ".join(e.differs)) for e in entries(run) if e.differs]


def _names(figures: Mapping[str, float], end: str) -> dict[str, str]:
    """Names of a setting's figures by their kind."""
    plain = {REAL.sub("", name): name for name in figures}
    return {kind: plain[f"{kind}_{end}"] for kind in GENERATION if f"{kind}_{end}" in plain}


def _of_real(name: str) -> list[str]:
    """What differs in the number of real images."""
    count = REAL.search(name)
    return [f"beside {count[1]} real images, not {REAL_IMAGES}"] if count and count[1] != REAL_IMAGES else []


def _of_images(conditions: Conditions, features: str, count: str) -> list[str]:
    """What differs in a figure of images' features."""
    said = {
        NOT_IMAGENET: conditions.imagenet,
        f"{conditions.image_size} px": conditions.image_size == SIDE,
        f"features of {features}, not of Inception": features == "inception",
        f"{count} images, not {IMAGES}": count == IMAGES,
    }
    return [words for words, same in said.items() if not same]


def _of_zero_shot(conditions: Conditions) -> list[str]:
    said = _of_validation(conditions) | {
        "other prompts than CLIP's 80": conditions.understanding["prompts"]["name"] == "openai"
    }
    return [words for words, same in said.items() if not same]


PROBES = {  # by the end of a name: what it is that the table's is not
    "multi_best_on_val": None,
    "multi": "chosen on held-out training images, the table's on the validation images that it reports",
    "bottleneck": "of the mean latent, the table's of class tokens of the last blocks",
}


def _of_probe(conditions: Conditions, name: str) -> list[str]:
    config = conditions.understanding
    probes = config["probes"]
    view = (probes["resize"], probes["size"])
    said = _of_validation(conditions) | {
        str(PROBES[name]): PROBES[name] is None,
        f"images of {view[1]} px, not 224": view == (256, 224),
        "no random crops in training": probes["augment"] is not None,
        f"{config['train_samples']:,} training images or fewer": config["train_samples"] >= TRAIN_IMAGES,
        f"class tokens of {probes['blocks']} blocks, not [1, 4]": probes["blocks"] == [1, 4],
    }
    return [words for words, same in said.items() if not same]


def _of_validation(conditions: Conditions) -> dict[str, bool]:
    count = conditions.validation_samples
    return {NOT_IMAGENET: conditions.probed_imagenet, f"{count:,} images, not 50,000": count == 50_000}


def _sampled(setting: str, figures: Mapping[str, float]) -> Sampled | None:
    """In the first network; None for the baseline, which is no generator."""
    return next(iter(_networks(setting, figures)), None)


def _networks(setting: str, figures: Mapping[str, float]) -> list[Sampled]:
    """In every network."""
    matches: dict[str, list[re.Match[str]]] = {}
    for name in figures:
        if (match := FIGURE.fullmatch(name)) and match["guidance"] != "noise":
            matches.setdefault(match["features"], []).append(match)
    found = []
    for features, of in matches.items():
        largest = max(of, key=lambda match: int(match["count"]) * (1000 if match["thousand"] else 1))
        count = largest["count"] + largest["thousand"]
        found.append(Sampled(setting, largest["end"], features, count, largest["guidance"], figures[largest[0]]))
    return found
