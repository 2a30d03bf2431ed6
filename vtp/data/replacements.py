"""Samples that cannot be used give way to others, are counted and logged, up to a limit.

A shard that cannot be read is an error at once.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

from vtp.data.dataset import DataError, SampleError
from vtp.layers.decode import DecodeError

ATTEMPTS = 20  # samples that are tried for a place
FIRST_SAMPLES = 10_000  # the limit is a share of at least so many: a worker may meet a few early
NAMED = 5  # samples in the message of the limit
T = TypeVar("T")


class Replacements:
    """Of one process. `limit`: the largest share of samples, as the parameter `named` has it."""

    def __init__(self, limit: float, named: str) -> None:
        self._limit, self._named = limit, named
        self._seen, self._replaced = 0, 0
        self._first: list[str] = []

    def first_usable(
        self, numbers: Iterator[int], read: Callable[[int], T], name: Callable[[int], str]
    ) -> tuple[T, bool]:
        """What `read` gives of the first sample that can be read, and whether that is another than the first of all.

        Raises DataError when a shard cannot be read, when none of some can be, or when too many gave way.
        """
        self._seen += 1
        for attempt, number in enumerate(islice(numbers, ATTEMPTS)):
            try:
                return read(number), attempt > 0
            except (SampleError, DecodeError) as error:
                self._count(f"{name(number)}: {error}", first=attempt == 0)
        raise DataError(f"{self._first[-1]}; nor can any of {ATTEMPTS} that were tried: fetch the shard again")

    def _count(self, what: str, *, first: bool) -> None:
        logging.warning("%s; another sample takes its place", what)
        self._replaced += first
        self._first = [*self._first[:NAMED], what]
        if self._replaced / max(self._seen, FIRST_SAMPLES) > self._limit:
            raise DataError(
                f"{self._replaced} of {self._seen} samples cannot be used, {self._named} is {self._limit}: "
                f"{'; '.join(self._first)}"
            )
