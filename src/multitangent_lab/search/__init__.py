"""Searching and suggesting learning rates."""
