"""The joint objective: who trains whom, what a weight of zero saves, micro-batches, and that it learns."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import merged, tiny_params
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from stages.pretrain import Pretrain
from stages.runner.environment import LocalHost, Runtime
from vtp.data.batches import RankSlice
from vtp.data.masking import draw_masks
from vtp.data.pretrain_batches import PretrainBatch
from vtp.draws import numpy_draws, torch_draws
from vtp.layers.images import denormalise, normalise
from vtp.losses.perceptual import build_perceptual
from vtp.losses.reconstruction import reconstruction_distance
from vtp.models.trainable import build_tokenizer
from vtp.objectives.adversary import build_adversary
from vtp.objectives.cost import items, pretrain_cost
from vtp.objectives.gradient_cache import GradientCache
from vtp.objectives.pretrain import PretrainObjective
from vtp.step import StepContext
from vtp.training.fit import in_precision
from vtp.training.optim import build_optimizer
from vtp.training.parallelize import parallelize
from vtp.training.update import Update

ALONE = RankSlice(0, 1, 1)
START = StepContext(0, 10, log_step=True)
COMBINATIONS = {
    "ae": {"clip": 0.0, "ssl": 0.0},
    "clip+ae": {"ssl": 0.0},
    "ssl+ae": {"clip": 0.0},
    "clip+ssl+ae": {"clip": 0.5, "ssl": 2.0},
}
CONVOLUTIONAL: dict[str, Any] = {
    "tokenizer": tiny.CONVOLUTIONAL,
    "objective": {"weights": {"clip": 0.0, "ssl": 0.0}, "reconstruction": {"kl": 0.1}},
    "monitor": {"probe": None},
}


# An encoder without a decoder's training; its features are the latents.
FEATURES_ALONE = {
    "tokenizer": {"vision": {"feature_bottleneck": None}},
    "objective": {"weights": {"reconstruction": 0.0, "clip": 0.0}},
}


def config_of(changes=None, *, new=False) -> Pretrain:
    return Pretrain.parse(merged(tiny_params()["pretrain"], changes or {}, new=new), where="test")


def objective_of(config: Pretrain) -> PretrainObjective:
    torch.manual_seed(0)
    perceptual = build_perceptual(config.objective.reconstruction.perceptual, weights=Path())
    tokenizer = build_tokenizer(config.architecture)
    return PretrainObjective(tokenizer, config.objective, config.rates, perceptual=perceptual, seed=0)


def batch_of(config: Pretrain, step: int = 0, rank_slice: RankSlice = ALONE, micro: int = 0) -> PretrainBatch:
    """A step's micro-batch of random pictures, in the blocks that PretrainBatches gives a rank."""
    clip, ssl, shown = config.active
    rec = config.data.batch.reconstruction
    text = getattr(config.tokenizer, "text", None)
    _, blocks = rank_slice.of(rec, step * rank_slice.micro_batches + micro)
    draws = torch.Generator().manual_seed(step)

    def part(per_block, *shape):
        pixels = torch.randint(0, 256, (per_block * rec, *shape), generator=draws, dtype=torch.uint8)
        return pixels[blocks.start * per_block : blocks.stop * per_block]

    ratios = config.data.masks.model_copy(update={"ratio_max": 0.8})
    masks = [draw_masks(2 * ssl // rec, 2, 2, ratios, numpy_draws(step, "m", block)) for block in blocks]
    masks = torch.cat(masks).unflatten(0, (len(blocks) * ssl // rec, 2))
    weights = (1 / masks.sum(2, keepdim=True).clamp_min(1)).expand_as(masks)
    return PretrainBatch(
        clip_images=part(clip // rec, 3, 16, 16),
        tokens=1 + part(clip // rec, text.context_length if text else 1).long() % 99,
        global_views=part(ssl // rec, 2, 3, 16, 16),
        local_views=part(ssl // rec, 2, 3, 8, 8),
        masks=masks,
        masked=masks.flatten().nonzero()[:, 0],
        mask_weights=weights[masks],
        rec_images=part(shown // rec, 3, 16, 16),
        colours=torch.empty(0, 4, 10),
        replaced=torch.zeros(len(blocks), config.active.pool // rec, dtype=torch.bool),
    )


def backward(objective, micro_batches, context=START):
    """Gradients by name and logged scalars of one step."""
    objective.zero_grad()
    logs = {}
    for term in objective.terms("model", micro_batches, context):
        if term.loss is not None:
            term.loss.backward()
        for name, value in term.parts.items():
            logs[name] = logs.get(name, 0) + float(value)
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}, logs


def test_each_term_trains_its_part():
    config = config_of()
    clip, ssl, rec = (_moved_alone(config, term) for term in ("clip", "ssl", "reconstruction"))
    shared = "trunk.blocks.0.attn.qkv.weight"
    assert shared in clip & ssl & rec
    assert any(name.startswith("text.") for name in clip)
    assert not any(name.startswith(("text.", "pixel_decoder.")) for name in ssl)
    assert "trunk.mask_token" in ssl - clip - rec
    # bottleneck_ae_only and features: trunk: only reconstruction shapes the latents
    assert "trunk.feature_bottleneck.weight" in rec - clip - ssl
    through = config_of(
        {"tokenizer": {"vision": {"bottleneck_ae_only": False}}, "objective": {"ssl": {"features": "latent"}}}
    )
    assert "trunk.feature_bottleneck.weight" in _moved_alone(through, "clip")
    assert "trunk.feature_bottleneck.weight" in _moved_alone(through, "ssl")


def _moved_alone(config, term):
    """Parameters of the tokenizer that the terms of one objective move."""
    objective = objective_of(config)
    moved, before = set(), {}
    for each in objective.terms("model", [batch_of(config)], START):
        if each.loss is not None:
            each.loss.backward()
        for name, parameter in objective.tokenizer.named_parameters():
            if parameter.grad is not None:
                now = parameter.grad.clone()
                changed = name not in before or not torch.equal(before[name], now)
                if each.name == term and changed and now.abs().sum() > 0:
                    moved.add(name)
                before[name] = now
    return moved


@pytest.mark.parametrize("weights", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("targets", [{"name": "sinkhorn", "iterations": 3}, {"name": "centering", "momentum": 0.9}])
def test_micro_batches_have_the_gradient_of_the_batch(weights, targets):
    """Cached features and chunks: exact for contrast, Sinkhorn, centering and KoLeo."""
    config = config_of({"objective": {"weights": weights, "ssl": {"targets": targets}}})
    objective = objective_of(config)
    whole, logs = backward(objective, [batch_of(config)])
    halves = [batch_of(config, 0, RankSlice(0, 1, 2), micro) for micro in range(2)]
    split, split_logs = backward(objective, halves)
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=2e-6 * float(gradient.abs().max()) + 1e-9, rtol=2e-5)
    assert split_logs == pytest.approx(logs, rel=1e-5, abs=1e-6)


def test_chunks_of_any_size_are_equal(monkeypatch):
    config = config_of()
    objective = objective_of(config)
    whole, logs = backward(objective, [batch_of(config)])
    monkeypatch.setattr("vtp.objectives.self_distillation.CHUNK", 1)  # one row at a time
    split, split_logs = backward(objective, [batch_of(config)])
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=2e-6 * float(gradient.abs().max()) + 1e-9, rtol=2e-5)
    assert split_logs == pytest.approx(logs, rel=1e-5, abs=1e-6)


def test_weights_scale_gradients():
    """Twice the weight is twice the gradient: cached gradients are not weighted again."""
    for name in ("clip", "ssl"):
        others = {"clip": 0.0, "ssl": 0.0, "reconstruction": 1e-9}
        gradients = []
        for weight in (1.0, 2.0):
            config = config_of({"objective": {"weights": others | {name: weight}}})
            gradients.append(backward(objective_of(config), [batch_of(config)])[0]["tokenizer.trunk.cls_token"])
        torch.testing.assert_close(gradients[1], 2 * gradients[0], rtol=1e-3, atol=1e-9)


def test_gradient_cache_is_the_chain_rule():
    weight = torch.randn(4, 3, requires_grad=True)
    inputs = [(torch.randn(5, 4),), (torch.randn(2, 4),)]

    def loss(features):
        return (features @ features.T).logsumexp(1).sum()

    cache = GradientCache(lambda micro, number: [torch.tanh(micro[0] @ weight)], inputs)
    loss(cache.features[0]).backward()
    for surrogate in cache.surrogates():
        surrogate.backward()
    (expected,) = torch.autograd.grad(loss(torch.tanh(torch.cat([x for (x,) in inputs]) @ weight)), weight)
    torch.testing.assert_close(weight.grad, expected)


def test_recomputed_activations_give_equal_gradients():
    config = config_of({"tokenizer": {"text": {"depth": 2}}})
    plain, logs = backward(objective_of(config), [batch_of(config)])
    objective = objective_of(config)
    objective.recompute()
    again, same = backward(objective, [batch_of(config)])
    assert logs == same
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_give_equal_gradients(tmp_path):
    """Static shapes: class tokens of three sizes, with gradient and without, and no graph is made again."""
    config = config_of()
    plain, _ = backward(objective_of(config), [batch_of(config)])
    objective = objective_of(config)
    parallelize(objective, LocalHost(tmp_path, tmp_path, Runtime.of({"VTP_DEVICE": "cpu", "VTP_COMPILE": "true"})))
    compiled, _ = backward(objective, [batch_of(config)])
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-6 * float(gradient.abs().max()) + 1e-9, rtol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        backward(objective, [batch_of(config, step=1)])


def test_teacher_starts_as_the_student_and_follows_it():
    momentum = {"name": "constant", "value": 0.99}
    objective = objective_of(config_of({"objective": {"ssl": {"momentum": momentum, "teacher_projection": True}}}))
    ssl, tokenizer = objective.ssl, objective.tokenizer
    pairs = [(ssl.teacher.trunk, tokenizer.trunk), (ssl.teacher.heads, ssl.heads)]
    for teacher, student in [*pairs, (ssl.teacher.visual_proj, tokenizer.visual_proj)]:
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
        assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        ssl.heads["dino"].scales.fill_(2.0)
    objective.after_step(START)
    torch.testing.assert_close(ssl.teacher.heads["dino"].scales, torch.full((16,), 1.01))
    without = objective_of(config_of({"objective": {"ssl": {"teacher_projection": False}}}))
    assert without.ssl.teacher.visual_proj is None


def test_momentum_rises_along_a_cosine():
    momentum = {"name": "cosine", "start": 0.99, "end": 1.0}
    ssl = objective_of(config_of({"objective": {"ssl": {"momentum": momentum}}})).ssl
    assert [ssl.momentum(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.99, 0.995, 1.0])


def test_logit_scale_starts_and_is_clamped():
    objective = objective_of(config_of())
    assert objective.tokenizer.logit_scale.exp().item() == pytest.approx(14.2857, rel=1e-5)
    objective.tokenizer.logit_scale.data.fill_(9.0)
    objective.after_step(START)
    assert objective.tokenizer.logit_scale.exp().item() == pytest.approx(100, rel=1e-4)


def test_sigmoid_contrast_learns_scale_and_bias():
    config = config_of({"objective": {"contrast": {"name": "sigmoid", "scale": 10.0, "bias": -10.0}}})
    gradients, _ = backward(objective_of(config), [batch_of(config)])
    assert float(gradients["tokenizer.logit_bias"]) != 0
    assert float(gradients["tokenizer.logit_scale"]) != 0


def test_separate_patch_head():
    other = {"hidden_dim": 8, "bottleneck_dim": 4, "prototypes": 24, "weight_norm": False, "prototype_init": "linear"}
    config = config_of({"objective": {"ssl": {"patch_head": other, "pooling": "pooled"}}})
    objective = objective_of(config)
    gradients, _ = backward(objective, [batch_of(config)])
    assert gradients["ssl.heads.ibot.directions"].abs().sum() > 0
    assert gradients["ssl.heads.dino.directions"].abs().sum() > 0


def test_zero_weights_cost_nothing():
    joint, autoencoder = config_of(), config_of({"objective": {"weights": {"clip": 0.0, "ssl": 0.0}}})
    objective = objective_of(autoencoder)
    terms = list(objective.terms("model", [batch_of(autoencoder)], START))
    assert {term.name for term in terms} == {"reconstruction"}
    assert not any("text" in name or "teacher" in name or "head" in name for name, _ in objective.named_parameters())
    assert autoencoder.active == (0, 0, 2)
    names = [item.name for item in parts_of(autoencoder)]
    assert all(name.startswith("reconstruction") for name in names)
    assert cost_of(autoencoder).flops < cost_of(joint).flops


def test_an_encoder_may_learn_alone():
    """Self-supervision without reconstruction: its step trains no decoder, shows it nothing, and costs nothing for it."""
    config = config_of(FEATURES_ALONE)
    assert config.active == (0, 4, 0)
    batch = batch_of(config)
    assert len(batch.rec_images) == 0
    objective = objective_of(config)
    gradients, logs = backward(objective, [batch])
    assert {".".join(name.split(".")[:2]) for name in gradients} == {"tokenizer.trunk", "ssl.heads"}
    assert logs["replaced_samples"] == 0
    assert all(name.startswith("ssl") for name in (item.name for item in parts_of(config)))
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    update = Update("model", build_optimizer(objective.phases()["model"], config.optim), config.optim, [])
    update.apply(objective.terms("model", [batch], START), START)
    moved = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("tokenizer.trunk.") for name in moved)
    assert not any(name.startswith("tokenizer.pixel_decoder.") for name in moved)


def cost_of(config):
    return pretrain_cost(config.architecture, config.data, config.objective, config.active)


def parts_of(config):
    return items(config.architecture, config.data, config.objective, config.active)


def wide_config_of(weights, drop_path=None):
    """Wide and short, as real models are: in attention torch counts what its backward pass computes again."""
    ssl = {"targets": {"name": "sinkhorn", "iterations": 1}}
    return config_of(
        {
            "objective": {"weights": weights, "ssl": ssl, "drop_path": drop_path or {}},
            "tokenizer": {"text": {"embed_dim": 64, "context_length": 8}},
            "data": {"masks": {"ratio_min": 0.25, "ratio_max": 0.75}},
        }
    )


def flops_of(config):
    """Of a step, by shapes and by torch while it runs; without the perceptual network, which would hide the rest."""
    from torch.utils.flop_counter import FlopCounterMode

    objective, batch = objective_of(config), batch_of(config)
    objective._perceptual = [lambda a, b: (a - b).abs().mean((1, 2, 3))]
    with FlopCounterMode(display=False) as counter:
        for term in objective.terms("model", [batch], StepContext(0, 10, log_step=False)):
            if term.loss is not None:
                term.loss.backward()
    # Sinkhorn makes the teacher's logits a second time.
    rows = batch.masked.numel() + 2 * len(batch.global_views)
    repeated = 2 * rows * 8 * 16 if config.active.ssl else 0
    ours = sum(item.training for item in parts_of(config) if "perceptual" not in item.name)
    return ours, counter.get_total_flops() - repeated


@pytest.mark.parametrize("weights", COMBINATIONS.values(), ids=COMBINATIONS)
def test_flops_are_those_of_the_step(weights):
    ours, counted = flops_of(wide_config_of(weights))
    assert ours == pytest.approx(counted, rel=0.01)


@pytest.fixture(scope="module")
def nothing_dropped():
    return flops_of(wide_config_of(COMBINATIONS["clip+ssl+ae"]))


@pytest.mark.parametrize(
    "rates",
    [
        {"clip": 0.5},
        {"ssl": 0.25},
        {"ssl": 0.75, "reconstruction": 0.5},
        {"clip": 0.125, "ssl": 0.5, "reconstruction": 0.5},  # whole numbers of 8, 8 and 2: none fills up
    ],
    ids=str,
)
def test_what_stochastic_depth_leaves_out_costs_nothing(nothing_dropped, rates):
    """The student's residual branches alone: no teacher, no patch embedding, no head, no decoder."""
    ours, counted = flops_of(wide_config_of(COMBINATIONS["clip+ssl+ae"], rates))
    assert ours == pytest.approx(counted, rel=0.01)
    ours_whole, counted_whole = nothing_dropped
    assert counted_whole > counted
    assert ours_whole - ours == pytest.approx(counted_whole - counted, rel=0.01)


def test_forward_flops_of_the_models():
    """Every part alone, within 1 %, at a size where attention counts."""
    from torch.utils.flop_counter import FlopCounterMode

    from vtp.objectives.cost import decoder_flops, encoder_flops, perceptual_flops, text_flops

    config = config_of({"tokenizer": {"vision": {"patch_size": 2}}, "data": {"ssl_views": {"local_size": 8}}})
    objective = objective_of(config)
    tokenizer, vision = objective.tokenizer, config.tokenizer.vision

    def count(function, *inputs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*inputs)
        return counter.get_total_flops()

    images, latents, perceptual = torch.zeros(1, 3, 16, 16), torch.zeros(1, 8, 8, 8), objective._perceptual[0]
    for counted, ours in (
        (count(tokenizer.encode, images), encoder_flops(vision, 16, bottleneck=True)),
        (count(tokenizer.decode, latents), decoder_flops(config.tokenizer.decoder, vision, 16)),
        (count(tokenizer.encode_text, torch.ones(1, 40, dtype=torch.int64)), text_flops(config.tokenizer.text)),
        (count(perceptual, images, images), 2 * perceptual_flops(config.objective.reconstruction.perceptual, 16)),
    ):
        assert ours == pytest.approx(counted, rel=0.01)


def test_learns_one_batch():
    config = config_of()
    objective, batch = objective_of(config), batch_of(config)
    optimizer = torch.optim.AdamW([p for group in objective.phases()["model"] for p in group.parameters], 3e-3)
    history = []
    for step in range(60):
        context = StepContext(step, 60, log_step=False)
        history.append(backward(objective, [batch], context)[1])
        optimizer.step()
        objective.after_step(context)
    assert history[-1]["clip_loss"] < 0.5 * history[0]["clip_loss"]
    assert history[-1]["l1"] < 0.8 * history[0]["l1"]
    assert history[-1]["ibot_loss"] < history[0]["ibot_loss"]


def test_every_parameter_is_in_one_group():
    rates = {"layer_decay": 0.5, "patch_embed": 0.2, "frozen_prototypes": 0.1, "decoder": {"lr": 3.0}}
    objective = objective_of(config_of({"rates": rates}))
    groups = objective.phases()["model"]
    grouped = [p for group in groups for p in group.parameters]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in objective.parameters() if p.requires_grad}
    factor = {name: group for group in groups for name, p in objective.named_parameters() if p in set(group.parameters)}
    assert factor["tokenizer.trunk.norm.weight"].lr == 1.0
    assert factor["tokenizer.trunk.blocks.1.attn.proj.weight"].lr == 0.5
    assert factor["tokenizer.trunk.blocks.0.attn.proj.weight"].lr == 0.25
    assert factor["tokenizer.trunk.patch_embed.proj.weight"].lr == pytest.approx(0.125 * 0.2)
    assert factor["tokenizer.trunk.cls_token"].lr == 0.125
    assert factor["tokenizer.pixel_decoder.proj_in.weight"].lr == 3.0
    assert factor["ssl.heads.dino.directions"].frozen_until == 0.1
    assert factor["ssl.heads.dino.mlp.0.weight"].frozen_until == 0.0
    assert "tokenizer.logit_scale" in factor


@pytest.mark.parametrize("rates", [{"clip": 0.3, "ssl": 0.1, "reconstruction": 0.4}, {"ssl": 0.9}], ids=str)
def test_stochastic_depth_does_not_depend_on_micro_batches(rates):
    """Shares that no micro-batch holds as a whole number; local and global views are left out apart."""
    config = config_of({"objective": {"drop_path": rates}})
    whole, logs = backward(objective_of(config), [batch_of(config)])
    halves = [batch_of(config, 0, RankSlice(0, 1, 2), micro) for micro in range(2)]
    split, split_logs = backward(objective_of(config), halves)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=2e-6 * float(gradient.abs().max()) + 1e-9, rtol=2e-5)
    assert split_logs == pytest.approx(logs, rel=1e-5, abs=1e-6)
    views, local_views = objective_of(config)._ssl_drop_path(batch_of(config), 0, 1, 0)
    assert not torch.equal(views.indices, local_views.indices)


@pytest.mark.parametrize("decays", [True, False])
def test_scales_of_prototypes_decay_where_they_are_told_to(decays):
    """In DINOv2 they do; all other vectors never do."""
    config = config_of({"rates": {"decay_scales": decays, "heads": {"weight_decay": 0.5}}})
    objective = objective_of(config)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    groups = build_optimizer(objective.phases()["model"], config.optim).param_groups
    factor = {names[parameter]: group["decay_factor"] for group in groups for parameter in group["params"]}
    assert factor["ssl.heads.dino.directions"] == 0.5
    assert factor["ssl.heads.dino.scales"] == (0.5 if decays else 0.0)
    assert {factor[name] for name in factor if name.endswith("bias")} == {0.0}


def test_temperature_rises_then_stays():
    warmup = {"start": 0.04, "end": 0.07, "warmup": 0.3}
    ssl = {f"teacher_temperature_{key}": value for key, value in warmup.items()}
    objective = objective_of(config_of({"objective": {"ssl": ssl}}))
    values = [objective.ssl.teacher_temperature(progress) for progress in (0.0, 0.15, 0.3, 0.9)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])


def with_copies(batch, copies):
    """The first pictures of self-supervision are one placeholder, and what is hidden of them is the same."""
    views, masks = batch.global_views.clone(), batch.masks.clone()
    views[:copies] = views[0, 0]
    masks[:copies] = masks[0]
    return batch._replace(
        global_views=views,
        masks=masks,
        masked=masks.flatten().nonzero()[:, 0],
        mask_weights=(1 / masks.sum(2, keepdim=True).clamp_min(1)).expand_as(masks)[masks],
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("copies", [2, 5, 8])
def test_copies_of_a_picture_leave_the_rest_of_a_step_alone(precision, copies):
    """KoLeo pushes no copies apart, so that clipping shrinks other terms no more than it does without KoLeo."""
    found = {}
    for koleo in (0.0, 0.1):
        sizes = {"clip": 16, "ssl": 8, "reconstruction": 2}
        config = config_of({"objective": {"ssl": {"koleo": koleo}}, "data": {"batch": sizes}})
        objective, batch = objective_of(config), with_copies(batch_of(config), copies)
        optimizer = build_optimizer(objective.phases()["model"], config.optim)
        update = Update("model", optimizer, config.optim, objective.shared_parameters())
        logs = update.apply(in_precision(objective.terms("model", [batch], START), "cpu", precision), START).logs
        found[koleo] = {name: float(value) for name, value in logs.items()}
    assert found[0.1]["koleo_duplicates"] == pytest.approx(copies / 8)
    assert "koleo_duplicates" not in found[0.0]
    for norm in ("model_gradient_norm", "trunk_gradient_ssl"):
        assert found[0.1][norm] == pytest.approx(found[0.0][norm], rel=0.5), norm


def test_l1_space():
    def losses(space):
        config = config_of({"objective": {"reconstruction": {"l1_space": space}}})
        return backward(objective_of(config), [batch_of(config)])[1]

    # [-1, 1] is wider than normalised space by 2 sigma, about 0.45.
    assert losses("unit")["l1"] / losses("normalised")["l1"] == pytest.approx(0.45, abs=0.01)
    assert losses("unit")["l1"] == pytest.approx(2 * losses("pixels")["l1"])


def test_impossible_configurations_are_refused():
    for changes, said in (
        (
            {"objective": {"weights": {"reconstruction": 0.0, "clip": 0.0, "ssl": 0.0}}},
            "are all 0: nothing is left to train",
        ),
        (
            {"objective": {"weights": {"reconstruction": 0.0}}},
            "nothing else trains tokenizer.vision.feature_bottleneck",
        ),
        ({**FEATURES_ALONE, "adversary": from_the_start()}, "nothing is reconstructed for adversary"),
        ({"tokenizer": {"text": None}}, "and tokenizer.text null: CLIP needs"),
        ({"tokenizer": {"text": {"pool_type": "none"}}}, "pool_type is none: the contrast needs one token"),
        ({"tokenizer": {"decoder": None}}, "tokenizer needs a decoder"),
        ({"tokenizer": {"decoder_upscale": 16}}, "whose decoder_upscale is vision.patch_size"),
        ({"data": {"batch": {"ssl": 16}}}, "clip 8 is below ssl 16"),
        ({"data": {"batch": {"ssl": 5}}}, "ssl 5 is not a multiple of reconstruction 2"),
        ({"data": {"ssl_views": {"local_size": 9}}}, "local_size 9 is not a multiple"),
        ({"data": {"clip_view": {"size": 8}}}, "reconstruction_view is shared"),
        ({"data": {"subsets": "disjoint", "batch": {"clip": 4}}}, "of 4 images none is left"),
        ({"objective": {"ssl": {"koleo_group": 3}}}, "data.batch.ssl 4 is no multiple of objective.ssl.koleo_group 3"),
        ({"tokenizer": {"vision": {"num_heads": 3}}}, "is not a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=said):
            config_of(changes, new=True)


def test_half_precision_is_near():
    """bfloat16 forward passes, float32 losses: the gradient of every shared weight points the same way."""
    config = config_of({"objective": {"drop_path": {"ssl": 0.25, "clip": 0.25}}})
    batches = [batch_of(config, 0, RankSlice(0, 1, 2), micro) for micro in range(2)]
    gradients = []
    for precision in ("float32", "bfloat16"):
        objective = objective_of(config)
        for term in in_precision(objective.terms("model", batches, START), "cpu", precision):
            if term.loss is not None:
                assert term.loss.dtype == torch.float32
                term.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.tokenizer.trunk.blocks.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_contrast_is_computed_in_float32(contrast):
    """Embeddings are normalised in it too: bfloat16 would make them 0.4 % longer or shorter, which moves every logit."""
    named = {
        "softmax": {"name": "softmax", "scale": 100.0},
        "sigmoid": {"name": "sigmoid", "scale": 100.0, "bias": -10.0},
    }
    objective = objective_of(
        config_of({"objective": {"contrast": named[contrast], "weights": {"clip": 1.0, "ssl": 0.0}}})
    )
    term = next(in_precision(objective.terms("model", [batch_of(config_of())], START), "cpu", "bfloat16"))
    assert term.name == "clip"
    for features in term.own:
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)), atol=1e-6, rtol=0)
    image, text = (features.detach().double() for features in term.own)
    logits = 100 * image @ text.T
    if contrast == "softmax":
        truth = torch.arange(len(logits))
        expected = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    else:
        signs = 2 * torch.eye(len(logits)) - 1
        expected = -F.logsigmoid(signs * (logits - 10)).sum() / len(logits)
    torch.testing.assert_close(term.loss.detach().double(), expected, atol=1e-4, rtol=1e-5)


def from_the_start():
    return tiny_params()["tune_decoder"]["adversary"] | {"discriminator_start": 0.0, "start": 0.0}


def test_joint_adversary_does_not_depend_on_micro_batches():
    """A GAN term from the start: gradients of encoder, decoder and discriminator in one pass and in two."""
    config = config_of({"adversary": from_the_start()})
    found = []
    for micro_batches in (1, 2):
        objective = objective_of(config)
        host = LocalHost(Path(), Path(), Runtime(device="cpu"))
        objective.adversary = build_adversary(
            config.adversary, host, seed=0, tokenizer=objective.tokenizer, features=None
        )
        batches = [batch_of(config, 0, RankSlice(0, 1, micro_batches), micro) for micro in range(micro_batches)]
        names = []
        for phase in objective.phases():
            for term in objective.terms(phase, batches, START):
                names.append(term.name)
                if term.loss is not None:
                    term.loss.backward()
        assert names.index("adversarial") > len(names) - 1 - names[::-1].index("reconstruction")
        assert "discriminator" in names
        found.append({name: p.grad for name, p in objective.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith("adversary.discriminator") for name in found[0])
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_a_discriminator_that_reads_the_encoder_in_training_is_refused():
    network = {"name": "tokenizer", "image_size": None, "blocks": 2}
    adversary = tiny_params()["tune_decoder"]["adversary"]
    adversary |= {"discriminator": {"name": "features", "network": network, "kernel": 3}}
    with pytest.raises(ValueError, match="which is in training"):
        config_of({"adversary": adversary})


def convolutional(**changes):
    return config_of(merged(CONVOLUTIONAL, changes, new=True))


def test_a_convolutional_tokenizer_overfits_one_batch():
    config = convolutional(objective={"reconstruction": {"kl": 1e-6, "perceptual_weight": 0.0}})
    objective, batch = objective_of(config), batch_of(config)
    batch = batch._replace(rec_images=F.interpolate(batch.rec_images[..., ::8, ::8].float(), scale_factor=8).byte())
    optim = config.optim.model_copy(update={"lr": 2e-2, "warmup": 0.0, "schedule": "constant"})
    update = Update("model", build_optimizer(objective.phases()["model"], optim), optim, objective.shared_parameters())
    losses = []
    for step in range(80):
        context = StepContext(step, 80, log_step=False)
        losses.append(float(update.apply(objective.terms("model", [batch], context), context).logs["l1"]))
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_the_posterior_is_sampled_and_weighed_where_it_has_a_weight(kl):
    """Against the same by torch's distributions, in one pass and in two."""
    config = convolutional(objective={"weights": {"reconstruction": 2.0}, "reconstruction": {"kl": kl}})
    objective, batch = objective_of(config), batch_of(config)
    found, logs = backward(objective, [batch])
    assert ("kl" in logs) is bool(kl)

    objective.zero_grad()
    tokenizer, images = objective.tokenizer, normalise(batch.rec_images)
    mean, log_variance = tokenizer.quant_conv(tokenizer.encoder(denormalise(images) * 2 - 1)).chunk(2, dim=1)
    posterior, latents, loss = Normal(mean, (log_variance / 2).exp()), mean, 0.0
    if kl:
        shape = mean.shape[1:]
        noise = [torch.randn(shape, generator=torch_draws(0, "posterior", 0, index)) for index in range(len(images))]
        latents = posterior.mean + posterior.stddev * torch.stack(noise)
        loss = kl * kl_divergence(posterior, Normal(torch.zeros_like(mean), 1.0)).mean()
        assert logs["kl"] == pytest.approx(float(loss.detach()) / kl, rel=1e-5)
    distance = reconstruction_distance(objective._perceptual[0], tokenizer.pixel_decoder(latents), images)
    (2 * (distance.l1 + distance.perceptual + loss)).backward()
    expected = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    parts, _ = backward(objective_of(config), [batch_of(config, 0, RankSlice(0, 1, 2), micro) for micro in range(2)])
    assert found.keys() == expected.keys() == parts.keys() == dict(objective.named_parameters()).keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
        assert (parts[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    halves = found["tokenizer.quant_conv.weight"].chunk(2)
    assert halves[0].abs().sum() > 0
    assert bool(halves[1].abs().sum()) is bool(kl)  # of the variances


def test_what_convolutions_cannot_learn_is_refused():
    for changes, said in (
        (
            {"objective": {"weights": {"clip": 1.0}}},
            "objective.weights.clip is 1.0, and tokenizer.name is convolutional",
        ),
        ({"objective": {"weights": {"ssl": 0.5}}}, "objective.weights.ssl is 0.5, .* set the weight to 0"),
        ({"objective": {"drop_path": {"reconstruction": 0.1}}}, "drop_path.reconstruction is 0.1, .* set it to 0"),
        ({"monitor": tiny_params()["pretrain"]["monitor"]}, "monitor.probe reads class tokens, .* set it to null"),
        ({"adversary": from_the_start()}, "kl is 0.1 beside an adversary, .* set kl to 0, or adversary to null"),
    ):
        with pytest.raises(ValueError, match=said):
            convolutional(**changes)
    with pytest.raises(ValueError, match="kl is 0.1, and a ViT's latents have no posterior; set it to 0"):
        config_of({"objective": {"reconstruction": {"kl": 0.1}}})


def test_an_adversary_trains_convolutions_too():
    config = convolutional(adversary=from_the_start(), objective={"reconstruction": {"kl": 0.0}})
    objective, host = objective_of(config), LocalHost(Path(), Path(), Runtime(device="cpu"))
    objective.adversary = build_adversary(config.adversary, host, seed=0, tokenizer=objective.tokenizer, features=None)
    names = [term.name for phase in objective.phases() for term in _differentiated(objective, phase, batch_of(config))]
    assert set(names) == {"reconstruction", "adversarial", "discriminator"}
    assert all(parameter.grad is not None for parameter in objective.tokenizer.parameters())


def _differentiated(objective, phase, batch):
    for term in objective.terms(phase, [batch], START):
        if term.loss is not None:
            term.loss.backward()
        yield term


def test_the_cost_of_convolutions_is_what_torch_counts():
    config = convolutional()
    objective, batch = objective_of(config), batch_of(config)
    with FlopCounterMode(display=False) as counter:
        backward(objective, [batch])
    expected = pretrain_cost(config.architecture, config.data, config.objective, config.active)
    # Of random VGG16 the originals pass too; its first layer takes no gradient of them.
    assert expected.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert expected.samples == {"clip": 0, "ssl": 0, "reconstruction": 2}
    assert expected.tokens == 2 * 4 * 4
