"""What can be asked of a gradient, beside the gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from multitangent.dual import record_fallbacks
from multitangent.gradient._along import Line, line
from multitangent.gradient._arguments import check_repeats
from multitangent.gradient._assessment import Assessment, assess
from multitangent.gradient._coefficients import Combination
from multitangent.gradient._diagnostics import Diagnostics, diagnose
from multitangent.gradient._split_data import check_whole
from multitangent.gradient._step import Problem, Step
from multitangent.objective import Batch, Objective
from multitangent.parallel import Parallel
from multitangent.perturbation import BoundPerturbation
from multitangent.tangents import Stream, TangentSource


class Inspectable(ABC):
    """What the last step found, and how good the next gradient is."""

    tangents: TangentSource
    _objective: Objective
    _bound: BoundPerturbation
    _parallel: Parallel
    _last_step: tuple[Combination, Tensor, set[str]] | None = None
    _last_batch: tuple[Batch, Stream] | None = None
    _sizes: dict[str, int] | None = None  # of what the last step perturbed

    @abstractmethod
    def prepare(self, inputs: Any, target: Any = None) -> tuple[Problem, Batch, Stream]:
        """What the next step is made of."""

    @abstractmethod
    def _eager(self, problem: Problem, batch: Batch, stream: Stream) -> Step:
        """One step."""

    def along(self, direction: Mapping[str, Tensor], *, curvature: bool = True) -> Line:
        """The loss of the last batch along a direction: its slope and curvature, per sample.

        One pass of forward mode over forward mode at the parameters as they are now; dropout draws
        the masks of the last step, batch normalisation uses the batch's statistics.

        Args:
            direction: Tensors by names of parameters; those without one stay where they are.
            curvature: Whether to differentiate a second time.

        Raises:
            RuntimeError: Before the first step.
            ValueError: If a direction does not fit a parameter.

        Examples:
            >>> import torch
            >>> from multitangent import ForwardGradient
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> gradient = ForwardGradient(model, torch.nn.MSELoss())
            >>> value = gradient(torch.ones(3, 2), torch.zeros(3, 1))
            >>> gradient.along({"weight": torch.ones(1, 2)}).curvature  # of (w_1 + w_2)^2
            tensor(8.)
        """
        check_whole(self._parallel, "along")
        if self._last_batch is None:
            raise RuntimeError(
                "`along` should be called after a step, whose batch it uses. Found none yet. Try "
                "to call the gradient with a batch first."
            )
        return line(self._objective, *self._last_batch, direction, curvature=curvature)

    def assess(self, inputs: Any, target: Any = None, *, repeats: int = 1) -> Assessment:
        """The gradient that the next step would take of a batch, beside the true one.

        Nothing changes: neither gradients nor buffers, the count of the steps or what sources have
        learned. It costs `repeats` steps and two of backpropagation.

        Args:
            inputs: As for a step.
            target: As for a step.
            repeats: The number of estimates to average. They differ only in their random tangents.
                Several estimates tell a bias, which stays, from noise, which averages out.

        Raises:
            ValueError: If `repeats` is above 1 and a source draws random numbers by other means
                than its request.

        Examples:
            Six tangents span all n = 5 activations; one does not, but its mean is without bias:

            >>> import torch
            >>> from torch import nn
            >>> from multitangent import ForwardGradient, Mean, Normal
            >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
            >>> batch = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
            >>> gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(4) + Normal(2))
            >>> found = gradient.assess(*batch)
            >>> round(found.cosine, 3), sorted(found.cosines)
            (1.0, ['0', '2'])
            >>> found.captured["Normal(num_tangents=4)"] < 0.999 < found.captured["all"]
            True
            >>> gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(1), Mean())
            >>> found = gradient.assess(*batch, repeats=100)
            >>> found.cosine_of_mean < found.limit > 0.9
            True
        """
        check_repeats(repeats)
        check_whole(self._parallel, "assess")
        with record_fallbacks():
            prepared = self.prepare(inputs, target)
            sites = self._bound.parameters_by_site()
            return assess(
                self._objective, sites, self.tangents, self._eager, *prepared, repeats=repeats
            )

    @property
    def sites(self) -> dict[str, int | None]:
        """What is perturbed: layers or parameters by name, with their sizes, which add up to n.

        The size of a layer's output is that for one sample. It is ``None`` before the first step.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from multitangent import ForwardGradient
            >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
            >>> gradient = ForwardGradient(model, nn.CrossEntropyLoss())
            >>> gradient.sites
            {'0': None, '2': None}
            >>> loss = gradient(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
            >>> gradient.sites
            {'0': 3, '2': 2}
        """
        if self._sizes is not None:
            return dict(self._sizes)
        return dict.fromkeys(self._bound.parameters_by_site())

    @property
    def diagnostics(self) -> Diagnostics:
        """What the last step measured.

        Raises:
            RuntimeError: Before the first step.
        """
        if self._last_step is None:
            raise RuntimeError(
                "`diagnostics` should be read after a step. Found none yet. Try to call the "
                "gradient with a batch first."
            )
        return diagnose(*self._last_step)
