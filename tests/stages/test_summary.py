"""Studies of synthetic points: tables with intervals, the figure, and what is claimed and what is not."""

import math
import random

import pytest
from PIL import Image
from tiny import ROOT

from stages.figures.claims import conclusion, judge
from stages.figures.points import read_points
from stages.runner.environment import LocalHost, Runtime
from stages.summary import Summary, run
from vtp.artefact import ArtefactError, digest, read_json, write_json
from vtp.config import ConfigError

PUBLISHED = ROOT / "pipelines/published.csv"
METRICS = {"probe": "understanding.linear_probe_last", "gFID": "generation.best.gfid_x_512_balanced"}
CURVES = {"name": "curves", "x": "flops", "y": ["gFID"], "published": None}
BETTER = {"name": "better", "metric": "gFID", "run": "vtp", "than": "ae"}
IMPROVES = {"name": "improves", "metric": "gFID", "runs": ["vtp"], "against": "flops"}
SMALL = {"title": "T", "metrics": METRICS, "figure": [CURVES], "claims": [], "noise": {}}


def parsed(changes):
    """A list of panels or claims becomes a mapping: they are called by their numbers."""
    values = SMALL | changes
    named = {key: {str(place): each for place, each in enumerate(values[key])} for key in ("figure", "claims")}
    return Summary.parse(values | named, where="params.yaml:summary")


def write_point(folder, place, probe, gfid):
    """One tokenizer; None: without the metric."""
    path = folder / "points" / place
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "understanding.json", {"understanding": {"chance": 0.1} | named("linear_probe_last", probe)})
    write_json(path / "generation.json", {"generation": {"best": named("gfid_x_512_balanced", gfid)}})


def named(name, value):
    return {} if value is None else {name: value}


def write_run(folder, place, flops=4e12, samples=4000, **figures):
    """What was measured of a whole run with one seed."""
    path = folder / "points" / place
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "pretrain.json", {"pretrain": {"flops": flops, "samples": samples}} | figures)


def study(folder, *, seeds=3, noise=0.3, better=20.0, slope=-10.0, seed=0):
    """`vtp` falls along three points and ends `better` below `ae`, which stays where it is."""
    draw = random.Random(seed)
    for each in range(seeds):
        for place, (point, tenfolds) in enumerate((("0.25", 0), ("2.000e+12", 0.301), ("end", 0.602))):
            fall = slope * (tenfolds - 0.602)
            write_point(folder, f"vtp/{each}/{point}", 0.6 + 0.1 * place, 100 - better + fall + draw.gauss(0, noise))
            write_point(folder, f"ae/{each}/{point}", 0.5, 100 + draw.gauss(0, noise))
        write_run(folder, f"vtp/{each}")
        write_run(folder, f"ae/{each}")


def summarise(folder, name="summary", **changes):
    """Table and claims as lines, and the headline."""
    config = parsed(changes)
    host = LocalHost(folder / "scratch" / name, folder, Runtime())
    paths = {"summary": folder / name, "headline": folder / f"{name}.json"}
    run(config, points=folder / "points", published=PUBLISHED, **paths, host=host)
    lines = [(folder / name / file).read_text().splitlines() for file in ("table.md", "claims.md")]
    return *lines, read_json(folder / f"{name}.json")


def claimed(folder, claims):
    """The conclusion, the sentence of every claim, and the verdicts."""
    config = parsed({"claims": claims})
    verdicts = judge(list(config.claims.values()), read_points(folder / "points", METRICS, first=[]))
    return conclusion(verdicts), [verdict.sentence for verdict in verdicts], verdicts


def test_a_trend_that_is_there(tmp_path):
    """Every claim of it holds, with its figures; what it contradicts is said too."""
    study(tmp_path)
    claims = [
        BETTER,
        IMPROVES,
        {"name": "ordered", "metric": "gFID", "runs": ["ae", "vtp"]},
        {"name": "correlates", "metric": "probe", "beside": "gFID"},
        {**BETTER, "run": "ae", "than": "vtp"},
        {"name": "flat_or_worse", "metric": "gFID", "runs": ["vtp"], "against": "samples", "margin": 1.0},
        {"name": "flat_or_worse", "metric": "gFID", "runs": ["ae"], "against": "flops", "margin": 8.0},
    ]
    trend, said, verdicts = claimed(tmp_path, claims)
    assert trend == "The trend does not show: of 7 claims 5 hold, 2 do not, 0 are open."
    starts = [
        "vtp has a lower gFID than ae at the last point: -",
        "vtp's gFID falls with training FLOPs: -",
        "gFID gets lower from ae over vtp, each step at the last point: -",
        "higher probe goes with lower gFID: -0.9",
        "Contradicted: ae has a lower gFID than vtp at the last point: +",
        "Contradicted: vtp's gFID does not fall by 1 or more with samples of pre-training: -",
        "ae's gFID does not fall by 8 or more with training FLOPs: ",
    ]
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(start)
        assert line.endswith(", 3 seeds.")
    assert " by Pearson's r over 6 points, taken as independent, " in said[3]
    found = verdicts[0].figures
    assert found["holds"] == 1
    assert found["low"] < -20 < found["high"] < 0
    turned = {"difference": -found["difference"], "low": -found["high"], "high": -found["low"]}
    assert verdicts[4].figures == {"holds": 0, **turned}
    assert claimed(tmp_path, claims[:4])[0] == "The trend holds: all 4 claims of 4."


def test_a_trend_that_is_not_there(tmp_path):
    """Noise as large as what is claimed."""
    study(tmp_path, noise=8, better=1, slope=-0.5)
    trend, said, verdicts = claimed(tmp_path, [BETTER, IMPROVES])
    assert trend == "The trend does not show: of 2 claims 0 hold, 2 do not, 0 are open."
    assert said[0].startswith("Not shown: vtp has a lower gFID than ae at the last point: ")
    assert said[1].startswith("Not shown: vtp's gFID falls with training FLOPs: ")
    assert [each.holds for each in verdicts] == [False, False]
    assert all(each.estimate.low < 0 < each.estimate.high for each in verdicts)


def test_differences_are_paired(tmp_path):
    """Seeds that shift both runs alike hide no difference."""
    for seed, shift in enumerate((0, 300, 90)):
        write_point(tmp_path, f"vtp/{seed}/end", 0.5, 100 + shift + seed)
        write_point(tmp_path, f"ae/{seed}/end", 0.5, 105 + shift)
    _, said, _ = claimed(tmp_path, [BETTER])
    assert said[0] == "vtp has a lower gFID than ae at the last point: -4.00 (-6.48 to -1.52), 3 seeds."  # t 4.303


def test_few_seeds_claim_nothing(tmp_path):
    study(tmp_path, seeds=1)
    table, said, headline = summarise(tmp_path, claims=[BETTER, IMPROVES])
    assert said[0] == "Nothing is claimed: a claim needs 3 seeds that were measured in full."
    assert said[2].startswith("- One seed, no claim: vtp has a lower gFID than ae at the last point: -")
    assert all("holds" not in each for each in headline["claims"].values())
    assert "One seed: no interval, no claim." in table
    assert "±" not in "".join(table)
    assert list(headline["runs"]["vtp"]["gFID"]) == ["mean"]
    study(tmp_path, seeds=2)
    trend, said, verdicts = claimed(tmp_path, [BETTER, IMPROVES])
    assert trend.startswith("Nothing is claimed")
    assert all(line.startswith("Two seeds, no claim: vtp") and " to " in line for line in said)
    assert all("holds" not in each.figures for each in verdicts)


def test_a_seed_that_failed_at_a_point(tmp_path):
    """It is left out where it lacks what a claim takes, and said to be."""
    study(tmp_path, seeds=4)
    for name in ("end/generation.json", "end/understanding.json"):
        (tmp_path / "points/vtp/2" / name).unlink()
    (tmp_path / "points/vtp/2/end").rmdir()
    table, said, headline = summarise(tmp_path, claims=[BETTER, IMPROVES])
    assert all(line.endswith(", 3 seeds; without seed 2, not measured in full.") for line in said[2:])
    row = next(line for line in table if line.startswith("| vtp | 4e+12"))
    assert row.count("(3 of 4)") == 2
    assert [each["holds"] for each in headline["claims"].values()] == [1, 1]


def test_what_a_run_lacks_is_not_measured(tmp_path):
    study(tmp_path)
    for seed in range(3):
        write_point(tmp_path, f"ae/{seed}/end", None, None)
    _, said, _ = claimed(tmp_path, [BETTER, {**IMPROVES, "runs": ["ae"], "against": "probe"}])
    assert said[0] == (
        "Not measured: vtp has a lower gFID than ae at the last point; without seeds 0, 1, 2, not measured in full."
    )
    assert said[1].startswith("Not measured: ae's gFID falls with probe; without seeds 0, 1, 2")


def test_scales_of_runs(tmp_path):
    """A slope over the last points of several runs, per tenfold of what they differ in; ordered, step by step."""
    metrics = METRICS | {"encoder FLOPs": "speed.encode_flops_per_image"}
    for seed in range(3):
        for size, (name, gfid) in enumerate((("S", 60), ("B", 50), ("L", 49.9))):
            write_point(tmp_path, f"{name}/{seed}/end", 0.5, gfid + seed % 2 * size)
            write_run(tmp_path, f"{name}/{seed}", speed={"encode_flops_per_image": 1e8 * 10**size})
    runs = ["S", "B", "L"]
    claims = [
        {**IMPROVES, "runs": runs, "against": "encoder FLOPs"},
        {"name": "ordered", "metric": "gFID", "runs": runs},
    ]
    panel = {"name": "last_points", "x": "encoder FLOPs", "y": ["gFID"], "series": {"VTP": runs}}
    table, said, headline = summarise(
        tmp_path, metrics=metrics, claims=claims, figure=[panel | {"published": "Figure 7b, ends"}]
    )
    slopes = [-5.05, -4.05, -5.05]
    assert headline["claims"]["gFID: S, B, L improves with encoder FLOPs"]["difference"] == pytest.approx(
        sum(slopes) / 3
    )
    assert said[2].startswith("- gFID falls with encoder FLOPs over S, B, L: -4.7")
    assert " per tenfold, 3 seeds." in said[2]
    assert said[3].startswith("- Not shown: gFID gets lower from S over B over L, each step at the last point: ")
    assert " from B to L, 3 seeds." in said[3]
    assert [line.split(" | ")[0] for line in table[2:5]] == ["| S", "| B", "| L"]  # as the study names them
    assert "| Figure 7b, ends | VTP | 51.9 GFLOPs of a forward pass | gFID | 31.28 ± 0.005 | - | - |" in "\n".join(
        table
    )


def test_runs_along_their_training(tmp_path):
    """In the order of their FLOPs, not of their names; what was measured of the whole run counts at its end."""
    for place, figures in {"9.5e+11": (0.1, 4.0), "1.2e+12": (0.3, 3.25), "end": (None, 3.0)}.items():
        write_point(tmp_path, f"joint/0/{place}", *figures)
    write_run(tmp_path, "joint/0", flops=2e12, samples=2000, understanding={"linear_probe_last": 0.75})
    write_run(tmp_path, "plain/0", generation={"best": {"gfid_x_512_balanced": 5.0}})
    table, said, headline = summarise(tmp_path)
    assert table[:8] == [
        "| run | training FLOPs | seeds | probe | gFID |",
        "| --- | --- | --- | --- | --- |",
        "| joint | 9.5e+11 | 1 | 0.1 | 4 |",
        "| joint | 1.2e+12 | 1 | 0.3 | 3.25 |",
        "| joint | 2e+12 | 1 | 0.75 | 3 |",
        "| plain | 4e+12 | 1 | - | 5 |",
        "",
        "One seed: no interval, no claim.",
    ]
    assert "| gFID | generation.best.gfid_x_512_balanced | lower | squared distance of features |" in table
    assert headline["runs"] == {
        "joint": {"probe": {"mean": 0.75}, "gFID": {"mean": 3.0}},
        "plain": {"gFID": {"mean": 5.0}},
    }
    assert said == ["This study claims nothing."]


def test_shares_and_flops_are_in_the_order_of_training(tmp_path):
    for point, gfid in (("0.9", 2.0), ("1.000e+12", 3.0), ("end", 1.0)):
        write_point(tmp_path, f"vtp/0/{point}", 0.5, gfid)
    write_run(tmp_path, "vtp/0")
    table, *_ = summarise(tmp_path)
    assert [line.split(" | ")[1] for line in table[2:5]] == ["1e+12", "3.6e+12", "4e+12"]


def test_what_is_noise(tmp_path):
    """Runs that differ in the seed of one stage."""
    for name, gfid in (("base", 10.0), ("pretrain_1", 14.0), ("pretrain_2", 12.0), ("generate_1", 10.5)):
        write_point(tmp_path, f"{name}/0/end", 0.5, gfid)
    noise = {"pretrain": ["base", "pretrain_1", "pretrain_2"], "generate": ["base", "generate_1"]}
    table, _, headline = summarise(
        tmp_path, noise=noise, figure=[{"name": "bars", "y": ["gFID"], "published": "Table 3"}]
    )
    assert (
        "| pretrain | 0 \\[0, 0\\], 3 runs | 2 \\[1.04, 12.6\\], 3 runs |" in table
    )  # sqrt(2 / 7.378), sqrt(2 / 0.0506)
    assert headline["noise"]["generate"]["gFID"]["std"] == pytest.approx(0.5 / math.sqrt(2))
    assert any(line.startswith("Standard deviation over runs") for line in table)


def test_published_bars_beside_ours(tmp_path):
    """Of categories that are called as runs are; the same files for the same points."""
    for name, gfid in (("Small", 5.5), ("Large", 2.75)):
        write_point(tmp_path, f"{name}/0/end", 0.66 if name == "Small" else None, gfid)
    changes = {
        "metrics": {"linear probe": METRICS["probe"], "gFID": METRICS["gFID"]},
        "figure": [{"name": "bars", "y": ["linear probe", "gFID"], "published": "README"}],
    }
    table, *_ = summarise(tmp_path, **changes)
    rows = [line.split(" | ")[2:7] for line in table if line.startswith("| README")]
    assert rows == [
        ["Small", "linear probe", "0.775 ± 0.0005", "0.66", "-0.115"],
        ["Base", "linear probe", "0.81 ± 0.0005", "-", "-"],
        ["Large", "linear probe", "0.857 ± 0.0005", "-", "-"],
        ["Small", "gFID", "5.46 ± 0.005", "5.5", "+0.04"],
        ["Base", "gFID", "3.88 ± 0.005", "-", "-"],
        ["Large", "gFID", "2.81 ± 0.005", "2.75", "-0.06"],
    ]
    summarise(tmp_path, "again", **changes)
    assert digest(tmp_path / "summary") == digest(tmp_path / "again")


def test_panels_of_the_paper(tmp_path, monkeypatch):
    """Ours above, the published below on axes of their own; logarithmic where ratios count; intervals and seeds drawn."""
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

    drawn, plain = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure) or plain(figure, *a, **k))
    study(tmp_path)
    figure = [
        {"name": "curves", "x": "flops", "y": ["gFID", "probe"], "published": "Figure 1c"},
        {"name": "curves", "x": "probe", "y": ["gFID"], "published": "Figure 6"},
        {"name": "bars", "y": ["gFID"], "published": "Table 1"},
    ]
    summarise(tmp_path, figure=figure)
    titles = [axis.get_title() for axis in drawn[0].axes]
    ours = ["gFID (lower is better)", "probe (higher is better)"]
    assert titles[:4] == [*ours, "published: Figure 1c, gFID", ""]
    assert titles[4:] == [ours[0], ours[0], "published: Figure 6, gFID", "published: Table 1, gFID"]
    scales = [axis.get_xscale() for axis in drawn[0].axes]
    assert scales == ["log", "log", "log", "linear", "linear", "linear", "linear", "linear"]
    first = drawn[0].axes[0]
    assert first.get_xlabel() == "training FLOPs"
    assert [list(each[0].get_xdata()) for each in first.containers] == [[1e12, 2e12, 4e12]] * 2
    assert [each.has_yerr for each in first.containers] == [True, True]
    dots = [each for each in first.collections if isinstance(each, PathCollection)]
    assert [len(each.get_offsets()) for each in dots] == [9, 9]  # of seeds
    below = {line.get_label(): len(line[0].get_xdata()) for line in drawn[0].axes[2].containers}
    assert below == {"VTP": 8, "AE": 8}
    with Image.open(tmp_path / "summary/curves.png") as picture:
        assert picture.width > 800


def test_a_distance_that_no_generator_reached_has_no_epochs(tmp_path):
    write_point(tmp_path, "ae/0/end", 0.3, 5.0)
    table, *_ = summarise(tmp_path, metrics=METRICS | {"epochs to 2": "train_generator.epochs_to_reach.2.evaluated"})
    assert table[2] == "| ae | - | 1 | 0.3 | 5 | - |"


def test_names_that_nothing_has(tmp_path):
    study(tmp_path)
    with pytest.raises(ArtefactError, match=r"summary.claims.0 names 'vpt'; .* holds ae, vtp; did you mean 'vtp'"):
        summarise(tmp_path, claims=[{**IMPROVES, "runs": ["vpt"]}])
    with pytest.raises(ArtefactError, match="no figure 'Figure 11'"):
        summarise(tmp_path, figure=[CURVES | {"published": "Figure 11"}])
    wrong = {"metrics": METRICS | {"gFID": "generation.best.fid"}}
    with pytest.raises(
        ArtefactError, match="no run has 'generation.best.fid', the metric of 'gFID'; they have generation"
    ):
        summarise(tmp_path, **wrong, claims=[])
    with pytest.raises(ConfigError, match=r"figure.0: no 'gFIDs' among metrics; did you mean 'gFID'\?"):
        summarise(tmp_path, figure=[CURVES | {"y": ["gFIDs"]}])
    with pytest.raises(ConfigError, match="claims.0: no 'epochs' among metrics"):
        summarise(tmp_path, claims=[{**IMPROVES, "against": "epochs"}])
    with pytest.raises(ConfigError, match="claims.0: 'chance' has no better direction in the legend"):
        chance = METRICS | {"chance": "understanding.chance"}
        summarise(tmp_path, metrics=chance, claims=[{**IMPROVES, "metric": "chance"}])
    with pytest.raises(ConfigError, match="metrics.flops: is a quantity of the training"):
        summarise(tmp_path, metrics=METRICS | {"flops": "pretrain.flops"})
    with pytest.raises(ConfigError, match="no such name 'beter'; known are better, improves"):
        summarise(tmp_path, claims=[{**BETTER, "name": "beter"}])


def test_folders_of_another_layout(tmp_path):
    (tmp_path / "points").mkdir()
    with pytest.raises(ArtefactError, match=r"no run; expected RUN/SEED/\*.json in it"):
        summarise(tmp_path)
    write_point(tmp_path, "ae/end", 0.5, 1.0)
    with pytest.raises(ArtefactError, match="points/ae: expected a folder for every seed, such as 0; found end"):
        summarise(tmp_path)
    write_point(tmp_path, "vtp/0/late", 0.5, 1.0)
    (tmp_path / "points/ae").rename(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="vtp/0: 'late' is no point; expected training FLOPs as 5.800e.12, a share"):
        summarise(tmp_path)
