"""The command line of stages: every flag says what it is."""

import re
import runpy
import subprocess
import sys
from importlib import import_module

import pytest
from tiny import ROOT, tiny_params, write_params

from stages.runner.run import BAD_PARAMETERS, INTERRUPTED, Input, command_line, describe_flag, main, path_flags

STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[a-z]*.py") if path.stem != "check")
PLANS = sorted(path.stem for path in (ROOT / "stages/plans").glob("[a-z]*.py"))
PLANNED = [stage for stage in STAGES if stage in PLANS]


def options(text):
    """Flags of a help text with their descriptions."""
    _, _, listed = text.partition("\noptions:\n")
    found = re.findall(r"^  (?:-h, )?(--[\w-]+)(.*?)(?=^  -|\Z)", listed, re.MULTILINE | re.DOTALL)
    return {flag: " ".join(rest.split()) for flag, rest in found}


def require_described(said):
    for flag, text in said.items():
        if flag != "--help":
            words = re.findall(r"[\w./]+", re.sub(r"^[A-Z:]+( \[[^]]*\])?( |$)", "", text))
            assert len(words) >= 3, f"{flag}: {text!r}"


def shown(*arguments):
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments, "--help"], env=env, cwd="/", capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_of_a_stage_is_described(stage):
    run = import_module(f"stages.{stage}").run
    said = options(command_line(run).format_help())
    flags = {f"--{name.replace('_', '-')}" for kind in ("input", "output") for name in path_flags(run, kind)}
    assert said.keys() == flags | {"--help", "--provenance"} | ({"--plan"} if stage in PLANS else set())
    require_described(said)
    for kind in ("input", "output"):
        for name in path_flags(run, kind):
            flag = f"--{name.replace('_', '-')}"
            assert f"{kind}: {describe_flag(run, name)}" in said[flag]
            assert not describe_flag(run, name).startswith(name)
    assert len(set(said.values())) == len(said)
    assert import_module(f"stages.{stage}").__doc__.splitlines()[0][:60] in command_line(run).format_help()


def test_all_stages_with_a_plan_were_seen():
    assert {"pretrain", "tune_decoder", "generate"} <= set(PLANNED)
    assert {"report", "download"} <= set(STAGES) - set(PLANNED)


@pytest.mark.parametrize("stage", PLANNED)
def test_every_flag_of_a_plan_is_described(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        import_module(f"stages.plans.{stage}").plan(["--help"])
    assert end.value.code == 0
    require_described(options(capsys.readouterr().out))


@pytest.mark.parametrize("program", ["stages.check", "stages.runner.project"])
def test_every_flag_of_a_program_is_described(program):
    said = options(shown(program))
    assert len(said) > 1
    require_described(said)


def test_help_of_a_real_stage():
    said = options(shown("stages.reference"))
    assert said["--shards"] == "PATH input: folder of prepare_data, with the real images"
    assert said["--plan"].startswith("print what a run would take")


def test_a_flag_must_say_what_it_is():
    def run(config: dict, *, shards: Input) -> None: ...

    with pytest.raises(TypeError, match="shards has no description"):
        describe_flag(run, "shards")


@pytest.mark.parametrize("cut", ["--pla", "--shard"])
def test_flags_are_not_cut(cut):
    run = import_module("stages.reference").run
    flags = ["params.yaml:reference", "--shards", "a", "--reference", "b", "--provenance", "c"]
    command_line(run).parse_args(flags)
    with pytest.raises(SystemExit):
        command_line(run).parse_args([*flags, cut] if cut == "--pla" else [*flags[:1], cut, *flags[2:]])


def test_interrupted_while_no_body_is_at_work(monkeypatch, capsys):
    """Ctrl-C while inputs are read: a line, and the status of a stop."""

    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.runner.run._run", interrupt)
    with pytest.raises(SystemExit) as end:
        main(import_module("stages.reference").run)
    assert end.value.code == INTERRUPTED
    assert capsys.readouterr().err == "stopped; the next start goes on with what was saved before\n"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("pretrain", "error: pretrain.data.batch.reconstruction 2 is not a multiple of the 3 ranks"),
        ("tune_decoder", "error: tune_decoder.batch_size 4 is not a multiple of the 3 ranks"),
        ("train_generator", "error: train_generator.batch_size 8 is not a multiple of the 3 ranks"),
    ],
)
def test_a_batch_that_does_not_split_is_refused_before_anything_is_read(stage, said, tmp_path, monkeypatch, capsys):
    """None of the inputs is there, and nobody gets to miss them."""
    write_params(tiny_params(), tmp_path / "params.yaml")
    flags = [name for kind in ("input", "output") for name in path_flags(import_module(f"stages.{stage}").run, kind)]
    paths = [word for name in (*flags, "provenance") for word in (f"--{name.replace('_', '-')}", "nothing")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VTP_DEVICE", "cpu")
    monkeypatch.setenv("VTP_RANKS", "3")
    monkeypatch.setattr("sys.argv", [stage, f"params.yaml:{stage}", *paths])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"stages.{stage}", run_name="__main__")
    assert end.value.code == BAD_PARAMETERS
    assert said in capsys.readouterr().err
    assert not (tmp_path / ".scratch").exists()
