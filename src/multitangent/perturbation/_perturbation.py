"""What a perturbation is: which values of a model the tangents are directions of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from multitangent.dual import DualTensor
from multitangent.objective import Batch, Change, Evaluation, Objective, Statistics
from multitangent.tangents import Stream, Tangents

# What takes the place of a perturbed value, from that value, its name, and which samples of the
# batch it is of.
Inject = Callable[[Tensor, str, slice], Tensor]


class Run(Protocol):
    """One batch, which an engine runs through the model as often as it needs to.

    Attributes:
        batch: The whole batch.
        per_sample: Whether perturbed values, and so directional derivatives, are of one sample
            each; otherwise of the batch.
        scale: The weight of one sample's loss in the loss of the batch.
        starts_after: Whether what modules keep is, at the start of `evaluate`, as `prepare` left
            it; by default as `prepare` found it.
    """

    batch: Batch
    per_sample: bool
    scale: float
    starts_after: bool

    def record(self, inject: Inject) -> Evaluation:
        """Run the whole batch with something in place of every perturbed value.

        Blocks of tangents are added as their places are reached. What `pullback` needs is kept.
        """

    def prepare(self, *, certainly: bool = False) -> Tensor | None:
        """In place of `record`: what `evaluate` and `pullback` need, with no value replaced.

        Args:
            certainly: Whether the whole batch is run even where its parts seem to need nothing.

        Returns:
            The losses ``[B]`` if the whole batch was run for it.
        """

    def evaluate(
        self, part: Batch, inject: Inject, statistics: Statistics = "frozen", *, reuse: bool = False
    ) -> Evaluation:
        """Run some samples with something in place of every perturbed value.

        Args:
            part: The samples.
            inject: What takes the place of a perturbed value.
            statistics: What batch normalisation in training mode does.
            reuse: Whether primals that `prepare` computed may be used again. They carry no graph.
        """

    def pullback(self, gradients: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
        """From the gradients of the perturbed values to those of the parameters.

        Args:
            gradients: By name: ``[B, *shape]`` of the samples' losses, or of the batch's loss.

        Returns:
            The gradients of the batch's loss.
        """


@runtime_checkable
class LazyRun(Protocol):
    """A run that can do with less memory where no graph is wanted."""

    def evaluate_lazily(
        self, part: Batch, inject: Inject, statistics: Statistics = "frozen"
    ) -> Evaluation:
        """As `Run.evaluate`, with each value replaced when the model reaches for it.

        Nothing is recorded. What `inject` makes, it makes again wherever the value is used.
        """


class BoundPerturbation(Protocol):
    """A perturbation of one model."""

    def parameters_by_site(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters whose gradients each site yields, by its name."""

    def __call__(self, batch: Batch, stream: Stream, tangents: Tangents) -> Run:
        """The run of one step.

        Args:
            batch: The whole batch.
            stream: The random numbers of the step.
            tangents: Where blocks are added; those of later calls.
        """


class Perturbation(Protocol):
    """Which values of a model are perturbed."""

    def bind(self, objective: Objective) -> BoundPerturbation:
        """Check the model; returns what makes the runs."""


def discount_of(run: Run) -> float | None:
    """The discount with which the loss of a token is credited to the positions up to it.

    A run with losses of tokens, ``[B, T]``, has an attribute `discount`. The result is ``None`` for
    a run with losses of samples.
    """
    discount = getattr(run, "discount", None)
    return None if discount is None else float(discount)


def again(change: Change | None, starts_after: bool) -> AbstractContextManager[None]:
    """In this block modules run once more, and what they keep stays as it is.

    Args:
        change: By the run of the whole batch; ``None`` if there is nothing to put back.
        starts_after: Whether they begin with the state after that run, not that before.
    """
    is_transformed = torch._C._functorch.maybe_current_level() is not None  # nothing can be put
    if change is None or is_transformed:
        return nullcontext()
    return change.kept() if starts_after else change.undone()


@contextmanager
def reading(batch: Batch) -> Iterator[None]:
    """A block in which the model must not write into its input, since the parts need it too."""
    versions = batch.versions
    yield
    check_unwritten(batch, versions)


def check_unwritten(batch: Batch, versions: Sequence[int]) -> None:
    """Raise if the model has written into an input that it runs on once more."""
    if batch.versions != versions:
        raise RuntimeError(
            "`model` should leave its input as it is where it runs more than once for a step, such "
            "as on parts of the batch. Found an input that was changed in place. Try `x = "
            "x.clone()` at the start of the model, or `micro_batch` as large as the batch."
        )


def zero_injection(value: Tensor, name: str, samples: slice) -> Tensor:
    """The value with a tangent of zero, for models that ask whether there is a gradient."""
    if isinstance(value, DualTensor):
        return value
    return DualTensor(value, value.new_zeros(1, *[1] * value.ndim))


def no_injection(value: Tensor, name: str, samples: slice) -> Tensor:
    """Every value stays as it is."""
    return value
