"""Batches of a dataset on the device, prepared by worker processes in the order that is asked for."""

from collections.abc import Generator, Sequence
from traceback import clear_frames
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch.utils.data import DataLoader, Dataset

from vtp.host import Host

Batch = TypeVar("Batch", bound=tuple)


@runtime_checkable
class Finishes(Protocol):
    """A dataset whose batches are completed on the device."""

    def finish(self, batch: Any) -> Any: ...  # noqa: ANN401 - the dataset's own kind of batch


def load_batches(batches: Dataset[Batch], items: Sequence[int], host: Host) -> Generator[Batch, None, None]:
    """Items of a dataset in the order of `items`, on the device, prepared by the host's workers.

    What a worker raises as a ValueError is raised here with the same words.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=items,
        num_workers=host.workers,
        prefetch_factor=4 if host.workers else None,
        pin_memory=host.device != "cpu",
        timeout=host.timeout if host.workers else 0,
    )
    finish = batches.finish if isinstance(batches, Finishes) else None
    try:
        for batch in loader:
            moved = type(batch)(*(value.to(host.device, non_blocking=True) for value in batch))
            yield moved if finish is None else finish(moved)
    except Exception as error:
        # torch's frames refer to the error and to the workers. Only garbage collection would end that circle, and it takes
        # the workers' queues away first: whoever it meets waits 5 s for each of them.
        clear_frames(error.__traceback__)
        if not host.workers or not isinstance(error, ValueError):
            raise
        # torch puts the worker's whole traceback before its words.
        words = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
        raise type(error)(words) from error
