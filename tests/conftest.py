"""Two processes share the test files (`-n 2` in pyproject.toml), so each computes with one thread."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


@pytest.fixture(scope="module")
def one_thread():
    """As the ranks have that a module starts."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
