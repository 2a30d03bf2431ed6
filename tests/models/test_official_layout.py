"""The official layout: what its code accepts is read as it takes it, anything else is refused by name, nothing is lost."""

import json
from itertools import product
from typing import get_args

import pytest
import torch
from foreign import GOLDEN
from safetensors.torch import load_file, save_file

from vtp import VisualTokenizer
from vtp.artefact import ArtefactError
from vtp.layers.block import FfnName, ffn_width
from vtp.layers.norm import NormName
from vtp.models.official_layout import OFFICIAL_DEFAULTS
from vtp.models.tokenizer import TokenizerConfig, read_config

TINY = json.loads((GOLDEN / "vtp-tiny/config.json").read_text())
VISION = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5, "use_qk_norm": False}
VISION |= {"ffn_layer": "mlp", "norm_layer": "rmsnorm", "init_values": None, "feature_bottleneck": 8}
VISION |= {"bottleneck_ae_only": True, "clip_feat": "cls"}
DECODER = {"embed_dim": 16, "depth": 1, "num_heads": 2, "ffn_layer": "swiglu", "norm_layer": "layernorm"}
DECODER |= {"use_qk_norm": True, "init_values": 0.1}
TEXT = {"context_length": 8, "vocab_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}


def tokenizer_of(vision=(), decoder=(), text=(), **top):
    """With random weights; None in place of changes leaves a part out."""
    torch.manual_seed(0)
    values = {"image_size": 32, "rope_dtype": "bfloat16", "decoder_upscale": 16, "vision": VISION | dict(vision)}
    values["decoder"] = None if decoder is None else DECODER | dict(decoder)
    values["text"] = None if text is None else TEXT | dict(text)
    return VisualTokenizer(TokenizerConfig.parse(values | top, where="test")).eval()


def published(tokenizer, folder, **changes):
    """As the authors would publish it: without what only we write, and with changes to the flat file."""
    tokenizer.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    del values["vtp_pipeline"]
    values = {key: value for key, value in (values | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def config_with(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in (TINY | changes).items() if value is not ...}))
    return path


@torch.no_grad()
def assert_equal(one, other):
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 32, (2, 8))
    pairs = [(one.encode(images), other.encode(images))]
    if one.config.decoder is not None:
        pairs.append((one.decode(pairs[0][0]), other.decode(pairs[0][0])))
    if one.config.text is not None:
        pairs += [(one.encode_text(tokens), other.encode_text(tokens)), (one.logit_scale, other.logit_scale)]
        pairs.append((one.encode_image(images), other.encode_image(images)))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("ffn", "norm"), list(product(get_args(FfnName), get_args(NormName))))
def test_every_feed_forward_and_norm(ffn, norm, tmp_path):
    other = get_args(FfnName)[get_args(FfnName).index(ffn) - 1]
    tokenizer = tokenizer_of({"ffn_layer": ffn, "norm_layer": norm}, {"ffn_layer": other, "norm_layer": norm})
    assert_equal(tokenizer, VisualTokenizer.from_pretrained(published(tokenizer, tmp_path / "a")))


@pytest.mark.parametrize(
    ("hidden", "widths"),
    [
        (96, (64, 64, 64, 128, 96)),
        (36, (24, 32, 64, 128, 36)),
        (30, (24, 32, 64, 128, 30)),
        (400, (272, 288, 320, 384, 400)),
    ],
)
def test_hidden_widths(hidden, widths):
    names = ("swiglu", "swiglu32", "swiglu64", "swiglu128", "mlp")
    assert tuple(ffn_width(name, hidden) for name in names) == widths


@pytest.mark.parametrize("pool", ["first", "last", "argmax", "none"])
@pytest.mark.parametrize(("projection", "bias"), [("none", False), ("linear", False), ("linear", True)])
@pytest.mark.parametrize("causal", [True, False])
def test_every_text_option(pool, projection, bias, causal, tmp_path):
    options = {"pool_type": pool, "proj_type": projection, "proj_bias": bias, "no_causal_mask": not causal}
    options |= {"ls_init_value": 0.5, "quick_gelu": causal, "pad_id": 3, "output_tokens": bias}
    tokenizer = tokenizer_of(text=options, init_logit_bias=-3.0 if bias else None, nonscalar_logit_scale=causal)
    read = VisualTokenizer.from_pretrained(published(tokenizer, tmp_path / "a"))
    assert_equal(tokenizer, read)
    assert read.config == tokenizer.config.model_copy(update={"decoder_upscale": None})
    assert hasattr(read, "logit_bias") == bias
    assert read.logit_scale.shape == ((1,) if causal else ())


@pytest.mark.parametrize("latents", ["clip reads the trunk", "clip reads latents"])
@pytest.mark.parametrize("feature", ["cls", "pooled"])
@pytest.mark.parametrize("channels", [8, 24])
def test_every_clip_feature(latents, feature, channels, tmp_path):
    vision = {"feature_bottleneck": channels, "clip_feat": feature, "bottleneck_ae_only": "trunk" in latents}
    tokenizer = tokenizer_of(vision)
    read = VisualTokenizer.from_pretrained(published(tokenizer, tmp_path / "a"))
    assert_equal(tokenizer, read)
    assert ("trunk.feature_bottleneck.weight" in read.state_dict()) == (channels != 24)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        trunk = read.features(images)
        if "latents" in latents:
            trunk = type(trunk)(*map(read.trunk.feature_bottleneck, trunk))
        seen = trunk.cls if feature == "cls" else trunk.patches.mean(1)
        torch.testing.assert_close(
            read.encode_image(images), torch.nn.functional.normalize(read.visual_proj(seen), dim=1)
        )


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_the_official_decoder_enlarges_by_16_whatever_the_patch(patch_size, tmp_path):
    tokenizer = tokenizer_of({"patch_size": patch_size})
    read = VisualTokenizer.from_pretrained(published(tokenizer, tmp_path / "a"))
    assert_equal(tokenizer, read)
    side = 32 // patch_size
    assert read.decode(torch.randn(1, 8, side, side)).shape == (1, 3, 16 * side, 16 * side)
    if patch_size == 16:
        read.require_decoder("a")
    else:
        with pytest.raises(ArtefactError, match=f"a: images of 32 pixels come back with {16 * side}"):
            read.require_decoder("a")
    read.save_pretrained(tmp_path / "b")
    assert_equal(read, VisualTokenizer.from_pretrained(tmp_path / "b"))


def test_our_own_decoder_enlarges_by_the_patch(tmp_path):
    """Also where a file was written before the key was."""
    tokenizer = tokenizer_of({"patch_size": 8}, decoder_upscale=None)
    tokenizer.save_pretrained(tmp_path / "a")
    assert_equal(tokenizer, VisualTokenizer.from_pretrained(tmp_path / "a"))
    path = tmp_path / "a/config.json"
    values = json.loads(path.read_text())
    assert values["vtp_pipeline"] == {"format_version": 1, "rope_dtype": "bfloat16", "decoder_upscale": None}
    del values["vtp_pipeline"]["decoder_upscale"]
    path.write_text(json.dumps(values))
    assert_equal(tokenizer, VisualTokenizer.from_pretrained(tmp_path / "a"))
    tokenizer.require_decoder("a")


@torch.no_grad()
def test_an_encoder_is_read_without_a_decoder(tmp_path):
    """Whatever the file says of one."""
    tokenizer = tokenizer_of(decoder=None)
    folder = published(tokenizer, tmp_path / "a", decoder_embed_dim=7, decoder_ffn_layer="whatever")
    read = VisualTokenizer.from_pretrained(folder)
    assert_equal(tokenizer, read)
    with pytest.raises(ArtefactError, match="published without a pixel decoder .* pre-train from it with --init-from"):
        read.decode(torch.zeros(1, 8, 2, 2))
    with pytest.raises(ArtefactError, match=r"nearby: this tokenizer was published without a pixel decoder"):
        read.require_decoder("nearby")
    read.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["train_reconstruction"] is False


@pytest.mark.parametrize(
    ("changes", "key", "meant"),
    [
        ({"vision_feature_bottleneck": None}, "vision.feature_bottleneck", 64),
        ({"vision_init_values": 0.0}, "vision.init_values", None),
        ({"decoder_init_values": 0}, "decoder.init_values", None),
        ({"text_ls_init_value": 0.0}, "text.ls_init_value", 0.0),
        ({"text_proj_type": "mlp"}, "text.proj_type", "linear"),
        ({"text_proj_type": None}, "text.proj_type", "linear"),
        ({"text_proj_type": "none"}, "text.proj_type", "none"),
        ({"text_output_tokens": True}, "text.output_tokens", True),
        ({"vision_mlp_ratio": 4}, "vision.mlp_ratio", 4.0),
        ({"train_clip": False, "text_pool_type": "x", "text_embed_cls": True}, "text", None),
        ({"transformers_version": "9", "_name_or_path": "here", "auto_map": {}}, "image_size", 64),
    ],
)
def test_values_mean_what_they_mean_to_the_official_code(changes, key, meant, tmp_path):
    value = read_config(config_with(tmp_path, **changes)).model_dump()
    for part in key.split("."):
        value = value[part]
    assert value == meant


def test_keys_that_are_left_out_have_official_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vtp"}')
    config = read_config(tmp_path / "config.json")
    assert (config.vision.embed_dim, config.vision.norm_layer, config.decoder.norm_layer) == (
        768,
        "rmsnorm",
        "layernorm",
    )
    assert (config.text.depth, config.text.pool_type, config.upscale) == (12, "argmax", 16)
    official = set(TINY) - {"architectures", "dtype", "model_type", "transformers_version"}
    assert official == set(OFFICIAL_DEFAULTS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"vision_ffn_layer": "swiglu16"},
            r"config\.json: vision_ffn_layer: .*'swiglu', 'swiglu32'.*'mlp' \(given: 'swiglu16'",
        ),
        ({"decoder_ffn_layer": None}, "decoder_ffn_layer: .*'swiglu128'"),
        ({"vision_norm_layer": "batchnorm"}, "vision_norm_layer: .*'rmsnorm', 'layernorm' or 'layernormbf16'"),
        ({"decoder_norm_layer": "LayerNorm"}, "decoder_norm_layer: .*'layernormbf16'"),
        ({"vision_clip_feat": "mean"}, "vision_clip_feat: .*'cls' or 'pooled'"),
        ({"text_pool_type": "eos"}, "text_pool_type: .*'argmax', 'first', 'last' or 'none'"),
        ({"text_embed_cls": True}, "text_embed_cls is True, known is false"),
        ({"vision_n_storage_tokens": 4}, "vision_n_storage_tokens: unknown key"),
        ({"train_clip": "no"}, "train_clip is 'no', expected true or false"),
        ({"train_reconstruction": None}, "train_reconstruction is None, expected true or false"),
        ({"nonscalar_logit_scale": 1}, "nonscalar_logit_scale: "),
        ({"vision_embed_dim": 30}, "vision.embed_dim 30 is not a multiple of 4 [*] vision.num_heads"),
        ({"vtp_pipeline": 3}, "vtp_pipeline: "),
        (
            {"vtp_pipeline": {"format_version": 2, "rope_dtype": "float32"}},
            r"vtp_pipeline\.format_version: .*should be 1",
        ),
    ],
)
def test_anything_else_is_refused_by_name(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_config(config_with(tmp_path, **changes))


def test_weights_of_another_width_are_named(tmp_path):
    """A name whose widths happen to differ shows in the file."""
    folder = published(tokenizer_of({"ffn_layer": "swiglu"}), tmp_path / "a", vision_ffn_layer="swiglu64")
    with pytest.raises(
        ArtefactError, match=r"trunk\.blocks\.0\.mlp\.w1\.bias has shape \[24\], config\.json asks for \[64\]"
    ):
        VisualTokenizer.from_pretrained(folder)
    extra = load_file(folder / "model.safetensors") | {"trunk.storage_tokens": torch.zeros(1, 4, 24)}
    save_file(extra, folder / "model.safetensors")
    with pytest.raises(ArtefactError, match=r"unknown trunk\.storage_tokens"):
        VisualTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@torch.no_grad()
def test_without_a_bottleneck_every_latent_has_unit_size(norm, tmp_path):
    """They are the features themselves, as wide as the encoder; reading back what was written changes nothing."""
    tokenizer = tokenizer_of(vision=VISION | {"feature_bottleneck": None, "norm_layer": norm})
    assert not any(name.startswith("trunk.norm.") for name in tokenizer.state_dict())
    images = torch.randn(2, 3, 32, 48)
    latents = tokenizer.encode(images)
    width = tokenizer.feature_dim
    assert latents.shape[1] == width == tokenizer.latent_shape[0]
    torch.testing.assert_close(latents.square().mean(1), torch.ones_like(latents[:, 0]), rtol=1e-2, atol=0)
    if norm == "layernorm":
        torch.testing.assert_close(latents.mean(1), torch.zeros_like(latents[:, 0]), rtol=0, atol=1e-5)
    features = tokenizer.features(images)
    assert torch.equal(latents.flatten(2).transpose(1, 2), features.patches)
    assert torch.equal(tokenizer.mean_latent(features), features.patches.mean(1))
    tokenizer.save_pretrained(tmp_path / "a")
    read = VisualTokenizer.from_pretrained(tmp_path / "a")
    assert read.config.vision.feature_bottleneck is None
    assert_equal(tokenizer, read)
