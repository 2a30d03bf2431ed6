"""Two processes share the test files (`-n 2` in pyproject.toml), so each computes with one thread."""

import logging
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


def pytest_collection_modifyitems(items):
    """Files with slow tests first: a long one that starts last would leave the other process idle.

    xdist's own order, by the number of tests, starts the longest pipelines last (`--no-loadscope-reorder`).
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def no_log_into_closed_files():
    """What a test before this one left: its error stream is closed by now."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(getattr(handler, "stream", None), "closed", False):
            root.removeHandler(handler)


@pytest.fixture(scope="module")
def one_thread():
    """As the ranks have that a module starts."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
