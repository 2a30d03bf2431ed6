"""The stage on tiny latents: it stops and goes on exactly, ranks agree, looks tell what they say, averages are kept."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from generating import cache, train, work_in, write_inputs
from launching import on_two_ranks
from tiny import merged, tiny_params

from stages.reference import ReferenceStatistics
from stages.reference import run as measure
from stages.runner.environment import Interrupted
from vtp import LightningDiT, VisualTokenizer
from vtp.artefact import ArtefactError, digest, load_tensors
from vtp.config import ConfigError
from vtp.data.latents import LatentDataset
from vtp.draws import torch_draws
from vtp.flow import flow_matching_loss
from vtp.models.loading import save_decoder

STEPS = 12
KEPT = {"objective": {"ema": [0.9, 0.5]}}
MONITORED = {"monitor": {"fid": {"samples": 12, "reach": [1e9, 1e-9]}}}
DISTANCE = "gfid_efficientnet-lite0-64_12_unguided_balanced"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    cache(root, root)
    return root


@pytest.fixture(scope="module")
def reference(tmp_path_factory, inputs):
    root = tmp_path_factory.mktemp("reference")
    config = ReferenceStatistics.parse(tiny_params()["reference"], where="test")
    measure(config, shards=inputs / "shards", reference=root / "reference", host=work_in(root))
    return root / "reference"


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    return train(inputs, tmp_path_factory.mktemp("trained"), KEPT)


def rows(out):
    with (out / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("stop_after", [1, 5, 9])
def test_a_stopped_run_ends_with_the_same_bytes(inputs, trained, tmp_path, stop_after):
    with pytest.raises(Interrupted):
        train(inputs, tmp_path, KEPT, stop_after=stop_after, name="stopped")
    out = train(inputs, tmp_path, KEPT)
    assert digest(out / "generator") == digest(trained / "generator")
    assert (out / "curves.csv").read_bytes() == (trained / "curves.csv").read_bytes()
    assert (out / "picture.png").read_bytes() == (trained / "picture.png").read_bytes()


def test_averages_and_milestones_lie_beside_the_result(trained):
    assert sorted(path.name for path in (trained / "generator").iterdir() if path.is_dir()) == ["at-0.2", "ema-0.5"]
    models = [LightningDiT.from_pretrained(trained / "generator" / place) for place in (".", "ema-0.5", "at-0.2")]
    weights = [model.final_layer.linear.weight for model in models]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    facts = json.loads((trained / "metrics.json").read_text())["train_generator"]
    assert (facts["steps"], facts["samples"], facts["epochs"]) == (STEPS, 96, 2)


def test_validation_loss_is_that_of_the_result(inputs, trained):
    """By hand: held-out latents at evenly spaced times, with noise of their own."""
    model, data = LightningDiT.from_pretrained(trained / "generator"), LatentDataset(inputs / "latents", "validation")
    count = 10
    noise = [torch.randn(data.shape, generator=torch_draws(0, "looks/validation", index)) for index in range(count)]
    latents = data.statistics.normalise(data.rows(np.arange(count)))
    t = (torch.arange(count) + 0.5) / count
    with torch.no_grad():
        loss = flow_matching_loss(model, latents, data.labels[:count], t=t, noise=torch.stack(noise)).mse.mean()
    evaluated = [row for row in rows(trained) if row["validation_mse"]]
    assert [int(row["step"]) for row in evaluated] == [6, 12]
    assert float(evaluated[-1]["validation_mse"]) == pytest.approx(float(loss), rel=1e-4)


def test_online_distance_needs_its_reference(inputs, tmp_path):
    with pytest.raises(ConfigError, match="monitor.fid needs --reference"):
        train(inputs, tmp_path, {"monitor": {"fid": {"samples": 4, "reach": []}}})


def test_evaluations_go_through_the_decoder_that_is_given(inputs, reference, tmp_path):
    """It changes what is seen and measured, and nothing that is trained."""
    tokenizer = VisualTokenizer.from_pretrained(inputs / "tokenizer")
    torch.nn.init.ones_([*tokenizer.pixel_decoder.parameters()][-1])
    save_decoder(tokenizer, tmp_path / "decoder")
    own = train(inputs, tmp_path / "own", MONITORED, reference=reference)
    tuned = train(inputs, tmp_path / "tuned", MONITORED, reference=reference, decoder=tmp_path / "decoder")
    assert digest(own / "generator") == digest(tuned / "generator")
    assert (own / "picture.png").read_bytes() != (tuned / "picture.png").read_bytes()
    told = json.loads((own / "metrics.json").read_text())["train_generator"]
    curve = [float(row[DISTANCE]) for row in rows(own) if row[DISTANCE]]
    assert list(told[DISTANCE]) == ["epochs_1", "epochs_2"]
    assert list(told[DISTANCE].values()) == pytest.approx(curve, rel=1e-5)
    assert told["epochs_to_reach"] == {"1e+09": {"evaluated": 1.0}}  # and none for what was never reached
    for before, after in zip(rows(own), rows(tuned), strict=True):
        assert {name for name in before if before[name] != after[name]} == ({DISTANCE} if before[DISTANCE] else set())


def test_a_decoder_of_other_latents(inputs, tmp_path):
    save_decoder(another_tokenizer(inputs), tmp_path / "decoder")
    with pytest.raises(ArtefactError, match=r"decoder decodes the latents of another encoder .* tune a decoder for"):
        train(inputs, tmp_path, {}, decoder=tmp_path / "decoder")


def test_one_batch_is_learnt(inputs, tmp_path):
    """From a loss of 2, that of the variance of noise and data, down."""
    changes = {
        "batch_size": 48,
        "model": {"size": {"name": "own", "hidden_size": 64, "depth": 2, "num_heads": 2}},
        "training": {"length": {"name": "samples", "samples": 48 * 150}, "log_every": 10},
        "optim": {"lr": 3e-3},
        "monitor": {"evaluations": 1},
    }
    losses = [float(row["mse"]) for row in rows(train(inputs, tmp_path, changes))]
    assert losses[0] > 1.5
    assert losses[-1] < 0.7 * losses[0]
    assert all(map(math.isfinite, losses))


def test_late_times_are_uniform(inputs, tmp_path):
    """With all of the run late, logit-normal times make no difference."""
    late, plain, early = (
        train(inputs, tmp_path / str(number), {"objective": objective})
        for number, objective in enumerate(
            ({"uniform_from": 0.0}, {"timesteps": {"name": "uniform"}}, {"uniform_from": 0.5})
        )
    )
    assert digest(late / "generator") == digest(plain / "generator")
    halves = [[row["mse"] for row in rows(out)] for out in (late, early)]
    assert halves[0][0] != halves[1][0]


LAYOUTS = {
    "replicated, micro-batches": {"VTP_MICRO_BATCH": "2"},
    "sharded, recomputed, compiled": {"VTP_PARALLEL": "fsdp", "VTP_RECOMPUTE": "true", "VTP_COMPILE": "true"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_ranks_train_the_same_generator(inputs, reference, tmp_path, layout):
    """Two real ones, by the command line, with looks and a distance along the run."""
    changes = KEPT | MONITORED
    files = {"metrics": "metrics.json", "curves": "curves.csv", "picture": "picture.png", "generator": "generator"}
    paths = {flag: inputs / flag for flag in ("latents", "tokenizer")} | {"reference": reference} | files
    on_two_ranks(
        tmp_path, "train_generator", merged(tiny_params()["train_generator"], changes), paths, **LAYOUTS[layout]
    )
    alone = train(inputs, tmp_path / "alone", changes, reference=reference)
    for ours, theirs in zip(rows(tmp_path), rows(alone), strict=True):
        assert {name: float(value or 0) for name, value in ours.items()} == pytest.approx(
            {name: float(value or 0) for name, value in theirs.items()}, rel=2e-3
        )
    for place in (".", "ema-0.5", "at-0.2"):
        found, expected = (load_tensors(out / "generator" / place / "model.safetensors") for out in (tmp_path, alone))
        for name, tensor in expected.items():
            assert (found[name] - tensor).abs().max() <= 0.05 * 1e-3 * STEPS, name


def another_tokenizer(inputs):
    other = VisualTokenizer.from_pretrained(inputs / "tokenizer")
    with torch.no_grad():
        other.trunk.feature_bottleneck.weight.mul_(1.1)
    return other


def test_latents_of_another_encoder(inputs, tmp_path):
    another_tokenizer(inputs).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "latents").symlink_to(inputs / "latents")
    with pytest.raises(ArtefactError, match=r"latents of another encoder than that of .*tokenizer; run cache_latents"):
        train(tmp_path, tmp_path / "training", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"ema": [0.9, 0.9]}}, r"objective\.ema: 0\.9 comes twice"),
        ({"monitor": {"sampler": {"solver": "dopri5"}}}, "other steps on every rank"),
        ({"monitor": {"sampler": {"guide": "generator"}}}, r"monitor\.sampler: guide: generator asks for a weaker one"),
        ({"monitor": {"pictures": 0}}, "pictures: Input should be greater than or equal to 1"),
        ({"model": {"size": {"name": "M"}}}, "size"),
        ({"monitor": {"milestones": [1.5]}}, "milestones"),
        ({"monitor": {"milestones": [0.2, 0.5, 0.2]}}, r"monitor\.milestones: 0\.2 comes twice"),
    ],
)
def test_mistakes_are_told(inputs, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(inputs, tmp_path, changes)
