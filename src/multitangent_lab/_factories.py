"""Functions of the user's own, named on the command line as `package.module:factory`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from multitangent_lab._errors import ConfigError


def find_factory(option: str, reference: str) -> Callable[..., Any]:
    """Returns the function that `reference` names.

    Modules are looked for in the working directory first, as `python -m` does.

    Args:
        option: The name of the setting, for messages.
        reference: `package.module:factory`.

    Raises:
        ConfigError: There is no such module, it can not be imported, or has no such function.
    """
    module_name, _, name = reference.partition(":")
    _source(option, reference)
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"`{option}` should name a module that can be imported. Found {reference!r}, whose "
            f"import raises {type(error).__name__}: {error}. Try: python -c 'import {module_name}'"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        problem = "has no such name" if factory is None else f"has {type(factory).__name__} there"
        raise ConfigError(
            f"`{option}` should name a function. Found {reference!r}, but the module {problem}. "
            f"Try one of {', '.join(sorted(functions)) or 'its functions, once it has any'}."
        )
    return factory


def call_factory(option: str, reference: str, *arguments: Any) -> Any:
    """Returns what the factory returns.

    Raises:
        ConfigError: There is none, or it fails.
    """
    factory = find_factory(option, reference)
    try:
        return factory(*arguments)
    except Exception as error:  # whatever the user's code raises
        taken = ", ".join(type(argument).__name__ for argument in arguments) or "nothing"
        raise ConfigError(
            f"`{option}` should name a function that takes {taken}. Found that {reference!r} "
            f"raises {type(error).__name__}: {error}. Try MULTITANGENT_TRACEBACK=1 to see where."
        ) from error


def source_hash(option: str, reference: str) -> str:
    """Returns the SHA-256 checksum of the file that holds a factory, which is not imported.

    Raises:
        ConfigError: There is no such module.
    """
    return sha256(_source(option, reference).read_bytes()).hexdigest()


def _source(option: str, reference: str) -> Path:
    """The file of the module; packages around it are imported."""
    module_name = reference.partition(":")[0]
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        spec = find_spec(module_name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(
            f"`{option}` should name a module that can be found. Found {reference!r}, but no "
            f"module {module_name!r} in '{here}' or among those installed. Try the folder that "
            "holds it as the working directory, or $PYTHONPATH."
        )
    return Path(spec.origin)
