"""What plans say, against figures that were counted by another route, and against the code that they plan."""

import re
import sys
from importlib import import_module

import pytest
import torch
from tiny import ROOT, merged, tiny_params, write_params
from torch._subclasses.fake_tensor import FakeTensorMode

from stages import _plan, _plan_decoder, _plan_evaluation, _plan_generation
from stages._closure import LEFT_OUT
from stages._plan_pretrain import plan_pretraining
from vtp.config import ConfigError, load, read_yaml
from vtp.flow import SamplerConfig, sample
from vtp.layers.random_vgg import STAGES, ConvStages

PAPER = ROOT / "pipelines/imagenet/params.paper.yaml"
STAGES_WITH_A_PLAN = [
    *("pretrain", "tune_decoder", "cache_latents", "train_generator", "generate"),
    *("reference", "evaluate_understanding", "evaluate_reconstruction", "evaluate_generator"),
]


def answer(monkeypatch, capsys, stage, *arguments):
    """What `python -m stages.<stage> --plan` prints, by row."""
    module = import_module(f"stages.{stage}")
    monkeypatch.setattr(sys, "argv", [stage, "--plan", *map(str, arguments)])
    source = (ROOT / f"stages/{stage}.py").read_text().split('if __name__ == "__main__":\n')[1]
    with pytest.raises(SystemExit) as ended:
        exec(source.strip(), vars(module))
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    rows = [re.split(r"  +", line.strip(), maxsplit=1) for line in said.out.splitlines() if line.startswith("  ")]
    return dict(rows)


def number(text):
    return float(re.search(r"[\d.,]+(e[+-]\d+)?", text)[0].replace(",", ""))


@pytest.fixture
def small(tmp_path):
    write_params(tiny_params(), tmp_path / "params.yaml")
    return tmp_path / "params.yaml"


@pytest.fixture
def paper(tmp_path):
    """The paper's parameters with changes."""

    def write(changes):
        write_params(merged(read_yaml(PAPER), changes), tmp_path / "paper.yaml")
        return tmp_path / "paper.yaml"

    return write


@pytest.mark.parametrize("stage", STAGES_WITH_A_PLAN)
def test_every_stage_has_a_plan(monkeypatch, capsys, small, stage):
    rows = answer(monkeypatch, capsys, stage, f"{small}:{stage}", "--gpus", "2")
    assert number(rows["run"] if "run" in rows else rows["guided"]) > 0
    assert "at 40% of 6.7e+13 FLOP/s" in rows["GPU hours"]
    assert "on 2 GPUs" in rows["wall clock"]


def test_plan_of_vtp_l(capsys):
    """The plan of a run on 256 devices; its cost is what a count by another route gave (1,049 GFLOP a sample)."""
    address = f"{ROOT}/pipelines/vtp/params.L.yaml:pretrain"
    plan_pretraining([address, "--gpus", "256", "--micro-batch", "64"])
    said = capsys.readouterr().out
    per_sample = float(said.split("per sample")[1].split()[0].replace(",", ""))
    assert per_sample == pytest.approx(1049, rel=0.02)
    assert "activations, clip" in said
    with pytest.raises(ConfigError, match="do not split over 3 GPUs"):
        plan_pretraining([address, "--gpus", "3"])


@pytest.mark.parametrize(
    ("size", "millions", "multiply_adds", "run"), [("B", 130.61, 23.0, 1.4e19), ("XL", 675.33, 118.4, 7.3e19)]
)
def test_generators_are_the_authors(monkeypatch, capsys, paper, size, millions, multiply_adds, run):
    """At 64 channels and 256 tokens, for 80 epochs; the other count leaves out the conditions' layers."""
    params = paper({"train_generator": {"model": {"size": {"name": size}, "use_qknorm": False}}})
    rows = answer(monkeypatch, capsys, "train_generator", f"{params}:train_generator", "--micro-batch", "64")
    assert rows["epochs"].startswith("79.9 of 1,281,167")
    assert number(rows["forward"].split("latent, ")[1]) == pytest.approx(multiply_adds, rel=3e-3)
    assert number(rows["run"]) == pytest.approx(run, rel=0.02)
    assert number(rows["weights"]) == pytest.approx(millions * 4e-3, abs=0.01)
    assert number(rows["checkpoint"]) == pytest.approx(4 * millions * 4e-3, abs=0.06)  # with moments and one average
    config = load(f"{params}:train_generator", import_module("stages.train_generator").TrainGenerator)
    inputs = _plan.inputs_of(_inputs(params))
    assert _plan.count_of(_plan_generation.generator_of(config, inputs)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_latents_of_imagenet(monkeypatch, capsys, paper):
    rows = answer(monkeypatch, capsys, "cache_latents", f"{paper({'cache_latents': {'flips': False}})}:cache_latents")
    assert rows["latents, train"] == "42 GB in 129 files"
    both = answer(monkeypatch, capsys, "cache_latents", f"{PAPER}:cache_latents", "--images", "640000")
    assert both["latents, train"] == "41.9 GB in 64 files"  # half of the images, both ways round


def test_micro_batches_and_shards_take_less_memory(monkeypatch, capsys, paper):
    size = {"name": "own", "hidden_size": 768, "depth": 2, "num_heads": 12}
    address = f"{paper({'train_generator': {'model': {'size': size}}})}:train_generator"

    def of(*options):
        rows = answer(monkeypatch, capsys, "train_generator", address, *options)
        return [number(rows[name]) for name in ("activations", "optimiser", "GPU hours")]

    whole, fewer, sharded = of(), of("--micro-batch", "256"), of("--micro-batch", "256", "--gpus", "4", "--fsdp")
    assert fewer == pytest.approx([whole[0] / 4, *whole[1:]], rel=0.01)
    assert sharded == pytest.approx([fewer[0], fewer[1] / 4, fewer[2]], rel=0.01, abs=0.006)


def test_activations_are_those_of_a_run(small):
    """Tensors without contents are kept as real ones are."""
    model = ConvStages(STAGES[:1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        planned = _plan.growth(lambda count: model(torch.empty(count, 3, 8, 8)))
    assert planned == _plan.growth(lambda count: model(torch.rand(count, 3, 8, 8))) > 64 * 8 * 8 * 4


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("scale", "interval"), [(1.0, (0.0, 1.0)), (2.0, (0.0, 1.0)), (2.0, (0.125, 0.6))])
def test_evaluations_are_those_of_the_sampler(solver, scale, interval):
    asked = {"own": 0, "weak": 0}

    def strong(x, t, labels):
        asked["own"] += len(x)
        return x

    def weak(x, t, labels):
        asked["weak"] += len(x)
        return x

    config = SamplerConfig(
        solver=solver,
        steps=7,
        timestep_shift=0.3,
        guidance_scale=scale,
        guidance_interval=interval,
        guidance_channels="all",
        guide="generator",
    )
    sample(strong, torch.zeros(1, 2, 2, 2), torch.zeros(1).long(), guide_model=weak, **config.arguments())
    assert _plan_generation.evaluations(config)._asdict() == asked
    assert _plan_generation.evaluations(config.model_copy(update={"solver": "dopri5"})) is None


def test_sampling(monkeypatch, capsys, paper):
    changes = {"settings": {"guided": {"solver": "dopri5"}}}
    rows = answer(monkeypatch, capsys, "generate", f"{paper({'generate': changes})}:generate")
    assert rows["unguided"].startswith("249 evaluations, 11.5 T")  # .57e18 FLOPs for 50,000 samples
    assert rows["guided"].startswith("unknown: dopri5")
    assert rows["without"] == "guided: its solver is dopri5"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adversary": None},
        {"objective": {"noise": {"std": 0.8}, "perceptual": {"name": "random_vgg16", "seed": 0, "stages": 1}}},
        {
            "adversary": {
                "discriminator": {
                    "name": "features",
                    "network": {"name": "tokenizer", "image_size": None, "blocks": 2},
                    "kernel": 3,
                }
            }
        },
    ],
)
def test_tuning_costs_what_its_objective_says(tmp_path, changes):
    from stages._adversary import build_adversary
    from stages.tune_decoder import TuneDecoder
    from vtp.losses.perceptual import build_perceptual
    from vtp.models.tokenizer import VisualTokenizer
    from vtp.objectives.decoder import DecoderObjective

    write_params(merged(tiny_params(), {"tune_decoder": changes}), tmp_path / "params.yaml")
    config = load(f"{tmp_path}/params.yaml:tune_decoder", TuneDecoder)
    inputs = _plan.inputs_of(_inputs(tmp_path / "params.yaml"))
    model, adversary = VisualTokenizer(inputs.tokenizer), None
    if config.adversary is not None:
        adversary = build_adversary(config.adversary, None, seed=0, tokenizer=model, features=None)
    perceptual = build_perceptual(config.objective.perceptual, weights=tmp_path)
    std = torch.ones(8) if config.objective.noise.std else None
    objective = DecoderObjective(model, adversary, config.objective, perceptual=perceptual, channel_std=std, seed=0)
    with torch.device("meta"):
        shapes = VisualTokenizer(inputs.tokenizer)
    planned = _plan_decoder.cost(config, inputs, _plan_decoder.critic_of(config, shapes))
    assert sum(planned.values()) == pytest.approx(objective.step_cost(1).flops, rel=0.01)


def test_features():
    """Inception has 5.7 G multiply-adds; what shapes do not tell is left out."""
    assert _plan_evaluation.features_flops(_features(name="inception"), 256) == pytest.approx(11.4e9, rel=0.01)
    assert _plan_evaluation.features_flops(_features(name="clip", architecture="vit-b-32"), 256) is None


def test_a_tokenizer_of_another_file(monkeypatch, capsys, tmp_path):
    values = tiny_params()
    del values["pretrain"], values["prepare_data"]
    write_params(values, tmp_path / "params.yaml")
    address = f"{tmp_path}/params.yaml:cache_latents"
    with pytest.raises(ConfigError, match="no section 'pretrain'.*--tokenizer FILE:SECTION"):
        _plan_generation.plan_caching([address])
    rows = answer(
        monkeypatch, capsys, "cache_latents", address, "--tokenizer", f"{PAPER}:pretrain", "--validation-images", "7"
    )
    assert rows["latents, validation"].startswith("0.000918 GB")  # float32, both ways round


def test_plans_change_no_result():
    """They are no part of what a stage's code means."""
    assert {f"stages.{path.stem}" for path in (ROOT / "stages").glob("_plan*.py")} <= set(LEFT_OUT)


def _inputs(params):
    parser = _plan.options_for("any")
    _plan.add_input_options(parser)
    return parser.parse_args([f"{params}:any"])


def _features(**values):
    from pydantic import TypeAdapter

    from vtp.evaluation.features import FeaturesConfig

    return TypeAdapter(FeaturesConfig).validate_python(values | {"weights": "none", "sha256": "none"})
