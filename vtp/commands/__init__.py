"""What `python -m vtp` does with finished artefacts; `vtp/__main__.py` has the command line."""
