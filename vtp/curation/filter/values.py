"""Values of a column of any type as numbers and as texts: exact, or null where they are none."""
# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported.)

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

MANTISSA = {16: 11, 32: 24, 64: 53}  # bits of the whole numbers that a float of so many bits holds without gaps


def is_text(kind: "pa.DataType") -> bool:
    """Whether values are texts, or bytes that may be."""
    from pyarrow import types

    tests = (types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in (*tests, types.is_binary, types.is_large_binary, types.is_binary_view))


def floats(values: "pa.Array") -> "pa.Array":
    """As float64; of a decimal the nearest, as its digits are read: arrow's own cast makes 0.3 more than 0.3."""
    import pyarrow as pa

    values = values.cast(pa.string()) if pa.types.is_decimal(values.type) else values
    return values.cast(pa.float64(), safe=False)


def numbers(values: "pa.Array") -> "pa.Array":
    """As float64, NaN as null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wide = floats(values)
    return pc.if_else(pc.is_nan(wide), pa.scalar(None, pa.float64()), wide)


def texts(values: "pa.Array") -> tuple["pa.Array", np.ndarray]:
    """As texts, and which [n] are bytes that are no text in UTF-8; those are null."""
    import pyarrow as pa

    none = np.zeros(len(values), bool)
    if pa.types.is_decimal(values.type):
        return pa.array([None if value is None else plain(value) for value in values.to_pylist()], pa.string()), none
    if not is_text(values.type):
        return values.cast(pa.string()), none
    raw = values.cast(pa.binary())
    try:
        return raw.cast(pa.string()), none
    except pa.ArrowInvalid:
        found = [_text(content) for content in raw.to_pylist()]
        broken = np.array([text is False for text in found])
        return pa.array(found, pa.string(), mask=broken), broken


def _text(content: bytes | None) -> str | bool | None:
    """The text, None for a null, False for bytes that are none."""
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        return False


def plain(number: Decimal) -> str:
    """Without an exponent, and without zeros that end the digits behind the point."""
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def plain_if_number(text: str) -> str:
    """The same of a text; one that is no number as it is."""
    try:
        return plain(Decimal(text))
    except InvalidOperation:
        return text


def keys(values: "pa.Array") -> tuple["pa.Array", np.ndarray]:
    """As texts, and which [n] are no key: bytes that are no text.

    A whole number has no point and no exponent, whatever its type; NaN is null. Raises UnsafeKey for a float that is no
    whole number, or so large that another number may have become it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_floating(values.type):
        return texts(values)
    wide = numbers(values)
    known = wide.fill_null(0).to_numpy()
    unsafe = (known != np.trunc(known)) | (np.abs(known) >= 2.0 ** MANTISSA[values.type.bit_width])
    if unsafe.any():
        raise UnsafeKey(int(np.argmax(unsafe)), float(known[unsafe][0]), MANTISSA[values.type.bit_width])
    return pc.cast(wide, pa.int64()).cast(pa.string()), np.zeros(len(values), bool)


class UnsafeKey(ValueError):
    """A float that does not tell one row from another."""

    def __init__(self, place: int, value: float, bits: int) -> None:
        super().__init__(f"{value!r} is no whole number below 2^{bits}")
        self.place = place
