"""Table 2 of the paper, generation on ImageNet at 256 x 256, and the row of a run beside it."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

FIGURE = re.compile(r"gfid_(?P<end>(?P<features>.+)_(?P<count>\d+)(?P<thousand>k?)_(?P<guidance>[^_]+)_[^_]+)")
REAL = re.compile(r"_vs\d+k?(?=_)")  # of how many real images a figure's name tells, where it depends on them
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
    "IS",
    "precision",
    "recall",
)
OTHERS = ("is", "precision", "recall")  # beside gFID
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


class Sampled(NamedTuple):
    """The figures of one setting, of its largest number of samples."""

    setting: str
    end: str  # of the names of its figures
    features: str
    number: str
    guidance: str
    gfid: float
    others: tuple[float | None, ...]  # of OTHERS


class RunFigures(NamedTuple):
    """What was measured of a run."""

    reconstruction: Mapping[str, Any]  # by the decoder of the samples
    understanding: Mapping[str, float]
    generator: Mapping[str, float]
    generation: Mapping[str, Mapping[str, float]]  # by setting

    @property
    def best(self) -> tuple["Sampled | None", "Sampled | None"]:
        """The setting of the lowest gFID without guidance, and with."""
        every = [one for setting, figures in self.generation.items() if (one := _sampled(setting, figures)) is not None]
        plain = min((s for s in every if s.guidance == "unguided"), key=lambda s: s.gfid, default=None)
        return plain, min((s for s in every if s.guidance != "unguided"), key=lambda s: s.gfid, default=None)


def headline_figures(run: RunFigures) -> dict[str, float]:
    """The columns of the paper's tables under their full names: each says what was measured."""
    accuracies = ("zero_shot_top1_squash", "linear_probe_bottleneck", "linear_probe_multi")
    figures = {name: run.understanding[name] for name in accuracies if name in run.understanding}
    figures |= {name: v for name, v in run.reconstruction.items() if name == "psnr" or name.startswith("rfid_")}
    for sampled in filter(None, run.best):
        own = run.generation[sampled.setting]
        wanted = [f"{name}_{sampled.end}" for name in ("gfid", *OTHERS)]
        figures |= {name: value for name, value in own.items() if REAL.sub("", name) in wanted}
    return figures


def own_row(run: RunFigures) -> tuple[str | float | None, ...]:
    """The run in the columns of `HEAD`: its best setting without guidance, and with. Its name says what was measured."""
    plain, guided = run.best
    some = plain or guided
    measured = f" ({some.features}, {some.number} samples)" if some else ""
    names = (f"; {plain.setting}" if plain else "") + (f"; guided: {guided.setting}" if guided else "")
    accuracy = [
        100 * run.understanding[name] if name in run.understanding else None
        for name in ("zero_shot_top1_squash", "linear_probe_multi")
    ]
    rfid = next((v for name, v in run.reconstruction.items() if name.startswith("rfid_")), None)
    return (
        f"this run{measured}{names}",
        rfid,
        *accuracy,
        f"{run.generator['parameters'] / 1e6:.3g}M",
        run.generator["epochs"],
        *_cells(plain),
        *_cells(guided),
    )


def _cells(sampled: Sampled | None) -> tuple[float | None, ...]:
    return (None,) * 4 if sampled is None else (sampled.gfid, *sampled.others)


def _sampled(setting: str, figures: Mapping[str, float]) -> Sampled | None:
    """None for the baseline, which is no generator."""
    matches = [match for name in figures if (match := FIGURE.fullmatch(name)) and match["guidance"] != "noise"]
    if not matches:
        return None
    largest = max(matches, key=lambda match: int(match["count"]) * (1000 if match["thousand"] else 1))
    named = {REAL.sub("", name): value for name, value in figures.items()}
    others = tuple(named.get(f"{name}_{largest['end']}") for name in OTHERS)
    count = largest["count"] + largest["thousand"]
    return Sampled(
        setting, largest["end"], largest["features"], count, largest["guidance"], figures[largest[0]], others
    )
