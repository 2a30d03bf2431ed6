"""Compare runs: a table, figures in the layout of the paper's beside its points, and what may be claimed.

The input holds `<run>/<seed>/<point>/*.json`, what was measured of the tokenizer at a milestone, named by training FLOPs,
its share of the run or `end`, and `<run>/<seed>/*.json`, what was measured of the whole run, which counts at its end. A run
without points was not trained here. Means and 95 % intervals are over seeds; of one seed there is no interval, and nothing
is claimed.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from stages.figures.claims import BetterClaim, Claim, ClaimResult, CorrelatesClaim, better_way, conclusion, judge
from stages.figures.convergence import convergence_of, draw_convergence
from stages.figures.legend import NEITHER
from stages.figures.panels import BarsConfig, PanelConfig, draw_panels, labels, named_runs
from stages.figures.points import FLOPS, OF_TRAINING, StudyPoints, meaning, read_points
from stages.figures.prompted import draw_prompted, settings_of
from stages.figures.published import CATEGORY, Published
from stages.figures.side_by_side import draw_side_by_side
from stages.figures.tables import markdown, number
from stages.runner.run import Input, OptionalInput, Output, main
from vtp.artefact import ArtefactError, write_json
from vtp.config import Config, Distinct, did_you_mean
from vtp.evaluation.intervals import Interval, deviation_interval
from vtp.host import Host
from vtp.texts import in_markdown

ONE_SEED = "One seed: no interval, no claim."
SEVERAL = "± is half of the 95 % t interval over seeds."
NOISE = (
    "Standard deviation over runs that differ in nothing but the seed of one stage, with its 95 % interval. Two such runs "
    "differ by less than 2.8 of it in 95 of 100 cases: a smaller difference of two single runs is noise."
)


class Summary(Config):
    """The section `summary`."""

    title: str = Field(min_length=1, description="heading of the figure")
    metrics: dict[Annotated[str, Field(min_length=1)], str] = Field(
        min_length=1, description="names joined by dots, as in the tables of the report, by what they are called here"
    )
    figure: dict[str, PanelConfig] = Field(
        min_length=1, description="panels by any name, in their order, and the published figures that stand below them"
    )
    claims: dict[str, Claim] = Field(description="what the paper claims, by any name, each with its test")
    noise: dict[str, Annotated[list[str], Distinct, Field(min_length=2)]] = Field(
        description="runs that differ in the seed of one stage, by the name of the stage: what difference is noise"
    )

    @model_validator(mode="after")
    def _labels_are_known(self) -> Self:
        if taken := self.metrics.keys() & OF_TRAINING.keys():
            raise ValueError(f"metrics.{min(taken)}: is a quantity of the training; call the metric otherwise")
        for place, label in self._labels():
            if label not in self.metrics:
                raise ValueError(f"{place}: no {label!r} among metrics{did_you_mean(label, self.metrics)}")
        for place, claim in self.claims.items():
            for label in _compared(claim):
                if better_way(label, self.metrics) == NEITHER:
                    raise ValueError(f"claims.{place}: {label!r} has no better direction in the legend of metrics")
        return self

    def _labels(self) -> Iterator[tuple[str, str]]:
        """Every label that is named, and where."""
        for place, panel in self.figure.items():
            yield from ((f"figure.{place}", label) for label in labels(panel))
        for place, claim in self.claims.items():
            against = getattr(claim, "against", FLOPS)
            named = [*_compared(claim), *([against] if against not in OF_TRAINING else [])]
            yield from ((f"claims.{place}", label) for label in named)

    def require_published(self, others: Published) -> None:
        """Raises ArtefactError for a panel's figure that is not there, or has none of the metrics."""
        for panel in self.figure.values():
            if panel.published is not None:
                others.require(panel.published, panel.y)

    def named_runs(self) -> Iterator[tuple[str, str]]:
        """Every run that is named, and where."""
        for place, panel in self.figure.items():
            yield from ((f"figure.{place}", run) for run in named_runs(panel))
        for place, claim in self.claims.items():
            yield from ((f"claims.{place}", run) for run in _runs(claim))
        for stage, runs in self.noise.items():
            yield from ((f"noise.{stage}", run) for run in runs)


def run(
    config: Summary,
    *,
    points: Annotated[Input, "folder of RUN/SEED/POINT/*.json and RUN/SEED/*.json, the metrics to compare"],
    plots: Annotated[
        OptionalInput, "folder of the runs' pictures, of which reconstructions are set side by side; default: none"
    ] = None,
    published: Annotated[Input, "CSV file with points of figures and tables that others published"],
    summary: Annotated[Output, "folder for the tables, the figure and the claims"],
    headline: Annotated[Output, "JSON file for the last point of every run, and for every claim"],
    host: Host,
) -> None:
    others = Published.read(published)
    config.require_published(others)
    named = list(config.named_runs())
    measured = read_points(points, config.metrics, first=[name for _, name in named])
    for place, name in named:
        if name not in measured.runs:
            hint = did_you_mean(name, measured.runs)
            raise ArtefactError(f"summary.{place} names {name!r}; {points} holds {', '.join(measured.runs)}{hint}")
    verdicts, noise = judge(list(config.claims.values()), measured), _noise(config, measured)
    summary.mkdir()
    tables = [_table(measured), _legend(config), _comparison(config, measured, others), _noise_table(noise, measured)]
    (summary / "table.md").write_text("\n".join(filter(None, tables)), encoding="utf-8")
    (summary / "claims.md").write_text(_claims(verdicts), encoding="utf-8")
    draw_panels(list(config.figure.values()), measured, others, title=config.title, path=summary / "curves.png")
    if plots is not None:
        draw_side_by_side(plots, summary / "side_by_side.png")
        for setting in settings_of(plots):
            draw_prompted(plots, setting, summary / f"prompts_{setting}.png")
    if watched := convergence_of(points):
        draw_convergence(watched, summary / "convergence.png")
    write_json(headline, _headline(measured, verdicts, noise))


def _compared(claim: Claim) -> list[str]:
    """Labels of metrics that a claim calls better."""
    return [claim.metric, claim.beside] if isinstance(claim, CorrelatesClaim) else [claim.metric]


def _runs(claim: Claim) -> list[str]:
    """Runs that a claim names."""
    if isinstance(claim, BetterClaim):
        return [claim.run, claim.than]
    return [] if isinstance(claim, CorrelatesClaim) else claim.runs


def _table(measured: StudyPoints) -> str:
    """A row per point; the mean over seeds and half of its interval."""
    rows = []
    for name in measured.runs:
        seeds = len(measured.seeds([name]))
        for point in measured.points(name):
            flops = measured.mean(name, point, FLOPS).estimate
            cells = [_cell(measured.mean(name, point, label), seeds) for label in measured.metrics]
            rows.append([name, "-" if math.isnan(flops) else f"{flops:.3g}", str(seeds), *cells])
    several = any(len(measured.seeds([name])) > 1 for name in measured.runs)
    head = ["run", "training FLOPs", "seeds", *measured.metrics]
    return f"{markdown(head, rows)}\n{SEVERAL if several else ONE_SEED}\n"


def _cell(of: Interval, seeds: int) -> str:
    """`12.3 ± 1.4`; with how many seeds have it, where some lack it."""
    if not of.number:
        return "-"
    half = "" if of.number < 2 else f" ± {float(f'{(of.high - of.low) / 2:.2g}'):g}"
    return f"{number(of.estimate)}{half}{f' ({of.number} of {seeds})' if of.number < seeds else ''}"


def _legend(config: Summary) -> str:
    """What the labels are."""
    rows = [
        [label, config.metrics[label], *(("-", "-") if entry is None else (entry.better, entry.unit))]
        for label, entry in meaning(config.metrics).items()
    ]
    return markdown(["called", "metric", "better", "unit"], rows)


def _comparison(config: Summary, measured: StudyPoints, others: Published) -> str:
    """The published points of all panels; beside those of a category or series that is called like a run its last point."""
    rows: dict[tuple[str, ...], None] = {}
    for panel in config.figure.values():
        for point in (point for label in panel.y for point in others.of(panel.published, label)):
            run_name = point.x if point.x_unit == CATEGORY else point.series
            ours = math.nan
            if isinstance(panel, BarsConfig) and run_name in measured.runs:
                ours = measured.mean(run_name, measured.last(run_name), point.metric).estimate
            x = point.x if point.x_unit == CATEGORY else f"{float(point.x):.4g} {point.x_unit}"
            theirs = f"{point.value:.6g} ± {point.error:g}"
            difference = "-" if math.isnan(ours) else f"{ours - point.value:+.4g}"
            cells = (point.figure, point.series, x, point.metric, theirs, number(ours), difference, point.source)
            rows[cells] = None
    head = ["published", "series", "at", "metric", "value", "here", "difference", "source"]
    return markdown(head, list(rows)) if rows else ""


def _noise(config: Summary, measured: StudyPoints) -> dict[str, dict[str, Interval]]:
    """Standard deviations by stage and label, over the last points of its runs and their seeds."""
    return {
        stage: {
            label: deviation_interval([v for name in runs for v in measured.values(name, measured.last(name), label)])
            for label in measured.metrics
        }
        for stage, runs in config.noise.items()
    }


def _noise_table(noise: Mapping[str, Mapping[str, Interval]], measured: StudyPoints) -> str:
    if not noise:
        return ""
    rows = [[stage, *map(_deviation, of_stage.values())] for stage, of_stage in noise.items()]
    return f"{markdown(['seed of', *measured.metrics], rows)}\n{NOISE}\n"


def _deviation(of: Interval) -> str:
    return f"{of.estimate:.3g} [{of.low:.3g}, {of.high:.3g}], {of.number} runs" if of.number > 1 else "-"


def _claims(verdicts: list[ClaimResult]) -> str:
    """What may be said, in a sentence, and why, in one of each claim."""
    if not verdicts:
        return "This study claims nothing.\n"
    return "\n".join([conclusion(verdicts), "", *(f"- {in_markdown(each.sentence)}" for each in verdicts), ""])


def _headline(
    measured: StudyPoints, verdicts: list[ClaimResult], noise: Mapping[str, Mapping[str, Interval]]
) -> dict[str, Any]:
    last = {
        name: {label: measured.mean(name, measured.last(name), label) for label in measured.metrics}
        for name in measured.runs
    }
    return {
        "runs": {
            name: {label: _ends("mean", of) for label, of in row.items() if of.number} for name, row in last.items()
        },
        "claims": {each.key: each.figures for each in verdicts},
        "noise": {stage: {label: _ends("std", of) for label, of in row.items()} for stage, row in noise.items()},
    }


def _ends(name: str, of: Interval) -> dict[str, float]:
    """What of an interval there is."""
    found = {name: of.estimate, "low": of.low, "high": of.high}
    return {key: value for key, value in found.items() if not math.isnan(value)}


if __name__ == "__main__":
    main(run)
