"""The path between noise and data, and the samplers that follow it."""

from vtp.flow.noise import draw_noise
from vtp.flow.path import FlowLoss, TimestepSamplingConfig, draw_timesteps, flow_matching_loss, timesteps_of
from vtp.flow.sampler import SamplerConfig, sample

__all__ = [
    "FlowLoss",
    "SamplerConfig",
    "TimestepSamplingConfig",
    "draw_noise",
    "draw_timesteps",
    "flow_matching_loss",
    "sample",
    "timesteps_of",
]
