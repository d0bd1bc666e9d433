"""One step of the method, as one function. Read this first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from multitangent.aggregation import Aggregator, SumOfGuesses
from multitangent.engine import Engine, NoDerivatives, precision_of
from multitangent.gradient._coefficients import Combination, combine, sum_of_guesses
from multitangent.objective import Batch
from multitangent.perturbation import Run, discount_of
from multitangent.tangents import (
    Needs,
    Observation,
    Stream,
    Tangents,
    TangentsInTime,
    TangentSource,
)


def step(problem: Problem, batch: Batch, stream: Stream) -> Step:
    """One step: the forward gradient ``g = V^T c`` of a batch (Section III).

    Nothing but the model's own buffers changes: neither ``.grad`` nor what a source has learned.

    Args:
        problem: What is differentiated and how.
        batch: The batch.
        stream: The random numbers of the step.

    Raises:
        ValueError: If a loss, a directional derivative or a Gram matrix is not finite.

    Examples:
        >>> from multitangent import Activations, Normal, Projection
        >>> from multitangent.engine import ForwardMode
        >>> from multitangent.objective import Objective
        >>> objective = Objective(nn.Linear(3, 2), nn.CrossEntropyLoss())
        >>> problem = Problem(
        ...     Activations().bind(objective), Normal(4), Projection(), ForwardMode(micro_batch=8)
        ... )
        >>> batch = objective.batch(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))
        >>> result = step(problem, batch, Stream(seed=0, step=0))
        >>> result.combination.jvps.shape, [list(g.shape) for g in result.gradients.values()]
        (torch.Size([4, 8]), [[2, 3], [2]])
    """
    tangents = Tangents(
        problem.source, stream, store=problem.store_tangents, dtype=problem.tangent_dtype
    )
    run = problem.perturbation(batch, stream, tangents)
    aggregator = problem.aggregator.of_step(learns=bool(tangents.needs & Needs.UPDATE))
    engine = problem.engine_of_step(aggregator, tangents)
    losses, jvps, output_tangents = engine(run, tangents)
    with _full_precision(jvps.device.type):
        if problem.takes_guesses_as_they_are(aggregator, tangents):
            combination, values = sum_of_guesses(tangents, jvps)
            drawn = combination.gram
        else:
            seen = _as_seen(tangents, run, jvps)
            drawn, jvps = problem.reduce(seen.gram().to(jvps.device), jvps)
            combination = combine(
                problem.source,
                aggregator,
                drawn,
                jvps,
                seen.dimension,
                precision_of(problem.engine, jvps.dtype),
            )
            values = seen.combine(combination.coefficients)
        gradients = run.pullback(values)
    return Step(
        losses,
        drawn,
        combination,
        gradients,
        tangents,
        values,
        per_sample=run.per_sample,
        output_tangents=output_tangents,
    )


def _as_seen(tangents: Tangents, run: Run, jvps: Tensor) -> Tangents | TangentsInTime:
    """The tangents as the losses see them. The loss of a token sees them up to its position."""
    discount = discount_of(run)
    return tangents if discount is None else TangentsInTime(tangents, jvps.shape[-1], discount)


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Inside this block nothing is computed in mixed precision."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _local(gram: Tensor, jvps: Tensor) -> tuple[Tensor, Tensor]:
    """What this process has measured, as it is."""
    return gram, jvps


@dataclass(frozen=True)
class Problem:
    """What a step differentiates, and how.

    Attributes:
        perturbation: Makes the run of one batch, as a perturbation that is bound to a model does.
        source: Where tangents come from.
        aggregator: How the directional derivatives are combined.
        engine: How the directional derivatives are obtained.
        store_tangents: Whether tangents are kept, or drawn again where they are needed.
        tangent_dtype: The type in which tangents are carried, by default the perturbed value's.
        reduce: From the Gram matrix and directional derivatives of this process to those of all.
        measures: Whether directional derivatives are obtained where nothing needs them.
    """

    perturbation: Callable[[Batch, Stream, Tangents], Run]
    source: TangentSource
    aggregator: Aggregator
    engine: Engine
    store_tangents: bool = True
    tangent_dtype: torch.dtype | None = None
    reduce: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _local
    measures: bool = False

    def engine_of_step(self, aggregator: Aggregator, tangents: Tangents) -> Engine:
        """The engine, or none where neither the aggregator nor the source needs derivatives."""
        of_source = tangents.needs & Needs.OUTPUT_TANGENTS
        if self.measures or aggregator.needs_derivatives or of_source:
            return self.engine
        return NoDerivatives(self.engine.statistics)

    def takes_guesses_as_they_are(self, aggregator: Aggregator, tangents: Tangents) -> bool:
        """Whether the gradient is the sum of what was guessed, so that no Gram matrix is needed."""
        is_sum = isinstance(aggregator, SumOfGuesses) and not self.source.mixes
        return is_sum and bool(tangents.blocks) and not self.measures


@dataclass(frozen=True)
class Step:
    """What one step found.

    Attributes:
        losses: Of the samples, ``[B]``, or of their tokens, ``[B, T]``.
        gram: Gram matrix of the tangents as they were drawn.
        combination: Coefficients, and what the aggregator saw.
        gradients: The gradients of the batch's loss by the parameters.
        tangents: V; ``None`` for a compiled step, which keeps nothing else.
        values: The gradients of the perturbed values by name: ``[B, *shape]`` of the samples'
            losses, or of the batch's loss.
        per_sample: Whether those are of samples.
        output_tangents: The derivatives of the model's output along V, ``[K, B, *output]``, where
            the source needs them.
        learned: The source's state after the step, if a compiled step has computed it.
    """

    losses: Tensor
    gram: Tensor
    combination: Combination
    gradients: Mapping[nn.Parameter, Tensor]
    tangents: Tangents | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    per_sample: bool = True
    output_tangents: Tensor | None = None
    learned: Mapping[str, Any] | None = None

    @property
    def teaches(self) -> bool:
        """Whether the source is to be told of the step."""
        needs = Needs.NOTHING if self.tangents is None else self.tangents.needs
        return self.learned is not None or bool(needs & Needs.UPDATE)

    @property
    def observation(self) -> Observation | None:
        """What the source is to be told, if it needs to be.

        To be read before the source learns: tangents that are not stored are drawn again.
        """
        if self.tangents is None or not self.tangents.needs & Needs.UPDATE:
            return None
        blocks = self.tangents.blocks
        if not blocks:  # nothing was perturbed
            return None
        seen = blocks if self.output_tangents is not None else {}
        of_samples = self.values if self.per_sample else _with_samples(self.values)
        return Observation(
            requests={name: block.request for name, block in blocks.items()},
            tangents={name: block.rows() for name, block in seen.items()},
            guesses=self.tangents.source.guesses,
            gradients=of_samples,
            output_tangents=self.output_tangents,
        )


def _with_samples(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of the batch as those of a batch of one sample."""
    return {name: value.unsqueeze(0) for name, value in values.items()}
