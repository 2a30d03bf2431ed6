"""All stages, one after the other, at tiny size in this process: artefacts fit together, and every parameter is read."""

import json
import math
import re
import shlex
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from tiny import ROOT, merged, tiny_params

from stages.check import stage_config
from stages.runner.environment import LocalHost, Runtime
from stages.runner.run import path_flags
from vtp import LightningDiT, load_tokenizer
from vtp.artefact import write_json
from vtp.config import Config
from vtp.data.latents import LatentDataset

STAGES = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
ORDER = [name for name in STAGES if name != "check"]


class QuietHost(LocalHost):
    """Without bars."""

    workers = property(lambda self: 0)
    processes = property(lambda self: 0)

    def progress(self, total, description, unit, done=0):
        return nullcontext(self)

    def update(self, count):
        pass

    def set_postfix_str(self, text):
        pass


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run the recipe; the folder of all outputs, the parameters, and which parameters were read."""
    root = tmp_path_factory.mktemp("work")
    noise = {"objective": {"noise": {"std": 0.5, "samples": 16}}}
    params = merged(tiny_params(), {"tune_decoder": noise})
    configs = {name: stage_config(name).parse(params[name], where=name) for name in ORDER}
    reads: set[tuple[str, str]] = set()
    plain = Config.__getattribute__

    def recording(self, name):
        reads.add((type(self).__name__, name))
        return plain(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "__getattribute__", recording)
        for name in ORDER:
            run = import_module(f"stages.{name}").run
            paths = paths_of(name, root)
            inputs = {flag: paths[flag] for flag in path_flags(run, "input") if flag in paths}
            several = path_flags(run, "several")
            inputs |= {flag: [inputs[flag]] for flag in several if not isinstance(inputs[flag], list)}
            # Outputs that the recipe does not ask for are made too.
            outputs = {flag: paths.get(flag, root / name / flag) for flag in path_flags(run, "output")}
            for path in outputs.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            host = QuietHost(root / "scratch" / name / "folder", root, Runtime())
            host.folder.mkdir(parents=True)
            run(configs[name], **inputs, **outputs, host=host)
            record = {"stage": name, "config": configs[name].model_dump(mode="json"), "inputs": {}, "code": ""}
            write_json(paths["provenance"], record | {"facts": host.recorded()})
    return root, configs, reads


def paths_of(stage, root):
    """Paths of the root's dvc.yaml by flag, in a folder of ours; of a flag with several a list."""
    _, _, _, _, *words = shlex.split(STAGES[stage]["cmd"])
    paths = {}
    for word in words:
        if word.startswith("--"):
            paths[word[2:].replace("-", "_")] = given = []
        else:
            given.append(root / word)
    return {flag: given[0] if len(given) == 1 else given for flag, given in paths.items()}


def fields(config):
    """(class, field) of every parameter in a record, nested ones included."""
    for name in type(config).model_fields:
        value = vars(config)[name]
        if isinstance(value, Config):
            yield from fields(value)
        elif isinstance(value, dict):
            for each in value.values():
                yield from fields(each) if isinstance(each, Config) else ()
        # `name` of a union chooses the class; a default is that of a foreign checkpoint, and not in params.yaml.
        elif name != "name" and type(config).model_fields[name].is_required():
            yield type(config).__name__, name


# Read where this recipe does not lead: without captions (stages/test_own_data.py), in features with classes
# (stages/test_evaluate_generator.py).
ELSEWHERE = {("Pretrain", "without_captions"), ("EvaluateGenerator", "inception_split_size")}


def test_every_parameter_is_read(results):
    _, configs, reads = results
    written = {key for config in configs.values() for key in fields(config)}
    dumped = {key for key in written if key[0] in {"GeneratorConfig", "EmbeddedConfig"}}
    unread = written - reads - {key for key in dumped if ("LightningDiTConfig", key[1]) in reads}
    assert unread == ELSEWHERE


def test_metrics_are_finite_and_named(results):
    root, *_ = results
    table = {}
    for path in root.glob("work/metrics/*.json"):
        table |= json.loads(path.read_text())
    assert set(table) == {
        "pretrain",
        "tune_decoder",
        "train_generator",
        "understanding",
        "reconstruction",
        "latents",
        "speed",
        "generation",
    }

    def leaves(values):
        for value in values.values():
            yield from leaves(value) if isinstance(value, dict) else [value]

    assert all(isinstance(value, str) or math.isfinite(value) for value in leaves(table))
    reconstruction = table["reconstruction"]["validation_centre16"]
    assert set(reconstruction["tuned"]) == {
        "psnr",
        "ssim",
        "lpips_efficientnet-lite0-64",
        "rfid_efficientnet-lite0-64_32",
    }
    assert set(table["latents"]) == set(table["reconstruction"])
    assert set(table["generation"]) == {"real", "unguided", "guided", "noise", "reconstructed", "best"}
    names = ("gfid", "sfid", "kid", "precision", "recall", "class_accuracy")
    counts = {name: "24_vs24" if name in ("precision", "recall") else "24" for name in names}
    of_samples = {f"{name}_efficientnet-lite0-64_{count}_cfg2_balanced" for name, count in counts.items()}
    assert set(table["generation"]["guided"]) == of_samples | {"fdr1_24_vs32_cfg2_balanced"}
    assert {"zero_shot_top1_squash", "linear_probe_bottleneck", "linear_probe_last", "linear_probe_multi"} <= set(
        table["understanding"]
    )
    assert table["pretrain"]["samples"] == 96


def test_tuning_leaves_the_encoder_alone(results):
    root, *_ = results
    plain, tuned = (
        load_tokenizer(root / "work/tokenizer"),
        load_tokenizer(root / "work/tokenizer", root / "work/decoder"),
    )
    images = torch.randn(2, 3, 16, 16)
    assert plain.encoder_digest() == tuned.encoder_digest()
    facts = json.loads((root / "scratch" / "tune_decoder" / "facts.json").read_text())
    assert facts["encoder"] == plain.encoder_digest()
    assert torch.equal(plain.encode(images), tuned.encode(images))
    assert not torch.equal(plain.decode(plain.encode(images)), tuned.decode(plain.encode(images)))


def test_latents_are_those_of_the_encoder(results):
    from vtp.data.dataset import ShardDataset
    from vtp.layers.images import normalise

    root, *_ = results
    latents, images = LatentDataset(root / "work/latents"), ShardDataset(root / "work/shards", "train")
    singles = images.singles().rows
    assert len(latents) == len(singles) == 48
    rows = [0, 19, 20, 47]
    encoded = load_tokenizer(root / "work/tokenizer").encode(normalise(images.images(singles[rows], 16)))
    import numpy as np

    torch.testing.assert_close(latents.rows(np.array(rows)), encoded.detach(), atol=1e-5, rtol=1e-5)
    assert latents.encoder == load_tokenizer(root / "work/tokenizer").encoder_digest()


def test_generator_loads_beside_what_was_kept_on_its_way(results):
    root, *_ = results
    model, early = (LightningDiT.from_pretrained(root / "work/generator" / place) for place in (".", "at-0.2"))
    assert model.null_label == early.null_label == 6
    assert model.space.encoder == early.space.encoder == load_tokenizer(root / "work/tokenizer").encoder_digest()
    assert model.space.classes == early.space.classes == LatentDataset(root / "work/latents").classes
    assert not torch.equal(model.final_layer.linear.weight, early.final_layer.linear.weight)


def test_report_stands_alone(results):
    root, *_ = results
    page = (root / "work/report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 13
    assert "http" not in page
    assert "gfid_efficientnet-lite0-64_24_cfg2_balanced" in page
    parts = ['<h2 id="what-was-run">', 'class="figures"', "Contents", "What the names mean", "Pre-training</h2>"]
    assert sorted(parts, key=page.index) == parts
    assert "Pre-trained on: openmoji (train): 64 pictures of 6 classes, 16 px." in page
    assert page.count("<b>") == 10
    assert "not described" not in page
    assert "not measured" not in page
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(set(captions)) == 13
    assert all(len(caption.split()) > 5 for caption in captions), captions
    assert "guided: samples, a row per class (euler, 2 steps, guidance scale 2)" in captions


def test_nothing_of_the_drawings_stands_in_the_papers_columns(results):
    """Random features, held-out probes and other data are shown under their own names."""
    root, *_ = results
    page = (root / "work/report" / "report.html").read_text()
    table, others = page[
        page.index("Beside the paper&#x27;s table 2 (ImageNet 256 x 256, Inception, 50k)</h2>") :
    ].split("</table>")[:2]
    assert re.search(r"<td>this run(<td>-){3}<td>[^-<]+<td>2(<td>-){8}<tr><td>REPA<td>0.61", table), table
    assert "<tr><td>VTP-L<td>0.36<td>78.2<td>85.7<td>675M<td>600<td>1.85" in table
    for name in (
        "rfid_efficientnet-lite0-64_32",
        "zero_shot_top1_squash",
        "gfid_efficientnet-lite0-64_24_cfg2_balanced",
    ):
        assert f"<td>{name}<td>" in others
    assert re.search(r"<td>linear probe<td>linear_probe_multi<td>[\d.]+<td>not on ImageNet; .*held-out", others)
    assert "not on ImageNet; 16 px; features of efficientnet-lite0-64, not of Inception; 24 images, not 50k" in others


def test_the_overview_and_the_list_of_figures(results):
    root, *_ = results
    overview = Image.open(root / "work/report/overview.png")
    parts = [Image.open(root / "plots" / name) for name in ("reconstructions/first.png", "samples/guided.png")]
    assert overview.width == max(part.width for part in parts)
    assert overview.height == sum(min(part.height, 434) for part in parts)
    figures = (root / "work/report" / "metrics.md").read_text()
    for name in (
        "generation.guided.gfid_efficientnet-lite0-64_24_cfg2_balanced",
        "reconstruction.validation_centre16.tuned.psnr",
        "latents.validation_centre16.effective_rank",
        "speed.encode_images_per_second",
    ):
        assert f"| {name} |" in figures
