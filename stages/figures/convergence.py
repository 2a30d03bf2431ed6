"""How fast generators learn, run beside run: their Fréchet distance against epochs (paper figure 9 b)."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from stages.figures.drawing import axes
from stages.figures.tables import flatten
from vtp.artefact import read_json
from vtp.evaluation.convergence import EPOCHS
from vtp.inference.lettering import drawable

AT_EPOCHS = re.compile(rf"train_generator\.(?P<name>.+)\.{EPOCHS}(?P<epochs>[\d.e+-]+)")


def convergence_of(points: Path) -> dict[str, dict[str, dict[float, float]]]:
    """Distances by epochs, by their name and by the tokenizer: the folder of `train_generator.json` below `points`.

    Empty where no generator was watched (`train_generator.monitor.fid`).
    """
    found: dict[str, dict[str, dict[float, float]]] = defaultdict(dict)
    for path in sorted(points.rglob("train_generator.json")):
        for name, value in flatten(read_json(path)).items():
            if match := AT_EPOCHS.fullmatch(name):
                curves = found[match["name"]]
                curves.setdefault(str(path.parent.relative_to(points)), {})[float(match["epochs"])] = value
    return dict(found)


def draw_convergence(found: Mapping[str, Mapping[str, Mapping[float, float]]], path: Path) -> None:
    """A panel per distance of `convergence_of`, a curve per tokenizer; the colour is that of the run."""
    runs = sorted({tokenizer.split("/")[0] for curves in found.values() for tokenizer in curves})
    with axes(len(found), path, columns=2, size=(5.5, 4), dpi=90) as every:
        for axis, (name, curves) in zip(every, found.items(), strict=True):
            for tokenizer, curve in curves.items():
                run = tokenizer.split("/")[0]
                epochs = sorted(curve)
                axis.plot(
                    epochs,
                    [curve[each] for each in epochs],
                    color=f"C{runs.index(run)}",
                    marker="o",
                    markersize=3,
                    label=drawable(tokenizer),
                )
            axis.set_title(drawable(name), fontsize=9)
            axis.set_xlabel("epochs of the generator", fontsize=8)
            axis.legend(fontsize=7)
