"""Rates, operations and memory of a tokenizer."""

import time

import pytest
import torch
from tiny import tiny_params

from stages.pretrain import Pretrain
from vtp.evaluation.speed import measure_speed
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.cost import decoder_flops, encoder_flops


def test_flops_are_those_counted_from_shapes():
    config = Pretrain.parse(tiny_params()["pretrain"], where="test").architecture
    tokenizer = VisualTokenizer(config).eval()
    speed = measure_speed(tokenizer, torch.zeros(5, 3, 16, 16), warmup=0, batches=1)
    expected = encoder_flops(config.vision, 16, bottleneck=True)
    # The bottleneck's product with the class token is counted, though the latents leave it out.
    assert speed.encode.flops_per_image == pytest.approx(expected, rel=0.01)
    assert speed.decode.flops_per_image == pytest.approx(decoder_flops(config.decoder, config.vision, 16), rel=0.01)
    assert next(tokenizer.parameters()).device.type == "cpu"
    figures = speed.figures()
    assert figures["batch_size"] == 5
    assert figures["device"] == "cpu"
    assert figures["peak_process_gigabytes"] > 0.05
    assert not any(name.endswith("device_gigabytes") for name in figures)


class Sleeper(VisualTokenizer):
    """Takes its time, the first calls more."""

    calls = 0

    def _encode(self, images, drop_path=None):
        if not images.is_meta:
            time.sleep(0.5 if self.calls < 2 else 0.02)
            self.calls += 1
        return super()._encode(images)


def test_the_clock_counts_batches_after_the_warm_up():
    tokenizer = Sleeper(Pretrain.parse(tiny_params()["pretrain"], where="test").architecture).eval()
    speed = measure_speed(tokenizer, torch.zeros(4, 3, 16, 16), warmup=2, batches=5)
    assert tokenizer.calls == 1 + 2 + 5
    assert 40 < speed.encode.images_per_second < 4 / 0.02
    assert speed.decode.images_per_second > speed.encode.images_per_second
