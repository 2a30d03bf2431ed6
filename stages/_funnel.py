"""Tells a person at the terminal what a filter removed."""

import sys

from vtp.data.filtering.funnel import Funnel


def tell_funnel(funnel: Funnel) -> None:
    """The funnel as a table, on stderr beside the bars."""
    print(funnel.table(), file=sys.stderr)
