"""Runs the command `multitangent`: ``python -m multitangent_lab.cli``."""

import sys

from multitangent_lab.cli import main

sys.exit(main())
