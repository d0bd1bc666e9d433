"""Searching and suggesting learning rates."""

from multitangent_lab.search._command import run_search, run_suggest
from multitangent_lab.search._search import SearchResult, grid, search

__all__ = ["SearchResult", "grid", "run_search", "run_suggest", "search"]
