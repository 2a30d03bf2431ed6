"""The loop on a problem of a few numbers: it learns, resumes exactly, stops when asked, and refuses NaN."""

import csv
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from vtp.training.checkpoint import Checkpoints
from vtp.training.fit import Flops, NotFinite, Samples, TrainingConfig, fit, plan
from vtp.training.log import Curves, Means
from vtp.training.optim import OptimConfig, build_optimizer, learning_rate

TRAINING = TrainingConfig(length=Samples(name="samples", samples=1), precision="float32", log_every=3)
OPTIM = OptimConfig(
    lr=0.05,
    final_lr=0.0,
    schedule="cosine",
    warmup=0.1,
    beta1=0.9,
    beta2=0.99,
    eps=1e-8,
    weight_decay=0.01,
    clip_norm=1.0,
)


class Pairs(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Lines(Dataset):
    """y = x @ (1, -2, 3); a batch is a function of the step."""

    def __init__(self, poisoned=None):
        self.poisoned = poisoned

    def __getitem__(self, step):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        y = x @ torch.tensor([1.0, -2, 3])
        return Pairs(x, y * float("nan") if step == self.poisoned else y)


class Regression(nn.Module):
    """Two phases that train two layers, each on two terms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 1, bias=False), nn.Linear(3, 1)
        self.register_buffer("steps", torch.zeros(()))

    def phases(self):
        return {"first": [self.first], "second": [self.second]}

    def losses(self, phase, batch, step, progress):
        assert 0 <= progress < 1
        layer = getattr(self, phase)
        loss = (layer(batch.x)[:, 0] - batch.y).square().mean()
        yield loss, {f"{phase}_loss": loss.detach()}
        yield 0.1 * (layer(batch.x)[:, 0] - batch.y).abs().mean(), {}

    def after_step(self, step):
        self.steps += 1


class Host:
    """A machine without terminals."""

    device, workers, checkpoint_seconds = "cpu", 0, 1e9

    def __init__(self, folder, stop_after=None):
        self.folder, self.stop_after, self.count = folder, stop_after, 0

    @property
    def stop_requested(self):
        return self.stop_after is not None and self.count >= self.stop_after

    def stop(self):
        raise KeyboardInterrupt

    def update(self, n):
        self.count += n

    @contextmanager
    def progress(self, total, description, unit, done=0):
        self.count = done
        yield self


def train(host, *, steps=40, batches=None):
    objective = Regression()
    fit(
        objective,
        batches or Lines(),
        steps=steps,
        training=TRAINING,
        optim={"first": OPTIM, "second": OPTIM},
        host=host,
    )
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


def test_damaged_checkpoint_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": torch.tensor(step)})
    paths = sorted(tmp_path.glob("*.pt"))
    assert len(paths) == 2  # the newest two are kept
    paths[-1].write_bytes(paths[-1].read_bytes()[:-7])
    newest = checkpoints.newest()
    assert newest.step == 2
    assert newest.state["x"] == 2
    assert len(list(tmp_path.glob("*.pt"))) == 1


def test_nan_stops_and_names_the_place(tmp_path):
    with pytest.raises(NotFinite, match="step 5, phase first: gradient norm is nan"):
        train(Host(tmp_path), batches=Lines(poisoned=5))


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
    means.add({"a": 1.0})
    copy.load_state_dict(means.state_dict())
    copy.add({"a": torch.tensor(4.0), "b": 2})
    assert copy.take() == {"a": 2.5, "b": 2.0}
    assert copy.take() == {}


def test_plan():
    assert plan(Samples(name="samples", samples=1000), samples=64, flops=1e9) == (16, 1024, 16e9)
    assert plan(Flops(name="flops", flops=9.6e9), samples=64, flops=1e9) == (10, 640, 1e10)
    assert plan(Samples(name="samples", samples=1), samples=64, flops=1e9).steps == 1


def test_schedule():
    rates = [learning_rate(OPTIM, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.005)
    assert rates[9] == rates[10] == max(rates) == 0.05
    assert rates[55] == pytest.approx(0.025)
    assert rates[99] < 1e-4
    constant = OPTIM.model_copy(update={"schedule": "constant"})
    assert learning_rate(constant, 99, 100) == 0.05


def test_only_matrices_decay():
    optimizer = build_optimizer([nn.Linear(3, 2), nn.LayerNorm(2)], OPTIM)
    decaying, plain = optimizer.param_groups
    assert [p.ndim for p in decaying["params"]] == [2]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
