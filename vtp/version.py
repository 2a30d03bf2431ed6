"""The version, in its one place: pyproject.toml reads it, and no stage depends on it (`stages/runner/fingerprint.py`)."""

__version__ = "0.1.0"
