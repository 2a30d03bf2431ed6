"""What `check` says about bad parameters."""

import pytest
from tiny import ROOT, merged, tiny_params, write_params

from stages.check import disagreements, problems, stage_config, uses
from stages.import_tokenizer import ImportTokenizer

USES = uses(ROOT / "dvc.yaml")


def said(tmp_path, changes=None, *, without=()):
    values = merged(tiny_params(), changes or {})
    for section in without:
        del values[section]
    write_params(values, tmp_path / "params.yaml")
    return "\n".join(problems(tmp_path / "params.yaml", USES))


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
        ({"reference": {"features": {"name": "dino"}}}, "known are random_vgg16, inception, dinov2, clip"),
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
        ({"evaluate_reconstruction": {"noise": {"levels": [0.1, 0.1]}}}, "levels must rise from 0 or above"),
    ],
)
def test_bad_values_are_named(tmp_path, changes, message):
    assert message in said(tmp_path, changes)


def test_an_imported_tokenizer_has_the_size_of_the_reference():
    def said_of(**source):
        imported = ImportTokenizer.parse({"source": source}, where="test")
        return disagreements({"reference": reference, "import_tokenizer": imported})

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
    found = "\n".join(problems(tmp_path / "params.yaml", USES))
    assert "no stage reads section 'pretrian'; did you mean 'pretrain'?" in found
    assert "generate.stpes: unknown key" in found
