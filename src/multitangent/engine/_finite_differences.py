"""Directional derivatives from differences of losses: no derivative of any function is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from multitangent.engine._engine import Derivatives
from multitangent.engine._split import SplitError, agree, losses_of_two_parts, unchanged
from multitangent.objective import Evaluation, output_tensor
from multitangent.perturbation import Inject, LazyRun, Run
from multitangent.tangents import Needs, Tangents

# The least error is at the cube root of the type's precision, times the scale of the values over
# which the third derivative matters: 0.02 here, since a tangent displaces all values at once.
_EPSILONS = {torch.float64: 1e-7, torch.float32: 1e-4}
_Kept = TypeVar("_Kept")
_OF_HALF_PRECISION = 1e-3  # where smaller displacements of weights are lost to rounding


@dataclass(frozen=True)
class FiniteDifferences:
    """Takes ``(l(w + e v) - l(w - e v)) / (2 e)``, two runs of the model for each tangent v.

    The runs keep no graph, so that their memory is that of inference. All have the random numbers
    and the statistics of the run at w itself, which alone changes what modules keep. A tangent that
    is a guess may have any length: e is divided by the root mean square of those of its entries
    that are not zero, in every sample for itself.

    Args:
        epsilon: e, by default that of `default_epsilon` for the type of the values.
        micro_batch: How many samples run at a time.
        statistics: Whether those of batch normalisation are those of the run at w, ``"frozen"``, or
            those of each run itself, ``"coupled"``.
        primal_run: Whether the model runs at w even where nothing but the value of the losses asks
            for it. If not, they are the mean over the runs, which is off by ``e^2 v^T H v / 2``.
        is_plain: Whether parts of the batch certainly need nothing of the whole.
        starts_after: Whether every run begins with what modules keep after the run at w.
        compares: Whether the first two parts are run as one, and have to give the same losses, if
            the whole batch is not run.

    Raises:
        SplitError: If the parts give other losses than the whole batch, or fail where it does not.

    Examples:
        >>> FiniteDifferences(epsilon=1e-3, micro_batch=8).epsilon
        0.001
    """

    epsilon: float | None
    micro_batch: int
    statistics: Literal["frozen", "coupled"] = "frozen"
    primal_run: bool = True
    is_plain: bool = False
    starts_after: bool = False
    compares: bool = False

    @torch.no_grad()
    def __call__(self, run: Run, tangents: Tangents) -> Derivatives:
        losses = self._primal_losses(run)
        if not tangents.blocks and losses is not None:  # nothing is before an exact output
            return Derivatives(losses, losses.new_zeros(tangents.num_tangents, *losses.shape))
        steps = self._steps(tangents)
        means, jvps, outputs = zip(
            *(self._pair(run, tangents, k, step) for k, step in enumerate(steps)), strict=True
        )
        return Derivatives(
            torch.stack(means).mean(0) if losses is None else losses,
            torch.stack(jvps),
            torch.stack(outputs) if tangents.needs & Needs.OUTPUT_TANGENTS else None,
        )

    def precision(self, dtype: torch.dtype) -> float:
        """The relative precision of the derivatives, for losses of a type."""
        return torch.finfo(dtype).eps ** (2 / 3)

    def _primal_losses(self, run: Run) -> Tensor | None:
        """The losses ``[B]`` at w, or ``None`` if the model need not run there."""
        is_split = run.batch.size > self.micro_batch
        run.starts_after = self.starts_after
        whole = run.prepare(certainly=not self.is_plain or (self.primal_run and not is_split))
        if whole is not None:
            if is_split and not self.is_plain:
                self._compare_parts(run, _numbers(whole))
            return _numbers(whole)
        if is_split and self.compares:
            self._compare_parts(run, _numbers(losses_of_two_parts(run, self.micro_batch)))
        if not self.primal_run:
            return None
        parts = run.batch.split(self.micro_batch)
        return _joined([_losses(run.evaluate(part, unchanged, self.statistics)) for part in parts])

    def _compare_parts(self, run: Run, whole: Tensor) -> None:
        """Raise unless parts give the losses of the whole, begun with either state of modules."""
        for run.starts_after in {self.starts_after: None, True: None}:
            try:
                losses = _joined(self._runs(run, unchanged, _losses, len(whole)))
            except (torch.OutOfMemoryError, NotImplementedError):
                raise
            except Exception as error:
                raise SplitError(f"{type(error).__name__}: {error}") from error
            if agree(losses[: len(whole)], whole):
                return
        raise SplitError("their losses differ from those of the whole batch")

    def _runs(
        self,
        run: Run,
        inject: Inject,
        keep: Callable[[Evaluation], _Kept],
        count: int | None = None,
    ) -> list[_Kept]:
        """What is kept of every part of the batch, with something in place of perturbed values.

        If there is a `count`, only the parts with the first `count` samples run.
        """
        evaluate = run.evaluate_lazily if isinstance(run, LazyRun) else run.evaluate
        parts = run.batch.split(self.micro_batch)
        if count is not None:
            parts = (part for part in parts if part.place_in(run.batch).start < count)
        return [keep(evaluate(part, inject, self.statistics)) for part in parts]

    def _pair(
        self, run: Run, tangents: Tangents, k: int, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of one tangent: the mean losses, the derivatives, those of the output if needed."""
        needs_output = bool(tangents.needs & Needs.OUTPUT_TANGENTS)
        keep = _losses_and_output if needs_output else _losses_alone
        sides = [self._runs(run, partial(_displaced, tangents, k, s), keep) for s in (step, -step)]
        plus, minus = (_joined([losses for losses, _ in side]) for side in sides)
        step = step.to(plus.device)
        of_losses = step.reshape(-1, *[1] * (plus.ndim - 1))
        slopes = (plus.double() - minus.double()) / (2 * of_losses)
        jvp = (slopes if run.per_sample else slopes.sum() * run.scale).to(plus.dtype)
        if not needs_output:
            return (plus + minus) / 2, jvp, None
        high, low = (torch.cat([output for _, output in side]) for side in sides)
        steps = step.to(high.dtype).reshape(-1, *[1] * (high.ndim - 1))
        return (plus + minus) / 2, jvp, (high - low) / (2 * steps)

    def _steps(self, tangents: Tangents) -> list[Tensor]:
        """E of every tangent in float64, ``[1]``, or ``[B]`` where each sample has its own."""
        blocks = list(tangents.blocks.values())
        epsilon = self.epsilon
        if epsilon is None:
            types = {(block.request.device.type, block.request.dtype) for block in blocks}
            epsilon = max(default_epsilon(dtype, device) for device, dtype in types)
        sizes = [
            _size(tangents, k) if guess else torch.ones(1, dtype=torch.float64)
            for k, guess in enumerate(tangents.guesses)
        ]
        return [epsilon / torch.where(size > 0, size, 1.0) for size in sizes]


def default_epsilon(dtype: torch.dtype, device: str = "cpu") -> float:
    """The length of a step along a tangent whose entries are of size 1.

    The error of a central difference is least near the cube root of the precision, times the scale
    of the values (Press et al., Numerical Recipes, Section 5.7): 1e-7 in ``float64``, 1e-4 in
    ``float32``. In half precision, and in mixed precision, it is the 1e-3 of MeZO
    (arXiv:2305.17333).

    Args:
        dtype: Of the values.
        device: Whose mixed precision counts.

    Examples:
        >>> default_epsilon(torch.float32), default_epsilon(torch.bfloat16)
        (0.0001, 0.001)
    """
    if torch.is_autocast_enabled(device):
        return _OF_HALF_PRECISION
    return _EPSILONS.get(dtype, _OF_HALF_PRECISION)


def _displaced(
    tangents: Tangents, k: int, step: Tensor, value: Tensor, name: str, samples: slice
) -> Tensor:
    """The value, moved along tangent k."""
    block = tangents.block(name)
    if block is None:  # none at the output, if that is exact
        return value
    of_samples = value.ndim > len(block.request.shape)
    row = block.row(k, samples if of_samples else None)
    if row is None:
        return value
    row = row.to(value.dtype) if of_samples else row[0].to(value.dtype)
    if len(step) == 1:
        return torch.add(value, row, alpha=float(step))
    steps = step[samples].to(value.device, value.dtype)
    return value + row * steps.reshape(-1, *[1] * (value.ndim - 1))


def _size(tangents: Tangents, k: int) -> Tensor:
    """The root mean square of the entries of tangent k that are not zero: ``[1]`` or ``[B]``."""
    squares, counts = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for block in tangents.blocks.values():
        row = block.row(k)
        if row is not None:
            flat = row.flatten(1).double().cpu()
            squares = squares + flat.square().sum(1)
            counts = counts + (flat != 0).sum(1)
    return (squares / counts.clamp(min=1)).sqrt()


def _numbers(losses: Tensor) -> Tensor:
    """Losses in full precision, whatever a loss returned, such as truth values."""
    if losses.dtype in (torch.float32, torch.float64):
        return losses
    return losses.float()


def _losses(evaluation: Evaluation) -> Tensor:
    return _numbers(evaluation.losses.detach())


def _losses_alone(evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    """The losses, and an empty tensor in place of an output that nobody needs."""
    losses = _losses(evaluation)
    return losses, losses[:0]


def _losses_and_output(evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    return _losses(evaluation), output_tensor(evaluation.output)


def _joined(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.cat(losses)
