"""LightningDiT against the official implementation's numbers."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vtp import LightningDiT
from vtp.artefact import ArtefactError
from vtp.config import ConfigError
from vtp.layers.grid_positions import turn
from vtp.models.generator_folder import OFFICIAL_DEFAULTS, SIZES, LightningDiTConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "lightningdit-tiny"


def config(**values) -> LightningDiTConfig:
    best = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "other_sizes": "extrapolate"}
    return LightningDiTConfig.parse(dict(OFFICIAL_DEFAULTS) | best | values, where="test")


SMALL = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}


def opened(values: LightningDiTConfig) -> LightningDiT:
    """A model whose gates are open, so that every layer acts on the output."""
    torch.manual_seed(0)
    model = LightningDiT(values)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_velocity_matches():
    model, io = LightningDiT.from_pretrained(GOLDEN), load_file(GOLDEN / "io.safetensors")
    assert io["y"].max() == model.null_label  # the golden batch holds the null class
    with torch.no_grad():
        velocity = model(io["x"], io["t"], io["y"])
    torch.testing.assert_close(velocity, io["velocity"], atol=1e-4, rtol=0)


def test_round_trip(tmp_path):
    model = LightningDiT.from_pretrained(GOLDEN)
    model.save_pretrained(tmp_path / "a")
    LightningDiT.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    golden, written = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "a/model.safetensors")
    assert golden.keys() == written.keys()
    assert all(torch.equal(value, written[key]) for key, value in golden.items())
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tables_are_the_official_buffers():
    """Positions and rotations computed here equal those that the official code stored."""
    fresh = LightningDiT(LightningDiT.from_pretrained(GOLDEN).config).state_dict()
    golden = load_file(GOLDEN / "model.safetensors")
    for key in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        torch.testing.assert_close(fresh[key], golden[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "millions"), [("B", 130.61), ("XL", 675.33), ("1p0B", 1029.50), ("1p6B", 1631.88)])
def test_parameter_counts(name, millions):
    size = SIZES[name]
    with torch.device("meta"):
        model = LightningDiT(config(input_size=16, patch_size=1, in_channels=64, **size._asdict()))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("options", [{}, {"wo_shift": True, "use_qknorm": True}, {"use_rmsnorm": False}])
def test_starts_at_zero(options):
    model = LightningDiT(config(**SMALL | options))
    x = torch.randn(2, 3, 4, 4)
    assert model(x, torch.rand(2), torch.tensor([0, 1000])).abs().max() == 0


def test_outputs_fill_patches_row_by_row_channels_last():
    model = LightningDiT(config(**SMALL | {"in_channels": 2}))
    model.final_layer.linear.bias.data = torch.arange(8.0)
    out = model(torch.zeros(1, 2, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    first = torch.tensor([[0.0, 2, 0, 2], [4, 6, 4, 6]]).repeat(2, 1)
    assert torch.equal(out[0], torch.stack([first, first + 1]))


def test_patches_return_to_their_place():
    """With closed gates tokens do not mix: a change in one patch of x changes that patch of the output only."""
    torch.manual_seed(0)
    model = LightningDiT(config(**SMALL))
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x, t, labels = torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    changed = x.clone()
    changed[..., 0, 3] = 1.0  # in the upper right patch
    difference = (model(changed, t, labels) - model(x, t, labels)).abs()
    assert (difference[..., :2, 2:] > 1e-4).all()
    difference[..., :2, 2:] = 0
    assert difference.max() == 0


@pytest.mark.parametrize("options", [{}, {"use_qknorm": True}, {"use_qknorm": True, "use_rmsnorm": False}])
def test_compiles_whole_and_runs_in_bfloat16(options):
    """No graph breaks, and autocast changes the velocity by rounding only."""
    torch._dynamo.reset()
    model = opened(config(**SMALL | options))
    inputs = torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 1000])
    expected = model(*inputs)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(*inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*inputs)
    assert low.dtype == torch.bfloat16
    assert (low - expected).abs().max() < 0.03 * expected.abs().max()


def test_permuting_the_batch_permutes_the_output():
    model = opened(config(**SMALL))
    x, t, labels = torch.randn(4, 3, 4, 4), torch.rand(4), torch.tensor([0, 5, 1000, 7])
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        expected = model(x, t, labels)[order]
        torch.testing.assert_close(model(x[order], t[order], labels[order]), expected, atol=1e-5, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_reads_official_checkpoints(tmp_path):
    shutil.copy(GOLDEN / "config.json", tmp_path)
    weights = load_file(GOLDEN / "model.safetensors")
    wrong = {f"module.{key}": torch.zeros_like(value) for key, value in weights.items()}
    torch.save({"model": wrong, "ema": weights}, tmp_path / "0100000.pt")
    for source in (tmp_path, tmp_path / "0100000.pt"):
        state = LightningDiT.from_pretrained(source).state_dict()
        assert all(torch.equal(state[key], value) for key, value in weights.items())
    torch.save({"model": wrong}, tmp_path / "0100000.pt")
    assert LightningDiT.from_pretrained(tmp_path).state_dict()["pos_embed"].abs().max() == 0


def test_refuses_damaged_checkpoints(tmp_path):
    shutil.copy(GOLDEN / "config.json", tmp_path)
    for content, message in (({"opt": {}}, "holds opt"), ([1], "holds a list"), ({"ema": Path()}, "plain tensors")):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ArtefactError, match=message):
            LightningDiT.from_pretrained(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"half")
    with pytest.raises(ArtefactError, match=r"a\.pt"):
        LightningDiT.from_pretrained(tmp_path)
    torch.save({}, tmp_path / "b.pt")
    with pytest.raises(ArtefactError, match=r"a\.pt, b\.pt"):
        LightningDiT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "values", [{"patch_size": 3}, {"num_heads": 3}, {"hidden_size": 30}, {"hidden_size": 36, "num_heads": 6}]
)
def test_refuses_impossible_sizes(values):
    with pytest.raises(ConfigError, match="test"):
        config(**SMALL | values)


@pytest.mark.parametrize("side", [1, 5, 8])
@pytest.mark.parametrize("options", [{}, {"use_rope": False}])
def test_another_square_is_that_of_a_model_of_its_size(side, options):
    """With plain indices."""
    model, other = (opened(config(**SMALL | options | {"input_size": 2 * size})) for size in (2, side))
    tables = {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k not in tables}, strict=False)
    x, t, labels = torch.randn(2, 3, 2 * side, 2 * side), torch.rand(2), torch.tensor([0, 1000])
    with torch.no_grad():
        assert torch.equal(model(x, t, labels), other(x, t, labels))
    assert model.state_dict().keys() == LightningDiT(config(**SMALL | options)).state_dict().keys()


@pytest.mark.parametrize("sizes", ["extrapolate", "interpolate"])
def test_positions_of_a_rectangle_are_the_closed_form(sizes):
    """Table and turned queries of every token by its row and column, in float64."""
    height, width, base, dim, heads = 3, 5, 2, 32, 2
    model = LightningDiT(config(**SMALL | {"other_sizes": sizes}))
    table, rotation = model._positions(height, width)
    scale = base / math.sqrt(height * width) if sizes == "interpolate" else 1.0
    x = torch.randn(1, 1, height * width, dim // heads)
    turned, complex_x = turn(x, rotation)[0, 0], torch.view_as_complex(x[0, 0].unflatten(-1, (-1, 2)).double())
    for row, column in itertools.product(range(height), range(width)):
        waves = []
        for place in (column, row):
            angles = [scale * place * 10000 ** (-k / (dim / 4)) for k in range(dim // 4)]
            waves += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        token = row * width + column
        torch.testing.assert_close(table[token], torch.tensor(waves), atol=1e-6, rtol=0)
        per_axis = dim // heads // 2
        angles = [scale * place * 10000 ** (-k / per_axis) for place in (row, column) for k in range(0, per_axis, 2)]
        expected = complex_x[token] * torch.polar(torch.ones(per_axis).double(), torch.tensor(angles).double())
        torch.testing.assert_close(turned[token].double(), torch.view_as_real(expected).flatten(), atol=1e-5, rtol=0)


def test_interpolation_leaves_the_stored_grid_as_it_is_and_spans_it_with_others():
    plain, scaled = (opened(config(**SMALL | {"other_sizes": sizes})) for sizes in ("extrapolate", "interpolate"))
    t, labels = torch.rand(2), torch.tensor([0, 1000])
    with torch.no_grad():
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(plain(x, t, labels), scaled(x, t, labels))
        x = torch.randn(2, 3, 8, 4)
        assert (plain(x, t, labels) - scaled(x, t, labels)).abs().max() > 1e-3
    table = scaled._positions(4, 4).table  # every second token is one of the stored grid
    torch.testing.assert_close(table.view(4, 4, -1)[::2, ::2].flatten(0, 1), scaled.pos_embed[0], atol=1e-6, rtol=0)


def test_rows_and_columns_keep_their_places_in_a_rectangle():
    """With closed gates a change in one patch of x changes that patch of the output only."""
    torch.manual_seed(0)
    model = LightningDiT(config(**SMALL))
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x, t, labels = torch.zeros(1, 3, 4, 10), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    changed = x.clone()
    changed[..., 0, 9] = 1.0
    difference = (model(changed, t, labels) - model(x, t, labels)).abs()
    assert (difference[..., :2, 8:] > 1e-4).all()
    difference[..., :2, 8:] = 0
    assert difference.max() == 0
    with pytest.raises(ValueError, match="latents are 4x9, no multiple of patch_size 2"):
        model(x[..., :9], t, labels)


def test_every_size_is_compiled_once_for_all_blocks():
    """And what was made while nothing could be learnt serves a training."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = opened(config(**SMALL))
    shapes = [(4, 4), (4, 8), (8, 4)]
    inputs = [(torch.randn(2, 3, *shape), torch.rand(2), torch.tensor([0, 1000])) for shape in shapes]
    with torch.inference_mode():
        expected = [model(*each).clone() for each in inputs]
    for block in model.blocks:
        block.compile(backend="eager", dynamic=False, fullgraph=True)
    for _ in range(2):
        for each, known in zip(inputs, expected, strict=True):
            found = model(*each)
            torch.testing.assert_close(found, known)
            found.sum().backward()
    # 4 x 8 and 8 x 4 have as many tokens, and are told apart by the tensors of their positions alone.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_what_has_no_official_name_stands_apart(tmp_path):
    model = LightningDiT(config(**SMALL | {"other_sizes": "interpolate"}))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).keys() == OFFICIAL_DEFAULTS.keys() | {"vtp_pipeline"}
    assert LightningDiT.from_pretrained(tmp_path).config == model.config
    assert LightningDiT.from_pretrained(GOLDEN).config.other_sizes == "extrapolate"


def test_says_what_does_not_fit(tmp_path):
    shutil.copy(GOLDEN / "model.safetensors", tmp_path)
    values = json.loads((GOLDEN / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"depth": 3}))
    with pytest.raises(ArtefactError, match=r"missing blocks\.2\."):
        LightningDiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"depth": 1}))
    with pytest.raises(ArtefactError, match=r"unknown blocks\.1\."):
        LightningDiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_classes": 8}))
    with pytest.raises(ArtefactError, match=r"y_embedder.embedding_table.weight has shape \[8, 96\]"):
        LightningDiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"learn_sigma": True}))
    with pytest.raises(ArtefactError, match="learn_sigma"):
        LightningDiT.from_pretrained(tmp_path)
