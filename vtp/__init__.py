"""VTP: pre-training, tuning and evaluation of visual tokenizers for generative models.

The public names load on first use, so that importing `vtp` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtp.inference.generator import load_generator
    from vtp.models.lightningdit import LightningDiT
    from vtp.models.loading import load_tokenizer
    from vtp.models.tokenizer import VisualTokenizer
    from vtp.version import __version__

__all__ = ["LightningDiT", "VisualTokenizer", "__version__", "load_generator", "load_tokenizer"]

_HOMES = {
    "VisualTokenizer": "vtp.models.tokenizer",
    "load_tokenizer": "vtp.models.loading",
    "LightningDiT": "vtp.models.lightningdit",
    "load_generator": "vtp.inference.generator",
    "__version__": "vtp.version",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vtp' has no attribute {name!r}")
