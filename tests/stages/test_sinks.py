"""Live curves in TensorBoard and W&B, read back with their own formats: each step once, whatever is killed or fails."""

import csv
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections import Counter

import pytest
import torch
from tiny import ROOT, merged, tiny_params, wait_for, write_params, write_shards

from stages.runner import sinks
from stages.runner.environment import Runtime
from stages.runner.sinks import Feed, Job, require, rows_after
from vtp.artefact import read_json, save_tensors, write_json
from vtp.config import ConfigError
from vtp.step import StepCost
from vtp.training.throughput import Throughput

OUTPUTS = {"tokenizer": "tokenizer", "state": "state", "milestones": "milestones", "metrics": "metrics.json"}
OUTPUTS |= {"curves": "curves.csv", "picture": "picture.png", "provenance": "provenance.json"}
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def events(folder):
    """Scalars by tag as [(step, value)], and the tags of pictures, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={SCALARS: 0, IMAGES: 0})
    read.Reload()
    scalars = {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return scalars, {tag: [each.step for each in read.Images(tag)] for tag in read.Tags()["images"]}


def records(path):
    """What an offline run of W&B holds: a LevelDB log of protobuf records behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(logs):
    """Rows of all offline folders of one run, in the order of their start, as (step, values); ids of the run."""
    rows, ids = [], set()
    for path in sorted(logs.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                rows.append((record.history.step.num, values))
    return rows, ids


def curves_of(path):
    with path.open(newline="") as file:
        return {int(row.pop("step")): {n: float(v) for n, v in row.items() if v} for row in csv.DictReader(file)}


def start(folder, **settings):
    """The stage `pretrain` in a process group of its own."""
    command = [sys.executable, "-m", "stages.pretrain", "params.yaml:pretrain", "--shards", str(folder / "shards")]
    command += [word for flag, path in OUTPUTS.items() for word in (f"--{flag}", path)]
    own = {"VTP_DEVICE": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DVC_ROOT": ""}
    own |= OFFLINE | {"VTP_SINKS": "tensorboard,wandb", "VTP_WORKERS": "0"} | settings
    environment = {name: value for name, value in (os.environ | own).items() if value}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture
def folder(tmp_path):
    """A project whose stage `pretrain` takes some seconds."""
    (tmp_path / ".dvc").mkdir()
    write_shards(tmp_path / "shards")
    longer = {"training": {"length": {"name": "samples", "samples": 640}, "log_every": 2}}
    write_params({"pretrain": merged(tiny_params()["pretrain"], longer)}, tmp_path / "params.yaml")
    return tmp_path


def check_both(folder, scratch):
    """Every step of the finished curves, once and with its value, in both."""
    expected = curves_of(folder / "curves.csv")
    scalars, pictures = events(folder / ".scratch/tensorboard/pretrain" / scratch.name)
    names = {name for row in expected.values() for name in row}
    assert {tag.removeprefix("curves/") for tag in scalars if tag.startswith("curves/")} == names
    for name in names:
        shown = [(step, row[name]) for step, row in expected.items() if name in row]
        assert scalars[f"curves/{name}"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in shown], name
    assert len(pictures["snapshots"]) == len(set(pictures["snapshots"])) == 3
    rows, ids = history(folder / ".scratch")
    assert ids == {scratch.name}
    assert Counter(step for step, _ in rows) == Counter([*expected, *pictures["snapshots"]]) - Counter(
        set(expected) & set(pictures["snapshots"])
    )
    for step, values in rows:
        for name, value in expected.get(step, {}).items():
            assert values[f"curves/{name}"] == pytest.approx(value, rel=1e-6)
    assert [step for step, values in rows if "snapshots" in values or "snapshots/path" in values] == pictures[
        "snapshots"
    ]
    return scalars


def test_a_killed_and_resumed_run_has_each_step_once(folder):
    process = start(folder, VTP_CHECKPOINT_SECONDS="2")

    def scratch():
        return next(folder.glob(".scratch/pretrain/*"), folder)

    def both_have_some():
        sent = [read_json(path)["step"] for path in scratch().glob(f"{sinks.STATE}/*.json")]
        return len(sent) == 2 and min(sent) > 4 and list(scratch().glob("folder/checkpoints/step-*[0-9]"))

    wait_for(both_have_some, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again = start(folder, VTP_WORKERS="1")
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "resumed after step" in (scratch() / "run.log").read_text()
    starts = read_json(scratch() / "starts.json")["starts"]
    assert len(starts) == 2
    assert all(start["seconds"] > 1 for start in starts)
    scalars = check_both(folder, scratch())
    assert len(list(folder.glob(".scratch/wandb/offline-run-*"))) == 2
    rates = [step for step, _ in scalars["throughput/seconds_per_step"]]
    assert len(rates) == len(set(rates)) > 10


def test_sinks_change_no_result_and_a_broken_one_ends_nothing(folder):
    """TensorBoard finds a file where its folder should be."""
    (folder / ".scratch").mkdir()
    (folder / ".scratch/tensorboard").write_text("in the way")
    process = start(folder)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("tensorboard: [Errno 20] Not a directory") == said.count("the run goes on") == 1, said
    assert re.search(r"tensorboard: failed \d+ times; the last step that it has is 0", said)
    scratch = next(folder.glob(".scratch/pretrain/*"))
    rows, _ = history(folder / ".scratch")
    assert max(step for step, _ in rows) == 80
    with_sinks = {path: (folder / path).read_bytes() for path in ("curves.csv", "provenance.json", "picture.png")}
    off = start(folder, VTP_SINKS="", VTP_FRESH="1")
    _, said = off.communicate(timeout=300)
    assert off.returncode == 0, said
    assert {path: (folder / path).read_bytes() for path in with_sinks} == with_sinks
    assert not (scratch / sinks.STATE).exists()  # a fresh start begins its curves anew


def test_names_of_sinks():
    assert Runtime.of({}).sinks == ()
    assert Runtime.of({"VTP_SINKS": " wandb, tensorboard,wandb"}).sinks == ("wandb", "tensorboard")
    with pytest.raises(ConfigError, match=r"\$VTP_SINKS: .*'tensorboard' or 'wandb'"):
        Runtime.of({"VTP_SINKS": "tensorbord"})


def test_a_missing_package_is_told_before_any_work(folder, monkeypatch):
    def none(name):
        raise sinks.PackageNotFoundError(name)

    monkeypatch.setattr(sinks, "version", none)
    with pytest.raises(ConfigError, match=r"VTP_SINKS names wandb, which is not installed: .*\.\[wandb\]"):
        require(["wandb"])
    code = "import sys; from stages.runner import run, sinks; import stages.pretrain as s\n"
    code += "def none(name): raise sinks.PackageNotFoundError(name)\n"
    code += "sinks.version = none; run.main(s.run, distributed=True)"
    arguments = ["params.yaml:pretrain", "--shards", "shards"]
    arguments += [word for flag, path in OUTPUTS.items() for word in (f"--{flag}", path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VTP_SINKS": "tensorboard"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: $VTP_SINKS names tensorboard, which is not installed")
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / ".scratch").exists()


def write_curves(scratch, text):
    (scratch / "folder").mkdir(parents=True, exist_ok=True)
    (scratch / "folder/curves.csv").write_text(text)


def job_of(tmp_path):
    return Job("pretrain", {"seed": 0}, str(tmp_path / "scratch/f1f1"), str(tmp_path / "logs"))


class Memory:
    """A sink that may be broken."""

    shown: list
    broken = False

    def __init__(self, job, *, sent):
        self.check()

    def check(self):
        if self.broken:
            raise OSError("no space is left\non the device")

    def write(self, row):
        self.check()
        self.shown.append(row.step)

    def close(self):
        self.check()


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setitem(sinks.SINKS, "memory", Memory)
    Memory.shown, Memory.broken = [], False
    return Memory


def test_what_is_read_is_whole(tmp_path):
    """No half line, and nothing of a step whose row is still to come."""
    scratch = tmp_path / "scratch/f1f1"
    write_curves(scratch, "step,loss,psnr\n2,0.5,\n4,nan,20\n6,0.2")
    (scratch / "folder/throughput.csv").write_text("step,seconds_per_step\n2,1\n4,1\n6,1\n")
    (scratch / "folder/snapshots").mkdir()
    for step in (3, 5):
        pixels = torch.full((2, 3, 4, 4), step, dtype=torch.uint8)
        save_tensors(scratch / f"folder/snapshots/step-{step:09d}.safetensors", {"images": pixels})
    rows = list(rows_after(scratch / "folder", 0))
    assert [row.step for row in rows] == [2, 3, 4]
    assert rows[0].scalars == {"curves/loss": 0.5, "throughput/seconds_per_step": 1}
    assert rows[1].pictures.shape == (3, 4, 8)
    assert rows[2].scalars["curves/psnr"] == 20
    assert [row.step for row in rows_after(scratch / "folder", 3)] == [4]


def test_rates_of_a_long_run_keep_their_steps(tmp_path):
    """Six digits would put several rows on one step."""
    rates = Throughput(tmp_path / "throughput.csv", StepCost(1.0, {}, 1), device="cpu", peak=None)
    for step in (1_234_567, 1_234_568):
        rates.row(step)
    write_curves(tmp_path, "step,loss\n1234567,1\n1234568,1\n")
    (tmp_path / "throughput.csv").rename(tmp_path / "folder/throughput.csv")
    rows = list(rows_after(tmp_path / "folder", 0))
    assert [row.step for row in rows] == [1_234_567, 1_234_568]
    assert all("throughput/seconds_per_step" in row.scalars for row in rows)


def test_a_sink_gets_what_it_missed(tmp_path, memory, capsys):
    scratch = tmp_path / "scratch/f1f1"
    feed = Feed("memory", job_of(tmp_path))
    feed.follow(now=0)  # nothing there yet
    write_curves(scratch, "step,loss\n2,1\n")
    feed.follow(now=1)
    memory.broken = True
    write_curves(scratch, "step,loss\n2,1\n4,1\n")
    for now in (2, 3, 4, 5):  # with pauses that grow: at 2, 3 and 5
        feed.follow(now=now)
    assert feed.failures == 3
    memory.broken = False
    write_curves(scratch, "step,loss\n2,1\n4,1\n6,1\n")
    feed.follow(now=6)
    assert memory.shown == [2]
    feed.follow(now=9)
    assert memory.shown == [2, 4, 6]
    feed.end()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "memory: no space is left; the run goes on, and what is missing is sent when it works again",
        "memory: failed 3 times; the last step that it has is 6",
    ]


def test_another_start_goes_on_behind_what_was_sent(tmp_path, memory):
    scratch = tmp_path / "scratch/f1f1"
    write_curves(scratch, "step,loss\n2,1\n4,1\n6,1\n")
    Feed("memory", job_of(tmp_path)).end()
    write_curves(scratch, "step,loss\n2,1\n4,1\n")  # as resumed from a checkpoint after step 4
    feed = Feed("memory", job_of(tmp_path))
    feed.follow(now=0)
    write_curves(scratch, "step,loss\n2,1\n4,1\n6,1\n8,1\n")
    feed.end()
    assert memory.shown == [2, 4, 6, 8]


def test_events_that_a_killed_follower_did_not_record_are_purged(tmp_path):
    """It wrote steps 4 and 6 and was killed before it said so."""
    scratch = tmp_path / "scratch/f1f1"
    write_curves(scratch, "step,loss\n2,1\n4,2\n6,3\n")
    Feed("tensorboard", job_of(tmp_path)).end()
    write_json(scratch / sinks.STATE / "tensorboard.json", {"step": 2})
    write_curves(scratch, "step,loss\n2,1\n4,20\n6,30\n")
    Feed("tensorboard", job_of(tmp_path)).end()
    scalars, _ = events(tmp_path / "logs/tensorboard/pretrain/f1f1")
    assert scalars == {"curves/loss": [(2, 1), (4, 20), (6, 30)]}


def test_without_a_record_the_curves_begin_anew(tmp_path):
    scratch = tmp_path / "scratch/f1f1"
    for value in (1, 7):
        write_curves(scratch, f"step,loss\n2,{value}\n")
        Feed("tensorboard", job_of(tmp_path)).end()
        (scratch / sinks.STATE / "tensorboard.json").unlink()
    scalars, _ = events(tmp_path / "logs/tensorboard/pretrain/f1f1")
    assert scalars == {"curves/loss": [(2, 7)]}


def test_wandb_takes_no_other_place_than_the_one_it_was_given(tmp_path, capsys, monkeypatch):
    import wandb

    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    write_curves(tmp_path / "scratch/f1f1", "step,loss\n2,1\n")
    (tmp_path / "logs").write_text("in the way")
    feed = Feed("wandb", job_of(tmp_path))
    feed.end()
    assert feed.failures == 1
    assert "Not a directory" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *arguments: False)  # root may write everywhere
        write_curves(tmp_path / "closed/scratch/f1f1", "step,loss\n2,1\n")
        Feed("wandb", job_of(tmp_path / "closed")).end()
    assert "logs: cannot be written; make it writable, or set $WANDB_DIR" in capsys.readouterr().err
    (tmp_path / "logs").unlink()
    feed.end()
    wandb.teardown()  # as at the end of a process: only then its file is whole
    rows, ids = history(tmp_path / "logs")
    assert ids == {"f1f1"}
    assert [(step, values["curves/loss"]) for step, values in rows] == [(2, 1)]


def test_a_full_disk_is_named(tmp_path):
    """Real event files under a limit on their size, as a quota has it; lifted, the curves are whole."""
    code = f"""
import resource, signal, sys
from pathlib import Path
from stages.runner.sinks import Feed, Job
scratch = Path({str(tmp_path)!r}, "scratch/f1f1")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
feed = Feed("tensorboard", Job("pretrain", {{}}, str(scratch), {str(tmp_path / "logs")!r}))
text = "step,loss\\n" + "".join(f"{{step}},1\\n" for step in range(1, 200))
(scratch / "folder").mkdir(parents=True)
(scratch / "folder/curves.csv").write_text(text)
import torch.utils.tensorboard
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
feed.follow(now=0)
assert feed.failures == 1, feed.failures
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
feed.end()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tensorboard: [Errno 27] File too large; the run goes on" in done.stderr
    scalars, _ = events(tmp_path / "logs/tensorboard/pretrain/f1f1")
    assert scalars == {"curves/loss": [(step, 1) for step in range(1, 200)]}
