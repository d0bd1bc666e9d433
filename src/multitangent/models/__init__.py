"""The networks of the paper."""

from multitangent.models._fully_connected import fully_connected

__all__ = ["fully_connected"]
