"""What `check` says about bad parameters."""

import pytest
from tiny import ROOT, merged, tiny_params, write_params

from stages.check import check, main, stage_config
from stages.import_tokenizer import ImportTokenizer
from stages.plans.rules import disagreements
from stages.runner.pipeline import Pipeline, Use
from vtp.config import ConfigError, read_yaml

SQUARES = {"short_edges": [24], "ratios": [1.0], "multiple": 8}
ENCODED = {
    "sizes": SQUARES | {"short_edges": [16]},
    "labelled": True,
    "horizontal_flips": True,
    "precision": "float32",
    "window": None,
    "decode": "full",
    "max_replaced": 0.1,
    "statistics_images": 8,
}
FEATURES = {"name": "features", "network": {"name": "tokenizer", "image_size": None, "blocks": 9}, "kernel": 3}
TEST = {"samples": 4, "labelled": False, "kept": 0}
RECIPE = Pipeline.of(ROOT / "dvc.yaml")._replace(tracked=[])
# A pipeline that compares two kinds of generators: their training and their samples, with one evaluation for all.
COMPARISON = Pipeline(
    [
        Use("train_generator", "train_generator", True),
        Use("generate", "generate", True),
        Use("report", "report", False),
    ],
    [],
    frozenset({"shards"}),
)


def said_of(path, pipeline=RECIPE):
    try:
        check(path, pipeline)
    except ConfigError as error:
        return str(error)
    return ""


def said(tmp_path, changes=None, *, without=()):
    values = merged(tiny_params(), changes or {}, new=True)
    for section in without:
        del values[section]
    write_params(values, tmp_path / "params.yaml")
    return said_of(tmp_path / "params.yaml")


@pytest.fixture
def study(tmp_path):
    """Write a study on top of the tiny recipe, of seed 0 unless it says another; what `check` says of it."""
    write_params(tiny_params(), tmp_path / "root.yaml")

    def write(text, pipeline=RECIPE):
        if any(use.of_runs for use in pipeline.uses) and "seeds:" not in text:
            text += "\nseeds: [0]"
        (tmp_path / "params.yaml").write_text(f"base: root.yaml\n{text}\n")
        return said_of(tmp_path / "params.yaml", pipeline).replace(f"{tmp_path}/", "")

    return write


OWN = Pipeline.of(ROOT / "pipelines/own_data/dvc.yaml")._replace(tracked=[])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "params.yaml: no pictures, which DVC reads from this file alone; say where yours lie there"),
        ("pictures: 3", "params.yaml:pictures: 3 is no path of a folder"),
        ("pictures: ''", "params.yaml:pictures: '' is no path of a folder"),
        ("pictures: ~/birds", "write it out, from the root / or from the folder of this file"),
        ("picturs: /birds", "no stage reads section 'picturs'; did you mean 'pictures'?"),
    ],
)
def test_own_pictures_lie_somewhere(study, line, message):
    assert message in study(line, OWN)


def test_own_pictures_are_read_where_the_pipeline_reads_them(study):
    assert study("pictures: /birds", OWN) == ""
    assert "no stage reads section 'pictures'" in study("pictures: /birds")


TABLE = {"name": "table", "train": "a.csv", "validation": {"name": "held_out", "share": 0.1}, "path": "p"}
TABLE |= {"caption": "c", "captions": "all", "label": "l", "templates": []}


@pytest.mark.parametrize(
    ("source", "pretrain", "message"),
    [
        (
            {"caption": None},
            {},
            "prepare_data.source.caption: null, and pretrain.objective.weights.clip is 1; give the source",
        ),
        ({"caption": None}, {"without_captions": "no_clip"}, ""),
        ({"caption": None}, {"objective": {"weights": {"clip": 0.0}}}, ""),
        (
            {"label": None},
            {},
            "prepare_data.source.label: null, and pretrain.monitor.probe tells classes apart; set it to null",
        ),
        ({"label": None}, {"monitor": {"probe": None}}, ""),
    ],
)
def test_objectives_and_probes_have_what_they_read(tmp_path, source, pretrain, message):
    probe = {} if (TABLE | source)["label"] else {"class_probe": None}
    changes = {"prepare_data": {"source": TABLE | source}, "pretrain": pretrain, "evaluate_generator": probe}
    found = said(tmp_path, changes)
    assert message in found
    assert bool(found) is bool(message)


@pytest.mark.parametrize(("label", "probe", "valid"), [("l", "root", True), (None, "root", False), (None, None, True)])
def test_classes_of_samples_are_those_of_data(tmp_path, label, probe, valid):
    section = {} if probe == "root" else {"class_probe": None}
    monitor = {"pretrain": {"monitor": {"probe": None}}}
    changes = {"prepare_data": {"source": TABLE | {"label": label}}, **monitor, "evaluate_generator": section}
    message = "prepare_data.source.label: null, and evaluate_generator.class_probe tells classes apart; set it to null"
    found = said(tmp_path, changes)
    assert (message in found) is not valid
    assert bool(found) is not valid


LITE = {"name": "efficientnet_lite0", "side": 64, "stages": 5}
LITE_FEATURES = {"name": "efficientnet_lite0", "side": 96}
FILE = {"weights": "dino.safetensors", "sha256": "ab" * 32}
OTHER = {"weights": "dino.safetensors", "sha256": "cd" * 32}
TO_FILL = {"weights": "dino.safetensors", "sha256": "0" * 64}
TIMM = {"name": "timm", "model": "vit_small_patch8_224.dino"}
CRITIC = TIMM | {"image_size": 224, "blocks": 2, "antialias": True, "layer_norm": True}


def critic(**file):
    return {"name": "features", "network": CRITIC | file, "kernel": 3}


def scored_by(*features):
    return {"reference": {"features": [*features]}}


@pytest.mark.parametrize(
    ("training", "scoring", "named"),
    [
        ("pretrain.objective.reconstruction.perceptual", scored_by(LITE_FEATURES), "reference.features"),
        ("tune_decoder.objective.perceptual", scored_by(LITE_FEATURES), "reference.features"),
        (
            "pretrain.objective.reconstruction.perceptual",
            {"evaluate_reconstruction": {"perceptual": LITE | {"side": 128}}},
            "evaluate_reconstruction.perceptual",
        ),
        (
            "tune_decoder.objective.perceptual",
            {"evaluate_reconstruction": {"perceptual": LITE | {"stages": 1}}},
            "evaluate_reconstruction.perceptual",
        ),
        (
            "tune_decoder.adversary.discriminator.network",
            scored_by(TIMM | FILE | {"side": 224, "reading": "pooled"}),
            "reference.features",
        ),
        (
            "pretrain.adversary.discriminator.network",
            scored_by({"name": "dinov2", "architecture": "vit-s-14"} | FILE),
            "reference.features",
        ),
    ],
)
def test_a_network_never_scores_what_it_trained(tmp_path, training, scoring, named):
    """At any size and number of stages, wherever it stands; another one may."""
    others = {"reference": {"features": [{"name": "random_vgg16", "seed": 9}]}}
    others |= {"evaluate_reconstruction": {"perceptual": {"name": "random_vgg16", "seed": 9, "stages": 2}}}
    section, *_, last = training.split(".")
    if last == "network":
        adversary = tiny_params()["tune_decoder"]["adversary"]
        trained = {section: {"adversary": adversary | {"discriminator": critic(**FILE)}}}
    elif section == "pretrain":
        trained = {section: {"objective": {"reconstruction": {"perceptual": LITE}}}}
    else:
        trained = {section: {"objective": {"perceptual": LITE}}}
    assert said(tmp_path, others | trained) == ""
    found = said(tmp_path, others | trained | scoring)
    assert f"{named}: " in found
    assert f"is the network of {training}, and a network is blind to what it trained; choose another one" in found
    assert found.count("is the network of") == 1


def test_networks_are_told_apart_by_their_weights(tmp_path):
    """Other seeds, and other files, are other networks; one that has no weight in the loss trained nothing."""
    vgg = tiny_params()["pretrain"]["objective"]["reconstruction"]["perceptual"]
    of_features = {"name": "random_vgg16", "seed": vgg["seed"]}
    assert "is the network of pretrain.objective.reconstruction.perceptual" in said(tmp_path, scored_by(of_features))
    assert said(tmp_path, scored_by(of_features | {"seed": 9})) == ""
    silent = {
        "pretrain": {"objective": {"reconstruction": {"perceptual_weight": 0.0}}},
        "tune_decoder": {"objective": {"perceptual_weight": 0.0}},
    }
    assert said(tmp_path, silent | scored_by(of_features)) == ""
    dino = TIMM | {"side": 224, "reading": "class_token"}
    for trained, scoring, same in ((FILE, OTHER, False), (FILE, FILE, True), (TO_FILL, TO_FILL, True)):
        adversary = tiny_params()["tune_decoder"]["adversary"] | {"discriminator": critic(**trained)}
        found = said(tmp_path, {"tune_decoder": {"adversary": adversary}} | scored_by(dino | scoring))
        assert bool(found) is same
    other = {"name": "inception", "weights": "inception.pth", "sha256": "0" * 64}  # to be filled in too
    assert said(tmp_path, {"tune_decoder": {"adversary": adversary}} | scored_by(other)) == ""


def test_the_recipe_is_valid(tmp_path):
    assert said(tmp_path) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain": {"seed": "zero"}}, "pretrain.seed: Input should be a valid integer (given: 'zero')"),
        ({"pretrain": {"seed": 1.5}}, "pretrain.seed"),
        ({"generate": {"samples": 0}}, "generate.samples: Input should be greater than or equal to 1 (given: 0)"),
        ({"train_generator": {"optim": {"lr": -1.0}}}, "train_generator.optim.lr: Input should be greater than 0"),
        ({"pretrain": {"data": {"batch": {"ssl": 99}}}}, "ssl 99 is not a multiple of reconstruction 2"),
        ({"generate": {"settings": {"guided": {"guidance_interval": [0.9, 0.1]}}}}, "start < end"),
        ({"generate": {"samples": 23}}, "evaluate_generator.counts: 24, generate.samples is 23"),
        (
            {"reference": {"features": [{"name": "dino"}]}},
            "known are efficientnet_lite0, random_vgg16, inception, dinov2, clip, timm",
        ),
        (
            {"evaluate_generator": {"ratio_to": "test"}},
            "evaluate_generator.ratio_to: 'test' is none of reference.splits",
        ),
        ({"evaluate_generator": {"ratio_to": "train"}}, "ratio_to: 'train' is what is compared with"),
        ({"pretrain": {"tokenizer": {"image_size": 32}}}, "image_size"),
        (
            {"evaluate_understanding": {"prompts": {"name": "given", "templates": ["an emoji"]}}},
            "every template must hold {}",
        ),
        (
            {"evaluate_understanding": {"prompts": {"name": "openai"}}},
            "openai's are for ImageNet; take {name: data_set}",
        ),
        ({"evaluate_understanding": {"probes": {"resize": 8}}}, "resize 8 is below size 16"),
        ({"evaluate_understanding": {"probes": {"size": 12}}}, "probes.size: 12 is no multiple of 8"),
        ({"reference": {"image_size": 32}}, "reference.image_size: 32, pretrain.tokenizer.image_size is 16"),
        ({"evaluate_reconstruction": {"split": "test"}}, "'test' is none of reference.splits, which has train, valid"),
        ({"evaluate_generator": {"split": "test"}}, "evaluate_generator.split: 'test' is none of reference.splits"),
        ({"reference": {"splits": {"train": {"kept": 19}}}}, "train.kept: 19, evaluate_generator compares 20 features"),
        (
            {"evaluate_understanding": {"probes": {"blocks": [1, 1000003]}}},
            "evaluate_understanding.probes.blocks: 1000003, and pretrain.tokenizer.vision.depth is 2; take so many or fewer",
        ),
        (
            {"pretrain": {"monitor": {"milestones": [-1.0e8]}}},
            "pretrain.monitor.milestones.0: Input should be greater than 0, or: Input should be 'end' (given: -100000000.0)",
        ),
        (
            {"train_generator": {"monitor": {"milestones": [-0.2]}}},
            "train_generator.monitor.milestones.0: Input should be greater than 0 (given: -0.2)",
        ),
        (
            {"train_generator": {"monitor": {"sampler": {"guide": "generator"}}}},
            "train_generator.monitor.sampler: guide: generator asks for a weaker one, and beside one in training is none; "
            "choose null_class",
        ),
        ({"evaluate_reconstruction": {"noise": {"levels": [0.1, 0.1]}}}, "levels must rise from 0 or above"),
        (
            {"pretrain": {"tokenizer": {"text": {"num_heads": 7}}}},
            "tokenizer.text: embed_dim 16 is not a multiple of num_h",
        ),
        ({"pretrain": {"tokenizer": {"text": {"vocab_size": 7}}}}, "vocab_size 7 is not 49408, open_clip's byte pairs"),
        (
            {"pretrain": {"data": {"batch": {"clip": 2000}}}},
            "pretrain.data.batch: takes 2000 samples, prepare_data.source has 64 for training",
        ),
        ({"pretrain": {"seed": 10**19}}, "pretrain.seed: 10000000000000000000 needs more than 64 bits"),
        ({"pretrain": {"optim": {"lr": 1e308}}}, "pretrain.optim.lr: 1e+308 is infinite in float32"),
        (
            {"pretrain": {"objective": {"ssl": {"student_temperature": 1e-300}}}},
            "student_temperature: 1e-300 is 0 in flo",
        ),
        ({"pretrain": {"monitor": {"probe": {"neighbours": 999}}}}, "neighbours 999 are more than train_samples"),
        (
            {"tune_decoder": {"batch_size": 2000}},
            "tune_decoder.batch_size: takes 2000 samples, prepare_data.source has 64 for training",
        ),
        ({"tune_decoder": {"adversary": {"discriminator": {"depth": 3}}}}, "depth: 3 layers that halve need 24 pixels"),
        (
            {"tune_decoder": {"adversary": {"discriminator": FEATURES}}},
            "tune_decoder.adversary.discriminator.network.blocks: 9, pretrain.tokenizer.vision.depth is 2",
        ),
        ({"train_generator": {"model": {"size": {"num_heads": 7}}}}, "must be divisible by 4 and by num_heads 7"),
        ({"train_generator": {"model": {"patch_size": 5}}}, "train_generator.model.patch_size: 5 does not divide 2"),
        (
            {"train_generator": {"monitor": {"fid": {"samples": 8, "reach": []}}}},
            "train_generator.monitor.fid: compares with a refere",
        ),
        (
            {"generate": {"settings": {"guided": {"guidance_channels": 99}}}},
            "generate.settings.guided.guidance_channels: 99, pretrain.tokenizer.vision.feature_bottleneck is 8",
        ),
        (
            {"generate": {"settings": {"guided": {"guide": "generator"}}}},
            "generate.settings.guided.guide: generator asks for a weaker one",
        ),
        ({"evaluate_understanding": {"neighbours": 9999}}, "neighbours 9999 are more than train_samples"),
        (
            {"evaluate_generator": {"neighbours": 24}},
            "counts 24 are fewer than the 25 samples that neighbours and kernel.",
        ),
        ({"evaluate_generator": {"kernel": {"seed": -1}}}, "kernel.seed: Input should be greater than or equal to 0"),
        ({"reference": {"splits": {"train": TEST, "test": TEST}}}, "reference.splits.test: openm"),
        ({"cache_latents": {"sizes": SQUARES}}, "image_size: 16, cache_latents.sizes, the smallest square, is 24"),
        ({"generate": {"size": {"height": 24, "width": 24}}}, "reference.image_size: 16, generate.size.height is 24"),
        ({"generate": {"size": {"height": 16, "width": 8}}}, "generate.size: 8 x 16, and reference compares squares"),
        (
            {"cache_latents": {"sizes": SQUARES | {"multiple": 12}}},
            "cache_latents.sizes.multiple: 12 is no multiple of 8, the pixels per latent (pretrain), 8, times train_gen",
        ),
        ({"cache_latents": {"sizes": SQUARES | {"ratios": [2.0]}}}, "ratios lack 1.0: evaluations look at squares"),
        (
            {"train_generator": {"images": ENCODED}},
            "train_generator.images: asks for pictures, and the stage's command",
        ),
        (
            {"train_generator": {"images": ENCODED}},
            "train_generator.images.statistics_images: null takes those of --latents, which the stage's command then has",
        ),
    ],
)
def test_bad_values_are_named(tmp_path, changes, message):
    assert message in said(tmp_path, changes)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("pretrain.monitor.milestones", [1e8, "end", 1e8]),
        ("train_generator.monitor.milestones", [0.2, 0.2]),
        ("train_generator.objective.ema", [0.9, 0.9]),
        ("evaluate_generator.counts", [24, 24]),
        ("evaluate_understanding.protocols", ["squash", "squash"]),
        ("evaluate_understanding.probes.blocks", [1, 1]),
        ("evaluate_understanding.probes.single.l2", [0.1, 0.1]),
        ("evaluate_understanding.probes.multi.learning_rates", [0.1, 0.1]),
    ],
)
def test_what_names_something_comes_once(tmp_path, section, changes):
    *keys, last = section.split(".")
    nested = {last: changes}
    for key in reversed(keys):
        nested = {key: nested}
    assert f"{section}: {changes[0]!r} comes twice, and would be one under one name" in said(tmp_path, nested)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (
            "memory://shards",
            "what memory:// holds is not shared by processes and machines, and each must read it; give the URL",
        ),
        ("data://text", "what data:// holds is not shared"),
        ("simplecache::s3://bucket/set", "what simplecache::s3:// holds is not shared"),
        ("zip://a.zip::file:///mnt/b", "what zip:// holds is not shared"),
        ("bucket/folder", "no URL; give one such as s3://bucket/folder, or null"),
        ("htps://bucket/folder", "fsspec has no protocol 'htps'; did you mean 'https'?"),
        ("nowhere://bucket", "fsspec has no protocol 'nowhere'; s3, gs, https and file are some"),
    ],
)
def test_shards_go_where_all_can_read_them(tmp_path, location, message):
    found = said(tmp_path, {"prepare_data": {"location": location}})
    assert f"params.yaml:prepare_data.location: {message}" in found
    assert found.endswith(f"(given: {location!r})")


@pytest.mark.parametrize(
    "location", ["s3://bucket/folder", "file:///mnt/shards", "gs://bucket", "https://host/folder", None]
)
def test_places_of_shards(tmp_path, location):
    assert said(tmp_path, {"prepare_data": {"location": location}}) == ""


def test_an_imported_tokenizer_has_the_size_of_the_reference():
    def said_of(**source):
        imported = ImportTokenizer.parse({"source": source}, where="test")
        return disagreements({"reference": reference, "import_tokenizer": imported}, [])

    reference = stage_config("reference").parse(tiny_params()["reference"], where="test")
    assert said_of(name="vtp") == []
    assert said_of(name="autoencoder_kl", image_size=16) == []
    (problem,) = said_of(name="autoencoder_kl", image_size=32)
    assert problem == "reference.image_size: 16, import_tokenizer.source.image_size is 32"


def test_all_errors_are_reported_at_once(tmp_path):
    found = said(tmp_path, {"generate": {"samples": 0}, "report": {"title": ""}}, without=["cache_latents"])
    for place in ("generate.samples", "report.title", "section 'cache_latents' is missing"):
        assert place in found


def test_unknown_names(tmp_path):
    values = tiny_params()
    values["pretrian"] = values.pop("pretrain")
    values["generate"]["stpes"] = 3
    write_params(values, tmp_path / "params.yaml")
    found = said_of(tmp_path / "params.yaml")
    assert "no stage reads section 'pretrian'; did you mean 'pretrain'?" in found
    assert "generate.stpes: unknown key" in found


def test_an_error_names_the_file_of_the_chain_in_which_it_stands(study, tmp_path):
    (tmp_path / "more.yaml").write_text("base: root.yaml\ngenerate: {samples: 0}\n")
    found = study("cache_latents: {dtipe: float32}").splitlines()
    assert found == ["params.yaml:cache_latents.dtipe: unknown key; did you mean 'dtype'? (given: 'float32')"]
    (tmp_path / "params.yaml").write_text("base: more.yaml\n")
    assert said_of(tmp_path / "params.yaml").startswith(
        f"{tmp_path}/more.yaml:generate.samples: Input should be greater"
    )
    (tmp_path / "params.yaml").write_text("base: mroe.yaml\n")
    assert "params.yaml: base names what is no file: " in said_of(tmp_path / "params.yaml")


def test_sections_of_other_stages_may_stand_in_a_base_alone(study, tmp_path):
    values = tiny_params() | {"summary": {"title": "T", "metrics": {"a": "b"}, "figure": {}, "claims": {}, "noise": {}}}
    write_params(values, tmp_path / "root.yaml")
    assert study("") == ""
    assert study("summary: {title: Mine}") == "params.yaml: no stage reads section 'summary'"


def test_a_base_that_dvc_would_not_watch(study, tmp_path):
    watched = RECIPE._replace(tracked=[tmp_path / "params.yaml"])
    assert study("", watched) == (
        "params.yaml: based on root.yaml, which dvc.yaml does not track: add it to the deps of its stage check"
    )
    assert study("", watched._replace(tracked=[tmp_path])) == ""


def test_runs_are_changes_of_sections(study, tmp_path):
    text = """
runs:
  plain: {}
  long: {train_generator: {training: {length: {samples: 192}}}}
  guided: {generate: {settings: {guided: {guidance_scale: 4.0}}}}
"""
    assert study(text, COMPARISON) == ""
    checked = check(tmp_path / "params.yaml", COMPARISON)
    assert checked.runs.keys() == {"plain", "long", "guided"}
    assert checked.shared.keys() == {"report"}
    plain, long, guided = (checked.runs[name] for name in ("plain", "long", "guided"))
    tiny = read_yaml(tmp_path / "root.yaml")
    assert plain == {name: tiny[name] for name in ("train_generator", "generate")}
    assert long["train_generator"]["training"]["length"].pop("samples") == 192
    del plain["train_generator"]["training"]["length"]["samples"]
    assert long == plain
    assert guided["generate"]["settings"]["guided"]["guidance_scale"] == 4.0
    assert guided["generate"]["settings"]["unguided"] == plain["generate"]["settings"]["unguided"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "params.yaml: no runs; name at least one, such as `runs: {joint: {}}`"),
        ("runs: {a: null}", "params.yaml:runs.a: expected changes of sections, or {} for none; found None"),
        ("runs: {a: {report: {title: T}}}", "params.yaml:runs.a.report: a run changes generate, train_generator"),
        (
            "runs: {a: {genrate: {}}}",
            "params.yaml:runs.a.genrate: a run changes generate, train_generator; did you mean",
        ),
        ("runs: {a: {generate: {seeed: 1}}}", "params.yaml:runs.a.generate.seeed: unknown key; did you mean 'seed'?"),
        ("runs: {a: {generate: {samples: 0}}, b: {}}", "params.yaml:runs.a.generate.samples: Input should be greater"),
        ("runs: {a: {}, b: {report: {title: T}}}", "params.yaml:runs.b.report: a run changes"),
        ("generate: {samples: 0}\nruns: {a: {}, b: {}}", "params.yaml:generate.samples: Input should be greater"),
        (
            "runs: {../a: {}}",
            "params.yaml:runs.../a: a run is a folder; name it with up to 64 letters, digits, ., _ and -",
        ),
        (
            "runs: {shards: {}}",
            "params.yaml:runs.shards: what all runs share is in a folder shards; choose another name",
        ),
        ("run: {a: {}}\nruns: {a: {}}", "params.yaml: no stage reads section 'run'; did you mean 'runs'?"),
        ("bse: x\nruns: {a: {}}", "params.yaml: no stage reads section 'bse'; did you mean 'base'?"),
    ],
)
def test_bad_runs_are_named(study, text, message):
    found = study(text, COMPARISON)
    assert found.startswith(message)
    assert len(found.splitlines()) == 1


POINTS = Pipeline([Use("pretrain", "pretrain", True)], [], has_points=True)


def test_points_are_milestones_of_every_run(study):
    text = "runs: {all: {pretrain: {monitor: {milestones: [1.0e+8, end]}}}, one: {}}\npoints: ['1.000e+08', end]"
    assert study(text, POINTS) == (
        "params.yaml:points: 'end' is none of one's pretrain.monitor.milestones, which are called 1.000e+08"
    )


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("end", "params.yaml:points: expected names of milestones in a list, such as [end]; found 'end'"),
        ("[]", "params.yaml:points: expected names of milestones in a list, such as [end]; found []"),
        ("null", "params.yaml:points: expected names of milestones in a list, such as [end]; found None"),
        ("[1.0e+8]", "params.yaml:points: 100000000.0 is no text; put it into quotes"),
        ("['1.000e+08', '1.000e+08']", "params.yaml:points: '1.000e+08' comes twice"),
        (
            "['1e8']",
            "params.yaml:points: '1e8' is none of one's pretrain.monitor.milestones, which are called 1.000e+08",
        ),
    ],
)
def test_points_that_cannot_be(study, points, message):
    assert study(f"runs: {{one: {{}}}}\npoints: {points}", POINTS) == message


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("null", "params.yaml:seeds: expected integers in a list, such as [0] or [0, 1, 2]; found None"),
        ("3", "params.yaml:seeds: expected integers in a list, such as [0] or [0, 1, 2]; found 3"),
        ("[]", "params.yaml:seeds: expected integers in a list, such as [0] or [0, 1, 2]; found []"),
        ("[0, '1']", "params.yaml:seeds: '1' is no integer from 0 on"),
        ("[0, 1.5]", "params.yaml:seeds: 1.5 is no integer from 0 on"),
        ("[true]", "params.yaml:seeds: True is no integer from 0 on"),
        ("[-1, 0]", "params.yaml:seeds: -1 is no integer from 0 on"),
        ("[2, 0, 2]", "params.yaml:seeds: 2 comes twice, and would be trained once"),
        (
            f"[0, {2**63}]",
            f"params.yaml:seeds: {2**63} is added to the seed of a section: generate.seed: {2**63} needs more than 64",
        ),
    ],
)
def test_seeds_that_cannot_be(study, seeds, message):
    found = study(f"runs: {{one: {{}}}}\nseeds: {seeds}", COMPARISON)
    assert found.splitlines()[0].startswith(message)


def test_seeds_of_no_comparison_are_read_by_none(study):
    assert study("seeds: [0]") == "params.yaml: no stage reads section 'seeds'"


def test_a_seed_is_added_to_those_of_a_run(study, tmp_path):
    text = "train_generator: {seed: 7}\nruns: {one: {}, drawn: {generate: {seed: 1}}}\nseeds: [0, 3]"
    assert study(text, COMPARISON) == ""
    trained = {
        (name, seed): (sections["train_generator"]["seed"], sections["generate"]["seed"])
        for name, seed, sections in check(tmp_path / "params.yaml", COMPARISON).of_seeds()
    }
    assert trained == {("one", 0): (7, 0), ("one", 3): (10, 3), ("drawn", 0): (7, 1), ("drawn", 3): (10, 4)}


def test_points_may_be_shares_of_a_run(study):
    text = "runs: {one: {pretrain: {monitor: {milestones: [0.25, 1.0e+8, end]}}}}\npoints: ['0.25', end]"
    assert study(text, POINTS) == ""


def test_runs_of_another_file_are_refused(study, tmp_path):
    """DVC expands its matrix by params.yaml alone."""
    (tmp_path / "runs.yaml").write_text("base: root.yaml\nruns: {a: {}}\nseeds: [0]\npoints: ['1.000e+08']\n")
    found = study("base: runs.yaml\nruns: {one: {}}".replace("base: runs.yaml\n", ""), POINTS)
    assert "expected names of milestones" in found
    (tmp_path / "params.yaml").write_text("base: runs.yaml\nruns: {one: {}}\n")
    found = said_of(tmp_path / "params.yaml", POINTS).replace(f"{tmp_path}/", "")
    assert found.splitlines() == [
        "runs.yaml:runs.a: DVC reads runs, seeds and points from params.yaml alone; say it there",
        "runs.yaml:seeds: DVC reads runs, seeds and points from params.yaml alone; say it there",
        "runs.yaml:points: DVC reads runs, seeds and points from params.yaml alone; say it there",
    ]


SUMMARY = """
runs: {one: {}, two: {}}
summary:
  title: T
  metrics: {gFID: generation.gfid_x}
  figure: {all: {name: curves, x: flops, y: [gFID], published: PUBLISHED}}
  claims: {level: {name: better, metric: gFID, run: one, than: THAN}}
  noise: {pretrain: [one, NOISE]}
"""


def test_a_summary_speaks_of_runs_and_figures_that_there_are(study):
    """Before anything is trained."""
    uses = [Use("generate", "generate", True), Use("summary", "summary", False)]
    pipeline = Pipeline(uses, [], published=ROOT / "pipelines/published.csv")

    def said(published, than, noise):
        text = SUMMARY.replace("PUBLISHED", published).replace("THAN", than).replace("NOISE", noise)
        return study(text, pipeline).splitlines()

    assert said("Figure 4", "two", "two") == []
    assert said("null", "tow", "three") == [
        "params.yaml:summary.claims.level: no such run: 'tow'; did you mean 'two'?",
        "params.yaml:summary.noise.pretrain: no such run: 'three'",
    ]
    (wrong,) = said("Figure 44", "two", "two")
    assert wrong.startswith("params.yaml:summary: ")
    assert wrong.endswith("pipelines/published.csv: no figure 'Figure 44'; did you mean 'Figure 4'?")


def test_the_file_of_published_figures_is_that_of_the_command():
    folder = ROOT / "pipelines/official_vtp"
    assert Pipeline.of(folder / "dvc.yaml").published == folder / "../published.csv"


def test_what_disagrees_is_said_of_its_run(study):
    pipeline = Pipeline([Use("generate", "generate", True), Use("evaluate_generator", "evaluate_generator", True)], [])
    found = study("runs: {one: {}, two: {generate: {samples: 23}}}", pipeline)
    assert found == "params.yaml:runs.two: evaluate_generator.counts: 24, generate.samples is 23"


def test_milestones_beyond_the_end(study):
    change = "training: {length: {name: flops, flops: 1.0e+7}}, monitor: {milestones: [1.0e+8, end]}"
    message = "pretrain.monitor.milestones: 1.000e+08 FLOPs are more than pretrain.training.length.flops, 1.000e+07"
    assert message in study(f"pretrain: {{{change}}}")


def test_points_tell_milestones_apart_by_all_their_digits(study):
    text = "runs: {one: {pretrain: {monitor: {milestones: [1.0e+8, 1.0001e+8, 1.00010001e+8]}}}}\npoints: "
    assert study(f"{text}['1.000e+08', '1.0001e+08', '1.00010001e+08']", POINTS) == ""
    assert "'1.00010002e+08' is none of one's" in study(f"{text}['1.00010002e+08']", POINTS)


def test_a_weaker_generator_is_given_where_one_is_asked_for(study):
    """The flags of the command, of a section that is read once and of a run's."""
    asked = "generate: {settings: {guided: {guide: generator}}}"
    missing = "generate.settings.guided.guide: generator asks for a weaker one, and the stage's command gives none; add"
    unasked = "generate.settings: the stage's command gives a --guide, and no setting has `guide: generator`"
    given = Pipeline([Use("generate", "generate", False, frozenset({"--guide"}))], [])
    assert study(asked).startswith(f"params.yaml: {missing}")
    assert study(asked, given) == ""
    assert study("", given).startswith(f"params.yaml: {unasked}")
    assert study(f"runs: {{one: {{{asked}}}, two: {{}}}}", COMPARISON).startswith(f"params.yaml:runs.one: {missing}")


def test_epochs_are_shown_to_distances_that_are_asked_for(study):
    watch = frozenset({"--reference"})
    pipeline = Pipeline([Use("train_generator", "train_generator", True, watch), Use("summary", "summary", False)], [])
    text = (
        "runs: {one: {}}\nsummary: {title: T, metrics: {epochs: train_generator.epochs_to_reach.2.5.evaluated}, "
        "figure: {all: {name: bars, y: [epochs], published: null}}, claims: {}, noise: {}}"
    )
    fid = "\ntrain_generator: {monitor: {fid: {samples: 8, reach: [2.5, 30.0]}}}"
    assert study(text + fid, pipeline) == ""
    known = "train_generator.epochs_to_reach.2.5.evaluated, train_generator.epochs_to_reach.2.5.interpolated"
    assert f"which gives {known}, " in study(text.replace("2.5", "2.6") + fid, pipeline)
    assert study(text, pipeline).endswith("is not told by train_generator.monitor.fid.reach, which gives nothing")


def test_a_command_s_flags_are_read(tmp_path):
    (tmp_path / "dvc.yaml").write_text(
        "stages: {a: {cmd: 'python -m stages.generate p:generate --samples s --guide g'}}"
    )
    assert Pipeline.of(tmp_path / "dvc.yaml").uses == [
        Use("generate", "generate", False, frozenset({"--samples", "--guide"}))
    ]


def test_any_form_of_a_dvc_file(tmp_path):
    (tmp_path / "dvc.yaml").write_text(
        "stages: {a: {cmd: [echo 1, 'python -m stages.generate p.yaml:gen-two']}, b: {foreach: [1], do: {cmd: 'echo 2'}},"
        " check: {cmd: c, deps: [{params.yaml: {hash: md5}}, vtp]}}"
    )
    pipeline = Pipeline.of(tmp_path / "dvc.yaml")
    assert pipeline.uses == [Use("generate", "gen-two", False)]
    assert pipeline.tracked == [tmp_path / "params.yaml", tmp_path / "vtp"]


def test_a_wrong_run_is_not_asked_for_its_points(study):
    found = study("runs: {one: {pretrain: {seed: x}}}\npoints: ['1.000e+08']", POINTS)
    assert found == "params.yaml:runs.one.pretrain.seed: Input should be a valid integer (given: 'x')"


def test_names_beside_the_folders_of_runs_are_taken():
    taken = Pipeline.of(ROOT / "pipelines/comparison.dvc.yaml").taken
    assert {"shards", "check", "reference", "points", "summary", "provenance"} <= taken


def test_an_overlay_is_checked_where_a_pipeline_reads_it(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check", str(ROOT / "pipelines/overlays/small.yaml")])
    with pytest.raises(SystemExit):
        main()
    assert "overlays/dvc.yaml: no file with stages" in capsys.readouterr().err


def test_a_section_may_serve_as_a_base_alone(study):
    text = "template: {base: generate, seed: 5}\nruns: {a: {generate: {base: template}}}"
    assert study(text, COMPARISON) == "params.yaml:template.base: based on itself: generate -> template -> generate"
    assert study(text.replace("base: generate", "samples: 24").replace("{base: template}", "{}"), COMPARISON) == (
        "params.yaml: no stage reads section 'template'"
    )
    flat = "template: {name: euler}\nruns: {a: {generate: {settings: {unguided: {base: template}}}}}"
    assert "no stage reads" not in study(flat, COMPARISON)


def test_resolved_parameters_are_written(study, tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text(
        "stages: {a: {cmd: 'python -m stages.generate runs/${item.run}.json:generate'},"
        " b: {cmd: 'python -m stages.report p:report'}, check: {cmd: c, deps: [params.yaml, root.yaml]}}"
    )
    study("generate: {samples: 30, seed: 5}\nruns: {one: {}, two: {generate: {samples: 31}}}\nseeds: [0, 2]")
    paths = {name: str(tmp_path / name) for name in ("resolved", "runs", "code")}
    arguments = [word for name, path in paths.items() for word in (f"--{name}", path)]
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path / "params.yaml"), *arguments])
    main()
    assert read_yaml(tmp_path / "resolved").keys() == {"report"}
    values = tiny_params()["generate"]
    for name, samples in (("one", 30), ("two", 31)):
        for seed in (0, 2):
            expected = {"generate": values | {"samples": samples, "seed": 5 + seed}}
            assert read_yaml(tmp_path / f"runs/{name}/{seed}.json") == expected
    assert len(list((tmp_path / "runs").rglob("*.json"))) == 4
    assert {path.name for path in (tmp_path / "code").iterdir()} == {"generate.txt", "report.txt"}
