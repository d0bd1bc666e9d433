"""Packages of the extra ``multitangent[lab]``, imported only where they are used."""

from importlib import import_module
from typing import Any


def import_lab(module: str) -> Any:
    """Returns the module `module`, or raises an ImportError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`{module}` should be installed to load this data set. Found: {error}. "
            "Try: pip install 'multitangent[lab]'"
        ) from error
