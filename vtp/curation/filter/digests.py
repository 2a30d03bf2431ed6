"""Digests of values, for comparing them without keeping them."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from vtp.curation.filter.values import is_text

if TYPE_CHECKING:
    import pyarrow as pa

HEX_DIGITS = 32  # of the first 128 bits of a hash
_NIBBLE = np.full(256, 255, np.uint8)
_NIBBLE[np.frombuffer(b"0123456789", np.uint8)] = np.arange(10)
_NIBBLE[np.frombuffer(b"abcdef", np.uint8)] = _NIBBLE[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


def digests(values: "pa.Array") -> np.ndarray:
    """128 bits of SHA-256 of each value's text or bytes, [n, 2] uint64; there must be no nulls."""
    joined = b"".join([hashlib.sha256(content).digest()[:16] for content in _contents(values)])
    return np.frombuffer(joined, ">u8").reshape(-1, 2).astype(np.uint64)


def _contents(values: "pa.Array") -> list[bytes]:
    """Equal for equal values; the way depends on the type alone, because other parts hold others."""
    import pyarrow as pa
    from pyarrow import types

    if isinstance(values, pa.ExtensionArray):
        return _contents(values.storage)
    if types.is_nested(values.type):
        return [repr(value).encode() for value in values.to_pylist()]
    if not is_text(values.type) and not types.is_fixed_size_binary(values.type):
        values = values.cast(pa.string())
    return values.cast(pa.binary()).to_pylist()


def hex_prefixes(texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first 128 bits [n, 2] uint64 of hexadecimal numbers of `length` >= 32 digits, and which [n] are such."""
    size = f"S{length + 1}"  # a longer text shows by its last byte
    raw = np.array([text.encode() for text in texts], dtype=size).view(np.uint8).reshape(len(texts), length + 1)
    nibbles = _NIBBLE[raw[:, :length]]
    valid = (nibbles < 16).all(1) & (raw[:, length] == 0)
    pairs = (nibbles[:, 0:HEX_DIGITS:2] << 4 | nibbles[:, 1:HEX_DIGITS:2]).reshape(-1)
    return pairs.view(">u8").reshape(-1, 2).astype(np.uint64), valid
