"""What the doctor found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from multitangent.diagnosis._cost import Cost

Support = Literal["rule", "fallback", "unsupported"]
_SHOWN = 6  # of many names in one line


@dataclass(frozen=True)
class Finding:
    """One function of the model, and how it carries tangents.

    Attributes:
        function: Its name.
        support: ``"rule"`` if it has a rule of its own. ``"fallback"`` if tangents go through its
            backward, which is right but slower. ``"unsupported"`` if it can not carry tangents.
        paths: The modules that call it, as in ``model.named_modules()``; ``"(model)"`` is the model
            itself and ``"(loss)"`` the loss.
        reason: Why it is not supported.
        remedy: What to do about it.
    """

    function: str
    support: Support
    paths: tuple[str, ...]
    reason: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.function} in {_some(self.paths)}"
        text += f"\n      {self.reason}" if self.reason else ""
        return text + (f"\n      try: {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Report:
    """What the doctor found in a model.

    Attributes:
        functions: The functions that met tangents, in the order of their first call.
        sites: What is perturbed, with its size: a layer's output for one sample, or a weight.
        num_tangents: K, the number of tangents that the caller asked for.
        cost: What steps cost, if one can be taken.
        fault: Why the self-test against backpropagation failed or did not run. It is empty if the
            test passed.
        notes: What to know about a model that passes.
        repairs: What `fix=True` has changed.
    """

    functions: tuple[Finding, ...]
    sites: Mapping[str, int]
    num_tangents: int
    cost: Cost | None
    fault: str
    notes: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether every function is supported and the self-test passed."""
        return not self.fault and not self.unsupported

    @property
    def dimension(self) -> int:
        """The number of perturbed scalars n, per sample for activations."""
        return sum(self.sites.values())

    @property
    def unsupported(self) -> tuple[Finding, ...]:
        """The functions that can not carry tangents."""
        return self._with("unsupported")

    @property
    def fallbacks(self) -> tuple[Finding, ...]:
        """The functions without a rule."""
        return self._with("fallback")

    def _with(self, support: Support) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.functions if finding.support == support)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for repair in self.repairs:
            yield f"repaired: {repair}"
        yield f"functions with a rule: {len(self._with('rule'))}"
        for title, findings in (
            ("functions that use their own backward: right, but slower", self.fallbacks),
            ("not supported", self.unsupported),
        ):
            if findings:
                yield f"{title}:"
                yield from (f"    {finding}" for finding in findings)
        if self.sites:
            sizes = [f"{name or '(model)'} {size}" for name, size in self.sites.items()]
            places = "1 site" if len(sizes) == 1 else f"{len(sizes)} sites"
            yield f"perturbed: {places}, n = {self.dimension} ({_some(sizes)})"
        if self.cost is not None:
            yield str(self.cost.expected(self.num_tangents))
        for note in self.notes:
            yield f"note: {note}"
        passed = "passed: the gradient of a few samples is that of backpropagation"
        yield f"self-test {f'failed: {self.fault}' if self.fault else passed}"


def _some(names: tuple[str, ...] | list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
