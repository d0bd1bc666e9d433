"""What the fuzz draws, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from multitangent_lab._errors import ConfigError
from multitangent_lab.config._checks import check_fields


@dataclass(frozen=True)
class FuzzConfig:
    """Compare random functions, models and steps with backpropagation; exit code 1 if one is wrong.

    Case i is a function of the seed and i alone. It composes PyTorch functions at random (i = 0, 3,
    6, ...), or takes a step of a random model (1, 4, 7, ...), or several steps in a row of a model
    that keeps a state or draws random numbers (2, 5, 8, ...). It is right; refused, with an error
    that says what was found and what to try; wrong; or unclear: any other error.

    Examples:
        >>> list(FuzzConfig(cases=3).indices), list(FuzzConfig(case=1234).indices)
        ([0, 1, 2], [1234])
    """

    cases: int = 1000
    """How many cases to run; 1000 take less than a minute."""
    seed: int = 0
    """Seed of all cases."""
    case: int | None = None
    """Run this case alone, to look at what a run of many has found."""
    pending: bool = False
    """Draw building blocks too that are known to be wrong, which are left out otherwise."""
    workers: int = 1
    """Processes that share the work."""
    out: Path | None = None
    """Folder for fuzz.json: the summary, what was not right, command, versions and machine."""

    def __post_init__(self) -> None:
        check_fields(self, {"cases": 1, "workers": 1, "case": 0})
        if self.seed < 0:
            raise ConfigError(f"`seed` should be at least 0. Found {self.seed}. Try 0.")

    @property
    def indices(self) -> range:
        """The numbers of the cases."""
        return range(self.cases) if self.case is None else range(self.case, self.case + 1)
