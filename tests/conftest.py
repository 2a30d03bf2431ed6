"""Two processes share the test files (`-n 2` in pyproject.toml), so each computes with one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
