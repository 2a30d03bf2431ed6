"""What plans say, against figures that were counted by another route, and against the code that they plan."""

from importlib import import_module

import pytest
import torch
import tuning
from objectives import test_pretrain as pretraining
from tiny import ROOT, merged, tiny_params, write_params
from torch._subclasses.fake_tensor import FakeTensorMode

from stages import check
from stages.plans import estimate, reference, train_generator, tune_decoder
from stages.plans.adversary import discriminator_of
from stages.plans.study import plan_study
from stages.pretrain import Pretrain, micro_batches_of, step_cost
from stages.runner.pipeline import Use
from stages.runner.run import main
from stages.train_generator import TrainGenerator
from vtp.config import ConfigError
from vtp.flow import SamplerConfig, sample
from vtp.layers.random_vgg import STAGES, ConvStages
from vtp.models.lightningdit import LightningDiT
from vtp.objectives.generation import GenerationObjective
from vtp.params import load, read_parameters
from vtp.training.optim import build_optimizer

PAPER = ROOT / "pipelines/imagenet/params.paper.yaml"
STAGES_WITH_A_PLAN = [
    *("pretrain", "tune_decoder", "cache_latents", "train_generator", "generate"),
    *("reference", "evaluate_understanding", "evaluate_reconstruction", "evaluate_generator"),
]


def plan_of(stage, *arguments):
    """What `python -m stages.<stage> --plan` would print, as a record."""
    return import_module(f"stages.plans.{stage}").plan([*map(str, arguments)])


@pytest.fixture
def small(tmp_path):
    write_params(tiny_params(), tmp_path / "params.yaml")
    return tmp_path / "params.yaml"


@pytest.fixture
def paper(tmp_path):
    """The paper's parameters with changes."""

    def write(changes):
        write_params(merged(read_parameters(PAPER).values, changes), tmp_path / "paper.yaml")
        return tmp_path / "paper.yaml"

    return write


@pytest.mark.parametrize("stage", STAGES_WITH_A_PLAN)
def test_every_stage_has_a_plan(monkeypatch, capsys, small, stage):
    run = import_module(f"stages.{stage}").run
    monkeypatch.setattr("sys.argv", [stage, "--plan", f"{small}:{stage}", "--gpus", "2"])
    with pytest.raises(SystemExit) as ended:
        main(run)
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    plan = plan_of(stage, f"{small}:{stage}", "--gpus", "2")
    assert printed.out == plan.text() + "\n"
    assert plan["run"].value > 0
    assert "at 40% of 6.7e+13 FLOP/s" in plan["GPU hours"].text
    assert "on 2 GPUs" in plan["wall clock"].text
    assert plan["wall clock"].value == pytest.approx(plan["GPU hours"].value * 3600 / 2)


def test_plans_of_several_sizes_are_those_of_their_mean(small, tmp_path):
    """As if all came alike; pictures that are encoded on the way cost that, and cached ones are stored at every edge."""
    sizes = {"short_edges": [16, 24], "ratios": [1.0, 2.0], "multiple": 8}
    squares = [{"short_edges": [side], "ratios": [1.0], "multiple": 8} for side in (16, 24)]

    def plans(name, changes):
        write_params(merged(tiny_params(), changes), tmp_path / f"{name}.yaml")
        stages = ("cache_latents", "train_generator", "generate")
        return [plan_of(stage, f"{tmp_path}/{name}.yaml:{stage}") for stage in stages]

    cached, trained, drawn = plans("several", {"cache_latents": {"sizes": sizes}})
    of_squares = [plans(str(number), {"cache_latents": {"sizes": each}}) for number, each in enumerate(squares)]
    plain = [plan_of(stage, f"{small}:{stage}") for stage in ("cache_latents", "train_generator", "generate")]
    assert of_squares[0][0]["run"].value == pytest.approx(plain[0]["run"].value)
    assert of_squares[0][1]["run"].value == plain[1]["run"].value
    assert [drawn["run"].value, of_squares[0][2]["run"].value] == [plain[2]["run"].value] * 2
    forward = [train_generator["forward"].value for _, train_generator, _ in of_squares]
    assert forward[0] < trained["forward"].value < 2.2 * forward[1]
    numbers = 8 * (2 * 2 + 3 * 3 + 2 * 4 + 3 * 6) / 2  # of a picture, on average over the ratios
    assert cached["of an image"].value == 4 * numbers
    images = {"sizes": sizes, "labelled": True, "horizontal_flips": False, "precision": "float32", "window": None}
    images |= {"decode": "full", "max_replaced": 0.1, "statistics_images": 8}
    encoded = plans("encoded", {"train_generator": {"images": images}})[1]
    assert encoded["forward"].value == trained["forward"].value
    assert encoded["step"].value == pytest.approx(trained["step"].value + 8 * encoded["encoder"].value)
    size = {"height": 24, "width": 16}
    assert plans("large", {"generate": {"size": size}})[2]["run"].value > plain[2]["run"].value


def test_a_comparison_costs_what_its_stages_do(small):
    """Of every run, seed and point, and what all share once; the data need no device."""
    uses = [Use("cache_latents", "cache_latents", True), Use("generate", "generate", True, at_points=True)]
    uses += [Use("reference", "reference", False), Use("prepare_data", "prepare_data", False)]
    sections = tiny_params()
    shared = {name: sections.pop(name) for name in ("reference", "prepare_data")}
    other = sections | {"generate": sections["generate"] | {"samples": 48, "seed": 3}}
    study = plan_study(uses, shared, {"one": sections, "two": other}, ["--peak", "1e12"], seeds=3, points=2)
    latents, drawn, real = (plan_of(use.module, f"{small}:{use.section}")["run"].value for use in uses[:3])
    one, two, whole = study.sections.values()
    assert (one["cache_latents"].value, one["generate"].value) == (latents, 2 * drawn)
    assert (two["cache_latents"].value, two["generate"].value) == (latents, 4 * drawn)
    flops = real + 3 * (2 * latents + 6 * drawn)
    assert whole["all"].value == pytest.approx(flops)
    assert whole["all"].text.endswith(f" {estimate.rounded(flops / (0.4e12 * 3600))} GPU hours")


def test_what_compares_no_runs_has_no_plan_of_runs(small):
    with pytest.raises(ConfigError, match=r"compares no runs; the stages of its dvc\.yaml have a --plan each"):
        check.plan(small, [])


def test_the_plan_of_a_filter_is_that_of_its_scores(tmp_path, small):
    """open_clip's own table of models has 14.78 GFLOP for ViT-B-32."""
    named = {"architecture": "ViT-B-32", "weights": "a.pt", "sha256": "0" * 64}
    models = [{"name": "open_clip", **named}, {"name": "tokenizer"}]
    rest = {"name": "clip_score", "keep": {"name": "min", "value": 0.2}, "batch_size": 256, "missing": "drop"}
    section = {"columns": {"name": "pool"}, "keep_columns": [], "rows_per_part": 9, "max_unreadable": 0.0}
    rules = [{"name": "downloaded"}, *({"model": model, **rest} for model in models)]
    write_params({"filter_images": section | {"rules": rules}, "none": section | {"rules": []}}, tmp_path / "f.yaml")
    address = f"{tmp_path}/f.yaml:filter_images"
    plan = plan_of("filter", address, "--tokenizer", f"{small}:pretrain", "--images", 1000, "--gpus", 2)
    assert plan["ViT-B-32"].value == pytest.approx(14.78e9, rel=1e-3)
    assert plan["run"].value == 1000 * (plan["ViT-B-32"].value + plan["tokenizer"].value)
    assert plan["wall clock"].value == pytest.approx(plan["GPU hours"].value * 3600 / 2)
    assert plan["images per second"].value == pytest.approx(1000 / plan["wall clock"].value)
    with pytest.raises(ConfigError, match=r"f\.yaml:none: no rule clip_score"):
        plan_of("filter", f"{tmp_path}/f.yaml:none")


def test_a_stage_without_a_plan_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", "--plan"])
    with pytest.raises(SystemExit):
        main(import_module("stages.report").run)
    assert "the stage report has no plan" in capsys.readouterr().err


def test_plan_of_vtp_l(tmp_path):
    """The plan of a run on 256 devices; its cost is what a count by another route gave (1,049 GFLOP a sample).

    That count has no stochastic depth. VTP-L's leaves out 0.3 of the student's branches, and what it leaves out is in no
    figure.
    """
    address = f"{ROOT}/pipelines/overlays/sizes/L.yaml:pretrain"
    changes = {"pretrain": {"objective": {"drop_path": {"ssl": 0.0}}}}
    write_params({"base": address.rpartition(":")[0], **changes}, tmp_path / "whole.yaml")
    plan, whole = (
        plan_of("pretrain", each, "--gpus", "256", "--micro-batch", "64")
        for each in (address, f"{tmp_path}/whole.yaml:pretrain")
    )
    assert whole["per sample"].value / 1e9 == pytest.approx(1049, rel=0.02)
    # The rest of the student, its patch embedding, is 0.2 % of it.
    assert plan["ssl: student"].value / whole["ssl: student"].value == pytest.approx(0.7, rel=2e-3)
    assert plan["ssl: teacher"].value == whole["ssl: teacher"].value
    saved = whole["ssl: student"].value - plan["ssl: student"].value
    steps = 67_139
    assert whole["run"].value - plan["run"].value == pytest.approx(steps * saved)
    assert plan["GPU hours"].value / whole["GPU hours"].value == pytest.approx(plan["run"].value / whole["run"].value)
    assert plan["activations, clip"].value > 0
    with pytest.raises(ValueError, match="is not a multiple of the 3 ranks"):
        plan_of("pretrain", address, "--gpus", "3")


@pytest.mark.parametrize("gpus", [8, 16, 32, 64, 128, 256, 512, 1024, 2048])
def test_the_papers_batch_splits_over_every_number_of_devices(gpus):
    """With the stochastic depth of VTP-L, in passes of at most 64, 32, 16 and 8 images, a block of which is 8."""
    config = load(f"{ROOT}/pipelines/overlays/sizes/L.yaml:pretrain", Pretrain)
    assert config.objective.drop_path.ssl == 0.3
    for most in (64, 32, 16, 8):
        assert micro_batches_of(config, gpus, most) == max(1, 16384 // gpus // most)
    assert micro_batches_of(config, gpus, None) == 1
    with pytest.raises(ValueError, match=r"a micro-batch of 7 images is less than a block.* set VTP_MICRO_BATCH to 8"):
        micro_batches_of(config, gpus, 7)


@pytest.mark.parametrize(
    ("size", "millions", "multiply_adds", "run"), [("B", 130.61, 23.0, 1.4e19), ("XL", 675.33, 118.4, 7.3e19)]
)
def test_generators_are_the_authors(paper, size, millions, multiply_adds, run):
    """At 64 channels and 256 tokens, for 80 epochs; the other count leaves out the conditions' layers."""
    params = paper({"train_generator": {"model": {"size": {"name": size}, "use_qknorm": False}}})
    plan = plan_of("train_generator", f"{params}:train_generator", "--micro-batch", "64")
    assert plan["epochs"].text.startswith("79.9 of 1,281,167")
    assert plan["forward"].value / 2e9 == pytest.approx(multiply_adds, rel=3e-3)
    assert plan["run"].value == pytest.approx(run, rel=0.02)
    assert plan["generator"].value / 1e6 == pytest.approx(millions, abs=0.005)
    assert plan["weights"].value == 4 * plan["generator"].value
    assert plan["checkpoint"].value == 4 * plan["weights"].value  # with the optimiser's state and one average


def test_latents_of_imagenet(paper):
    plan = plan_of("cache_latents", f"{paper({'cache_latents': {'horizontal_flips': False}})}:cache_latents")
    assert plan["latents, train"].text == "42 GB in 129 files"
    both = plan_of("cache_latents", f"{PAPER}:cache_latents", "--images", "640000")
    assert both["latents, train"].text == "41.9 GB in 64 files"  # half of the images, and their flips


def test_micro_batches_and_shards_take_less_memory(paper):
    size = {"name": "own", "hidden_size": 768, "depth": 2, "num_heads": 12}
    address = f"{paper({'train_generator': {'model': {'size': size}}})}:train_generator"

    def of(*options):
        plan = plan_of("train_generator", address, *options)
        return [plan[name].value for name in ("activations", "optimiser", "GPU hours")]

    whole, fewer, sharded = of(), of("--micro-batch", "256"), of("--micro-batch", "256", "--gpus", "4", "--fsdp")
    assert fewer == pytest.approx([whole[0] / 4, *whole[1:]], rel=1e-6)
    assert sharded == pytest.approx([fewer[0], fewer[1] / 4, fewer[2]], rel=1e-6)


def test_activations_are_those_of_a_run(small):
    """Tensors without contents are kept as real ones are."""
    model = ConvStages(STAGES[:1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        planned = estimate.kept_per_sample(lambda count: model(torch.empty(count, 3, 8, 8)))
    assert planned == estimate.kept_per_sample(lambda count: model(torch.rand(count, 3, 8, 8))) > 64 * 8 * 8 * 4


def test_a_residual_of_bfloat16_is_kept_in_half(tmp_path):
    planned = {}
    for residual in ("float32", "bfloat16"):
        change = {"train_generator": {"residual": residual, "training": {"precision": "bfloat16"}}}
        write_params(merged(tiny_params(), change), tmp_path / "params.yaml")
        planned[residual] = plan_of("train_generator", f"{tmp_path / 'params.yaml'}:train_generator")[
            "activations"
        ].value
    assert 0.6 < planned["bfloat16"] / planned["float32"] < 0.95


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_those_that_optimisers_keep(tmp_path, name):
    muon = {"name": "muon", "lr": 1.0, "momentum": 0.95, "nesterov": True, "adjust_lr": "match_rms_adamw"}
    change = {"optim": {"matrices": {"adamw": {"name": "adamw"}, "muon": muon}[name]}}
    changes = dict.fromkeys(("pretrain", "tune_decoder", "train_generator"), change)
    values = merged(tiny_params(), changes)
    write_params(values, tmp_path / "params.yaml")
    pretrain = Pretrain.parse(values["pretrain"], where="test")
    generator = TrainGenerator.parse(values["train_generator"], where="test")
    tuned = tuning.config_of(change)
    model = LightningDiT(generator.model.architecture((8, 2, 2), classes=6, text=None))
    objectives = {
        "pretrain": (pretraining.objective_of(pretrain), {"model": pretrain.optim}),
        "tune_decoder": (
            tuning.objective_of(tuned),
            {"decoder": tuned.optim, "discriminator": tuned.adversary.optim},
        ),
        "train_generator": (GenerationObjective(model, generator.objective), {"model": generator.optim}),
    }
    for stage, (objective, optim) in objectives.items():
        optimizers = [build_optimizer(groups, optim[phase]) for phase, groups in objective.phases().items()]
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        kept = sum(tensor.numel() for state in states for what, tensor in state.items() if what != "step")
        plan = plan_of(stage, f"{tmp_path / 'params.yaml'}:{stage}")
        assert plan["optimiser"].value == pytest.approx(4 * kept, rel=0.01)  # a table of positions counts as trained
        assert (plan["optimiser"].value == 2 * plan["weights"].value) is (name == "adamw")


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("scale", "interval"), [(1.0, (0.0, 1.0)), (2.0, (0.0, 1.0)), (2.0, (0.125, 0.6))])
def test_forward_passes_are_those_of_the_sampler(solver, scale, interval):
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
    assert train_generator.forward_passes(config)._asdict() == asked
    assert train_generator.forward_passes(config.model_copy(update={"solver": "dopri5"})) is None


def test_sampling(paper):
    changes = {"settings": {"guided": {"solver": "dopri5"}}}
    plan = plan_of("generate", f"{paper({'generate': changes})}:generate")
    assert plan["unguided"].text.startswith("249 forward passes, 11.5 T")  # .57e18 FLOPs for 50,000 samples
    assert plan["guided"].text.startswith("unknown: dopri5")
    assert plan["without"].text == "guided: its solver is dopri5"


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
    from stages.tune_decoder import TuneDecoder
    from vtp.losses.perceptual import build_perceptual
    from vtp.models.tokenizer import VisualTokenizer
    from vtp.objectives.adversary import build_adversary
    from vtp.objectives.decoder import DecoderObjective

    write_params(merged(tiny_params(), {"tune_decoder": changes}), tmp_path / "params.yaml")
    config = load(f"{tmp_path}/params.yaml:tune_decoder", TuneDecoder)
    inputs = estimate.inputs_of(_options(tmp_path / "params.yaml"))
    model, adversary = VisualTokenizer(inputs.tokenizer), None
    if config.adversary is not None:
        adversary = build_adversary(config.adversary, None, seed=0, tokenizer=model, features=None)
    perceptual = build_perceptual(config.objective.perceptual, weights=tmp_path)
    std = torch.ones(8) if config.objective.noise.std else None
    objective = DecoderObjective(model, adversary, config.objective, perceptual=perceptual, channel_std=std, seed=0)
    with torch.device("meta"):
        shapes = VisualTokenizer(inputs.tokenizer)
    planned = tune_decoder.cost(config, inputs, discriminator_of(config.adversary, shapes))
    assert sum(planned.values()) == pytest.approx(objective.step_cost(1).flops, rel=0.01)


def test_features():
    """Inception has 5.7 G multiply-adds; what shapes do not tell is left out."""
    assert reference.features_flops(_features(name="inception"), 256) == pytest.approx(11.4e9, rel=0.01)
    assert reference.features_flops(_features(name="clip", architecture="vit-b-32"), 256) is None
    lite = {"name": "efficientnet_lite0", "side": 224}
    assert reference.features_flops(_features(**lite), 32) == pytest.approx(2 * 0.4e9, rel=0.05)
    of_timm = {"name": "timm", "model": "vit_base_patch16_224.mae", "side": 224, "reading": "class_token"}
    assert reference.features_flops(_features(**of_timm), 256) == pytest.approx(2 * 17.5e9, rel=0.02)


def test_networks_are_added(tmp_path):
    """Every image passes through each of them."""
    vgg, lite = {"name": "random_vgg16", "seed": 1}, {"name": "efficientnet_lite0", "side": 64}
    each = []
    for networks in ([vgg], [lite], [vgg, lite]):
        write_params(merged(tiny_params(), {"reference": {"features": networks}}), tmp_path / "params.yaml")
        each.append(plan_of("reference", f"{tmp_path}/params.yaml:reference")["features of train"].value)
    assert each[2] == each[0] + each[1]


def test_a_tokenizer_of_another_file(tmp_path):
    values = tiny_params()
    del values["pretrain"], values["prepare_data"]
    write_params(values, tmp_path / "params.yaml")
    address = f"{tmp_path}/params.yaml:cache_latents"
    with pytest.raises(ConfigError, match="no section 'pretrain'.*--tokenizer FILE:SECTION"):
        plan_of("cache_latents", address)
    plan = plan_of("cache_latents", address, "--tokenizer", f"{PAPER}:pretrain", "--validation-images", "7")
    assert plan["latents, validation"].value == 7 * 64 * 16 * 16 * 4 * 2  # float32, and horizontal flips


def test_an_adversary_costs_what_the_stage_says(tmp_path):
    from vtp.models.tokenizer import VisualTokenizer
    from vtp.objectives.adversary import build_adversary

    values = tiny_params()
    values["pretrain"]["adversary"] = values["tune_decoder"]["adversary"]
    write_params(values, tmp_path / "params.yaml")
    address = f"{tmp_path}/params.yaml:pretrain"
    config = load(address, Pretrain)
    model = VisualTokenizer(config.architecture)
    built = build_adversary(config.adversary, None, seed=0, tokenizer=model, features=None)
    plan = plan_of("pretrain", address)
    assert plan["per sample"].value == pytest.approx(step_cost(config, built).flops / config.active.pool)
    assert step_cost(config, built).flops > step_cost(config, None).flops
    flops = built.step_flops(config.tokenizer.image_size) * config.active.reconstruction
    assert plan["discriminator"].value == flops


def test_self_distillation_without_local_views(small):
    values = merged(tiny_params(), {"pretrain": {"data": {"ssl_views": {"local_views": 0}}}})
    write_params(values, small)
    assert plan_of("pretrain", f"{small}:pretrain")["activations, ssl"].value > 0


def test_labels_of_categories_are_as_many_as_categories(tmp_path):
    source = {"classes": 12, "labels": "category"}
    write_params(merged(tiny_params(), {"prepare_data": {"source": source}}), tmp_path / "params.yaml")
    inputs = estimate.inputs_of(_options(tmp_path / "params.yaml"))
    assert (inputs.classes, inputs.labels) == (12, 6)
    generator = train_generator.generator_of(load(f"{tmp_path}/params.yaml:train_generator", TrainGenerator), inputs)
    assert generator.config.num_classes == 6


def _options(params):
    parser = estimate.options_for("any")
    estimate.add_input_options(parser)
    return parser.parse_args([f"{params}:any"])


def _features(**values):
    from pydantic import TypeAdapter

    from vtp.evaluation.features import FeaturesConfig

    file = {} if values["name"] == "efficientnet_lite0" else {"weights": "none", "sha256": "none"}
    return TypeAdapter(FeaturesConfig).validate_python(values | file)
