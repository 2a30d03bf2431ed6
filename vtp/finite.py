"""What is not finite is refused where it appears: never cast to a pixel, averaged or scored."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class NotFiniteError(ValueError):
    """Values are NaN or infinite; the message says whose and how many."""


def require_finite(values: "Tensor", what: str, remedy: str) -> None:
    """See that `values` [N, ...] of any floating-point type hold numbers alone.

    Raises NotFiniteError that says how many of the N, which are `what`, do not, and which is the first.
    """
    if values.isfinite().all():
        return
    bad = (~values.isfinite()).reshape(len(values), -1).any(1).nonzero()[:, 0]
    raise NotFiniteError(
        f"{len(bad)} of {len(values)} {what} hold NaN or infinity, the first is number {int(bad[0])}; {remedy}"
    )
