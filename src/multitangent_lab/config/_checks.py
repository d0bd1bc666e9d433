"""Are the values of a configuration of the types that its fields declare?"""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from multitangent_lab._errors import ConfigError

_DESCRIPTIONS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def check_fields(config: Any, at_least: Mapping[str, int]) -> None:
    """Checks every field of the dataclass `config`, and makes paths of strings, tuples of lists.

    Args:
        config: The configuration; it may be frozen.
        at_least: The smallest value of some whole numbers; all others are positive and finite.

    Raises:
        ConfigError: A value is not what its field declares.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        name, value = (
            field.name,
            _checked(field.name, getattr(config, field.name), hints[field.name]),
        )
        object.__setattr__(config, name, value)
        if isinstance(value, float) and not (isfinite(value) and value > 0):
            raise ConfigError(f"`{name}` should be positive and finite. Found {value}. Try 0.01.")
        if isinstance(value, int) and value < at_least.get(name, value):
            default = field.default
            hint = at_least[name] if default is None else f"the default, {default}"
            raise ConfigError(
                f"`{name}` should be at least {at_least[name]}. Found {value}. Try {hint}."
            )


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Returns `value` as the type `hint`."""
    if get_origin(hint) in (Union, UnionType):  # every union here is with None, some with a word
        first, *others = get_args(hint)
        words = [word for other in others for word in get_args(other)]
        return value if value is None or value in words else _checked(name, value, first)
    if get_origin(hint) is Literal:
        return _choice(name, value, get_args(hint))
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise ConfigError(f"`{name}` should be a list with one value or more. Found {value!r}.")
        return tuple(_checked(name, item, get_args(hint)[0]) for item in value)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(
            f"`{name}` should be {_DESCRIPTIONS.get(hint, 'a path')}. Found {value!r}."
        )
    return value


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        close = get_close_matches(str(value).lower(), choices, n=1)
        raise ConfigError(
            f"`{name}` should be one of {', '.join(choices)}. Found {value!r}. "
            f"Try {(close or choices)[0]!r}."
        )
    return value
