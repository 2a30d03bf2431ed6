"""Wiring: dvc.yaml, parameter files, the stages and the schema agree."""

import json
import math
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest
import torch
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import modify_yaml
from ruamel.yaml import YAML

from stages.check import check, schema
from stages.figures.published import Published
from stages.pretrain import Pretrain
from stages.runner.pipeline import Pipeline
from stages.runner.project import CONFIG, derived
from stages.runner.run import path_flags, stage_name
from stages.train_generator import TrainGenerator
from stages.tune_decoder import TuneDecoder
from vtp.config import ConfigError, read_yaml
from vtp.models.diffusers_vae import ConvolutionalConfig
from vtp.models.tokenizer import VisualTokenizer
from vtp.models.trainable import build_tokenizer
from vtp.objectives.cost import convolution_flops, paper_flops
from vtp.params import load, read_parameters

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path.parent for path in (ROOT / "pipelines").glob("*/dvc.yaml"))
DVC_FILES = [folder / "dvc.yaml" for folder in (ROOT, *STUDIES)]
OVERLAYS = ROOT / "pipelines/overlays"
COMPARISONS = [folder for folder in STUDIES if "${seeds}" in (folder / "dvc.yaml").read_text()]
FROZEN = ("fixed_representations", "dinov2")  # the second is the paper's size of the first
LINES = 1500
PARAMETERS = [(file, params) for file in DVC_FILES for params in sorted(file.parent.glob("params*.yaml"))]


def stages_of(folder):
    return YAML(typ="safe", pure=True).load(folder / "dvc.yaml")["stages"]


def stages():
    for folder in (ROOT, *STUDIES):
        for name, stage in stages_of(folder).items():
            yield pytest.param(stage, id=f"{folder.name}:{name}")


def flags_of(words):
    """`--flag path ...` by flag; a flag that reads several has several."""
    given = {}
    for word in words:
        if word.startswith("--"):
            given[word] = []
        else:
            given[list(given)[-1]].append(word)
    assert all(given.values())
    return given


def paths(entries):
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries or []]


@pytest.mark.parametrize("stage", list(stages()))
def test_stage_is_wired(stage):
    python, dash, module, address, *flags = shlex.split(stage["cmd"])
    assert (python, dash) == ("python", "-m")
    deps = paths(stage.get("deps"))
    outs = paths(stage.get("outs")) + paths(stage.get("metrics")) + paths(stage.get("plots"))
    given = flags_of(flags)
    assert stage["desc"]
    assert not any(isinstance(entry, dict) and "persist" in str(entry) for entry in stage["outs"])
    if module == "stages.check":
        assert {path for paths in given.values() for path in paths} == set(outs)
        return
    run = import_module(module).run
    assert f"stages.{stage_name(run)}" == module
    inputs = {f"--{name.replace('_', '-')}" for name in path_flags(run, "input")}
    outputs = {f"--{name.replace('_', '-')}" for name in path_flags(run, "output")} | {"--provenance"}
    optional = {f"--{name.replace('_', '-')}" for name in path_flags(run, "optional")}
    assert inputs | outputs >= set(given) >= (inputs | outputs) - optional
    inputs &= set(given)
    outputs &= set(given) | {"--provenance"}
    read = {path for flag in inputs for path in given[flag]}
    assert read <= set(deps)
    assert {path for flag in outputs for path in given[flag]} == set(outs)
    # Code comes in through `check`, as parameters do.
    assert set(deps) - read == {f"work/check/code/{module.removeprefix('stages.')}.txt"}
    file, section = address.split(":")
    assert file in ("work/check/params.yaml", "work/check/runs/${item.run}/${item.seed}.json")
    assert stage["params"] == [{file: [section]}]
    # A path of a run or a point says which, so that no two stages of a matrix share one.
    own = [f"${{item.{name}}}" for name in stage.get("matrix", {})]
    assert all(name in path for path in outs for name in own)


def pipeline_of(params):
    """The stages of a study with these parameters: derived ones may depend on them."""
    text = derived(params.parent, params=params.name) if params.parent in COMPARISONS else None
    return Pipeline.of(params.parent / "dvc.yaml") if text is None else Pipeline.of_text(text, params.parent)


@pytest.mark.parametrize("study", [f for f in COMPARISONS if f.name not in FROZEN], ids=lambda folder: folder.name)
def test_a_comparison_has_the_paper_s_size(tmp_path, study):
    """By one word of its file, or by a file with runs of that size; data then are given, and all metrics are its own."""
    small = check(study / "params.yaml", pipeline_of(study / "params.yaml"))
    if (params := study / "params.paper.yaml").exists():
        text = params.read_text()
    else:
        text = (study / "params.yaml").read_text().replace("comparison.yaml", "comparison_paper.yaml")
    folder = tmp_path / study.name
    folder.mkdir()
    shutil.copy(ROOT / "pipelines/published.csv", tmp_path)
    (folder / "params.yaml").write_text(text.replace("../overlays", str(OVERLAYS)))
    text = derived(folder, ROOT)
    checked = check(folder / "params.yaml", Pipeline.of_text(text, folder)._replace(tracked=[]))
    assert "prepare_data" not in checked.shared
    assert "work/shards" not in text
    assert "--shards data/captioned --tokenizer" in text
    assert set(checked.runs) >= set(small.runs) - {"B_deep"}  # of VTP-L there
    runs = [run["pretrain"] for run in checked.runs.values()]
    assert all(run["tokenizer"]["image_size"] == 256 for run in runs)
    assert not [name for name in checked.shared["summary"]["metrics"] if "centre32" in name or "lite0" in name]
    assert {run["objective"]["weights"]["reconstruction"] for run in runs} <= {0.1, 1.0, 10.0}


@pytest.mark.parametrize("study", [ROOT, *STUDIES], ids=lambda folder: folder.name)
def test_what_a_stage_reads_another_one_writes(study):
    """Of the folder `work`: a path, a part of one, or a folder that others fill."""
    stages = stages_of(study)
    written = {
        path for stage in stages.values() for key in ("outs", "metrics", "plots") for path in paths(stage.get(key))
    }
    read = {path for stage in stages.values() for path in paths(stage.get("deps")) if path.startswith("work/")}
    assert {path for path in read if not any(meet(path, out) for out in written)} == set()


def meet(one, other):
    """Whether one path is the other, or in it; a part with a variable is any."""
    return all(a == b or "$" in a + b for a, b in zip(one.split("/"), other.split("/"), strict=False))


def test_parameter_files_are_few_lines():
    """All studies together: one says what differs. Those of the paper's figures are half runs, seeds and points."""
    files = [path for path in (ROOT / "pipelines").rglob("*.yaml") if "dvc.yaml" not in path.name]
    own = [path for path in files if not {"stages", "vtp", "work", "data"} & set(path.relative_to(ROOT).parts[2:])]
    assert sum(len(path.read_text().splitlines()) for path in own) < LINES


@pytest.mark.parametrize(("file", "params"), PARAMETERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_parameters_are_valid(file, params):
    """And all that they are based on is watched by DVC, in the file that the stage reads."""
    assert check(params, pipeline_of(params)).modules
    stage = stages_of(file.parent)["check"]
    assert "params.yaml" in stage["deps"]
    assert {"vtp", "stages"} < set(stage["deps"])


@pytest.mark.parametrize("study", STUDIES, ids=lambda folder: folder.name)
def test_a_study_is_a_project_of_its_own(study):
    """Else: python -m stages.runner.project"""
    assert (study / ".dvc/config").read_text() == CONFIG
    assert all((study / name).resolve() == ROOT / name for name in ("vtp", "stages"))
    text = derived(study)
    assert text is None or (study / "dvc.yaml").read_text() == text


def test_studies_run_the_stages_of_the_root():
    """They differ from it in the folders of their data alone, and in what they are about."""
    ours, vtp, imagenet, own, datacomp, guidance, official = (
        stages_of(folder)
        for folder in (
            ROOT,
            *(
                ROOT / "pipelines" / name
                for name in ("vtp", "imagenet", "own_data", "datacomp", "guidance", "official_vtp")
            ),
        )
    )
    assert vtp.keys() == ours.keys() - {"prepare_data"}
    assert imagenet.keys() == ours.keys()
    for name in vtp.keys() - {"check"}:
        text = json.dumps(vtp[name])
        for folder in ("data/captioned", "data/labelled"):
            text = text.replace(folder, "work/shards")
        assert json.loads(text) == ours[name], name
        assert imagenet[name] == own[name] == ours[name], name
    text = (
        json.dumps(own["prepare_data"])
        .replace(r"\"${pictures}\"", "data/imagenet")
        .replace("${pictures}", "data/imagenet")
    )
    assert json.loads(text) == imagenet["prepare_data"]
    assert datacomp["pretrain"] == ours["pretrain"]
    assert {"filter_metadata", "download", "filter_images", "prepare_data"} < datacomp.keys()
    up_to_the_generator = list(ours)[1 : list(ours).index("generate")]
    assert len(up_to_the_generator) == 6
    assert all(guidance[name] == ours[name] for name in up_to_the_generator)
    assert official["prepare_data"] == imagenet["prepare_data"]


def test_runs_and_points_are_the_rooms_of_a_comparison():
    """Whatever is judged is judged for every run at every point, from the parameters of that run."""
    stages = stages_of(ROOT / "pipelines/objectives")
    shared = {name for name, stage in stages.items() if "matrix" not in stage}
    assert shared == {"check", "prepare_data", "reference", "summary"}
    points = {name: stage["matrix"] for name, stage in stages.items() if name not in shared}
    of_runs = {"run": "${runs}", "seed": "${seeds}"}
    assert points.pop("pretrain") == of_runs
    assert len(points) == 7
    assert all(matrix == of_runs | {"at": "${points}"} for matrix in points.values())


@pytest.mark.parametrize("study", ["datacomp", "imagenet"])
def test_small_and_paper_size_have_one_schema(study):
    """They run by changing parameters alone: same sections, same stages."""
    small, paper = (
        read_parameters(ROOT / "pipelines" / study / name).values for name in ("params.yaml", "params.paper.yaml")
    )
    assert small.keys() == paper.keys()
    assert small["prepare_data"]["source"]["name"] == paper["prepare_data"]["source"]["name"]


def test_the_official_study_prints_the_authors_figures():
    """Their README's, in our units: shares, not percent; of the metrics under the names of their protocols."""
    study = ROOT / "pipelines/official_vtp"
    small, paper = (read_parameters(study / name).values for name in ("params.yaml", "params.paper.yaml"))
    assert small.keys() == paper.keys()
    assert small["summary"]["figure"]["all"]["published"] is None
    assert paper["generate"]["labels"] == "random"
    assert paper["reference"]["splits"]["train"]["kept"] == 10000  # of ADM's batch
    published = Published.read(ROOT / "pipelines/published.csv")
    panel = paper["summary"]["figure"]["all"]
    figures = {label: {p.x: p.value for p in published.of(panel["published"], label)} for label in panel["y"]}
    assert figures == {
        "zero-shot": {"Small": 0.667, "Base": 0.732, "Large": 0.782},
        "linear probe": {"Small": 0.775, "Base": 0.81, "Large": 0.857},
        "rFID": {"Small": 0.98, "Base": 0.74, "Large": 0.36},
        "gFID": {"Small": 5.46, "Base": 3.88, "Large": 2.81},
    }
    names = ["zero_shot_top1_squash", "linear_probe_multi_best_on_val", "rfid_inception_50k"]
    names.append("gfid_inception_50k_unguided_random")
    assert [name.rpartition(".")[2] for name in paper["summary"]["metrics"].values()] == names
    large = paper["train_generator_large"]["objective"].pop("timesteps")
    assert large == {"name": "logit_normal", "mu": -0.75, "sigma": 1.0}
    assert paper["train_generator"]["objective"].pop("timesteps") == {"name": "logit_normal", "mu": -0.5, "sigma": 1.25}
    assert paper["train_generator_large"] == paper["train_generator"]


def runs_of(study):
    folder = ROOT / "pipelines" / study
    return check(folder / "params.yaml", Pipeline.of(folder / "dvc.yaml")).runs


def test_runs_of_the_objectives_differ_in_weights_and_channels_alone():
    """And one of the same name is that of the other studies, so that it is trained once."""
    runs = runs_of("objectives")
    assert runs_of("compute_scaling") == {name: runs[name] for name in ("ae", "joint")}
    assert runs_of("noise_level")["joint"] == runs["joint"]
    tokenizers = [run["pretrain"]["tokenizer"]["vision"].pop("feature_bottleneck") for run in runs.values()]
    assert tokenizers == 4 * tokenizers[:1] + 4 * [4 * tokenizers[0]]
    weights = [run["pretrain"]["objective"].pop("weights") for run in runs.values()]
    assert weights[:4] == weights[4:]
    assert [(bool(of["clip"]), bool(of["ssl"])) for of in weights[:4]] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    assert all(run == runs["joint"] for run in runs.values())


def test_two_runs_of_the_adversarial_study_differ_in_the_adversary_alone():
    runs = runs_of("adversarial")
    assert runs["two_stage"]["pretrain"].pop("adversary") is None
    early = {"discriminator_start": 0.0, "start": 0.0}
    assert runs["joint"]["pretrain"].pop("adversary") == runs["joint"]["tune_decoder"]["adversary"] | early
    assert runs["joint"] == runs["two_stage"]


@pytest.mark.parametrize("size", [32, 64])
def test_comparisons_compress_twelve_times_and_ask_more_of_captions_than_of_labels(tmp_path, size):
    """On the CPU and on a GPU: one size through all stages, and what only the other of two objectives could see."""
    overlay = OVERLAYS / {32: "comparison.yaml", 64: "comparison_gpu.yaml"}[size]
    study = read_yaml(ROOT / "pipelines/compute_scaling/params.yaml") | {"base": str(overlay)}
    (tmp_path / "params.yaml").write_text(json.dumps(study))
    checked = check(
        tmp_path / "params.yaml", Pipeline.of(ROOT / "pipelines/compute_scaling/dvc.yaml")._replace(tracked=[])
    )
    source, run = checked.shared["prepare_data"]["source"], checked.runs["joint"]
    assert source["labels"] == "category"
    assert source["image_size"] == checked.shared["reference"]["image_size"] == size
    probes, pretrain = run["evaluate_understanding"]["probes"], run["pretrain"]
    assert probes["resize"] == probes["size"] == pretrain["tokenizer"]["image_size"] == size
    vision = pretrain["tokenizer"]["vision"]
    assert 3 * vision["patch_size"] ** 2 == 12 * vision["feature_bottleneck"]
    assert not vision["bottleneck_ae_only"]
    assert run["train_generator"]["training"]["length"]["samples"] >= 15 * source["train_samples"]


def test_frozen_representations_and_vtp_differ_in_what_the_encoder_learns():
    """One size beside the other; decoders, their tuning and generators are the same for all six."""
    runs = runs_of("fixed_representations")
    frozen, vtp = (
        {size: runs[f"{kind}_{size}"].pop("pretrain") for size in ("s", "b", "l")} for kind in ("rae", "vtp")
    )
    assert all(others == runs["rae_s"] for others in runs.values())
    widest = max(each["tokenizer"]["vision"]["embed_dim"] for each in frozen.values())
    assert widest <= runs["rae_s"]["train_generator"]["model"]["size"]["hidden_size"]
    for size in frozen:
        weights = vtp[size]["objective"].pop("weights")
        assert all(weights.values())
        assert frozen[size]["objective"].pop("weights") == weights | {"reconstruction": 0.0, "clip": 0.0}
        assert frozen[size]["tokenizer"]["vision"].pop("feature_bottleneck") is None
        assert vtp[size]["tokenizer"]["vision"].pop("feature_bottleneck")
        assert frozen[size] == vtp[size]
    shapes = [
        (each["tokenizer"]["vision"]["embed_dim"], each["tokenizer"]["vision"]["depth"]) for each in frozen.values()
    ]
    assert shapes == sorted(set(shapes))


def test_frozen_backbones_are_imported_at_the_papers_size():
    """DINOv2-S, B, L: the stages of a comparison, but for what makes the tokenizers."""
    stages, trained = (stages_of(ROOT / "pipelines" / name) for name in ("dinov2", "compute_scaling"))
    assert stages.keys() - trained.keys() == {"import_tokenizer"}
    assert trained.keys() - stages.keys() == {"pretrain"}
    assert all(stage == trained[name] for name, stage in stages.items() if name != "import_tokenizer")
    assert stages["import_tokenizer"]["matrix"] == trained["pretrain"]["matrix"]
    runs = runs_of("dinov2")
    sources = {name: run.pop("import_tokenizer")["source"] for name, run in runs.items()}
    assert [source["model"].split("_")[1] for source in sources.values()] == ["small", "base", "large"]
    assert all(source["weights"] == f"{source['model']}.safetensors" for source in sources.values())
    assert runs["rae_s"] == runs["rae_b"] == runs["rae_l"]
    assert runs["rae_s"]["train_generator"]["model"]["size"] == {"name": "XL"}


# Millions, G; B and L are the paper's table 1, the others the same encoders counted.
SIZES = {
    "paper.yaml": (171.2, 87.7),
    "sizes/S.yaml": (43.2, None),
    "sizes/L.yaml": (607.2, 311.1),
    "sizes/ablation.yaml": (354.9, None),
}


@pytest.mark.parametrize("overlay", SIZES)
def test_sizes_are_the_papers(overlay):
    config = load(f"{OVERLAYS / overlay}:pretrain", Pretrain)
    parameters, flops = SIZES[overlay]
    with torch.device("meta"):
        model = VisualTokenizer(config.architecture)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.trunk, model.pixel_decoder)]
    assert sum(counts) / 1e6 == pytest.approx(parameters, rel=2e-3)
    if flops is not None:
        assert paper_flops(sum(counts)) / 1e9 == pytest.approx(flops, rel=2e-3)
    assert config.active == (16384, 4096, 2048)
    assert config.training.length.samples == 1.1e9
    assert config.objective.weights.model_dump() == {"reconstruction": 0.1, "clip": 1.0, "ssl": 1.0}


def test_the_study_of_architectures_has_the_papers_table_1():
    """Parameters and FLOPs as printed there: CNN, ViT-B, ViT-L."""
    file = ROOT / "pipelines/architectures/params.paper.yaml"
    parameters, found = read_parameters(file), {}
    for run in parameters.runs:
        config = parameters.of_run(run).parse("pretrain", Pretrain)
        assert config.tokenizer.latent_shape == (64, 16, 16)
        assert config.active == (0, 0, 2048)
        with torch.device("meta"):
            model = build_tokenizer(config.architecture)
        count = sum(p.numel() for part in (model.encoder_layers(), model.pixel_decoder) for p in part.parameters())
        convolutional = isinstance(config.tokenizer, ConvolutionalConfig)
        flops = convolution_flops(config.tokenizer) if convolutional else paper_flops(count)
        found[run] = (count / 1e6, flops / 1e9)
    printed = {"cnn": (70.3, 389.4), "vit_b": (171.2, 87.7), "vit_l": (607.2, 311.1)}
    assert found == {run: pytest.approx(figures, rel=2e-3) for run, figures in printed.items()}


def test_runs_of_the_study_of_architectures_differ_in_the_tokenizer_alone():
    runs = runs_of("architectures")
    shapes = {run: Pretrain.parse(values["pretrain"], where=run).tokenizer.latent_shape for run, values in runs.items()}
    assert len(set(shapes.values())) == 1
    assert len({json.dumps(values["pretrain"].pop("tokenizer")) for values in runs.values()}) == len(runs)
    assert len({json.dumps(values) for values in runs.values()}) == 1


PRESETS = {  # size, steps, samples drawn, samples compared
    "B-80ep": ("B", 100_091, 10_000, [10_000]),
    "XL-80ep": ("XL", 100_091, 50_000, [10_000, 50_000]),
    "XL-600ep": ("XL", 750_684, 50_000, [10_000, 50_000]),
    "1p0B-80ep": ("1p0B", 100_091, 50_000, [10_000, 50_000]),
    "stable": ("B", 100_000, 10_000, [10_000]),
}


def test_there_is_every_preset_and_size():
    assert PRESETS.keys() | {"rae"} == {path.stem for path in (OVERLAYS / "presets").iterdir()}
    assert SIZES.keys() == {"paper.yaml", *(f"sizes/{path.name}" for path in (OVERLAYS / "sizes").iterdir())}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_lie_over_every_size(tmp_path, size, preset):
    """The generator is the preset's, its times and all of the tokenizer are the size's."""
    (tmp_path / "params.yaml").write_text(f"base: [{OVERLAYS / size}, {OVERLAYS}/presets/{preset}.yaml]\n")
    checked = check(tmp_path / "params.yaml", Pipeline.of(ROOT / "pipelines/vtp/dvc.yaml")._replace(tracked=[]))
    values, of_size = checked.shared, read_parameters(OVERLAYS / size).values
    trained = values["train_generator"]
    steps = trained["training"]["length"]["samples"] / trained["batch_size"]
    found = (trained["model"]["size"]["name"], steps, values["generate"]["samples"])
    assert (*found, values["evaluate_generator"]["counts"]) == PRESETS[preset]
    assert trained["objective"]["timesteps"] == of_size["train_generator"]["objective"]["timesteps"]
    assert all(values[name] == of_size[name] for name in ("pretrain", "tune_decoder", "reference"))
    assert trained["model"]["use_qknorm"] is (preset == "stable")


@pytest.mark.parametrize("preset", PRESETS)
def test_any_preset_may_be_one_of_512_pixels(tmp_path, preset):
    """By a tokenizer of 256; `check` sees to it that all behind the latents is of one size."""
    bases = [OVERLAYS / "sizes/L.yaml", OVERLAYS / f"presets/{preset}.yaml", OVERLAYS / "512px.yaml"]
    (tmp_path / "params.yaml").write_text(json.dumps({"base": list(map(str, bases))}))
    pipeline = Pipeline.of(ROOT / "pipelines/vtp/dvc.yaml")._replace(tracked=[])
    values = check(tmp_path / "params.yaml", pipeline).shared
    trained = TrainGenerator.parse(values["train_generator"], where="test")
    assert trained.model.size.name == PRESETS[preset][0]
    assert trained.objective.timesteps.resolved(64 * 32 * 32).mu == pytest.approx(-math.log(4))
    assert values["pretrain"]["tokenizer"]["image_size"] == 256
    (tmp_path / "params.yaml").write_text(json.dumps({"base": list(map(str, bases)), "reference": {"image_size": 256}}))
    with pytest.raises(
        ConfigError, match=r"reference.image_size: 256, cache_latents.sizes, the smallest square, is 512"
    ):
        check(tmp_path / "params.yaml", pipeline)


def test_the_preset_of_a_decoder_is_rae_s(tmp_path):
    """The numbers of its authors' first stage, in the units of the records; it changes nothing but the decoder's tuning."""
    (tmp_path / "params.yaml").write_text(f"base: [{OVERLAYS}/sizes/L.yaml, {OVERLAYS}/presets/rae.yaml]\n")
    checked = check(tmp_path / "params.yaml", Pipeline.of(ROOT / "pipelines/vtp/dvc.yaml")._replace(tracked=[])).shared
    of_size = read_parameters(OVERLAYS / "sizes/L.yaml").values
    assert all(checked[name] == of_size[name] for name in checked if name != "tune_decoder")
    tuned = load(f"{tmp_path}/params.yaml:tune_decoder", TuneDecoder)
    assert tuned.view.scale * 256 == 384
    assert round(tuned.training.length.samples / 1_281_167) == 16  # epochs
    adversary, optims = tuned.adversary, (tuned.optim, tuned.adversary.optim)
    assert (16 * adversary.discriminator_start, 16 * adversary.start, adversary.schedule) == (6, 8, "delayed")
    assert {16 * optim.warmup for optim in optims} == {1.0}
    assert {(optim.lr, optim.final_lr, optim.schedule) for optim in optims} == {(2e-4, 2e-5, "cosine")}
    assert {(optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm) for optim in optims} == {
        (0.9, 0.95, 0, None)
    }
    assert (tuned.batch_size, tuned.objective.ema, tuned.objective.ema_warmup) == (512, 0.9978, False)
    assert (tuned.objective.l1_space, tuned.objective.noise.std, adversary.weight) == ("pixels", 0.8, 0.75)
    network = adversary.discriminator.network
    assert (network.image_size, network.antialias, network.layer_norm) == (224, False, False)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("table", [[], ["table.yaml"]], ids=["folder", "table"])
def test_own_pictures_have_one_size_through_all_stages(tmp_path, size, table):
    """One overlay; `check` knows what does not fit together, but for how the pictures are stored and probed."""
    bases = [str(OVERLAYS / "own" / name) for name in (f"{size}.yaml", *table)]
    (tmp_path / "params.yaml").write_text(json.dumps({"base": bases, "pictures": "x"}))
    pipeline = Pipeline.of(ROOT / "pipelines/own_data/dvc.yaml")._replace(tracked=[])
    values = check(tmp_path / "params.yaml", pipeline).shared
    assert values["pretrain"]["tokenizer"]["image_size"] == values["reference"]["image_size"] == size
    assert values["prepare_data"]["image"] == {"name": "centre_crop", "size": 2 * size}
    assert values["prepare_data"]["source"]["name"] == ("table" if table else "folder")
    assert values["pretrain"]["without_captions"] == "no_clip"
    batches = values["pretrain"]["data"]["batch"], values["tune_decoder"]["batch_size"]
    assert max(batches[0].values()) >= batches[1]  # too few pictures are told before anything is trained


def test_schema_is_current():
    """Else: python -m stages.check --schema > params.schema.json"""
    assert json.loads((ROOT / "params.schema.json").read_text()) == schema()


FILES = [*(params for _, params in PARAMETERS), *sorted(OVERLAYS.rglob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_editors_accept_every_parameter_file(path):
    named = path.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    jsonschema.validate(read_yaml(path), json.loads((path.parent / named).read_text()))


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *sorted((ROOT / "pipelines").glob("*/params.yaml"))], ids=str)
def test_dvc_keeps_the_form_of_every_params_yaml(tmp_path, path):
    """`dvc exp run -S` reads and writes the whole file by these functions: its diff is then the key that it sets."""
    copy = tmp_path / "params.yaml"
    copy.write_bytes(path.read_bytes())
    with modify_yaml(copy):
        pass
    assert copy.read_text() == path.read_text()
    apply_overrides(copy, [])
    assert copy.read_text() == path.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "generate: {samlpes: 3}",
        "generate: {samples: many}",
        "mine: {base: generate, samlpes: 3}",
        "runs: {a: {pretrain: {objective: {weights: {clipp: 0.0}}}}}",
        "base: 3",
    ],
)
def test_editors_mark_what_is_wrong(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read_yaml(tmp_path / "params.yaml"), json.loads((ROOT / "params.schema.json").read_text()))


def test_definitions_of_the_schema_stand_once():
    definitions = schema()["$defs"]
    texts = [json.dumps(definition, sort_keys=True) for definition in definitions.values()]
    assert len(texts) == len(set(texts))


FRAGMENT = re.compile(r"(of|on|at|in|by|with|after|from|to|per|whose|such as|null:|\{\})( |$)")


def test_every_parameter_has_a_tooltip():
    """A phrase that says by itself what the number is; records say it once for all their fields."""
    for name, definition in schema()["$defs"].items():
        for field, entry in definition.get("properties", {}).items():
            if name == "Sections" or field in ("base", "name"):
                continue
            text = entry.get("description", "" if "$ref" not in json.dumps(entry) else "a record of its own")
            assert len(text.split()) >= 3, f"{name}.{field}: {text!r}"
            assert not FRAGMENT.match(text), f"{name}.{field}: {text!r}"
