"""How the page lays out figures and pictures."""

import json
import re
import time
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT

from stages.figures.drawing import Panel, curves, panels, stack
from stages.figures.legend import LEGEND, legend_of
from stages.figures.page import CaptionedPicture, HeadlineFigure, Section, Table, page
from stages.figures.paper_table import (
    HEAD,
    TABLE_2,
    Conditions,
    RunFigures,
    headline_figures,
    own_names,
    own_row,
)
from stages.figures.tables import flatten, markdown
from stages.report import _columns, _headline, _records, _what_was_run
from stages.runner.fingerprint import fingerprint_of
from stages.runner.starts import STARTS, Starts, read_starts
from vtp.artefact import ArtefactError, write_json
from vtp.config import read_yaml
from vtp.inference.grid import GAP, grid, height_of
from vtp.layers.decode import DecodeError

FIGURES = [("gfid", "", 2.6), ("is", "", 197.0), ("precision", "_vs10k", 0.79), ("recall", "_vs10k", 0.62)]
METRICS = {
    "device": "cpu",
    "plain": 3,
    "at_one_protocol": {"pretrained": {"psnr": 20.123456, "only_here": 1.0}, "tuned": {"psnr": 2.5e7}},
}


def test_records_of_one_kind_stand_beside_each_other():
    text = page("A & B", [Section("What")], [], [Section("Reconstruction", {"reconstruction": METRICS})])
    assert "<h1>A &amp; B</h1>" in text
    assert "<tr><th>reconstruction<th><tr><td>device<td>cpu<tr><td>plain<td>3</table>" in text
    assert "<th>reconstruction.at_one_protocol<th>pretrained<th>tuned" in text
    assert "<tr><td>psnr<td>20.12<td>2.500e+07<tr><td>only_here<td>1<td></table>" in text
    assert text.count("<table>") == 2


def test_names_are_plain_text_on_the_page_and_in_tables():
    name = "<script>alert(1)</script>|`x`\x1b[31m\u202e\n"
    sections = [Section(name, {name: {name: 1.0, "nested": {name: {name: name}}}}, notes=[name])]
    text = page(name, sections, [HeadlineFigure(name, name, 1.0, name)], sections)
    assert "<script>" not in text
    assert not set(text) & set("\x1b\u202e")
    table = markdown([name, "value"], [[name, "1"]])
    assert table.count("\n") == 3
    assert "<" not in table
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table.splitlines())


def test_dollars_are_no_formula(tmp_path):
    panels([Panel("$x_{", "$", [0.0, 1.0], {"$\\frac": [1.0, 2.0], "b": [0.0, 1.0]})], tmp_path / "a.png")
    rows = [torch.zeros(1, 3, 16, 16, dtype=torch.uint8)]
    grid(rows, ["a\nb\udce9\x1b"], tmp_path / "b.png", title="x\ny", notes=[["\ud800\x1b"]])
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "b.png").exists()


def test_flat_names_are_whole_and_texts_are_left_out():
    assert flatten({"a": METRICS}) == {
        "a.plain": 3,
        "a.at_one_protocol.pretrained.psnr": 20.123456,
        "a.at_one_protocol.pretrained.only_here": 1.0,
        "a.at_one_protocol.tuned.psnr": 2.5e7,
    }


@pytest.mark.parametrize("side", [16, 120])
def test_notes_make_room_for_themselves(tmp_path, side):
    rows = [torch.zeros(3, 3, side, side, dtype=torch.uint8)] * 2
    notes = [["a key that is much too long for the width of its image"] * 3, ["20 dB\n0.9"] * 3]
    grid(rows, ["a", "b"], tmp_path / "plain.png", title="t")
    grid(rows, ["a", "b"], tmp_path / "noted.png", title="t", notes=notes)
    plain, noted = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "noted"))
    assert noted.width == plain.width  # notes are cut
    assert noted.height == plain.height + 3 * 15


def test_panels_are_the_same_bytes_again(tmp_path):
    drawn = [Panel("one", "x", [0, 1], {"a": [1, 2], "b": [2, 3]}), Panel("two", "x", [1, 2], {"c": [1, 10]}, log=True)]
    for name in ("first", "second"):
        panels(drawn, tmp_path / f"{name}.png")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def ink(path, column=0):
    """Share of pixels in the colour of the first curve, in a column of panels of equal width."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return float((np.abs(pixels - (31, 119, 180)).sum(-1) < 60).mean())


def test_a_curve_of_one_point_is_seen(tmp_path):
    nan = float("nan")
    drawn = {"one": [3.0], "gaps": [nan, 2.0, nan], "none": [nan, nan], "line": [1.0, 2.0]}
    for name, values in drawn.items():
        curves({"run": {"step": [10.0 * k for k in range(len(values))], "loss": values}}, tmp_path / f"{name}.png")
    assert min(ink(tmp_path / f"{name}.png") for name in ("one", "gaps", "line")) > 2e-4
    assert ink(tmp_path / "none.png") == 0
    empty = np.asarray(Image.open(tmp_path / "none.png").convert("L"))
    middle = empty[empty.shape[0] // 2 - 8 : empty.shape[0] // 2 + 8, 120:-60]
    assert (middle < 100).any()  # it says so


@pytest.mark.parametrize(
    "content", [b"", b"step,loss\n1,2\n3\n", b"step,loss\n1,x\n", b"step,loss\n1,\xff\n", b"step,loss\n1,2,3\n"]
)
def test_a_damaged_table_is_named(tmp_path, content):
    (tmp_path / "pretrain.csv").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"pretrain\.csv: not a whole table of numbers \(.*; run its stage again"):
        _columns(tmp_path / "pretrain.csv")


def test_numbers_of_a_table_may_be_missing(tmp_path):
    (tmp_path / "pretrain.csv").write_text("step,loss\n1,\n2,0.5\n")
    columns = _columns(tmp_path / "pretrain.csv")
    assert columns["step"] == [1.0, 2.0]
    assert np.isnan(columns["loss"][0]) and columns["loss"][1] == 0.5


def test_logarithmic_axes_have_plain_numbers(tmp_path, monkeypatch):
    """Formulas are off, so a power of ten written as one would stand there with its dollars."""
    from matplotlib.figure import Figure

    texts, save = [], Figure.savefig

    def read(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        texts.extend(label.get_text() for axis in figure.axes for label in axis.get_yticklabels(which="both"))

    monkeypatch.setattr(Figure, "savefig", read)
    for name, values in (("wide", [1.0, 1e4]), ("narrow", [1.0, 3.0])):
        panels([Panel("p", "x", [0, 1], {"a": values}, log=True)], tmp_path / f"{name}.png")
    assert any(texts)
    assert not [text for text in texts if "$" in text]


def test_the_overview_cuts_no_row_in_two(tmp_path):
    for side in (16, 32, 64, 256):
        rows = [torch.full((2, 3, side, side), 9 * number, dtype=torch.uint8) for number in range(6)]
        grid(rows, list("abcdef"), tmp_path / "samples.png", title="t")
        stack([(tmp_path / "samples.png", None), (tmp_path / "samples.png", height_of(4, side))], tmp_path / "out.png")
        whole, both = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("samples", "out"))
        below = both.crop((0, whole.height, both.width, both.height))
        assert below.getpixel((below.width - 30, below.height - GAP - 1)) == (27, 27, 27)  # the fourth row, to its end
        assert below.getpixel((below.width - 30, below.height - 1)) == (255, 255, 255)


def test_a_damaged_picture_is_named(tmp_path):
    Image.effect_noise((32, 32), 9).save(tmp_path / "a.png")
    path = tmp_path / "guided.png"
    path.write_bytes((tmp_path / "a.png").read_bytes()[:-200])
    with pytest.raises(DecodeError, match=r"guided\.png: not a readable image"):
        stack([(tmp_path / "a.png", 9), (path, 9)], tmp_path / "out.png")
    with pytest.raises(DecodeError, match=r"guided\.png: not a readable image"):
        page("T", [Section("W")], [], [Section("S", pictures=[CaptionedPicture(path, "c")])])


def test_the_page_opens_with_what_was_run_figures_and_contents(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    opening = [Section("What was run", notes=["On 3 < 4 pictures."]), Section("Names")]
    figures = [HeadlineFigure("PSNR", "psnr", 24.0, "before: 20"), HeadlineFigure("gFID", "", None)]
    table = Table(("a", "b"), [("x", None)], words=True)
    sections = [
        Section("Latents & more", pictures=[CaptionedPicture(tmp_path / "a.png", "What it shows")], tables=[table])
    ]
    text = page("T", opening, figures, sections)
    parts = ["What was run</h2><p>On 3 &lt; 4 pictures.", "<div>PSNR<b>24</b><small>psnr<br>before: 20</small></div>"]
    parts += ["<div>gFID<b>-</b><small>not measured</small></div>", "<h2>Contents</h2>"]
    parts += [
        '<li><a href="#names">Names</a><li><a href="#latents-more">Latents &amp; more</a></ul>',
        '<h2 id="names">',
    ]
    parts += [
        '<h2 id="latents-more">',
        '<table class="words"><tr><th>a<th>b<tr><td>x<td>-</table>',
        'alt="What it shows"',
    ]
    parts += ["<figcaption>What it shows</figcaption>"]
    assert sorted(parts, key=text.index) == parts


def test_the_legend_knows_every_name_once():
    names = [
        "rfid_inception_50k",
        "psnr_0.05",
        "knn20_last",
        "linear_probe_multi_category_best_on_val",
        "p99",
        "device",
    ]
    names += [
        "linear_probe_multi",
        "zero_shot_top5_centre",
        "is_inception_50k_cfg2_random_adm",
        "encode_flops_per_image",
    ]
    names += ["rfid_a-64_512_reconstructed", "class_accuracy_a-64_99_real", "class_accuracy_a-64_512_cfg2_balanced"]
    names += ["fid_a-64_99_real", "fdr2_512_vs99_cfg2_balanced", "guidance_scale", "kid_a-64_512_reconstructed"]
    assert all(legend_of(names).values())
    assert legend_of(["linear_probe_multi"]) != legend_of(["linear_probe_multi_best_on_val"])
    assert legend_of(["new_metric"]) == {"new_metric": None}
    for name in names:
        assert sum(re.fullmatch(each.pattern, name) is not None for each in LEGEND) == 1, name
    assert {each.better for each in LEGEND} == {"higher", "lower", "-"}
    assert all(each.what and each.unit and each.source for each in LEGEND)


def record_of(stage, **facts):
    return {"stage": stage, "config": {"seed": 0, "lr": 1e-4}, "inputs": {"shards": "ab"}, "code": "cd", "facts": facts}


def scratch_of(folder, record):
    identity = {name: record[name] for name in ("stage", "config", "inputs")}
    scratch = folder / record["stage"] / fingerprint_of(identity, record["code"])
    scratch.mkdir(parents=True)
    return scratch


def test_what_was_run_is_told_by_its_starts(tmp_path):
    known, unknown = record_of("pretrain", data="drawings (train): 64 pictures"), record_of("generate")
    began = datetime(2026, 1, 2, 3, 4, tzinfo=UTC).timestamp()
    starts = [(began, 3600.0, "aaaa", None), (began + 5000, 61.0, "bbbb-dirty", "8 x H200")]
    fields = ("began", "seconds", "commit", "device")
    written = {"starts": [dict(zip(fields, start, strict=True)) for start in starts]}
    write_json(scratch_of(tmp_path, known) / STARTS, written)
    section = _what_was_run([json.loads(json.dumps(known)), unknown], tmp_path)
    assert section.tables[0].rows == [
        ("pretrain", "aaaa, bbbb-dirty", "2026-01-02 03:04", "1:01:01", "2", "8 x H200"),
        ("generate", None, None, None, None, None),
    ]
    assert section.notes == [
        "Pre-trained on: drawings (train): 64 pictures.",
        "Time of the 2 stages below: 1:01:01. Of 1 stages it is not known here: their outputs were made elsewhere.",
    ]


def test_a_killed_start_lasted_to_its_last_sign_of_life(tmp_path):
    Starts(tmp_path).begin()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/curves.csv").write_text("step\n")
    began = read_starts(tmp_path)[0].began
    import os

    os.utime(tmp_path / "folder/curves.csv", (began + 100, began + 100))
    again = Starts(tmp_path)
    again.begin()
    time.sleep(0.01)
    again.end("2 CPU cores")
    killed, ended = read_starts(tmp_path)
    assert (killed.seconds, killed.device) == (pytest.approx(100, abs=0.01), None)
    assert 0 < ended.seconds < 50
    assert ended.device == "2 CPU cores"
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", ended.commit)


def test_records_are_provenances(tmp_path):
    write_json(tmp_path / "a.json", {"psnr": 3})
    with pytest.raises(ArtefactError, match=r"--records .*a.json: no provenance of a stage"):
        _records([tmp_path / "a.json"])
    write_json(tmp_path / "b.json", record_of("pretrain"))
    with pytest.raises(ArtefactError, match="no provenance of the stage reference; add work/provenance/reference.json"):
        _records([tmp_path / "b.json"])


GENERATION = {
    "unguided": {
        f"{name}_inception_{count}{real}_unguided_random": value
        for count in ("10k", "50k")
        for name, real, value in FIGURES
    },
    "weak": {"gfid_inception_50k_cfg1p2_random": 2.0, "is_inception_50k_cfg1p2_random": 250.0},
    "strong": {"gfid_inception_50k_cfg4_random": 9.0},
    "noise": {"gfid_inception_50k_noise_random": 0.1},
}
GENERATION["unguided"]["gfid_inception_10k_unguided_random"] = 1.0
UNDERSTANDING = {"zero_shot_top1_squash": 0.75, "knn20_last": 0.7}
UNDERSTANDING |= {"linear_probe_multi": 0.8, "linear_probe_multi_best_on_val": 0.82, "linear_probe_bottleneck": 0.7}
OFFICIAL = {
    "train_samples": 1281167,
    "prompts": {"name": "openai"},
    "probes": {"resize": 256, "size": 224, "blocks": [1, 4], "augment": {"scale_min": 0.08}},
}
IMAGENET = Conditions(True, 256, True, 50_000, OFFICIAL)
RUN = RunFigures(
    reconstruction={"psnr": 30.0, "rfid_inception_50k": 0.4},
    understanding=UNDERSTANDING,
    generator={"parameters": 675_000_000, "epochs": 80.0},
    generation=GENERATION,
    conditions=IMAGENET,
)


def cells(run):
    return dict(zip(HEAD, own_row(run), strict=True))


def test_a_run_has_a_row_in_the_papers_table():
    """Its best settings, of most samples; the baseline is none; what was not measured stays empty."""
    name, *row = own_row(RUN)
    assert name == "this run; unguided; guided: weak"
    assert row == [0.4, 75.0, 82.0, "675M", 80.0, 2.6, 197.0, 0.79, 0.62, 2.0, 250.0, None, None]
    assert all(len(line) == len(HEAD) for line in (own_row(RUN), *TABLE_2))
    assert headline_figures(RUN) == {
        "zero_shot_top1_squash": 0.75,
        "linear_probe_bottleneck": 0.7,
        "linear_probe_multi": 0.8,
        "psnr": 30.0,
        "rfid_inception_50k": 0.4,
        **{f"{name}_inception_50k{real}_unguided_random": value for name, real, value in FIGURES},
        "gfid_inception_50k_cfg1p2_random": 2.0,
        "is_inception_50k_cfg1p2_random": 250.0,
    }


def test_the_first_network_leads_and_the_papers_takes_its_column():
    """Settings are ranked by the first; the table has Inception's figures of the same setting, wherever it stands."""
    generation = {
        setting: {name.replace("inception", "a-64"): 10 - value for name, value in figures.items()} | figures
        for setting, figures in GENERATION.items()
        if setting != "weak"
    }
    generation["weak"] = GENERATION["weak"] | {"gfid_a-64_50k_cfg1p2_random": 30.0}
    generation["weak"] = dict(sorted(generation["weak"].items()))
    generation["best"] = {"gfid_a-64_50k_random": 1.0, "guidance_scale": 4.0, "timestep_shift": 0.3}
    run = RUN._replace(generation=generation)
    assert [sampled.setting for sampled in run.best] == ["unguided", "strong"]
    assert [sampled.features for sampled in run.best] == ["a-64", "a-64"]
    assert cells(run)["guided: gFID"] == 9.0
    assert {row[1] for row in own_names(run)} >= {"gfid_a-64_50k_cfg4_random", "gfid_a-64_50k_unguided_random"}
    assert headline_figures(run)["gfid_a-64_50k_cfg4_random"] == generation["strong"]["gfid_a-64_50k_cfg4_random"]


def test_floor_ceiling_and_class_accuracy_stand_in_the_headline():
    generation = GENERATION | {
        "weak": GENERATION["weak"]
        | {"class_accuracy_inception_50k_cfg1p2_random": 0.5, "kid_inception_50k_cfg1p2_random": 7.0},
        "reconstructed": {"rfid_inception_50k_reconstructed": 0.3, "class_accuracy_inception_50k_reconstructed": 0.9},
    }
    run = RUN._replace(generation=generation)
    added = headline_figures(run).items() - headline_figures(RUN).items()
    assert dict(added) == {
        "rfid_inception_50k_reconstructed": 0.3,
        "class_accuracy_inception_50k_cfg1p2_random": 0.5,
    }
    figures = {figure.label: figure for figure in _headline(run, {"tuned": {}})}
    assert figures["The decoder's floor of gFID"].value == 0.3
    assert figures["KID"].value == 7.0
    assert figures["Samples of their class"][1:] == (
        "class_accuracy_inception_50k_cfg1p2_random",
        0.5,
        "reconstructions: 0.9",
    )


def test_a_probe_chosen_on_held_out_images_stands_under_its_own_name():
    understanding = {name: value for name, value in UNDERSTANDING.items() if "best_on_val" not in name}
    run = RUN._replace(understanding=understanding)
    assert cells(run)["linear probe"] is None
    assert [row[:3] for row in own_names(run)] == [
        ("linear probe", "linear_probe_multi", 0.8),
        ("linear probe", "linear_probe_bottleneck", 0.7),
    ]
    assert "chosen on held-out training images" in own_names(run)[0][3]
    assert own_names(RUN) == own_names(run)  # they do where the table's kind is there too


IMAGES, GENERATED = (
    {"rFID"},
    {column for column in HEAD if column.split(": ")[-1] in ("gFID", "IS", "precision", "recall")},
)
ZERO_SHOT, PROBE = {"zero-shot"}, {"linear probe"}


@pytest.mark.parametrize(
    ("changes", "emptied", "says"),
    [
        ({"imagenet": False}, IMAGES | GENERATED, "not on ImageNet"),
        ({"image_size": 512}, IMAGES | GENERATED, "512 px"),
        ({"probed_imagenet": False}, ZERO_SHOT | PROBE, "not on ImageNet"),
        ({"validation_samples": 5000}, ZERO_SHOT | PROBE, "5,000 images, not 50,000"),
        ({"understanding": OFFICIAL | {"prompts": {"name": "data_set"}}}, ZERO_SHOT, "prompts"),
        ({"understanding": OFFICIAL | {"train_samples": 8000}}, PROBE, "8,000 training images"),
        ({"understanding": OFFICIAL | {"probes": OFFICIAL["probes"] | {"augment": None}}}, PROBE, "no random crops"),
        ({"understanding": OFFICIAL | {"probes": OFFICIAL["probes"] | {"size": 32}}}, PROBE, "32 px"),
        ({"understanding": OFFICIAL | {"probes": OFFICIAL["probes"] | {"blocks": [1]}}}, PROBE, "[1] blocks"),
    ],
)
def test_what_was_measured_otherwise_leaves_its_column(changes, emptied, says):
    run = RUN._replace(conditions=IMAGENET._replace(**changes))
    full, left = cells(RUN), cells(run)
    assert {column for column in HEAD if full[column] is not None and left[column] is None} == {
        column for column in emptied if full[column] is not None
    }
    told = own_names(run)
    assert {row[0] for row in told if says in row[3]} == {column for column in emptied if full[column] is not None}
    values = {row[1]: row[2] for row in told}
    assert all(run.understanding.get(name, value) == value for name, value in values.items())


@pytest.mark.parametrize(
    ("before", "after"), [("inception", "random-vgg16"), ("inception", "dinov2-vit-b-14"), ("50k", "10k")]
)
def test_distances_of_other_features_or_numbers(before, after):
    rename = {"rfid_inception_50k".replace(before, after): 0.4, "psnr": 30.0}
    generation = {
        setting: {name.replace(before, after): value for name, value in figures.items() if f"_{before}_" in name}
        for setting, figures in GENERATION.items()
    }
    run = RUN._replace(reconstruction=rename, generation=generation)
    assert all(cells(run)[column] is None for column in IMAGES | GENERATED)
    assert cells(run)["zero-shot"] == 75.0
    assert own_row(run)[0] == "this run"
    assert {row[1] for row in own_names(run)} >= set(rename) - {"psnr"}


def test_the_papers_recipe_is_measured_as_the_table_is():
    """Were it not, no run could ever fill its row."""
    from vtp.params import read_parameters

    folder = ROOT / "pipelines/imagenet"
    understanding = read_parameters(folder / "params.paper.yaml").values["evaluate_understanding"]
    conditions = IMAGENET._replace(understanding=understanding)
    assert own_row(RUN._replace(conditions=conditions)) == own_row(RUN)


def test_the_report_has_the_records_of_all_stages_before_it():
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    named = stages["report"]["cmd"].split("--records")[1].split("--")[0].split()
    assert named == [
        f"work/provenance/{name}.json" for name in stages if name not in ("check", "prepare_data", "report")
    ]
