"""The data file of published figures, and what is wrong with other ones."""

import pytest
from tiny import ROOT

from stages.figures.paper_table import TABLE_2
from stages.figures.published import CATEGORY, Published
from stages.summary import Summary
from vtp.artefact import ArtefactError
from vtp.params import read_parameters

FILE = ROOT / "pipelines/published.csv"
STUDIES = sorted(path for path in (ROOT / "pipelines").glob("*/params*.yaml"))
HEAD = "figure,series,x,x_unit,metric,value,error,source\n"


@pytest.fixture(scope="module")
def published():
    return Published.read(FILE)


def values(published, figure, metric, series):
    return [point.value for point in published.of(figure, metric) if point.series == series]


def test_every_point_is_there_once_and_each_panel_has_one_axis(published):
    keys = [point[:5] for point in published.points]
    assert len(set(keys)) == len(keys)
    for figure, metric in {(point.figure, point.metric) for point in published.points}:
        assert len({point.x_unit for point in published.of(figure, metric)}) == 1, (figure, metric)
    assert all(point.error > 0 for point in published.points)


def test_figures_that_the_paper_says_in_words(published):
    """Sections 4.3 to 4.5 and 6."""
    assert values(published, "Figure 1c", "gFID", "AE")[:: 8 - 1] == [55.04, 58.56]
    assert values(published, "Figure 4", "rFID", "AE") == [2.0, 0.5]
    assert values(published, "Figure 7a", "gFID", "AE")[::3] == [58.37, 56.71]
    assert values(published, "Figure 7a", "gFID", "VTP")[::3] == [47.59, 27.45]
    assert values(published, "Figure 7b, ends", "gFID", "VTP") == [31.28, 27.83, 26.12]
    assert values(published, "Figure 7c", "gFID", "VTP") == [26.12, 24.08]
    first, *_, last = values(published, "Figure 1c", "gFID", "VTP")
    assert 1 - 27.8 / first == pytest.approx(0.658, abs=5e-4)  # "a 65.8% FID improvement"
    assert last == 26.95


def test_curves_end_where_the_ends_say(published):
    for point in published.of("Figure 7b, ends", "gFID"):
        size = {51.9: "S", 50.7: "S", 130.0: "B", 84.9: "B", 392.9: "L", 200.7: "L"}[float(point.x)]
        curve = [each for each in published.of("Figure 7b", "gFID") if each.series == f"{point.series}-{size}"]
        assert curve[-1].value == point.value
        assert float(curve[-1].x) == pytest.approx(float(point.x) * 1.1e9, rel=1e-3)  # samples of the run


def test_table_2_is_that_of_the_report(published):
    ours = {(point.series.split()[0], float(point.x), point.value) for point in published.of("Table 2", "gFID")}
    assert ours == {(str(row[0]).rstrip("*"), row[5], row[6]) for row in TABLE_2}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(ROOT / "pipelines")))
def test_every_figure_that_a_study_names_is_there(path, published):
    parameters = read_parameters(path)
    if "summary" in parameters.values:
        parameters.parse("summary", Summary).require_published(published)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("figure,series\n", "its first line is .'figure', 'series'.; expected figure,series,x,x_unit,"),
        ("", "its first line is"),
        (HEAD + "F,s,1,epochs,gFID,2,0.1\n", "file.csv:2: expected figure, series, .* all of them"),
        (HEAD + "F,s,1,epochs,gFID,2,0.1, \n", "file.csv:2: expected .* all of them"),
        (HEAD + "F,s,1,epochs,gFID,2,0.1,x\nF,s,x,epochs,gFID,2,0.1,x\n", "file.csv:3: 'x' is no finite number"),
        (HEAD + "F,s,x,category,gFID,nan,0.1,x\n", "file.csv:2: 'nan' is no finite number"),
        ("\ufffd".encode("utf-16"), "no CSV file with published figures"),
    ],
)
def test_what_is_no_file_of_points(tmp_path, text, message):
    path = tmp_path / "file.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtefactError, match=message):
        Published.read(path)


def test_figures_that_are_not_there(published, tmp_path):
    with pytest.raises(ArtefactError, match=r"no figure 'Figure 1'; did you mean 'Figure 1c'\?"):
        published.require("Figure 1", ["gFID"])
    with pytest.raises(ArtefactError, match="Figure 4 has gFID, rFID, and the panel shows probe; name another"):
        published.require("Figure 4", ["probe"])
    published.require("Figure 4", ["rFID", "probe"])
    with pytest.raises(ArtefactError, match=r"none.csv: no CSV file .* No such file"):
        Published.read(tmp_path / "none.csv")
    assert {point.x for point in published.of("Table 1", "gFID") if point.x_unit == CATEGORY} == {
        "CNN",
        "ViT-B",
        "ViT-L",
    }
