"""Between the host and the device of a run. A GPU works behind the host; of these functions only `read` waits for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bfloat16"]  # tf32: float32 whose products on GPUs have inputs of 10 bits

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


@contextmanager
def computing(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """Forward passes inside are of `precision`. A backward pass rounds as it finds `rounded_products`."""
    reduced = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")
    with rounded_products(precision == "tf32"), reduced:
        yield


@contextmanager
def rounded_products(allowed: bool) -> Iterator[None]:
    """Whether float32 products and convolutions of a GPU round their inputs to TF32 inside, forward and backward."""
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device. A copy to a GPU is made out of pinned memory: out of other, both would wait."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def read(values: Tensor) -> list[float]:
    """Numbers of the device, once it has done all that was asked of it before."""
    return values.tolist()
