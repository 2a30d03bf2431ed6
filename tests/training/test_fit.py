"""The loop on a problem of a few numbers: it learns, resumes exactly, stops when asked, and refuses NaN."""

import csv
import errno
import gc
import json
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from vtp.device import computing
from vtp.finite import NotFiniteError
from vtp.step import AdamwMatrices, OptimConfig, ParameterGroup, StepContext, StepCost, Term
from vtp.training.fit import FlopsLength, Run, SamplesLength, TrainingConfig, fit, run_length
from vtp.training.log import Curves, Means
from vtp.training.optim import build_optimizer, learning_rate, set_rates

TRAINING = TrainingConfig(
    length=SamplesLength(name="samples", samples=1),
    precision="float32",
    communication="float32",
    log_every=3,
    max_skipped=1,
)
OPTIM = OptimConfig(
    matrices=AdamwMatrices(name="adamw"),
    lr=0.05,
    reference_batch=None,
    final_lr=0.0,
    schedule="cosine",
    warmup=0.1,
    beta1=0.9,
    beta2=0.99,
    eps=1e-8,
    weight_decay=0.01,
    final_weight_decay=0.01,
    clip_norm=1.0,
    clip_by="whole",
)


class Pairs(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Lines(Dataset):
    """y = x @ (1, -2, 3); a batch is a function of the step."""

    def __init__(self, poisoned=None):
        self.poisoned = poisoned or ()

    def __getitem__(self, step):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        y = x @ torch.tensor([1.0, -2, 3])
        return Pairs(x, y * float("nan") if step in self.poisoned else y)


class Regression(nn.Module):
    """Two phases that train two layers, each on two terms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 1, bias=False), nn.Linear(3, 1)
        self.register_buffer("steps", torch.zeros(()))

    def phases(self):
        return {name: [ParameterGroup(list(getattr(self, name).parameters()))] for name in ("first", "second")}

    def shared_parameters(self):
        return [self.first.weight]

    def terms(self, phase, micro_batches, context):
        assert 0 <= context.progress < 1
        layer = getattr(self, phase)
        for batch in micro_batches:
            loss = (layer(batch.x)[:, 0] - batch.y).square().mean() / len(micro_batches)
            yield Term("square", loss, {f"{phase}_loss": loss.detach()})
        for batch in micro_batches:
            yield Term("absolute", 0.1 * (layer(batch.x)[:, 0] - batch.y).abs().mean() / len(micro_batches))

    def after_step(self, context):
        self.steps += 1
        return {}


class Host:
    """A machine without terminals."""

    device, workers, timeout, peak_flops = "cpu", 0, 60, None
    checkpoint_seconds, checkpoint_share, checkpoints_kept = 1e9, 1.0, 2

    def __init__(self, folder, stop_after=None):
        self.folder, self.stop_after, self.count = folder, stop_after, 0

    @property
    def stop_requested(self):
        return self.stop_after is not None and self.count >= self.stop_after

    def stop(self):
        raise KeyboardInterrupt

    def update(self, n):
        self.count += n

    def set_postfix_str(self, s):
        self.said = s

    @contextmanager
    def progress(self, total, description, unit, done=0):
        self.count = done
        yield self


def train(host, *, steps=40, batches=None, micro_batches=1, **more):
    objective = Regression()
    optim = {"first": OPTIM, "second": OPTIM}
    run = Run(steps, TRAINING, optim, StepCost(1e6, {"square": 16}, 16), micro_batches)
    fit(objective, batches or Lines(), run, host=host, **more)
    return objective


def test_learns(tmp_path):
    objective = train(Host(tmp_path), steps=300)
    torch.testing.assert_close(objective.first.weight[0], torch.tensor([1.0, -2, 3]), atol=0.05, rtol=0)
    assert objective.steps == 300


@pytest.mark.parametrize("stops", [[7], [1, 2, 20], [39]])
def test_resume_is_exact(tmp_path, stops):
    whole = train(Host(tmp_path / "whole"))
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(Host(tmp_path / "parts", stop_after=stop))
    resumed = train(Host(tmp_path / "parts"))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    curves = [(tmp_path / name / "curves.csv").read_bytes() for name in ("whole", "parts")]
    assert curves[0] == curves[1]


def test_a_kill_between_checkpoints_repeats_the_steps_since(tmp_path):
    whole = train(Host(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(Host(tmp_path / "parts", stop_after=10))

    class Killed(Exception):
        pass

    class Killing(Lines):
        def __getitem__(self, step):
            if step == 25:
                raise Killed
            return super().__getitem__(step)

    with pytest.raises(Killed):
        train(Host(tmp_path / "parts"), batches=Killing())
    resumed = train(Host(tmp_path / "parts"))
    assert torch.equal(whole.first.weight, resumed.first.weight)
    assert (tmp_path / "whole/curves.csv").read_bytes() == (tmp_path / "parts/curves.csv").read_bytes()


def test_nothing_collects_garbage_but_the_step(tmp_path, monkeypatch):
    """Every so many steps, on all ranks after the same one."""
    monkeypatch.setattr("vtp.training.garbage.EVERY", 20)
    seen, collected = set(), []

    class Seeing(Lines):
        def __getitem__(self, step):
            seen.add(gc.isenabled())
            return super().__getitem__(step)

    def collect(phase, info):
        if phase == "stop":
            collected.append(info["generation"])

    gc.callbacks.append(collect)
    try:
        train(Host(tmp_path), batches=Seeing())
    finally:
        gc.callbacks.remove(collect)
    assert seen == {False}
    assert gc.isenabled()
    assert collected[:3] == [2, 1, 1]  # all at the start, then after 20 and 40 steps
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_products_of_a_run_are_rounded_where_it_says_so(tmp_path, precision):
    """Forward and backward; before and after it they are as they were."""
    seen = set()

    class Seeing(Regression):
        def terms(self, phase, micro_batches, context):
            for term in super().terms(phase, micro_batches, context):
                term.loss.register_hook(lambda _: note())
                note()
                yield term

    def note():
        seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    before = torch.backends.cudnn.allow_tf32
    run = Run(
        2, TRAINING.model_copy(update={"precision": precision}), {"first": OPTIM, "second": OPTIM}, StepCost(1, {}, 1)
    )
    fit(Seeing(), Lines(), run, host=Host(tmp_path))
    assert seen == {(precision == "tf32",) * 2}
    assert torch.backends.cudnn.allow_tf32 == before
    with computing("tf32", "cpu"):
        assert torch.backends.cuda.matmul.allow_tf32
        with computing("bfloat16", "cpu"):
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16


def test_nan_stops_and_names_the_place(tmp_path):
    with pytest.raises(
        NotFiniteError, match=r"step 5: the gradient is not finite, phase first, from square \(loss\) on rank 0"
    ):
        train(Host(tmp_path), batches=Lines(poisoned=(3, 5)))


def test_curves_are_means_over_intervals(tmp_path):
    train(Host(tmp_path), steps=7)
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6, 7]
    assert float(rows[2]["first_lr"]) == pytest.approx(learning_rate(OPTIM, 6, 7), rel=1e-4)
    assert float(rows[0]["first_lr"]) == pytest.approx(sum(learning_rate(OPTIM, s, 7) for s in range(3)) / 3, rel=1e-4)


def test_half_a_row_is_dropped(tmp_path):
    path = tmp_path / "curves.csv"
    path.write_text("step,a,b\n1,2,3\n2,3")
    curves = Curves(path, start=5)
    curves.write(3, {"a": 1.0, "c": 2.0})
    assert path.read_text() == "step,a,b,c\n1,2,3,\n3,1,,2\n"


def test_means_survive_a_checkpoint():
    means, copy = Means(), Means()
    means.add({"a": 1.0, "gone": float("nan")})
    copy.load(json.loads(json.dumps(means.state())))
    copy.add({"a": torch.tensor(4.0), "b": 2})
    assert copy.take() == {"a": 2.5, "b": 2.0}
    assert copy.take() == {}


def test_run_length():
    assert run_length(SamplesLength(name="samples", samples=1000), samples=64, flops=1e9) == (16, 1024, 16e9)
    assert run_length(FlopsLength(name="flops", flops=9.6e9), samples=64, flops=1e9) == (10, 640, 1e10)
    assert run_length(SamplesLength(name="samples", samples=1), samples=64, flops=1e9).steps == 1


def test_schedule():
    rates = [learning_rate(OPTIM, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.005)
    assert rates[9] == rates[10] == max(rates) == 0.05
    assert rates[55] == pytest.approx(0.025)
    assert rates[99] < 1e-4
    constant = OPTIM.model_copy(update={"schedule": "constant"})
    assert learning_rate(constant, 99, 100) == 0.05


def test_groups_have_their_own_rates():
    optim = OPTIM.model_copy(update={"warmup": 0.0, "weight_decay": 0.1, "final_weight_decay": 0.3})
    slow, late = nn.Linear(3, 2), nn.Linear(2, 2, bias=False)
    groups = [
        ParameterGroup(list(slow.parameters()), lr=0.5, weight_decay=2.0),
        ParameterGroup(list(late.parameters()), frozen_until=0.5),
    ]
    optimizer = build_optimizer(groups, optim)
    matrix, bias, prototypes = optimizer.param_groups
    assert set_rates(optimizer, optim, StepContext(0, 10, False)) == 0.05
    assert (matrix["lr"], bias["lr"], prototypes["lr"]) == (0.025, 0.025, 0.0)
    assert (matrix["weight_decay"], bias["weight_decay"], prototypes["weight_decay"]) == (0.2, 0.0, 0.1)
    set_rates(optimizer, optim, StepContext(5, 10, False))
    assert prototypes["lr"] == pytest.approx(0.025)
    assert prototypes["weight_decay"] == pytest.approx(0.2)  # half way between 0.1 and 0.3
    with pytest.raises(ValueError, match="more than one"):
        build_optimizer([groups[0], groups[0]], optim)


def test_a_skipped_step_changes_nothing_but_the_count(tmp_path):
    """One poisoned batch of forty: the run goes on, and its curves say so."""
    objective = train(Host(tmp_path), batches=Lines(poisoned=(7,)))
    assert torch.isfinite(objective.first.weight).all()
    assert objective.steps == 39  # averages do not follow a skipped step
    with (tmp_path / "curves.csv").open() as file:
        skipped = [float(row["skipped"]) for row in csv.DictReader(file)]
    assert skipped[2] == pytest.approx(1 / 3, rel=1e-4)
    assert sum(skipped) == pytest.approx(1 / 3, rel=1e-4)


def test_micro_batches_are_one_batch(tmp_path):
    """Eight small batches a step give the gradient of their union."""

    class Union(Lines):
        def __getitem__(self, step):
            parts = [Lines()[8 * step + number] for number in range(8)]
            return Pairs(*(torch.cat(part) for part in zip(*parts, strict=True)))

    small, large = train(Host(tmp_path / "small"), micro_batches=8), train(Host(tmp_path / "large"), batches=Union())
    torch.testing.assert_close(small.first.weight, large.first.weight, atol=1e-5, rtol=0)


def test_gradient_geometry(tmp_path):
    """Norms and the cosine of both terms, against autograd."""
    train(Host(tmp_path), steps=3)
    with (tmp_path / "curves.csv").open() as file:
        (row,) = csv.DictReader(file)
    objective = Regression()
    batch, optim = Lines()[2], OPTIM
    state = build_optimizer(objective.phases()["first"], optim)
    for step in range(3):
        batch, context = Lines()[step], StepContext(step, 3, False)
        gradients = []
        for term in objective.terms("first", [batch], context):
            gradients.append(torch.autograd.grad(term.loss, objective.first.weight)[0].flatten())
        objective.first.weight.grad = sum(gradients)[None].clone()
        torch.nn.utils.clip_grad_norm_([objective.first.weight], 1.0)
        set_rates(state, optim, context)
        state.step()
    square, absolute = gradients
    assert float(row["trunk_gradient_square"]) == pytest.approx(float(square.norm()), rel=1e-4)
    cosine = torch.cosine_similarity(square, absolute, dim=0)
    assert float(row["gradient_cosine_square_absolute"]) == pytest.approx(float(cosine), rel=1e-4)


def test_rates_are_written(tmp_path):
    host = Host(tmp_path)
    host.peak_flops = 1e9
    train(host, steps=6)
    with (tmp_path / "throughput.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6]
    for row in rows:
        assert float(row["square_images_per_second"]) > 0
        assert 0 <= float(row["data_wait_share"]) <= 1
        utilisation = float(row["flops_per_second"]) / 1e9
        assert float(row["model_flops_utilisation"]) == pytest.approx(utilisation, rel=1e-4)
    assert float(rows[1]["flops_so_far"]) == 6e6
    assert "of peak" in host.said


def test_only_matrices_decay():
    modules = nn.ModuleList([nn.Linear(3, 2), nn.LayerNorm(2)])
    optimizer = build_optimizer([ParameterGroup(list(modules.parameters()))], OPTIM)
    decaying, plain = optimizer.param_groups
    assert [p.ndim for p in decaying["params"]] == [2]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert (decaying["decay_factor"], plain["decay_factor"]) == (1.0, 0.0)


def test_curves_that_no_disk_has_room_for_leave_nothing_half(tmp_path, monkeypatch):
    curves = Curves(tmp_path / "curves.csv", start=0)
    curves.write(1, {"loss": 1.0})
    before = (tmp_path / "curves.csv").read_text()

    def full(file, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vtp.training.log.write_csv", full)
    with pytest.raises(OSError, match="No space left"):
        curves.write(2, {"loss": 1.0, "other": 2.0})
    assert [path.name for path in tmp_path.iterdir()] == ["curves.csv"]
    assert (tmp_path / "curves.csv").read_text() == before
