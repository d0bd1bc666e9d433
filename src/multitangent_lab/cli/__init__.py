"""The command `multitangent`."""

from multitangent_lab.cli._main import main

__all__ = ["main"]
