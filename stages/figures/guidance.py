"""What guidance does to samples: figures over its scale, a curve per interval and shift."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stages.figures.drawing import Panel, panels
from vtp.config import number_name
from vtp.flow import SamplerConfig

SHOWN = ("gfid", "is", "precision", "recall", "class")


class Guided(NamedTuple):
    """The figures of one setting."""

    setting: str
    sampler: SamplerConfig
    figures: dict[str, float]  # by name, without what says how it was drawn

    def cells(self) -> dict[str, str | float]:
        """A row of a table."""
        start, end = self.sampler.guidance_interval
        drawn = {
            "setting": self.setting,
            "guide": self.sampler.guide,
            "guidance_scale": self.sampler.guidance_scale,
            "guidance_start": start,
            "guidance_end": end,
            "timestep_shift": self.sampler.timestep_shift,
            "solver": self.sampler.solver,
            "steps": self.sampler.steps,
        }
        return {**drawn, **self.figures}


def draw_guidance(rows: Sequence[Guided], path: Path) -> None:
    """Figures against the scale, as one PNG; nothing where no curve has two scales of guidance.

    A point without guidance belongs to the curves of all intervals, channels and guides.
    """
    curves: dict[str, list[Guided]] = {}
    for row in rows:
        if row.sampler.guides:
            curves.setdefault(_curve(row.sampler), []).append(row)
    drawn = {name: curve for name, curve in curves.items() if len({row.sampler.guidance_scale for row in curve}) > 1}
    if not drawn:
        return
    for curve in drawn.values():
        curve += [row for row in rows if not row.sampler.guides and _path(row.sampler) == _path(curve[0].sampler)]
        curve.sort(key=lambda row: row.sampler.guidance_scale)
    scales = sorted({row.sampler.guidance_scale for curve in drawn.values() for row in curve})
    shown = []
    for name in [name for name in rows[0].figures if name.split("_")[0] in SHOWN]:
        lines = {}
        for curve, of in drawn.items():
            values = {row.sampler.guidance_scale: row.figures[name] for row in of}
            lines[curve] = [values.get(scale, math.nan) for scale in scales]
        shown.append(Panel(name, "guidance scale", scales, lines))
    panels(shown, path)


def _curve(sampler: SamplerConfig) -> str:
    start, end = sampler.guidance_interval
    away = "" if sampler.guide == "null_class" else ", from a weaker generator"
    channels = "" if sampler.guidance_channels == "all" else f", {sampler.guidance_channels} channels"
    return f"t {number_name(start)} to {number_name(end)}, {_path(sampler)}{channels}{away}"


def _path(sampler: SamplerConfig) -> str:
    return f"shift {number_name(sampler.timestep_shift)}, {sampler.steps} {sampler.solver}"
