"""Finished artefacts at work: pictures from a generator and a tokenizer, without stages and parameter files."""
