"""Where a step makes the host wait for the device: at one place a phase, whatever is trained.

Steps run on torch's meta device, whose tensors have shapes and no contents. Who asks one for a number, or for how many
entries of a mask are true, gets an error; and what comes from the host is seen on its way.
"""

from contextlib import nullcontext

import pytest
import torch
import tuning
from objectives import test_generation as generation
from objectives import test_pretrain as pretraining
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vtp.data.batches import RankSlice
from vtp.data.pretrain_batches import PretrainBatches
from vtp.device import constant, send
from vtp.step import StepContext
from vtp.training.fit import TrainingConfig, _step
from vtp.training.optim import build_optimizer
from vtp.training.update import NONE, Update

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
PRETRAIN = {
    "everything": {"objective": {"drop_path": {"clip": 0.2, "ssl": 0.3, "reconstruction": 0.2}}},
    "sigmoid and centering": {
        "objective": {
            "contrast": {"name": "sigmoid", "scale": 10.0, "bias": -10.0},
            "ssl": {"features": "latent", "pooling": "pooled", "targets": {"name": "centering", "momentum": 0.9}},
        }
    },
    "convolutional": pretraining.CONVOLUTIONAL,
}
CASES = [("everything", 1), *((name, 2) for name in (*PRETRAIN, "joint", *tuning.CASES, "generator"))]


class HostToDevice(TorchDispatchMode):
    """What comes from the host: values that a GPU would have to wait for, and those that are sent to it."""

    def __init__(self):
        super().__init__()
        self.waited_for, self.sent = [], []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        given = arguments, keywords or {}
        result = function(*arguments, **given[1])
        devices = [tensor.device.type for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        # A single number is an argument of the device's work, not a copy.
        of_host = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.ndim]
        if "meta" not in devices:
            return result
        if function is torch.ops.aten.lift_fresh.default:  # torch.tensor(..., device=...)
            self.waited_for.append(str(function))
        elif of_host:
            not_waiting = function in COPIES and (given[1].get("non_blocking") or arguments[2:] == (True,))
            (self.sent if not_waiting else self.waited_for).append(str(function))
        return result


def pretrain_case(changes):
    config = pretraining.config_of(changes | {"data": {"batch": {"clip": 8, "ssl": 4, "reconstruction": 2}}})

    def batches(step, rank_slice):
        return [pretraining.batch_of(config, step, rank_slice, micro) for micro in range(rank_slice.micro_batches)]

    return tuning.Case(lambda: pretraining.objective_of(config), batches, {"model": config.optim})


def generator_case():
    rows = {1: [slice(None)], 2: [slice(0, 2), slice(2, 4)]}
    optim = tuning.config_of().optim
    return tuning.Case(
        lambda: generation.objective_of(condition_dropout=0.5),
        lambda step, rank_slice: [generation.batch_of(part) for part in rows[rank_slice.micro_batches]],
        {"model": optim},
    )


def case_of(name):
    if name in PRETRAIN:
        return pretrain_case(PRETRAIN[name])
    return generator_case() if name == "generator" else tuning.case_of(name)


def on_meta(batch):
    return type(batch)(*(value.to("meta") for value in batch))


def moved(objective):
    """The objective and what is frozen beside it on the device, as its stage puts them there."""
    objective.to("meta")
    frozen = [*getattr(objective, "_perceptual", ()), *getattr(objective, "_frozen", ())]
    for module in frozen:
        module.to("meta")
    return objective


@pytest.fixture
def reads(monkeypatch):
    """How often the host waits for numbers; it gets zeros."""
    found = []

    def read(values):
        assert values.device.type == "meta"
        found.append(len(values))
        return [0.0] * len(values)

    monkeypatch.setattr("vtp.training.update.read", read)
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **settings: nullcontext())  # knows no meta device
    return found


@pytest.mark.parametrize(("name", "micro_batches"), CASES)
def test_a_step_waits_once_a_phase(name, micro_batches, reads):
    """A late one, in which all objectives and the adversary work; where scalars are logged too."""
    case = case_of(name)
    objective = moved(case.build())
    updates = [
        Update(phase, build_optimizer(groups, case.optim[phase]), case.optim[phase], objective.shared_parameters())
        for phase, groups in objective.phases().items()
    ]
    training = TrainingConfig.model_construct(precision="float32")
    batches = [on_meta(batch) for batch in case.batches(0, RankSlice(0, 1, micro_batches))]

    def step(*, log_step):
        context = StepContext(90, 100, log_step)
        assert _step(objective, updates, batches, context, NONE, training=training, device="meta").nonfinite is None

    step(log_step=False)  # constants are there from now on
    for log_step in (False, True):
        reads.clear()
        with HostToDevice() as seen:
            step(log_step=log_step)
        assert len(reads) == len(updates)
        assert seen.waited_for == []
        assert len(seen.sent) >= len(updates)  # a phase's requests, beside scalars that the host knows


def test_colours_change_on_the_device_without_waiting():
    """They wait for it in the workers' place: `finish`, of a batch that has just arrived."""
    config = pretraining.config_of()
    batches = PretrainBatches.__new__(PretrainBatches)
    batches.config = config.data
    batch = pretraining.batch_of(config)._replace(colours=torch.rand(4, 4, 10))
    moved_batch = on_meta(batch)
    with HostToDevice() as seen:
        done = batches.finish(moved_batch)
    assert done.global_views.shape == batch.global_views.shape
    assert seen.waited_for == seen.sent == []


def test_what_waits_is_seen():
    x = torch.zeros(3, device="meta")
    with HostToDevice() as seen:
        torch.tensor((1.0, 2.0, 3.0), device="meta")
        x.new_tensor((1.0, 2.0))
        x[[0, 1]]
        torch.rand(3).to(x)
        x.copy_(torch.rand(3))
        x.index_put((torch.tensor([0]),), x[:1])
    assert len(seen.waited_for) == 6
    with HostToDevice() as seen:
        send(torch.rand(3), "meta")
        x.copy_(torch.rand(3), non_blocking=True)
        x + torch.tensor(2.0)
    assert (seen.waited_for, len(seen.sent)) == ([], 2)
    for asked in (bool, float, torch.Tensor.item, torch.Tensor.tolist, torch.nonzero, lambda y: y[y > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            asked(x[:1])


def test_a_constant_gets_there_once():
    like = torch.zeros(2, dtype=torch.float64)
    first = constant((0.1, 0.2), like)
    assert first.tolist() == [0.1, 0.2]
    assert constant((0.1, 0.2), like) is first
    assert constant((0.1, 0.2), like.float()).dtype == torch.float32
    with torch.inference_mode():
        made = constant((0.3,), like)
    torch.ones(1, dtype=torch.float64, requires_grad=True).mul(made).sum().backward()
