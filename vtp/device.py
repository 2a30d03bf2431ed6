"""Between the host and the device of a run. A GPU works behind the host; of these functions only `read` waits for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

_constants: dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor] = {}


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers [len(values)] on the device and in the type of a tensor; they get there once, and must not be written to."""
    key = tuple(values), like.device, like.dtype
    if key not in _constants:
        with torch.inference_mode(False):  # what is made there could not take part in a training
            made = torch.tensor(values, device=like.device, dtype=like.dtype)
        if type(made) is not Tensor:  # one without contents, of a plan
            return made
        _constants[key] = made
    return _constants[key]


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device. A copy to a GPU is made out of pinned memory: out of other, both would wait."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def read(values: Tensor) -> list[float]:
    """Numbers of the device, once it has done all that was asked of it before."""
    return values.tolist()
