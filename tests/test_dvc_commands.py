"""What users ask DVC, asked for real: at the root and in a study, on a fresh clone and after a run.

One clone serves all tests of this file, in order.
"""

import csv
import io
import json

import pytest
from clone import Clone, Study, ran

from vtp.artefact import digest, read_json

pytestmark = pytest.mark.slow
METRICS = {
    "PSNR": "reconstruction.validation_centre16.tuned.psnr",
    "gFID": "generation.unguided.gfid_efficientnet-lite0-64_24_unguided_balanced",
}
SUMMARY = {
    "title": "Two objectives",
    "metrics": {"base": None, **METRICS},
    "figure": {"base": None, "all": {"name": "curves", "x": "flops", "y": list(METRICS), "published": None}},
    "claims": {"base": None, "level": {"name": "better", "metric": "gFID", "run": "joint", "than": "ae"}},
}
COMPARED = {"pretrain": {"monitor": {"milestones": [0.5, "end"]}}}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    clone = Clone(tmp_path_factory.mktemp("commands") / "clone")
    clone.commit("start")
    return clone


@pytest.fixture(scope="module")
def finished(clone):
    clone.repro()
    clone.commit("reference run")
    return clone


@pytest.fixture(scope="module")
def study(finished):
    """`objectives` with two of its runs, at a seed and two points, finished."""
    study = Study(finished, "objectives", **COMPARED)
    runs = {name: study.values["runs"][name] for name in ("ae", "joint")}
    study.values |= {"runs": runs, "seeds": [1], "points": ["0.5", "end"], "summary": SUMMARY}
    study.write({})
    study.first = study.dvc("repro")
    finished.commit("study")
    return study


def table(clone, *arguments, cwd=None):
    """Rows of `dvc exp show` by the name of the experiment."""
    output = clone.asked("exp", "show", "--csv", *arguments, cwd=cwd)
    rows = csv.DictReader(io.StringIO(output[output.index("Experiment,") :]))
    return {row["Experiment"] or row["rev"]: row for row in rows}


def changed(row):
    return {name.removeprefix("params.yaml:"): value for name, value in row.items() if name.startswith("params.yaml:")}


def test_a_fresh_root_speaks_of_itself_alone(clone):
    status = clone.asked("status")
    assert "pipelines" not in status
    assert len(status.splitlines()) < 150
    assert len(clone.asked("dag").splitlines()) < 50
    for command in (("metrics", "show"), ("params", "diff"), ("exp", "show", "--only-changed")):
        assert len(clone.asked(*command).splitlines()) < 10
    output, _ = clone.dvc("checkout")  # fails, as there is nothing yet
    assert "pipelines" not in output
    assert not (clone.folder / "pipelines/adversarial/dvc.lock").exists()


def test_a_fresh_study_speaks_of_itself_alone(clone):
    folder = clone.folder / "pipelines/adversarial"
    status = clone.asked("status", cwd=folder)
    stages = [line for line in status.splitlines() if line.endswith(":") and not line.startswith("\t")]
    assert len(stages) == 4 + 6 + 7 * 6
    assert "evaluate_generator@joint-2-end:" in stages
    assert not (clone.folder / "dvc.lock").exists()


def test_a_finished_root_is_quiet(finished):
    assert finished.asked("status").splitlines() == ["Data and pipelines are up to date."]
    assert finished.asked("checkout") == ""
    shown = finished.asked("metrics", "show")
    assert max(map(len, shown.splitlines())) < 600
    figures = json.loads((finished.folder / "metrics.json").read_text())
    assert {
        "zero_shot_top1_squash",
        "psnr",
        "gfid_efficientnet-lite0-64_24_unguided_balanced",
        "pretrain_flops",
    } < figures.keys()


def test_an_experiment_shows_what_changed(finished):
    before = digest(finished.folder / "work/decoder")
    output = finished.asked("exp", "run", "-n", "other", "-S", "tune_decoder.seed=1")
    assert "WARNING" not in output
    assert ran(output)[:2] == ["check", "tune_decoder"]
    assert digest(finished.folder / "work/decoder") != before
    diff = finished.asked("params", "diff", "--targets", "params.yaml", "--", "HEAD", "other")
    assert [line.split() for line in diff.splitlines()[1:]] == [["params.yaml", "tune_decoder.seed", "0", "1"]]
    rows = table(finished, "--only-changed")
    assert changed(rows["other"]) == {"tune_decoder.seed": "1"}
    assert "psnr" in rows["other"]
    assert len(rows["other"]) < 60
    finished.asked("exp", "apply", "other")
    assert "psnr" in finished.asked("metrics", "diff", "--", "HEAD", "workspace")
    finished.git("checkout", "-q", "--", ".")
    finished.asked("checkout")
    assert digest(finished.folder / "work/decoder") == before


@pytest.mark.parametrize("how", ["--temp", "--queue"])
def test_experiments_in_a_copy(finished, how):
    """The working tree stays as it is; stages that nothing changed for are not run again."""
    name = {"--temp": "apart", "--queue": "later"}[how]
    before = digest(finished.folder / "params.yaml")
    output = finished.asked("exp", "run", how, "-n", name, "-S", "generate.settings.guided.guidance_scale=3.0")
    if how == "--temp":
        assert ran(output)[:2] == ["check", "generate"]
    else:
        finished.run_queue(name)
    row = table(finished, "--only-changed")[name]
    assert changed(row)["generate.settings.guided.guidance_scale"] == "3.0"
    assert row["gfid_efficientnet-lite0-64_24_cfg3_balanced"]
    assert digest(finished.folder / "params.yaml") == before


def test_a_typo_in_an_experiment_is_named(finished):
    output, status = finished.dvc("exp", "run", "-S", "+pretrain.sed=1")
    assert status != 0
    assert "params.yaml:pretrain.sed: unknown key; did you mean 'seed'?" in output
    finished.git("checkout", "-q", "--", ".")
    finished.asked("checkout")
    assert finished.asked("status").splitlines() == ["Data and pipelines are up to date."]


def test_a_study_compares_its_runs(study):
    """Every stage of every run and point; a table and figures of all."""
    done = ran(study.first)
    assert len(done) == 4 + 2 + 7 * 4
    assert done[0] == "check"
    assert done[-1] == "summary"
    lines = (study.folder / "work/summary/table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["joint", "joint", "ae", "ae"]
    figures = study.json("metrics.json")
    assert set(figures["runs"]) == {"ae", "joint"}
    assert list(figures["runs"]["joint"]) == list(METRICS)
    assert list(figures["claims"]) == ["gFID: joint better than ae"]
    assert (study.folder / "work/joint/1/0.5/generator/sampler.json").exists()
    halves = [study.json(f"work/joint/1/milestones/{point}/milestone.json")["flops"] for point in ("0.5", "end")]
    assert halves[0] == halves[1] / 2
    for stage in ("pretrain", "tune_decoder", "train_generator", "generate"):
        (path,) = (study.folder / "work/joint/1").glob(f"**/{'end/' * (stage != 'pretrain')}provenance/{stage}.json")
        assert read_json(path)["config"]["seed"] == 1


def test_a_finished_study_is_quiet(study):
    assert study.clone.asked("status", cwd=study.folder).splitlines() == ["Data and pipelines are up to date."]
    assert study.clone.asked("checkout", cwd=study.folder) == ""
    assert "Data and pipelines are up to date" in study.dvc("repro")
    assert study.clone.asked("status").splitlines() == ["Data and pipelines are up to date."]  # the root's


def test_a_change_of_one_run_runs_that_alone(study):
    study.write({"runs": {"joint": {"generate": {"seed": 1}}}})
    done = ran(study.dvc("repro"))
    assert done[0] == "check"
    assert {"generate@joint-1-end", "generate@joint-1-0.5"} < set(done)
    assert {name.partition("@")[0] for name in done} <= {"check", "generate", "evaluate_generator", "summary"}
    assert not [name for name in done if "@ae" in name]
    study.clone.git("checkout", "-q", "--", ".")
    assert ran(study.dvc("repro")) == []  # all of it is in the cache of runs


def test_a_change_of_the_base_runs_what_reads_it(study):
    study.clone.write({"generate": {"shard_size": 21}})
    # The study says itself how large its files are, so the root's number does not matter.
    assert ran(study.dvc("repro")) == ["check"]
    study.clone.write({"evaluate_generator": {"inception_split_size": 3}})
    done = ran(study.dvc("repro"))
    assert {name.partition("@")[0] for name in done} <= {"check", "evaluate_generator", "summary"}
    assert len(done) >= 1 + 4
    study.clone.git("checkout", "-q", "--", ".")
    study.dvc("checkout")


@pytest.mark.parametrize("how", ["", "--temp", "--queue"])
def test_experiments_of_a_study(study, how):
    """A key that the overlay lacks is added: `-S +section.key`."""
    clone, folder = study.clone, study.folder
    name = {"": "here", "--temp": "apart", "--queue": "later"}[how]
    lacked = "+evaluate_generator.neighbours=4"
    clone.asked("exp", "run", *filter(None, [how]), "-n", name, "-S", "summary.title=Mine", "-S", lacked, cwd=folder)
    if how == "--queue":
        clone.run_queue(name, folder)
    diff = clone.asked("params", "diff", "--targets", "params.yaml", "--", "HEAD", name, cwd=folder)
    assert "Mine" in diff
    of_row = changed(table(clone, "--only-changed", cwd=folder)[name])
    assert of_row == {"summary.title": "Mine", "evaluate_generator.neighbours": "4"}
    clone.git("checkout", "-q", "--", ".")
    study.dvc("checkout")


def test_a_run_of_two_studies_is_trained_once(study):
    """A new study is a file of a few lines: its run `joint` is the other's, and comes from the cache of runs."""
    folder = study.clone.folder / "pipelines/again"
    folder.mkdir()
    (folder / "params.yaml").write_text(
        "base: ../overlays/comparison.yaml\nruns: {joint: {}}\nseeds: [1]\npoints: [end]\n"
    )
    study.clone.make_study("again")
    again = Study(study.clone, "again", **COMPARED)
    again.values["summary"] = SUMMARY | {"claims": {"base": None}}
    again.write({})
    output = again.dvc("repro")
    assert ran(output) == ["check", "summary"]
    assert output.count("is cached - skipping run") == 2 + 1 + 7
    assert digest(again.folder / "work/joint/1/end/generator") == digest(study.folder / "work/joint/1/end/generator")
