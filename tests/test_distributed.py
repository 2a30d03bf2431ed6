"""Two and four real gloo ranks against one process on the same global batch, and ranks that die or hang."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import (
    CASES,
    CONTRASTS,
    LR,
    OPEN_CLIP,
    PARALLEL,
    STEPS,
    cases_on,
    checkpointed,
    gradients_and_weights,
    layouts_on,
    moved_by_muon,
    reductions,
    rounded_gradients,
)
from safetensors.torch import load_file

from vtp.distributed import Board

pytestmark = pytest.mark.slow
WAYS = [(size, parallel) for size, ways in PARALLEL.items() for parallel in ways]
HERE = Path(__file__).parent


def launch(folder, size):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command += [str(HERE / "ranks.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"results-{size}-{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    results = launch(folder, 2)
    for parallel in ("ddp", "fsdp"):  # for four ranks and for one to resume from, as it was after three steps
        for name in ("copied", "single"):
            shutil.copytree(folder / f"checkpoints-{parallel}-2", folder / f"{name}-{parallel}")
            shutil.rmtree(folder / f"{name}-{parallel}" / "step-000000005")
    return results


@pytest.fixture(scope="module")
def four(folder, two):
    return launch(folder, 4)


@pytest.fixture(scope="module")
def one():
    return {case: gradients_and_weights(case) for case in CASES}


def ranks_of(request, size):
    return request.getfixturevalue({2: "two", 4: "four"}[size])


@pytest.mark.parametrize(
    ("size", "case", "layout"),
    [(size, case, layout) for size in (2, 4) for case in cases_on(size) for layout in layouts_on(size)],
    ids=lambda each: f"{each[0]}-{each[1]}-micro" if isinstance(each, tuple) else None,
)
def test_gradients_and_weights_are_those_of_one_process(request, one, size, case, layout):
    alone = one[case]
    for rank, results in enumerate(ranks_of(request, size)):
        together = results[(case, *layout)]
        assert together["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            # Zero by algebra, but for rounding: of a bias of attention's keys, or before a norm of single channels.
            floor = 1e-8 if gradient.norm() > 1e-8 else 1e-3
            error = (together["gradients"][name] - gradient).norm() / (gradient.norm() + floor)
            assert error < 1e-5, f"{name} on rank {rank}: {error}"
        for name, weight in alone["weights"].items():
            error = (together["weights"][name] - weight).abs().max()
            assert error <= 0.05 * LR * STEPS, f"{name} on rank {rank}: {error}"
        assert together["logs"] == pytest.approx(alone["logs"], rel=2e-4, abs=1e-5)


@pytest.mark.parametrize(("size", "parallel"), WAYS)
def test_muon_and_clipping_by_module_do_not_depend_on_ranks(request, parallel, size):
    """Weights within what Muon's products in bfloat16 differ by, norms of modules as always."""
    alone = moved_by_muon()
    assert {"0 model_gradient_norm_0", "0 model_gradient_norm_2"} < alone.keys()
    for results in ranks_of(request, size):
        for name, expected in alone.items():
            of_weights = name.endswith("weight")
            error = (results["muon", parallel][name] - expected).abs().max()
            assert error <= (0.1 * LR * STEPS if of_weights else 1e-4 * expected.abs().max() + 1e-7), f"{name}: {error}"


@pytest.mark.parametrize(("size", "parallel"), WAYS)
def test_what_travels_may_be_rounded(request, size, parallel):
    """Gradients in bfloat16 differ from those of one process by its rounding; the sum of all, by little."""
    alone = rounded_gradients()
    for results in ranks_of(request, size):
        together = results["rounded", parallel]
        assert together.keys() == alone.keys()
        difference = sum((together[name] - gradient).square().sum() for name, gradient in alone.items()).sqrt()
        length = sum(gradient.square().sum() for gradient in alone.values()).sqrt()
        assert 0 < difference / length < 0.03


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_travel_while_others_are_made(request, size):
    """The text tower's leave when CLIP has passed, heads' when self-supervision has, the rest as they are made."""
    for results in ranks_of(request, size):
        overlap = results["overlap"]
        assert overlap == ranks_of(request, size)[0]["overlap"]
        assert overlap["clip"] == overlap["ssl"] == 0 < overlap["reconstruction"] < overlap["the end"]
        assert overlap["the end"] >= 0.8 * overlap["all"]


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_compiled_and_recomputed_at_once(request, one, size):
    for results in ranks_of(request, size):
        for name, gradient in one["clip+ssl+ae"]["gradients"].items():
            error = (results["placed"][name] - gradient).norm() / (gradient.norm() + 1e-8)
            assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("size", [2, 4])
def test_reductions_are_exact(request, size):
    alone = reductions()
    everybody = [results["reductions"] for results in ranks_of(request, size)]
    for name in ("clip", "siglip", "koleo", "koleo in groups", "koleo of copies"):
        loss, scale, first, second = alone[name]
        parts = [of_rank[name] for of_rank in everybody]
        torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(sum(part[1] for part in parts), scale, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(torch.cat([part[2] for part in parts]), first, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(torch.cat([part[3] for part in parts]), second, rtol=1e-5, atol=1e-7)
    assert sum(float(of_rank["duplicates"][0]) for of_rank in everybody) == float(alone["duplicates"][0]) == 5 / 16
    for of_rank in everybody:
        plain, sharp = zip(of_rank["sinkhorn"], alone["sinkhorn"], strict=True)
        torch.testing.assert_close(*plain, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(*sharp, rtol=1e-6, atol=2e-4)  # logits are 90 times as large


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CONTRASTS)
def test_contrast_over_ranks_is_open_clips(request, name, size):
    """`golden/openclip-losses`: a part is a rank's loss over the number of ranks, where DDP averages."""
    golden = load_file(OPEN_CLIP / "io.safetensors")
    everybody = [results["contrasts"] for results in ranks_of(request, size)]

    kind = {"clip": "clip.local", "siglip": "siglip.bidir"}[name]
    for what in everybody[0][name, "float32"]:
        of_rows = what in ("grad_image", "grad_text")
        join = torch.cat if of_rows else torch.stack
        exact, rounded = (join([of_rank[name, d][what] for of_rank in everybody]) for d in ("float32", "bfloat16"))
        theirs, theirs_rounded = (golden[f"world{size}.{d}.{kind}.{what}"] / size for d in ("float32", "bfloat16"))
        torch.testing.assert_close(exact, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rounded, theirs_rounded, atol=0.03, rtol=0)
        alone = golden[f"world1.rounded.{name}.{what}"]
        torch.testing.assert_close(rounded if of_rows else rounded.sum(), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "parallel"), WAYS)
def test_a_step_that_is_not_finite_is_skipped_and_named(request, parallel, size):
    """Whose samples began it, though every rank's loss is NaN by then."""
    names = {"clip_images": "clip", "global_views": "ssl", "rec_images": "reconstruction"}
    for results in ranks_of(request, size):
        for field, (finite, origin, unmoved) in results["poisoned", parallel].items():
            assert not finite
            assert origin == f"{names[field]} (features) on rank {size - 1}"
            assert unmoved


@pytest.mark.parametrize(("size", "parallel"), WAYS)
def test_resume_on_equal_ranks_is_bit_identical(request, parallel, size):
    for results in ranks_of(request, size):
        resumed, through = results["resumed", parallel], results["through", parallel]
        assert results["saved", parallel]["losses"] + resumed["losses"] == through["losses"]
        for name, weight in through["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resume_on_other_ranks(folder, two, four, parallel):
    """Saved on two, resumed on four and on one: the same losses and weights within rounding."""
    through = two[0]["through", parallel]
    on_one = checkpointed("everything", folder / f"single-{parallel}", 3, 5)
    for resumed in (four[0]["from two", parallel], on_one):
        for ours, theirs in zip(resumed["losses"], through["losses"][3:], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        for name, weight in through["weights"].items():
            assert (resumed["weights"][name] - weight).abs().max() <= 0.05 * LR * 5, name


def test_a_board_of_one_rank_is_its_own():
    """On several: tests/curation/filter/test_measure_images.py."""
    board = Board()
    assert [board.add("a", 1), board.add("a", 2), board.add("b", 0)] == [1, 3, 0]
    assert board.read("text") is None
    board.post("text", "größe")
    assert board.read("text") == "größe"
    assert Board().add("a", 0) == 0
