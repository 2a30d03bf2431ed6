"""The plan of a filter's CLIP scores, which is what it needs devices for."""

from typing import Any

import torch

from stages.filter import Filter
from stages.plans.estimate import GIGA, Estimate, Figure, add_time, options_for
from stages.pretrain import Pretrain
from vtp.config import ConfigError
from vtp.curation.filter.rules import ClipScore, OpenClipModel, TokenizerModel
from vtp.layers.flops import forward_flops
from vtp.objectives.cost import encoder_flops, text_flops
from vtp.params import load, split_address

PAIRS = 277_000_000  # of the paper


def plan(arguments: list[str]) -> Estimate:
    """What the CLIP scores of a filter take."""
    parser = options_for("filter", section="filter_images")
    parser.add_argument("--images", type=int, default=PAIRS, help="that are scored; default: 277M")
    parser.add_argument("--tokenizer", metavar="FILE:SECTION", help="parameters of pretrain; default: FILE:pretrain")
    options = parser.parse_args(arguments)
    rules = [rule for rule in load(options.address, Filter).rules if isinstance(rule, ClipScore)]
    if not rules:
        raise ConfigError(f"{options.address}: no rule clip_score, and the others need no device")
    estimate = Estimate()
    pretrain = options.tokenizer or f"{split_address(options.address)[0]}:pretrain"
    work, flops = estimate.section(f"FLOPs: CLIP scores of {options.images:,} images"), 0.0
    for rule in rules:
        name = rule.model.architecture if isinstance(rule.model, OpenClipModel) else "tokenizer"
        of_pair = _flops(rule.model, pretrain)
        work[name] = Figure(of_pair, f"{of_pair / GIGA:,.2f} G an image with its caption")
        flops += options.images * of_pair
    work["run"] = Figure(flops, f"{flops:.3e}")
    time = estimate.section("time")
    seconds = add_time(time, options, flops, precision="float32")
    rate = options.images / seconds
    time["images per second"] = Figure(rate, f"{rate:,.0f} from the pool, decoded by the CPUs beside")
    return estimate


def _flops(model: OpenClipModel | TokenizerModel, pretrain: str) -> float:
    """Of an image and its caption."""
    if isinstance(model, TokenizerModel):
        config = load(pretrain, Pretrain).vit
        if config.text is None:
            raise ConfigError(f"{pretrain}: a tokenizer without a text tower, which rule clip_score needs")
        return encoder_flops(config.vision, config.image_size, bottleneck=True) + text_flops(config.text)
    import open_clip

    with torch.device("meta"):
        network: Any = open_clip.create_model(model.architecture, device="meta", load_weights=False)
    side = network.visual.image_size
    height, width = side if isinstance(side, tuple) else (side, side)
    tokens = torch.empty(1, network.context_length, dtype=torch.int64)
    return forward_flops(network, torch.empty(1, 3, height, width), tokens)
