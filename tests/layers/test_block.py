"""The transformer block against timm's, and stochastic depth."""

import pytest
import torch
from torch import nn

from vtp.layers.block import Block
from vtp.layers.drop_path import DropPath
from vtp.layers.rope import AxialRope, Rotation, rotate


def block(dim=32, heads=2, **changes) -> Block:
    options = {
        "mlp_ratio": 3.0,
        "ffn_layer": "swiglu",
        "norm_layer": "rmsnorm",
        "use_qk_norm": True,
        "init_values": None,
    }
    torch.manual_seed(0)
    return Block(dim, heads, **(options | changes))


@pytest.mark.parametrize("ffn", ["swiglu", "mlp"])
def test_equals_timms_block(ffn):
    from timm.models.eva import EvaBlock

    ours = block(ffn_layer=ffn, norm_layer="layernorm", use_qk_norm=False, init_values=0.1)
    swiglu = {"swiglu_mlp": True, "swiglu_align_to": 8, "mlp_ratio": 2.0} if ffn == "swiglu" else {"mlp_ratio": 3.0}
    theirs = EvaBlock(
        32, 2, **swiglu, init_values=0.1, num_prefix_tokens=1, qkv_fused=True, scale_mlp=False, rotate_half=True,
        norm_layer=lambda dim, **where: nn.LayerNorm(dim, eps=1e-6, **where),
    )  # fmt: skip
    names = {
        "ls1.gamma": "gamma_1",
        "ls2.gamma": "gamma_2",
        "mlp.w1": "mlp.fc1_g",
        "mlp.w2": "mlp.fc1_x",
        "mlp.w3": "mlp.fc2",
    }
    state = {}
    for key, value in ours.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)  # noqa: PLW2901
        state[key] = value
    bias = state.pop("attn.qkv.bias")
    state["attn.q_bias"], _, state["attn.v_bias"] = bias.chunk(3)
    with torch.no_grad():
        ours.attn.qkv.bias[32:64] = 0  # theirs has no bias on keys, which softmax ignores in any case
    missing, unknown = theirs.load_state_dict(state, strict=False)
    assert not unknown
    assert not [key for key in missing if "k_bias" not in key]
    x = torch.randn(3, 1 + 12, 32)
    rotation = AxialRope(16, torch.float32)(3, 4)
    rope = torch.cat([rotation.sin, rotation.cos], dim=-1)
    torch.testing.assert_close(ours(x, rotation), theirs(x, rope=rope), atol=1e-5, rtol=1e-5)


def test_rope_turns_by_relative_position():
    """Scores depend on the offset between patches, and the class token is not turned."""
    rope = AxialRope(16, torch.float64)
    rotation = rope(5, 5)
    q, k = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    turned_q, turned_k = (rotate(x.expand(1, 1, 26, 16), rotation)[0, 0] for x in (q, k))
    assert torch.equal(turned_q[0], q)
    scores = (turned_q[1:] @ turned_k[1:].T).view(5, 5, 5, 5)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 1, 3, 3])
    assert not torch.isclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])


def test_dropped_samples_keep_their_input():
    layer = block()
    x = torch.randn(4, 5, 32)
    rotation = Rotation(torch.zeros(4, 16), torch.ones(4, 16))
    # The last fills up the shape: it counts nothing.
    computed = DropPath(torch.tensor([[0, 2, 3], [0, 2, 3]]), torch.tensor([[2.0, 2, 0], [2, 2, 0]]))
    out = layer(x, rotation, computed)
    assert torch.equal(out[[1, 3]], x[[1, 3]])
    half = x[[0, 2]] + 2 * layer.attn(layer.norm1(x[[0, 2]]), rotation)
    torch.testing.assert_close(out[[0, 2]], half + 2 * layer.mlp(layer.norm2(half)))


def test_all_kept_is_no_drop():
    layer, x = block(), torch.randn(3, 5, 32)
    rotation = Rotation(torch.zeros(4, 16), torch.ones(4, 16))
    everything = DropPath(torch.arange(3).expand(2, 3), torch.ones(2, 3))
    torch.testing.assert_close(layer(x, rotation, everything), layer(x, rotation))


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width 30 is not divisible by 4 heads"):
        block(30, 4)
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        AxialRope(6, torch.float32)
