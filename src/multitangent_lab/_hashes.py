"""Names of results: the same for equal settings on every machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any


def without_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that are at their default, where they have one.

    A setting that came later does not change the names of older results.
    """
    return {k: v for k, v in values.items() if k not in defaults or v != defaults[k]}


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that stand for a JSON value.

    Examples:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
