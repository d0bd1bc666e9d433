"""The learning rate that slopes and curvatures along the steps so far ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepRule:
    """Learning rate = progress / curvature, averaged over steps; any number of them side by side.

    After a step ``x <- x + r u`` the loss is differentiated twice along u where it has led. With
    slope s and curvature c there, the slope where the step began was ``s - r c``, for a quadratic
    loss, and its best learning rate ``(r c - s) / c``. Numerator and denominator are averaged
    apart, each over the usual size of ``|u|^2``: over random directions their ratio tends to
    ``E[-u . grad f] / E[u^T H u]``, the learning rate of the largest expected decrease.

    - *Noise.* The slope of the batch that u was made from promises more progress P than that of
      another batch, p. The rate of the largest decrease in one step is p/c. Over many steps noise
      averages out and curved directions come to rest, so that it is too small; P/c, which takes
      noise for progress, is too large. The rate is between: ``p^(1 - trust) P^trust / c``.
    - *Averages* reach as far back as it takes for the standard error of the mean progress to fall
      below `accuracy` of it; until it is known to be positive the rate does not grow.
    - *Negative curvature* counts as none: there the rate grows for as long as it lasts. Where
      ``c / |u|^2`` is above its average, the rate falls by as much at once, before the step that
      would be too long.
    - *Caution.* The first rate is a fraction of the best one along the first direction, and none
      is more than `growth` times the one before.

    Args:
        caution: That fraction.
        growth: The largest factor between the rates of two steps.
        trust: In what a batch says of the step that it was used for.
        accuracy: Of the mean progress, relative.
        shortest: Measurements to average over at least.
        longest: Measurements to average over at most.

    Attributes:
        learning_rate: Of the next step, ``[...]``; ``None`` before the first.
    """

    caution: float = 0.1
    growth: float = 1.02
    trust: float = 0.25
    accuracy: float = 0.1
    shortest: float = 4.0
    longest: float = 1000.0
    learning_rate: Tensor | None = field(default=None, init=False, repr=False)
    _count: Tensor | None = field(default=None, init=False, repr=False)
    # Of progress on another batch and on its own, curvature, variance, c/|u|^2 and |u|^2.
    _means: Tensor | None = field(default=None, init=False, repr=False)

    def begin(self, slope: Tensor, curvature: Tensor) -> Tensor:
        """The first learning rate, from slope and curvature ``[...]`` where the step begins."""
        best = (-slope / curvature).double().abs()
        self.learning_rate = self.caution * best.nan_to_num(1.0, 1.0)
        return self.learning_rate

    def update(
        self,
        slope: Tensor,
        curvature: Tensor,
        squared_length: Tensor,
        variance: Tensor,
        began: Tensor,
        steps: int = 1,
    ) -> Tensor:
        """The learning rate of the next step, from where the last one has led, all ``[...]``.

        Args:
            slope: ``u . grad f``, with u the step at learning rate 1.
            curvature: ``u^T H u``.
            squared_length: ``|u|^2``.
            variance: Of `slope`, as the mean over a batch.
            began: The slope where the step began, for the batch that u was made from.
            steps: How many steps there were since the last call.
        """
        if self.learning_rate is None:
            raise RuntimeError("`update` should follow `begin`. Found no learning rate yet.")
        length = squared_length.double()
        # The size of steps before this one: of this one it would be no independent weight.
        scale = length if self._means is None else self._means[5]
        measured = [
            (self.learning_rate * curvature - slope) / scale,
            -began / scale,
            curvature.clamp(min=0) / scale,
            variance / scale.square(),
            curvature.clamp(min=0) / length,
            length,
        ]
        new = torch.stack(measured)
        usable = new.isfinite().all(0)
        old_means = torch.zeros_like(new) if self._means is None else self._means
        count = usable.double() + (0.0 if self._count is None else self._count)
        needed = (old_means[3] / (self.accuracy * old_means[0]).square()).nan_to_num(1.0)
        reach = torch.minimum(needed.clamp(self.shortest, self.longest), count.clamp(min=1))
        means = torch.where(usable, old_means + (new - old_means) / reach, old_means)
        self._means, self._count = means, count
        progress, promised, curved, noise, bend, _ = means
        excess = torch.where(usable, (new[4] / bend).nan_to_num(1.0).clamp(min=1), 1.0)
        expected = progress ** (1 - self.trust) * promised**self.trust
        best = (expected / (curved * excess)).nan_to_num(torch.inf, torch.inf)
        best = torch.minimum(best, self.growth**steps * self.learning_rate)
        certain = (progress > 2 * (noise / reach).sqrt()) & (promised > 0)
        self.learning_rate = torch.where(usable & certain, best, self.learning_rate / excess)
        return self.learning_rate

    def state_dict(self) -> dict[str, Any]:
        """What it has met so far."""
        return {"rate": self.learning_rate, "count": self._count, "means": self._means}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.learning_rate, self._count, self._means = (
            state_dict[name] for name in ("rate", "count", "means")
        )
