"""Python's garbage collector, in step on all ranks: one that pauses whenever it likes lets all others wait for it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 100  # steps


@contextmanager
def collecting_in_step() -> Iterator[Callable[[int], None]]:
    """Inside nothing is collected but by what is given, called after each step with its number; what lives now stays."""

    def collect(step: int) -> None:
        if (step + 1) % EVERY == 0:
            gc.collect(1)

    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
