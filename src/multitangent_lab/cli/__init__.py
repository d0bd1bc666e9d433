"""The command `multitangent`."""

from multitangent_lab.cli._main import commands, main, parse

__all__ = ["commands", "main", "parse"]
