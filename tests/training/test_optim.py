"""Optimisers: Muon against its golden numbers, whose matrices it moves, clipping by module, rates by the batch."""

import json
import math
import re

import pytest
import torch
from foreign import GOLDEN
from generating import cache, train, work_in, write_inputs
from objectives.test_pretrain import batch_of, config_of, objective_of
from safetensors.torch import load_file
from tiny import merged, tiny_params
from torch import nn
from training.test_fit import OPTIM, TRAINING, Host, Lines

from stages.pretrain import run as pretrain
from stages.tune_decoder import TuneDecoder
from stages.tune_decoder import run as tune_decoder
from vtp.config import ConfigError
from vtp.distributed import StateMismatchError
from vtp.models.generator_folder import LightningDiTConfig
from vtp.models.lightningdit import LightningDiT
from vtp.objectives.adversary import AdversaryConfig
from vtp.step import MuonMatrices, ParameterGroup, StepContext, StepCost, Term, hidden_matrices
from vtp.training.fit import Run, fit
from vtp.training.optim import build_optimizer, set_rates
from vtp.training.update import Update

OFFICIAL = load_file(GOLDEN / "muon-adamw" / "io.safetensors")
CASES = json.loads((GOLDEN / "muon-adamw" / "config.json").read_text())["cases"]
MUON = {"name": "muon", "lr": 1.0, "momentum": 0.95, "nesterov": True, "adjust_lr": "match_rms_adamw"}
START = StepContext(0, 10, log_step=True)


def by_muon(config=OPTIM, **changes):
    return config.model_copy(update={"matrices": MuonMatrices(**(MUON | changes))})


@pytest.mark.parametrize("case", CASES)
def test_muon_makes_the_official_steps(case):
    """Five on given gradients, half of each rate in the record and half in the group, within what bfloat16 differs by."""
    given, weights = CASES[case], nn.Parameter(OFFICIAL[f"{case}.start"].clone())
    rates = {"lr": given["lr"] / 2, "schedule": "constant", "warmup": 0.0}
    rates |= {"weight_decay": given["weight_decay"] / 2, "final_weight_decay": given["weight_decay"] / 2}
    options = {name: given[name] for name in ("momentum", "nesterov")}
    optim = by_muon(OPTIM.model_copy(update=rates), **options, adjust_lr=given["adjust_lr_fn"] or "original")
    optimizer = build_optimizer([ParameterGroup([weights], 2.0, 2.0, hidden=frozenset([weights]))], optim)
    for step, gradient in enumerate(OFFICIAL[f"{case}.gradients"]):
        weights.grad = gradient.clone()
        set_rates(optimizer, optim, StepContext(step, 5, log_step=False))
        optimizer.step()
        momentum = optimizer.state[weights]["momentum_buffer"]
        torch.testing.assert_close(momentum, OFFICIAL[f"{case}.momentum"][step], atol=1e-6, rtol=0)
        for name in ("weights", "weights_by_author"):
            if (expected := OFFICIAL.get(f"{case}.{name}")) is not None:
                torch.testing.assert_close(weights.detach(), expected[step], atol=4e-3, rtol=0)


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest():
    config = config_of()
    objective = objective_of(config)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    adamw, muon = build_optimizer(objective.phases()["model"], by_muon(config.optim, lr=3.0)).parts
    moved = {names[p]: p.ndim for group in muon.param_groups for p in group["params"]}
    assert set(moved.values()) == {2}
    assert all(re.search(r"\.(res)?blocks\.\d+\.", name) for name in moved)
    kinds = {re.sub(r"\.\d+\.", ".", name) for name in moved}
    assert {name.split(".")[1] for name in kinds} == {"trunk", "pixel_decoder", "text"}
    others = {names[p]: p.ndim for group in adamw.param_groups for p in group["params"]}
    assert {name for name in others if re.search(r"\.(res)?blocks\.\d+\.", name) and others[name] > 1} == set()
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert moved.keys() | others.keys() == trained
    assert moved.keys() & others.keys() == set()
    assert {group["lr_factor"] for group in muon.param_groups} == {3.0}


def test_muon_moves_the_blocks_of_a_generator_with_their_modulation():
    sizes = {"input_size": 4, "in_channels": 3, "num_classes": 2, "depth": 2, "hidden_size": 16, "num_heads": 2}
    options = {"patch_size": 1, "mlp_ratio": 4.0, "use_qknorm": True, "use_swiglu": True, "use_rope": True}
    model = LightningDiT(
        LightningDiTConfig(**sizes, **options, use_rmsnorm=True, wo_shift=False, other_sizes="extrapolate")
    )
    hidden = hidden_matrices(model.blocks)
    names = {name for name, parameter in model.named_parameters() if parameter in hidden}
    kinds = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1")
    assert names == {f"blocks.{block}.{kind}.weight" for block in range(2) for kind in kinds}


class Hidden(nn.Module):
    """A network with a hidden matrix, on the lines of `test_fit`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def phases(self):
        return {"all": [ParameterGroup(list(self.parameters()), hidden=hidden_matrices([self.layers[2]]))]}

    def shared_parameters(self):
        return ()

    def terms(self, phase, micro_batches, context):
        for batch in micro_batches:
            loss = (self.layers(batch.x)[:, 0] - batch.y).square().mean() / len(micro_batches)
            yield Term("square", loss, {"loss": loss.detach()})

    def after_step(self, context):
        return {}


def fitted(folder, *, optim, steps=40, stop_after=None, optimizer_state=None):
    objective = Hidden()
    run = Run(steps, TRAINING, {"all": optim}, StepCost(1e6, {"square": 16}, 16))
    host = Host(folder, stop_after=stop_after)
    return objective, fit(objective, Lines(), run, host=host, optimizer_state=optimizer_state)


def test_a_run_by_muon_learns_and_resumes_exactly(tmp_path):
    whole, state = fitted(tmp_path / "whole", optim=by_muon())
    assert {"all/layers.2.weight/momentum_buffer", "all/layers.2.bias/exp_avg"} < state.keys()
    for stop in (1, 7, 39):
        with pytest.raises(KeyboardInterrupt):
            fitted(tmp_path / "parts", optim=by_muon(), stop_after=stop)
    resumed, _ = fitted(tmp_path / "parts", optim=by_muon())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    curves = [(tmp_path / name / "curves.csv").read_text() for name in ("whole", "parts")]
    assert curves[0] == curves[1]
    losses = [float(row.split(",")[1]) for row in curves[0].splitlines()[1:]]
    assert losses[-1] < 0.3 * losses[0]


def test_a_state_of_the_other_optimiser_is_no_beginning(tmp_path):
    _, state = fitted(tmp_path / "first", optim=OPTIM, steps=2)
    fitted(tmp_path / "second", optim=OPTIM, steps=2, optimizer_state=state)
    with pytest.raises(
        StateMismatchError, match=r"keeps all/layers\.2\.weight/step, and optim\.matrices of this run does not"
    ):
        fitted(tmp_path / "third", optim=by_muon(), steps=2, optimizer_state=state)


def test_muon_needs_something_to_move():
    plain = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="have no matrices of hidden layers"):
        build_optimizer([ParameterGroup(list(plain.parameters()))], by_muon())
    adversary = merged(tiny_params()["tune_decoder"]["adversary"], {"optim": {"matrices": MUON}})
    with pytest.raises(ConfigError, match="discriminators have no hidden matrices"):
        AdversaryConfig.parse(adversary, where="test")


@pytest.mark.parametrize("clip_norm", [0.05, 0.5, None])
def test_each_module_is_clipped_by_itself(clip_norm):
    """Against torch's own; the norm that is logged stays that of the whole gradient."""
    config = config_of({"optim": {"clip_by": "module", "clip_norm": clip_norm}})
    objective, batch = objective_of(config), batch_of(config_of())
    optimizer, stepped = build_optimizer(objective.phases()["model"], config.optim), {}
    names = {parameter: name for name, parameter in objective.named_parameters()}
    (adamw,) = optimizer.parts
    adamw.register_step_pre_hook(
        lambda *_: stepped.update({n: p.grad.clone() for p, n in names.items() if p.grad is not None})
    )
    logs = Update("model", optimizer, config.optim, ()).apply(objective.terms("model", [batch], START), START).logs

    objective = objective_of(config)
    for term in objective.terms("model", [batch], START):
        if term.loss is not None:
            term.loss.backward()
    modules = {}
    for group in objective.phases()["model"]:
        modules.setdefault(group.module, []).extend(group.parameters)
    assert list(modules) == ["encoder", "decoder", "text", "dino_head"]
    norms = {
        module: nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf) for module, parameters in modules.items()
    }
    assert (min(norms.values()) < 0.5 < max(norms.values())) or clip_norm != 0.5
    for name, norm in norms.items():
        assert float(logs[f"model_gradient_norm_{name}"]) == pytest.approx(float(norm), rel=1e-5)
    assert float(logs["model_gradient_norm"]) == pytest.approx(math.hypot(*map(float, norms.values())), rel=1e-5)
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(stepped[name], parameter.grad, atol=1e-8, rtol=1e-4)


def test_rates_grow_with_the_root_of_the_batch():
    """DINOv2's: 4e-3 at 1,024 images is 8e-3 at 4,096; the rate at the end stays."""
    given = OPTIM.model_copy(update={"lr": 4e-3, "reference_batch": 1024, "final_lr": 1e-6})
    scaled = given.for_batch(4096)
    assert (scaled.lr, scaled.final_lr) == (pytest.approx(8e-3), 1e-6)
    assert scaled.for_batch(9) == scaled
    assert OPTIM.for_batch(4096) == OPTIM


def test_every_training_scales_its_rates(tmp_path, monkeypatch):
    """By its own batch: of pre-training the pairs, of a discriminator the images that it sees."""
    found = {}

    class Enough(Exception):
        pass

    def stop(objective, batches, run, **_):
        found.update({phase: optim.lr for phase, optim in run.optim.items()})
        raise Enough

    rule = {"lr": 1.0, "reference_batch": 2}
    for stage in ("pretrain", "tune_decoder", "train_generator"):
        monkeypatch.setattr(f"stages.{stage}.fit", stop)
    write_inputs(tmp_path)
    files = {name: tmp_path / name for name in ("metrics", "curves", "picture")}
    adversary = merged(tiny_params()["tune_decoder"]["adversary"], {"optim": rule, "start": 0.5})
    config = config_of({"optim": rule, "adversary": adversary})
    outputs = {name: tmp_path / name for name in ("state", "milestones")} | {"tokenizer": tmp_path / "out"}
    with pytest.raises(Enough):
        pretrain(config, shards=[tmp_path / "shards"], **outputs, **files, host=work_in(tmp_path))
    assert found == {"model": pytest.approx(2.0), "discriminator": pytest.approx(1.0)}  # of 8 and 2

    found.clear()
    config = merged(tiny_params()["tune_decoder"], {"optim": rule, "adversary": {"optim": rule}})
    inputs = {"shards": tmp_path / "shards", "tokenizer": tmp_path / "tokenizer"}
    with pytest.raises(Enough):
        tune_decoder(
            TuneDecoder.parse(config, where="test"), **inputs, decoder=tmp_path / "d", **files, host=work_in(tmp_path)
        )
    assert found == dict.fromkeys(("decoder", "discriminator"), pytest.approx(2**0.5))  # of 4

    found.clear()
    cache(tmp_path, tmp_path)
    with pytest.raises(Enough):
        train(tmp_path, tmp_path, {"optim": rule})
    assert found == {"model": pytest.approx(2.0)}  # of 8
