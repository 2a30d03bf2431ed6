"""One page on how the run went: what was run, its headline, and per part of the recipe its figures and pictures.

`report.html` needs no other file and no network; `metrics.md` holds all figures under their full names, `overview.png` is
originals, reconstructions and samples. The headline is what DVC shows of an experiment: the columns of the paper's tables.
Times, commits and devices are those of the starts of the stages (`stages.runner.starts`): they vary, as measured speeds do.
"""

import csv
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from stages.figures.drawing import curves, stack
from stages.figures.legend import legend_of
from stages.figures.page import CaptionedPicture, HeadlineFigure, Section, Table, page
from stages.figures.paper_table import (
    HEAD,
    OWN_HEAD,
    TABLE_2,
    Conditions,
    RunFigures,
    floor,
    floor_names,
    headline_figures,
    own_names,
    own_row,
)
from stages.figures.tables import flatten, markdown, number
from stages.runner.run import Input, Inputs, Output, main
from stages.runner.starts import Start, starts_of
from vtp.artefact import ArtefactError, read_json, require_no_pipe, write_json
from vtp.config import Config
from vtp.evaluation.settings import BEST, RECONSTRUCTED
from vtp.host import Host
from vtp.inference.grid import height_of

MEASURED = ("pretrain", "understanding", "tune_decoder", "reconstruction", "speed", "train_generator", "generation")
NEEDED = ("pretrain", "reference", "evaluate_understanding")  # whose records say what figures are of
RECONSTRUCTIONS = {
    "first": "The first held-out images",
    "worst": "The images with the largest perceptual distance",
    "median": "The images around the median of the perceptual distance",
    "best": "The images with the smallest perceptual distance",
}
TABLE_TITLE = "Beside the paper's table 2 (ImageNet 256 x 256, Inception, 50k)"
OVERVIEW = 4  # classes whose samples the overview shows, below all reconstructions


class Report(Config):
    """The section `report`."""

    title: str = Field(min_length=1, description="heading of the page")


def run(
    config: Report,
    *,
    metrics: Annotated[Input, "folder of the JSON files of the stages before"],
    plots: Annotated[Input, "folder of their curves and pictures"],
    records: Annotated[Inputs, "their provenances"],
    report: Annotated[Output, "folder for the page, its pictures and tables"],
    headline: Annotated[Output, "JSON file for the figures that `dvc metrics` compares"],
    host: Host,
) -> None:
    measured = {name: read_json(metrics / f"{name}.json") for name in MEASURED}
    measured["latents"] = measured["reconstruction"].pop("latents")
    of_stages = _records(records)
    report.mkdir()
    tables = {"pretrain": "pretrain", "decoder": "tune_decoder", "generator": "train_generator"}
    curves({name: _columns(plots / f"{file}.csv") for name, file in tables.items()}, report / "curves.png")
    decoders = next(iter(measured["reconstruction"]["reconstruction"].values()))  # the last is that of the samples
    figures = RunFigures(
        reconstruction=list(decoders.values())[-1],
        understanding=measured["understanding"]["understanding"],
        generator=measured["train_generator"]["train_generator"],
        generation=measured["generation"]["generation"],
        conditions=Conditions.of(of_stages),
    )
    sections = _sections(
        measured, plots, report, figures, settings=of_stages.get("generate", {}).get("config", {}).get("settings", {})
    )
    everything = {name: values for section in sections for name, values in section.metrics.items()}
    rows = [[name, number(value)] for name, value in flatten(everything).items()]
    (report / "metrics.md").write_text(markdown(["metric", "value"], rows), encoding="utf-8")
    scratch = host.folder.parents[2]  # of all stages: this is <stage>/<fingerprint>/folder in it
    opening = [_what_was_run(list(of_stages.values()), scratch), _legend(everything)]
    (report / "report.html").write_text(
        page(config.title, opening, _headline(figures, decoders), sections), encoding="utf-8"
    )
    parts: list[tuple[Path, int | None]] = [(plots / "reconstructions" / "first.png", None)]
    if (sampled := figures.shown) is not None:
        classes = height_of(OVERVIEW, figures.conditions.image_size)
        parts.append((plots / "samples" / f"{sampled.setting}.png", classes))
    stack(parts, report / "overview.png")
    flops = {"pretrain_flops": measured["pretrain"]["pretrain"]["flops"]}
    write_json(headline, flops | headline_figures(figures))


def _sections(
    measured: Mapping[str, Any], plots: Path, report: Path, figures: RunFigures, *, settings: Mapping[str, Any]
) -> list[Section]:
    """The parts of the page in the order of the recipe; `settings` are those of the samples, by name."""
    reconstructions = plots / "reconstructions"
    shown = [
        CaptionedPicture(reconstructions / f"{name}.png", f"{words}, over what each decoder makes of their latents")
        for name, words in RECONSTRUCTIONS.items()
    ]
    drawn = sorted((plots / "samples").glob("*.png"))
    return [
        Section(
            "Pre-training",
            measured["pretrain"],
            [
                CaptionedPicture(
                    plots / "pretrain.png", "Held-out images, over their reconstructions at every evaluation"
                )
            ],
        ),
        Section("Understanding", measured["understanding"]),
        Section(
            "Decoder tuning",
            measured["tune_decoder"],
            [
                CaptionedPicture(
                    plots / "tune_decoder.png",
                    "Held-out images, over the reconstructions of the decoder as it was pre-trained, and of the tuned one "
                    "at every evaluation",
                )
            ],
        ),
        Section("Reconstruction", measured["reconstruction"], shown),
        Section(
            "Latents",
            {"latents": measured["latents"]},
            [
                CaptionedPicture(
                    plots / "latents" / "latents.png",
                    "Mean and deviation of every channel; share of the variance by principal component; power by spatial "
                    "frequency; what noise on the latents leaves of the PSNR",
                )
            ],
        ),
        Section("Speed", measured["speed"]),
        Section(
            "Training of the generator",
            measured["train_generator"],
            [CaptionedPicture(plots / "train_generator.png", "Samples of the same noise at every evaluation")],
        ),
        Section(
            "Generation",
            measured["generation"],
            [CaptionedPicture(path, _of_samples(path.stem, settings)) for path in drawn],
        ),
        Section(
            TABLE_TITLE,
            tables=[Table(HEAD, [own_row(figures), *TABLE_2]), Table(OWN_HEAD, own_names(figures), words=True)],
            notes=[
                "The row of this run has what was measured as the column's figures were. All else stands below the table "
                "under its own name, with what differs; it must not be compared with the column."
            ],
        ),
        Section(
            "Curves",
            pictures=[
                CaptionedPicture(
                    report / "curves.png",
                    "Scalars of the trainings over their steps, each a mean since the one before; dashed: what a model that "
                    "knows nothing would score, or the decoder as it came",
                )
            ],
        ),
    ]


def _records(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Provenances by stage. Raises ArtefactError when one is none, or one is missing."""
    records = {}
    for path in paths:
        record = read_json(path)
        if not {"stage", "config", "inputs", "code", "facts"} <= record.keys():
            raise ArtefactError(f"--records {path}: no provenance of a stage; name files that --provenance wrote")
        records[record["stage"]] = record
    if missing := [name for name in NEEDED if name not in records]:
        raise ArtefactError(
            f"--records: no provenance of the stage {missing[0]}; add work/provenance/{missing[0]}.json"
        )
    return records


def _what_was_run(records: Sequence[Mapping[str, Any]], scratch: Path) -> Section:
    """Data, commits, times and devices."""
    rows, total = [], 0.0
    for record in records:
        starts = starts_of(record, scratch)
        total += sum(start.seconds or 0.0 for start in starts)
        rows.append((record["stage"], *_of_starts(starts)))
    data = [f"{words}: {record['facts']['data']}." for words, record in _data(records) if "data" in record["facts"]]
    unknown = sum(row[1] is None for row in rows)
    missing = f" Of {unknown} stages it is not known here: their outputs were made elsewhere." if unknown else ""
    time = f"Time of the {len(rows)} stages below: {_duration(total)}.{missing}"
    head = ("stage", "commit", "began (UTC)", "time", "starts", "device")
    return Section("What was run", tables=[Table(head, rows, words=True)], notes=[*data, time])


def _data(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    words = {"pretrain": "Pre-trained on", "reference": "Compared with"}
    return [(words[record["stage"]], record) for record in records if record["stage"] in words]


def _of_starts(starts: Sequence[Start]) -> tuple[str | None, ...]:
    """Cells of a stage's row; all empty where its starts are not known."""
    if not starts:
        return (None,) * 5
    began = datetime.fromtimestamp(starts[0].began, UTC).strftime("%Y-%m-%d %H:%M")
    seconds = sum(start.seconds or 0.0 for start in starts)
    commits = ", ".join(dict.fromkeys(start.commit for start in starts))
    devices = ", ".join(dict.fromkeys(start.device for start in starts if start.device))
    return commits, began, _duration(seconds), str(len(starts)), devices


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds; milliseconds are noise."""
    return str(timedelta(seconds=round(seconds)))


def _headline(run: RunFigures, decoders: Mapping[str, Mapping[str, float]]) -> list[HeadlineFigure]:
    """Figures under their full names, each beside what it is to be held against."""
    plain, guided = run.best
    before = next(iter(decoders.values())) if len(decoders) > 1 else {}
    rfid = next((name for name in run.reconstruction if name.startswith("rfid_")), "")
    baseline = next((v for name, v in run.generation.get("noise", {}).items() if name.startswith("gfid_")), None)
    understood = [("Zero-shot accuracy", "zero_shot_top1_squash"), ("Linear probe", "linear_probe_multi")]
    figures = [_figure(*named, run.understanding, "chance", run.understanding.get("chance")) for named in understood]
    for label, name in (("PSNR in dB", "psnr"), ("Reconstruction: rFID", rfid)):
        figures.append(_figure(label, name, run.reconstruction, "before decoder tuning", before.get(name)))
    for label, sampled in (("Generation: gFID", plain), ("Generation, guided: gFID", guided)):
        name, own = (f"gfid_{sampled.end}", run.generation[sampled.setting]) if sampled else ("", {})
        figures.append(_figure(label, name, own, "noise through the decoder", baseline))
    if (sampled := run.shown) is not None:
        own = {**run.generation[sampled.setting], **floor(run, sampled)}
        rfid, accuracy = floor_names(sampled)
        figures.append(_figure("The decoder's floor of gFID", rfid, own, "", None))
        figures.append(_figure("KID", f"kid_{sampled.end}", own, "", None))
        shown = f"class_accuracy_{sampled.end}"
        figures.append(_figure("Samples of their class", shown, own, "reconstructions", own.get(accuracy)))
        best = run.generation.get(BEST, {})
        shift = best.get("timestep_shift")
        figures.append(_figure("Guidance of the lowest gFID", "guidance_scale", best, "timestep shift", shift))
    return figures


def _figure(label: str, name: str, values: Mapping[str, float], words: str, beside: float | None) -> HeadlineFigure:
    if name not in values:
        return HeadlineFigure(label, "", None)
    return HeadlineFigure(label, name, values[name], "" if beside is None else f"{words}: {number(beside)}")


def _legend(everything: Mapping[str, Any]) -> Section:
    """What the names on the page mean."""
    names = dict.fromkeys(name for name in _leaves(everything))
    meanings = legend_of(names)
    described = dict.fromkeys(meaning for meaning in meanings.values() if meaning is not None)
    rows = [
        (", ".join(name for name in names if meanings[name] == each), each.what, each.better, each.unit, each.source)
        for each in described
    ]
    rows += [(name, "not described", "-", "-", "-") for name in names if meanings[name] is None]
    return Section(
        "What the names mean", tables=[Table(("name", "what it is", "better", "unit", "source"), rows, words=True)]
    )


def _leaves(values: Mapping[str, Any]) -> list[str]:
    """Last parts of the names of nested metrics."""
    return [
        leaf for name, value in values.items() for leaf in (_leaves(value) if isinstance(value, Mapping) else [name])
    ]


def _of_samples(name: str, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The caption of a picture of samples."""
    if name == "guidance":
        return "Figures of the samples over the scale of guidance"
    if name == "noise":
        return "noise: Gaussian noise with the statistics of the latents, through the decoder; no generator has a part in it"
    if name == RECONSTRUCTED:
        return f"{name}: real images of these classes, as the decoder shows them; no sample can be nearer to them"
    if (sampler := settings.get(name)) is None:
        return f"{name}: samples, a row per class"
    steps = f"{sampler['solver']}, {sampler['steps']} steps, guidance scale {sampler['guidance_scale']:g}"
    return f"{name}: samples, a row per class ({steps})"


def _columns(path: Path) -> dict[str, list[float]]:
    """Of a table of numbers; NaN where it holds none. Raises ArtefactError for one that is damaged."""
    require_no_pipe(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file, strict=True)
            columns = zip(*([float(value or "nan") for value in row] for row in rows), strict=True)
            return dict(zip(head, map(list, columns), strict=True)) if rows else {}
    except (ValueError, csv.Error) as error:  # of UTF-8, of numbers, of rows of other lengths
        raise ArtefactError(f"{path}: not a whole table of numbers ({error}); run its stage again") from None


if __name__ == "__main__":
    main(run)
