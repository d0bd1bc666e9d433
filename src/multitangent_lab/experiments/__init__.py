"""Experiments as values: what to run, what to store, what to draw."""
