"""The path between noise and data, and the samplers that follow it."""

from vtp.flow.path import FlowLoss, TimeSamplingConfig, draw_times, flow_matching_loss, times_of
from vtp.flow.sampler import SamplerConfig, sample

__all__ = ["FlowLoss", "SamplerConfig", "TimeSamplingConfig", "draw_times", "flow_matching_loss", "sample", "times_of"]
