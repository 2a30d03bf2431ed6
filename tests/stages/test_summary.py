"""Tables over runs, and published figures beside ours."""

import math

import pytest

from stages.runner.environment import LocalHost, Runtime
from stages.summary import Summary, run
from vtp.artefact import ArtefactError, digest, read_json, write_json
from vtp.config import ConfigError

METRICS = ["understanding.zero_shot_top1", "generation.gfid"]


def points(root, values):
    for place, (accuracy, distance) in values.items():
        folder = root / "points" / place
        folder.mkdir(parents=True, exist_ok=True)
        seen = {"chance": 0.1} if accuracy is None else {"zero_shot_top1": accuracy, "chance": 0.1}
        write_json(folder / "understanding.json", {"understanding": seen})
        write_json(folder / "generation.json", {"generation": {"gfid": distance}})
    return root / "points"


def summarised(root, folder, published, name="summary", metrics=METRICS):
    config = Summary.parse({"title": "T", "metrics": metrics, "published": published}, where="params.yaml:summary")
    host = LocalHost(root / "scratch" / "folder", root, Runtime())
    run(config, points=folder, summary=root / name, headline=root / f"{name}.json", host=host)
    return (root / name / "table.md").read_text().splitlines()


def test_runs_along_their_training(tmp_path):
    """In the order of their FLOPs, not of their names."""
    folder = points(tmp_path, {"joint/9.5e+11": (0.1, 4), "joint/1.2e+12": (0.3, 3.25), "ae/1.2e+12": (None, 5)})
    lines = summarised(tmp_path, folder, {})
    assert lines == [
        "| run | training FLOPs | understanding.zero_shot_top1 | generation.gfid |",
        "| --- | --- | --- | --- |",
        "| ae | 1.2e+12 | - | 5 |",
        "| joint | 9.5e+11 | 0.1 | 4 |",
        "| joint | 1.2e+12 | 0.3 | 3.25 |",
    ]


def test_runs_of_one_point_are_bars(tmp_path, monkeypatch):
    """Also where a run lacks the metric; several points are curves."""
    from matplotlib.axes import Axes

    bars, plain = [], Axes.bar
    monkeypatch.setattr(Axes, "bar", lambda axis, *a, **k: bars.append(a[:2]) or plain(axis, *a, **k))
    folder = points(tmp_path, {"joint/end": (0.3, 3.25), "ae/end": (None, 5)})
    summarised(tmp_path, folder, {})
    assert [bar for bar in bars if not math.isnan(bar[1])] == [(1, 0.3), (0, 5), (1, 3.25)]
    bars.clear()
    points(tmp_path, {"joint/9.5e+11": (0.1, 4)})
    summarised(tmp_path, folder, {}, name="curves")
    assert not bars


def test_the_end_of_a_run(tmp_path):
    """Its place is what the run took; what was measured of the whole run counts there; and it is the headline."""
    folder = points(tmp_path, {"joint/9.5e+11": (0.1, 4), "joint/end": (0.3, 3.25), "ae/end": (None, 5)})
    for name, flops in (("joint", 2.0e12), ("ae", 1.5e12)):
        write_json(folder / name / "pretrain.json", {"pretrain": {"flops": flops}, "generation": {"is": 7}})
    lines = summarised(tmp_path, folder, {}, metrics=[*METRICS, "generation.is"])
    assert lines[2:] == [
        "| ae | 1.5e+12 | - | 5 | 7 |",
        "| joint | 9.5e+11 | 0.1 | 4 | - |",
        "| joint | 2e+12 | 0.3 | 3.25 | 7 |",
    ]
    assert read_json(tmp_path / "summary.json") == {
        "ae": {"generation.gfid": 5, "generation.is": 7},
        "joint": {"understanding.zero_shot_top1": 0.3, "generation.gfid": 3.25, "generation.is": 7},
    }


def test_published_figures_stand_beside_ours(tmp_path):
    folder = points(tmp_path, {"S": (0.66, 5.5), "L": (None, 2.75)})
    published = {
        "S": {"understanding.zero_shot_top1": 0.667, "generation.gfid": 5.46},
        "L": {"understanding.zero_shot_top1": 0.782},
    }
    lines = summarised(tmp_path, folder, published)
    assert lines[2:5] == ["| L | - | - | 2.75 |", "| S | - | 0.66 | 5.5 |", ""]
    assert lines[5:] == [
        "| run | metric | measured | published | difference |",
        "| --- | --- | --- | --- | --- |",
        "| S | understanding.zero_shot_top1 | 0.66 | 0.667 | -0.007 |",
        "| S | generation.gfid | 5.5 | 5.46 | +0.04 |",
        "| L | understanding.zero_shot_top1 | - | 0.782 | - |",
    ]
    summarised(tmp_path, folder, published, name="again")
    assert digest(tmp_path / "summary") == digest(tmp_path / "again")
    assert (tmp_path / "summary/curves.png").read_bytes().startswith(b"\x89PNG")


def test_published_figures_are_those_of_the_last_point(tmp_path):
    folder = points(tmp_path, {"joint/9.5e+11": (0.1, 4), "joint/1.2e+12": (0.3, 3.25)})
    *_, line = summarised(tmp_path, folder, {"joint": {"generation.gfid": 3}})
    assert line == "| joint | generation.gfid | 3.25 | 3 | +0.25 |"


def test_a_distance_that_no_generator_reached_has_no_epochs(tmp_path):
    folder = points(tmp_path, {"ae/end": (0.3, 5)})
    lines = summarised(tmp_path, folder, {}, metrics=["generation.gfid", "train_generator.epochs_to_reach.2.evaluated"])
    assert lines[2] == "| ae | - | 5 | - |"


def test_names_that_nothing_has(tmp_path):
    folder = points(tmp_path, {"S": (0.5, 5)})
    with pytest.raises(ConfigError, match="published.S has 'generation.fid', which is not among metrics"):
        summarised(tmp_path, folder, {"S": {"generation.fid": 1}})
    with pytest.raises(ConfigError, match="finite number"):
        summarised(tmp_path, folder, {"S": {"generation.gfid": math.inf}})
    with pytest.raises(ArtefactError, match="published names 'M'; .* holds the runs S"):
        summarised(tmp_path, folder, {"M": {"generation.gfid": 1}})
    (folder / "S/generation.json").unlink()
    with pytest.raises(ArtefactError, match="no run has the metric 'generation.gfid'; they have understanding.ch"):
        summarised(tmp_path, folder, {})
