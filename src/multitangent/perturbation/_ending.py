"""How a model ends behind its last site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Injection:
    """One output of a site, before and after something took its place."""

    name: str
    before: Tensor
    after: Tensor
    version: int  # of the primal, which a write in place counts up


@dataclass
class Ending:
    """How a model ends, where the output is exact: known after the first run.

    Attributes:
        is_known: Whether a run has shown it.
        site: The site whose output stays in the graph of the loss; ``None`` if the last site's
            output is the model's.
        value: The name of the last perturbed value, as far as a source needs its gradient.
        output: The name of what the last run returned, if that was the output of a site.
    """

    is_known: bool = False
    site: str | None = None
    value: str | None = None
    output: str | None = None


class OtherEndError(Exception):
    """The model ends in another way than was known."""
