"""A generator that is told captions, against closed forms and against one that is told nothing."""

import pytest
import torch
import torch.nn.functional as F

from vtp.artefact import ArtefactError
from vtp.flow import flow_matching_loss, sample
from vtp.layers.captions import Captions
from vtp.models.captions import CaptionEmbed, CrossAttention, TextCondition
from vtp.models.generator_folder import LightningDiTConfig
from vtp.models.lightningdit import LightningDiT

READINGS = ("cross_attention", "joint")


def config_of(reading="cross_attention", **changes):
    text = None if reading is None else TextCondition(width=12, length=5, reading=reading)
    given = {"input_size": 4, "patch_size": 1, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2}
    given |= {"mlp_ratio": 2.0, "num_classes": 0 if text else 7, "text": text}
    flags = dict.fromkeys(("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm"), True)
    return LightningDiTConfig(**given | flags | {"wo_shift": False, "other_sizes": "extrapolate"} | changes)


def model_of(reading="cross_attention", **changes):
    torch.manual_seed(0)
    model = LightningDiT(config_of(reading, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def captions_of(lengths=(5, 2), width=12, length=5):
    features = torch.randn(len(lengths), length, width, generator=torch.Generator().manual_seed(1))
    return Captions(features, torch.arange(length) < torch.tensor(lengths)[:, None])


def inputs(count=2):
    draws = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, 4, 4, generator=draws), torch.rand(count, generator=draws)


def test_cross_attention_is_that_of_a_softmax_over_the_tokens_that_are_there():
    layer = CrossAttention(8, 2, q_norm=torch.nn.Identity(), k_norm=torch.nn.Identity()).double()
    x, text = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 4, 8, dtype=torch.float64)
    ours = layer(x, Captions(text, torch.tensor([[True, True, True, False]])))
    q, (k, v) = layer.q(x[0]), layer.kv(text[0, :3]).chunk(2, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = ((q[:, head] @ k[:, head].T) / 2).exp()
        heads.append(weights @ v[:, head] / weights.sum(1, keepdim=True))
    torch.testing.assert_close(ours[0], layer.proj(torch.cat(heads, dim=1)), atol=1e-12, rtol=0)


def test_a_null_caption_is_the_learnt_vector_and_nothing_else():
    embed = CaptionEmbed(12, 16)
    torch.nn.init.normal_(embed.null)
    tokens, mask = embed(captions_of((0, 2)))
    assert mask.tolist() == [[True] + [False] * 4, [True, True] + [False] * 3]
    assert torch.equal(tokens[0, 0], embed.null)
    assert not torch.equal(tokens[1, 0], embed.null)


@pytest.mark.parametrize("reading", READINGS)
def test_padding_is_never_looked_at(reading):
    model, (x, t) = model_of(reading), inputs()
    captions = captions_of()
    other = torch.where(captions.mask[..., None], captions.features, 1e4)
    assert torch.equal(model(x, t, captions), model(x, t, captions._replace(features=other)))


@pytest.mark.parametrize("reading", READINGS)
def test_what_is_said_and_its_order_matter_to_a_sample_alone(reading):
    model, (x, t) = model_of(reading), inputs()
    captions = captions_of()
    changed = captions._replace(features=captions.features.clone())
    changed.features[1] += 1
    before, after = model(x, t, captions), model(x, t, changed)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_a_fresh_model_is_one_that_is_told_nothing():
    """The layers that read start as zero, so a model of classes is a warm start."""
    torch.manual_seed(0)
    text, plain = LightningDiT(config_of()), LightningDiT(config_of(None))
    own = {name: value for name, value in plain.state_dict().items() if not name.startswith("y_embedder")}
    text.load_state_dict(own, strict=False)
    torch.nn.init.zeros_(plain.y_embedder.embedding_table.weight)
    for model in (text, plain):
        torch.nn.init.constant_(model.final_layer.linear.weight, 0.1)
        for block in model.blocks:
            torch.nn.init.constant_(block.adaLN_modulation[1].weight, 0.01)
    x, t = inputs()
    assert torch.equal(text(x, t, captions_of()), plain(x, t, torch.tensor([0, 3])))


@pytest.mark.parametrize("reading", READINGS)
def test_every_parameter_learns(reading):
    model, (x, t) = model_of(reading), inputs()
    loss = flow_matching_loss(model, x, captions_of((0, 3)), t=t, noise=torch.randn_like(x))
    loss.mse.sum().backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


@pytest.mark.parametrize("reading", READINGS)
def test_guidance_leads_away_from_the_null_caption(reading):
    model, (noise, _) = model_of(reading), inputs()
    captions = captions_of()
    options = {"solver": "euler", "steps": 1, "timestep_shift": 0}
    plain = sample(model, noise, captions, **options)
    null = sample(model, noise, captions._replace(mask=torch.zeros_like(captions.mask)), **options)
    guided = sample(model, noise, captions, guidance_scale=3.0, **options)
    torch.testing.assert_close(guided, null + 3 * (plain - null), atol=1e-5, rtol=0)


def test_dropped_captions_have_no_tokens():
    model, captions = model_of(), captions_of()
    assert model.without(captions, torch.tensor([False, True])).mask.sum(1).tolist() == [5, 0]
    assert not model.without(captions).mask.any()


@pytest.mark.parametrize("reading", READINGS)
def test_a_folder_gives_the_model_back(reading, tmp_path):
    model, (x, t) = model_of(reading), inputs()
    model.text_encoder = {"encoder": {"name": "tokenizer"}, "digest": "d"}
    model.save_pretrained(tmp_path / "generator")
    again = LightningDiT.from_pretrained(tmp_path / "generator")
    assert torch.equal(model(x, t, captions_of()), again(x, t, captions_of()))
    assert again.text_encoder == model.text_encoder


@pytest.mark.parametrize("changes", [{"num_classes": 7}, {"text": None, "num_classes": 0}])
def test_a_generator_is_told_one_thing(changes):
    with pytest.raises(ValueError, match="is told classes, or captions"):
        config_of(**changes)


def test_official_files_know_nothing_of_captions(tmp_path):
    model_of(None).save_pretrained(tmp_path / "generator")
    assert "text" not in (tmp_path / "generator" / "config.json").read_text()


def test_attention_over_a_masked_row_is_as_without_it():
    """What the model relies on: padding has no part in torch's attention."""
    q, k, v = (torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    mask = torch.tensor([True, True, False])[None, None, None]
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(masked, F.scaled_dot_product_attention(q, k[:, :, :2], v[:, :, :2]))


def test_a_damaged_folder_is_refused(tmp_path):
    model_of().save_pretrained(tmp_path / "generator")
    path = tmp_path / "generator" / "config.json"
    path.write_text(path.read_text().replace('"width": 12', '"width": 13'))
    with pytest.raises(ArtefactError, match="y_embedder"):
        LightningDiT.from_pretrained(tmp_path / "generator")
