"""The pipeline under real DVC in a temporary clone, at tiny size, with real kills.

One clone serves all tests of this file, in order: run, no-op, edits, typos, kills.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from clone import WEIGHTS, Clone, Study, kill, ran
from ruamel.yaml import YAML
from tiny import SMALL, wait_for, write_params

from vtp.artefact import digest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return Clone(tmp_path_factory.mktemp("dvc") / "clone")


@pytest.fixture(scope="module")
def finished(clone):
    """The clone after one uninterrupted run, and the digests of its weights."""
    clone.repro()
    return {stage: clone.weights(stage) for stage in WEIGHTS}


def test_whole_pipeline_and_plots(clone, finished):
    assert (clone.folder / "work/report/report.html").exists()
    metrics = json.loads((clone.folder / "work/metrics/generation.json").read_text())
    assert "noise" in metrics["generation"]
    shown, status = clone.dvc("plots", "show")
    assert status == 0, shown
    page = (clone.folder / "dvc_plots/index.html").read_text()
    assert all(name in page for name in ("worst.png", "guided.png", "pretrain losses", "noise on latents"))
    provenance = json.loads((clone.folder / "work/provenance/pretrain.json").read_text())
    assert provenance["facts"]["samples"] == 96
    assert provenance["config"]["seed"] == 0
    assert set(provenance["inputs"]) == {"shards"}
    lock = YAML(typ="safe", pure=True).load(clone.folder / "dvc.lock")
    recorded = {out["path"]: out["md5"] for out in lock["stages"]["pretrain"]["outs"]}
    # Our digests are DVC's, so that scratch knows when a run is recorded.
    assert json.loads((scratch(clone, "pretrain") / "finished.json").read_text())["outputs"] == recorded


def test_second_run_does_nothing(clone, finished):
    output = clone.repro()
    assert "Data and pipelines are up to date" in output
    assert ran(output) == []


def test_a_comment_runs_nothing_but_check(clone, finished):
    path = clone.folder / "vtp/losses/dino.py"
    text = path.read_text()
    path.write_text(text.replace('"""', '"""Another docstring. ', 1) + "\n# a comment\n")
    try:
        assert ran(clone.repro()) == ["check"]
    finally:
        path.write_text(text)
    assert ran(clone.repro()) in ([], ["check"])


def test_sampling_parameters_rerun_sampling(clone, finished):
    clone.write({"generate": {"settings": {"guided": {"guidance_scale": 3.0}}}})
    again = ran(clone.repro())
    # Where equal bytes come out, as a generator this small may give, DVC stops early.
    assert again[:2] == ["check", "generate"]
    assert set(again[2:]) <= {"evaluate_generator", "report"}
    clone.write({})
    clone.repro()


def test_decoder_parameters_leave_latents_and_generator(clone, finished):
    clone.write({"tune_decoder": {"adversary": {"weight": 0.25}}})
    again = ran(clone.repro())
    assert again[:2] == ["check", "tune_decoder"]
    assert set(again[2:]) == {"evaluate_reconstruction", "evaluate_generator", "report"}
    clone.write({})
    clone.repro()


def test_guidance_is_swept_without_training(clone, finished):
    """The study of pipelines/guidance draws from the generator that the root made: DVC finds it in the cache of runs."""
    sweep = {"setting": "guided", "scales": [1.0, 2.0, 3.0], "intervals": [[0.0, 1.0]], "shifts": [0.5]}
    small = {"samples": 24, "batch_size": 12, "sweep": sweep, "settings": {"guided": {"steps": 2}}}
    study = Study(clone, "guidance", without=SMALL.keys() - {"evaluate_generator"}, generate=small)
    output = study.dvc("repro")
    assert ran(output) == [
        "check",
        "generate",
        "generate_auto",
        "evaluate_generator@samples",
        "evaluate_generator@auto",
    ]
    assert output.count("is cached - skipping run") == 6
    figures = study.json("work/metrics/auto.json")["generation"]
    assert set(figures) == {"real", "guided", "w1_s0p5", "w2_t0-1_s0p5", "w3_t0-1_s0p5", "noise", "best"}
    assert "gfid_efficientnet-lite0-64_24_auto2_balanced" in figures["w2_t0-1_s0p5"]
    assert (study.folder / "plots/samples/guidance.png").exists()
    assert digest(study.folder / WEIGHTS["train_generator"]) == finished["train_generator"]


def test_autoencoder_experiment(clone, finished):
    """Weights of 0 switch objectives off; the run has equal FLOPs and more steps."""
    length = {"training": {"length": {"name": "flops", "flops": 6e9}}}
    plans = []
    for weights in ({}, {"objective": {"weights": {"clip": 0.0, "ssl": 0.0}}}):
        clone.write({"pretrain": length | weights})
        clone.repro("pretrain")
        plans.append(json.loads((clone.folder / "work/metrics/pretrain.json").read_text())["pretrain"])
    joint, autoencoder = plans
    assert autoencoder["flops"] == pytest.approx(joint["flops"], rel=0.1)
    assert autoencoder["flops"] / autoencoder["steps"] < joint["flops"] / joint["steps"]
    config = json.loads((clone.folder / "work/tokenizer/config.json").read_text())
    assert config["train_clip"] is False
    clone.write({})
    clone.repro()
    assert clone.weights("pretrain") == finished["pretrain"]


TYPOS = {
    ("pretrain", "sed"): 1,
    ("generate", "samples"): "many",
    ("prepare_data", "samples_per_shard"): 0,
    ("cache_latents", "dtype"): "float8",
}
SAID = [
    "params.yaml:pretrain.sed: unknown key",
    "params.yaml:generate.samples: Input should be a valid integer (given: 'many')",
    "section 'report' is missing",
    "prepare_data.samples_per_shard: Input should be greater than or equal to 1",
    "Input should be 'float32', 'bfloat16' or 'float16' (given: 'float8')",
]


def test_typos_stop_everything_and_lose_nothing(clone, finished):
    """All are named at once."""
    values = json.loads(json.dumps(clone.params))
    for (section, key), value in TYPOS.items():
        values[section][key] = value
    del values["report"]
    before = {path: digest(path) for path in clone.folder.glob("work/*") if path.name != "check"}
    write_params(values, clone.folder / "params.yaml")
    output, status = clone.dvc("repro")
    assert status != 0
    assert [said for said in SAID if said not in output] == []
    assert ran(output) == ["check"]
    assert {path: digest(path) for path in before} == before
    clone.write({})
    clone.repro()


def scratch(clone, stage):
    return next(
        iter(sorted((clone.folder / ".scratch" / stage).glob("*/"), key=lambda p: p.stat().st_mtime)[-1:]), None
    )


def checkpoints(clone, stage):
    folder = scratch(clone, stage)
    return [path for path in folder.glob("folder/checkpoints/step-*") if path.suffix != ".tmp"] if folder else []


@pytest.mark.parametrize("stage", WEIGHTS)
def test_killed_stage_goes_on(clone, finished, stage):
    """SIGKILL of dvc and the stage in the middle of training: the next run resumes, and ends with the same bits."""
    clone.repro(*([] if stage == "pretrain" else ["cache_latents"]))
    for name in (WEIGHTS[stage], "dvc.lock"):
        (clone.folder / name).unlink(missing_ok=True)
    shutil.rmtree(clone.folder / ".scratch" / stage, ignore_errors=True)
    shutil.rmtree(clone.folder / ".dvc/cache/runs", ignore_errors=True)
    process = clone.start("repro", "-s", stage)
    # pretrain's dependencies are in place; -s runs this stage alone
    wait_for(lambda: any(int(path.name[5:]) >= 3 for path in checkpoints(clone, stage)), process)
    kill(process)
    clone.repro("-s", stage)
    log = (scratch(clone, stage) / "run.log").read_text()
    assert "resumed after step" in log
    assert clone.weights(stage) == finished[stage]


def test_killed_between_the_end_and_the_lock(clone, finished):
    """DVC forgets a run that it was killed after; the outputs come back without training."""
    clone.repro()
    shutil.rmtree(clone.folder / ".dvc/cache/runs", ignore_errors=True)
    lock = clone.folder / "dvc.lock"
    recorded = YAML(typ="safe", pure=True).load(lock.read_text())
    del recorded["stages"]["train_generator"]
    with lock.open("w") as file:
        YAML().dump(recorded, file)
    output = clone.repro("-s", "train_generator")
    assert "this run is finished" in output
    assert "resumed" not in output
    assert clone.weights("train_generator") == finished["train_generator"]


def test_dvc_killed_alone_leaves_an_orphan_whose_work_is_used(clone, finished):
    clone.repro()
    shutil.rmtree(clone.folder / ".scratch/pretrain", ignore_errors=True)
    shutil.rmtree(clone.folder / ".dvc/cache/runs", ignore_errors=True)
    (clone.folder / "dvc.lock").unlink()
    process = clone.start("repro", "-s", "pretrain")
    wait_for(lambda: checkpoints(clone, "pretrain"), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    output = clone.repro("-s", "pretrain")
    # Whether the orphan ended before or was waited for, nothing was trained twice.
    assert "this run is finished" in output
    assert clone.weights("pretrain") == finished["pretrain"]


def test_terminated_stage_saves_and_says_so(clone, finished):
    shutil.rmtree(clone.folder / ".scratch/tune_decoder", ignore_errors=True)
    command = YAML(typ="safe", pure=True).load(clone.folder / "dvc.yaml")["stages"]["tune_decoder"]["cmd"].split()
    process = subprocess.Popen(
        [sys.executable, *command[1:]],
        cwd=clone.folder,
        env=clone.environment() | {"VTP_CHECKPOINT_SECONDS": "1000"},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: (folder := scratch(clone, "tune_decoder")) and (folder / "folder/curves.csv").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=600)
    if process.returncode == 0:
        pytest.fail("the stage ended before the signal; make it longer")
    assert process.returncode == 130, said
    assert "the next start goes on from here" in said
    assert len(checkpoints(clone, "tune_decoder")) == 1


def test_killed_ranks_go_on(clone, finished):
    """Two ranks under `dvc repro`, everything killed in the middle: the next run ends with the bits of a whole one."""
    two = {"VTP_RANKS": "2"}

    def forget():
        for path in (clone.folder / ".scratch/pretrain", clone.folder / ".dvc/cache/runs"):
            shutil.rmtree(path, ignore_errors=True)
        (clone.folder / "dvc.lock").unlink(missing_ok=True)

    forget()
    clone.repro("-s", "pretrain", **two)
    whole = clone.weights("pretrain")
    forget()
    process = clone.start("repro", "-s", "pretrain", **two)
    wait_for(lambda: any(int(path.name[5:]) >= 3 for path in checkpoints(clone, "pretrain")), process)
    kill(process)
    clone.repro("-s", "pretrain", **two)
    assert "resumed after step" in (scratch(clone, "pretrain") / "run.log").read_text()
    assert clone.weights("pretrain") == whole
    # The same global batches on one process: equal within rounding, as the loss shows.
    rows = (clone.folder / "plots/pretrain.csv").read_text().splitlines()
    losses = [float(value) for value in rows[-1].split(",")[1:4]]
    clone.repro("-s", "-f", "pretrain", VTP_RANKS="1")
    alone = (clone.folder / "plots/pretrain.csv").read_text().splitlines()
    assert [float(value) for value in alone[-1].split(",")[1:4]] == pytest.approx(losses, rel=1e-3)


def test_edited_parameters_wait_for_the_next_run(clone, finished):
    """Stages read what `check` resolved: an edit during a run changes nothing of it, and DVC sees it the next time."""
    clone.repro("train_generator")  # two ranks made another tokenizer than that of the latents
    before = clone.weights("train_generator")
    shutil.rmtree(clone.folder / ".scratch/train_generator", ignore_errors=True)
    process = clone.start("repro", "-f", "-s", "train_generator")
    wait_for(lambda: checkpoints(clone, "train_generator"), process)
    clone.write({"train_generator": {"seed": 1}})
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert clone.weights("train_generator") == before
    assert ran(clone.repro("train_generator")) == ["check", "train_generator"]
    assert clone.weights("train_generator") != before
    clone.write({})
